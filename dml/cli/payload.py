"""`dml index payload-index`: indexes on fields of the payload, for filters in large collections."""

from pathlib import Path
from typing import Annotated

import typer

from dml.cli.shown import print_json


def payload_index(
    collection: Annotated[Path, typer.Argument(metavar="COLLECTION", help="Folder of a collection.")],
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY", help="Paths in the payload: label, shop.city.")
    ] = None,
    drop: Annotated[bool, typer.Option("--drop", help="Forget the indexes of these keys.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Index fields of the payload, so that filters on them are quick; without keys, list those there are."""
    from dml.collection import open_collection
    from dml.errors import NotAvailable

    with open_collection(collection, read_only=not keys, merge="manual") as there:
        if "payload_index" not in there.capabilities():
            raise NotAvailable(f"{collection} is kept by a server that indexes payloads by itself.")
        for key in keys or []:
            there.drop_payload_index(key) if drop else there.index_payload(key)
        found = there.payload_indexes()
    if as_json:
        print_json({"payload_indexes": found})
    else:
        typer.echo("\n".join(found) or "none")
