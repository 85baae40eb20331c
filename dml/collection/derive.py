"""Making the main index of a collection from its catalogue."""

import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.collection import catalog as sql
from dml.collection.catalog import Catalog
from dml.collection.generation import Snapshot
from dml.collection.measure import HeldOut, hold_out, measure_recall, training_sample
from dml.errors import ConfigError
from dml.index import KINDS, choose_kind, make_index
from dml.index.base import VectorIndex
from dml.registry import unknown

log = logging.getLogger(__name__)


class Built(NamedTuple):
    """A new index, and what is kept of its making in the manifest."""

    snapshot: Snapshot
    about: dict[str, Any]


def check_kind(kind: str) -> None:
    """Refuse an index kind that cannot be one. Raises ConfigError."""
    if kind != "auto" and kind not in KINDS and ":" not in kind:
        raise ConfigError(unknown("index kind", kind, {"auto": "", **KINDS}))


def build_snapshot(
    catalog: Catalog, wanted: Mapping[str, Any], *, device: str, measure: bool, seed: int
) -> Built:
    """An index of all items there are; the catalogue may be written to meanwhile.

    Args:
        wanted: {"kind": "auto" or a kind, "options": of that kind}.
        measure: measure recall@10 with held-out queries against exact search.
        seed: chooses the held-out queries.

    Raises:
        ConfigError, MissingExtra: a kind or options that cannot be had.
    """
    started = time.monotonic()
    with catalog.reading() as db:
        sequence, count, last = sql.read_state(db)[0], sql.count_items(db), sql.last_row(db)
        kind = wanted["kind"] if wanted["kind"] != "auto" else choose_kind(count)
        index = make_index(kind, catalog.dim, device=device, **wanted["options"])
        held = hold_out(db, count, seed=seed) if measure and not index.exact else np.empty(0, np.int64)
        kept = fill(index, db, count=count, held=held, dim=catalog.dim)
    measured = measure_recall(index, kept.vectors) if measure else None
    index.add(kept.rows, kept.vectors)
    seconds = round(time.monotonic() - started, 3)
    log.info("built %s over %d items in %.1f s", kind, count, seconds)
    about = {
        **index.describe(),
        "sequence": sequence,
        "count": count,
        "seconds": seconds,
        "measured": measured,
    }
    return Built(Snapshot(index, sequence, last, measured), about)


def fill(index: VectorIndex, db: Any, *, count: int, held: NDArray[np.int64], dim: int) -> HeldOut:
    """Add all rows of the catalogue to an index but the held-out ones, and return those."""
    none = np.empty((0, dim), np.float32)
    index.prepare(training_sample(db, without=held, dim=dim) if index.learns else none, count)
    rows, vectors = [np.empty(0, np.int64)], [np.empty((0, dim), np.float32)]
    for block_rows, block_vectors in sql.rows_after(db, 0, dim=dim, block=16_384):
        out = np.isin(block_rows, held)
        rows.append(block_rows[out])
        vectors.append(block_vectors[out])
        index.add(block_rows[~out], block_vectors[~out])
    return HeldOut(np.concatenate(rows), np.concatenate(vectors))
