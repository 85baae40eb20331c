"""Mending a damaged collection: what can be derived is made again, what cannot is named."""

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dml.collection import catalog as sql
from dml.collection.audit import check_catalog
from dml.collection.catalog import Catalog
from dml.collection.lock import LOCK, WriterLock
from dml.collection.manifest import FILE as MANIFEST
from dml.collection.manifest import FORMAT, Manifest, default_name, read_manifest, write_manifest
from dml.collection.pictures import Pictures, make_folder
from dml.collection.place import recover
from dml.collection.salvage import Salvaged, salvage, swap
from dml.collection.snapshots import Snapshots
from dml.errors import DamagedFile, StorageError, UnknownCollection
from dml.index.file import check_index_file, read_header

QUARANTINE = "quarantine"
"""Folder for stored pictures that are not what they were."""


@dataclass
class Repairs:
    """What was found and done."""

    done: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    """Items that could not be saved from a damaged catalogue."""
    waiting: Path | None = None
    """A catalogue with what could be saved; it takes the damaged one's place when that is asked for."""
    left: list[str] = field(default_factory=list)
    """What `verify` still finds afterwards."""


def repair(path: Path, *, replace_catalog: bool = False) -> Repairs:
    """Mend a collection that nobody writes to.

    - manifest.json is written again as the catalogue remembers it;
    - of a damaged catalogue every item whose entry and vector fit their checksums is saved into a new one
      beside it; with `replace_catalog` that takes its place, and the damaged one is kept;
    - stored pictures that are not what they were go to `quarantine/`;
    - damaged indexes are deleted, and built again from the catalogue;
    - damaged thumbnails are made again when they are asked for.

    An encoder, and pictures that lie elsewhere, can only be named: they are nowhere else in the collection.

    Raises:
        UnknownCollection: there is none.
        CollectionLocked: somebody writes to it.
        DamagedFile: too little is left, or it is of a newer format.
        StorageError: the disk is full or refuses.
    """
    from dml.collection.local import LocalCollection

    recover(path)
    if not (path / sql.FILE).is_file():
        raise UnknownCollection(f"There is no collection at {path} (no {sql.FILE} in it).")
    repairs = Repairs()
    lock = WriterLock(path / LOCK)
    try:
        manifest = mend_manifest(path, repairs)
        if not mend_catalog(path, manifest, repairs, replace=replace_catalog):
            return repairs
        mend_pictures(path, repairs)
        mend_snapshots(path, manifest, repairs)
    finally:
        lock.release()
    with LocalCollection(path, merge="manual") as collection:  # builds the index anew when there is none
        repairs.left = collection.verify()
    return repairs


# The manifest


def mend_manifest(path: Path, repairs: Repairs) -> Manifest:
    """The manifest, written again if it was damaged."""
    try:
        return read_manifest(path)
    except UnknownCollection:
        problem = f"{path / MANIFEST} was missing"
    except DamagedFile as error:
        if newer_format(path):
            raise
        problem = str(error).partition(". `dml")[0]
    manifest, source = remembered(path)
    with suppress(FileNotFoundError):
        os.replace(path / MANIFEST, path / f"{MANIFEST}.damaged")
    write_manifest(path, manifest)
    repairs.done.append(f"{problem}. It was written again from {source}.")
    return manifest


def newer_format(path: Path) -> bool:
    """Whether a newer dml wrote the manifest, rather than damage: its own checksum fits."""
    from dml.checksums import seal_fits

    try:
        data = (path / MANIFEST).read_bytes()
        return bool(seal_fits(data)) and json.loads(data)["format"] > FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def remembered(path: Path) -> tuple[Manifest, str]:
    """The manifest from what else there is, and where it comes from. Raises DamagedFile."""
    with suppress(sqlite3.DatabaseError, TypeError, ValueError), reading(path / sql.FILE) as db:
        fact = sql.read_fact(db, MANIFEST)
        if fact is not None:
            return Manifest(**fact), "the catalogue"
    for snapshot in sorted((path / "snapshots").glob("*.index"), reverse=True):
        with suppress(DamagedFile):
            header = read_header(snapshot)
            manifest = Manifest(
                name=default_name(path),
                dim=header.dim,
                fingerprint=header.note["fingerprint"],
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                index={"kind": header.kind, "options": dict(header.settings)},
            )
            return manifest, f"{snapshot.name}: its name is that of the folder, and its roots are not known"
    raise DamagedFile(
        f"{path / MANIFEST} cannot be read, and neither the catalogue nor an index says what was in it. "
        f"Restore a backup."
    )


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        yield db


# The catalogue


def mend_catalog(path: Path, manifest: Manifest, repairs: Repairs, *, replace: bool) -> bool:
    """Whether there is a whole catalogue now."""
    problems = problems_of_catalog(path, manifest.dim)
    if not problems:
        return True
    repairs.done.append(f"The catalogue is damaged: {problems[0]}{more(len(problems) - 1)}.")
    saved = save_rows(path, manifest)
    repairs.lost = saved.lost
    if not replace:
        repairs.waiting = saved.path
        return False
    kept = swap(path / sql.FILE, saved.path)
    repairs.done.append(f"{saved.count:,} items were saved into a new one; the damaged one is {kept.name}.")
    with closing_catalog(path, manifest.dim) as catalog:
        catalog.remember(MANIFEST, asdict(manifest))
    return True


def problems_of_catalog(path: Path, dim: int) -> list[str]:
    try:
        with closing_catalog(path, dim, read_only=True) as catalog:
            return check_catalog(catalog)
    except (DamagedFile, StorageError) as error:
        if "update dml" in str(error):
            raise
        return [str(error).partition(". `dml")[0]]


def save_rows(path: Path, manifest: Manifest) -> Salvaged:
    """A catalogue beside the damaged one, behind every index that was made of that."""
    notes: list[Any] = []
    for snapshot in (path / "snapshots").glob("*.index"):
        with suppress(DamagedFile):
            notes.append(check_index_file(snapshot).note)
    return salvage(
        path / sql.FILE,
        path / f"{sql.FILE}.salvaged",
        dim=manifest.dim,
        last_row=max((note["last_row"] for note in notes), default=0),
        sequence=max((note["sequence"] for note in notes), default=0),
    )


@contextmanager
def closing_catalog(path: Path, dim: int, *, read_only: bool = False) -> Iterator[Catalog]:
    with closing(Catalog(path / sql.FILE, dim=dim, read_only=read_only)) as catalog:
        yield catalog


# The rest


def mend_pictures(path: Path, repairs: Repairs) -> None:
    """Move stored pictures away that are not what they were, and delete such thumbnails."""
    pictures = Pictures(path, {})
    for file in pictures.misfits():
        make_folder(path / QUARANTINE)
        os.replace(file, path / QUARANTINE / file.name)
        repairs.done.append(f"{file} is not the picture of its name: moved to {QUARANTINE}/.")
    for file in pictures.spoilt_thumbnails():
        file.unlink(missing_ok=True)
        repairs.done.append(f"{file} was deleted; it is made again when it is asked for.")


def mend_snapshots(path: Path, manifest: Manifest, repairs: Repairs) -> None:
    """Delete indexes that are damaged, or of another state of the catalogue; others that are left will do."""
    snapshots = Snapshots(path, fingerprint=manifest.fingerprint, dim=manifest.dim)
    with closing_catalog(path, manifest.dim, read_only=True) as catalog, catalog.reading() as db:
        sequence, horizon = sql.read_state(db)
    for file in snapshots.paths():
        try:
            if horizon <= check_index_file(file).note.get("sequence", -1) <= sequence:
                continue
            problem = "it does not belong to the catalogue"
        except DamagedFile as error:
            if "update dml" in str(error):
                continue
            problem = "a checksum does not fit"
        file.unlink(missing_ok=True)
        repairs.done.append(f"{file} was deleted ({problem}); the catalogue has everything in it.")


def more(count: int) -> str:
    return f" (and {count:,} more problems)" if count > 0 else ""
