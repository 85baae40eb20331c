"""Looking after a collection: is everything in it what was written?"""

import json
from pathlib import Path

from dml.collection import catalog as sql
from dml.collection.catalog import Catalog
from dml.collection.pictures import Pictures
from dml.collection.snapshots import Snapshots
from dml.errors import DamagedFile, StorageError


def check(
    catalog: Catalog,
    snapshots: Snapshots,
    pictures: Pictures,
    *,
    searched: int,
    encoder: Path | None,
    fingerprint: str,
) -> list[str]:
    """Read everything and compare it with its checksums: catalogue, snapshots, pictures, encoder.

    Args:
        searched: how many items a search is among.
        encoder: the folder of the encoder, when the collection has one.
        fingerprint: that the encoder must have.

    Returns:
        One sentence per problem; an empty list when all is well.
    """
    problems = [*catalog.check(), *snapshots.check()]
    try:
        with catalog.reading() as db:
            used = list(sql.all_pictures(db))
            count = sql.count_items(db)
    except (DamagedFile, StorageError) as error:
        return [*problems, str(error)]
    checked: dict[tuple[str, str | None, str | None], str | None] = {}
    for id, picture in used:
        key = (picture.sha256, picture.root, picture.path)
        if key not in checked:
            checked[key] = pictures.damaged(picture, id)
            if checked[key]:
                problems.append(str(checked[key]))
    if count != searched:
        problems.append(f"the index holds {searched} items and the catalogue {count}")
    return [*problems, *(check_encoder(encoder, fingerprint) if encoder else [])]


def check_encoder(folder: Path, fingerprint: str) -> list[str]:
    """What is wrong with the encoder that lies in the collection."""
    try:
        found = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("fingerprint")
    except (OSError, ValueError, AttributeError) as error:
        return [f"{folder / 'manifest.json'} cannot be read: {error}"]
    if found != fingerprint:
        return [f"the encoder in {folder} is {found}, and the collection was made by {fingerprint}"]
    return []
