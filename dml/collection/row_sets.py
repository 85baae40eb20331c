"""Which rows a filter lets pass, found once per filter and kept up to date with the collection's changes."""

import sqlite3
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from dml.collection import catalog as sql
from dml.collection.base import Item
from dml.collection.filters import EVERYTHING, Filter, canonical
from dml.collection.filters_sql import register, to_sql
from dml.collection.payload_indexes import narrowed
from dml.index.base import Ids

FEW_CHANGES = 1000
LARGEST_SHARE = 0.2
"""When more have changed than this number and this share of all, all are read again."""


class RowSet(NamedTuple):
    """The rows that pass, as of a change."""

    rows: Ids  # ascending
    sequence: int


class RowSets:
    """The rows of the filters that were used last.

    Reading the payloads of 100,000 items takes SQLite about a tenth of a second, much longer than a search:
    a filter that comes again costs nothing while nothing changes, and the changed items only when something
    has. Safe to use from several threads.

    Args:
        most_bytes: of all row sets together; those not used for longest go first.
    """

    def __init__(self, most_bytes: int = 64 << 20) -> None:
        self.most_bytes = most_bytes
        self._sets: OrderedDict[str, RowSet] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def rows(self, db: sqlite3.Connection, filter: Filter) -> Ids:
        """Ascending rows of the items that pass, as of the moment of this transaction."""
        sequence, horizon = sql.read_state(db)
        name = canonical(filter)
        with self._lock:
            known = self._sets.get(name)
            if known is not None:
                self._sets.move_to_end(name)
        if known is not None and known.sequence == sequence:
            return known.rows
        if known is not None and horizon <= known.sequence < sequence:
            rows = brought_up_to_date(db, filter, known)
        else:
            rows = matching_rows(db, filter)
        self._keep(name, RowSet(rows, sequence))
        return rows

    def copy(self) -> "RowSets":
        """What is known by now, for a state of the collection that is kept while the collection goes on."""
        twin = RowSets(self.most_bytes)
        with self._lock:
            twin._sets, twin._bytes = self._sets.copy(), self._bytes
        return twin

    def _keep(self, name: str, found: RowSet) -> None:
        with self._lock:
            known = self._sets.get(name)
            if known is not None and known.sequence >= found.sequence:
                return  # this was a look into the past, or another thread was quicker
            if known is not None:
                self._bytes -= known.rows.nbytes
            self._sets[name] = found
            self._sets.move_to_end(name)
            self._bytes += found.rows.nbytes
            while self._bytes > self.most_bytes and self._sets:
                self._bytes -= self._sets.popitem(last=False)[1].rows.nbytes


def matching_rows(db: sqlite3.Connection, filter: Filter, *, after: int | None = None) -> Ids:
    """Ascending rows of the items that pass; of those only that changed after `after`, when it is given."""
    register(db)
    where, parameters = to_sql(filter)
    if after is not None:
        where, parameters = f"items.sequence > :after AND {where}", {**parameters, "after": after}
    elif filter and (candidates := narrowed(db, filter)) is not None:
        where, parameters = f"row IN ({candidates.sql}) AND {where}", parameters | candidates.parameters
    # One text instead of a tuple per row: several times quicker for many rows.
    (text,) = db.execute(f"SELECT group_concat(row) FROM items WHERE {where}", parameters).fetchone()
    return np.empty(0, np.int64) if text is None else np.sort(np.fromstring(text, np.int64, sep=","))


def brought_up_to_date(db: sqlite3.Connection, filter: Filter, known: RowSet) -> Ids:
    """The rows that pass now, reading the payloads of the items that have changed since only."""
    changed = matching_rows(db, EVERYTHING, after=known.sequence)
    if len(changed) > FEW_CHANGES and len(changed) > LARGEST_SHARE * sql.count_items(db):
        return matching_rows(db, filter)
    gone = sql.removed_after(db, known.sequence)
    kept = known.rows[~np.isin(known.rows, np.concatenate([changed, gone]))]
    found = matching_rows(db, filter, after=known.sequence) if len(changed) else changed
    return np.sort(np.concatenate([kept, found]), kind="stable")  # of two ascending runs: a merge


def matching_ids(db: sqlite3.Connection, filter: Filter) -> list[str]:
    """Ids of the items that pass."""
    register(db)
    where, parameters = to_sql(filter)
    return [id for (id,) in db.execute(f"SELECT id FROM items WHERE {where}", parameters)]


def items_in_order(
    db: sqlite3.Connection, filter: Filter, *, after: str | None, limit: int
) -> list[tuple[int, Item]]:
    """(row, item) of the first items that pass, in the order of their ids, from the one behind `after`."""
    register(db)
    where, parameters = to_sql(filter)
    if after is not None:
        where, parameters = f"items.id > :after AND {where}", {**parameters, "after": after}
    query = f"SELECT {sql.ITEM_COLUMNS} FROM items WHERE {where} ORDER BY id LIMIT :limit"
    return [(row[0], sql.item_of(row)) for row in db.execute(query, {**parameters, "limit": limit})]


def with_vectors(db: sqlite3.Connection, found: list[tuple[int, Item]], wanted: bool) -> list[Item]:
    """The items of these (row, item), with their vectors if they are wanted."""
    if not wanted:
        return [item for _, item in found]
    vectors = sql.vectors_of(db, [row for row, _ in found])
    return [item._replace(vector=vectors[row]) for row, item in found]
