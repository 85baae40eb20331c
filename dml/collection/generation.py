"""What a search sees: the state of a collection at one change, never altered once made."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.collection.catalog import FileId
from dml.index.base import Hits, Ids, VectorIndex, Vectors
from dml.index.flat import FlatIndex


class Snapshot(NamedTuple):
    """An index of all rows there were at a change."""

    index: VectorIndex
    sequence: int
    last_row: int  # the highest row ever used by then
    measured: Mapping[str, Any] | None = None  # its recall, see measure.py
    built_over: int = 0  # items when it was last built as a whole; since then it was only added to
    dead: int = 0  # rows that it may still hold, and that were removed


@dataclass(frozen=True)
class Generation:
    """The main index as it was built, rows removed since hidden, rows added since in a flat one."""

    sequence: int
    base: Snapshot
    main: VectorIndex
    delta: FlatIndex
    file: FileId | None = None
    """Of which catalogue, see `catalog.file_of`."""

    @classmethod
    def of(cls, base: Snapshot, dim: int) -> "Generation":
        return cls(base.sequence, base, base.index, FlatIndex(dim))

    def __len__(self) -> int:
        return len(self.main) + len(self.delta)

    @property
    def pending(self) -> int:
        """Changes that the main index does not have: rows to add and rows to forget."""
        return len(self.delta) + len(self.base.index) - len(self.main)

    @property
    def approximate(self) -> bool:
        return not self.main.exact and len(self.main) > 0

    def changed(self, sequence: int, *, rows: Ids, vectors: Vectors, removed: Ids) -> "Generation":
        """The next generation. This one does not change, so searches in it go on undisturbed."""
        main, delta = self.main, self.delta
        if len(removed):
            main = main.without(removed)
            delta = delta.without(removed)
        if len(rows):
            delta = delta.extended(rows, vectors)
        return Generation(sequence, self.base, main, delta, self.file)

    def search(
        self, queries: Vectors, k: int, *, effort: int | None, exact: bool, allowed: Ids | None = None
    ) -> Hits:
        """The k nearest rows of both parts, of the allowed ones if there is a choice; ties by row."""
        if not len(self.delta):
            return self.main.search(queries, k, effort=effort, exact=exact, allowed=allowed)
        recent = self.delta.search(queries, k, allowed=allowed)
        if not len(self.main):
            return recent
        found = self.main.search(queries, k, effort=effort, exact=exact, allowed=allowed)
        return merge(found, recent, k)


def merge(left: Hits, right: Hits, k: int) -> Hits:
    """The k best of two answers to the same queries."""
    ids = np.concatenate([left.ids, right.ids], axis=1)
    scores = np.concatenate([left.scores, right.scores], axis=1)
    names: NDArray[np.int64] = np.where(ids < 0, np.iinfo(np.int64).max, ids)
    order = np.lexsort((names, -scores), axis=-1)[:, :k]
    return Hits(np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1))
