"""The report of an evaluation: one HTML file that carries everything it shows and asks nobody."""

import base64
import io
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dml import __version__
from dml.data.reading import read
from dml.data.table import Record
from dml.errors import InvalidImage, MissingExtra, StorageError
from eval.curves import read_history, training_curves
from eval.embedding_map import draw_map, place, thumbnails_on
from eval.evaluate import ClassFigures, Evaluation
from eval.served import StageTable
from eval.show import title_of

MEANINGS = {
    "recall@1": "the nearest picture is of the right class",
    "map@r": "how pure and how well ordered the first R results are",
    "r_precision": "share of right ones among the first R results",
    "nmi": "agreement of a clustering with the classes",
}
THUMBNAIL = 112
"""Longer side of a picture in the report, in pixels."""


@dataclass(frozen=True)
class Figure:
    """One headline number with its interval; all lie in [0, 1]."""

    title: str
    value: float
    low: float | None
    high: float | None
    meaning: str


@dataclass(frozen=True)
class Shown:
    """A picture in a row of results."""

    source: str  # data URI
    label: str
    score: float | None = None
    right: bool | None = None
    name: str = ""


@dataclass(frozen=True)
class QueryRow:
    """One query and what came back."""

    query: Shown
    results: list[Shown]
    average_precision: float
    first_hit: int


def write_report(
    evaluation: Evaluation,
    out: Path,
    *,
    run: Path | None = None,
    stages: StageTable | None = None,
    rows: int = 8,
    neighbours: int = 10,
) -> Path:
    """Write the report to `out` (a .html file; its folder is made).

    Args:
        run: a run or encoder folder; training curves, recipe and environment are shown where it has them.
        stages: exact search, index and service over the same queries.
        rows: how many of the best and of the worst queries.
        neighbours: results shown for each.

    Raises:
        MissingExtra: without jinja2, matplotlib or scikit-learn.
        StorageError: the file cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # before the work, so that a wrong path is told at once
        page = render(evaluation, run=run, stages=stages, rows=rows, neighbours=neighbours)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"the report {out} cannot be written: {error.strerror or error}") from error
    return out


def render(
    evaluation: Evaluation,
    *,
    run: Path | None = None,
    stages: StageTable | None = None,
    rows: int = 8,
    neighbours: int = 10,
) -> str:
    """The report as text; arguments and errors as `write_report`."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ModuleNotFoundError:
        raise MissingExtra("jinja2, which writes the report,", "train") from None
    ranking = evaluation.ranking()
    shown = min(rows, len(ranking))
    # Where nearly all queries are perfect, the last ones of the ranking are as good as any; spread over
    # classes.
    worst, best = ranking[:shown], _one_per_class(evaluation, ranking[::-1], shown)
    environment = Environment(
        loader=PackageLoader("eval"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = lambda value: f"{value:.3f}"
    environment.filters["percent"] = lambda value: f"{100 * value:.1f}"
    return environment.get_template("report.html").render(
        title=f"{run.name if run else 'Encoder'} on {evaluation.selection.source}",
        evaluation=evaluation,
        selection=evaluation.selection,
        protocol=explain_protocol(evaluation),
        figures=headline(evaluation),
        curves=training_curves(read_history(run / "metrics.jsonl")) if run else "",
        worst=query_rows(evaluation, worst, neighbours),
        best=query_rows(evaluation, best, neighbours),
        map=embedding_map(evaluation),
        classes=evaluation.classes(),
        distribution=(tenths := distribution(evaluation.classes())),
        largest=max(count for _, count in tenths),
        neighbour_columns=neighbours,
        final_note=final_note(run),
        stages=stages,
        recipe=read_text(run / "recipe.toml") if run else "",
        environment=environment_rows(run),
        version=__version__,
        written=datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z"),
    )


def headline(evaluation: Evaluation) -> list[Figure]:
    """Recall@1, MAP@R and R-Precision first, then the other Recall@K and NMI."""
    values = evaluation.metrics.figures()
    first = [name for name in ("recall@1", "map@r", "r_precision") if name in values]
    order = first + [name for name in values if name not in first]
    figures = []
    for name in order:
        low, high = evaluation.intervals[name]
        title = title_of(name)
        meaning = MEANINGS.get(name, f"a right one among the {name.partition('@')[2]} nearest")
        figures.append(Figure(title, values[name], low, high, meaning))
    if evaluation.nmi is not None:
        figures.append(Figure(title_of("nmi"), evaluation.nmi, None, None, MEANINGS["nmi"]))
    return figures


def explain_protocol(evaluation: Evaluation) -> str:
    """What the figures may be taken for, in a sentence."""
    return {
        "open-set": "Open-set: none of these classes was seen in training.",
        "closed-set": "Closed-set: these classes were seen in training, these pictures were not.",
        "untrained": "The encoder was not trained on labelled classes.",
    }.get(evaluation.selection.protocol, evaluation.selection.protocol)


def query_rows(evaluation: Evaluation, rows: np.ndarray, neighbours: int) -> list[QueryRow]:
    """Queries with the pictures that were found, each marked right or wrong."""
    if not len(rows):
        return []
    found = evaluation.neighbours(rows, neighbours)
    shown = []
    for row, positions, scores in zip(rows, found.positions, found.scores, strict=True):
        query = evaluation.query[row]
        results = [
            show(
                evaluation.gallery[position],
                score=float(score),
                right=evaluation.gallery[position].label == query.label,
            )
            for position, score in zip(positions, scores, strict=True)
            if position >= 0
        ]
        average, first = evaluation.metrics.average_precision[row], evaluation.metrics.first_hit[row]
        shown.append(QueryRow(show(query), results, float(average), int(first)))
    return shown


def show(record: Record, *, score: float | None = None, right: bool | None = None) -> Shown:
    return Shown(data_uri(record), str(record.label), score, right, record.path.name)


def data_uri(record: Record, size: int = THUMBNAIL, *, square: bool = False) -> str:
    """A small JPEG of the picture as a data URI; a grey square where the file cannot be read any more."""
    try:
        picture = read(record)
    except InvalidImage:
        picture = Image.new("RGB", (size, size), (128, 128, 128))
    if square:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def embedding_map(evaluation: Evaluation) -> str:
    """The gallery as a map."""
    dots = place(evaluation.gallery_vectors)
    pictures = {
        dot.row: data_uri(evaluation.gallery[dot.row], 64, square=True) for dot in thumbnails_on(dots)
    }
    return draw_map(dots, [str(r.label) for r in evaluation.gallery], pictures)


def distribution(classes: Sequence[ClassFigures]) -> list[tuple[str, int]]:
    """How many classes have a Recall@1 in each tenth; 1.0 belongs to the last."""
    tenths = [min(9, int(figures.recall_at_1 * 10 + 1e-9)) for figures in classes]
    return [(f"{t / 10:.1f}–{(t + 1) / 10:.1f}", tenths.count(t)) for t in range(10)]


def final_note(run: Path | None) -> str:
    """What to know of a model that was trained again on all classes: it has seen what is measured here."""
    manifest = read_text(run / "encoder" / "manifest.json") if run else ""
    if not manifest or json.loads(manifest).get("provenance", {}).get("trained_on") != "all classes":
        return ""
    return (
        "this encoder was trained on all classes of its data, the test classes too, so figures on that data "
        "are too "
        "good. The honest ones are those of the selected model, in the folder selection of the run."
    )


def environment_rows(run: Path | None) -> list[tuple[str, str]]:
    """Where the run was trained, or, without a run, where this report was written."""
    recorded = read_text(run / "environment.json") if run else ""
    if not recorded:
        return [("python", platform.python_version()), ("system", platform.platform())]
    return list(_flat(json.loads(recorded)))


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in tree.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{name} ")
        elif value is not None:
            rows.append((prefix + name, str(value)))
    return rows


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _one_per_class(evaluation: Evaluation, rows: np.ndarray, count: int) -> np.ndarray:
    """The first `count` rows, no class twice while there are others."""
    seen: set[str | None] = set()
    chosen, rest = [], []
    for row in rows:
        label = evaluation.query[row].label
        (rest if label in seen else chosen).append(row)
        seen.add(label)
    return np.array((chosen + rest)[:count], dtype=np.int64)
