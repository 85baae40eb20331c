"""Commands of `dml index` about where a collection is kept: move, attach."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dml.cli.shown import describe_index, print_json

Uri = Annotated[
    str | None,
    typer.Option(
        help="Milvus: http://HOST:19530, or a file FILE.db. Password: DML_MILVUS_TOKEN=user:password."
    ),
]
Backend = Annotated[str, typer.Option(help="Who keeps the collection: local, or milvus at --uri.")]
Name = Annotated[str | None, typer.Option("--collection", help="Name in Milvus. Default: the folder's.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def move(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of a collection; it stays.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder.")],
    uri: Uri = None,
    collection: Name = None,
    index: Annotated[
        str | None, typer.Option("--index", help="Kind of index. Default: as in the source where it can be.")
    ] = None,
    sample: Annotated[int, typer.Option(min=1, help="Items whose neighbours are compared.")] = 200,
    as_json: Json = False,
) -> None:
    """Copy a collection to another folder, into Milvus, or from there, and compare the copy.

    \b
    dml index move shoes.collection shoes.milvus --uri http://milvus:19530

    A move that was stopped goes on when it is called again.
    """
    from dml.cli.index import progress_bar
    from dml.collection.move import move_collection

    with progress_bar("moving") as progress:
        moved = move_collection(
            source, target, uri=uri, collection=collection, index=index, sample=sample, progress=progress
        )
    if as_json:
        print_json(asdict(moved))
        return
    before = f" ({moved.resumed:,} before)" if moved.resumed else ""
    typer.echo(f"{moved.path}: {moved.items:,} items copied{before} in {moved.seconds:.1f} s")
    agreed = "the same ten neighbours" if moved.exact else f"overlap@10 {moved.overlap:.4f} (approximate)"
    typer.echo(f"compared: counts, and {moved.compared:,} items: {agreed}")
    typer.echo(describe_index(moved.index))


def attach(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    uri: Annotated[str, typer.Option(help="Milvus: http://HOST:19530, or a file FILE.db.")],
    collection: Annotated[str, typer.Option("--collection", help="Name in Milvus.")],
    encoder: Annotated[Path | None, typer.Option(help="Run or encoder folder that made its vectors.")] = None,
    root: Annotated[
        list[str] | None, typer.Option("--root", metavar="NAME=FOLDER", help="Where its pictures are here.")
    ] = None,
    consistency: Annotated[
        str,
        typer.Option(help="Whose writes a search sees: Strong: all, Session: its own, Bounded, Eventually."),
    ] = "Strong",
) -> None:
    """Describe a collection that is in Milvus in a folder, on this machine too.

    \b
    dml index attach shoes.milvus --uri http://milvus:19530 --collection shoes --encoder runs/shoes
    """
    from dml.collection.milvus_create import attach_milvus
    from dml.collection.move import copy_folder
    from dml.encoder import Encoder
    from dml.errors import UsageError

    roots = {}
    for text in root or []:
        name, equals, path = text.partition("=")
        if not equals or not name or not Path(path).is_dir():
            raise UsageError(f'--root wants NAME=FOLDER, of a folder that is there; got "{text}"')
        roots[name] = path
    loaded = Encoder.load(encoder) if encoder is not None else None
    asked = {"uri": uri, "collection": collection, "roots": roots, "consistency": consistency}
    with attach_milvus(folder, **asked) as there:
        if loaded is not None:
            there.check_fingerprint(loaded.fingerprint)
            copy_folder(loaded.path, folder / "encoder")
        typer.echo(f"{folder}: {len(there):,} items of {there.dim} numbers, made by {there.fingerprint[:12]}")


def check_backend(backend: str, uri: str | None) -> None:
    """Refuse a --backend that is not known, or does not go with --uri. Raises UsageError."""
    from dml.errors import UsageError

    if backend not in ("local", "milvus"):
        raise UsageError(f'--backend is local or milvus, got "{backend}"')
    if (backend == "milvus") != (uri is not None):
        raise UsageError("--backend milvus needs --uri http://HOST:19530, and --uri needs --backend milvus.")


COMMANDS = (move, attach)
