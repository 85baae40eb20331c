"""What a service remembers beside its collections, in one SQLite file of its state folder.

::

    sections    name · version      one row for each part of the service that keeps tables here
    keys …      the tables of the parts; a table is called as its section, or begins with its name and "_"

A part of the service declares its tables as a `Section`, with the steps that lead from one version of them to
the next, so that a new part joins without a change here. API keys are the first (`service.keys`). All parts
share one `StateFile`, and with it two connections: what they remember costs the same however many they are.

Several processes may have the file open: `dml keys` changes it while services run. It is written in WAL mode
with synchronous=FULL, so a change is on the disk before it is acknowledged, and readers never wait. Only the
owner may read it.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_state_path

from dml.errors import DamagedFile, StorageError, UsageError

FILE = "service.sqlite"
"""In the state folder."""

VERSION = 1
"""Format of the file itself, kept in SQLite's user_version; sections count their own."""

APPLICATION_ID = 0x646D6C73  # "dmls"
WAIT_SECONDS = 10
"""How long a writer waits for another one."""

creating = threading.Lock()


def default_folder() -> Path:
    """$DML_STATE, or the user's folder for states, such as ~/.local/state/dml."""
    named = os.environ.get("DML_STATE")
    return Path(named) if named else user_state_path("dml", appauthor=False)


@dataclass(frozen=True)
class Section:
    """The tables of one part of the service.

    Attributes:
        name: the part; its tables are called so, or begin with it.
        steps: SQL scripts. Step n leads from version n to n + 1; one that was released never changes.
    """

    name: str
    steps: tuple[str, ...]


class State:
    """The open state file. Any thread may use it.

    Args:
        folder: the state folder; made, for its owner only, when it is not there.
        sections: whose tables are to be there, see `prepare`.

    Raises:
        StorageError: the folder or the file cannot be written.
        DamagedFile: the file is no state of a service, or is damaged.
        UsageError: it was written by a newer version.
    """

    def __init__(self, folder: Path, *sections: Section) -> None:
        self.path = folder / FILE
        self._reading, self._writing = threading.Lock(), threading.Lock()
        self._prepared: set[str] = set()
        with explained(self.path):
            create_private(self.path)
            self._inode = self.path.stat().st_ino
            self._writer = connect(self.path)
            try:
                self._make()
                self._reader = connect(self.path)
            except BaseException:
                self._writer.close()
                raise
        try:
            for section in sections:
                self.prepare(section)
        except BaseException:
            self.close()
            raise

    def _make(self) -> None:
        """Make the file what it is to be. Raises DamagedFile, UsageError for one that is something else."""
        write_ahead(self._writer)
        with self.writing() as db:
            mark, version = (
                db.execute(f"PRAGMA {p}").fetchone()[0] for p in ("application_id", "user_version")
            )
            if (mark, version) == (0, 0) and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[
                0
            ]:
                db.execute("CREATE TABLE sections (name TEXT PRIMARY KEY, version INTEGER NOT NULL)")
                db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {VERSION}")
            elif mark != APPLICATION_ID:
                raise DamagedFile(f"{self.path} is a database of something else. Name another state folder.")
            elif version > VERSION:
                raise self._too_new(f"format {version}", f"format {VERSION}")

    def prepare(self, section: Section) -> None:
        """Have the tables of a section there: made, or brought to their newest version.

        One transaction: SQLite undoes changes of tables as well, so no copy is needed. When they are
        there nothing is written, and no other writer waited for.

        Raises:
            UsageError: they were written by a newer version.
            StorageError, DamagedFile
        """
        newest = len(section.steps)
        if section.name in self._prepared:
            return
        with self.reading() as db:
            reached = self._reached(db, section)
        if reached < newest:
            with self.writing() as db:
                reached = self._reached(db, section)  # again: another process may have been first
                for step in section.steps[reached:]:
                    for statement in step.split(";"):
                        db.execute(statement)
                db.execute("REPLACE INTO sections VALUES (?, ?)", (section.name, newest))
        self._prepared.add(section.name)

    def has(self, section: Section) -> bool:
        """Whether the tables of a section were ever made; then they are of their newest version from now on.

        Raises: as `prepare`.
        """
        if section.name not in self._prepared:
            with self.reading() as db:
                there = self._reached(db, section) > 0
            if not there:
                return False
            self.prepare(section)
        return True

    def _reached(self, db: sqlite3.Connection, section: Section) -> int:
        """The version of its tables; 0: there are none. Raises UsageError for one that is too new."""
        found = db.execute("SELECT version FROM sections WHERE name = ?", (section.name,)).fetchone()
        reached, newest = found[0] if found else 0, len(section.steps)
        if reached > newest:
            raise self._too_new(f"{section.name} of version {reached}", f"version {newest}")
        return reached

    def _too_new(self, found: str, known: str) -> UsageError:
        return UsageError(
            f"{self.path} was written by a newer dml: it has {found}, and this one knows {known}. "
            f"Update dml, or name another state folder with --state."
        )

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection to read through."""
        with self._reading, explained(self.path):
            yield self._reader

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A connection in a transaction: on the disk when the block has ended, undone when it raises."""
        with self._writing, explained(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def moment(self) -> int:
        """A number that changes when anyone has written, here or in another process. Costs microseconds."""
        with self.reading() as db:
            return db.execute("PRAGMA data_version").fetchone()[0]

    def is_current(self) -> bool:
        """Whether the file that is open is still the one that the path leads to."""
        try:
            return self.path.stat().st_ino == self._inode
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the file, when those who read or write it this moment have ended."""
        with self._writing, self._reading:
            self._reader.close()
            self._writer.close()


class StateFile:
    """The state of a folder, opened once for all parts of the service, by the first that needs it.

    Args:
        folder: the state folder; nothing is made there before something is to be remembered.

    Raises:
        StorageError, DamagedFile, UsageError: by every method, as `State` does.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._state: State | None = None

    def if_there(self, section: Section) -> State | None:
        """The state with the tables of a section; None when nothing was ever written there.

        A file that took another's place, as one restored from a backup does, is opened instead of it.
        """
        with self._lock:
            found = self._current()
            if found is None and (self.folder / FILE).exists():
                found = self._state = State(self.folder)
        return found if found is not None and found.has(section) else None

    def made(self, section: Section) -> State:
        """The state with the tables of a section; made when it is not there."""
        with self._lock:
            found = self._current()
            if found is None:
                found = self._state = State(self.folder)
        # Not under the lock: it may wait for a writer in another process, and the event loop takes the lock.
        found.prepare(section)
        return found

    def _current(self) -> State | None:
        """The state that is open, under the lock; None: none, or it is no longer the one of the folder."""
        if self._state is not None and not self._state.is_current():
            self._state.close()
            self._state = None
        return self._state

    def close(self) -> None:
        with self._lock:
            if self._state is not None:
                self._state.close()
            self._state = None


class Drawer:
    """The tables of one section. Any thread may ask.

    Args:
        file: the state that all parts share; a folder: one that this part opens, and closes, for itself.
        section: whose tables.

    Raises:
        StorageError, DamagedFile, UsageError: by every method, as `State` does.
    """

    def __init__(self, file: StateFile | Path, section: Section) -> None:
        self._own = isinstance(file, Path)
        self._file = StateFile(file) if isinstance(file, Path) else file
        self._section = section

    @property
    def folder(self) -> Path:
        return self._file.folder

    def if_there(self) -> State | None:
        """The tables; None when nothing was ever written."""
        return self._file.if_there(self._section)

    def made(self) -> State:
        """The tables; made when they are not there."""
        return self._file.made(self._section)

    def close(self) -> None:
        if self._own:
            self._file.close()


def create_private(path: Path) -> None:
    """An empty file and its folder, for their owner only; what is there stays as it is.

    A file that is there must not even be opened: closing it would drop the locks that SQLite holds on it in
    this process (POSIX locks belong to a process and a file), and the next process to leave would take itself
    for the last and delete the log under us.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Under a lock, so that no other thread has opened the new file before this descriptor is closed.
    with creating, suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path,
        isolation_level=None,  # transactions are opened by hand
        check_same_thread=False,  # locks keep threads apart
        timeout=WAIT_SECONDS,
    )
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def write_ahead(connection: sqlite3.Connection) -> None:
    """Have the file keep a write-ahead log.

    Where two make the file at the same time SQLite refuses one of them at once, whatever its timeout: on its
    way to the log it has begun to read, and one that has does not wait for a writer.

    Raises:
        sqlite3.OperationalError: "database is locked", after `WAIT_SECONDS`.
    """
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's and the disk's errors, in our words."""
    try:
        yield
    except sqlite3.IntegrityError:  # a row that a table does not take: for the part that wrote it
        raise
    except sqlite3.OperationalError as error:
        raise StorageError(
            f"The state of the service, {path}, cannot be used: {error}. "
            f"Its folder has to be on a disk with room, and writable; --state names another."
        ) from error
    except sqlite3.DatabaseError as error:
        raise DamagedFile(
            f"The state of the service, {path}, is damaged ({error}). "
            f"Restore it, or move it away and add the API keys again."
        ) from error
    except OSError as error:
        raise StorageError(
            f"The state of the service, {path}, cannot be written: {error.strerror or error}. "
            f"Fix the permissions of its folder, or name another with --state."
        ) from error
