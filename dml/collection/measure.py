"""How many true neighbours an index finds, measured with vectors that it has not seen while it was built."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.collection import catalog as sql
from dml.index.base import Ids, VectorIndex, Vectors

QUERIES = 1000
SHARE = 0.1
"""At most this many items, and this share of them, are held out as queries."""

FEWEST = 100
"""With fewer new items than this an earlier measurement says more."""

NEIGHBOURS = 10
SAMPLE = 200_000
"""Vectors that an index may learn from before it is filled."""


class HeldOut(NamedTuple):
    """Rows of the catalogue that are added last, after they have served as queries."""

    rows: Ids
    vectors: Vectors


def all_rows(db: Any) -> Ids:
    return np.array([row for (row,) in db.execute("SELECT row FROM vectors ORDER BY row")], np.int64)


def hold_out(db: Any, count: int, *, seed: int) -> Ids:
    """Rows to be held out, drawn without replacement; none when there are too few to measure anything."""
    queries = min(QUERIES, int(SHARE * count))
    if count - queries < 2 * NEIGHBOURS or not queries:
        return np.empty(0, np.int64)
    return np.sort(np.random.default_rng(seed).choice(all_rows(db), queries, replace=False))


def hold_out_new(db: Any, count: int, *, after: int, seed: int) -> Ids:
    """As `hold_out`, from the rows above `after`; none when those are too few to say anything."""
    found = db.execute("SELECT row FROM vectors WHERE row > ? ORDER BY row", (after,))
    rows = np.array([row for (row,) in found], np.int64)
    queries = min(QUERIES, int(SHARE * count), len(rows))
    if queries < FEWEST:
        return np.empty(0, np.int64)
    return np.sort(np.random.default_rng(seed).choice(rows, queries, replace=False))


def training_sample(db: Any, *, without: Ids, dim: int, seed: int = 0) -> Vectors:
    """Up to `SAMPLE` vectors of the catalogue, drawn without replacement, in the order of their rows."""
    rows: NDArray[np.int64] = np.setdiff1d(all_rows(db), without)
    if not len(rows):
        return np.empty((0, dim), np.float32)
    if len(rows) > SAMPLE:
        rows = np.sort(np.random.default_rng(seed).choice(rows, SAMPLE, replace=False))
    found = sql.vectors_of(db, rows.tolist())
    return np.stack([found[row] for row in rows.tolist()])


def measure_recall(index: VectorIndex, queries: Vectors) -> dict[str, Any] | None:
    """recall@10: the share of the 10 true nearest neighbours that a search with default effort returns.

    A result that is as near as the tenth true neighbour counts, whichever of several equals it is.

    Returns:
        {"recall_at_10", "queries", "held_out"}; an exact index has 1 by construction; None without queries.
    """
    if index.exact:
        return {"recall_at_10": 1.0, "queries": 0, "held_out": True}
    if not len(queries):
        return None
    k = min(NEIGHBOURS, len(index))
    true = index.search(queries, k, exact=True)
    found = index.search(queries, k)
    recall = float((found.scores >= true.scores[:, -1:]).mean())
    return {"recall_at_10": round(recall, 5), "queries": len(queries), "held_out": True}
