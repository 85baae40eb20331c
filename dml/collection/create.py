"""Making a new, empty collection in a folder."""

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dml.collection import catalog, snapshots
from dml.collection.derive import check_kind
from dml.collection.local import LocalCollection
from dml.collection.manifest import Manifest, default_name, write_manifest
from dml.collection.merging import MergeMode
from dml.collection.pictures import make_folder
from dml.data.ids import absolute
from dml.errors import CollectionError, ConfigError, StorageError
from dml.index import check_options
from dml.index.tune import Promise


def create_local(
    path: Path,
    *,
    dim: int,
    fingerprint: str,
    name: str | None,
    index: str,
    options: Mapping[str, Any],
    promise: Promise | None,
    roots: Mapping[str, str | Path],
    encoder_info: Mapping[str, Any],
    device: str,
    merge: MergeMode,
) -> LocalCollection:
    """See `dml.collection.create_collection`."""
    if dim < 1:
        raise ConfigError(f"a collection needs vectors of at least 1 number, got dim {dim}")
    check_kind(index)
    check_options(index, options)
    if promise is not None and (index != "auto" or options):
        raise ConfigError(f'A promise chooses the kind of index itself; "{index}" was given too.')
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CollectionError(f"{path} is not an empty folder; give a new one, or open what is there.")
    manifest = Manifest(
        name=name or default_name(path),
        dim=dim,
        fingerprint=fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        index={"kind": index, "options": dict(options)} | ({"promise": asdict(promise)} if promise else {}),
        roots={key: str(absolute(Path(root))) for key, root in roots.items()},
        encoder=dict(encoder_info),
    )
    new = not path.exists()
    try:
        make_folder(path)
        make_folder(path / snapshots.FOLDER)
        catalog.Catalog.create(path / catalog.FILE, dim=dim).close()
        write_manifest(path, manifest)  # last: a folder with a manifest is a whole collection
    except StorageError:
        for child in [path] if new else path.iterdir():
            shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink()
        raise
    return LocalCollection(path, device=device, merge=merge)
