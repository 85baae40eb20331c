"""The source of truth of a local collection: ids, payloads, vectors and changes in one SQLite file.

::

    items    row (int64, never used twice) · id · sequence · payload JSON · picture columns · crc32
    vectors  row · float32 little-endian · crc32
    removed  row · sequence                  rows that are gone, for indexes that still hold them
    state    sequence · horizon · crc32      the last change; `removed` is complete after `horizon`
    facts    name · value JSON · crc32       what else can be restored from here: the manifest

A new vector is a new row, also under an old id: a row and its vector never change, so an index can hold rows
and be brought up to date by "rows above the last one it knows" and "rows removed since". WAL and
synchronous=FULL: a change is acknowledged after it is on the disk.
"""

import json
import os
import re
import sqlite3
import threading
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.collection import payload_indexes
from dml.collection.base import Item, PayloadTooLarge, Picture
from dml.errors import CollectionError, DamagedFile, StorageError
from dml.index.base import Ids, Vectors
from dml.storage import flush_to_disk

FILE = "catalog.sqlite"
"""In the folder of a collection."""

VERSION = 2
"""Format of the catalogue, kept in SQLite's user_version."""

APPLICATION_ID = 0x646D6C31  # "dml1"

SCHEMA = """
CREATE TABLE items (
    row INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    sequence INTEGER NOT NULL,
    payload TEXT NOT NULL,
    picture_kind TEXT,
    picture_sha256 TEXT,
    picture_path TEXT,
    picture_root TEXT,
    crc INTEGER NOT NULL
);
CREATE INDEX items_sequence ON items (sequence);
CREATE INDEX items_stored ON items (picture_sha256) WHERE picture_kind = 'stored';
CREATE TABLE vectors (row INTEGER PRIMARY KEY, vector BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE removed (row INTEGER PRIMARY KEY, sequence INTEGER NOT NULL);
CREATE INDEX removed_sequence ON removed (sequence);
CREATE TABLE state (
    only INTEGER PRIMARY KEY CHECK (only = 1),
    sequence INTEGER NOT NULL,
    horizon INTEGER NOT NULL,
    crc INTEGER NOT NULL
);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL, crc INTEGER NOT NULL);
"""

ITEM_COLUMNS = "row, id, sequence, payload, picture_kind, picture_sha256, picture_path, picture_root"

Row = tuple[Any, ...]

FileId = tuple[int, ...]

TRIES = 20
"""So often a file is opened again that was replaced while it was opened."""

FEW_ROWS = 50
"""Up to so many are named in the statement: quicker than a table of them, and a connection remembers as many
statements."""


@dataclass(frozen=True)
class Change:
    """An item as it is to be written."""

    id: str
    vector: NDArray[np.float32]
    payload: str  # JSON
    picture: Picture | None


class Written(NamedTuple):
    """What a change did."""

    sequence: int
    rows: Ids  # the rows that are new
    vectors: Vectors
    removed: Ids  # the rows that are gone
    created: list[bool]  # per change: whether its id was new
    orphans: list[str]  # sha256 of stored pictures that nobody refers to any more


class KnownPicture(NamedTuple):
    """Whose vector is that of which bytes."""

    id: str
    sha256: str
    box: str | None  # the part of the picture that was embedded, "[1,2,3,4]"; None: all of it


class Connection(sqlite3.Connection):
    """One that knows what it was opened on."""

    file: FileId | None = None  # None: a writer's, whose file nobody replaces
    frozen = False  # whether SQLite was told that nobody writes


def file_of(db: Any) -> FileId | None:
    """Which file a transaction reads: rows and changes of another one mean something else."""
    return getattr(db, "file", None)


class Catalog:
    """Open catalogue. Several threads may read at once; writing goes through one connection and a lock.

    A repair, a restore or a migration puts another file into its place. What is opened for reading goes over
    to that with the next transaction; `file_of` tells which of them a transaction is in.
    """

    def __init__(self, path: Path, *, dim: int, read_only: bool = False) -> None:
        self.path, self.dim, self.read_only = path, dim, read_only
        self._pool: list[Connection] = []
        self._pool_lock = threading.Lock()
        self._write_lock = threading.RLock()
        self._closed = False
        with explained(path):
            self._writer = None if read_only else self._connect(read_only=False)
        with self.reading() as db:
            check_version(db, path)

    @classmethod
    def create(cls, path: Path, *, dim: int) -> "Catalog":
        """A new, empty catalogue. Raises StorageError."""
        with explained(path):
            connection = sqlite3.connect(path, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript("BEGIN;" + SCHEMA + f"PRAGMA application_id = {APPLICATION_ID};")
                write_state(connection, 0, 0)
                connection.execute(f"PRAGMA user_version = {VERSION}")
                connection.execute("COMMIT")
            finally:
                connection.close()
        try:
            flush_to_disk(path.parent)
        except OSError as error:
            raise StorageError(f"{path} could not be written: {error.strerror or error}") from error
        return cls(path, dim=dim)

    # Connections

    def _which(self, frozen: bool) -> FileId | None:
        """Tells what is there now from what was or will be there; None for a writer, or without a file.

        A frozen connection does not notice what others write: for it, a file that has changed, or that has
        a log, is another one.
        """
        if self.read_only:
            with suppress(OSError):
                there = os.stat(self.path)
                if not frozen:
                    return there.st_dev, there.st_ino
                log = 0
                with suppress(FileNotFoundError):
                    log = 1 + os.stat(f"{self.path}-wal").st_size
                return there.st_dev, there.st_ino, there.st_mtime_ns, there.st_size, log
        return None

    def is_current(self, db: Any) -> bool:
        """Whether the file that a transaction reads is still the one at the path."""
        return not self.read_only or self._which(db.frozen) == db.file

    def _connect(self, *, read_only: bool) -> Connection:
        mode = "ro" if read_only else "rw"
        try:
            return self._open(mode)
        except sqlite3.OperationalError:
            log = self.path.with_name(self.path.name + "-wal")
            if not read_only or os.access(self.path.parent, os.W_OK) or (log.exists() and log.stat().st_size):
                raise
            # WAL needs a shared-memory file beside the catalogue, and there is none as long as nobody writes.
            # So SQLite may read without one, until `_which` says that somebody does.
            return self._open("ro", frozen=True)

    def _open(self, mode: str, *, frozen: bool = False) -> Connection:
        connection = sqlite3.connect(
            f"{self.path.resolve().as_uri()}?mode={mode}{'&immutable=1' if frozen else ''}",
            uri=True,
            factory=Connection,
            isolation_level=None,  # transactions are opened by hand
            check_same_thread=False,
            timeout=30,
        )
        connection.frozen = frozen
        try:
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA user_version").fetchone()
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection in a read transaction: everything read through it is of one moment and one file."""
        with explained(self.path):
            connection = self._begun()
            try:
                yield connection
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                with self._pool_lock:
                    keep = not self._closed
                    if keep:
                        self._pool.append(connection)
                if not keep:
                    connection.close()

    def _begun(self) -> Connection:
        """A connection in a transaction. Raises CollectionError, StorageError.

        A reader's is of the file that is at the path after SQLite has settled on what it reads: earlier, it
        might be the catalogue of one file with the log of the next.
        """
        for _ in range(TRIES):
            with self._pool_lock:
                if self._closed:
                    raise CollectionError(f"The collection in {self.path.parent} has been closed.")
                connection = self._pool.pop() if self._pool else None
            is_new = connection is None
            if connection is None:
                files = {frozen: self._which(frozen) for frozen in (False, True)}
                connection = self._connect(read_only=True)
                connection.file = files[connection.frozen]
            try:
                if self.read_only and is_new:
                    check_version(connection, self.path)  # whatever took the place may be newer
                connection.execute("BEGIN")
                if not self.read_only:
                    return connection
                connection.execute("PRAGMA user_version").fetchone()  # from here on what it reads is settled
                there = self._which(connection.frozen)
                if there is None or there == connection.file:  # None: a restore puts it into place just now
                    return connection
            except BaseException:
                connection.close()
                raise
            with self._pool_lock:
                replaced = [old for old in self._pool if old.file == connection.file]
                self._pool = [other for other in self._pool if other.file != connection.file]
            for old in [*replaced, connection]:
                old.close()
        raise StorageError(f"{self.path} is being replaced again and again. Try again.")

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """The write connection in a transaction: committed on leaving, rolled back on any error."""
        with self._write_lock, explained(self.path):
            connection = self._writer
            if connection is None:
                raise CollectionError(f"The catalogue {self.path} is not open for writing.")
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._pool_lock:
            self._closed = True
            idle, self._pool = self._pool, []
        with self._write_lock:
            # The writer goes last, so that closing folds the log into the catalogue.
            for connection in [*idle, self._writer]:
                if connection is not None:
                    connection.close()
            self._writer = None

    # Writing

    def put(self, changes: Sequence[Change]) -> Written:
        """Add or replace, all or nothing; durable on return. Raises StorageError."""
        rows, removed, created, dropped = [], [], [], set()
        with self._writing() as db:
            sequence = read_state(db)[0]
            for change in changes:
                sequence += 1
                old = take_out(db, change.id, sequence)
                created.append(old is None)
                if old is not None:
                    removed.append(old[0])
                    dropped.add(old[1])
                rows.append(insert(db, change, sequence))
            write_state(db, sequence)
            orphans = without_items(db, dropped)
        alive = ~np.isin(rows, removed)
        vectors = np.array([c.vector for c in changes], np.float32).reshape(len(changes), self.dim)
        gone = np.setdiff1d(np.array(removed, np.int64), np.array(rows, np.int64))
        return Written(sequence, np.array(rows, np.int64)[alive], vectors[alive], gone, created, orphans)

    def remove(self, ids: Sequence[str]) -> Written:
        """Forget these ids, all or nothing; those that are not there are passed over. Raises StorageError."""
        removed, dropped = [], set()
        with self._writing() as db:
            sequence = read_state(db)[0]
            for id in dict.fromkeys(ids):
                old = take_out(db, id, sequence + 1)
                if old is not None:
                    sequence += 1
                    removed.append(old[0])
                    dropped.add(old[1])
            write_state(db, sequence)
            orphans = without_items(db, dropped)
        none = np.empty(0, np.int64)
        return Written(
            sequence, none, np.empty((0, self.dim), np.float32), np.array(removed, np.int64), [], orphans
        )

    def merge_payload(
        self, id: str, changes: Mapping[str, Any], *, max_bytes: int | None = None
    ) -> tuple[int, Item | None]:
        """Merge into an item's payload (None removes a key): the new sequence, and the item or None.

        Raises:
            PayloadTooLarge: merged, it has more than `max_bytes` as JSON, and more than before.
        """
        with self._writing() as db:
            sequence = read_state(db)[0]
            row = db.execute(f"SELECT {ITEM_COLUMNS} FROM items WHERE id = ?", (id,)).fetchone()
            if row is None:
                return sequence, None
            payload = {**json.loads(row[3]), **changes}
            payload = json.dumps({k: v for k, v in payload.items() if v is not None}, ensure_ascii=False)
            size = len(payload.encode())
            if max_bytes is not None and size > max_bytes and size > len(row[3].encode()):
                raise PayloadTooLarge(size, max_bytes)
            sequence += 1
            row = (row[0], row[1], sequence, payload, *row[4:])
            db.execute(
                "UPDATE items SET sequence = ?, payload = ?, crc = ? WHERE row = ?",
                (sequence, payload, item_crc(row), row[0]),
            )
            write_state(db, sequence)
        return sequence, item_of(row)

    def index_payload(self, key: str) -> bool:
        """Index the payloads at a path, for filters; False: they are already. See `payload_indexes`."""
        with self._writing() as db:
            return payload_indexes.declare(db, key)

    def drop_payload_index(self, key: str) -> bool:
        """Forget such an index; False: there is none."""
        with self._writing() as db:
            return payload_indexes.drop(db, key)

    def forget_removed(self, sequence: int) -> None:
        """Drop the log of removals up to this change: no index that is older will be brought up to date."""
        with self._writing() as db:
            db.execute("DELETE FROM removed WHERE sequence <= ?", (sequence,))
            last, horizon = read_state(db)
            write_state(db, last, max(horizon, sequence))

    def remember(self, name: str, value: Any) -> None:
        """Keep a fact (JSON) from which something outside can be restored. Raises StorageError."""
        with self._writing() as db:
            write_fact(db, name, value)

    # Reading


# One statement each, inside somebody's transaction


def read_state(db: sqlite3.Connection) -> tuple[int, int]:
    """The last change, and the change after which `removed` is complete."""
    return db.execute("SELECT sequence, horizon FROM state").fetchone()


def write_state(db: sqlite3.Connection, sequence: int, horizon: int | None = None) -> None:
    """Set the last change, and the horizon when it is given."""
    kept = read_state(db)[1] if horizon is None else horizon
    db.execute("REPLACE INTO state VALUES (1, ?, ?, ?)", (sequence, kept, crc_of([sequence, kept])))


def read_fact(db: sqlite3.Connection, name: str) -> Any:
    """What `remember` kept; None when there is nothing, or it does not fit its checksum."""
    found = db.execute("SELECT value, crc FROM facts WHERE name = ?", (name,)).fetchone()
    return json.loads(found[0]) if found is not None and crc_of([name, found[0]]) == found[1] else None


def write_fact(db: sqlite3.Connection, name: str, value: Any) -> None:
    encoded = json.dumps(value, ensure_ascii=False)
    db.execute("REPLACE INTO facts VALUES (?, ?, ?)", (name, encoded, crc_of([name, encoded])))


def count_items(db: sqlite3.Connection) -> int:
    return db.execute("SELECT count(*) FROM items").fetchone()[0]


def last_row(db: sqlite3.Connection) -> int:
    """The highest row ever used."""
    found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'items'").fetchone()
    return found[0] if found else 0


def rows_after(
    db: sqlite3.Connection, row: int, *, dim: int, block: int = 4096
) -> Iterator[tuple[Ids, Vectors]]:
    """(rows, vectors) of the items above `row`, in the order of their rows, a block at a time."""
    cursor = db.execute("SELECT row, vector FROM vectors WHERE row > ? ORDER BY row", (row,))
    while found := cursor.fetchmany(block):
        rows = np.array([r for r, _ in found], np.int64)
        vectors = np.frombuffer(b"".join(v for _, v in found), "<f4")
        if vectors.size != len(rows) * dim:
            raise DamagedFile(
                f"the catalogue holds vectors that are not of {dim} numbers, near row {rows[0]}; "
                f"run `dml index verify`"
            )
        yield rows, vectors.reshape(len(rows), dim).astype(np.float32, copy=False)


def removed_after(db: sqlite3.Connection, sequence: int) -> Ids:
    """Rows that were removed by changes after `sequence`."""
    found = db.execute("SELECT row FROM removed WHERE sequence > ?", (sequence,)).fetchall()
    return np.array([row for (row,) in found], np.int64)


def items_by_row(db: sqlite3.Connection, rows: Iterable[int]) -> dict[int, Item]:
    return {row[0]: item_of(row) for row in raw_items_by_row(db, list(rows))}


def raw_items_by_row(db: sqlite3.Connection, rows: Collection[int]) -> list[Row]:
    """`ITEM_COLUMNS` of those of these rows that are there."""
    if len(rows) <= FEW_ROWS:
        marks = ",".join("?" * len(rows))
        return db.execute(f"SELECT {ITEM_COLUMNS} FROM items WHERE row IN ({marks})", [*rows]).fetchall()
    query = f"SELECT {ITEM_COLUMNS} FROM items WHERE row IN (SELECT value FROM json_each(?))"
    return db.execute(query, (json.dumps([int(r) for r in rows]),)).fetchall()


def rows_written_after(db: sqlite3.Connection, sequence: int, *, most: int) -> list[int]:
    """Rows of items that changes after `sequence` have written, new ones as well; so many at most."""
    query = "SELECT row FROM items WHERE sequence > ? LIMIT ?"
    return [row for (row,) in db.execute(query, (sequence, most))]


def items_by_id(db: sqlite3.Connection, ids: Iterable[str]) -> dict[str, tuple[int, Item]]:
    """id -> (row, item) for those that are there."""
    query = f"SELECT {ITEM_COLUMNS} FROM items WHERE id IN (SELECT value FROM json_each(?))"
    return {row[1]: (row[0], item_of(row)) for row in db.execute(query, (json.dumps(list(ids)),))}


def items_from(db: sqlite3.Connection, after: str | None, limit: int) -> list[tuple[int, Item]]:
    """(row, item) in the order of ids, from the one behind `after`."""
    where, values = ("", ()) if after is None else ("WHERE id > ?", (after,))
    query = f"SELECT {ITEM_COLUMNS} FROM items {where} ORDER BY id LIMIT ?"
    return [(row[0], item_of(row)) for row in db.execute(query, (*values, limit))]


def vectors_of(db: sqlite3.Connection, rows: Iterable[int]) -> dict[int, NDArray[np.float32]]:
    query = "SELECT row, vector FROM vectors WHERE row IN (SELECT value FROM json_each(?))"
    found = db.execute(query, (json.dumps([int(r) for r in rows]),))
    return {row: np.frombuffer(blob, "<f4").astype(np.float32) for row, blob in found}


def all_pictures(db: sqlite3.Connection) -> Iterator[tuple[str, Picture]]:
    """(id, picture) of every item that has one."""
    query = f"SELECT {ITEM_COLUMNS} FROM items WHERE picture_kind IS NOT NULL ORDER BY id"
    for row in db.execute(query):
        item = item_of(row)
        if item.picture is not None:
            yield item.id, item.picture


def known_pictures(db: sqlite3.Connection) -> Iterator[KnownPicture]:
    """Every item with a picture, in the order of rows."""
    box = "CASE json_type(payload, '$.box') WHEN 'array' THEN json_extract(payload, '$.box') END"
    query = f"SELECT id, picture_sha256, {box} FROM items WHERE picture_kind IS NOT NULL ORDER BY row"
    yield from map(KnownPicture._make, db.execute(query))


def stored_pictures(db: sqlite3.Connection) -> set[str]:
    """sha256 of the stored pictures that items refer to."""
    query = "SELECT DISTINCT picture_sha256 FROM items WHERE picture_kind = 'stored'"
    return {sha for (sha,) in db.execute(query)}


def insert(db: sqlite3.Connection, change: Change, sequence: int) -> int:
    """Write an item under a new row, and return the row."""
    picture = change.picture
    columns = (None,) * 4 if picture is None else (picture.kind, picture.sha256, picture.path, picture.root)
    values = (change.id, sequence, change.payload, *columns)
    cursor = db.execute(
        "INSERT INTO items (id, sequence, payload, picture_kind, picture_sha256, picture_path, picture_root, "
        "crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (*values, item_crc((None, *values))),
    )
    blob = np.ascontiguousarray(change.vector, "<f4").tobytes()
    db.execute("INSERT INTO vectors VALUES (?, ?, ?)", (cursor.lastrowid, blob, zlib.crc32(blob)))
    return int(cursor.lastrowid or 0)


def take_out(db: sqlite3.Connection, id: str, sequence: int) -> tuple[int, str | None] | None:
    """Delete an item and note its row as removed: (row, sha256 of its stored picture), or None."""
    found = db.execute("SELECT row, picture_kind, picture_sha256 FROM items WHERE id = ?", (id,)).fetchone()
    if found is None:
        return None
    row, kind, sha256 = found
    db.execute("DELETE FROM items WHERE row = ?", (row,))
    db.execute("DELETE FROM vectors WHERE row = ?", (row,))
    db.execute("INSERT INTO removed VALUES (?, ?)", (row, sequence))
    return row, sha256 if kind == "stored" else None


def without_items(db: sqlite3.Connection, pictures: Iterable[str | None]) -> list[str]:
    """Those of the stored pictures that no item refers to."""
    query = "SELECT 1 FROM items WHERE picture_kind = 'stored' AND picture_sha256 = ? LIMIT 1"
    return [sha for sha in pictures if sha is not None and db.execute(query, (sha,)).fetchone() is None]


def item_of(row: Row) -> Item:
    _, id, sequence, payload, kind, sha256, path, root = row
    picture = None if kind is None else Picture(kind, sha256, path, root)
    try:
        return Item(id, json.loads(payload), sequence, picture)
    except ValueError as error:
        raise DamagedFile(
            f'the payload of item "{id}" cannot be read: {error}; run `dml index repair`'
        ) from None


def item_crc(row: Row) -> int:
    """crc32 of what an item says (all columns but its row)."""
    return crc_of(row[1:])


def crc_of(values: Sequence[Any]) -> int:
    return zlib.crc32(json.dumps(values, ensure_ascii=False).encode())


# Format and errors


DAMAGE = re.compile("decode to UTF-8|no such (table|column)|malformed|unsupported file format")
"""What SQLite says of a changed byte in a text or in the schema, without an error number of its own."""


def check_version(connection: sqlite3.Connection, path: Path) -> None:
    """Refuse a file that is no catalogue, or is newer than this program."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    if application != APPLICATION_ID or version < 1:
        raise DamagedFile(f"{path} is not a catalogue of a collection")
    if version > VERSION:
        raise DamagedFile(
            f"{path} has format {version}, and this version of dml reads up to {VERSION}; "
            f"update dml to open it"
        )


def add_checksum_and_facts(db: sqlite3.Connection) -> None:
    """Format 1 to 2."""
    sequence, horizon = read_state(db)
    db.execute("DROP TABLE state")
    there = {name for (name,) in db.execute("SELECT name FROM sqlite_schema")}
    for statement in filter(str.strip, SCHEMA.split(";")):
        if statement.split()[2] not in there:  # CREATE TABLE name, CREATE INDEX name
            db.execute(statement)
    write_state(db, sequence, horizon)


MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {1: add_checksum_and_facts}
"""From version -> what makes the next version of it. Runs on a copy."""


def migrate(path: Path) -> bool:
    """Bring an older catalogue to this format, on a copy that then takes its place. False: nothing to do.

    Raises:
        DamagedFile: newer, or older than anything known.
        StorageError: no room for the copy.
    """
    with explained(path):
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, isolation_level=None)
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version >= VERSION or version < 1:
                check_version(connection, path)
                return False
            if version not in MIGRATIONS:
                raise DamagedFile(f"{path} has format {version}, which this version of dml cannot migrate")
            aside = path.with_name(f".{path.name}.migrating")
            aside.unlink(missing_ok=True)
            copy = sqlite3.connect(aside, isolation_level=None)
            try:
                connection.backup(copy)
                for step in range(version, VERSION):
                    copy.execute("BEGIN")
                    MIGRATIONS[step](copy)
                    copy.execute(f"PRAGMA user_version = {step + 1}")
                    copy.execute("COMMIT")
                copy.execute("PRAGMA journal_mode = WAL")
                copy.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                copy.close()
        finally:
            connection.close()  # the last connection, unless somebody reads, folds the log in and deletes it
    try:
        flush_to_disk(aside)
        drop_log(path)
        kept = path.with_name(f"{path.name}.format{version}")
        kept.unlink(missing_ok=True)
        os.link(path, kept)  # the old one stays beside the new one
        os.replace(aside, path)
        flush_to_disk(path.parent)
    except OSError as error:
        raise StorageError(f"{path} could not be migrated: {error.strerror or error}") from error
    return True


def drop_log(path: Path) -> None:
    """Have a catalogue that nobody writes to without a log beside it, and with all that the log said.

    Readers keep a log from being folded in, and SQLite takes a log that lies beside a file for that file's
    own. So a copy with the log folded in takes the catalogue's place first: page by page it is what catalogue
    and log say together, and the log, while it is still there, adds nothing to it. A kill at any moment loses
    nothing. Readers go on in the files that they have open.

    Raises: OSError, and StorageError or DamagedFile as `explained`.
    """
    log, memory = (path.with_name(path.name + suffix) for suffix in ("-wal", "-shm"))
    if log.exists() and log.stat().st_size:
        whole = path.with_name(f".{path.name}.whole")
        whole.unlink(missing_ok=True)
        with (
            explained(path),
            closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as source,
            closing(sqlite3.connect(whole)) as copy,
        ):
            source.backup(copy)
        flush_to_disk(whole)
        os.replace(whole, path)
        flush_to_disk(path.parent)
    log.unlink(missing_ok=True)
    memory.unlink(missing_ok=True)
    flush_to_disk(path.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors as ours: a full or refusing disk, a damaged file."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or DAMAGE.search(str(error)):
            raise DamagedFile(
                f"{path} is damaged: {error}. `dml index repair` saves what can be read; or restore a backup."
            ) from error
        if code in (
            sqlite3.SQLITE_FULL,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_READONLY,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_PERM,
            sqlite3.SQLITE_BUSY,
        ):
            raise StorageError(
                f"{path} could not be read or written: {error}. Nothing that was acknowledged is lost; "
                f"make room (or fix the permissions) and try again."
            ) from error
        raise
