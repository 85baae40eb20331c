"""`dml data`: look over, divide, draw and find data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from dml.cli.shown import group

app = group("Look over, divide, draw and find data.")

Source = Annotated[
    str, typer.Argument(metavar="DATA", help="A folder, a manifest (.csv, .tsv, .parquet) or NAME:FOLDER.")
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


@app.command()
def check(
    data: Source,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page to look through.")
    ] = None,
    as_json: Json = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read pictures.")] = 2,
) -> None:
    """List every bad file, tiny class, exact duplicate and split leak.

    Exit code 0 when nothing is wrong, 3 when something is.

    \b
    dml data check photos/
    """
    import json

    from dml.data.check import check_table
    from dml.data.table import open_table

    table = open_table(data)
    with _progress("reading pictures") as progress:
        report = check_table(table, workers=workers, progress=progress)
    if html is not None:
        from dml.data.check_page import write_page

        write_page(report, table, html)
        typer.echo(f"wrote {html}", err=True)
    typer.echo(json.dumps(report.as_json(), indent=1) if as_json else report.describe())
    if not report.ok:
        raise typer.Exit(3)


@app.command()
def split(
    data: Source,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Manifest to write: .csv, .tsv or .parquet.")],
    protocol: Annotated[
        str,
        typer.Option(
            help="open-set (classes apart), closed-set (held-out images of the same classes) or auto."
        ),
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Decides what is held out.")] = 0,
    validation_share: Annotated[float, typer.Option(help="Share held out to select the model.")] = 0.2,
    test_share: Annotated[
        float, typer.Option(help="Share held out to test it, when the data has no test split.")
    ] = 0.2,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
    as_json: Json = False,
) -> None:
    """Write a manifest that says which picture trains, selects and tests.

    \b
    dml data split photos/ --out photos.csv
    """
    import json

    from dml.config import DataConfig
    from dml.data.check import write_manifest
    from dml.data.split import divide
    from dml.data.table import open_table
    from dml.errors import UsageError

    if protocol not in ("auto", "open-set", "closed-set"):
        raise UsageError(f'--protocol must be auto, open-set or closed-set, got "{protocol}"')
    if out.exists() and not overwrite:
        raise UsageError(f"{out} exists already; give another name, or --overwrite")
    try:
        config = DataConfig(
            source=data,
            protocol=protocol,  # type: ignore[arg-type]
            split_seed=seed,
            validation_share=validation_share,
            test_share=test_share,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    splits = divide(open_table(data), config)
    write_manifest(splits, out)
    typer.echo(f"wrote {out}", err=True)
    if as_json:
        counts = {
            name: len(getattr(splits, name)) for name in ("train", "validation", "test", "query", "gallery")
        }
        facts = {"manifest": str(out), "protocol": splits.protocol, "digest": splits.digest, "images": counts}
        typer.echo(json.dumps({**facts, "notes": splits.notes}, indent=1))
    else:
        typer.echo(splits.describe())


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    seed: Annotated[int, typer.Option(help="Decides products and photos.")] = 0,
    classes: Annotated[int, typer.Option(help="Products, at least 18.")] = 102,
    images: Annotated[int, typer.Option(help="Photos of each product.")] = 16,
    size: Annotated[int, typer.Option(help="Side of the photos in pixels.")] = 96,
) -> None:
    """Draw the embedded data set: photos of products, in SPLIT/CLASS folders.

    \b
    dml data demo /tmp/demo
    """
    from dml.data.demo import draw_demo
    from dml.data.table import open_table

    with _progress("drawing") as progress:
        draw_demo(folder, seed=seed, classes=classes, images_per_class=images, size=size, progress=progress)
    typer.echo(open_table(folder).describe())


@app.command()
def download(
    name: Annotated[str, typer.Argument(help="cub, cars, sop or inshop.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="Where it was unpacked: checks what is there.")
    ] = None,
) -> None:
    """Tell where a benchmark comes from and what must lie where; check a folder that holds it.

    Nothing is downloaded: every one of them asks you to accept its terms first.
    """
    from dml.data.benchmarks import BENCHMARKS
    from dml.data.table import open_table
    from dml.errors import ConfigError
    from dml.registry import unknown

    if name not in BENCHMARKS:
        raise ConfigError(unknown("benchmark", name, BENCHMARKS, classes=False))
    about = BENCHMARKS[name]
    if folder is not None:
        typer.echo(open_table(f"{name}:{folder}").describe())
        return
    typer.echo(f"{about.title}\n  from: {about.source}\n  terms: {about.licence}\n  layout after unpacking:")
    for line in about.layout:
        typer.echo(f"    {line}")
    for part, (images, classes) in about.counts.items():
        typer.echo(f"  {part}: {images:,} images of {classes:,} classes")
    typer.echo(f"`dml data download {name} FOLDER` checks it; give {name}:FOLDER wherever DATA is asked for.")


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, which shows only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
