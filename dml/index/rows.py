"""Which id lives in which slot of an engine, and which slots are dead."""

import numpy as np
from numpy.typing import NDArray

from dml.index.base import Ids, check_ids


class Rows:
    """Slots 0, 1, 2, … with their ids; a removed id leaves a dead slot behind.

    The table of ids only grows and is shared between views; the mask of living slots belongs to each view.
    """

    def __init__(self, ids: Ids | None = None) -> None:
        self.ids: Ids = np.empty(0, np.int64) if ids is None else ids
        self.alive: NDArray[np.bool_] = np.ones(len(self.ids), bool)
        self.live = len(self.ids)
        self._ascending = bool((np.diff(self.ids) >= 0).all())
        self._sorter: NDArray[np.int64] | None = None
        self._bits: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        """Slots, dead ones included."""
        return len(self.ids)

    def find(self, ids: Ids) -> NDArray[np.int64]:
        """The living slots of these ids, -1 for those that are not here."""
        if not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        sorter = self._order()
        ordered = self.ids if sorter is None else self.ids[sorter]
        # Of equal ids the last slot is the living one: an id must be removed before it is added again.
        place = np.searchsorted(ordered, ids, side="right") - 1
        slots = place if sorter is None else sorter[place]
        found = (place >= 0) & (ordered[place] == ids) & self.alive[slots]
        return np.where(found, slots, -1)

    def _order(self) -> NDArray[np.int64] | None:
        """Slots in the order of their ids; None when they are so already (a catalogue's rows always are)."""
        if self._ascending:
            return None
        if self._sorter is None:
            self._sorter = np.argsort(self.ids, kind="stable")
        return self._sorter

    def append(self, ids: Ids) -> None:
        """New slots at the end. Raises ValueError for an id that is already there."""
        ids = check_ids(ids)
        there = self.find(ids) >= 0
        if there.any():
            raise ValueError(f"id {ids[there][0]} is already in the index; remove it first")
        if len(ids):
            ordered = bool((np.diff(ids) > 0).all())
            self._ascending &= ordered and (not len(self.ids) or ids[0] >= self.ids[-1])
        self.ids = np.concatenate([self.ids, ids])
        self.alive = np.concatenate([self.alive, np.ones(len(ids), bool)])
        self.live += len(ids)
        self._sorter = self._bits = None

    def kill(self, ids: Ids) -> int:
        """Mark the slots of these ids dead; how many there were."""
        slots = np.unique(self.find(np.asarray(ids, np.int64)))
        slots = slots[slots >= 0]
        self.alive[slots] = False
        self.live -= len(slots)
        self._bits = None
        return len(slots)

    def view(self) -> "Rows":
        """A copy that shares the ids and has its own mask."""
        twin = Rows.__new__(Rows)
        twin.ids, twin.alive, twin.live = self.ids, self.alive.copy(), self.live
        twin._ascending, twin._sorter, twin._bits = self._ascending, self._sorter, None
        return twin

    def living(self) -> NDArray[np.int64]:
        """The living slots."""
        return np.flatnonzero(self.alive)

    def bits(self) -> NDArray[np.uint8]:
        """The mask of living slots as a bitmap, lowest bit first."""
        if self._bits is None:
            self._bits = np.packbits(self.alive, bitorder="little")
        return self._bits
