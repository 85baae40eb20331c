"""What every vector index does, and the conventions that all of them keep.

- Vectors are float32 and of unit length; scores are cosine similarities, **higher is nearer**.
- Ids are int64 and not negative: rows of a catalogue. A missing result has id -1 and score -inf.
- Rows of a result are sorted best first; equal scores are ordered by id, so results are repeatable.
- Parameters of a search travel with the call. An index has no search state that searches set.
- A search returns min(k, how many may be returned) results: an approximate index may miss a true neighbour,
  but it never comes back with fewer results than there are.
- Scores are the float32 nearest to the true inner product of the query with the vector **as it is kept**,
  whichever engine found the candidates and however many queries came at once; so equal vectors have equal
  scores everywhere in an index. Kept whole (`precision` float32, what every kind does unless told otherwise,
  but pq and rabitq), that is the vector itself, and results can be compared between backends to the last
  digit. In fewer bits (see `kept.py`) it is the nearest vector that these bits can say.
- One thread may write (add, remove) while nobody searches; any number of threads may search at once.
  `without` gives a changed view and leaves the original as it is: searches under way are not disturbed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dml.errors import DimensionMismatch, VectorError

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]

UNIT_TOLERANCE = 1e-3
"""How far a norm may be from 1 before a vector counts as not normalised."""


class Hits(NamedTuple):
    """The k best of every query, best first."""

    ids: Ids  # (Q, k); -1 where there is no result
    scores: Vectors  # (Q, k) cosine similarity; -inf where there is no result


@runtime_checkable
class VectorIndex(Protocol):
    """Vectors in, nearest ids out. Backends differ in speed, memory and exactness, never in meaning."""

    kind: str
    """The name in `dml.index.KINDS`: "flat", "faiss_flat", "hnsw", "ivf", …"""
    dim: int
    learns: bool
    """Whether `prepare` makes use of a sample."""

    @property
    def exact(self) -> bool:
        """Whether a search always returns the true neighbours, of whole vectors."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the vectors, what is built of them, and their ids take."""
        ...

    def describe(self) -> dict[str, Any]:
        """Kind, device and settings, for people and for manifests."""
        ...

    def prepare(self, sample: Vectors, count: int) -> None:
        """Learn from a sample what is needed before the first add (IVF's cells), and expect `count` rows.

        Optional: `add` on an unprepared index learns from the rows of the first call. An index that does not
        learn takes an empty sample.
        """
        ...

    def __len__(self) -> int:
        """How many vectors it holds (removed ones do not count)."""
        ...

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add rows. An id that is already there is an error (ValueError): remove it first."""
        ...

    def set_effort(self, effort: int) -> None:
        """The effort of searches that name none, for whoever has tuned it; before others search.

        It is one of the index's settings, and saved.
        """
        ...

    def remove(self, ids: Ids) -> int:
        """Forget these ids; return how many of them were there."""
        ...

    def without(self, ids: Ids) -> "VectorIndex":
        """The same vectors with these ids removed, as a view; this index does not change.

        Only a mask is copied. The view is for searching; while it is in use nothing may be added to the
        original.
        """
        ...

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        effort: int | None = None,
        allowed: Ids | None = None,
        exact: bool = False,
    ) -> Hits:
        """The k nearest of each query (Q, D).

        Args:
            effort: how hard to look (HNSW: efSearch, IVF: nprobe); None: the index's own default.
            allowed: only these ids may be returned.
            exact: return the true neighbours among the vectors as they are kept, however long it takes.

        Raises:
            VectorError, DimensionMismatch: for queries that are not finite unit vectors of `dim` numbers.
            ValueError: for k or effort below 1.
        """
        ...

    def vectors_of(self, ids: Ids) -> Vectors:
        """(N, D) the vectors of these ids as they are kept: what scores are computed with.

        Raises:
            KeyError: an id that is not here.
        """
        ...

    def save(self, path: Path, *, note: Mapping[str, Any] | None = None) -> None:
        """Write the index to one file, completely or not at all; `note` (JSON) is kept in its header.

        Raises:
            StorageError: the disk is full or refuses; what was at `path` before is untouched.
        """
        ...


def no_hits(queries: int, k: int) -> Hits:
    """k missing results for each query."""
    return Hits(np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf, np.float32))


def check_ids(ids: NDArray, count: int | None = None) -> Ids:
    """Return int64 ids (N,) after checking that they are not negative, distinct, and `count` many."""
    rows = np.ascontiguousarray(ids, dtype=np.int64)
    if rows.ndim != 1 or (count is not None and len(rows) != count):
        raise ValueError(f"expected {'N' if count is None else count} ids, got shape {rows.shape}")
    if len(rows) and rows.min() < 0:
        raise ValueError(f"ids must not be negative, got {rows.min()}")
    if len(np.unique(rows)) != len(rows):
        raise ValueError("the same id is given twice")
    return rows


def check_search(k: int, effort: int | None) -> None:
    """Refuse a search that asks for nothing."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if effort is not None and effort < 1:
        raise ValueError(f"effort must be at least 1, got {effort}")


def check_vectors(vectors: NDArray, dim: int, where: str = "the vector") -> Vectors:
    """Return float32 rows (N, D) after checking shape, finiteness and unit length.

    Raises:
        DimensionMismatch: when the rows are not `dim` long.
        VectorError: for NaN, infinities, or rows that are not of unit length.
    """
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    if rows.ndim != 2:
        raise VectorError(f"{where}: expected rows of shape (N, {dim}), got shape {rows.shape}")
    if rows.shape[1] != dim:
        raise DimensionMismatch(dim, rows.shape[1], where)
    if is_unit(rows):
        return rows
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(rows, axis=1)
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise VectorError(f"{where}: row {row} holds NaN or infinity")
    if (np.abs(norms - 1) > UNIT_TOLERANCE).any():
        row = int(np.argmax(np.abs(norms - 1)))
        raise VectorError(f"{where}: row {row} has length {norms[row]:.4g}; vectors must be of length 1")
    return rows


def is_unit(rows: Vectors) -> bool:
    """Whether all rows (N, D) are surely finite and of unit length."""
    if len(rows) == 1:
        row = rows[0]
        return abs(float(np.vdot(row, row)) - 1) < UNIT_TOLERANCE  # false for NaN and infinity
    squares = np.einsum("ij,ij->i", rows, rows)
    return bool((np.abs(squares - 1) < UNIT_TOLERANCE).all())
