"""Items as rows of Milvus, and rows as items, hits and pages."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from dml.collection.base import Hit, Item, Payload, Picture, SearchResult
from dml.collection.filters import Filter, matches
from dml.collection.milvus_table import LARGEST_JSON, Row
from dml.collection.query import Query
from dml.data.ids import id_problem
from dml.errors import UsageError


def possible(ids: Iterable[str]) -> list[str]:
    """Those of these texts that can be ids, each once."""
    return [id for id in dict.fromkeys(ids) if id_problem(id) is None]


def passes(filter: Filter, row: Row) -> bool:
    return matches(filter, row["payload"], row["id"])


def item_of(row: Row) -> Item:
    """A row as Milvus returns it."""
    vector = row.get("vector")
    return Item(
        id=row["id"],
        payload=dict(row["payload"]),
        sequence=int(row["sequence"]),
        picture=Picture(**row["picture"]) if row["picture"] else None,
        vector=None if vector is None else np.asarray(vector, np.float32),
    )


def page(
    hits: list[tuple[float, Row]], query: Query, generation: int, *, all_seen: bool, exact: bool
) -> SearchResult:
    """The part of a ranking that a query asks for.

    Args:
        all_seen: whether there are no hits behind these.
        exact: whether no true neighbour may be missing.
    """
    threshold = query.score_threshold
    good = hits if threshold is None else [hit for hit in hits if hit[0] >= threshold]
    shown = good[query.offset : query.offset + query.limit]
    return SearchResult(
        [
            Hit(row["id"], min(1.0, max(-1.0, score)), rank, item_of(row))
            for rank, (score, row) in enumerate(shown, start=query.offset + 1)
        ],
        generation,
        approximate=not exact,
        total=len(good),
        total_is_exact=exact and (all_seen or len(good) < len(hits)),
    )


def check_size(payload: Payload, id: str) -> None:
    """Refuse a payload that Milvus would not take. Raises UsageError."""
    try:
        text = json.dumps(dict(payload), ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise UsageError(
            f'The payload of item "{id}" holds half a surrogate pair, which is no text.'
        ) from None
    if len(text) > LARGEST_JSON:
        raise UsageError(
            f'The payload of item "{id}" has {len(text):,} bytes as JSON, and Milvus takes {LARGEST_JSON:,}.'
        )
    if not integers_fit(payload):
        raise UsageError(
            f'The payload of item "{id}" holds an integer beyond 64 bits, which Milvus does not take.'
        )


def integers_fit(tree: Any) -> bool:
    """Whether no integer in a tree needs more than 64 bits."""
    if isinstance(tree, Mapping):
        return all(map(integers_fit, tree.values()))
    if isinstance(tree, list | tuple):
        return all(map(integers_fit, tree))
    return not isinstance(tree, int) or -(2**63) <= tree < 2**64
