"""Second names of collections, switched in one step: clients ask "shop", operators decide what that is.

An alias is kept with the folder of its collection, so it follows a collection that is called otherwise, and
each service that shares the state folder sees the aliases of its own collections only.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path

from service.state import Drawer, Section, State, StateFile

SECTION = Section(
    "aliases",
    (
        """
        CREATE TABLE aliases (
            alias TEXT NOT NULL,
            place TEXT NOT NULL,
            at REAL NOT NULL,
            PRIMARY KEY (alias, place)
        ) WITHOUT ROWID
        """,
    ),
)


class Aliases:
    """The aliases in a state folder. Any thread may ask; it costs microseconds.

    Args:
        state: the state file that is shared, or the state folder.
    """

    def __init__(self, state: StateFile | Path) -> None:
        self._drawer = Drawer(state, SECTION)
        self._lock = threading.Lock()
        self._moment: tuple[State, int] | None = None
        self._rows: list[tuple[str, str]] = []

    def current(self, places: Mapping[str, str]) -> dict[str, str]:
        """alias -> collection.

        Args:
            places: folder -> collection, of those that are served.
        """
        return {alias: places[place] for alias, place in self._read() if place in places}

    def _read(self) -> list[tuple[str, str]]:
        """(alias, place), read again when anything was written since the last time; the newest come last."""
        state = self._drawer.if_there()
        if state is None:
            return []
        with self._lock:
            moment = (state, state.moment())
            if moment != self._moment:
                with state.reading() as db:
                    self._rows = db.execute("SELECT alias, place FROM aliases ORDER BY at").fetchall()
                self._moment = moment
            return self._rows

    def switch(self, alias: str, place: str, places: Mapping[str, str]) -> bool:
        """Have the alias mean the collection at `place` from now on; whether it is new. Durable on return."""
        with self._drawer.made().writing() as db:
            new = True
            for before in [
                p for a, p in db.execute("SELECT alias, place FROM aliases").fetchall() if a == alias
            ]:
                if before in places:
                    new = False
                    db.execute("DELETE FROM aliases WHERE alias = ? AND place = ?", (alias, before))
            db.execute("INSERT INTO aliases VALUES (?, ?, ?)", (alias, place, time.time()))
        return new

    def drop(self, alias: str, places: Mapping[str, str]) -> bool:
        """Forget an alias; whether it was there."""
        if alias not in self.current(places):
            return False
        with self._drawer.made().writing() as db:
            for place in places:
                db.execute("DELETE FROM aliases WHERE alias = ? AND place = ?", (alias, place))
        return True

    def close(self) -> None:
        self._drawer.close()
