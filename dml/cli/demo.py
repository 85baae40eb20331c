"""`dml demo`: the whole way in one command, on drawn pictures or on the user's own."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    data: Annotated[str, typer.Argument(metavar="[DATA]", help="Your labelled folder; else pictures are drawn.")] = "",
    out: Annotated[Path | None, typer.Option(help="Where everything goes. Default: demo-output/NAME.")] = None,
    recipe: Annotated[str, typer.Option(help="A bundled recipe or a .toml file.")] = "demo",
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="End with the search page, or with the report.")] = True,
    port: Annotated[int, typer.Option(help="Where the page answers.")] = 8000,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one recipe value; may be repeated.")
    ] = None,
) -> None:
    """Train, index, evaluate and serve: each step is printed as the command that does it alone."""
    from rich.console import Console

    from dml.errors import DataError

    console = Console(stderr=True)
    if data and not Path(data).exists() and ":" not in data:
        raise DataError(f"There is no folder or manifest {data}. Give a folder with one sub-folder of pictures per class.")
    folder = out or Path("demo-output") / (Path(data).resolve().name if data else "drawn")
    source = data or str(draw(folder / "pictures", console))
    run, collection, report = folder / "run", folder / "collection", folder / "report.html"

    say(console, f"dml train {source} --recipe {recipe} --out {run} --resume auto")
    train_step(source, recipe, run, overrides or [])

    from dml.cli.index import build

    say(console, f"dml index build {source} --encoder {run} --out {collection} --overwrite")
    build(source, encoder=run, out=collection, overwrite=True)

    from dml.cli.eval import eval as measure

    say(console, f"dml eval {run} --collection {collection} --report {report}")
    measure(run, collection=collection, report=report)

    console.print(f"\nReport: {report}", highlight=False)
    page = f"dml serve {collection} --port {port}"
    if not serve:
        console.print(f"Search page: {page}", highlight=False)
        return
    from dml.cli.serve import serve as answer

    say(console, page)
    answer([collection], port=port)


def say(console, command: str) -> None:  # noqa: ANN001
    """Show the command that the next step is."""
    console.print(f"\n[bold]$ {command}[/bold]", highlight=False)


def draw(folder: Path, console) -> Path:  # noqa: ANN001
    """The embedded data set, drawn once."""
    from dml.data.demo import draw_demo

    say(console, f"dml data demo {folder}")
    return draw_demo(folder)


def train_step(source: str, recipe: str, run: Path, overrides: list[str]) -> None:
    """Train, or go on where an earlier demo stopped; a finished run of the same recipe is used as it is."""
    from dml.cli.train import read_overrides, run_and_show
    from dml.config import load_recipe

    settings = load_recipe(recipe, read_overrides(overrides, source=source))
    run_and_show(settings, run, resume=True)
