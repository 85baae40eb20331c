"""Commands of `dml index` that look after a collection: merge, verify, repair, backup, restore, rename."""

from pathlib import Path
from typing import Annotated

import typer

from dml.cli.shown import describe_index, print_json

CollectionFolder = Annotated[Path, typer.Argument(metavar="COLLECTION", help="Folder of a collection.")]
Device = Annotated[str, typer.Option(help="Where the index runs: auto, cpu or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
SHOWN = 20
"""Sentences of one kind on the terminal; --json has all of them."""


def merge(collection: CollectionFolder, device: Device = "auto", as_json: Json = False) -> None:
    """Fold the pending changes into the index now: add to it, or build it anew where that is better."""
    from dml.collection import open_collection

    with open_collection(collection, device=device, merge="manual") as there:
        pending = there.info().pending
        built = there.merge()
    if as_json:
        print_json({"merged": pending, **built})
    else:
        typer.echo(f"{pending:,} changes merged")
        typer.echo(describe_index(built))


def verify(
    path: Annotated[Path, typer.Argument(metavar="COLLECTION|BACKUP", help="What to check.")],
    as_json: Json = False,
) -> None:
    """Read everything and compare it with its checksums; exit code 1 when something is wrong."""
    from dml.collection import open_collection
    from dml.collection.backup import FILE, check_backup

    if path.is_file() or (path / FILE).is_file():
        problems, count = check_backup(path), None
    else:
        with open_collection(path, read_only=True) as there:
            problems, count = there.verify(), len(there)
    if as_json:
        print_json({"items": count, "problems": problems})
    elif problems:
        for problem in problems:
            typer.echo(problem)
        typer.echo("1 problem" if len(problems) == 1 else f"{len(problems)} problems", err=True)
    else:
        typer.echo("" if count is None else f"{count:,} items, ", nl=False)
        typer.echo("everything fits its checksums")
    if problems:
        raise typer.Exit(1)


def repair(
    collection: CollectionFolder,
    yes: Annotated[
        bool, typer.Option("--yes", help="Replace a damaged catalogue by what could be saved of it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Mend a damaged collection; exit code 1 when something is lost, or cannot be mended from here.

    Indexes, thumbnails and the manifest are made again. Of a damaged catalogue all items that fit their
    checksums are saved into a new one, which takes its place with --yes; the damaged one is kept.
    """
    only_local(collection)
    from dataclasses import asdict

    from dml.collection.repair import repair as mend

    repairs = mend(collection, replace_catalog=yes)
    if as_json:
        print_json(asdict(repairs))
    else:
        show_some(repairs.done)
        show_some([f"lost: {sentence}" for sentence in repairs.lost])
        show_some([f"left: {sentence}" for sentence in repairs.left])
        if repairs.waiting is not None:
            typer.echo(
                f"{repairs.waiting} holds what could be saved. To put it into place: "
                f"dml index repair {collection} --yes"
            )
        elif not repairs.done:
            typer.echo("nothing had to be mended")
    if repairs.lost or repairs.left or repairs.waiting is not None:
        raise typer.Exit(1)


def backup(
    collection: CollectionFolder,
    target: Annotated[Path, typer.Argument(metavar="FOLDER|FILE.tar", help="Where the copy goes.")],
    link: Annotated[
        bool,
        typer.Option("--link", help="Share bytes with the collection instead of copying, where possible."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Copy a collection as it is now, also while it is served and written to; checked after writing.

    A folder with an earlier backup of the same collection is brought up to date: only new pictures are
    copied.
    """
    only_local(collection)
    from dataclasses import asdict

    from dml.collection.backup import back_up

    report = back_up(collection, target, link=link)
    if as_json:
        print_json(asdict(report))
    else:
        had = f", {report.reused:,} pictures were there already" if report.reused else ""
        typer.echo(
            f"{report.path}: {report.count:,} items of generation {report.generation:,}, {report.files:,} "
            f"files, {report.bytes / 1e6:,.1f} MB{had}, {report.seconds:.1f} s; everything reads back"
        )
        show_some(report.problems)
    if report.problems:
        raise typer.Exit(1)


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="What `dml index backup` made.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new collection.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the collection that is there.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a collection of a backup, comparing everything with its checksums on the way."""
    from dml.collection.backup import restore as bring_back

    about = bring_back(source, out, overwrite=overwrite)
    if as_json:
        print_json({"collection": str(out), **{key: about[key] for key in ("made", "generation", "count")}})
    else:
        typer.echo(
            f"{out}: {about['count']:,} items of generation {about['generation']:,}, as of {about['made']}"
        )


def rename(
    collection: CollectionFolder,
    name: Annotated[str, typer.Argument(help="What it is to be called, by the service too.")],
) -> None:
    """Call a collection by another name; its folder stays where it is."""
    from dml.collection import open_collection

    with open_collection(collection, merge="manual") as there:
        there.rename(name)
    typer.echo(f"{collection} is called {name}")


COMMANDS = (merge, verify, repair, backup, restore, rename)


def only_local(path: Path) -> None:
    """Refuse a folder that describes a collection in Milvus. Raises NotAvailable."""
    from dml.collection import in_milvus
    from dml.errors import NotAvailable

    if in_milvus(path):
        raise NotAvailable(
            f"{path} describes a collection in Milvus, which looks after its own files. "
            f"`dml index move {path} FOLDER` makes a local copy; see docs/scale.md."
        )


def show_some(sentences: list[str]) -> None:
    for sentence in sentences[:SHOWN]:
        typer.echo(sentence)
    if len(sentences) > SHOWN:
        typer.echo(f"… and {len(sentences) - SHOWN:,} more")
