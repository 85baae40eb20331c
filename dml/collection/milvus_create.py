"""Making a collection in Milvus, and describing one that is there in a folder."""

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dml.collection.manifest import Manifest, default_name, write_manifest
from dml.collection.milvus import FORMAT, MilvusCollection, Place, check_about, chosen_kind
from dml.collection.milvus_table import MilvusTable, check_kind, check_name, check_uri
from dml.collection.pictures import make_folder
from dml.data.ids import absolute
from dml.errors import CollectionError, ConfigError, UnknownCollection


def create_milvus(
    path: Path,
    *,
    dim: int,
    fingerprint: str,
    uri: str,
    collection: str | None = None,
    name: str | None = None,
    index: str = "auto",
    options: Mapping[str, Any] | None = None,
    roots: Mapping[str, str | Path] | None = None,
    encoder_info: Mapping[str, Any] | None = None,
    consistency: str = "Strong",
) -> MilvusCollection:
    """A new, empty collection in Milvus, and a folder that describes it.

    Args:
        path: a folder that does not exist yet, or is empty.
        uri: of the server, or a file FILE.db for Milvus Lite; without a password, see DML_MILVUS_TOKEN.
        collection: its name in Milvus; None: made of `name`.
        name: as users call it; None: the folder's name, without ".collection".
        index, options: see `MilvusCollection.build_index`.
        consistency: see `MilvusTable`.

    Raises:
        CollectionError: the folder is not empty, or Milvus has a collection of that name.
        ConfigError, UsageError: an index, a name or an address that cannot be.
        Unreachable, MissingExtra, StorageError
    """
    if dim < 1:
        raise ConfigError(f"a collection needs vectors of at least 1 number, got dim {dim}")
    name, uri = name or default_name(path), check_uri(uri)
    place = Place(uri, check_name(collection or milvus_name(name)), consistency)
    kind = chosen_kind(index, 0)
    check_kind(kind, options or {}, lite="://" not in uri)
    manifest = Manifest(
        name=name,
        dim=dim,
        fingerprint=fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        index={"kind": index, "options": dict(options or {})},
        roots={key: str(absolute(Path(root))) for key, root in (roots or {}).items()},
        encoder=dict(encoder_info or {}),
        backend=place.written(path),
    )
    with new_folder(path), opened(place) as table:
        if table.exists():
            raise CollectionError(
                f'Milvus at {uri} already has a collection "{place.collection}". Give another name, or '
                f"describe that one in a folder: `dml index attach {path} --uri {uri} "
                f"--collection {place.collection}`."
            )
        table.create(dim, about(manifest), kind, options or {})
        try:
            write_manifest(path, manifest)  # last: a folder with a manifest is a whole collection
        except BaseException:
            with suppress(CollectionError):
                table.drop()
            raise
    return MilvusCollection(path)


def attach_milvus(
    path: Path,
    *,
    uri: str,
    collection: str,
    name: str | None = None,
    roots: Mapping[str, str | Path] | None = None,
    consistency: str = "Strong",
) -> MilvusCollection:
    """A folder for a collection that Milvus has, made here or on another machine.

    Args: as `create_milvus`.

    Raises:
        UnknownCollection: Milvus has none of that name.
        CollectionError: the folder is not empty, or the collection was not made by dml.
        UsageError, Unreachable, MissingExtra, StorageError
    """
    place = Place(check_uri(uri), check_name(collection), consistency)
    where = f'the collection "{collection}" of Milvus at {place.uri}'
    with new_folder(path), opened(place) as table:
        if not table.exists():
            raise UnknownCollection(f"There is no {where.removeprefix('the ')}.")
        known = table.about()
        check_about(known, where, dim=known.get("dim", 0), fingerprint=known.get("fingerprint", ""))
        index = table.index()["kind"]
        manifest = Manifest(
            name=name or str(known.get("name") or collection),
            dim=known["dim"],
            fingerprint=known["fingerprint"],
            created=str(known.get("created", "")),
            index={"kind": index, "options": {}},
            roots={key: str(absolute(Path(root))) for key, root in (roots or {}).items()},
            backend=place.written(path),
        )
        write_manifest(path, manifest)
    return MilvusCollection(path)


def about(manifest: Manifest) -> dict[str, Any]:
    """What Milvus keeps about a collection: enough to describe it in a folder elsewhere."""
    return {
        "format": FORMAT,
        "name": manifest.name,
        "dim": manifest.dim,
        "metric": manifest.metric,
        "fingerprint": manifest.fingerprint,
        "created": manifest.created,
    }


def milvus_name(name: str) -> str:
    """A name that Milvus takes, as near to this one as can be: "red shoes.collection" -> "red_shoes"."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "_", name.removesuffix(".collection")).strip("_")[:200]
    return plain if plain[:1].isalpha() else f"c_{plain}".rstrip("_")


@contextmanager
def opened(place: Place) -> Iterator[MilvusTable]:
    """The table of a place, until the block ends."""
    table = MilvusTable(place.uri, place.collection, consistency=place.consistency)
    try:
        yield table
    finally:
        table.close()


@contextmanager
def new_folder(path: Path) -> Iterator[None]:
    """An empty folder to fill; it is gone again when the block fails.

    Raises:
        CollectionError: there is something already.
        StorageError: it cannot be made.
    """
    new = not path.exists()
    if not new and (not path.is_dir() or any(path.iterdir())):
        raise CollectionError(f"{path} is not an empty folder; give a new one, or open what is there.")
    make_folder(path)
    try:
        yield
    except BaseException:
        for child in [path] if new else path.iterdir():
            shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink()
        raise
