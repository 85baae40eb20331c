"""How many true neighbours an index finds, measured with vectors that it has not seen while it was built."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.collection import catalog as sql
from dml.index.base import Ids, VectorIndex, Vectors
from dml.index.tune import Asked, Point, asked_of, measure, nearer, unanswered

QUERIES = 1000
SHARE = 0.1
"""At most this many items, and this share of them, are held out as queries."""

FEWEST = 100
"""With fewer new items than this an earlier measurement says more, and so many are asked however long it
takes."""

BATCH = 64
"""Queries that are compared at once. Between two batches other threads get a turn, and one may give up."""

BLOCK = 16_384
"""Vectors that queries are compared with at once."""

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


def measure_recall(
    index: VectorIndex,
    held: HeldOut,
    blocks: Iterable[tuple[Ids, Vectors]],
    *,
    count: int,
    seconds: float = math.inf,
    check: Callable[[], None] = lambda: None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """recall@10: the share of the 10 true nearest neighbours that a search with default effort returns.

    A result that is as near as the tenth true neighbour counts, whichever of several equals it is. What is
    true is decided by the whole vectors, however many bits of them the index keeps.

    Args:
        held: vectors that the index does not hold yet.
        blocks: all vectors of the catalogue; those held out may be among them.
        count: how many vectors there are in the blocks, but those held out.
        seconds: that the comparison with all vectors may take; where it would take longer, fewer of the
            held-out ones serve as queries, down to `FEWEST` drawn at random.
        check: called between batches of queries; may raise to give up.
        seed: of what is drawn.

    Returns:
        {"recall_at_10", "lower" (of 95 %), "latency" (seconds of a single query), "queries" (that were
        asked), "held_out"}; an exact index has 1 by construction; None without queries.
    """
    if index.exact:
        return {"recall_at_10": 1.0, "lower": 1.0, "queries": 0, "held_out": True}
    if not len(held.rows):
        return None
    order = np.random.default_rng(seed).permutation(
        len(held.rows)
    )  # whoever is left out is left out by chance
    asked = asked_within(held.vectors[order], others(held, blocks), count=count, seconds=seconds, check=check)
    point, _ = measure(index, asked, effort=None, check=check, batch=BATCH)
    return described_point(point, len(asked.queries))


def asked_within(
    queries: Vectors,
    blocks: Iterable[tuple[Ids, Vectors]],
    *,
    count: int,
    seconds: float,
    check: Callable[[], None],
) -> Asked:
    """As many of the queries as the time allows, with their true neighbours; see `measure_recall`."""
    asked, left, spent = unanswered(queries), count, 0.0
    for names, rows in blocks:
        started = time.monotonic()
        parts = []
        for start in range(0, len(asked.queries), BATCH):
            check()
            parts.append(nearer(asked.part(slice(start, start + BATCH)), names, rows))
        asked = Asked(*map(np.concatenate, zip(*parts, strict=True)))
        taken = time.monotonic() - started
        spent, left = spent + taken, left - len(rows)
        to_come = taken / max(1, len(rows)) * left  # as long as the queries stay so many
        if to_come > max(0.0, seconds - spent):
            share = max(0.0, seconds - spent) / to_come
            asked = asked.part(slice(max(FEWEST, int(share * len(asked.queries)))))
    return asked


def others(held: HeldOut, blocks: Iterable[tuple[Ids, Vectors]]) -> Iterator[tuple[Ids, Vectors]]:
    """The vectors that are not held out."""
    for rows, vectors in blocks:
        stays = ~np.isin(rows, held.rows)
        yield rows[stays], vectors[stays]


def asked_of_held(held: HeldOut, blocks: Iterable[tuple[Ids, Vectors]]) -> Asked:
    """The held-out vectors as queries, with their true neighbours among all others."""
    return asked_of(held.vectors, others(held, blocks))


def described_point(point: Point, queries: int) -> dict[str, Any]:
    """What was measured, as snapshots and manifests keep it."""
    return {
        "recall_at_10": point.recall,
        "lower": point.lower,
        "latency": round(point.latency, 6),
        "queries": queries,
        "held_out": True,
    }
