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


LAST = np.iinfo(np.int64).max
"""Stands for a missing id while others are put in order."""

VectorsAt = Callable[[NDArray[np.int64]], Vectors]
"""Slots (M,) -> the vectors there (M, D), as the index keeps them."""


class Ranked(NamedTuple):
    ids: Ids  # (Q, k)
    scores: Vectors  # (Q, k)
    settled: NDArray[np.bool_]  # (Q,) False: a row that was not fetched might belong into the first k


def rank(
    queries: Vectors,
    slots: NDArray[np.int64],
    *,
    rough_floor: NDArray[np.float32] | None,
    k: int,
    ids: Ids,
    vectors_at: VectorsAt,
) -> Ranked:
    """Score candidates truly, order them by (score, id) and keep k.

    Args:
        queries: (Q, D) unit rows.
        slots: (Q, F) candidates of each query as rows of the index, -1 where there is none; F >= k.
        rough_floor: (Q,) no row that is not among the candidates has a higher engine score than this;
            -inf when all rows are candidates. None: the engine compares codes, and its scores say nothing
            about the order; a query is then settled unless all further candidates are as near as its k-th.
        ids: (N,) the id of each slot.
        vectors_at: slots (M,) -> their vectors (M, D).
    """
    if slots.shape[1] <= 2 * (k + SPARE):
        return _rank_all(queries, slots, rough_floor=rough_floor, k=k, ids=ids, vectors_at=vectors_at)
    near, dropped = nearest_roughly(queries, slots, keep=k + SPARE, vectors_at=vectors_at)
    ranked = _rank_all(queries, near, rough_floor=rough_floor, k=k, ids=ids, vectors_at=vectors_at)
    unsure = ~(np.isneginf(dropped) | (ranked.scores[:, -1] > dropped + ROUGH_ERROR))
    if not unsure.any():
        return ranked if rough_floor is not None else ranked._replace(settled=np.ones(len(queries), bool))
    floor = None if rough_floor is None else rough_floor[unsure]
    again = _rank_all(queries[unsure], slots[unsure], rough_floor=floor, k=k, ids=ids, vectors_at=vectors_at)
    if rough_floor is None:
        ranked.settled[:] = True
    for all_rows, new_rows in zip(ranked, again, strict=True):
        all_rows[unsure] = new_rows
    return ranked


def _rank_all(
    queries: Vectors,
    slots: NDArray[np.int64],
    *,
    rough_floor: NDArray[np.float32] | None,
    k: int,
    ids: Ids,
    vectors_at: VectorsAt,
) -> Ranked:
    if len(queries) == 1 and len(ids):
        return _rank_one(queries[0], slots[0], rough_floor=rough_floor, k=k, ids=ids, vectors_at=vectors_at)
    scores = true_scores(queries, slots, vectors_at)
    names = ids[slots] if len(ids) else np.full(slots.shape, -1)
    if slots.min(initial=0) < 0:
        names = np.where(slots >= 0, names, LAST)
    order = np.lexsort((names, -scores), axis=-1)
    farthest = np.take_along_axis(scores, order[:, -1:], axis=1)[:, 0]
    order = order[:, :k]
    scores = np.take_along_axis(scores, order, axis=1)
    names = np.take_along_axis(names, order, axis=1)
    names[names == LAST] = -1
    if rough_floor is None:
        settled = farthest < scores[:, -1]
    else:
        settled = np.isneginf(rough_floor) | (scores[:, -1] > rough_floor + ROUGH_ERROR)
    return Ranked(names, scores, settled)


def _rank_one(
    query: Vectors,
    slots: NDArray[np.int64],
    *,
    rough_floor: NDArray[np.float32] | None,
    k: int,
    ids: Ids,
    vectors_at: VectorsAt,
) -> Ranked:
    """As for several queries, with plain rows and few of numpy's calls: each takes a microsecond, and a whole
    search in a graph some fifty.
    """
    there = slots if slots.min(initial=0) >= 0 else slots[slots >= 0]
    products = np.multiply(vectors_at(there), query, dtype=np.float64)
    scores = np.add.reduce(products, axis=1).astype(np.float32)
    names = ids[there]
    order = np.lexsort((names, -scores))
    last = farthest = -np.inf
    if len(there) == len(slots):
        farthest = scores[order[-1]]
    order = order[:k]
    if len(order) == min(k, len(slots)):
        best, named = scores[order][None], names[order][None]
        last = best[0, -1]
    else:
        best = np.full((1, min(k, len(slots))), -np.inf, np.float32)
        named = np.full(best.shape, -1, np.int64)
        best[0, : len(order)], named[0, : len(order)] = scores[order], names[order]
    if rough_floor is None:
        settled = farthest < last
    else:
        settled = rough_floor[0] == -np.inf or last > rough_floor[0] + ROUGH_ERROR
    return Ranked(named, best, np.array([settled]))


def nearest_roughly(
    queries: Vectors, slots: NDArray[np.int64], *, keep: int, vectors_at: VectorsAt
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The candidates with the highest float32 scores (Q, keep), and the highest score of the others (Q,).

    float32 products of BLAS take a fraction of the time of the true scores, which only these few then get.
    """
    near = np.empty((len(queries), keep), np.int64)
    dropped = np.empty(len(queries), np.float32)
    block = max(1, MULTIPLY_LIMIT // (slots.shape[1] * queries.shape[1]))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        some = slots[part]
        rows = vectors_at(np.maximum(some, 0).ravel()).reshape(*some.shape, -1)
        scores = np.matmul(rows, queries[part, :, None])[:, :, 0]
        scores[some < 0] = -np.inf
        order = np.argpartition(scores, scores.shape[1] - keep - 1, axis=1)
        near[part] = np.take_along_axis(some, order[:, -keep:], axis=1)
        dropped[part] = np.take_along_axis(scores, order[:, :-keep], axis=1).max(axis=1)
    return near, dropped


def true_scores(queries: Vectors, slots: NDArray[np.int64], vectors_at: VectorsAt) -> Vectors:
    """(Q, F) inner products summed in float64, row by row: the same for the same pair wherever it stands.

    BLAS sums in an order that depends on the place in the matrix, so equal vectors can differ in the last
    digit there.
    """
    queries_count, fetched = slots.shape
    scores = np.full(slots.shape, -np.inf, np.float32)
    block = max(1, MULTIPLY_LIMIT // max(1, fetched * queries.shape[1]))
    whole = slots.size and slots.min() >= 0 and fetched * queries.shape[1] <= MULTIPLY_LIMIT
    for start in range(0, queries_count, block):
        part = slice(start, start + block)
        if whole:  # no index arrays, no copies of the queries
            rows = vectors_at(slots[part].ravel()).reshape(*slots[part].shape, -1)
            products = np.multiply(rows, queries[part, None], dtype=np.float64)
            scores[part] = products.sum(axis=2)
            continue
        row, column = np.nonzero(slots[part] >= 0)
        step = max(1, MULTIPLY_LIMIT // queries.shape[1])
        for first in range(0, len(row), step):
            r, c = row[first : first + step], column[first : first + step]
            products = np.multiply(vectors_at(slots[part][r, c]), queries[part][r], dtype=np.float64)
            scores[start + r, c] = products.sum(axis=1)
    return scores
