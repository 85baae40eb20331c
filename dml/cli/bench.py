"""`dml bench`: the fair benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dml.cli.shown import group

if TYPE_CHECKING:
    from eval.benchmark.results import Place
    from eval.benchmark.run import Board
    from eval.benchmark.suite import Suite
    from eval.benchmark.worker import Order

app = group("Compare methods fairly, and repeat what was measured.")

SuiteName = Annotated[str, typer.Argument(metavar="SUITE", help="A bundled suite, or a .toml file.")]
Data = Annotated[
    str, typer.Option(metavar="FOLDER", help="The suite's pictures: a folder, a manifest or NAME:FOLDER.")
]
Rows = Annotated[
    list[str] | None, typer.Option("--rows", metavar="ROWS", help="Only these, with commas; may be repeated.")
]
Results = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Result files. Default: eval/results in a checkout, else ./results."),
]
Work = Annotated[Path, typer.Option(metavar="FOLDER", help="Checkpoints and encoders.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@app.command()
def run(
    suite: SuiteName,
    data: Data = "",
    rows: Rows = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side.")] = 1,
    until: Annotated[str, typer.Option(help="trials: only tune. seeds: also the full runs.")] = "seeds",
    frozen: Annotated[
        bool, typer.Option("--freeze", help="Write the best recipes of finished rows, to be committed.")
    ] = False,
    final: Annotated[
        bool, typer.Option("--final", help="Measure frozen rows on the test classes, once.")
    ] = False,
    results: Results = None,
    work: Work = Path("runs/bench"),
) -> None:
    """Tune every row alike, then train it with every seed. Goes on from the result files that exist.

    \b
    dml bench run omniglot --data omniglot/ --jobs 4
    dml bench run omniglot --freeze --rows cbml,multi_similarity      then commit
    dml bench run omniglot --data omniglot/ --final
    """
    from dml.errors import UsageError
    from eval.benchmark.results import default_place
    from eval.benchmark.suite import load_suite

    loaded = load_suite(suite)
    chosen = chosen_rows(loaded, rows)
    if until not in ("trials", "seeds"):
        raise UsageError(f'--until is "trials" or "seeds", got "{until}"')
    if frozen and final:
        raise UsageError("--freeze comes first, then a commit, then --final: not both at once")
    place = default_place(loaded, results)
    if frozen:
        from eval.benchmark.claims import freeze

        freeze(loaded, place, chosen, tell_line)
        return
    if final:
        look_at_test(order_of(loaded, data, place, work, rows=chosen), place, named=bool(rows))
        return
    everything = loaded.beginnings(chosen)
    if rows and (more := [name for name in everything if name not in chosen]):
        tell_line(f"with {', '.join(more)}, whose tuned values are inherited")
    run_all(order_of(loaded, data, place, work, rows=everything, until=until), loaded, jobs)


@app.command()
def compare(
    suite: Annotated[
        str,
        typer.Argument(metavar="SUITE", help="A bundled suite, or a .toml file; else all bundled ones."),
    ] = "",
    rows: Rows = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the page of all bundled suites to this file.")
    ] = None,
    results: Results = None,
    as_json: Json = False,
) -> None:
    """The tables, from the result files: intervals, differences with tests, cost, looks at the test classes.

    \b
    dml bench compare omniglot
    dml bench compare --write docs/benchmarks.md
    """
    import json

    from eval.benchmark.compare import make_table, print_table
    from eval.benchmark.results import default_place
    from eval.benchmark.suite import load_suite, suite_names

    if write is not None:
        from eval.benchmark.page import write_page

        for path in write_page(write, results):
            tell_line(f"wrote {path}")
        return
    suites = [load_suite(name) for name in ([suite] if suite else suite_names())]
    tables = [make_table(s, default_place(s, results), chosen_rows(s, rows)) for s in suites]
    if as_json:
        trees = [table.as_json() for table in tables]
        typer.echo(json.dumps(trees[0] if suite else trees, indent=1))
        return
    for table in tables:
        print_table(table)


@app.command()
def replay(
    suite: SuiteName,
    row: Annotated[str, typer.Argument(metavar="ROW", help="A row of the suite.")],
    data: Data = "",
    seed: Annotated[int, typer.Option(min=0, help="Which of its full runs.")] = 0,
    results: Results = None,
    work: Work = Path("runs/bench"),
    as_json: Json = False,
) -> None:
    """Repeat one full run in a fresh folder, and lay its figures beside the recorded ones.

    \b
    dml bench replay omniglot cbml --seed 2 --data omniglot/
    """
    import json

    from eval.benchmark.replay import replay as repeated
    from eval.benchmark.results import default_place
    from eval.benchmark.suite import load_suite

    loaded = load_suite(suite)
    place = default_place(loaded, results)
    order = order_of(loaded, data, place, work, rows=(row,))
    found = repeated(order, place, row, seed, tell=lambda event: None)
    typer.echo(json.dumps(found.as_json(), indent=1) if as_json else found.describe())


def chosen_rows(suite: Suite, rows: list[str] | None) -> tuple[str, ...]:
    """The rows asked for, in the order of the suite; all when none is named."""
    names = [name for text in rows or () for name in text.replace(",", " ").split()]
    for name in names:
        suite.row(name)
    return tuple(name for name in suite.rows if not names or name in names)


def order_of(
    suite: Suite, data: str, place: Place, work: Path, *, rows: tuple[str, ...], until: str = "seeds"
) -> Order:
    """What workers are asked to do; refuses without pictures."""
    from dml.errors import UsageError
    from eval.benchmark.worker import Order

    if not data:
        where = f"--data is missing: where are the pictures of {suite.title}? {suite.data.about}"
        raise UsageError(where.strip())
    return Order(
        suite=str(suite.path.resolve()),
        data=data,
        results=str(place.results.resolve()),
        work=str((work / suite.name).resolve()),
        rows=rows,
        until="trials" if until == "trials" else "seeds",
    )


def run_all(order: Order, suite: Suite, jobs: int) -> None:
    """Do what is left; Ctrl-C ends it with nothing lost."""
    from dml.errors import DmlError
    from eval.benchmark.run import run_suite

    try:
        with progress_on_stderr() as (say, show):
            board = run_suite(order, suite, jobs=jobs, say=say, show=show)
    except KeyboardInterrupt:
        tell_line("stopped; the same command goes on")
        raise typer.Exit(130) from None
    if board.failures:
        raise DmlError("; ".join(board.failures))
    tell_line(f"{board.done} runs done, {sum(board.left())} left; results in {order.results}")


def look_at_test(order: Order, place: Place, *, named: bool) -> None:
    """The look at the test classes, with its figures on stderr as they come."""
    from eval.benchmark.claims import look
    from eval.benchmark.worker import Event

    def tell(event: Event) -> None:
        if event.kind == "began":
            tell_line(f"{event.row} {event.item}: its encoder is not in the work folder, training it again")

    rows = look(order, place, named=named, say=tell_line, tell=tell)
    tell_line(f"looked at {', '.join(rows)}; commit {place.results}: it belongs to the claim")


def tell_line(text: str) -> None:
    typer.echo(text, err=True)


@contextmanager
def progress_on_stderr() -> Iterator[tuple[Callable[[str], None], Callable[[Board], None]]]:
    """Lines for what has ended, and on a terminal also what runs, what is left and how long it may take."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield tell_line, lambda board: None
        return
    with Progress(TextColumn("{task.description}", markup=False), console=console, transient=True) as bars:
        task = bars.add_task("reading pictures", total=None)
        yield (
            lambda line: console.print(line, highlight=False, markup=False),
            lambda board: bars.update(task, description=board_text(board)),
        )


def board_text(board: Board) -> str:
    """What runs, how much is left at most, and an estimate."""
    runs = [
        f"{event.row} {event.item} {100 * event.step // max(event.steps, 1)} %"
        for event in board.running.values()
        if event.kind in ("began", "step")
    ]
    seconds = board.remaining_seconds()
    left = sum(board.left())
    estimate = "" if seconds is None or not left else f", at most {clock(seconds)}"
    return "\n".join([*runs, f"{board.done} runs done, at most {left} left{estimate}"])


def clock(seconds: float) -> str:
    """ "3 h 20 min", "7 min"."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
