"""How a search is answered in one state of a collection: filters, thresholds, groups, and how exact it is.

The planner counts what the filter lets pass. Everything: the filter is left out. Few: all of them are
compared, so the answer is exact whatever the index. Many: an approximate index is asked for more than is
wanted, with as much more effort, what does not pass is dropped, and the search looks further until enough is
left; what passes nowhere near the query is compared after all. So recall does not suffer when what passes has
to do with where the query is, and the answer says that it is approximate.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.collection import catalog as sql
from dml.collection.base import Hit, Item, SearchResult
from dml.collection.filters import EVERYTHING, Condition, Filter, Scalar, canonical, parse_filter, steps_of
from dml.collection.generation import Generation
from dml.collection.known_items import KnownItems
from dml.collection.row_sets import RowSets
from dml.errors import FilterInvalid, UsageError
from dml.index.base import Hits, Ids, Vectors, no_hits
from dml.stages import stage

FEW = 10_000
FEW_SHARE = 0.03
"""Up to so many items that pass, or this share of all, every one of them is compared: about as quick by then
as looking through an index, and exact."""

MARGINS = (2.0, 8.0)
"""An approximate index is asked for so many times what leaves enough on average, at first and at last."""

DEEPEST = 10_000
"""It is never asked for more than this: then everything that passes is compared."""

EFFORT_GROWTH = 0.75
"""A search that goes t times deeper makes t to this power as much effort. By `python -m eval.speed filters`,
0.5 loses up to 0.024 of recall in HNSW, and 1 takes up to six times as long."""

FIRST_LOOK = 256
"""Results asked for at first where a threshold decides how many there are; then four times as many, …"""

MAX_GROUP_SIZE = 100


@dataclass(frozen=True)
class Query:
    """Everything of a search but its vectors, checked when it is made.

    Raises:
        UsageError: a number out of range. FilterInvalid: a filter or a `group_by` that cannot be read.
    """

    limit: int = 10
    offset: int = 0
    exact: bool = False
    effort: int | None = None
    score_threshold: float | None = None
    exclude: tuple[str, ...] = ()
    with_vector: bool = False
    filter: Filter = EVERYTHING
    group_by: str | None = None
    group_size: int = 1

    def __post_init__(self) -> None:
        if self.limit < 1 or self.offset < 0 or (self.effort is not None and self.effort < 1):
            raise UsageError(
                f"limit and effort must be at least 1 and offset at least 0, "
                f"got limit={self.limit}, offset={self.offset}, effort={self.effort}"
            )
        if not 1 <= self.group_size <= MAX_GROUP_SIZE:
            raise UsageError(f"group_size must be between 1 and {MAX_GROUP_SIZE}, got {self.group_size}")
        if self.group_by is not None:
            try:
                steps_of(self.group_by)
            except FilterInvalid as error:
                raise UsageError(f"group_by: {error.detail}") from None

    @property
    def asks_catalog(self) -> bool:
        """Whether more than the index and what is known of items is needed to answer."""
        return bool(self.filter or self.exclude or self.with_vector or self.group_by is not None)

    def digest(self) -> str:
        """A fingerprint of all that decides, beside the vector, which hits there are and in which order."""
        told = [
            canonical(self.filter),
            repr(None if self.score_threshold is None else float(self.score_threshold)),
            repr(sorted(set(self.exclude))),
            repr((self.group_by, self.group_size)),
        ]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


def read_query(
    *,
    limit: int,
    offset: int,
    exact: bool,
    effort: int | None,
    score_threshold: float | None,
    exclude: Sequence[str],
    with_vector: bool,
    filter: Filter | Mapping[str, Any] | None,
    group_by: str | None,
    group_size: int,
) -> Query:
    """The arguments of `Collection.search` as a query. Raises UsageError, FilterInvalid."""
    return Query(
        limit=limit,
        offset=offset,
        exact=exact,
        effort=effort,
        score_threshold=score_threshold,
        exclude=tuple(exclude),
        with_vector=with_vector,
        filter=parse_filter(filter),
        group_by=group_by,
        group_size=group_size,
    )


NOBODY: Ids = np.empty(0, np.int64)


class Scope(NamedTuple):
    """What the planner decided."""

    allowed: Ids | None  # only these rows; None: all
    hidden: Ids  # not these rows, which the index does not know about
    count: int  # rows that may be returned
    exact: bool  # compare them all
    approximate: bool  # whether a true neighbour may be missing


class Ranking(NamedTuple):
    """Rows that qualify, best first."""

    rows: Ids
    scores: Vectors
    complete: bool  # whether there are no more

    def first(self, count: int) -> "Ranking":
        if len(self.rows) <= count:
            return self
        return Ranking(self.rows[:count], self.scores[:count], self.complete and len(self.rows) <= count)


class Searcher:
    """Answers queries in one state of a collection.

    Args:
        db: a read transaction of the same moment as `state`; None: only what is in memory is asked for, which
            does for `remembered`, and for rankings unless the query `asks_catalog`.
        row_sets: remembers what filters let pass.
        known: remembers items.
        query: how to search; its `limit` and `offset` do not matter to `ranked`.
    """

    def __init__(
        self, db: Any, state: Generation, query: Query, *, row_sets: RowSets, known: KnownItems
    ) -> None:
        self.db, self.state, self.query = db, state, query
        self.row_sets, self.known = row_sets, known
        self.hidden = NOBODY
        if query.exclude:
            hidden = sql.items_by_id(db, query.exclude)
            self.hidden = np.sort(np.array([row for row, _ in hidden.values()], np.int64))
        self.scope = self._scope(query.filter)

    def answer(self, vectors: Vectors) -> list[SearchResult]:
        """One result per row of `vectors` (Q, D)."""
        return self.pages(self.ranked(vectors, self.query.offset + self.query.limit))

    def pages(self, rankings: Sequence[Ranking]) -> list[SearchResult]:
        """The parts of rankings that the query asks for; the rankings go at least that far."""
        shown = self._shown(rankings)
        return self._results(rankings, shown, self.items(rows_of(shown)))

    def remembered(self, rankings: Sequence[Ranking]) -> list[SearchResult] | None:
        """As `pages`, without asking the catalogue; None where it has to be asked."""
        shown = self._shown(rankings)
        with stage("payload"):
            items = self.known.find(rows_of(shown), self.state.sequence)
        return None if items is None else self._results(rankings, shown, items)

    def _shown(self, rankings: Sequence[Ranking]) -> list[Ranking]:
        """The parts of rankings that the query asks for."""
        first, last = self.query.offset, self.query.offset + self.query.limit
        if not first and all(len(ranking.rows) <= last for ranking in rankings):
            return list(rankings)
        return [Ranking(r.rows[first:last], r.scores[first:last], r.complete) for r in rankings]

    def _results(
        self, rankings: Sequence[Ranking], shown: Sequence[Ranking], items: Mapping[int, Item]
    ) -> list[SearchResult]:
        query, sequence, approximate = self.query, self.state.sequence, self.scope.approximate
        results = []
        for whole, ranking in zip(rankings, shown, strict=True):
            hits = hits_of(ranking, items, first_rank=query.offset + 1)
            total, is_exact = self._total(whole)
            results.append(SearchResult(hits, sequence, approximate, total=total, total_is_exact=is_exact))
        return results

    def ranked(self, vectors: Vectors, count: int, *, scope: Scope | None = None) -> list[Ranking]:
        """The best `count` of each query that qualify."""
        scope, threshold = scope or self.scope, self.query.score_threshold
        most = min(count + len(scope.hidden), scope.count + len(scope.hidden))
        if not most:
            return [Ranking(NOBODY, np.empty(0, np.float32), complete=True) for _ in vectors]
        k = most if threshold is None else min(most, max(FIRST_LOOK, len(scope.hidden) + 1))
        while True:
            found = self._nearest(vectors, k, scope)
            enough = threshold is not None and bool((found.scores[:, -1] < threshold).all())
            if k >= most or enough:
                return [self._ranking(ids, scores, count, scope) for ids, scores in zip(*found, strict=True)]
            k = min(4 * k, most)

    def _nearest(self, vectors: Vectors, k: int, scope: Scope) -> Hits:
        """The k nearest rows of a scope."""
        state, effort = self.state, self.query.effort
        if scope.allowed is None or not scope.approximate:
            return state.search(vectors, k, effort=effort, exact=scope.exact, allowed=scope.allowed)
        return self._looked_through(vectors, k, scope.allowed, usual=len(state) / scope.count)

    def _looked_through(self, vectors: Vectors, k: int, allowed: Ids, *, usual: float) -> Hits:
        """The k nearest of many rows: search without the filter, and drop what does not pass.

        Args:
            usual: items per item that passes; around a query there may be more, or fewer.
        """
        hits, pending = no_hits(len(vectors), k), np.arange(len(vectors))
        for margin in MARGINS:
            depth = math.ceil(margin * k * usual)
            if not len(pending) or depth > min(DEEPEST, len(self.state)):
                break
            found = self.state.search(vectors[pending], depth, effort=self._effort(depth / k), exact=False)
            passes = among(found.ids, allowed)
            enough = passes.sum(axis=1) >= k
            order = np.argsort(~passes[enough], axis=1, kind="stable")[:, :k]  # what passes, best first
            done, pending = pending[enough], pending[~enough]
            hits.ids[done] = np.take_along_axis(found.ids[enough], order, axis=1)
            hits.scores[done] = np.take_along_axis(found.scores[enough], order, axis=1)
        if len(pending):
            found = self.state.search(vectors[pending], k, effort=None, exact=True, allowed=allowed)
            hits.ids[pending], hits.scores[pending] = found
        return hits

    def _effort(self, times: float) -> int | None:
        """The effort that finds as large a share of so many times more neighbours."""
        usual = self.query.effort or self.state.main.describe().get("effort")
        return None if usual is None else math.ceil(usual * times**EFFORT_GROWTH)

    def _ranking(self, ids: Ids, scores: Vectors, count: int, scope: Scope) -> Ranking:
        """What of one row of hits qualifies."""
        if self.query.score_threshold is None and not len(scope.hidden) and ids[-1] >= 0:
            # Missing ones would stand last.
            return Ranking(ids, scores, complete=len(ids) >= scope.count).first(count)
        good = ids >= 0
        complete = len(ids) >= scope.count + len(scope.hidden)
        if self.query.score_threshold is not None:
            good &= scores >= self.query.score_threshold
            complete = complete or not good.all()
        if len(scope.hidden):
            good &= ~np.isin(ids, scope.hidden)
        return Ranking(ids[good], scores[good], complete).first(count)

    def _total(self, ranking: Ranking) -> tuple[int, bool]:
        """How many items qualify, and whether these are all or only those seen so far."""
        if self.query.score_threshold is None:
            return self.scope.count, True
        return len(ranking.rows), ranking.complete and not self.scope.approximate

    # Planning

    def narrowed(self, condition: Condition) -> Scope:
        """The scope of the query's filter and one more condition."""
        filters = (self.query.filter, condition) if self.query.filter else (condition,)
        return self._scope(Filter(must=filters))

    def _scope(self, filter: Filter) -> Scope:
        """Among which rows to search, and how."""
        state, exact, hidden = self.state, self.query.exact, self.hidden
        if not filter:
            approximate = state.approximate and not exact
            return Scope(None, hidden, len(state) - len(hidden), exact=exact, approximate=approximate)
        allowed = self.row_sets.rows(self.db, filter)
        if len(allowed) == len(state):
            return self._scope(EVERYTHING)
        if len(hidden):
            allowed = np.setdiff1d(allowed, hidden, assume_unique=True)
        exact = exact or len(allowed) <= max(FEW, FEW_SHARE * len(state))
        approximate = state.approximate and not exact
        return Scope(allowed, NOBODY, len(allowed), exact=exact, approximate=approximate)

    # Items

    def items(self, rows: Collection[int]) -> dict[int, Item]:
        """row -> item, with its vector where the query wants it."""
        with stage("payload"):
            items = self.known.read(self.db, rows, self.state.sequence)
            if self.query.with_vector:
                stored = sql.vectors_of(self.db, rows)
                items = {row: item._replace(vector=stored[row]) for row, item in items.items()}
            return items


def hits_of(
    ranking: Ranking, items: Mapping[int, Item], *, first_rank: int, group: Scalar | None = None
) -> list[Hit]:
    """A ranking as hits. `items`: row -> item, for all of its rows."""
    hits, scores = [], ranking.scores.tolist()
    if scores and (scores[0] > 1.0 or scores[-1] < -1.0):  # by a last digit
        scores = [max(-1.0, min(score, 1.0)) for score in scores]
    for rank, (row, score) in enumerate(zip(ranking.rows.tolist(), scores, strict=True), first_rank):
        item = items[row]
        hits.append(Hit(item.id, score, rank, item, group))
    return hits


def rows_of(rankings: Sequence[Ranking]) -> set[int]:
    """All rows of some rankings."""
    return {row for ranking in rankings for row in ranking.rows.tolist()}


def among(ids: Ids, allowed: Ids) -> NDArray[np.bool_]:
    """Which of the ids are among the ascending `allowed`, of which there is at least one."""
    place = np.searchsorted(allowed, ids)
    return allowed[np.minimum(place, len(allowed) - 1)] == ids
