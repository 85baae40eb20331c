"""From candidates to the final order: true scores, ties by id, and whether the order is settled."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.index.base import Ids, Vectors

ROUGH_ERROR = 4e-6
"""How far an engine's float32 inner product of unit vectors may be from the true one (BLAS, SIMD, thousands
of dimensions). Two candidates closer than this may change places when they are scored truly."""

SPARE = 6
"""Candidates fetched beyond k, so that places near the end of the list can be decided."""

MULTIPLY_LIMIT = 1 << 21
"""Numbers (float64) multiplied at once while scoring."""


class Ranked(NamedTuple):
    ids: Ids  # (Q, k)
    scores: Vectors  # (Q, k)
    settled: NDArray[np.bool_]  # (Q,) False: a row that was not fetched might belong into the first k


def rank(
    queries: Vectors,
    slots: NDArray[np.int64],
    *,
    rough_floor: NDArray[np.float32],
    k: int,
    ids: Ids,
    vectors_at: Callable[[NDArray[np.int64]], Vectors],
) -> Ranked:
    """Score candidates truly, order them by (score, id) and keep k.

    Args:
        queries: (Q, D) unit rows.
        slots: (Q, F) candidates of each query as rows of the index, -1 where there is none; F >= k.
        rough_floor: (Q,) no row that is not among the candidates has a higher engine score than this;
            -inf when all rows are candidates.
        ids: (N,) the id of each slot.
        vectors_at: slots (M,) -> their vectors (M, D).
    """
    scores = true_scores(queries, slots, vectors_at)
    names = np.where(slots >= 0, ids[slots] if len(ids) else -1, np.iinfo(np.int64).max)
    order = np.lexsort((names, -scores), axis=-1)[:, :k]
    scores = np.take_along_axis(scores, order, axis=1)
    names = np.take_along_axis(names, order, axis=1)
    missing = np.isneginf(scores)
    names[missing] = -1
    settled = np.isneginf(rough_floor) | (scores[:, -1] > rough_floor + ROUGH_ERROR)
    return Ranked(names, scores, settled)


def true_scores(
    queries: Vectors, slots: NDArray[np.int64], vectors_at: Callable[[NDArray[np.int64]], Vectors]
) -> Vectors:
    """(Q, F) inner products summed in float64, row by row: the same for the same pair wherever it stands.

    BLAS sums in an order that depends on the place in the matrix, so equal vectors can differ in the last
    digit there.
    """
    queries_count, fetched = slots.shape
    scores = np.full(slots.shape, -np.inf, np.float32)
    block = max(1, MULTIPLY_LIMIT // max(1, fetched * queries.shape[1]))
    for start in range(0, queries_count, block):
        part = slice(start, start + block)
        row, column = np.nonzero(slots[part] >= 0)
        step = max(1, MULTIPLY_LIMIT // queries.shape[1])
        for first in range(0, len(row), step):
            r, c = row[first : first + step], column[first : first + step]
            products = np.multiply(vectors_at(slots[part][r, c]), queries[part][r], dtype=np.float64)
            scores[start + r, c] = products.sum(axis=1)
    return scores
