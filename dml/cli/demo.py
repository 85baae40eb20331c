"""`dml demo`: the whole way in one command, on drawn pictures or on the user's own."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer


def demo(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Your labelled folder; else pictures are drawn.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option(help="Where everything goes. Default: demo-output/NAME.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A bundled recipe or a .toml file.")] = "demo",
    serve: Annotated[
        bool, typer.Option("--serve/--no-serve", help="End with the search page, or with the report.")
    ] = True,
    port: Annotated[int, typer.Option(help="Where the page answers.")] = 8000,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe value; may be repeated."),
    ] = None,
) -> None:
    """Train, index, evaluate and serve: each step is printed as the command that does it alone."""
    from rich.console import Console

    from dml.errors import DataError

    console = Console(stderr=True)
    if data and not Path(data).exists() and ":" not in data:
        raise DataError(
            f"There is no folder or manifest {data}. Give a folder with one sub-folder of pictures per class."
        )
    folder = out or Path("demo-output") / (Path(data).resolve().name if data else "drawn")
    source = data or str(draw(folder / "pictures", console))
    run, collection, report = folder / "run", folder / "collection", folder / "report.html"

    say(console, "train", source, "--recipe", recipe, "--out", run, "--resume", "auto")
    train_step(source, recipe, run, overrides or [])

    from dml.cli.index import build

    say(console, "index", "build", source, "--encoder", run, "--out", collection, "--overwrite")
    build(source, encoder=run, out=collection, overwrite=True, name=folder.name)

    command = ["serve", str(collection), "--port", str(port if serve else 0)]
    say(console, *command)
    with running(command, log=folder / "service.log") as (service, address):
        console.print(f"Search page: {address}", highlight=False)

        from dml.cli.eval import eval as measure

        say(console, "eval", run, "--collection", collection, "--url", address, "--report", report)
        measure(run, collection=collection, url=address, report=report)

        if serve:
            console.print(f"[bold]Search page: {address}[/bold]   (Ctrl-C ends it)", highlight=False)
            with suppress(KeyboardInterrupt):  # the usual way to end it
                service.wait()
            return
    say(console, "serve", collection)


@contextmanager
def running(arguments: list[str], *, log: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A `dml` command in a process of its own, and the address it says it answers on; ended on leaving.

    Args:
        log: file for what it writes to stderr, a line per request.

    Raises:
        ServiceError: it ended before it answered, with the last thing it said.
    """
    from dml.errors import ServiceError

    with log.open("w") as told:
        command = [sys.executable, "-m", "dml.cli.main", *arguments]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
    try:
        assert service.stdout is not None
        found = next((m for line in service.stdout if (m := re.search(r"https?://\S+", line))), None)
        if found is None:
            code, last = service.wait(), "".join(log.read_text().splitlines()[-1:])
            raise ServiceError(f"dml {' '.join(arguments)} ended with code {code} before it answered. {last}")
        yield service, found.group().rstrip("/.,")
    finally:
        service.terminate()
        service.wait()


def say(console, *words: object) -> None:
    """Show the command that the next step is, as it can be typed."""
    console.print(
        f"\n$ dml {shlex.join(map(str, words))}", style="bold", markup=False, highlight=False, soft_wrap=True
    )


def draw(folder: Path, console) -> Path:
    """The embedded data set, drawn once."""
    from rich.progress import Progress

    from dml.data.demo import draw_demo

    say(console, "data", "demo", folder)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("drawing", total=None)
        return draw_demo(folder, progress=lambda done, total: bar.update(task, completed=done, total=total))


def train_step(source: str, recipe: str, run: Path, overrides: list[str]) -> None:
    """Train, or go on where an earlier demo stopped; a finished run of the same recipe is used as it is."""
    from dml.cli.train import read_overrides, run_and_show
    from dml.config import load_recipe

    settings = load_recipe(recipe, read_overrides(overrides, source=source))
    run_and_show(settings, run, resume=True)
