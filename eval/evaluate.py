"""From an encoder and labelled pictures to figures: what every evaluation here shares.

`choose` says which pictures are searched in which, `evaluate` embeds them once and measures. Commands, the
report and the stage table start from the `Evaluation` that comes out.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dml.config import DataConfig, load_recipe
from dml.data.reading import batches_of, check_share
from dml.data.split import Splits, divide
from dml.data.table import ImageTable, Record, open_table
from dml.encoder import Encoder, find_encoder
from dml.errors import DataError, UsageError
from dml.imaging import BadImage
from dml.metrics import (
    Interval,
    Neighbours,
    RetrievalMetrics,
    bootstrap_interval,
    neighbours,
    nmi,
    retrieval_metrics,
)

SPLITS = ("test", "validation", "all")

Vectors = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with (pictures done, pictures in all)."""


@dataclass(frozen=True)
class Selection:
    """Which pictures are searched in which, and how that may be called."""

    source: str  # the data set, for people
    split: str  # "test", "validation", "all"
    protocol: str  # "open-set", "closed-set", "untrained"
    query: tuple[Record, ...]
    gallery: tuple[Record, ...] | None  # None: the queries are searched among themselves
    digest: str | None = None  # of the splits, when the run recorded them
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: protocol, split, images and classes of both sides."""
        sides = [_counted(self.query, "queries" if self.gallery is not None else "images")]
        if self.gallery is None:
            sides.append("each searched among the others")
        else:
            sides.append("searched in " + _counted(self.gallery, "gallery images"))
        return f"{self.source}, {self.split} split, {self.protocol}: {', '.join(sides)}"


@dataclass(frozen=True)
class ClassFigures:
    """How one class fares as a query."""

    label: str
    images: int  # counted queries
    recall_at_1: float
    map_at_r: float


@dataclass(frozen=True)
class Evaluation:
    """Figures of one selection, with everything that it takes to look closer."""

    selection: Selection
    query: tuple[Record, ...]  # those that could be read, in the order of `query_vectors`
    gallery: tuple[Record, ...]  # the same tuple as `query` when they are searched among themselves
    query_vectors: Vectors  # (Q, D) unit
    gallery_vectors: Vectors  # (N, D) unit
    metrics: RetrievalMetrics
    intervals: dict[str, Interval]  # by the names of `metrics.figures()`, 95 %
    resampled: Literal["classes", "queries"]
    nmi: float | None
    bad: tuple[BadImage, ...]
    encoder: dict[str, Any] = field(default_factory=dict)  # fingerprint, dim, runtime
    seconds: float = 0.0  # of embedding

    @property
    def is_among_themselves(self) -> bool:
        return self.selection.gallery is None

    def classes(self) -> list[ClassFigures]:
        """Every class that was queried, the worst Recall@1 first (ties: the worse MAP@R, then the name)."""
        first, average = self.metrics.hit(1), self.metrics.average_precision
        rows: dict[str, list[int]] = {}
        for row in np.flatnonzero(self.metrics.counted):
            rows.setdefault(str(self.query[row].label), []).append(int(row))
        figures = [
            ClassFigures(label, len(where), float(first[where].mean()), float(average[where].mean()))
            for label, where in rows.items()
        ]
        return sorted(figures, key=lambda f: (f.recall_at_1, f.map_at_r, f.label))

    def ranking(self) -> NDArray[np.int64]:
        """Counted queries from worst to best: by AP@R, then by how deep the first relevant item lies."""
        rows = np.flatnonzero(self.metrics.counted)
        return rows[np.lexsort((rows, -self.metrics.first_hit[rows], self.metrics.average_precision[rows]))]

    def neighbours(self, rows: NDArray[np.int64], k: int) -> Neighbours:
        """The k nearest gallery pictures of some queries, never the query itself."""
        own = ids_of(self.query)
        return neighbours(
            self.query_vectors[rows],
            self.gallery_vectors,
            k,
            query_ids=[own[row] for row in rows],
            gallery_ids=ids_of(self.gallery),
        )

    def as_json(self) -> dict[str, Any]:
        """Figures, intervals, counts and provenance as plain values."""
        return {
            "data": self.selection.source,
            "split": self.selection.split,
            "protocol": self.selection.protocol,
            "split_digest": self.selection.digest,
            "query_is_gallery": self.is_among_themselves,
            "images": {"query": len(self.query), "gallery": len(self.gallery)},
            "classes": {"query": len(labels_of(self.query)), "gallery": len(labels_of(self.gallery))},
            "queries": self.metrics.queries,
            "skipped": self.metrics.skipped,
            "unreadable": [{"path": b.path, "reason": b.reason} for b in self.bad],
            "metrics": self.metrics.figures() | ({} if self.nmi is None else {"nmi": self.nmi}),
            "intervals": {name: [i.low, i.high] for name, i in self.intervals.items()},
            "interval_resamples": self.resampled,
            "per_class": [vars(figures) for figures in self.classes()],
            "encoder": self.encoder,
            "embedding_seconds": round(self.seconds, 3),
        }


def evaluate(
    encoder: Encoder,
    selection: Selection,
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    with_nmi: bool = True,
    batch_size: int = 64,
    workers: int = 2,
    max_bad_share: float = 0.05,
    progress: Progress | None = None,
) -> Evaluation:
    """Embed a selection and measure it.

    Args:
        with_nmi: also cluster the queries, which takes longer than all the rest for thousands of classes.
        max_bad_share: the share of pictures that may be unreadable; those are skipped and listed.

    Raises:
        TooManyBadImages: above that share.
        DataError: nothing can be measured (no class with two pictures).
    """
    started = time.perf_counter()
    bad: list[BadImage] = []
    total = len(selection.query) + len(selection.gallery or ())
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "bad": bad, "total": total}
    query, query_vectors = embed(encoder, selection.query, progress=progress, **options)
    gallery, gallery_vectors = query, query_vectors
    if selection.gallery is not None:
        done = len(selection.query)
        gallery, gallery_vectors = embed(encoder, selection.gallery, progress=progress, done=done, **options)
    check_share(bad, total, max_bad_share)
    seconds = time.perf_counter() - started
    about = {"fingerprint": encoder.fingerprint, "dim": encoder.dim, "runtime": encoder.runtime}
    return measure(
        selection,
        (query, query_vectors),
        (gallery, gallery_vectors),
        ks=ks,
        with_nmi=with_nmi,
        bad=bad,
        encoder=about,
        seconds=seconds,
    )


def measure(
    selection: Selection,
    query: tuple[tuple[Record, ...], Vectors],
    gallery: tuple[tuple[Record, ...], Vectors],
    *,
    ks: Sequence[int] = (1, 2, 4, 8),
    with_nmi: bool = True,
    bad: Sequence[BadImage] = (),
    encoder: dict[str, Any] | None = None,
    seconds: float = 0.0,
) -> Evaluation:
    """The figures of vectors that exist already. Errors as `evaluate`."""
    if not query[0] or not gallery[0]:
        raise DataError(f"{selection.describe()}: no picture of it could be read")
    metrics = retrieval_metrics(
        query[1],
        [r.label for r in query[0]],
        ids=ids_of(query[0]),
        gallery=gallery[1],
        gallery_labels=[r.label for r in gallery[0]],
        gallery_ids=ids_of(gallery[0]),
        ks=ks,
    )
    # Unseen classes are themselves a sample of classes; known ones are not, only their pictures are.
    by_class = selection.protocol != "closed-set"
    groups = [r.label for r in query[0]] if by_class else None
    per_query = metrics.per_query()
    return Evaluation(
        selection=selection,
        query=query[0],
        gallery=gallery[0],
        query_vectors=query[1],
        gallery_vectors=gallery[1],
        metrics=metrics,
        intervals={name: bootstrap_interval(values, groups=groups) for name, values in per_query.items()},
        resampled="classes" if by_class else "queries",
        nmi=nmi(query[1], [r.label for r in query[0]]) if with_nmi else None,
        bad=tuple(bad),
        encoder=encoder or {},
        seconds=seconds,
    )


def embed(
    encoder: Encoder,
    records: Sequence[Record],
    *,
    batch_size: int = 64,
    workers: int = 2,
    bad: list[BadImage] | None = None,
    progress: Progress | None = None,
    done: int = 0,
    total: int | None = None,
) -> tuple[tuple[Record, ...], Vectors]:
    """The records that can be read and their vectors (N, D). Unreadable ones are appended to `bad`."""
    kept: list[Record] = []
    parts: list[Vectors] = []
    batches = batches_of(records, encoder.preprocess, batch_size=batch_size, workers=workers, bad=bad)
    for rows, pixels in batches:
        kept += [records[row] for row in rows]
        parts.append(encoder.embed_arrays(pixels))
        if progress is not None:
            progress(done + int(rows[-1]) + 1, len(records) if total is None else total)
    vectors = np.concatenate(parts) if parts else np.empty((0, encoder.dim), np.float32)
    return tuple(kept), vectors


def measured_run(run: Path) -> tuple[Path, tuple[str, ...]]:
    """The run that can be measured on held-out pictures, and what to say about it: usually the run itself.

    The encoder of a run made with --final has seen every class of its data; what is known about its quality
    are the figures of its selection, trained in the same way without the validation and test classes.
    """
    manifest = run / "encoder" / "manifest.json"
    if not manifest.is_file() or not (run / "selection" / "splits.json").is_file():
        return run, ()
    provenance = json.loads(manifest.read_text(encoding="utf-8")).get("provenance", {})
    if provenance.get("trained_on") != "all classes":
        return run, ()
    return run / "selection", (
        "these are the figures of the selected model; the final encoder was trained on all classes "
        "afterwards, so nothing is left to measure it on",
    )


def choose(run: Path, data: str = "", *, split: str = "test") -> Selection:
    """Which pictures to measure.

    Without `data`: the split of the run, exactly as it was divided for training. With `data`: its own test
    pictures (query and gallery folders, or a test split) where it has any, else all of it, and never
    pictures that the run was trained on: the run's own data is divided as the run divided it.

    Args:
        run: a run folder, or an encoder folder (which needs `data`).
        data: a folder, a manifest or the name of a data set.
        split: "test", "validation", or "all" labelled pictures of `data`.

    Raises:
        UsageError: neither the run nor the call says which data.
        DataError: the data has no such split, or no labels.
    """
    if split not in SPLITS:
        raise UsageError(f'--split is one of {", ".join(SPLITS)}; got "{split}"')
    recorded = run / "splits.json"
    splits = Splits.from_json(recorded.read_text(encoding="utf-8")) if recorded.is_file() else None
    if not data:
        if splits is None:
            raise UsageError(f"{run} is not a run folder with splits.json: say which data to measure it on")
        return _of_splits(splits, split, source=splits.root.name or str(splits.root))
    table = open_table(data)
    if splits is not None and split != "all" and table.root.resolve() == splits.root.resolve():
        return _of_splits(splits, split, source=table.name)
    return _of_table(table, split, run)


def load_selection(table: ImageTable, *, split: str = "all", protocol: str = "untrained") -> Selection:
    """All labelled pictures of a table, or one of its own splits; a query and a gallery where it has them."""
    labelled = tuple(r for r in table.records if r.label is not None)
    if not labelled:
        raise DataError(
            f"{table.name} has no labels, so nothing tells right from wrong. Put the pictures into one "
            f"folder per class, or give a manifest with a label column."
        )
    query = tuple(r for r in labelled if r.role == "query")
    gallery = tuple(r for r in labelled if r.role == "gallery")
    if split == "all":
        return Selection(table.name, "all", protocol, labelled, None)
    if split == "test" and query and gallery:
        return Selection(table.name, "test", protocol, query, gallery)
    of_split = tuple(r for r in labelled if r.split == split)
    return Selection(table.name, split, protocol, of_split, None)


def _of_splits(splits: Splits, split: str, *, source: str) -> Selection:
    common: dict[str, Any] = {"protocol": splits.protocol, "digest": splits.digest, "notes": splits.notes}
    if split == "all":
        raise UsageError(
            "--split all would measure on pictures that the run was trained on; use test or validation"
        )
    if split == "validation":
        return Selection(source, split, query=splits.validation, gallery=None, **common)
    if splits.query:
        return Selection(source, split, query=splits.query, gallery=splits.gallery or None, **common)
    if not splits.test:
        raise DataError(f"the run on {source} has no test split; use --split validation, or give other data")
    return Selection(source, split, query=splits.test, gallery=None, **common)


def _of_table(table: ImageTable, split: str, run: Path) -> Selection:
    """The test pictures of data that the run does not know, or all of it."""
    protocol = protocol_of(run, table)
    has_splits = any(r.split or r.role for r in table.records)
    if not has_splits or split == "all":
        chosen = load_selection(table, split="all", protocol=protocol)
        note = () if has_splits else ("the data has no splits: all of its labelled pictures are measured",)
        return Selection(chosen.source, "all", protocol, chosen.query, None, notes=note)
    config = load_recipe(run / "recipe.toml").data if (run / "recipe.toml").is_file() else DataConfig()
    try:
        splits = divide(table, config)
    except DataError:
        # Data meant for testing only (a query and a gallery, no training pictures) cannot be divided for
        # training.
        chosen = load_selection(table, split=split, protocol=protocol)
        if not chosen.query:
            raise
        return chosen
    chosen = _of_splits(splits, split, source=table.name)
    return Selection(
        chosen.source, split, protocol, chosen.query, chosen.gallery, digest=splits.digest, notes=chosen.notes
    )


def protocol_of(run: Path, table: ImageTable) -> str:
    """open-set: the encoder was trained on none of these classes; closed-set: on some; untrained: on none."""
    manifest = json.loads((find_encoder(run) / "manifest.json").read_text(encoding="utf-8"))
    trained = set(manifest.get("classes") or ())
    if not trained:
        return "untrained"
    return "closed-set" if trained & set(table.classes) else "open-set"


def ids_of(records: Sequence[Record]) -> list[str]:
    """Who a picture is: its file, and its box where a file holds several."""
    return [str(r.path) if r.box is None else f"{r.path}#{','.join(map(str, r.box))}" for r in records]


def labels_of(records: Sequence[Record]) -> set[str]:
    return {r.label for r in records if r.label is not None}


def _counted(records: Sequence[Record], what: str) -> str:
    return f"{len(records):,} {what} of {len(labels_of(records)):,} classes"
