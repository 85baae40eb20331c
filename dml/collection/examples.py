"""One query vector out of several examples: what is looked for is like these, and unlike those."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dml.collection.base import Collection
from dml.errors import DimensionMismatch, VectorError

Vector = NDArray[np.float32]
Example = str | ArrayLike
"""The id of an item, or a vector of any length."""


def query_vector(
    collection: Collection,
    *,
    base: ArrayLike | None = None,
    positive: Sequence[Example] = (),
    negative: Sequence[Example] = (),
) -> Vector:
    """(D,) of unit length: what to search for.

    With P = {base} and the `positive` examples, N the `negative` ones::

        q = mean(P)                     without negatives
        q = 2 · mean(P) - mean(N)       with negatives

    scaled to length 1: a step from the negatives through the positives, as far again. Every example counts
    the same, for each is scaled to length 1 first. Leave the items that serve as examples out of the results:
    `collection.search(q[None], exclude=[…])`.

    Raises:
        UnknownItem
        VectorError, DimensionMismatch: a vector that is not fit, nothing to look for, or examples that leave
            no direction.
    """
    toward = vectors_of(collection, positive, what="positive")
    if base is not None:
        toward.insert(0, unit(base, dim=collection.dim, where="the query vector"))
    if not toward:
        raise VectorError(
            "The query names nothing to look for: give an image, an id, a vector or positive examples."
        )
    if not negative and len(toward) == 1:
        return toward[0]
    mean = np.mean(toward, axis=0)
    if negative:
        mean = 2 * mean - np.mean(vectors_of(collection, negative, what="negative"), axis=0)
    return unit(mean, dim=collection.dim, where="the mean of the examples")


def vectors_of(collection: Collection, examples: Sequence[Example], *, what: str) -> list[Vector]:
    """The vectors of examples, in their order. Raises as `query_vector`."""
    ids = [example for example in examples if isinstance(example, str)]
    known = {item.id: item.vector for item in collection.get(ids, with_vector=True)} if ids else {}
    found: list[Vector] = []
    for example in examples:
        vector = known[example] if isinstance(example, str) else example
        if vector is not None:
            found.append(unit(vector, dim=collection.dim, where=f"a {what} example"))
    return found


def unit(vector: ArrayLike, *, dim: int, where: str) -> Vector:
    """The vector as float32 of length 1. Cosine similarity knows no length, so any is accepted.

    Raises:
        DimensionMismatch: its length is not `dim`.
        VectorError: it holds NaN or infinity, or points nowhere (all zeros).
    """
    row = np.asarray(vector, dtype=np.float64)
    if row.ndim != 1:
        raise VectorError(f"{where} must be a flat list of {dim} numbers, got shape {row.shape}")
    if len(row) != dim:
        raise DimensionMismatch(dim, len(row), where)
    if not np.isfinite(row).all():
        place = int(np.flatnonzero(~np.isfinite(row))[0])
        raise VectorError(f"{where} holds NaN or infinity at position {place}")
    largest = np.abs(row).max()
    if largest == 0:
        raise VectorError(f"{where} is all zeros: it has no direction to compare")
    row = row / largest  # first to a safe range: squares of very large or small numbers overflow or vanish
    return (row / np.linalg.norm(row)).astype(np.float32)
