"""The cheapest index that keeps a promise of recall: tried on a sample, with queries it has not seen.

Recall@10 is the share of the ten true nearest neighbours, by whole vectors, that a search returns. A promise
counts as kept when the **lower 95 % bound** of the mean over the queries reaches it. One set of queries tunes
the effort, another scores what was tuned: an effort chosen until some queries are content says too much about
these queries.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.errors import ConfigError, MissingExtra
from dml.index.base import Ids, VectorIndex, Vectors
from dml.index.flat import search_exactly

log = logging.getLogger(__name__)

NEIGHBOURS = 10
DEPTH = 50
"""True neighbours that are known per query: a found one may be as near as the tenth and stand behind it."""

QUERIES = 1_000
"""Of each of the two sets, where there are vectors enough."""

QUERY_SHARE = 0.1
"""Each set takes at most this share of the vectors."""

FEWEST_QUERIES = 50
"""With fewer in a set nothing approximate is promised."""

SAMPLE_ROWS = 50_000
"""Vectors that kinds are tried on."""

SAME = 1e-6
"""Scores that differ by less from a vector's with itself are those of a copy."""

SURE, VERY_SURE = 1.645, 3.09
"""Standard errors: one-sided 95 % for a promise; 99.9 % while tuning, so that fresh queries agree."""

CELLS_FROM = 20_000
"""From so many vectors on, cells are worth trying."""

MOST_SECONDS = 1.0
"""A single query over the sample that takes longer is hopeless whatever it finds."""

LEAST_GAIN = 5e-4
"""Recall that four times the effort must bring, to go on."""

FREE_STEPS = 6

PROBED = 2_000
"""Vectors that tell how much memory one takes."""

TIMED_QUERIES = 50
FINENESS = 1.1
"""The effort is found to within this factor."""


@dataclass(frozen=True)
class Promise:
    """What an index shall do."""

    recall: float
    """recall@10, above 0 and up to 1; 1 means exact search."""
    memory: int | None = None
    """Bytes of the whole index, at most."""
    latency: float | None = None
    """Seconds of a single query, the median, at most."""

    def __post_init__(self) -> None:
        if not 0 < self.recall <= 1:
            raise ConfigError(f"the target recall lies above 0 and up to 1, got {self.recall}")
        for name, value in (("memory", self.memory), ("latency", self.latency)):
            if value is not None and value <= 0:
                raise ConfigError(f"the limit of {name} must be above 0, got {value}")


@dataclass(frozen=True)
class Point:
    """One effort, measured."""

    effort: int
    recall: float
    lower: float
    """The lower 95 % bound of the recall."""
    latency: float
    """Seconds, median of single queries."""


@dataclass(frozen=True)
class Trial:
    """One kind of index with its options, tried."""

    name: str
    kind: str
    options: dict[str, Any]
    point: Point | None = None
    """With the effort that was chosen, by the scoring queries; None: never reached the target."""
    curve: list[Point] = field(default_factory=list)
    """The efforts that were tried, by the tuning queries."""
    memory: int = 0
    """Bytes, reckoned for all vectors."""
    build_seconds: float = 0.0
    """Over the sample."""
    predicted_latency: float = 0.0
    """Seconds of a single query over all vectors, reckoned from the sample."""
    problem: str = ""
    """Why it is not chosen; "" when it could be."""
    on_front: bool = False
    """No other is at least as good in recall, latency and memory and better in one."""


class Choice(NamedTuple):
    """What was decided, and on what grounds."""

    kind: str
    options: dict[str, Any]
    ranking: list[Trial]
    """Those that keep the promise, cheapest first; the exact ones come last."""
    table: dict[str, Any]
    """For manifests: the promise, the queries, and all trials."""


class Asked(NamedTuple):
    """Queries and their true neighbours."""

    queries: Vectors
    true_ids: Ids  # (Q, DEPTH)
    true_scores: Vectors  # (Q, DEPTH)

    def part(self, which: NDArray[Any] | slice) -> "Asked":
        """Some of the queries."""
        return Asked(self.queries[which], self.true_ids[which], self.true_scores[which])


@dataclass(frozen=True)
class Plan:
    """A kind to try: name in tables, kind, options, and the efforts between which the right one is sought."""

    name: str
    kind: str
    options: dict[str, Any]
    efforts: tuple[int, int] = (1, 1)
    growth: float = 1.0
    """Latency grows with the number of vectors to this power."""


def plans(count: int, dim: int) -> list[Plan]:
    """What is worth trying for so many vectors of this length."""
    found = [
        Plan("flat, float32", "faiss_flat", {}),
        Plan("flat, float16", "faiss_flat", {"precision": "float16"}),
        Plan("flat, int8", "faiss_flat", {"precision": "int8"}),
        Plan("PQ, float16", "pq", {"precision": "float16"}, (2, 256)),
        Plan("PQ, int8", "pq", {"precision": "int8"}, (2, 256)),
        Plan("RaBitQ, float16", "rabitq", {"precision": "float16"}, (4, 512)),
    ]
    for links in (16, 32):
        for precision in ("float32", "int12", "int8"):
            options = {"links": links, "precision": precision}
            found.append(Plan(f"HNSW{links}, {precision}", "hnsw", options, (8, 2048), growth=0.15))
    if count >= CELLS_FROM:
        found += [
            Plan("IVF, float32", "ivf", {}, (1, 1024), growth=0.6),
            Plan(
                "IVF-int8, float16", "ivf", {"codes": "int8", "precision": "float16"}, (1, 1024), growth=0.6
            ),
        ]
        for codes in ("pq", "rabitq"):
            options = {"codes": codes, "precision": "float16", "refine": 24}
            found.append(Plan(f"IVF-{codes}, float16", "ivf", options, (1, 1024), growth=0.6))
    return found


def choose(
    vectors: Vectors,
    promise: Promise,
    *,
    count: int | None = None,
    device: str = "auto",
    seed: int = 0,
    plans_to_try: Sequence[Plan] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Try the plausible kinds on these vectors and rank those that keep the promise, cheapest first.

    The cheapest is the one with the lowest latency of a single query, reckoned for all vectors; where two are
    within a tenth of each other, the smaller. A vector that occurs more than once is no query: its copies
    would be found for nothing.

    Args:
        vectors: (N, D) unit rows; more than `SAMPLE_ROWS` and two sets of queries are sampled.
        count: vectors that the index will hold; None: N. Memory and latency are reckoned for so many.
        device: see `make_index`.
        say: is told what is being tried.

    Raises:
        ConfigError: nothing keeps the promise, with what came nearest.
    """
    count = len(vectors) if count is None else count
    rows, tuning, scoring = split(vectors, seed=seed)
    tried: list[Trial] = []
    enough = min(len(tuning.queries), len(scoring.queries)) >= FEWEST_QUERIES and promise.recall < 1
    for plan in plans(count, vectors.shape[1]) if plans_to_try is None else plans_to_try:
        say(plan.name)
        trial = try_plan(
            plan,
            promise,
            rows=vectors[rows],
            tuning=tuning,
            scoring=scoring,
            count=count,
            device=device,
            only_exact=not enough,
        )
        log.info("%s: %s", plan.name, trial.problem or trial.point)
        tried.append(trial)
    tried = with_front(tried)
    table = {
        "promise": asdict(promise),
        "sample": len(rows),
        "queries": {"tuning": len(tuning.queries), "scoring": len(scoring.queries)},
        "trials": [asdict(trial) for trial in tried],
    }
    ranking = ranked(tried)
    if not ranking:
        raise ConfigError(nothing_keeps(promise, tried))
    table["chosen"] = ranking[0].name
    options = dict(ranking[0].options)
    return Choice(ranking[0].kind, options, ranking, table)


def split(vectors: Vectors, *, seed: int) -> tuple[NDArray[np.int64], Asked, Asked]:
    """(rows to index, tuning queries, scoring queries), all apart; without queries that have a copy."""
    each = min(QUERIES, int(QUERY_SHARE * len(vectors)))
    order = np.random.default_rng(seed).permutation(len(vectors))[: SAMPLE_ROWS + 2 * each]
    rows = np.sort(order[2 * each :])
    blocks = [(np.arange(len(rows)), vectors[rows])]
    sets = [asked_of(vectors[part], blocks) for part in (order[:each], order[each : 2 * each])]
    return rows, without_copies(sets[0]), without_copies(sets[1])


def without_copies(asked: Asked) -> Asked:
    """The queries whose nearest neighbour is not the same vector: that would be found for nothing."""
    own = np.einsum("ij,ij->i", asked.queries, asked.queries, dtype=np.float64)
    return asked.part(asked.true_scores[:, 0] < own - SAME)


def asked_of(queries: Vectors, blocks: Iterable[tuple[Ids, Vectors]]) -> Asked:
    """Queries with their `DEPTH` true neighbours among whole vectors, which come in blocks of (ids, rows)."""
    asked = unanswered(queries)
    for names, rows in blocks:
        asked = nearer(asked, names, rows)
    return asked


def unanswered(queries: Vectors) -> Asked:
    """Queries of which no neighbours are known yet."""
    shape = (len(queries), DEPTH)
    return Asked(queries, np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32))


def nearer(asked: Asked, names: Ids, rows: Vectors) -> Asked:
    """With the true neighbours among a further block of vectors."""
    if not len(rows) or not len(asked.queries):
        return asked
    found = search_exactly(asked.queries, rows, names, k=min(DEPTH, len(rows)))
    ids = np.hstack([asked.true_ids, found.ids])
    scores = np.hstack([asked.true_scores, found.scores])
    order = np.lexsort((ids, -scores), axis=-1)[:, :DEPTH]
    return Asked(
        asked.queries, np.take_along_axis(ids, order, axis=1), np.take_along_axis(scores, order, axis=1)
    )


def recalls(asked: Asked, found: Ids) -> NDArray[np.float64]:
    """(Q,) recall@10 of each query. What is as near as the tenth true neighbour counts, whichever it is."""
    wanted = np.minimum(NEIGHBOURS, (asked.true_ids >= 0).sum(axis=1))
    tenth = np.take_along_axis(asked.true_scores, np.maximum(wanted - 1, 0)[:, None], axis=1)
    near = np.where(asked.true_scores >= tenth, asked.true_ids, -2)
    right = (found[:, :, None] == near[:, None, :]).any(axis=2).sum(axis=1)
    return np.minimum(right, wanted) / np.maximum(wanted, 1)


def lower_bound(values: NDArray[np.float64], errors: float = SURE) -> float:
    """What the mean lies above, `errors` standard errors below that of the sample.

    A query that fails altogether is added: a thousand that succeed are no proof that none ever fails.
    """
    values = np.append(values, 0.0)
    return float(max(0.0, values.mean() - errors * values.std(ddof=1) / math.sqrt(len(values))))


def measure(
    index: VectorIndex,
    asked: Asked,
    *,
    effort: int | None,
    batch: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Point, NDArray[np.float64]]:
    """Recall over all queries, and the median time of single ones.

    Args:
        batch: so many queries are searched at once; None: all.
        check: called between batches; may raise to give up.
    """
    found = []
    for start in range(0, len(asked.queries), batch or max(1, len(asked.queries))):
        check()
        part = asked.queries[start : start + (batch or len(asked.queries))]
        found.append(index.search(part, NEIGHBOURS, effort=effort).ids)
    values = recalls(asked, np.concatenate(found) if found else np.empty((0, NEIGHBOURS), np.int64))
    taken = []
    for query in asked.queries[:TIMED_QUERIES]:
        started = time.perf_counter()
        index.search(query[None], NEIGHBOURS, effort=effort)
        taken.append(time.perf_counter() - started)
    recall = round(float(values.mean()), 5)
    latency = float(np.median(taken)) if taken else 0.0
    return Point(effort or 1, recall, round(lower_bound(values), 5), latency), values


def find_effort(
    index: VectorIndex,
    asked: Asked,
    *,
    target: float,
    efforts: tuple[int, int],
    too_slow: float = math.inf,
    start: int | None = None,
) -> tuple[int | None, list[Point]]:
    """The least effort between two whose recall is very surely at least the target, and all that were tried.

    Args:
        too_slow: seconds of a single query beyond which more effort is not tried.
        start: where to begin; None: at the least effort.

    Returns:
        None for the effort when none is enough.
    """
    low, high = efforts
    curve: list[Point] = []

    def enough(effort: int) -> bool:
        point, values = measure(index, asked, effort=effort)
        curve.append(point)
        return lower_bound(values, VERY_SURE) >= target

    effort = min(max(start or low, low), high)
    bad, good = low - 1, None
    while good is None:
        if enough(effort):
            good = effort
        elif effort >= high or curve[-1].latency > too_slow or stands_still(curve):
            return None, curve
        else:
            bad, effort = effort, min(2 * effort, high)
    while good > max(bad + 1, math.ceil(bad * FINENESS)):
        middle = max(bad + 1, min(good - 1, round(math.sqrt(max(bad, 1) * good))))
        if enough(middle):
            good = middle
        else:
            bad = middle
    return good, sorted(curve, key=lambda point: point.effort)


def stands_still(curve: Sequence[Point]) -> bool:
    """Whether four times the effort has found nothing more: the bits that are kept cannot tell more apart.

    The first few doublings do not count: a graph looks at all that is fetched, however low the effort.
    """
    return len(curve) > FREE_STEPS and curve[-1].recall - curve[-3].recall < LEAST_GAIN


def try_plan(
    plan: Plan,
    promise: Promise,
    *,
    rows: Vectors,
    tuning: Asked,
    scoring: Asked,
    count: int,
    device: str,
    only_exact: bool,
) -> Trial:
    """Build a kind over the sample, find its effort, and score it."""
    from dml.index import make_index

    trial = Trial(plan.name, plan.kind, dict(plan.options))
    try:
        index = make_index(plan.kind, rows.shape[1], device=device_for(device, plan.kind), **plan.options)
    except MissingExtra as error:
        return replace(trial, problem=str(error))
    if only_exact and not index.exact:
        few = min(len(tuning.queries), len(scoring.queries))
        problem = f"too few queries to promise anything approximate: {few}, of {FEWEST_QUERIES} at least"
        return replace(trial, problem=problem if promise.recall < 1 else "not exact")
    if promise.memory is not None:
        memory = memory_of(plan, rows[:PROBED], count=count, device=device)
        if memory > promise.memory:
            return replace(trial, memory=memory, problem=too_large(memory, promise.memory))
    started = time.perf_counter()
    index.prepare(rows, len(rows))
    index.add(np.arange(len(rows)), rows)
    seconds = time.perf_counter() - started
    memory = round(index.nbytes / len(rows) * count)
    trial = replace(trial, build_seconds=round(seconds, 3), memory=memory)
    if promise.memory is not None and memory > promise.memory:
        return replace(trial, problem=too_large(memory, promise.memory))
    growth = (count / len(rows)) ** plan.growth
    limit = math.inf if promise.latency is None else promise.latency / growth
    if index.exact:
        point, _ = measure(index, scoring, effort=None)
        point, curve = replace(point, recall=1.0, lower=1.0), []
    else:
        effort, curve = find_effort(
            index, tuning, target=promise.recall, efforts=plan.efforts, too_slow=min(limit, MOST_SECONDS)
        )
        if effort is None:
            slow = curve[-1].latency > min(limit, MOST_SECONDS)
            problem = short_of(curve, promise.recall, queries=len(tuning.queries), slow=slow)
            return replace(trial, curve=curve, problem=problem)
        point, _ = measure(index, scoring, effort=effort)
        if plan.efforts != (1, 1):
            trial = replace(trial, options={**trial.options, "effort": effort})
    predicted = point.latency * growth
    trial = replace(trial, point=point, curve=curve, predicted_latency=predicted)
    if point.lower < promise.recall and not index.exact:
        return replace(trial, problem=f"recall {point.recall:.4f}, surely only {point.lower:.4f}")
    if promise.latency is not None and predicted > promise.latency:
        return replace(
            trial, problem=f"{predicted * 1e3:.2f} ms a query, more than {promise.latency * 1e3:.2f} ms"
        )
    return trial


def short_of(curve: Sequence[Point], target: float, *, queries: int, slow: bool) -> str:
    """Why no effort was enough.

    Args:
        curve: what was tried, at least once.
        queries: how many it was tried with.
        slow: more effort was not tried, for it takes too long.
    """
    best = max(curve, key=lambda one: one.recall)
    mean = best.recall * queries / (queries + 1)  # with the query that fails, as in `lower_bound`
    sure = max(0.0, mean - (mean - best.lower) * VERY_SURE / SURE)
    found = f"recall {best.recall:.4f} at most, surely (99.9 %) only {sure:.4f} by {queries:,} queries"
    if best.recall >= target:
        return f"{found}: more items would make it surer"
    return f"{found}: more effort takes too long" if slow else found


def memory_of(plan: Plan, few: Vectors, *, count: int, device: str) -> int:
    """Bytes over all vectors, reckoned from a few: what is too large need not be built to be refused."""
    from dml.index import make_index

    index = make_index(plan.kind, few.shape[1], device=device_for(device, plan.kind), **plan.options)
    index.add(np.arange(len(few)), few)
    return round(index.nbytes / len(few) * count)


def too_large(needed: int, allowed: int) -> str:
    return f"{in_bytes(needed)}, more than {in_bytes(allowed)}"


def in_bytes(count: int) -> str:
    """1_234 as "1.2 KB": in the unit that leaves one to three digits before the point."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:,.1f}".removesuffix(".0") + f" {unit}"
    return f"{count:,} bytes"


def device_for(device: str, kind: str) -> str:
    """A kind without a GPU form is tried on the CPU even where a GPU is asked for."""
    return device if device in ("auto", "cpu") or kind in ("faiss_flat", "ivf") else "cpu"


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Those that keep the promise: by latency in steps of a tenth, then by memory."""
    sound = [trial for trial in trials if trial.point is not None and not trial.problem]
    step = math.log(FINENESS)
    return sorted(
        sound, key=lambda one: (round(math.log(max(one.predicted_latency, 1e-7)) / step), one.memory)
    )


def with_front(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, marked where no other is at least as good in everything and better in something."""

    def merits(trial: Trial) -> tuple[float, float, float]:
        recall = 0.0 if trial.point is None else trial.point.recall
        return (recall, -trial.predicted_latency, -float(trial.memory))

    measured = [trial for trial in trials if trial.point is not None]

    def beaten(trial: Trial) -> bool:
        own = merits(trial)
        return any(
            all(a >= b for a, b in zip(merits(other), own, strict=True)) and merits(other) != own
            for other in measured
        )

    return [replace(one, on_front=one.point is not None and not beaten(one)) for one in trials]


def nothing_keeps(promise: Promise, trials: Sequence[Trial]) -> str:
    """What to tell when no kind keeps the promise."""
    asked = [f"recall@10 of {promise.recall:g}"]
    if promise.memory is not None:
        asked.append(in_bytes(promise.memory))
    if promise.latency is not None:
        asked.append(f"{promise.latency * 1e3:g} ms a query")
    found = "\n".join(f"  {trial.name}: {trial.problem}" for trial in trials)
    return f"No kind of index promises {', '.join(asked)} here:\n{found}\nAsk for less recall or allow more."
