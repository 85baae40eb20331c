"""`dml list`: what there is to choose from, one line each."""

from typing import Annotated

import typer

from dml.cli.shown import group

app = group("Say what there is to choose from.")

AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def show(rows: dict[str, str], as_json: bool) -> None:
    if as_json:
        import json

        typer.echo(json.dumps(rows, indent=1))
        return
    width = max(map(len, rows), default=0)
    for name, summary in rows.items():
        typer.echo(f"{name:<{width}}  {summary}".rstrip())


@app.command()
def losses(as_json: AsJson = False) -> None:
    """Losses, ours and pytorch-metric-learning's; any class works as package.module:Class."""
    from dml.losses import DESCRIPTIONS

    show(dict(DESCRIPTIONS), as_json)


@app.command()
def methods(as_json: AsJson = False) -> None:
    """Objectives, and the stages that compose with every loss."""
    from dml.training import DESCRIPTIONS

    show(dict(DESCRIPTIONS), as_json)


@app.command()
def datasets(as_json: AsJson = False) -> None:
    """Benchmarks that are read in their official layouts."""
    from dml.data import DESCRIPTIONS

    show(dict(DESCRIPTIONS), as_json)


@app.command()
def trunks(
    pattern: Annotated[str, typer.Argument(help="Only names with this in them; * matches anything.")] = "",
    as_json: AsJson = False,
) -> None:
    """Trunks: our own and every timm model."""
    from fnmatch import fnmatch

    import timm

    from dml.models import DESCRIPTIONS

    wanted = f"*{pattern}*"
    rows = {name: text for name, text in DESCRIPTIONS.items() if fnmatch(name, wanted)}
    published = {name.partition(".")[0] for name in timm.list_models(wanted, pretrained=True)}
    for name in timm.list_models(wanted):
        rows[name] = "timm, with published weights" if name in published else "timm"
    show(rows, as_json)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """Bundled recipes: the first comment line of each."""
    from dml.config import recipe_names, recipe_path

    rows = {}
    for name in recipe_names():
        first = recipe_path(name).read_text(encoding="utf-8").splitlines()[0]
        rows[name] = first.lstrip("# ") if first.startswith("#") else ""
    show(rows, as_json)
