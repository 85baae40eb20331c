"""Options of commands that build an index to a promise, and `dml index tuning`: what was tried for it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dml.cli.shown import print_json

if TYPE_CHECKING:
    from dml.index.tune import Promise

TargetRecall = Annotated[
    float | None,
    typer.Option(
        help="Choose the cheapest index whose recall@10 surely reaches this (0.98); instead of --index."
    ),
]
MemoryLimit = Annotated[
    str | None, typer.Option("--memory", help="With --target-recall: of the index, as 4G or 500M.")
]
LatencyLimit = Annotated[
    str | None, typer.Option("--latency", help="With --target-recall: of a single query, as 5ms.")
]

BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def read_promise(recall: float | None, memory: str | None, latency: str | None) -> "Promise | None":
    """What the three options ask for; None for nothing. Raises UsageError, ConfigError."""
    from dml.errors import UsageError
    from dml.index.tune import Promise

    if recall is None:
        if memory is not None or latency is not None:
            raise UsageError("--memory and --latency limit what --target-recall may choose; give that too.")
        return None
    return Promise(
        recall,
        memory=None if memory is None else round(read_quantity("--memory", memory, BYTES, "4G or 500M")),
        latency=None if latency is None else read_quantity("--latency", latency, SECONDS, "5ms or 800us"),
    )


def read_quantity(option: str, text: str, units: Mapping[str, float], example: str) -> float:
    """ "5ms" -> 0.005. Raises UsageError."""
    from dml.errors import UsageError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*?)(?:i?B)?\s*", text)
    unit = "" if found is None else found[2] if found[2] in units else found[2].upper()
    if found is None or unit not in units:
        raise UsageError(f'{option} wants a quantity such as {example}, got "{text}"')
    return float(found[1]) * units[unit]


def show_tried(line: str) -> None:
    """What is being tried, on the error stream."""
    typer.echo(f"… {line}", err=True)


def promise_line(promised: dict[str, Any]) -> str:
    """One line: what was promised, what was measured, and whether that will do."""
    measured = promised["measured"]
    if promised["holds"]:
        return (
            f"promised {promised['recall']:g}, measured {measured['recall']:.4f} (surely "
            f"{measured['lower']:.4f}): it holds"
        )
    return f"promised {promised['recall']:g}, and the index {promised['problem']}: it does NOT hold"


def tuning(
    collection: Annotated[Path, typer.Argument(metavar="COLLECTION", help="Folder of a collection.")],
    plot: Annotated[
        Path | None, typer.Option(help="Also draw recall against queries per second into this SVG file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Show what was tried when the index was chosen by --target-recall."""
    from dml.collection import open_collection
    from dml.errors import UsageError

    with open_collection(collection, read_only=True) as there:
        built = there.info().manifest["built"]
    table = built.get("tuning")
    if table is None:
        raise UsageError(
            f"The index of {collection} was not chosen by a target. "
            f"`dml index rebuild {collection} --target-recall 0.98` does so."
        )
    if plot is not None:
        from eval.tuning_plot import draw_tuning

        draw_tuning(table, plot)
    if as_json:
        print_json({"promise": built.get("promise"), "tuning": table})
        return
    for line in table_lines(table):
        typer.echo(line)
    if built.get("promise"):
        typer.echo(promise_line(built["promise"]))


def table_lines(table: dict[str, Any]) -> list[str]:
    """The trials as a table: the chosen one marked with *, those on the front with +."""
    lines = [
        f"tried on {table['sample']:,} vectors, with {table['queries']['tuning']:,} queries to tune and "
        f"{table['queries']['scoring']:,} to score",
        f"  {'':<24}{'recall@10':>10}{'surely':>8}{'ms/query':>10}{'MB':>10}{'build s':>9}",
    ]
    for trial in table["trials"]:
        point = trial["point"]
        mark = "*" if trial["name"] == table["chosen"] else "+" if trial["on_front"] else " "
        head = f"{mark} {trial['name']:<24}"
        if point is None:
            lines.append(f"{head}  {trial['problem']}")
            continue
        figures = (
            f"{point['recall']:>10.4f}{point['lower']:>8.4f}{trial['predicted_latency'] * 1e3:>10.3f}"
            f"{trial['memory'] / 1e6:>10,.1f}{trial['build_seconds']:>9.1f}"
        )
        lines.append(f"{head}{figures}  {trial['problem']}".rstrip())
    return lines
