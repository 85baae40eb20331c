"""Items that searches have shown before, so that showing them again asks SQLite for nothing.

A search in a graph takes some hundred microseconds, and a read transaction with ten look-ups as much again. A
row keeps its id and picture for ever, and only a change of its payload writes it again, with a new sequence:
so what is known is right for every state since it was written, until a later state says otherwise.
"""

import sqlite3
import threading
from collections.abc import Callable, Collection, Iterable
from json.decoder import JSONDecoder
from sys import getsizeof
from typing import Any, NamedTuple

from dml.collection import catalog as sql
from dml.collection.base import Item

OVERHEAD = 600
"""Bytes that an item takes besides its texts, about."""

PAYLOAD_TIMES = 8
"""A payload takes about so many times the bytes that it has as JSON."""

payload_of: Callable[[str, int], tuple[Any, int]] = JSONDecoder().raw_decode
"""(Text that is known to be JSON, 0) -> (value, where it ended). `json.loads` looks for blanks too, and takes
twice as long."""


class Known(NamedTuple):
    """What an item is made of anew each time: whoever changes a payload that was shown changes only that."""

    item: Item  # without its payload, where that is nested
    lists: tuple[str, ...]  # fields of its payload that are lists, of what cannot change
    text: str | None  # the payload as JSON, where it is nested
    size: int  # bytes


class KnownItems:
    """The items that were shown last, as of one change. Safe to use from several threads.

    Args:
        most_bytes: of all items together; those that came first go first.
    """

    def __init__(self, most_bytes: int = 32 << 20) -> None:
        self.most_bytes = most_bytes
        self._items: dict[int, Known] = {}
        self._sequence = -1  # nothing is known of later changes
        self._bytes = 0
        self._lock = threading.Lock()

    def find(self, rows: Iterable[int], sequence: int) -> dict[int, Item] | None:
        """row -> item as of a change, when all of them are known; else None."""
        if self._sequence < sequence:
            return None
        items, found = self._items, {}
        for row in rows:
            known = items.get(row)
            if known is None:
                return None
            (id, kept, written, picture, _), lists, text, _ = known
            if written > sequence:
                return None
            if text is None:
                payload = dict(kept)  # quicker than reading JSON
                for name in lists:
                    payload[name] = payload[name].copy()
            else:
                payload = payload_of(text, 0)[0]
            found[row] = Item(id, payload, written, picture)
        return found

    def read(self, db: sqlite3.Connection, rows: Collection[int], sequence: int) -> dict[int, Item]:
        """row -> item, for those that are there, as of the moment of this transaction; known from now on."""
        if self._sequence < sequence:
            self._follow(db, sequence)
        found = self.find(rows, sequence)
        if found is not None:
            return found
        read = sql.raw_items_by_row(db, rows)
        found = {row[0]: sql.item_of(row) for row in read}
        with self._lock:
            if self._sequence == sequence:  # else this was a look into the past
                for row in read:
                    self._keep(row[0], known_of(sql.item_of(row), row[3]))
                self._shrink()
        return found

    def _follow(self, db: sqlite3.Connection, sequence: int) -> None:
        """Forget what was written or removed since; only then is what is left right for later states.

        What was removed may have been written before, after the last look: of a search that still has the
        state between the two it would be the version before both.
        """
        with self._lock:
            if self._sequence >= sequence:
                return
            most = len(self._items)
            written = sql.rows_written_after(db, self._sequence, most=most + 1) if most else []
            forgotten = self._sequence < sql.read_state(db)[1]  # what was removed is not known any more
            if len(written) > most or forgotten:
                self._items, self._bytes = {}, 0
            elif most:
                for row in (*written, *sql.removed_after(db, self._sequence).tolist()):
                    self._forget(row)
            self._sequence = sequence

    def _keep(self, row: int, known: Known) -> None:
        self._forget(row)
        self._items[row] = known
        self._bytes += known.size

    def _forget(self, row: int) -> None:
        known = self._items.pop(row, None)
        if known is not None:
            self._bytes -= known.size

    def _shrink(self) -> None:
        while self._bytes > self.most_bytes:
            self._forget(next(iter(self._items)))


def known_of(item: Item, text: str) -> Known:
    """`text`: its payload as JSON."""
    fields = item.payload.items()
    deep = any(
        isinstance(value, dict)
        or (isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value))
        for _, value in fields
    )
    taken = OVERHEAD + len(item.id)
    if deep:
        return Known(item._replace(payload={}), (), text, taken + getsizeof(text))
    lists = tuple(name for name, value in fields if isinstance(value, list))
    return Known(item, lists, None, taken + PAYLOAD_TIMES * len(text))
