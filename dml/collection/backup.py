"""A copy of a collection as of one change, made while it is served, and a collection made of the copy.

::

    BACKUP/                  a folder, or a .tar file with the same in it
      backup.json            of which collection and change, and the sha256 of every file; sealed itself
      manifest.json  catalog.sqlite  snapshots/<seq>.index  images/  encoder/

A backup is read-only by custom only: it is a whole collection, and can be searched where it lies. Thumbnails
are not in it; they are made again when they are asked for.
"""

import hashlib
import json
import os
import shutil
import sqlite3
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

from dml.checksums import seal, seal_fits
from dml.collection import catalog as sql
from dml.collection import place
from dml.collection.catalog import Catalog
from dml.collection.lock import LOCK, WriterLock
from dml.collection.manifest import FILE as MANIFEST
from dml.collection.manifest import Manifest, read_manifest, write_manifest
from dml.collection.pictures import kept
from dml.collection.snapshots import FOLDER as SNAPSHOTS
from dml.collection.snapshots import Snapshots
from dml.errors import CollectionError, DamagedFile, StorageError, UsageError
from dml.index.file import check_index_file
from dml.storage import flush_to_disk, opened_aside, storage_errors, written_aside

FILE = "backup.json"
FORMAT = 1
TAR = ".tar"
BLOCK = 1 << 20  # bytes read at once


@dataclass
class BackupReport:
    """What a backup holds."""

    path: Path
    generation: int
    count: int
    files: int
    bytes: int
    reused: int
    """Pictures that the backup before had already."""
    seconds: float
    problems: list[str] = field(default_factory=list)
    """Pictures that the collection itself has lost or damaged."""


def back_up(collection: Path, target: Path, *, link: bool = False) -> BackupReport:
    """Copy a collection as it is at one moment; whoever serves and writes to it goes on.

    What was at `target` is replaced when the new backup is whole and has been read back; until then, and
    after any failure, it is as it was. Pictures that it has are not copied again.

    Args:
        target: a new folder, a backup of the same collection, or a file whose name ends in .tar.
        link: on the same file system, let pictures and index share their bytes with the collection: quick,
            and no protection against a disk that loses them.

    Raises:
        UsageError: `target` lies in the collection.
        CollectionError: something else is at `target`.
        CollectionLocked: another backup to `target` is being made.
        DamagedFile: the catalogue of the collection cannot be read, or what was written does not fit.
        StorageError: the disk is full or refuses.
    """
    started = time.monotonic()
    collection, target = Path(os.path.abspath(collection)), Path(os.path.abspath(target))
    place.recover(collection)
    manifest = read_manifest(collection)
    if target.is_relative_to(collection):
        raise UsageError(f"{target} lies in the collection itself; give another place.")
    before = previous(target, manifest)
    with storage_errors(target, intact="What was there before is unchanged."), made_aside(target) as aside:
        report = fill(aside, collection, manifest, before=before, link=link)
        if target.suffix == TAR:
            with written_aside(target) as file:
                pack(aside, file)
                read_back(file)
        else:
            read_back(aside)
            with place.turn(target.parent):
                place.put_into_place(target, overwrite=True)
                shutil.rmtree(place.discarded(target), ignore_errors=True)
    report.path, report.seconds = target, time.monotonic() - started
    return report


def previous(target: Path, manifest: Manifest) -> Path | None:
    """The folder of an earlier backup that is to be replaced. Raises CollectionError for anything else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return None
    try:
        with opened(target) as source:
            about = source.about
    except (DamagedFile, StorageError) as error:
        raise CollectionError(f"{target} is there, and is no backup that can be replaced. {error}") from None
    same = (about["manifest"]["fingerprint"], about["manifest"]["created"])
    if same != (manifest.fingerprint, manifest.created):
        raise CollectionError(
            f'{target} is a backup of another collection ("{about["manifest"]["name"]}", made '
            f"{about['manifest']['created']}); it is left as it is. Give another place."
        )
    return target if target.is_dir() else None


@contextmanager
def made_aside(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, locked, and gone afterwards unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = place.building(target)
    with place.turn(target.parent):
        place.clear(target)
        aside.mkdir()
        made = aside.stat()
        lock = WriterLock(aside / LOCK)
    try:
        yield aside
    finally:
        # Once it was renamed another one may have begun under its name.
        if aside.exists() and os.path.samestat(aside.stat(), made):
            shutil.rmtree(aside, ignore_errors=True)
        lock.release()


# Copying


def fill(
    aside: Path, collection: Path, manifest: Manifest, *, before: Path | None, link: bool
) -> BackupReport:
    """Put everything into the folder, and say what there is in backup.json."""
    catalog = Catalog(collection / sql.FILE, dim=manifest.dim, read_only=True)
    copies = Copies(aside, collection, before=before, link=link)
    with closing(catalog), kept(collection):
        state = copy_catalog(catalog, aside)
        missing = copies.take_pictures(state.pictures)
    copies.take_snapshot(state.sequence, state.horizon, manifest)
    copies.take_encoder()
    write_manifest(aside, Manifest(**state.manifest) if state.manifest else manifest)
    files = {name: describe(aside / name) for name in names_below(aside)}
    about = {
        "format": FORMAT,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "generation": state.sequence,
        "count": state.count,
        "manifest": asdict(read_manifest(aside)),
        "files": files,
    }
    with opened_aside(aside / FILE) as file:
        file.write(seal(about))
    for entry in [*aside.rglob("*"), aside]:
        flush_to_disk(entry)
    return BackupReport(
        path=aside,
        generation=state.sequence,
        count=state.count,
        files=len(files),
        bytes=sum(size for size, _ in files.values()),
        reused=copies.reused,
        seconds=0.0,
        problems=[
            f"the picture {sha256} is missing in the collection, or not what it was"
            for sha256 in sorted(missing | copies.misfits)
        ],
    )


@dataclass(frozen=True)
class Moment:
    """What a copied catalogue says."""

    sequence: int
    horizon: int
    count: int
    pictures: set[str]
    manifest: Mapping[str, Any] | None


def copy_catalog(catalog: Catalog, aside: Path) -> Moment:
    """Copy the catalogue as of one moment; writers go on."""
    path = aside / sql.FILE
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    with sql.explained(path), closing(sqlite3.connect(path)) as copy:
        with catalog.reading() as db:
            db.backup(copy)
        sequence, horizon = sql.read_state(copy)
        version = copy.execute("PRAGMA user_version").fetchone()[0]
        moment = Moment(
            sequence,
            horizon,
            sql.count_items(copy),
            sql.stored_pictures(copy),
            sql.read_fact(copy, MANIFEST) if version > 1 else None,
        )
        copy.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return moment


class Copies:
    """Files on their way into a backup.

    Args:
        aside: the folder that becomes the backup.
        collection: where they come from.
        before: an earlier backup, which has most of the pictures.
        link: see `back_up`.
    """

    def __init__(self, aside: Path, collection: Path, *, before: Path | None, link: bool) -> None:
        self.aside, self.collection, self.before, self.link = aside, collection, before, link
        self.misfits: set[str] = set()
        self.reused = 0

    def take_pictures(self, wanted: set[str]) -> set[str]:
        """Copy these, and return the ones that cannot be found."""
        missing = set()
        for sha256 in sorted(wanted):
            try:
                self._take_picture(sha256)
            except FileNotFoundError:
                missing.add(sha256)
        return missing

    def _take_picture(self, sha256: str) -> None:
        name = f"images/{sha256[:2]}/{sha256}"
        target = self.aside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.before is not None and digest(self.before / name) == sha256:
            os.link(self.before / name, target)
            self.reused += 1
            return
        self._copy(self.collection / name, target)
        if digest(target) != sha256:
            self.misfits.add(sha256)

    def _copy(self, source: Path, target: Path) -> None:
        if self.link:
            with suppress(OSError):
                os.link(source, target)
                return
        shutil.copyfile(source, target)

    def take_snapshot(self, sequence: int, horizon: int, manifest: Manifest) -> None:
        """Copy the newest index that fits the copied catalogue, if there is one: it can be built again."""
        (self.aside / SNAPSHOTS).mkdir()
        found = Snapshots(self.collection, fingerprint=manifest.fingerprint, dim=manifest.dim)
        for path in found.paths():
            if not horizon <= int(path.stem) <= sequence:
                continue
            target = self.aside / SNAPSHOTS / path.name
            try:
                self._copy(path, target)
                check_index_file(target)
                return
            except (FileNotFoundError, DamagedFile):
                target.unlink(missing_ok=True)

    def take_encoder(self) -> None:
        if (self.collection / "encoder").is_dir():
            shutil.copytree(self.collection / "encoder", self.aside / "encoder")


def names_below(folder: Path) -> list[str]:
    """The files of a backup, as POSIX paths."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (LOCK, FILE))


def describe(path: Path) -> tuple[int, str]:
    """(bytes, sha256) of a file."""
    return path.stat().st_size, digest(path) or ""


def digest(path: Path) -> str | None:
    """sha256 of a file; None when it is not there."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def pack(folder: Path, target: Path) -> None:
    """Write the folder into one .tar file."""
    with tarfile.open(target, mode="w") as tar:
        for name in [FILE, *names_below(folder)]:
            tar.add(folder / name, arcname=name, recursive=False)


def read_back(path: Path) -> None:
    """Raises StorageError when what was written is not what is there."""
    if problems := check_backup(path):
        raise StorageError(f"{path} was written, and does not read back: {problems[0]}")


# Reading a backup


class Source(Protocol):
    """A backup, in a folder or in a .tar file."""

    about: Mapping[str, Any]
    """What backup.json says."""

    def open(self, name: str) -> BinaryIO:
        """A file of it. Raises FileNotFoundError."""
        ...


class FolderSource:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = read_about(self, path)

    def open(self, name: str) -> BinaryIO:
        return open(self.path / name, "rb")


class TarSource:
    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.tar = tar
        self.about = read_about(self, path)

    def open(self, name: str) -> BinaryIO:
        try:
            file = self.tar.extractfile(name)
        except KeyError:
            file = None
        if file is None:
            raise FileNotFoundError(name)
        return file  # type: ignore[return-value]


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """A backup to read from. Raises DamagedFile for what is none, or of a newer format."""
    if path.is_dir():
        yield FolderSource(path)
        return
    try:
        tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise UsageError(f"There is no backup at {path}.") from None
    except tarfile.TarError as error:
        raise DamagedFile(f"{path} is not a backup, or is damaged: {error}") from error
    try:
        yield TarSource(path, tar)
    except tarfile.TarError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error
    finally:
        tar.close()


def read_about(source: Source, path: Path) -> Mapping[str, Any]:
    """What backup.json says, checked."""
    try:
        with source.open(FILE) as file:
            data = file.read()
    except FileNotFoundError:
        raise DamagedFile(f"{path} is not a backup: there is no {FILE} in it.") from None
    if not seal_fits(data):
        raise DamagedFile(f"{FILE} in {path} is damaged: its checksum does not fit.")
    about = json.loads(data)
    if about["format"] > FORMAT:
        raise DamagedFile(
            f"{path} has format {about['format']}, and this version of dml reads up to {FORMAT}; update dml."
        )
    return about


def check_backup(path: Path) -> list[str]:
    """Read all of a backup and compare it with its checksums; one sentence per problem.

    Raises:
        UsageError: there is none. DamagedFile: it does not even say what is in it.
    """
    problems = []
    with opened(path) as source:
        for name, (size, sha256) in source.about["files"].items():
            try:
                found = digest_in(source, name)
            except FileNotFoundError:
                problems.append(f"{name} is missing in {path}")
                continue
            except (OSError, tarfile.TarError) as error:
                problems.append(f"{name} in {path} cannot be read: {error}")
                continue
            if found != sha256:
                problems.append(f"{name} in {path} does not fit its checksum ({size:,} bytes were written)")
    return problems


def digest_in(source: Source, name: str) -> str:
    """sha256 of a file of a backup. Raises FileNotFoundError."""
    found = hashlib.sha256()
    with source.open(name) as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


# Restoring


def restore(backup: Path, out: Path, *, overwrite: bool = False) -> Mapping[str, Any]:
    """Make a collection of a backup, and check it.

    Everything is copied and compared with its checksum on the way; `out` appears, or changes, when all of it
    is there.

    Args:
        overwrite: replace the collection at `out`, which nobody may be writing to.

    Returns:
        What backup.json says.

    Raises:
        CollectionError: something is at `out`.
        CollectionLocked: somebody writes to what is to be replaced.
        DamagedFile: the backup is damaged; `out` is as it was.
        StorageError: the disk is full or refuses; `out` is as it was.
    """
    backup, out = Path(os.path.abspath(backup)), Path(os.path.abspath(out))
    place.recover(out)
    refuse_to_replace(out, overwrite=overwrite)
    with storage_errors(out, intact="What was there before is unchanged."), opened(backup) as source:
        with made_aside(out) as aside:
            for name, (_, sha256) in source.about["files"].items():
                copy_checked(source, name, aside, sha256=sha256, backup=backup)
            for entry in [*aside.rglob("*"), aside]:
                flush_to_disk(entry)
            with place.turn(out.parent):
                place.put_into_place(out, overwrite=overwrite)
                shutil.rmtree(place.discarded(out), ignore_errors=True)
        return source.about


def refuse_to_replace(out: Path, *, overwrite: bool) -> None:
    """Raises CollectionError unless `out` is free, or a collection that is to be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file() or not (out / LOCK).is_file():
        raise CollectionError(f"{out} exists and is not a collection; give another place.")
    if not overwrite:
        raise CollectionError(f"{out} is there already. Give another place, or --overwrite to replace it.")


def copy_checked(source: Source, name: str, aside: Path, *, sha256: str, backup: Path) -> None:
    """Copy a file of a backup. Raises DamagedFile when it is not what was written."""
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise DamagedFile(f"{backup} names a file outside of itself: {name}")
    target = aside / inside
    target.parent.mkdir(parents=True, exist_ok=True)
    found = hashlib.sha256()
    try:
        with source.open(name) as file, open(target, "wb") as copy:
            while block := file.read(BLOCK):
                found.update(block)
                copy.write(block)
    except FileNotFoundError:
        raise DamagedFile(f"{backup} is damaged: {name} is missing") from None
    if found.hexdigest() != sha256:
        raise DamagedFile(f"{backup} is damaged: {name} does not fit its checksum")
