"""Live sets of images that can be searched. Importing this loads no engine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dml.collection.base import Collection, CollectionInfo, Hit, Item, NewItem, Picture, SearchResult

if TYPE_CHECKING:
    from dml.collection.local import LocalCollection
    from dml.collection.merging import MergeMode
    from dml.index.tune import Promise

__all__ = [
    "Collection",
    "CollectionInfo",
    "Hit",
    "Item",
    "NewItem",
    "Picture",
    "SearchResult",
    "create_collection",
    "in_milvus",
    "is_collection",
    "open_collection",
]


def create_collection(
    path: str | Path,
    *,
    dim: int,
    fingerprint: str,
    name: str | None = None,
    index: str = "auto",
    options: Mapping[str, Any] | None = None,
    promise: "Promise | None" = None,
    roots: Mapping[str, str | Path] | None = None,
    encoder_info: Mapping[str, Any] | None = None,
    device: str = "auto",
    merge: "MergeMode" = "auto",
) -> "LocalCollection":
    """An empty collection in a new folder, opened for writing.

    Args:
        path: a folder that does not exist yet, or is empty.
        dim: length of its vectors.
        fingerprint: of the encoder that makes them.
        name: defaults to the folder's name, without ".collection".
        index: "auto", or a key of `dml.index.KINDS`: what `build_index` makes when it is not told otherwise.
        options: of that kind, see `dml.index.make_index`.
        promise: a recall that the index shall keep, instead of a kind. The collection is searched exactly
            until the first merge, or `build_index`, chooses the cheapest index that keeps it.
        roots: name -> folder, for pictures that stay where they are.
        encoder_info: kept in the manifest for people to read.
        device: where the index runs: "auto", "cpu" or "cuda:N".
        merge: "auto": changes are folded into the index in the background when many are pending; "manual":
            when `merge` or `build_index` is called.

    Raises:
        CollectionError: the folder is not empty.
        ConfigError: an unknown index kind, or a kind beside a promise.
        StorageError: the disk is full or refuses.
    """
    from dml.collection.create import create_local

    return create_local(
        Path(path),
        dim=dim,
        fingerprint=fingerprint,
        name=name,
        index=index,
        options=options or {},
        promise=promise,
        roots=roots or {},
        encoder_info=encoder_info or {},
        device=device,
        merge=merge,
    )


def open_collection(
    path: str | Path,
    *,
    read_only: bool = False,
    fingerprint: str | None = None,
    device: str = "auto",
    merge: "MergeMode" = "auto",
) -> "LocalCollection":
    """Open the collection in a folder, or that in Milvus which the folder describes.

    One whose replacement was cut short is put back first.

    Args:
        read_only: no lock is taken, any number may; changes of a writer elsewhere are followed.
        fingerprint: of the encoder that will make the queries; refused when the collection was made by
            another.
        merge: of a writer; see `create_collection`.
            Milvus has its own ways with devices and merging.

    Raises:
        UnknownCollection: no collection there.
        ModelMismatch: `fingerprint` is not the collection's.
        CollectionLocked: somebody else writes to it.
        DamagedFile: a manifest or catalogue that cannot be read, or of a newer version.
        ConfigError: a device that is not there.
        Unreachable: Milvus does not answer.
    """
    from dml.collection.local import LocalCollection
    from dml.collection.place import recover

    recover(Path(path))
    if in_milvus(path):
        from dml.collection.milvus import MilvusCollection

        found = MilvusCollection(Path(path), read_only=read_only, fingerprint=fingerprint)
        return cast("LocalCollection", found)  # it has what commands and the service ask of one
    return LocalCollection(
        Path(path), read_only=read_only, fingerprint=fingerprint, device=device, merge=merge
    )


def is_collection(path: str | Path) -> bool:
    """Whether the folder looks like a collection, or describes one in Milvus."""
    there = (Path(path) / "manifest.json").is_file()
    return there and ((Path(path) / "catalog.sqlite").is_file() or in_milvus(path))


def in_milvus(path: str | Path) -> bool:
    """Whether the folder describes a collection in Milvus."""
    try:
        tree = json.loads((Path(path) / "manifest.json").read_bytes())
        return tree["backend"]["kind"] == "milvus"
    except (OSError, ValueError, KeyError, TypeError):
        return False
