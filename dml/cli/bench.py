"""`dml bench`: the fair benchmark."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Compare methods fairly, and repeat what was measured."
)

SuiteName = Annotated[str, typer.Argument(metavar="SUITE", help="A bundled suite, or a .toml file.")]
Data = Annotated[
    str, typer.Option(metavar="FOLDER", help="The suite's pictures: a folder, a manifest or NAME:FOLDER.")
]
Results = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Result files. Default: eval/results in a checkout, else ./results."),
]
Work = Annotated[Path, typer.Option(metavar="FOLDER", help="Checkpoints and encoders.")]


@app.command()
def run(
    suite: SuiteName,
    data: Data = "",
    rows: Annotated[
        list[str] | None,
        typer.Option("--rows", metavar="ROW", help="Only these rows; may be repeated, or with commas."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    until: Annotated[str, typer.Option(help="trials: only tune. seeds: also the full runs.")] = "seeds",
    results: Results = None,
    work: Work = Path("runs/bench"),
) -> None:
    """Tune every row alike, then train it with every seed. Goes on from the result files that exist.

    \b
    dml bench run omniglot --data omniglot/ --jobs 4
    """
    from dml.errors import DmlError, UsageError
    from eval.benchmark.results import default_place
    from eval.benchmark.run import run_suite
    from eval.benchmark.suite import load_suite
    from eval.benchmark.worker import Order

    loaded = load_suite(suite)
    chosen = chosen_rows(loaded, rows)
    if until not in ("trials", "seeds"):
        raise UsageError(f'--until is "trials" or "seeds", got "{until}"')
    if not data:
        raise UsageError(
            f"--data is missing: where are the pictures of {loaded.title}? {loaded.data.about}".strip()
        )
    place = default_place(loaded, results)
    order = Order(
        suite=str(loaded.path.resolve()),
        data=data,
        results=str(place.results.resolve()),
        work=str((work / loaded.name).resolve()),
        rows=chosen,
        until=until,
    )
    try:
        with progress_on_stderr(jobs) as (say, show):
            board = run_suite(order, loaded, jobs=jobs, say=say, show=show)
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on", err=True)
        raise typer.Exit(130) from None
    if board.failures:
        raise DmlError("; ".join(board.failures))
    typer.echo(f"{board.done} runs done, results in {place.results}", err=True)


@app.command()
def compare(suite: SuiteName, results: Results = None) -> None:
    """The table of a suite, from its result files."""
    from eval.benchmark.compare import print_table
    from eval.benchmark.results import default_place
    from eval.benchmark.suite import load_suite

    loaded = load_suite(suite)
    print_table(loaded, default_place(loaded, results))


def chosen_rows(suite, rows: list[str] | None) -> tuple[str, ...]:
    """The rows asked for, in the order of the suite; all when none is named."""
    names = [name for text in rows or () for name in text.replace(",", " ").split()]
    for name in names:
        suite.row(name)
    return tuple(name for name in suite.rows if not names or name in names)


@contextmanager
def progress_on_stderr(jobs: int) -> Iterator[tuple]:
    """Lines for what has ended, and on a terminal also what runs, what is left and how long it may take."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda line: print(line, file=sys.stderr, flush=True), lambda board: None
        return
    with Progress(TextColumn("{task.description}"), console=console, transient=True) as bars:
        task = bars.add_task("reading", total=None)

        def show(board) -> None:
            runs = [
                f"{e.row} {e.item} {100 * e.step // max(e.steps, 1)} %"
                for e in board.running.values()
                if e.kind in ("began", "step")
            ]
            trials, seeds = board.left()
            seconds = board.remaining_seconds()
            estimate = "" if seconds is None else f", at most {clock(seconds)}"
            bars.update(
                task,
                description="\n".join([*runs, f"{board.done} done, {trials + seeds} left at most{estimate}"]),
            )

        yield lambda line: console.print(line, highlight=False, markup=False), show


def clock(seconds: float) -> str:
    """ "3 h 20 min", "7 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
