"""Exact search with numpy: every vector is compared. The reference that other kinds are tested against."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.errors import ConfigError
from dml.index.base import Hits, Ids, Vectors, check_ids, check_search, check_vectors, no_hits
from dml.index.file import array_section, check_index_file, read_array, write_index_file
from dml.index.kept import Kept
from dml.index.ranking import SPARE, rank
from dml.index.rows import Rows

QUERY_BLOCK = 256
SCORE_LIMIT = 1 << 22
"""Scores (float32) held at once: 16 MB."""

COPY_LIMIT = 1 << 22
"""Numbers (float32) copied or decoded at once, where rows cannot be compared where they lie."""

MASKED_SHARE = 0.5
"""From this share of all rows on they are compared where they lie, with all others, whose scores are then
hidden: that is quicker than to copy those that are asked for."""

LEAST_ROOM = 64
"""Rows that an index makes room for at once, and that may be dead without its being made smaller."""

GROUP = 32
"""Scores that one maximum stands for while the highest are sought."""


class FlatIndex:
    """All vectors in one array; a search is one matrix product per block of it.

    Memory: 4 · D bytes per vector (twice that while the array grows). Exact; `effort` changes nothing.
    """

    kind = "flat"
    exact = True
    learns = False

    def __init__(self, dim: int, *, device: str = "auto") -> None:
        if device not in ("auto", "cpu"):
            raise ConfigError(
                f'The index kind "flat" runs on the CPU, not on "{device}". For a GPU use faiss_flat.'
            )
        if dim < 1:
            raise ConfigError(f"an index needs vectors of at least 1 number, got dim {dim}")
        self.dim = dim
        self.rows = Rows()
        self._buffer: Vectors = np.empty(
            (0, dim), np.float32
        )  # grows by doubling; the first len(rows) rows count

    def __len__(self) -> int:
        return self.rows.live

    @property
    def vectors(self) -> Vectors:
        """(slots, D), dead ones included."""
        return self._buffer[: len(self.rows)]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "exact": True, "device": "cpu"}

    def prepare(self, sample: Vectors, count: int) -> None:
        self._reserve(count)

    def _reserve(self, count: int) -> None:
        if count > len(self._buffer):
            larger = np.empty((count, self.dim), np.float32)
            larger[: len(self.rows)] = self.vectors
            self._buffer = larger

    def add(self, ids: Ids, vectors: Vectors) -> None:
        rows = check_vectors(vectors, self.dim, "the vectors to add")
        names = check_ids(ids, len(rows))
        used = len(self.rows)
        self.rows.append(names)
        if len(self.rows) > len(self._buffer):
            old, room = self._buffer, max(LEAST_ROOM, 2 * len(self.rows))
            self._buffer = np.empty((room, self.dim), np.float32)
            self._buffer[:used] = old[:used]
        self._buffer[used : len(self.rows)] = rows

    def set_effort(self, effort: int) -> None:
        """Changes nothing: every vector is compared."""

    def remove(self, ids: Ids) -> int:
        return self.rows.kill(ids)

    def without(self, ids: Ids) -> "FlatIndex":
        twin = self._twin()
        twin.rows.kill(ids)
        return twin

    def extended(self, ids: Ids, vectors: Vectors) -> "FlatIndex":
        """A view with more rows; this index does not change.

        The views share one buffer: each sees only its own first rows, and new ones are written behind them.
        So only the newest view may be extended (one writer), while older ones go on answering. When more rows
        are dead than alive, the view gets a buffer of its own with the living ones: however often a few items
        are changed, they take the room of a few.
        """
        dead = len(self.rows) - self.rows.live
        twin = self._compacted() if dead > max(LEAST_ROOM, self.rows.live) else self._twin()
        twin.add(ids, vectors)
        return twin

    def _compacted(self) -> "FlatIndex":
        living = self.rows.living()
        twin = FlatIndex(self.dim)
        twin.rows, twin._buffer = Rows(self.rows.ids[living]), self._buffer[living]
        return twin

    def _twin(self) -> "FlatIndex":
        twin = FlatIndex(self.dim)
        twin.rows, twin._buffer = self.rows.view(), self._buffer
        return twin

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        effort: int | None = None,
        allowed: Ids | None = None,
        exact: bool = False,
    ) -> Hits:
        check_search(k, effort)
        queries = check_vectors(queries, self.dim, "the query")
        slots = None if self.rows.live == len(self.rows) else self.rows.living()
        if allowed is not None:
            slots = self.rows.living_slots(allowed)
        return search_exactly(queries, self.vectors, self.rows.ids, k=k, slots=slots)

    def vectors_of(self, ids: Ids) -> Vectors:
        return self.vectors[self.rows.slots_of(ids)]

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes + self.rows.ids.nbytes + self.rows.alive.nbytes

    def save(self, path: Path, *, note: Mapping[str, Any] | None = None) -> None:
        living = self.rows.living()
        everything = len(living) == len(self.rows)
        write_index_file(
            path,
            kind=self.kind,
            dim=self.dim,
            count=len(living),
            settings={},
            note=note or {},
            sections={
                "ids": array_section(self.rows.ids[living]),
                "vectors": array_section(self.vectors if everything else self.vectors[living]),
            },
        )

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> "FlatIndex":
        """Read what `save` wrote. Raises DamagedFile."""
        header = check_index_file(path)
        index = cls(header.dim, device=device)
        index.rows = Rows(read_array(path, header, "ids", np.int64, (header.count,)))
        index._buffer = read_array(path, header, "vectors", np.float32, (header.count, header.dim))
        return index


def search_exactly(
    queries: Vectors, vectors: Vectors | Kept, ids: Ids, *, k: int, slots: NDArray[np.int64] | None = None
) -> Hits:
    """The k nearest rows of `vectors` for each query, in blocks; ties by id.

    Args:
        queries: (Q, D) unit rows.
        vectors: (N, D) unit rows, one per slot; read in blocks, so they may be kept in fewer bits.
        ids: (N,) id of each slot.
        slots: only these rows, each once; None: all.
    """
    count = len(vectors) if slots is None else len(slots)
    hits = no_hits(len(queries), k)
    pending = np.arange(len(queries)) if count else np.empty(0, np.int64)
    choice = chosen(vectors, slots)
    fetch = min(k + SPARE, count)
    while len(pending):
        unsettled = []
        for start in range(0, len(pending), QUERY_BLOCK):
            part = pending[start : start + QUERY_BLOCK]
            candidates, floor = best_slots(queries[part], vectors, fetch=fetch, choice=choice)
            ranked = rank(
                queries[part], candidates, rough_floor=floor, k=k, ids=ids, vectors_at=vectors.__getitem__
            )
            width = ranked.ids.shape[1]
            hits.ids[part, :width], hits.scores[part, :width] = ranked.ids, ranked.scores
            unsettled.append(part[~ranked.settled])
        pending = np.concatenate(unsettled)
        fetch = min(4 * fetch, count)  # many equal scores at the end of the list: look further down
    return hits


class Chosen(NamedTuple):
    """Which rows are compared: all, those at some slots (they are copied), or all but hidden ones."""

    count: int
    slots: NDArray[np.int64] | None = None
    hidden: NDArray[np.int64] | None = None  # ascending


def chosen(vectors: Vectors | Kept, slots: NDArray[np.int64] | None) -> Chosen:
    """The quickest way to compare only the rows at `slots`; None: all."""
    if slots is None or len(slots) == len(vectors):
        return Chosen(len(vectors))
    if not isinstance(vectors, np.ndarray) or len(slots) < MASKED_SHARE * len(vectors):
        return Chosen(len(slots), slots=slots)
    hidden = np.ones(len(vectors), bool)
    hidden[slots] = False
    return Chosen(len(slots), hidden=np.flatnonzero(hidden))


def best_slots(
    queries: Vectors, vectors: Vectors | Kept, *, fetch: int, choice: Chosen
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(Q, fetch) slots with the highest float32 scores in any order, and the lowest score among them (Q,).

    The floor is -inf when every chosen row is among the candidates; there are at least `fetch` of them.
    """
    slots = choice.slots
    count = len(vectors) if slots is None else len(slots)
    block = SCORE_LIMIT // len(queries)
    if slots is not None or not isinstance(vectors, np.ndarray):
        block = min(block, COPY_LIMIT // queries.shape[1])  # these rows are copied before they are compared
    block = max(fetch, block)
    best = np.empty((len(queries), 0), np.int64)
    best_scores = np.empty((len(queries), 0), np.float32)
    for start in range(0, count, block):
        part = slice(start, min(start + block, count))
        scores = queries @ (vectors[part] if slots is None else vectors[slots[part]]).T
        if choice.hidden is not None:
            first, last = np.searchsorted(choice.hidden, (part.start, part.stop))
            scores[:, choice.hidden[first:last] - start] = -np.inf  # below every row that may be returned
        keep = highest(scores, fetch)
        names = keep + start if slots is None else slots[part][keep]
        best = np.concatenate([best, names], axis=1)
        best_scores = np.concatenate([best_scores, np.take_along_axis(scores, keep, axis=1)], axis=1)
        if best.shape[1] > fetch:
            keep = highest(best_scores, fetch)
            best = np.take_along_axis(best, keep, axis=1)
            best_scores = np.take_along_axis(best_scores, keep, axis=1)
    if fetch >= choice.count:
        return best, np.full(len(queries), -np.inf, np.float32)
    return best, best_scores.min(axis=1)


def highest(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The columns of the `count` highest scores of each row, in any order (Q, min(count, N)).

    Columns are first taken in groups: the highest scores lie in the `count` groups with the highest maxima,
    and only these are looked at one by one. Maxima cost one pass at the speed of memory; choosing among all
    columns costs several times that.
    """
    columns = scores.shape[1]
    if columns <= count:
        return np.broadcast_to(np.arange(columns), scores.shape)
    groups = columns // GROUP  # a group is every `groups`-th column, so that maxima are taken of whole rows
    if groups < 4 * count:
        return np.argpartition(scores, columns - count, axis=1)[:, -count:]
    even = groups * GROUP
    maxima = scores[:, :even].reshape(len(scores), GROUP, groups).max(axis=1)
    chosen = np.argpartition(maxima, groups - count, axis=1)[:, -count:]
    members = (chosen[:, :, None] + np.arange(0, even, groups)).reshape(len(scores), -1)
    rest = np.broadcast_to(np.arange(even, columns), (len(scores), columns - even))
    members = np.concatenate([members, rest], axis=1)
    values = np.take_along_axis(scores, members, axis=1)
    best = np.argpartition(values, values.shape[1] - count, axis=1)[:, -count:]
    return np.take_along_axis(members, best, axis=1)
