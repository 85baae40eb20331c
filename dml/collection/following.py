"""How a state of the collection comes to be: from a snapshot, and from the changes in the catalogue since."""

from dataclasses import replace
from typing import Any

import numpy as np

from dml.collection import catalog as sql
from dml.collection.derive import fill
from dml.collection.generation import Generation, Snapshot
from dml.index import make_index


def from_nothing(db: Any, dim: int) -> Generation:
    """Everything in the delta of an empty index."""
    return replayed(db, Generation.of(Snapshot(make_index("flat", dim), 0, 0), dim))


def from_catalog(db: Any, dim: int) -> Generation:
    """Everything in an exact index: for a collection whose own index cannot be had."""
    index = make_index("flat", dim)
    index.prepare(np.empty((0, dim), np.float32), sql.count_items(db))
    fill(index, db, held=np.empty(0, np.int64), dim=dim)
    state = Generation.of(Snapshot(index, sql.read_state(db)[0], sql.last_row(db)), dim)
    return replace(state, file=sql.file_of(db))


def replayed(db: Any, state: Generation) -> Generation:
    """The state after all changes that the catalogue holds; it begins with a snapshot or state of the same
    file."""
    sequence, dim = sql.read_state(db)[0], state.delta.dim
    last = int(state.delta.rows.ids.max()) if len(state.delta.rows) else state.base.last_row
    removed = sql.removed_after(db, state.sequence)
    none = np.empty(0, np.int64)
    state = state.changed(sequence, rows=none, vectors=np.empty((0, dim), np.float32), removed=removed)
    for rows, vectors in sql.rows_after(db, last, dim=dim):
        state = state.changed(sequence, rows=rows, vectors=vectors, removed=none)
    return replace(state, file=sql.file_of(db))
