"""Indexes on fields of the payload, for collections where reading every payload takes too long.

SQLite keeps them itself, on what `json_extract` finds at a path. They only narrow down which rows are looked
at: the whole filter is checked on what they leave, so they change how long a filter takes and nothing else.
"""

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dml.collection.filters import Filter, Match, Range, steps_of
from dml.collection.filters_sql import parts_of
from dml.errors import FilterInvalid, UsageError

VALUES, LISTS = "payload values of ", "payload lists of "
"""Beginnings of the names of SQLite's indexes; the key follows. One finds a value, one the items that have a
list there, whose entries the first does not know."""

FEW = 100
USEFUL_SHARE = 0.05
"""An index that leaves more items than this, and this share of all, is no quicker than reading them all."""


def declare(db: sqlite3.Connection, key: str) -> bool:
    """Index the values at a path; False: they are already. Inside a writing transaction.

    Raises:
        UsageError: no path, or one with "[]", of which one item may have many.
    """
    place = literal(key)
    if key in declared(db):
        return False
    db.execute(f"CREATE INDEX {name(VALUES, key)} ON items (json_extract(payload, {place}))")
    db.execute(
        f"CREATE INDEX {name(LISTS, key)} ON items (json_type(payload, {place})) "
        f"WHERE json_type(payload, {place}) = 'array'"
    )
    return True


def drop(db: sqlite3.Connection, key: str) -> bool:
    """Forget the index of a path; False: there is none. Inside a writing transaction."""
    if key not in declared(db):
        return False
    for kind in (VALUES, LISTS):
        db.execute(f"DROP INDEX IF EXISTS {name(kind, key)}")
    return True


def declared(db: sqlite3.Connection) -> list[str]:
    """The paths that are indexed."""
    query = "SELECT name FROM sqlite_master WHERE type = 'index' AND name LIKE ? ORDER BY name"
    return [found.removeprefix(VALUES) for (found,) in db.execute(query, (f"{VALUES}%",))]


def name(kind: str, key: str) -> str:
    """An index's name, quoted."""
    return '"' + (kind + key).replace('"', '""') + '"'


def literal(key: str) -> str:
    """The path as SQLite's text. An index holds for the very expression that it was made of, so this is no
    parameter; it comes from who keeps the collection, never from a filter. Raises UsageError."""
    try:
        parts = parts_of(key)
    except FilterInvalid as error:
        raise UsageError(f"payload index: {error.detail}") from None
    if len(parts) > 1:
        raise UsageError(
            f'payload index: "{key:.60}" leads to many values of one item, and cannot be indexed'
        )
    return "'" + parts[0].replace("'", "''") + "'"


@dataclass(frozen=True)
class Candidates:
    """SQL for rows among which are all that pass a filter, and its parameters."""

    sql: str
    parameters: dict[str, Any]


def narrowed(db: sqlite3.Connection, filter: Filter) -> Candidates | None:
    """The fewest candidates that an index gives; None: reading all items is as good."""
    keys = {steps_of(key): key for key in declared(db)}
    if not keys:
        return None
    (count,) = db.execute("SELECT count(*) FROM items").fetchone()
    best, fewest = None, max(FEW, int(USEFUL_SHARE * count))
    for condition in needed(filter):
        key = keys.get(steps_of(condition.key))
        candidates = None if key is None else candidates_of(condition, literal(key))
        if candidates is not None:
            probe = f"SELECT count(*) FROM ({candidates.sql} LIMIT {fewest})"
            (found,) = db.execute(probe, candidates.parameters).fetchone()
            if found < fewest:
                best, fewest = candidates, found
    return best


def needed(filter: Filter) -> Iterator[Match | Range]:
    """Conditions that every item that passes has to meet, and that an index may know."""
    for condition in filter.must:
        if isinstance(condition, Match | Range):
            yield condition
        elif isinstance(condition, Filter):
            yield from needed(condition)


def candidates_of(condition: Match | Range, place: str) -> Candidates | None:
    """Rows that may meet a condition on an indexed path; None for what its index does not know: times."""
    parameters: dict[str, Any] = {}
    if isinstance(condition, Match):
        parameters["c0"] = json.dumps(condition.values, ensure_ascii=False)
        tests = [f"json_extract(payload, {place}) IN (SELECT value FROM json_each(:c0))"]
    else:
        tests = []
        for number, (operator, bound) in enumerate(condition.bounds()):
            if isinstance(bound, str):
                return None
            parameters[f"c{number}"] = json.dumps(bound)
            tests.append(f"json_extract(payload, {place}) {operator} json_extract(:c{number}, '$')")
    return Candidates(
        f"SELECT row FROM items WHERE {' AND '.join(tests)} "
        f"UNION ALL SELECT row FROM items WHERE json_type(payload, {place}) = 'array'",
        parameters,
    )
