"""What users said of search results: was this hit what was looked for? Kept for training and evaluation."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from service.state import Drawer, Section, StateFile

SECTION = Section(
    "feedback",
    (
        """
        CREATE TABLE feedback (
            number INTEGER PRIMARY KEY AUTOINCREMENT,
            place TEXT NOT NULL,
            query_id TEXT NOT NULL,
            item TEXT NOT NULL,
            relevant INTEGER NOT NULL,
            key TEXT,
            at REAL NOT NULL
        );
        CREATE INDEX feedback_place ON feedback (place, number)
        """,
    ),
)
PAGE = 1000
"""Rows read at a time: others write in between."""


@dataclass(frozen=True)
class Judgement:
    """One answer to "is this what you looked for?".

    Attributes:
        query_id: of the search answer.
        id: the item.
        key: the name of the API key that it came with.
        at: seconds since 1970.
    """

    number: int
    query_id: str
    id: str
    relevant: bool
    key: str | None
    at: float


class Feedback:
    """The judgements in a state folder. Any thread may ask.

    Args:
        state: the state file that is shared, or the state folder.
    """

    def __init__(self, state: StateFile | Path) -> None:
        self._drawer = Drawer(state, SECTION)

    def add(self, place: str, query_id: str, item: str, *, relevant: bool, key: str | None) -> None:
        """Keep a judgement; durable on return. Raises StorageError.

        Args:
            place: the folder of the collection.
        """
        with self._drawer.made().writing() as db:
            db.execute(
                "INSERT INTO feedback (place, query_id, item, relevant, key, at) VALUES (?, ?, ?, ?, ?, ?)",
                (place, query_id, item, relevant, key, time.time()),
            )

    def page(self, place: str, *, after: int = 0) -> list[Judgement]:
        """The next judgements of a collection, in the order in which they came."""
        state = self._drawer.if_there()
        if state is None:
            return []
        with state.reading() as db:
            rows = db.execute(
                "SELECT number, query_id, item, relevant, key, at FROM feedback "
                "WHERE place = ? AND number > ? ORDER BY number LIMIT ?",
                (place, after, PAGE),
            ).fetchall()
        return [
            Judgement(n, query, item, bool(relevant), key, at) for n, query, item, relevant, key, at in rows
        ]

    def all(self, place: str) -> Iterator[Judgement]:
        """All judgements of a collection."""
        after = 0
        while found := self.page(place, after=after):
            yield from found
            after = found[-1].number

    def forget(self, place: str) -> None:
        """Forget those of a collection that is deleted."""
        state = self._drawer.if_there()
        if state is not None:
            with state.writing() as db:
                db.execute("DELETE FROM feedback WHERE place = ?", (place,))

    def close(self) -> None:
        self._drawer.close()
