"""Every vector compared on the processor's bfloat16 matrix units, then the nearest again with whole vectors.

Processors with AMX or AVX-512 BF16 multiply bfloat16 two to many times as fast as float32, and half as many
bytes have to come from memory. A bfloat16 score says where the nearest are, not which is first: so more are
fetched than were asked for, and these are ranked by the vectors as they are.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.errors import ConfigError
from dml.index.base import Hits, Ids, Vectors, check_ids, check_search, check_vectors, no_hits
from dml.index.file import array_section, check_index_file, read_array, write_index_file
from dml.index.flat import search_exactly
from dml.index.kept import Column, KeptVectors, to_bfloat16
from dml.index.products import BLOCK_ROWS, products
from dml.index.ranking import SPARE, rank
from dml.index.rows import Rows

log = logging.getLogger(__name__)

BLOCK_QUERIES = 512
"""Queries compared at once: their scores for one block of vectors take 64 MiB."""

WIDTH = 4
"""So many candidates per wanted result at first."""

HALF_STEP = 2.0**-9
"""How far rounding a score below 1 to bfloat16 moves it."""
ROUNDED_FACTORS = 2.2e-3
"""Standard deviation of a product of two rounded bfloat16 numbers, relative to the product: each is off by up
to 2^-8, by 1.6e-3 in the mean square."""
DEVIATIONS = 6

FEW_ALLOWED = 4096
"""Up to this many allowed ids are compared one by one."""


class MatrixIndex:
    """All vectors in bfloat16 beside the whole ones; a search is one product and a choice of the highest.

    Memory: 6 · D bytes per vector. It finds the true neighbours but for one in ten thousand or fewer: a score
    would have to be wrong by more than `score_error`. An `exact` search finds them all.

    Args:
        effort: candidates per wanted result to begin with; more are fetched where these leave a doubt.
        engine: "torch", "openvino", or "auto": the first of them that is installed.
    """

    kind = "matrix"
    exact = False
    learns = False

    def __init__(self, dim: int, *, device: str = "auto", effort: int = WIDTH, engine: str = "auto") -> None:
        if device not in ("auto", "cpu"):
            raise ConfigError(
                f'The index kind "matrix" runs on the CPU, not on "{device}". For a GPU use faiss_flat.'
            )
        if dim < 1 or effort < 1:
            raise ConfigError(f"matrix needs a dim and an effort of at least 1, got {dim} and {effort}")
        self.products = products(dim, engine)
        if not self.products.in_hardware:
            log.warning("this processor has no bfloat16 units: the kind faiss_flat is quicker than matrix")
        self.dim, self.effort = dim, effort
        self.rows = Rows()
        self._kept = KeptVectors(dim, "float32")
        self._codes = Column(dim, np.uint16)

    def __len__(self) -> int:
        return self.rows.live

    @property
    def nbytes(self) -> int:
        ids = self.rows.ids.nbytes + self.rows.alive.nbytes
        return self._kept.nbytes + self._codes.rows.nbytes + ids

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "exact": False,
            "device": "cpu",
            "effort": self.effort,
            "engine": self.products.name,
        }

    def set_effort(self, effort: int) -> None:
        self.effort = effort

    def prepare(self, sample: Vectors, count: int) -> None:
        self._kept.reserve(count)
        self._codes.reserve(count)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        rows = check_vectors(vectors, self.dim, "the vectors to add")
        self.rows.append(check_ids(ids, len(rows)))
        self._kept.append(rows)
        self._codes.append(to_bfloat16(rows))

    def remove(self, ids: Ids) -> int:
        return self.rows.kill(ids)

    def without(self, ids: Ids) -> "MatrixIndex":
        twin = object.__new__(MatrixIndex)
        twin.__dict__.update(self.__dict__)
        twin.rows = self.rows.view()
        twin.rows.kill(ids)
        return twin

    def vectors_of(self, ids: Ids) -> Vectors:
        return self._kept[self.rows.slots_of(ids)]

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
        slots = None
        if allowed is not None:
            slots = self.rows.living_slots(allowed)
        elif self.rows.live < len(self.rows):
            slots = self.rows.living()
        count = len(self.rows) if slots is None else len(slots)
        if not count or not len(queries):
            return no_hits(len(queries), k)
        fetch = max((effort or self.effort) * k, k + SPARE)
        if exact or fetch >= count or (slots is not None and count <= FEW_ALLOWED):
            return search_exactly(queries, self._kept[:], self.rows.ids, k=k, slots=slots)
        hidden = None
        if slots is not None:
            hidden = np.ones(len(self.rows), bool)
            hidden[slots] = False
        hits = no_hits(len(queries), k)
        for start in range(0, len(queries), BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            found = self._search(queries[part], k, slots=slots, hidden=hidden, count=count, fetch=fetch)
            hits.ids[part], hits.scores[part] = found
        return hits

    def _search(
        self,
        queries: Vectors,
        k: int,
        *,
        slots: NDArray[np.int64] | None,
        hidden: NDArray[np.bool_] | None,
        count: int,
        fetch: int,
    ) -> Hits:
        """Fetch candidates until no other can belong among the first k; then compare all."""
        hits, pending = no_hits(len(queries), k), np.arange(len(queries))
        while len(pending) and fetch < count:
            rough, names = self.products.best(queries[pending], self._codes.rows, fetch, hidden)
            ranked = rank(
                queries[pending],
                names,
                rough_floor=rough.min(axis=1) + score_error(queries[pending]),
                k=k,
                ids=self.rows.ids,
                vectors_at=self._kept.__getitem__,
            )
            hits.ids[pending], hits.scores[pending] = ranked.ids, ranked.scores
            pending = pending[~ranked.settled]
            fetch *= 4
        if len(pending):
            found = search_exactly(queries[pending], self._kept[:], self.rows.ids, k=k, slots=slots)
            hits.ids[pending], hits.scores[pending] = found.ids, found.scores
        return hits

    def save(self, path: Path, *, note: Mapping[str, Any] | None = None) -> None:
        living = self.rows.living()
        everything = len(living) == len(self.rows)
        write_index_file(
            path,
            kind=self.kind,
            dim=self.dim,
            count=len(living),
            settings={"effort": self.effort},
            note=note or {},
            sections={
                "ids": array_section(self.rows.ids[living]),
                "vectors": array_section(self._kept[:] if everything else self._kept[living]),
            },
        )

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> "MatrixIndex":
        """Read what `save` wrote. Raises DamagedFile, MissingExtra."""
        header = check_index_file(path)
        index = cls(header.dim, device=device, **header.settings)
        ids = read_array(path, header, "ids", np.int64, (header.count,))
        index.rows = Rows(ids)
        index.prepare(np.empty((0, header.dim), np.float32), header.count)
        vectors = read_array(path, header, "vectors", np.float32, (header.count, header.dim))
        for start in range(0, header.count, BLOCK_ROWS):
            rows = vectors[start : start + BLOCK_ROWS]
            index._kept.append(rows)
            index._codes.append(to_bfloat16(rows))
        return index


def score_error(queries: Vectors) -> NDArray[np.float32]:
    """(Q,) how far a bfloat16 score near a query (Q, D) may be from the true one.

    Half a step of the result, and six standard deviations of what rounding the factors adds up to:
    0.0022 · sqrt(Σ qᵢ² xᵢ²), with x ≈ q for a neighbour. Few dimensions average less: 0.003 in all at 512
    dimensions, 0.006 at 32.
    """
    spread = np.sqrt((queries.astype(np.float64) ** 4).sum(axis=1))
    return (HALF_STEP + DEVIATIONS * ROUNDED_FACTORS * spread).astype(np.float32)
