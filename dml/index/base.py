"""What every vector index does, and the conventions that all of them keep.

- Vectors are float32 and of unit length; scores are cosine similarities, **higher is nearer**.
- Ids are int64 and not negative: rows of a catalogue. A missing result has id -1 and score -inf.
- Rows of a result are sorted best first; equal scores are ordered by id, so results are repeatable.
- Parameters of a search travel with the call. An index has no search state to set.
"""

from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

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
    """The name in `dml.index.KINDS`: "flat", "faiss_flat", "hnsw", "ivf"."""
    dim: int
    exact: bool
    """Whether a search always returns the true neighbours."""

    def __len__(self) -> int:
        """How many vectors it holds (removed ones do not count)."""
        ...

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add rows. An id that is already there is an error (ValueError): remove it first."""
        ...

    def remove(self, ids: Ids) -> int:
        """Forget these ids; return how many of them were there."""
        ...

    def search(
        self, queries: Vectors, k: int, *, effort: int | None = None, allowed: Ids | None = None
    ) -> Hits:
        """The k nearest of each query (Q, D).

        Args:
            effort: how hard to look (HNSW: efSearch, IVF: nprobe); None: the index's own default.
            allowed: only these ids may be returned.
        """
        ...

    def save(self, path: Path) -> None:
        """Write the index to one file, completely or not at all."""
        ...


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
    norms = np.linalg.norm(rows, axis=1)
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise VectorError(f"{where}: row {row} holds NaN or infinity")
    if (np.abs(norms - 1) > UNIT_TOLERANCE).any():
        row = int(np.argmax(np.abs(norms - 1)))
        raise VectorError(f"{where}: row {row} has length {norms[row]:.4g}; vectors must be of length 1")
    return rows
