"""How good is a retrieval? Recall@K, MAP@R, R-Precision, NMI and their intervals, on plain arrays.

Every figure here follows four rules:

- Similarity is the cosine; rows are brought to unit length first (a row of zeros stays zero: similarity 0 to
  everything).
- A query never finds itself. "Itself" means *the same id*, not the first hit: an exact duplicate under
  another id is a legitimate result, and a query that is not its own first hit is still left out.
- Equal similarities are ordered by position in the gallery: figures are repeatable and labels play no part.
- A query without a relevant item in the gallery has no rank to measure: it is left out of every mean and
  counted.

Nothing here holds a queries x gallery matrix: similarities are made in blocks of rows, so 120,000 x 512
against itself stays within 1 GB.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dml.errors import DataError, MissingExtra, VectorError

BLOCK_BYTES = 128 * 2**20
"""Memory for one block of similarities and what is made of it."""
SAMPLED_DEPTH = 192
"""From so many wanted results on, a bound is estimated on some columns instead of found on all of them."""

Labels = Sequence[Any] | NDArray[Any]
"""One class per row, of any hashable kind. None: no class known, relevant to nothing."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Neighbours(NamedTuple):
    """The k nearest gallery rows of every query, best first."""

    positions: Ints  # (Q, k) rows of the gallery; -1 where there is no result
    scores: NDArray[np.float32]  # (Q, k) cosine similarity; -inf where there is no result


class Interval(NamedTuple):
    """Where a mean lies with the asked confidence."""

    low: float
    high: float


@dataclass(frozen=True)
class RetrievalMetrics:
    """The figures of one evaluation, and what they were for every query.

    Means are over the counted queries, each with equal weight, and lie in [0, 1]. Arrays have one entry per
    query given; skipped queries have 0 in `first_hit` and `relevant` and NaN in the others.
    """

    recall: dict[int, float]  # K -> share of queries with a relevant item among the K nearest
    map_at_r: float
    r_precision: float
    queries: int  # counted
    skipped: int  # without a relevant item in the gallery
    gallery: int
    relevant: Ints  # (Q,) R: relevant gallery items of each query, its own id not counted
    first_hit: Ints  # (Q,) rank of the nearest relevant item, from 1
    average_precision: Floats  # (Q,) AP@R, its mean is MAP@R
    precision_at_r: Floats  # (Q,) its mean is R-Precision

    @property
    def counted(self) -> NDArray[np.bool_]:
        """(Q,) which queries the means are made of."""
        return self.relevant > 0

    def hit(self, k: int) -> Floats:
        """(Q,) 1 where a relevant item is among the k nearest, else 0; NaN for skipped queries."""
        return np.where(self.counted, (self.first_hit <= k).astype(np.float64), np.nan)

    def per_query(self) -> dict[str, Floats]:
        """Name of every figure -> its value for each query (Q,); the figure is their mean, NaN left out."""
        recalls = {f"recall@{k}": self.hit(k) for k in self.recall}
        return {**recalls, "map@r": self.average_precision, "r_precision": self.precision_at_r}

    def figures(self) -> dict[str, float]:
        """Name of every figure -> its value: "recall@1", …, "map@r", "r_precision"."""
        recalls = {f"recall@{k}": value for k, value in self.recall.items()}
        return {**recalls, "map@r": self.map_at_r, "r_precision": self.r_precision}


def retrieval_metrics(
    embeddings: ArrayLike,
    labels: Labels,
    *,
    ids: Labels | None = None,
    gallery: ArrayLike | None = None,
    gallery_labels: Labels | None = None,
    gallery_ids: Labels | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    block: int | None = None,
) -> RetrievalMetrics:
    """Search every query in the gallery and measure what comes first.

    With R the number of relevant items of a query (same label, other id), rel_i = 1 when the i-th result is
    relevant and P@i the share of relevant ones among the first i::

        Recall@K    = 1 if any of rel_1 … rel_K, else 0
        R-Precision = 1/R Σ_{i ≤ R} rel_i
        MAP@R       = 1/R Σ_{i ≤ R} P@i · rel_i

    each averaged over queries (Musgrave et al., "A Metric Learning Reality Check", ECCV 2020).

    Args:
        embeddings: (Q, D) queries.
        labels: (Q,) their classes.
        ids: (Q,) who they are; without a gallery each row is its own by default.
        gallery: (N, D) where to search; None: among the queries themselves.
        gallery_labels: (N,) classes of the gallery, required with one.
        gallery_ids: (N,) ids of the gallery; a query never finds its own id. Without ids on both sides of a
            separate gallery nothing is left out.
        ks: the K of Recall@K; any size, the cost does not depend on it.
        block: query rows at once; None: as many as fit `BLOCK_BYTES`.

    Raises:
        DataError: when no query has a relevant item in the gallery.
        VectorError: for NaN, infinities, or lengths D that differ.
        ValueError: when rows and labels or ids differ in number, or a K is below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"every K of Recall@K must be at least 1, got {tuple(ks)}")
    queries = _unit_rows(embeddings, "the queries")
    if gallery is None:
        if gallery_labels is not None or gallery_ids is not None:
            raise ValueError("gallery_labels and gallery_ids belong to a gallery, and none was given")
        ids = np.arange(len(queries)) if ids is None else ids
        targets, gallery_labels, gallery_ids = queries, labels, ids
    else:
        targets = _unit_rows(gallery, "the gallery")
        if gallery_labels is None:
            raise ValueError("a separate gallery needs gallery_labels")
    _check_counts(queries, targets, labels, gallery_labels, ids, gallery_ids)
    own = _Own(ids, gallery_ids)
    classes = _Classes(labels, gallery_labels, own)
    if not (classes.relevant > 0).any():
        raise DataError(
            f"Nothing to measure: none of the {len(queries)} queries has another item of its class among the "
            f"{len(targets)} of the gallery. Give at least two images of a class."
        )
    return _measure(queries, targets, classes, own, ks=ks, block=block)


def recall_at_k(
    embeddings: ArrayLike, labels: Labels, k: Sequence[int] = (1, 2, 4, 8), **options: Any
) -> dict[int, float]:
    """K -> Recall@K in [0, 1]. Options and errors: `retrieval_metrics`, which gives all figures at once."""
    return retrieval_metrics(embeddings, labels, ks=k, **options).recall


def map_at_r(embeddings: ArrayLike, labels: Labels, **options: Any) -> float:
    """MAP@R in [0, 1]. Options and errors: `retrieval_metrics`, which gives all figures at once."""
    return retrieval_metrics(embeddings, labels, **options).map_at_r


def r_precision(embeddings: ArrayLike, labels: Labels, **options: Any) -> float:
    """R-Precision in [0, 1]. Options and errors: `retrieval_metrics`, which gives all figures at once."""
    return retrieval_metrics(embeddings, labels, **options).r_precision


def precisions_at_r(hits: NDArray[np.bool_], relevant: NDArray[np.integer]) -> tuple[Floats, Floats]:
    """AP@R and precision at R of rows of results, best first.

    Args:
        hits: (Q, k) whether the i-th result is relevant; k at least as large as every entry of `relevant`.
        relevant: (Q,) R of each query, at least 1.

    Returns:
        (Q,) 1/R Σ_{i ≤ R} P@i · rel_i, and (Q,) 1/R Σ_{i ≤ R} rel_i.
    """
    ranks = np.arange(1, hits.shape[1] + 1)
    counted = hits & (ranks <= relevant[:, None])
    found = np.cumsum(counted, axis=1, dtype=np.int32)
    average = np.einsum("qk,qk->q", found / ranks, counted)
    return average / relevant, found[:, -1] / relevant


def neighbours(
    queries: ArrayLike,
    gallery: ArrayLike,
    k: int,
    *,
    query_ids: Labels | None = None,
    gallery_ids: Labels | None = None,
    block: int | None = None,
) -> Neighbours:
    """The k nearest gallery rows of every query by exact search, never the query's own id.

    Args:
        queries: (Q, D).
        gallery: (N, D).
        k: how many; where the gallery has fewer, positions end in -1 and scores in -inf.
        query_ids: (Q,) and gallery_ids: (N,): a row of the gallery with the query's id is left out.
        block: query rows at once; None: as many as fit `BLOCK_BYTES`.

    Raises:
        VectorError: for NaN, infinities, or lengths D that differ.
        ValueError: for k below 1, or ids that do not fit the rows.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    rows = _unit_rows(queries, "the queries")
    targets = rows if gallery is queries else _unit_rows(gallery, "the gallery")
    _check_counts(rows, targets, None, None, query_ids, gallery_ids)
    own = _Own(query_ids, gallery_ids)
    positions = np.full((len(rows), k), -1, np.int64)
    scores = np.full((len(rows), k), -np.inf, np.float32)
    depth = min(k, len(targets))

    def select(similarity: NDArray[np.float32], chosen: Ints) -> None:
        positions[chosen, :depth], scores[chosen, :depth] = _best(similarity, depth)

    if depth:
        for chosen, similarity in _blocks(rows, targets, np.arange(len(rows)), own, _Height(block, depth)):
            _in_threads(select, similarity, chosen)
    return Neighbours(positions, scores)


def bootstrap_interval(
    values: ArrayLike,
    seed: int | np.random.Generator = 0,
    *,
    groups: Labels | None = None,
    level: float = 0.95,
    resamples: int = 1000,
) -> Interval:
    """Percentile bootstrap interval of the mean of `values`.

    Queries of one class succeed and fail together. Where the classes themselves are a sample (the open-set
    protocol), resampling single queries would pretend to know more than is known: give the classes as
    `groups`, and whole classes are resampled.

    Args:
        values: (N,) one figure per query; NaN entries (skipped queries) are left out.
        seed: or a generator, which moves on.
        groups: (N,) the class of each query; None: queries are resampled.
        level: confidence, between 0 and 1.
        resamples: how many times to draw.

    Raises:
        ValueError: for no values, or a level outside (0, 1).
    """
    given = np.asarray(values, dtype=np.float64).ravel()
    kept = ~np.isnan(given)
    if not kept.any():
        raise ValueError("an interval needs at least one value")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    rng = np.random.default_rng(seed)
    if groups is None:
        sums, sizes = given[kept], np.ones(int(kept.sum()))
    else:
        codes = _codes(groups)[0][kept]
        _, codes = np.unique(codes, return_inverse=True)
        sums, sizes = np.bincount(codes, given[kept]), np.bincount(codes).astype(np.float64)
    units = len(sums)
    means = np.empty(resamples)
    step = max(1, 4_000_000 // units)  # draws at once: bounded memory, few Python turns
    for start in range(0, resamples, step):
        drawn = rng.integers(units, size=(min(step, resamples - start), units))
        means[start : start + len(drawn)] = sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def nmi(embeddings: ArrayLike, labels: Labels, *, seed: int | np.random.Generator = 0) -> float:
    """Normalised mutual information in [0, 1] between the classes and a clustering into as many clusters.

    The clustering is `spherical_kmeans` (rows without a label are left out). It depends on the seed; read it
    beside MAP@R and not instead of it.
    """
    rows, codes = _unit_rows(embeddings, "the embeddings"), _codes(labels)[0]
    if len(rows) != len(codes):
        raise ValueError(f"expected as many labels as rows, got {len(rows)} rows and {len(codes)} labels")
    known = codes >= 0
    clusters = spherical_kmeans(rows[known], len(np.unique(codes[known])), seed=seed)
    return mutual_information(codes[known], clusters)


def mutual_information(first: Labels, second: Labels) -> float:
    """Normalised mutual information of two labellings of the same rows, in [0, 1].

    ``2 I(A; B) / (H(A) + H(B))``, natural logarithm; 1 when both have a single class each.
    """
    a, b = _codes(first)[0], _codes(second)[0]
    if len(a) != len(b) or not len(a):
        raise ValueError(f"expected two labellings of the same rows, got {len(a)} and {len(b)}")
    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)

    def entropy(codes: Ints) -> float:
        share = np.unique(codes, return_counts=True)[1] / len(codes)
        return float(-(share * np.log(share)).sum())

    of_a, of_b, of_both = entropy(a), entropy(b), entropy(a * (b.max() + 1) + b)
    if of_a + of_b == 0:
        return 1.0
    return float(np.clip(2 * (of_a + of_b - of_both) / (of_a + of_b), 0, 1))


def cluster_accuracy(labels: Labels, clusters: Labels) -> float:
    """Share of rows whose cluster stands for their class, under the best one-to-one match of the two.

    Raises:
        MissingExtra: without scipy (it solves the assignment).
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError:
        raise MissingExtra("scipy, which cluster_accuracy needs,", "train") from None
    a, b = _codes(labels)[0], _codes(clusters)[0]
    if len(a) != len(b) or not len(a):
        raise ValueError(f"expected one cluster per label, got {len(a)} labels and {len(b)} clusters")
    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)
    together = np.bincount(a * (b.max() + 1) + b, minlength=(a.max() + 1) * (b.max() + 1))
    together = together.reshape(a.max() + 1, b.max() + 1)
    rows, columns = linear_sum_assignment(together, maximize=True)
    return float(together[rows, columns].sum() / len(a))


def spherical_kmeans(
    embeddings: ArrayLike, clusters: int, *, seed: int | np.random.Generator = 0, iterations: int = 50
) -> Ints:
    """(N,) the cluster of each row by k-means on the unit sphere.

    Centres are unit means; rows go to the centre of highest cosine. The start is k-means++ up to 1,000
    clusters and random rows above, where choosing one after another would take longer than the clustering. A
    cluster that loses its last row restarts at the row that fits its own centre worst. Stops when no row
    moves.

    Raises:
        ValueError: for fewer rows than clusters, or fewer than one cluster.
    """
    rows = _unit_rows(embeddings, "the embeddings")
    if not 1 <= clusters <= len(rows):
        raise ValueError(f"clusters must be between 1 and the number of rows {len(rows)}, got {clusters}")
    rng = np.random.default_rng(seed)
    centres = _first_centres(rows, clusters, rng)
    assigned = np.full(len(rows), -1, np.int64)
    height = _Height(None, 1).rows(clusters)
    for _ in range(iterations):
        moved, sums, fit = False, np.zeros_like(centres), np.empty(len(rows), np.float32)
        for start in range(0, len(rows), height):
            part = rows[start : start + height]
            similarity = part @ centres.T
            nearest = similarity.argmax(axis=1)
            fit[start : start + height] = similarity[np.arange(len(part)), nearest]
            moved |= bool((nearest != assigned[start : start + height]).any())
            assigned[start : start + height] = nearest
            by_cluster = np.argsort(nearest, kind="stable")
            present, first = np.unique(nearest[by_cluster], return_index=True)
            sums[present] += np.add.reduceat(part[by_cluster], first, axis=0)
        if not moved:
            break
        empty = np.setdiff1d(np.arange(clusters), assigned)
        sums[empty] = rows[np.argsort(fit, kind="stable")[: len(empty)]]
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return assigned


def _first_centres(rows: NDArray[np.float32], clusters: int, rng: np.random.Generator) -> NDArray[np.float32]:
    if clusters > 1000:
        return rows[rng.choice(len(rows), clusters, replace=False)]
    chosen = [int(rng.integers(len(rows)))]
    distance = 1 - rows @ rows[chosen[0]]  # half the squared Euclidean distance of unit vectors
    while len(chosen) < clusters:
        weight = np.maximum(distance, 0, dtype=np.float64)
        weight[chosen] = 0
        total = weight.sum()
        free = np.setdiff1d(np.arange(len(rows)), chosen) if total == 0 else None
        chosen.append(int(rng.choice(len(rows), p=weight / total) if free is None else rng.choice(free)))
        distance = np.minimum(distance, 1 - rows @ rows[chosen[-1]])
    return rows[chosen]


def _measure(
    queries: NDArray[np.float32],
    targets: NDArray[np.float32],
    classes: "_Classes",
    own: "_Own",
    *,
    ks: Sequence[int],
    block: int | None,
) -> RetrievalMetrics:
    relevant = classes.relevant
    first_hit = np.zeros(len(queries), np.int64)
    average = np.full(len(queries), np.nan)
    precision = np.full(len(queries), np.nan)

    def score(similarity: NDArray[np.float32], chosen: Ints) -> None:
        positions, _ = _best(similarity, int(relevant[chosen].max()))
        hits = (classes.of_gallery[positions] == classes.of_queries[chosen, None]) & (positions >= 0)
        average[chosen], precision[chosen] = precisions_at_r(hits, relevant[chosen])
        first_hit[chosen] = hits.argmax(axis=1) + 1
        for row in np.flatnonzero(~hits.any(axis=1)):  # its nearest relevant item lies deeper than was looked
            first_hit[chosen[row]] = _rank_of_best(similarity[row], classes.members(chosen[row]))

    # Queries of like R share a block: a class of thousands must not make every other query look as deep.
    counted = np.flatnonzero(relevant > 0)
    by_depth = counted[np.argsort(relevant[counted], kind="stable")]
    height = _Height(block, int(relevant.max()))
    for chosen, similarity in _blocks(queries, targets, by_depth, own, height):
        _in_threads(score, similarity, chosen)
    found = first_hit[counted]
    return RetrievalMetrics(
        recall={int(k): float((found <= k).mean()) for k in ks},
        map_at_r=float(average[counted].mean()),
        r_precision=float(precision[counted].mean()),
        queries=len(counted),
        skipped=len(queries) - len(counted),
        gallery=len(targets),
        relevant=relevant,
        first_hit=first_hit,
        average_precision=average,
        precision_at_r=precision,
    )


class _Own:
    """Which gallery rows carry the id of a query."""

    def __init__(self, query_ids: Labels | None, gallery_ids: Labels | None) -> None:
        self.known = query_ids is not None and gallery_ids is not None
        if query_ids is None or gallery_ids is None:
            return
        of_queries, of_gallery = _codes(query_ids, gallery_ids)
        self._positions = np.argsort(of_gallery, kind="stable")
        ordered = of_gallery[self._positions]
        self._first = np.searchsorted(ordered, of_queries, side="left")
        self._count = np.searchsorted(ordered, of_queries, side="right") - self._first

    def pairs(self, rows: Ints) -> Iterator[tuple[Ints, Ints]]:
        """(which of `rows`, gallery position) of every own copy; the n-th turn gives everyone's n-th copy."""
        if not self.known:
            return
        for turn in range(int(self._count[rows].max(initial=0))):
            which = np.flatnonzero(self._count[rows] > turn)
            yield which, self._positions[self._first[rows[which]] + turn]


class _Classes:
    """Class codes of both sides, how many relevant items each query has, and where they are."""

    def __init__(self, labels: Labels, gallery_labels: Labels, own: _Own) -> None:
        self.of_queries, self.of_gallery = _codes(labels, gallery_labels)
        size = np.bincount(
            self.of_gallery[self.of_gallery >= 0], minlength=int(self.of_queries.max(initial=0)) + 1
        )
        self.relevant: Ints = np.where(self.of_queries >= 0, size[self.of_queries], 0)
        for which, positions in own.pairs(np.arange(len(self.of_queries))):
            self.relevant[which] -= (self.of_gallery[positions] == self.of_queries[which]) & (
                self.of_queries[which] >= 0
            )
        self._by_class = np.argsort(self.of_gallery, kind="stable")
        self._ordered = self.of_gallery[self._by_class]

    def members(self, query: int) -> Ints:
        """Gallery positions of the query's class, ascending."""
        first, end = np.searchsorted(self._ordered, [self.of_queries[query], self.of_queries[query] + 1])
        return self._by_class[first:end]


@dataclass(frozen=True)
class _Height:
    """How many query rows one block has."""

    given: int | None
    depth: int

    def rows(self, gallery: int) -> int:
        if self.given is not None:
            if self.given < 1:
                raise ValueError(f"block must be at least 1 row, got {self.given}")
            return self.given
        # float32 similarity, bool mask, and per selected item its key, flags and running precision
        return max(1, BLOCK_BYTES // (5 * gallery + 64 * self.depth))


def _blocks(
    queries: NDArray[np.float32], gallery: NDArray[np.float32], rows: Ints, own: _Own, height: _Height
) -> Iterator[tuple[Ints, NDArray[np.float32]]]:
    """Query rows and their similarities to the gallery, own ids at -inf. The next block reuses the array."""
    step = min(height.rows(len(gallery)), max(len(rows), 1))
    space = np.empty((step, len(gallery)), np.float32)
    for start in range(0, len(rows), step):
        chosen = rows[start : start + step]
        similarity = np.matmul(queries[chosen], gallery.T, out=space[: len(chosen)])
        for which, positions in own.pairs(chosen):
            similarity[which, positions] = -np.inf
        yield chosen, similarity


def _in_threads(
    work: Callable[[NDArray[np.float32], Ints], None], similarity: NDArray[np.float32], rows: Ints
) -> None:
    """Give every processor a slice of the rows: BLAS has threads of its own, selecting in numpy has not."""
    workers = _processors()
    if similarity.size < 1_000_000 or workers == 1:
        work(similarity, rows)
        return
    edges = np.linspace(0, len(rows), min(2 * workers, len(rows)) + 1, dtype=int)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda cut: work(similarity[slice(*cut)], rows[slice(*cut)]), pairwise(edges)))


def _processors() -> int:
    """How many this process may use, and not more than OMP_NUM_THREADS grants to BLAS."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    granted = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(usable, int(granted))) if granted.isdigit() else usable


def _best(similarity: NDArray[np.float32], k: int) -> tuple[Ints, NDArray[np.float32]]:
    """Positions and scores of the k largest of each row, ties by position; -1 where the score is -inf.

    Only entries at or above a bound that at least k of the row reach are sorted.
    """
    height, width = similarity.shape
    candidates, counts = _at_least(similarity, k)
    rows = candidates // width
    crowded = counts > 8 * k + 64  # many equal scores, as of a collapsed embedding
    if crowded.any():
        keep = ~crowded[rows]
        candidates, rows, counts = candidates[keep], rows[keep], np.where(crowded, 0, counts)
    keys = np.full((height, max(int(counts.max()), k)), np.iinfo(np.uint64).max, np.uint64)
    place = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    keys[rows, place] = _keys(similarity.reshape(-1)[candidates], candidates - rows * width)
    keys.sort(axis=1)
    keys = keys[:, :k]
    for row in np.flatnonzero(crowded):
        everything = _keys(similarity[row], np.arange(width))
        keys[row] = np.sort(np.partition(everything, k - 1)[:k])
    positions = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    scores = _scores(keys)
    positions[np.isneginf(scores)] = -1
    return positions, scores


def _at_least(similarity: NDArray[np.float32], k: int) -> tuple[Ints, Ints]:
    """Flat places of all entries that reach a bound of their row, in order, and how many each row has (>= k).

    The bound of a small k is the k-th largest of the maxima of interleaved tiles: k tiles reach it, each with
    one entry at least. That of a large k is estimated on an eighth of the columns, drawn at random and a
    little deeper than k / 8; the few rows where less than k entries reach it, and rows too short for either,
    get the k-th largest entry itself.
    """
    height, width = similarity.shape
    depth = width // max(8 * k, min(512, width))  # entries per tile
    if k >= SAMPLED_DEPTH and width >= 2 * k:
        columns = np.sort(np.random.default_rng(0).choice(width, width // 8, replace=False))
        mean = k / 8
        rank = int(mean + 3 * math.sqrt(mean)) + 2
        sample = similarity.take(columns, axis=1)
        bound = np.partition(sample, len(columns) - rank, axis=1)[:, len(columns) - rank]
    elif depth >= 4:
        tiles = width // depth
        maxima = similarity[:, : tiles * depth].reshape(height, depth, tiles).max(axis=1)
        bound = np.partition(maxima, tiles - k, axis=1)[:, tiles - k]
    else:
        bound = np.partition(similarity, width - k, axis=1)[:, width - k]
    reach = similarity >= bound[:, None]
    candidates = np.flatnonzero(reach)
    counts = np.bincount(candidates // width, minlength=height)
    short = np.flatnonzero(counts < k)
    if len(short):
        exact = np.partition(similarity[short], width - k, axis=1)[:, width - k]
        reach[short] = similarity[short] >= exact[:, None]
        candidates = np.flatnonzero(reach)
        counts = np.bincount(candidates // width, minlength=height)
    return candidates, counts


def _keys(scores: NDArray[np.float32], positions: Ints) -> NDArray[np.uint64]:
    """Integers that sort by score, highest first, and then by position: one machine word per entry.

    The bits of an IEEE float order like integers once negative numbers are turned around.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # + 0 makes -0 and 0 one number
    rising = np.where(bits >> 31, ~bits, bits | np.uint32(0x80000000))
    return (~rising).astype(np.uint64) << np.uint64(32) | positions.astype(np.uint64)


def _scores(keys: NDArray[np.uint64]) -> NDArray[np.float32]:
    """The scores that `_keys` was given."""
    rising = ~(keys >> np.uint64(32)).astype(np.uint32)
    return np.where(rising >> 31, rising & np.uint32(0x7FFFFFFF), ~rising).view(np.float32)


def _rank_of_best(similarity: NDArray[np.float32], members: Ints) -> int:
    """Rank, from 1, of the nearest of `members` in a row, in the order of `_best`."""
    scores = similarity[members]
    nearest = members[scores.argmax()]  # the first of equals, as members ascend
    best = similarity[nearest]
    return 1 + int(np.count_nonzero(similarity > best) + np.count_nonzero(similarity[:nearest] == best))


def _unit_rows(vectors: ArrayLike, where: str) -> NDArray[np.float32]:
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    if rows.ndim != 2:
        raise ValueError(f"{where}: expected rows of shape (N, D), got shape {rows.shape}")
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))[:, None]
    if not np.isfinite(norms).all():
        row = int(np.flatnonzero(~np.isfinite(norms[:, 0]))[0])
        raise VectorError(f"{where}: row {row} holds NaN or infinity, or is too long to measure")
    if (np.abs(norms - 1) <= 1e-6).all():
        return rows  # no second copy of what is already right
    return np.divide(rows, np.where(norms > 0, norms, 1), dtype=np.float32)


def _codes(*labellings: Labels) -> list[Ints]:
    """Integers from 0 that are equal where labels are equal, across all the sequences given; -1 for None."""
    arrays = [np.asarray(labels) for labels in labellings]
    if all(array.dtype.kind in "iub" for array in arrays):
        _, codes = np.unique(np.concatenate(arrays), return_inverse=True)
        return np.split(codes.astype(np.int64), np.cumsum([len(a) for a in arrays])[:-1])
    known: dict[Any, int] = {}
    return [
        np.array([-1 if x is None else known.setdefault(x, len(known)) for x in _plain(labels)], np.int64)
        for labels in labellings
    ]


def _plain(labels: Labels) -> Sequence[Any]:
    return labels.tolist() if isinstance(labels, np.ndarray) else labels


def _check_counts(
    queries: NDArray[np.float32],
    gallery: NDArray[np.float32],
    labels: Labels | None,
    gallery_labels: Labels | None,
    ids: Labels | None,
    gallery_ids: Labels | None,
) -> None:
    if queries.shape[1] != gallery.shape[1]:
        raise VectorError(
            f"the queries have {queries.shape[1]} numbers each, the gallery {gallery.shape[1]}: "
            f"they were made by different encoders"
        )
    given = [
        ("labels", labels, queries),
        ("ids", ids, queries),
        ("gallery_labels", gallery_labels, gallery),
        ("gallery_ids", gallery_ids, gallery),
    ]
    for name, values, rows in given:
        if values is not None and len(values) != len(rows):
            raise ValueError(f"expected {len(rows)} {name}, one per row, got {len(values)}")
