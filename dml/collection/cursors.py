"""Walks through all hits of a search, page by page, in one state of the collection.

A cursor is bound to the change that its walk began at. That state (a read transaction of the catalogue and
the index as it was) is kept while its cursors are used, so pages never repeat or skip, whatever a writer does
meanwhile. A few states are kept, for minutes: a read transaction keeps SQLite's log from being folded in.
"""

import base64
import binascii
import hashlib
import hmac
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from dml.collection.base import SearchResult
from dml.collection.catalog import FileId
from dml.collection.generation import Generation
from dml.collection.known_items import KnownItems
from dml.collection.query import Query, Ranking, Searcher
from dml.collection.row_sets import RowSets
from dml.errors import CursorExpired, CursorInvalid, UsageError
from dml.index.base import Vectors

START = "*"
"""The cursor that starts a walk."""

MOST_STATES = 8
IDLE_SECONDS = 120.0
"""A state whose cursors have not been used for so long is let go,"""
AGE_SECONDS = 900.0
"""and every state after this time."""

MOST_WALKS = 64
"""Walks through one state."""

SAME = 1e-3
"""Vectors that are no further apart are the same query: a picture that is embedded again, among others, may
differ in the last digits."""

FIRST_RANKING = 1000
"""Hits that are ranked at once; then four times as many, …"""


class Place(NamedTuple):
    """What a cursor says."""

    generation: int
    offset: int
    digest: str  # of the query that it belongs to
    walk: str


@dataclass
class Walk:
    """What a walk goes along: its query as it was first, and the hits as far as they have been ranked."""

    vector: Vectors  # (1, D)
    ranking: Ranking | None = None


@dataclass
class Pin:
    """A state of the collection that is kept. One page of it at a time: its transaction has one thread."""

    db: Any
    state: Generation
    held: ExitStack  # closing it ends the transaction
    row_sets: RowSets  # of this state
    known: KnownItems
    since: float
    used: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    walks: OrderedDict[str, Walk] = field(default_factory=OrderedDict)
    closed: bool = False


Hold = Callable[[ExitStack], tuple[Any, Generation]]
"""Enter a read transaction into the stack: the transaction, and the state of the same moment."""


class Walks:
    """Gives out cursors and answers them.

    Args:
        hold: how the present state is kept.
        row_sets, known: what searches remember of filters and of items.
        file: of the catalogue that they remember it of, see `catalog.file_of`.
        clock: seconds, for the age of what is kept.
    """

    def __init__(
        self,
        hold: Hold,
        row_sets: RowSets,
        *,
        known: KnownItems | None = None,
        file: FileId | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hold, self._row_sets, self._clock = hold, row_sets, clock
        self._known, self._file = known or KnownItems(), file
        self._pins: OrderedDict[int, Pin] = OrderedDict()
        self._lock = threading.Lock()
        self._run = secrets.token_hex(8)  # cursors of another process of the service are expired, not forged
        self._secret = secrets.token_bytes(32)

    def page(self, vector: Vectors, query: Query, cursor: str) -> SearchResult:
        """One page of a walk; vector (1, D), of unit length.

        Raises:
            CursorInvalid, CursorExpired
            UsageError: a walk with an offset or with groups.
        """
        if len(vector) != 1:
            raise UsageError(f"a cursor belongs to one query, got {len(vector)} vectors")
        if query.offset or query.group_by is not None:
            raise UsageError("a search with a cursor has no offset and no group_by; leave them out")
        digest = query.digest()
        place = None if cursor == START else self._read(cursor, digest)
        pin = self._present() if place is None else self._pinned(place.generation)
        offset = 0 if place is None else place.offset
        query = replace(query, exact=True, effort=None, offset=offset)
        with pin.lock:
            if pin.closed:
                raise expired()
            name = hashlib.sha256(digest.encode() + vector.tobytes()).hexdigest()[:16]
            walk = begun(pin, name, vector) if place is None else under_way(pin, place.walk, vector)
            searcher = Searcher(pin.db, pin.state, query, row_sets=pin.row_sets, known=pin.known)
            ranking = ranked(walk, searcher, count=offset + query.limit + 1)
            [result] = searcher.pages([ranking])
        end = offset + len(result.hits)
        if end >= len(ranking.rows):
            return result
        following = Place(result.generation, end, digest, name if place is None else place.walk)
        return replace(result, next_cursor=self._written(following))

    def sweep(self) -> None:
        """Let go of what is too old, or has not been used; never waits for a page that is being made."""
        now = self._clock()
        with self._lock:
            old = [
                number
                for number, pin in self._pins.items()
                if (now - pin.used > IDLE_SECONDS or now - pin.since > AGE_SECONDS) and not pin.lock.locked()
            ]
            gone = [self._pins.pop(number) for number in old]
        for pin in gone:
            release(pin)

    def close(self) -> None:
        """Let go of everything."""
        with self._lock:
            gone = list(self._pins.values())
            self._pins.clear()
        for pin in gone:
            release(pin)

    def __len__(self) -> int:
        """States that are kept."""
        return len(self._pins)

    # States

    def _present(self) -> Pin:
        """The state of now, kept from now on."""
        self.sweep()
        stack = ExitStack()
        try:
            db, state = self._hold(stack)
        except BaseException:
            stack.close()
            raise
        now, gone = self._clock(), list[Pin]()
        with self._lock:
            known = self._pins.get(state.sequence)
            if known is not None and known.state.file != state.file:  # the same number in another catalogue
                known, gone = None, [self._pins.pop(state.sequence)]
            if known is None:
                same = state.file == self._file
                row_sets, items = (self._row_sets.copy(), self._known) if same else (RowSets(), KnownItems())
                self._pins[state.sequence] = Pin(db, state, stack, row_sets, items, now, now)
            pin = self._pins[state.sequence]
            self._pins.move_to_end(state.sequence)
            pin.used = now
            gone += [self._pins.popitem(last=False)[1] for _ in range(len(self._pins) - MOST_STATES)]
        if known is not None:
            stack.close()
        for old in gone:
            release(old)
        return pin

    def _pinned(self, generation: int) -> Pin:
        """A state that is still kept. Raises CursorExpired."""
        self.sweep()
        with self._lock:
            pin = self._pins.get(generation)
            if pin is None:
                raise expired()
            self._pins.move_to_end(generation)
            pin.used = self._clock()
            return pin

    # Cursors

    def _written(self, place: Place) -> str:
        text = json.dumps([self._run, *place], separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._seal(text) + text).decode().rstrip("=")

    def _seal(self, text: bytes) -> bytes:
        return hmac.digest(self._secret, text, "sha256")[:16]

    def _read(self, cursor: str, digest: str) -> Place:
        """What a cursor says. Raises CursorInvalid, CursorExpired."""
        try:
            padded = cursor + "=" * (-len(cursor) % 4)
            raw = base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)
            run, *rest = json.loads(raw[16:])
            place = Place(*rest)
        except (binascii.Error, ValueError, TypeError):
            raise CursorInvalid(
                'The cursor was not given out here. Start a walk with cursor "*", and go on with the '
                "next_cursor of each page, exactly as it came."
            ) from None
        if run != self._run:
            raise expired()  # given out before a restart, by what only looks like one at worst
        if not hmac.compare_digest(raw[:16], self._seal(raw[16:])):
            raise CursorInvalid("The cursor has been changed. Send next_cursor exactly as it came.")
        if place.digest != digest:
            raise another_search()
        return place


def begun(pin: Pin, name: str, vector: Vectors) -> Walk:
    """A walk at its start."""
    walk = pin.walks.setdefault(name, Walk(vector))
    pin.walks.move_to_end(name)
    if len(pin.walks) > MOST_WALKS:
        pin.walks.popitem(last=False)
    return walk


def under_way(pin: Pin, name: str, vector: Vectors) -> Walk:
    """A walk that goes on. Raises CursorExpired, and CursorInvalid for another query."""
    if name not in pin.walks:
        raise expired()
    pin.walks.move_to_end(name)
    walk = pin.walks[name]
    if np.linalg.norm(walk.vector - vector) > SAME:
        raise another_search()
    return walk


def ranked(walk: Walk, searcher: Searcher, *, count: int) -> Ranking:
    """The ranking of a walk, as far as it is needed or further."""
    known = walk.ranking
    if known is None or not (known.complete or len(known.rows) >= count):
        ahead = FIRST_RANKING if known is None else 4 * len(known.rows)
        [known] = searcher.ranked(walk.vector, max(ahead, count))
        walk.ranking = known
    return known


def release(pin: Pin) -> None:
    """Let go of a state, when the page that is being made of it is done."""
    with pin.lock:
        pin.closed = True
        pin.held.close()


def another_search() -> CursorInvalid:
    return CursorInvalid(
        "The cursor belongs to another search. Only the limit may change on the way: query, filter, "
        "threshold and exclusions stay as they were."
    )


def expired() -> CursorExpired:
    return CursorExpired(
        f"The cursor has expired: the state of the collection that its pages come from is kept for "
        f"{IDLE_SECONDS:.0f} seconds after the last page and {AGE_SECONDS / 60:.0f} minutes in all, and "
        f'{MOST_STATES} states at a time. Start again with cursor "*".'
    )
