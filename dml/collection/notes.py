"""What files looked like when they were read: what has the same size and time need not be read again.

A file `files.sqlite` in the collection's folder. It holds no truth: without it every file is read once more,
and pictures that were stored as copies are not deleted when their files are. A damaged one is begun anew.
"""

import logging
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from dml.errors import StorageError

log = logging.getLogger(__name__)

FILE = "files.sqlite"
SETTLED_NS = 2_000_000_000
"""A file that was changed less than this before it was read may change again without a new time: clocks of
file systems tick as slowly as every 2 s. It is read again the next time."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    root TEXT NOT NULL,
    path TEXT NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (root, path)
) WITHOUT ROWID
"""


class FileNote(NamedTuple):
    """A file when it was read."""

    size: int  # bytes
    mtime_ns: int
    sha256: str


class FileNotes:
    """Notes on the files below the roots of a collection; for the one that holds the writer's lock."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def load(self, root: str) -> dict[str, FileNote]:
        """POSIX path below the root -> note; {} when there are none that can be read."""
        if not self.path.exists():
            return {}
        try:
            with closing(sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True)) as db:
                found = db.execute("SELECT path, size, mtime_ns, sha256 FROM files WHERE root = ?", (root,))
                return {path: FileNote(*note) for path, *note in found}
        except sqlite3.DatabaseError as error:
            log.warning("%s cannot be read (%s); every file is read again", self.path, error)
            return {}

    def save(self, root: str, notes: Mapping[str, FileNote]) -> None:
        """Add or replace. Raises StorageError."""
        newest = time.time_ns() - SETTLED_NS
        # Kept without a time, a note says that the file came from here, and never that it is unchanged.
        settled = {path: note.mtime_ns if note.mtime_ns < newest else 0 for path, note in notes.items()}
        rows = [(root, path, note.size, settled[path], note.sha256) for path, note in notes.items()]
        with self._writing() as db:
            db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", rows)

    def forget(self, root: str, paths: Iterable[str]) -> None:
        """Raises StorageError."""
        with self._writing() as db:
            db.executemany("DELETE FROM files WHERE root = ? AND path = ?", [(root, p) for p in paths])

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        try:
            db = self._open()
            with closing(db), db:
                yield db
        except sqlite3.DatabaseError as error:
            raise StorageError(
                f"{self.path} could not be written: {error}. Make room and try again."
            ) from error

    def _open(self) -> sqlite3.Connection:
        for again in (True, False):
            db = sqlite3.connect(self.path)
            try:
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute(SCHEMA)
                return db
            except sqlite3.DatabaseError as error:
                db.close()
                damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in (
                    sqlite3.SQLITE_CORRUPT,
                    sqlite3.SQLITE_NOTADB,
                )
                if not again or not damaged:
                    raise
                log.warning("%s is damaged (%s) and is begun anew", self.path, error)
                self.path.unlink()
        raise AssertionError("unreachable")
