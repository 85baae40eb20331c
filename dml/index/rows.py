"""Which id lives in which slot of an engine, and which slots are dead."""

import numpy as np
from numpy.typing import NDArray

from dml.index.base import Ids, check_ids


class Rows:
    """Slots 0, 1, 2, … with their ids; a removed id leaves a dead slot behind.

    The table of ids only grows and is shared between views, each of which sees its own beginning of it. So is
    the mask of living slots, until a view kills some: then it gets its own. Only the newest view may grow
    (one writer), while older ones go on answering.
    """

    def __init__(self, ids: Ids | None = None, alive: NDArray[np.bool_] | None = None) -> None:
        self.ids: Ids = np.empty(0, np.int64) if ids is None else ids
        self.alive: NDArray[np.bool_] = np.ones(len(self.ids), bool) if alive is None else alive
        self._room: tuple[Ids, NDArray[np.bool_]] = (self.ids, self.alive)  # what the two are the start of
        self.live = int(self.alive.sum())
        steps = np.diff(self.ids)
        self._ascending = bool((steps >= 0).all())
        self._gapless = bool((steps == 1).all())
        self._sorter: NDArray[np.int64] | None = None
        self._bits: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        """Slots, dead ones included."""
        return len(self.ids)

    def find(self, ids: Ids) -> NDArray[np.int64]:
        """The living slots of these ids, -1 for those that are not here."""
        if not len(self.ids):
            return np.full(len(ids), -1, np.int64)
        if self._gapless:
            place = ids - self.ids[0]
            inside = (place >= 0) & (place < len(self.ids))
            place = np.where(inside, place, 0)
            return np.where(inside & self.alive[place], place, -1)
        sorter = self._order()
        ordered = self.ids if sorter is None else self.ids[sorter]
        # Of equal ids the last slot is the living one: an id must be removed before it is added again.
        place = np.searchsorted(ordered, ids, side="right") - 1
        slots = place if sorter is None else sorter[place]
        found = (place >= 0) & (ordered[place] == ids) & self.alive[slots]
        return np.where(found, slots, -1)

    def living_slots(self, ids: Ids) -> NDArray[np.int64]:
        """The living slots of those of these ids that are here, each once; quickest for ascending ids."""
        ids = np.asarray(ids, np.int64)
        if not (ids[1:] > ids[:-1]).all():
            ids = np.unique(ids)
        slots = self.find(ids)
        return slots[slots >= 0]

    def slots_of(self, ids: Ids) -> NDArray[np.int64]:
        """The living slots of these ids, in their order. Raises KeyError for one that is not here."""
        ids = np.asarray(ids, np.int64)
        slots = self.find(ids)
        if len(slots) and slots.min() < 0:
            raise KeyError(f"id {ids[slots < 0][0]} is not in the index")
        return slots

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
            steps = np.diff(ids)
            self._ascending &= bool((steps > 0).all()) and (not len(self.ids) or ids[0] >= self.ids[-1])
            self._gapless &= bool((steps == 1).all()) and (not len(self.ids) or ids[0] == self.ids[-1] + 1)
        self._grow(ids)
        self.live += len(ids)
        self._sorter = self._bits = None

    def _grow(self, ids: Ids) -> None:
        """Write living slots behind the last one; the room for them doubles, so that a slot costs O(1)."""
        used, count = len(self.ids), len(self.ids) + len(ids)
        names, alive = self._room
        if len(names) < count:
            names = enlarged(names, used, max(64, 2 * count))
        if len(alive) < count:
            alive = enlarged(alive, used, max(64, 2 * count))
        names[used:count], alive[used:count] = ids, True
        self.ids, self.alive, self._room = names[:count], alive[:count], (names, alive)

    def kill(self, ids: Ids) -> int:
        """Mark the slots of these ids dead; how many there were."""
        slots = np.unique(self.find(np.asarray(ids, np.int64)))
        slots = slots[slots >= 0]
        if len(slots):
            self.alive = self.alive.copy()
            self._room = (self._room[0], self.alive)
            self.alive[slots] = False
            self.live -= len(slots)
            self._bits = None
        return len(slots)

    def view(self) -> "Rows":
        """A copy that shares everything until one of the two changes."""
        twin = Rows.__new__(Rows)
        twin.__dict__.update(self.__dict__)
        return twin

    def living(self) -> NDArray[np.int64]:
        """The living slots."""
        return np.flatnonzero(self.alive)

    def bits(self) -> NDArray[np.uint8]:
        """The mask of living slots as a bitmap, lowest bit first."""
        if self._bits is None:
            self._bits = np.packbits(self.alive, bitorder="little")
        return self._bits


def enlarged(array: NDArray, used: int, size: int) -> NDArray:
    """An array of `size` places that begins with the first `used` of another."""
    larger = np.empty(size, array.dtype)
    larger[:used] = array[:used]
    return larger
