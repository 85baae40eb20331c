"""What may be written into a collection: ids, payloads, vectors."""

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dml.collection.base import NewItem, Payload
from dml.data.ids import id_problem
from dml.errors import DimensionMismatch, UsageError, VectorError
from dml.index.base import Vectors, check_vectors


def check_item(item: NewItem) -> str:
    """The payload as JSON, after checking everything but the vector. Raises UsageError."""
    check_id(item.id)
    if item.image is not None and item.file is not None:
        raise UsageError(f'Item "{item.id}" has both image and file; give the bytes or the path, not both.')
    return encode_payload(item.payload, item.id)


def check_rows(vectors: Sequence[NDArray[np.float32]], dim: int) -> Vectors:
    """(N, dim) float32.

    Raises:
        VectorError, DimensionMismatch: naming the first vector that is not fit.
    """
    if not vectors:
        return np.empty((0, dim), np.float32)
    for position, vector in enumerate(vectors):
        if np.ndim(vector) != 1:
            raise VectorError(f"vector {position} to add is an array of shape {np.shape(vector)}, not a row")
        if len(vector) != dim:
            raise DimensionMismatch(dim, len(vector), f"vector {position} to add")
    return check_vectors(np.stack(vectors), dim, "the vectors to add")


def check_id(id: str) -> None:
    """Refuse what cannot be an id: not text, empty, too long, control characters. Raises UsageError."""
    problem = id_problem(id) if isinstance(id, str) else f"an item's id must be text, got {id!r:.80}"
    if problem is not None:
        raise UsageError(problem)


def check_unicode(id: str) -> None:
    """Refuse bytes that are no UTF-8, as a shell may pass them. Raises UsageError."""
    try:
        id.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"an item's id is Unicode text, got {id!r:.80}, which is not (bytes that are no UTF-8?)"
        ) from None


def encode_payload(payload: Payload, id: str) -> str:
    """The payload as JSON text. Raises UsageError for what JSON cannot say."""
    try:
        return json.dumps(dict(payload), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f'The payload of item "{id}" cannot be written as JSON: {error}') from None
