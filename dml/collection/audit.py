"""Whether a catalogue is what was written: its pages, its rows, and the log of changes beside it.

What no check can see is what SQLite does not use: free space in its pages. A change there changes nothing.
"""

import sqlite3
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dml.collection import payload_indexes
from dml.collection.catalog import ITEM_COLUMNS, SCHEMA, Catalog, crc_of, item_crc
from dml.errors import DamagedFile, StorageError

LOG_HEADER = struct.Struct(">8I")
"""Of SQLite's write-ahead log: magic, version, page size, count of checkpoints, two salts, two checksums."""
LOG_MAGIC = (0x377F0682, 0x377F0683)  # the words that are summed are little-endian, or big-endian
FRAME_HEADER = 24  # bytes: page, size of the database after a commit, two salts, two checksums
TRIES = 4
"""A log that is being written may be met half-way."""


def check_catalog(catalog: Catalog) -> list[str]:
    """One sentence per problem: SQLite's own check, checksums of rows, rows without partner, the log."""
    problems = check_log(catalog.path)
    try:
        with catalog.reading() as db, readable(db):
            problems += [f"{catalog.path.name}: {problem}" for problem in check_rows(db, catalog.dim)]
    except (DamagedFile, StorageError) as error:
        problems.append(str(error))
    return problems


@contextmanager
def readable(db: sqlite3.Connection) -> Iterator[None]:
    """Text that is no UTF-8 any more is read all the same: its checksum tells."""
    db.text_factory = lambda data: data.decode("utf-8", "replace")
    try:
        yield
    finally:
        db.text_factory = str


def check_rows(db: sqlite3.Connection, dim: int) -> Iterator[str]:
    """Problems of what is in the tables."""
    yield from (text for (text,) in db.execute("PRAGMA integrity_check") if text != "ok")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    for row in db.execute(f"SELECT {ITEM_COLUMNS}, crc FROM items"):
        if item_crc(row[:-1]) != row[-1]:
            yield f'the entry of item "{row[1]}" does not fit its checksum'
    query = "SELECT items.id, vector, vectors.crc FROM items LEFT JOIN vectors USING (row)"
    for id, blob, crc in db.execute(query):
        if blob is None:
            yield f'item "{id}" has no vector'
        elif not vector_fits(blob, crc, dim):
            yield f'the vector of item "{id}" does not fit its checksum'
    for (row,) in db.execute("SELECT row FROM vectors WHERE row NOT IN (SELECT row FROM items)"):
        yield f"the vector of row {row} belongs to no item"
    for (row,) in db.execute("SELECT row FROM removed WHERE row IN (SELECT row FROM items)"):
        yield f"row {row} is both there and removed"
    if version > 1:
        yield from check_facts(db)


def vector_fits(blob: bytes, crc: int, dim: int) -> bool:
    return isinstance(blob, bytes) and zlib.crc32(blob) == crc and len(blob) == 4 * dim


def check_facts(db: sqlite3.Connection) -> Iterator[str]:
    """Problems of what is said about the whole: schema, last change, facts."""
    yield from check_schema(dict(db.execute("SELECT name, sql FROM sqlite_schema").fetchall()))
    states = db.execute("SELECT only, sequence, horizon, crc FROM state").fetchall()
    if len(states) != 1 or crc_of(states[0][1:3]) != states[0][3]:
        yield "the number of the last change does not fit its checksum"
    elif states[0][1] < (db.execute(LAST_SEQUENCE).fetchone()[0] or 0):
        yield "there are changes after the last one"
    highest = db.execute("SELECT max(row) FROM (SELECT row FROM items UNION ALL SELECT row FROM removed)")
    used = db.execute("SELECT name, seq FROM sqlite_sequence").fetchall()
    most = highest.fetchone()[0] or 0
    if [name for name, _ in used] not in ([], ["items"]) or (used[0][1] if used else 0) < most:
        yield "the number of the last row is not that of the rows there are"
    for name, value, crc in db.execute("SELECT name, value, crc FROM facts"):
        if crc_of([name, value]) != crc:
            yield f'what is remembered as "{name}" does not fit its checksum'


def check_schema(known: Mapping[str, str | None]) -> Iterator[str]:
    """Definitions that are not those of a catalogue. Args: name -> definition, of all that it has."""
    expected = expected_schema()
    strange = [name for name in known if name not in expected and not name.startswith(("sqlite_", *PAYLOAD))]
    for name, text in expected.items():
        if name == LATER and name not in known and not strange:
            continue
        if known.get(name) != text:
            yield f'the definition of "{name}" is not as it was made'


LATER = "items_sequence"
"""An index that the first catalogues of format 2 do not have: only this check is quicker with it."""

PAYLOAD = (payload_indexes.VALUES, payload_indexes.LISTS)
"""Beginnings of the names of indexes that users asked for."""

LAST_SEQUENCE = (
    "SELECT max(sequence) FROM (SELECT sequence FROM items UNION ALL SELECT sequence FROM removed)"
)


def expected_schema() -> dict[str, str]:
    """Name -> definition, of the tables and indexes that a new catalogue has."""
    db = sqlite3.connect(":memory:")
    try:
        db.executescript(SCHEMA)
        return dict(db.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"))
    finally:
        db.close()


# The write-ahead log


def check_log(catalog: Path) -> list[str]:
    """Whether SQLite will read all of the log beside a catalogue.

    SQLite stops at the first frame that does not fit its checksum, as after a power cut in the middle of a
    write, and says nothing. Frames behind such a one were acknowledged.
    """
    log = catalog.with_name(catalog.name + "-wal")
    problem = None
    for _ in range(TRIES):
        try:
            data = log.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            return [f"{log} cannot be read: {error.strerror or error}"]
        problem = problem_of_log(data)
        if problem is None:
            return []
        time.sleep(0.05)
    return [
        f"{log.name}: {problem}. Changes that were acknowledged may be lost, unless the power failed just "
        f"when they were written"
    ]


def problem_of_log(data: bytes) -> str | None:
    """What is wrong with the bytes of a log, or None."""
    if len(data) < LOG_HEADER.size:
        return None
    magic, _, page, _, *salts, first, second = LOG_HEADER.unpack_from(data)
    if magic not in LOG_MAGIC or page < 512 or page > 65_536:
        return "its header is not one"
    words = "<u4" if magic == LOG_MAGIC[0] else ">u4"
    header = np.frombuffer(data[:24], words).reshape(1, -1)
    if tuple(summed(header, np.zeros((1, 2), np.uint32))[0].tolist()) != (first, second):
        return "its header does not fit its checksum"
    count = (len(data) - LOG_HEADER.size) // (FRAME_HEADER + page)
    body = np.frombuffer(data, np.uint8, count * (FRAME_HEADER + page), LOG_HEADER.size)
    frames = body.reshape(count, FRAME_HEADER + page)
    heads = np.ascontiguousarray(frames[:, :FRAME_HEADER]).view(">u4").astype(np.uint32)
    same = heads[:, 2:4] == np.array(salts, np.uint32)
    ours = same.all(axis=1)
    mine = count if ours.all() else int(np.argmin(ours))
    if ours[mine:].any() or same[mine : mine + 1].any():
        return f"frame {mine + 1} of {count} does not belong to it"
    before = np.concatenate([np.array([[first, second]], np.uint32), heads[: max(mine - 1, 0), 4:6]])[:mine]
    content = np.concatenate([frames[:mine, :8], frames[:mine, FRAME_HEADER:]], axis=1)
    sums = summed(np.ascontiguousarray(content).view(words), before)
    wrong = np.flatnonzero((sums != heads[:mine, 4:6]).any(axis=1))
    return f"frame {wrong[0] + 1} of {mine} does not fit its checksum" if len(wrong) else None


def summed(words: NDArray[np.uint32], start: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """SQLite's checksum of rows of words (N, 2·M), each begun with a pair (N, 2): a pair per row."""
    one, two = start[:, 0].astype(np.uint32), start[:, 1].astype(np.uint32)
    for column in range(0, words.shape[1], 2):
        one = one + words[:, column] + two
        two = two + words[:, column + 1] + one
    return np.stack([one, two], axis=1).astype(np.uint32)
