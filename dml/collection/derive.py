"""Making the main index of a collection from its catalogue: as a whole, or from the one before."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.collection import catalog as sql
from dml.collection.catalog import Catalog
from dml.collection.generation import Snapshot
from dml.collection.measure import BLOCK, HeldOut, hold_out, hold_out_new, measure_recall, training_sample
from dml.errors import ConfigError
from dml.index import KINDS, choose_kind, load_index, make_index
from dml.index.base import VectorIndex
from dml.registry import unknown

log = logging.getLogger(__name__)


Stop = Callable[[], bool]
"""Whether to give up what is being made."""


class Stopped(Exception):
    """What was being made is not wanted any more."""


def never() -> bool:
    return False


class Built(NamedTuple):
    """A new index, and what is kept of its making in the manifest."""

    snapshot: Snapshot
    about: dict[str, Any]
    wanted: Mapping[str, Any] | None = None
    """Kind and options that were chosen for a promise; None: those that were asked for."""


def check_kind(kind: str) -> None:
    """Refuse an index kind that cannot be one. Raises ConfigError."""
    if kind != "auto" and kind not in KINDS and ":" not in kind:
        raise ConfigError(unknown("index kind", kind, {"auto": "", **KINDS}))


def build_snapshot(
    catalog: Catalog,
    wanted: Mapping[str, Any],
    *,
    device: str,
    measure: bool,
    seed: int,
    seconds: float = math.inf,
    stop: Stop = never,
) -> Built:
    """An index of all items there are; the catalogue may be written to meanwhile.

    Args:
        wanted: {"kind": "auto" or a kind, "options": of that kind}.
        measure: measure recall@10 with held-out queries against exact search.
        seed: chooses the held-out queries.
        seconds: that measuring may take, see `measure_recall`.
        stop: asked between blocks of rows, and between batches of queries.

    Raises:
        ConfigError, MissingExtra: a kind or options that cannot be had.
        Stopped: `stop` said so.
    """
    started = time.monotonic()
    with catalog.reading() as db:
        sequence, count, last = sql.read_state(db)[0], sql.count_items(db), sql.last_row(db)
        kind = wanted["kind"] if wanted["kind"] != "auto" else choose_kind(count)
        index = make_index(kind, catalog.dim, device=device, **wanted["options"])
        held = hold_out(db, count, seed=seed) if measure and not index.exact else np.empty(0, np.int64)
        none = np.empty((0, catalog.dim), np.float32)
        index.prepare(training_sample(db, without=held, dim=catalog.dim) if index.learns else none, count)
        kept = fill(index, db, held=held, dim=catalog.dim, stop=stop)
        measured = None
        if measure:
            measured = measured_over(db, index, kept, count=count, seconds=seconds, stop=stop)
    index.add(kept.rows, kept.vectors)
    log.info("built %s over %d items in %.1f s", kind, count, time.monotonic() - started)
    return described(Snapshot(index, sequence, last, measured, built_over=count), started)


def extend_snapshot(
    catalog: Catalog,
    base: Snapshot,
    saved: Path,
    *,
    device: str,
    measure: bool,
    seed: int,
    seconds: float = math.inf,
    stop: Stop = never,
) -> Built:
    """A copy of an index with the changes since; the index itself goes on being searched.

    Args:
        saved: the file of `base`, which the copy is read from (and checked by the way).
        measure: measure recall@10 with those of the new items that it has not seen; while they are few, the
            figure of `base` is kept.
        seed, seconds, stop: as `build_snapshot`.

    Raises:
        DamagedFile: `saved` does not fit its checksums.
        Stopped: `stop` said so.
    """
    started = time.monotonic()
    index = load_index(saved, device=device)
    with catalog.reading() as db:
        sequence, count, last = sql.read_state(db)[0], sql.count_items(db), sql.last_row(db)
        dead = index.remove(sql.removed_after(db, base.sequence))
        held = np.empty(0, np.int64)
        if measure and not index.exact:
            held = hold_out_new(db, count, after=base.last_row, seed=seed)
        kept = fill(index, db, after=base.last_row, held=held, dim=catalog.dim, stop=stop)
        measured = base.measured
        if measure and (index.exact or len(held)):
            measured = measured_over(db, index, kept, count=count, seconds=seconds, stop=stop)
    index.add(kept.rows, kept.vectors)
    log.info("merged %s, now %d items, in %.1f s", index.kind, count, time.monotonic() - started)
    return described(
        base._replace(
            index=index, sequence=sequence, last_row=last, measured=measured, dead=base.dead + dead
        ),
        started,
    )


def measured_over(
    db: Any, index: VectorIndex, held: HeldOut, *, count: int, seconds: float, stop: Stop
) -> dict[str, Any] | None:
    """The recall of an index over all items but the held-out ones. Raises Stopped: `stop` said so."""

    def check() -> None:
        if stop():
            raise Stopped

    blocks = sql.rows_after(db, 0, dim=index.dim, block=BLOCK)
    left = count - len(held.rows)
    return measure_recall(index, held, blocks, count=left, seconds=seconds, check=check)


def described(snapshot: Snapshot, started: float) -> Built:
    """With what the manifest keeps of a snapshot. Whoever promises a recall looks at "measured" here."""
    about = {
        **snapshot.index.describe(),
        "sequence": snapshot.sequence,
        "count": len(snapshot.index),
        "built_over": snapshot.built_over,
        "seconds": round(time.monotonic() - started, 3),
        "measured": snapshot.measured,
    }
    return Built(snapshot, about)


def fill(
    index: VectorIndex, db: Any, *, held: NDArray[np.int64], dim: int, after: int = 0, stop: Stop = never
) -> HeldOut:
    """Add the rows of the catalogue above `after` to an index but the held-out ones, and return those.

    Raises:
        Stopped: `stop` said so.
    """
    rows, vectors = [np.empty(0, np.int64)], [np.empty((0, dim), np.float32)]
    for block_rows, block_vectors in sql.rows_after(db, after, dim=dim):
        if stop():
            raise Stopped
        out = np.isin(block_rows, held)
        rows.append(block_rows[out])
        vectors.append(block_vectors[out])
        index.add(block_rows[~out], block_vectors[~out])
    return HeldOut(np.concatenate(rows), np.concatenate(vectors))
