"""An evaluation in the terminal: tables on stdout, progress on stderr, or everything as JSON."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval.evaluate import Evaluation
from eval.evaluate import Progress as Callback
from eval.served import StageTable

TITLES = {"map@r": "MAP@R", "r_precision": "R-Precision", "nmi": "NMI"}


@contextmanager
def progress_on_stderr() -> Iterator[Callback]:
    """A bar on stderr while pictures are embedded."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("embedding", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(evaluation: Evaluation, stages: StageTable | None, report: Path | None) -> None:
    """One JSON object on stdout."""
    tree = evaluation.as_json()
    if stages is not None:
        tree["stages"] = stages.as_json()
    if report is not None:
        tree["report"] = str(report)
    print(json.dumps(tree, indent=1))


def print_tables(evaluation: Evaluation, stages: StageTable | None, report: Path | None) -> None:
    """Protocol, figures with intervals, the worst classes, the stages."""
    console = Console()
    console.print(evaluation.selection.describe(), highlight=False, markup=False)
    for note in evaluation.selection.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if evaluation.metrics.skipped:
        console.print(
            f"{evaluation.metrics.skipped} queries have no counterpart and are left out", highlight=False
        )
    if evaluation.bad:
        console.print(f"{len(evaluation.bad)} pictures cannot be read and are left out", highlight=False)
    console.print(figures_table(evaluation))
    worst = evaluation.classes()[:5]
    named = ", ".join(f"{c.label} {c.recall_at_1:.3f}" for c in worst)
    console.print(f"Lowest Recall@1 by class: {named}", highlight=False, markup=False)
    if stages is not None:
        console.print(stage_table(stages))
        for sentence in stages.losses():
            console.print(sentence, highlight=False, markup=False)
    if report is not None:
        console.print(f"Report: {report}", highlight=False, markup=False)


def figures_table(evaluation: Evaluation) -> Table:
    table = Table("figure", box=None, pad_edge=False)
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, value in evaluation.metrics.figures().items():
        low, high = evaluation.intervals[name]
        table.add_row(title_of(name), f"{value:.4f}", f"{low:.4f} – {high:.4f}")
    if evaluation.nmi is not None:
        table.add_row(title_of("nmi"), f"{evaluation.nmi:.4f}", "")
    return table


def stage_table(stages: StageTable) -> Table:
    table = Table("stage", box=None, pad_edge=False)
    for k in stages.stages[0].recall:
        table.add_column(f"Recall@{k}", justify="right")
    for name in (f"overlap@{stages.depth}", "ms/query", "queries"):
        table.add_column(name, justify="right")
    for stage in stages.stages:
        spent = "" if stage.milliseconds is None else f"{stage.milliseconds:.2f}"
        recalls = [f"{value:.4f}" for value in stage.recall.values()]
        table.add_row(stage.name, *recalls, f"{stage.overlap:.4f}", spent, str(stage.queries))
    return table


def title_of(name: str) -> str:
    return TITLES.get(name, name.replace("recall", "Recall"))
