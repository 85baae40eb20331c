"""The best items of each of the best groups: hits grouped by a field of their payload."""

from dataclasses import dataclass, field

import numpy as np

from dml.collection import catalog as sql
from dml.collection.base import Hit, SearchResult
from dml.collection.filters import Except, Match, Scalar, steps_of, values_at
from dml.collection.query import Ranking, Scope, Searcher, hits_of
from dml.index.base import Vectors

LOOKS = 2
"""So often a search looks further down before it asks the payloads who is still missing."""


def answer(searcher: Searcher, vectors: Vectors) -> list[SearchResult]:
    """One result per row of `vectors` (Q, D), grouped if the query says so."""
    if searcher.query.group_by is None:
        return searcher.answer(vectors)
    return [Grouping(searcher).answer(vector[None]) for vector in vectors]


@dataclass
class Group:
    """Items with one value, as far as they have been found."""

    value: Scalar
    scores: dict[int, float] = field(default_factory=dict)  # row -> score

    def best(self, size: int) -> Ranking:
        """Its `size` best members, ties by row."""
        order = sorted(self.scores.items(), key=lambda entry: (-entry[1], entry[0]))[:size]
        rows, scores = [row for row, _ in order], [score for _, score in order]
        return Ranking(np.array(rows, np.int64), np.array(scores, np.float32), complete=False)

    @property
    def place(self) -> tuple[float, int]:
        """Groups are ordered by their best item."""
        return min((-score, row) for row, score in self.scores.items())


class Grouping:
    """Fills groups until there are enough, honestly: by looking on until everything has been seen.

    Args:
        searcher: whose query has `group_by`, `group_size`; its `limit` and `offset` count groups.

    An item without a text, number or truth value there is in no group; one with a list of them is in several.
    """

    def __init__(self, searcher: Searcher) -> None:
        if searcher.query.group_by is None:
            raise ValueError("the query has no group_by")
        self.searcher, self.query, self.key = searcher, searcher.query, searcher.query.group_by
        self.groups: dict[tuple[str, Scalar], Group] = {}
        self.approximate = False
        self.all_groups = False  # whether every group there is has been seen

    def answer(self, vector: Vectors) -> SearchResult:
        """The groups of one query (1, D): hits by group, best group first, best item first."""
        query, wanted = self.query, self.query.offset + self.query.limit
        complete = self._look(vector, wanted)
        best = sorted(self.groups.values(), key=lambda group: group.place)[:wanted]
        if not complete:
            self._fill(vector, best)
        shown = [(group.value, group.best(query.group_size)) for group in best[query.offset :]]
        items = self.searcher.items({row for _, ranking in shown for row in ranking.rows.tolist()})
        hits: list[Hit] = []
        for value, ranking in shown:
            hits += hits_of(ranking, items, first_rank=len(hits) + 1, group=value)
        sequence, is_exact = self.searcher.state.sequence, self.all_groups and not self.approximate
        return SearchResult(hits, sequence, self.approximate, total=len(self.groups), total_is_exact=is_exact)

    def _look(self, vector: Vectors, wanted: int) -> bool:
        """Search until there are enough groups; whether every item has been seen on the way."""
        count, scope = 4 * wanted * self.query.group_size, self.searcher.scope
        for _ in range(LOOKS):
            self.all_groups = complete = self._collect(vector, count, scope)
            if complete or self._enough(wanted):
                return complete
            count *= 4
        while len(self.groups) < wanted:
            # Only items with a value that has not been seen: every turn brings at least one more group.
            scope = self.searcher.narrowed(Except(self.key, self._values()))
            self.all_groups = self._collect(vector, count, scope)
            if self.all_groups:
                break
        return False

    def _enough(self, wanted: int) -> bool:
        full = sum(len(group.scores) >= self.query.group_size for group in self.groups.values())
        return full >= wanted

    def _values(self) -> tuple[Scalar, ...]:
        return tuple(group.value for group in self.groups.values())

    def _fill(self, vector: Vectors, groups: list[Group]) -> None:
        """Find further members of the groups that are not full, until they are, or have no more."""
        size = self.query.group_size
        short = [group for group in groups if len(group.scores) < size]
        count = 4 * size * max(1, len(short))
        while short:
            scope = self.searcher.narrowed(Match(self.key, tuple(group.value for group in short)))
            if self._collect(vector, count, scope):
                return
            short = [group for group in short if len(group.scores) < size]
            count *= 4

    def _collect(self, vector: Vectors, count: int, scope: Scope) -> bool:
        """Sort the best `count` items into groups; whether there are no more."""
        [ranking] = self.searcher.ranked(vector, count, scope=scope)
        self.approximate |= scope.approximate
        items = sql.items_by_row(self.searcher.db, ranking.rows.tolist())
        for row, score in zip(ranking.rows.tolist(), ranking.scores.tolist(), strict=True):
            for value in values_at(items[row].payload, steps_of(self.key)):
                if isinstance(value, Scalar):
                    self.groups.setdefault(name_of(value), Group(value)).scores[row] = score
        return ranking.complete


def name_of(value: Scalar) -> tuple[str, Scalar]:
    """What tells groups apart: 1 and 1.0 are the same, true and "1" are not."""
    return ("flag" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"), value
