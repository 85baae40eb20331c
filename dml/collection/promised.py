"""An index that keeps a promise of recall: chosen on a sample, measured again over the whole collection.

In the manifest, "index" holds the promise beside the kind that was chosen for it, and "built" says whether it
holds: after the build, and again after every merge that brought enough new items to measure with.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from dml.collection import catalog as sql
from dml.collection.catalog import Catalog
from dml.collection.derive import Built, Stop, described, fill, never
from dml.collection.generation import Snapshot
from dml.collection.measure import HeldOut, all_rows, asked_of_held, described_point, training_sample
from dml.errors import ConfigError
from dml.index import make_index
from dml.index.base import Ids, VectorIndex, Vectors
from dml.index.tune import (
    FEWEST_QUERIES,
    QUERIES,
    QUERY_SHARE,
    Asked,
    Choice,
    Point,
    Promise,
    Trial,
    choose,
    device_for,
    find_effort,
    in_bytes,
    measure,
    without_copies,
)

log = logging.getLogger(__name__)

TRIES = 3
"""Candidates that are built over the whole collection before it is searched exactly."""

HIGHEST_EFFORT = 8
"""The whole collection may take so many times the effort of the sample."""


class Material(NamedTuple):
    """What an index is built of."""

    db: Any  # a transaction of the catalogue
    dim: int
    sample: Vectors
    count: int


class Filled(NamedTuple):
    """An index over the whole collection but the queries, and what was measured with these."""

    index: VectorIndex
    held: HeldOut
    point: Point
    queries: int


def build_promised(
    catalog: Catalog,
    promise: Promise,
    *,
    device: str,
    seed: int,
    stop: Stop = never,
    say: Callable[[str], None] = lambda line: None,
) -> Built:
    """The cheapest index that keeps a promise, over all items there are.

    Kinds are tried on a sample. The best is built over everything but two sets of held-out items; its effort
    is adjusted with the one, and the other says whether the promise holds. When it does not, the next is
    built, and after `TRIES` of them one that is exact (where the promise allows one).

    Raises:
        ConfigError: nothing keeps the promise on the sample.
        Stopped: `stop` said so.
    """
    started = time.monotonic()
    with catalog.reading() as db:
        sequence, count, last = sql.read_state(db)[0], sql.count_items(db), sql.last_row(db)
        sample = training_sample(db, without=np.empty(0, np.int64), dim=catalog.dim, seed=seed)
        choice = choose(sample, promise, count=count, device=device, seed=seed, say=say)
        material = Material(db, catalog.dim, sample, count)
        held = queries_of(db, count, seed=seed)
        trial, filled = first_that_holds(
            choice, promise, material, held=held, device=device, stop=stop, say=say
        )
    filled.index.add(filled.held.rows, filled.held.vectors)
    measured = described_point(filled.point, filled.queries)
    built = described(Snapshot(filled.index, sequence, last, measured, built_over=count), started)
    built.about["tuning"] = choice.table
    effort = {"effort": filled.point.effort} if "effort" in trial.options else {}
    wanted = {"kind": trial.kind, "options": {**trial.options, **effort}, "promise": asdict(promise)}
    return built._replace(wanted=wanted)


def first_that_holds(
    choice: Choice,
    promise: Promise,
    material: Material,
    *,
    held: Ids,
    device: str,
    stop: Stop,
    say: Callable[[str], None],
) -> tuple[Trial, Filled]:
    """The first candidate that keeps the promise over all items; the last, when none does."""
    sets: tuple[Asked, Asked] | None = None
    done: tuple[Trial, Filled] | None = None
    for trial in candidates(choice):
        say(f"{trial.name}, over all items")
        chosen = device_for(device, trial.kind)
        index = make_index(trial.kind, material.dim, device=chosen, **trial.options)
        index.prepare(material.sample, material.count)
        kept = fill(index, material.db, held=held, dim=material.dim, stop=stop)
        sets = sets or both_sets(kept, material)
        point = adjusted(index, trial, promise, *sets)
        done = trial, Filled(index, kept, point, len(sets[1].queries))
        problem = broken(promise, index, point)
        if problem is None:
            return done
        log.info("%s: over all items it %s", trial.name, problem)
    if done is None:
        raise ConfigError("no kind of index was left to build")
    return done


def candidates(choice: Choice) -> list[Trial]:
    """The best few, and the best exact one behind them."""
    exact = [trial for trial in choice.ranking if trial.kind == "faiss_flat" and not trial.options]
    best = choice.ranking[:TRIES]
    return best + [trial for trial in exact if trial not in best]


def queries_of(db: Any, count: int, *, seed: int) -> Ids:
    """Rows held out for both sets; none when there are too few."""
    each = min(QUERIES, int(QUERY_SHARE * count))
    if each < FEWEST_QUERIES:
        return np.empty(0, np.int64)
    return np.sort(np.random.default_rng(seed).choice(all_rows(db), 2 * each, replace=False))


def both_sets(held: HeldOut, material: Material) -> tuple[Asked, Asked]:
    """Tuning and scoring queries, with their true neighbours in the whole collection."""
    order = np.random.default_rng(0).permutation(len(held.rows))
    asked = asked_of_held(held, sql.rows_after(material.db, 0, dim=material.dim))
    half = len(order) // 2
    return without_copies(asked.part(order[:half])), without_copies(asked.part(order[half:]))


def adjusted(index: VectorIndex, trial: Trial, promise: Promise, tuning: Asked, scoring: Asked) -> Point:
    """Set the effort that the whole collection needs, and measure with the other queries."""
    if index.exact:
        timed = len(scoring.queries) > 0  # else too few items to hold any out
        return Point(1, 1.0, 1.0, measure(index, scoring, effort=None)[0].latency if timed else 0.0)
    if "effort" not in trial.options:
        return measure(index, scoring, effort=None)[0]
    start = int(trial.options["effort"])
    effort, _ = find_effort(
        index,
        tuning,
        target=promise.recall,
        efforts=(max(1, start // 2), HIGHEST_EFFORT * start),
        start=start,
    )
    chosen = effort if effort is not None else HIGHEST_EFFORT * start
    index.set_effort(chosen)
    return measure(index, scoring, effort=chosen)[0]


def broken(promise: Promise, index: VectorIndex, point: Point) -> str | None:
    """What a measured index fails to do of what was promised; None: the promise holds."""
    if point.lower < promise.recall:
        return f"finds {point.recall:.4f} (surely {point.lower:.4f}) instead of {promise.recall:g}"
    if promise.memory is not None and index.nbytes > promise.memory:
        return f"takes {in_bytes(index.nbytes)} instead of {in_bytes(promise.memory)}"
    if promise.latency is not None and point.latency > promise.latency:
        return f"takes {point.latency * 1e3:.2f} ms a query instead of {promise.latency * 1e3:.2f} ms"
    return None


def given_up(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """What to tell where a manifest's "index" has lost its promise to another wish; None: it has not."""
    promise = before.get("promise")
    if not promise or after.get("promise"):
        return None
    return (
        f"the promise of recall {promise['recall']:g} is given up, since {after['kind']} was asked for; "
        f"--target-recall {promise['recall']:g} makes it again"
    )


def with_promise(
    about: Mapping[str, Any], wanted: Mapping[str, Any], index: VectorIndex, *, before: Mapping[str, Any]
) -> dict[str, Any]:
    """What the manifest keeps of a build or merge, with whether the promise holds after it.

    Args:
        wanted: the manifest's "index".
        before: the manifest's "built" until now: a merge keeps its table of trials.
    """
    if not wanted.get("promise"):
        return dict(about)
    promise = Promise(**wanted["promise"])
    measured: Mapping[str, Any] = about.get("measured") or {}
    found: dict[str, Any] = {"recall": measured.get("recall_at_10"), "lower": measured.get("lower")}
    found |= {"latency": measured.get("latency"), "memory": index.nbytes, "queries": measured.get("queries")}
    problem = "has not been measured"
    if found["lower"] is not None:
        point = Point(1, found["recall"], found["lower"], found["latency"] or 0.0)
        problem = broken(promise, index, point)
    if problem is not None:
        log.warning("the index %s: its promise does not hold; `dml index rebuild` chooses anew", problem)
    kept = {"tuning": before["tuning"]} if "tuning" in before and "tuning" not in about else {}
    promised = {**asdict(promise), "measured": found, "holds": problem is None, "problem": problem}
    return {**about, **kept, "promise": promised}
