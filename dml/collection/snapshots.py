"""Saved indexes of a collection: each as of one change, checksummed, and never needed to have the items.

::

    snapshots/<seq>.index    the index as of change <seq>; may be deleted at any time
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dml.collection import catalog as sql
from dml.collection.generation import Snapshot
from dml.errors import ConfigError, DamagedFile, MissingExtra
from dml.index import KINDS, load_index
from dml.index.file import FORMAT, MAGIC, PREFIX, check_index_file, read_header
from dml.registry import resolve
from dml.storage import ASIDE

log = logging.getLogger(__name__)

T = TypeVar("T")

FOLDER = "snapshots"
"""Below the folder of a collection."""
KEPT = 2

TRIES = 3
"""So often a file is read again that was exchanged while it was read."""


class Snapshots:
    """The folder of them.

    Args:
        folder: of the collection.
        fingerprint: of the collection's encoder; a snapshot of other vectors is not believed.
        dim: of its vectors.
        device: where indexes are loaded.
        read_only: nothing is deleted, whatever state it is in.
    """

    def __init__(
        self, folder: Path, *, fingerprint: str, dim: int, device: str = "auto", read_only: bool = False
    ) -> None:
        self.folder = folder / FOLDER
        self.fingerprint, self.dim, self.device, self.read_only = fingerprint, dim, device, read_only
        self.unread: list[Path] = []
        """Those that may be sound, and that this process cannot read: nobody replaces them unasked."""
        self.overtaken = False
        """Whether the last `load` passed over one because the writer had gone on: it was newer than the
        reader's transaction, deleted in the meantime, or exchanged again and again. A later transaction finds
        another."""

    def path(self, sequence: int) -> Path:
        return self.folder / f"{sequence:012d}.index"

    def paths(self) -> list[Path]:
        """Newest first."""
        return sorted((p for p in self.folder.glob("*.index") if p.stem.isdecimal()), reverse=True)

    def newest(self) -> int:
        """The change of the newest that there is, whole or not; -1 without any."""
        return max((int(path.stem) for path in self.paths()), default=-1)

    def save(self, snapshot: Snapshot) -> None:
        """Write it, completely or not at all. Raises StorageError."""
        note = {
            "sequence": snapshot.sequence,
            "last_row": snapshot.last_row,
            "fingerprint": self.fingerprint,
            "measured": snapshot.measured,
            "built_over": snapshot.built_over,
            "dead": snapshot.dead,
        }
        snapshot.index.save(self.path(snapshot.sequence), note=note)

    def load(self, db: Any, *, newer_than: int = -1) -> Snapshot | None:
        """The newest that is whole and fits the catalogue; None when there is none.

        Args:
            newer_than: only those as of a later change.

        Only what has shown to be damaged is deleted: its length or a checksum is wrong, in a format that is
        known. What a newer dml wrote, or what cannot be read just now, is passed over and stays.
        """
        state = sql.read_state(db)
        self.unread, self.overtaken = [], False
        for path in self.paths():
            if int(path.stem) <= newer_than:
                break
            try:
                found = unexchanged(path, partial(self._read, path, *state))
                if found is not None:
                    return found
            except Exchanged:
                self.overtaken = True
            except (DamagedFile, OSError, KeyError) as error:
                if self.read_only and not path.exists():
                    self.overtaken = True
                    continue
                log.warning("%s; passed over, nothing is lost: the catalogue has everything", error)
                if not is_damage(path, error):
                    self.unread.append(path)
                elif not self.read_only:
                    path.unlink(missing_ok=True)
            except MissingExtra as error:
                log.warning("%s Until then this collection is searched exactly, with numpy.", error)
                return None
        return None

    def _read(self, path: Path, sequence: int, horizon: int) -> Snapshot | None:
        """One of them; None: it does not fit a catalogue of this state."""
        header = read_header(path)
        note, origin = header.note, (header.note.get("fingerprint"), header.dim)
        if self.read_only and note["sequence"] > sequence:
            self.overtaken = True
            return None
        if origin != (self.fingerprint, self.dim) or not horizon <= note["sequence"] <= sequence:
            log.warning("%s does not belong to this state of the catalogue; passed over", path)
            return None
        check_kind_of(path, header.kind)
        index = load_index(path, device=self.device)
        return Snapshot(
            index,
            note["sequence"],
            note["last_row"],
            note.get("measured"),
            built_over=note.get("built_over", len(index)),
            dead=note.get("dead", 0),
        )

    def drop_old(self) -> int | None:
        """Delete all but the newest `KEPT` and what was half-written.

        Returns:
            The change of the oldest that is kept: older removals need not be remembered; None while there
            are fewer than `KEPT`.
        """
        paths = self.paths()
        for path in paths[KEPT:]:
            path.unlink(missing_ok=True)
        for leftover in self.folder.glob(f".*{ASIDE}"):
            leftover.unlink(missing_ok=True)
        return int(paths[KEPT - 1].stem) if len(paths) >= KEPT else None

    @staticmethod
    def check(paths: Sequence[Path], sequence: int) -> list[str]:
        """One sentence for each that does not fit its checksums, or knows changes after `sequence`.

        Args:
            paths: what there was before `sequence` was read. Those that a writer has deleted since, or
                exchanges all the time, are passed over.
        """
        problems = []
        for path in paths:
            try:
                last = unexchanged(path, partial(check_index_file, path)).note.get("sequence", 0)
            except Exchanged:
                continue
            except DamagedFile as error:
                problems += [str(error)] if path.exists() else []
                continue
            if last > sequence:
                problems.append(
                    f"{path} knows changes up to {last}, and the catalogue up to {sequence}: it has lost some"
                )
        return problems


class Exchanged(Exception):
    """Another file took the place of the one that was being read, again and again."""


def unexchanged(path: Path, read: Callable[[], T]) -> T:
    """What `read` makes of the file at a path, all of it from one file.

    A writer that builds anew when nothing was written renames another file over the same path, and reading
    one opens it several times: parts of two make an index that answers wrongly, or any error at all.

    Raises:
        Exchanged: so it went each time.
        Exception: whatever `read` raises for a file that stays.
    """
    for _ in range(TRIES):
        before = which_file(path)
        try:
            found = read()
        except Exception:
            if which_file(path) == before:
                raise
        else:
            if which_file(path) == before:
                return found
    raise Exchanged(path)


def which_file(path: Path) -> tuple[int, ...] | None:
    """Tells a file from another one in its place, or from itself when it has changed; None without one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def check_kind_of(path: Path, kind: str) -> None:
    """Refuse a snapshot of an index kind that cannot be had here. Raises DamagedFile."""
    try:
        resolve("index kind", kind, KINDS)
    except ConfigError as error:
        raise DamagedFile(f"{path} cannot be read here: {error}") from error


def is_damage(path: Path, error: Exception) -> bool:
    """Whether a snapshot has shown to be broken for good: by its length or a checksum, in a known format."""
    if not isinstance(error, DamagedFile) or isinstance(error.__cause__, OSError | ConfigError):
        return False
    try:
        with open(path, "rb") as file:
            prefix = file.read(PREFIX.size)
            if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
                return True
            _, offset, length, digest = PREFIX.unpack(prefix)
            file.seek(offset)
            encoded = file.read(length)
    except (FileNotFoundError, OverflowError, MemoryError):  # a length that no file has
        return True
    except OSError:
        return False
    return hashlib.sha256(encoded).digest() != digest or json.loads(encoded).get("format", 0) <= FORMAT
