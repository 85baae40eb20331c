"""Saving what can be read of a damaged catalogue into a new one: every row that fits its checksum."""

import logging
import os
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dml.collection.audit import readable, vector_fits
from dml.collection.catalog import (
    APPLICATION_ID,
    ITEM_COLUMNS,
    SCHEMA,
    VERSION,
    Row,
    crc_of,
    explained,
    item_crc,
    write_state,
)
from dml.errors import DamagedFile
from dml.storage import flush_to_disk, storage_errors

log = logging.getLogger(__name__)

BROKEN = (sqlite3.DatabaseError, UnicodeError)
PATIENCE = 2_000_000
"""Reads that may find nothing before the rest of a table is given up: some 20 s."""
HEADER = (
    (0, b"SQLite format 3\0" + bytes([16, 0, 2, 2, 0, 64, 32, 32])),  # pages of 4096 bytes, write-ahead log
    (28, bytes(4)),  # how many pages there are: as many as the file has
    (44, struct.pack(">7I", 4, 0, 0, 1, VERSION, 0, APPLICATION_ID)),  # UTF-8, no vacuum
)
"""What stands in the first bytes of every catalogue, and where."""


@dataclass
class Salvaged:
    """What was saved, and what was not."""

    path: Path
    count: int = 0
    lost: list[str] = field(default_factory=list)
    """A sentence about each item that is not in the new catalogue, as far as they are known."""


def salvage(damaged: Path, new: Path, *, dim: int, last_row: int = 0, sequence: int = 0) -> Salvaged:
    """Write a catalogue with every item of a damaged one whose entry and vector fit their checksums.

    The damaged one is only read. Rows keep their numbers. What was removed is forgotten, so that no saved
    index can be brought up to date: it has to be built anew.

    Args:
        dim: length of the vectors.
        last_row, sequence: of the newest index that was saved; the new catalogue goes on behind them.

    Raises:
        DamagedFile: nothing of it can be read.
        StorageError: no room for the new one.
    """
    found = Salvaged(new)
    new.unlink(missing_ok=True)
    with (
        opened(damaged) as source,
        explained(new),
        closing(sqlite3.connect(new, isolation_level=None)) as out,
    ):
        begin(out)
        numbers = Numbers(source)
        highest = max(last_row, numbers.last_row)
        entries = Table(source, f"SELECT {ITEM_COLUMNS}, crc FROM items", highest)
        last = copy_rows(source, out, entries, found, dim=dim)
        finish(out, max(last, sequence, numbers.sequence) + 1, highest, numbers.facts)
    flush_to_disk(new)
    return found


def copy_rows(
    source: sqlite3.Connection, out: sqlite3.Connection, entries: "Table", found: Salvaged, *, dim: int
) -> int:
    """Write what is whole, and note what is not; the change of the last item that is."""
    met: set[str] = set()
    rows: set[int] = set()
    last = 0
    for *row, crc in entries:
        vector = vector_of(source, row[0], dim)
        if item_crc(tuple(row)) != crc:
            found.lost.append(f'item "{row[1]}": its entry does not fit its checksum')
        elif vector is None:
            found.lost.append(f'item "{row[1]}": its vector is lost')
        elif row[1] not in met:
            put(out, tuple(row), crc, vector)
            found.count += 1
            last = max(last, row[2])
        met.add(row[1])
        rows.add(row[0])
    unread = [id for id in names(source) if id not in met]
    found.lost += [f'item "{id}": its entry cannot be read' for id in unread]
    vectors = Table(source, "SELECT row FROM vectors", entries.last_row)
    orphans = sum(row not in rows for (row,) in vectors)
    unknown = max(orphans, min(entries.unread, vectors.unread)) - len(unread)
    if unknown > 0:
        found.lost.append(f"about {unknown:,} items whose ids cannot be read")
    return last


def vector_of(db: sqlite3.Connection, row: int, dim: int) -> tuple[bytes, int] | None:
    """(bytes, checksum) of a vector that is as it was written."""
    with suppress(*BROKEN):
        found = db.execute("SELECT vector, crc FROM vectors WHERE row = ?", (row,)).fetchone()
        return found if found is not None and vector_fits(found[0], found[1], dim) else None
    return None


@contextmanager
def opened(path: Path) -> Iterator[sqlite3.Connection]:
    """A damaged catalogue for reading; with the beginning that it should have when it has lost its own."""
    with explained(path), closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        try:
            db.execute("SELECT row FROM items LIMIT 1").fetchone()
        except sqlite3.DatabaseError as error:
            log.warning("%s cannot be opened (%s); its first bytes are set anew in a copy", path, error)
        else:
            with readable(db):
                yield db
            return
    with with_beginning(path) as db, readable(db):
        yield db


@contextmanager
def with_beginning(path: Path) -> Iterator[sqlite3.Connection]:
    """A copy of a catalogue with the first bytes that it should have. Raises DamagedFile, StorageError."""
    copy = path.with_name(f".{path.name}.copy")
    try:
        with storage_errors(copy):
            shutil.copyfile(path, copy)
            with open(copy, "r+b") as file:
                for place, content in HEADER:
                    file.seek(place)
                    file.write(content)
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{path}-wal", f"{copy}-wal")
        with closing(sqlite3.connect(copy)) as db:
            try:
                db.execute("SELECT row FROM items LIMIT 1").fetchone()
            except sqlite3.DatabaseError as error:
                raise DamagedFile(f"Nothing of {path} can be read ({error}). Restore a backup.") from error
            yield db
    finally:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)


class Numbers:
    """What a damaged catalogue says about the whole, where it can be read and believed."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.sequence, self.facts = 0, dict[str, str]()
        with suppress(*BROKEN):
            for sequence, horizon, crc in db.execute("SELECT sequence, horizon, crc FROM state"):
                if crc_of([sequence, horizon]) == crc:
                    self.sequence = sequence
        with suppress(*BROKEN):
            for name, value, crc in db.execute("SELECT name, value, crc FROM facts"):
                if crc_of([name, value]) == crc:
                    self.facts[name] = value
        self.last_row = 0
        for query in ("SELECT seq FROM sqlite_sequence", "SELECT max(row) FROM items", HIGHEST_VECTOR):
            with suppress(*BROKEN):
                found = db.execute(query).fetchone()
                self.last_row = max(self.last_row, min(int(found[0] or 0), LARGEST_ROW) if found else 0)


HIGHEST_VECTOR = "SELECT max(row) FROM vectors"
LARGEST_ROW = 1 << 48
"""A number beyond it is damage."""


class Table:
    """The rows of a table that can be read, whatever lies between them.

    A range of rows that cannot be read is halved until the broken ones are left out. So is one in which
    nothing is found: a reader that meets a wrong number on its way stops there and says nothing, while the
    rows behind it can be reached from the root.
    """

    def __init__(self, db: sqlite3.Connection, select: str, last_row: int) -> None:
        self.db, self.query = db, f"{select} WHERE row BETWEEN ? AND ? ORDER BY row"
        self.last_row, self.failures = last_row, 0
        self.unread = 0  # numbers, of rows that are there or not

    def __iter__(self) -> Iterator[Row]:
        pending = [(1, self.last_row)]
        while pending:
            first, last = pending.pop()
            reached, broken = first, False
            try:
                for row in self.db.execute(self.query, (first, last)):
                    yield row
                    reached = max(reached, row[0] + 1)  # a broken table may be out of order
            except BROKEN:
                broken = True
            if reached > last:
                continue
            self.failures += reached == first
            if reached > first and not broken:
                pending.append((reached, last))
            elif reached < last and self.failures <= PATIENCE:
                middle = (reached + last) // 2
                pending += [(middle + 1, last), (reached, middle)]
            else:
                self.unread += (last - reached + 1) if broken else 0


def names(db: sqlite3.Connection) -> list[str]:
    """Ids from the index over them, which may be whole where the entries are not; from both its ends."""
    found: dict[str, None] = {}
    for order in ("ASC", "DESC"):
        with suppress(*BROKEN):
            for (id,) in db.execute(f"SELECT id FROM items ORDER BY id {order}"):
                found[id] = None
    return [id for id in found if isinstance(id, str)]


# Writing the new one


def begin(out: sqlite3.Connection) -> None:
    out.execute("PRAGMA synchronous = OFF")  # flushed as a whole, when it is complete
    out.executescript(
        f"BEGIN; {SCHEMA} PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
    )


def put(out: sqlite3.Connection, row: Row, crc: int, vector: tuple[bytes, int]) -> None:
    out.execute("INSERT INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, crc))
    out.execute("INSERT INTO vectors VALUES (?, ?, ?)", (row[0], *vector))


def finish(out: sqlite3.Connection, sequence: int, last_row: int, facts: dict[str, Any]) -> None:
    """Say what is true of the whole, and commit."""
    write_state(out, sequence, sequence)
    out.execute("DELETE FROM sqlite_sequence")
    out.execute("INSERT INTO sqlite_sequence VALUES ('items', ?)", (last_row,))
    for name, value in facts.items():
        out.execute("REPLACE INTO facts VALUES (?, ?, ?)", (name, value, crc_of([name, value])))
    out.execute("COMMIT")
    out.execute("PRAGMA journal_mode = WAL")
    out.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def swap(path: Path, new: Path) -> Path:
    """Put the new catalogue into the place of the damaged one, which is kept beside it; where.

    The log of the damaged one goes away before the new one comes: SQLite would fold it in.
    """
    kept, number = path.with_name(f"{path.name}.damaged"), 1
    while kept.exists():
        number += 1
        kept = path.with_name(f"{path.name}.damaged-{number}")
    for suffix in ("-wal", ""):
        with suppress(FileNotFoundError):
            os.link(f"{path}{suffix}", f"{kept}{suffix}")
    flush_to_disk(path.parent)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    os.replace(new, path)
    flush_to_disk(path.parent)
    return kept
