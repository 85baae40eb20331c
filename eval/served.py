"""What is lost on the way from exact search to the service: the same queries at every stage, in one table.

Stages, each over the pictures of one collection:

- exact: every vector of the collection compared, here;
- index: the collection's own search, with its index;
- service: the same vectors sent to the REST API;
- service, upload: the picture files sent, decoded and embedded by the service.

A query that is itself in the collection (its file is the picture of an item) never finds that item.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.client import Client
from dml.collection.base import Collection, Item
from dml.data.table import Record
from dml.errors import DataError, ServiceError, UsageError
from dml.metrics import neighbours

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Stage:
    """How the queries fare at one stage."""

    name: str
    recall: dict[int, float]  # K -> Recall@K in [0, 1]
    overlap: float  # mean share of the exact first results that this stage returns too, in [0, 1]
    milliseconds: float | None  # per query; None where it was not asked for as a service would be
    queries: int


@dataclass(frozen=True)
class StageTable:
    """All stages over the same queries and the same collection."""

    collection: str
    items: int
    depth: int  # results per query that `overlap` compares
    index: str  # what kind of index
    stages: list[Stage]

    def losses(self, k: int | None = None) -> list[str]:
        """One sentence per stage after the first: its cost in points of Recall@K against the one before."""
        k = min(self.stages[0].recall) if k is None else k
        said = []
        for before, here in zip(self.stages, self.stages[1:], strict=False):
            points = 100 * (before.recall[k] - here.recall[k])
            if here.queries == before.queries:
                verb = f"lose {points:.1f}" if points >= 0 else f"gain {-points:.1f}"
                said.append(f"{here.name}: you {verb} points of Recall@{k}")
        return said

    def as_json(self) -> dict[str, Any]:
        stages = [
            {
                "name": s.name,
                "recall": {str(k): v for k, v in s.recall.items()},
                "overlap": s.overlap,
                "milliseconds": s.milliseconds,
                "queries": s.queries,
            }
            for s in self.stages
        ]
        return {
            "collection": self.collection,
            "items": self.items,
            "depth": self.depth,
            "index": self.index,
            "stages": stages,
            "losses": self.losses(),
        }


@dataclass(frozen=True)
class Asked:
    """The queries and what counts as right for them."""

    records: tuple[Record, ...]
    vectors: Vectors
    own: tuple[str | None, ...]  # the item that is the query itself
    labels: dict[str, str]  # item id -> label
    ks: tuple[int, ...]

    @property
    def depth(self) -> int:
        return max(self.ks)


def compare_stages(
    records: Sequence[Record],
    vectors: Vectors,
    collection: Collection,
    *,
    url: str | None = None,
    key: str | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    most: int = 1000,
    most_uploads: int = 200,
) -> StageTable:
    """Ask the same queries at every stage.

    Args:
        records, vectors: the queries; those without an item of their class in the collection are left out.
        url: of a service that serves this collection under its name; None: the stages end with the index.
        ks: the K of Recall@K; the largest is also the depth of the overlap.
        most: queries, evenly spread over those given.
        most_uploads: of them, for uploading pictures.

    Raises:
        DataError: no item of the collection has the label of a query.
        UsageError: the service does not serve this collection.
    """
    items, stored = contents(collection)
    asked = choose_queries(records, vectors, collection, items, ks=ks, most=most)
    exact = exactly(asked, items, stored)
    stages = [judge("exact", exact, exact, asked, None)]
    started = time.perf_counter()
    found = [[h.id for h in r.hits] for r in collection.search(asked.vectors, limit=asked.depth + 1)]
    stages.append(judge("index", found, exact, asked, time.perf_counter() - started))
    if url is not None:
        with Client(url, key) as client:
            stages += service_stages(client, collection, exact, asked, most_uploads=most_uploads)
    info = collection.info()
    kind = str(info.index.get("kind", "unknown"))
    return StageTable(collection.name, len(items), asked.depth, kind, stages)


def service_stages(
    client: Client, collection: Collection, exact: list[list[str]], asked: Asked, *, most_uploads: int
) -> list[Stage]:
    """The service asked with vectors, and then with the picture files of some of the queries."""
    served = {c.name: c for c in client.collections()}
    if collection.name not in served:
        known = ", ".join(sorted(served)) or "none"
        raise UsageError(f'{client.url} does not serve a collection "{collection.name}"; it serves: {known}')
    started = time.perf_counter()
    answers = client.search_vectors(collection.name, asked.vectors, limit=asked.depth + 1)
    found = [[h.id for h in answer.hits] for answer in answers]
    stages = [judge("service", found, exact, asked, time.perf_counter() - started)]
    rows = [row for row in spread(len(asked.records), most_uploads) if asked.records[row].box is None]
    if not rows:
        return stages
    some = Asked(
        tuple(asked.records[row] for row in rows),
        asked.vectors[rows],
        tuple(asked.own[row] for row in rows),
        asked.labels,
        asked.ks,
    )
    started = time.perf_counter()
    found = []
    for record in some.records:
        answer = client.search(collection.name, image=record.path, limit=some.depth + 1, with_payload=False)
        found.append([h.id for h in answer.hits])
    spent = time.perf_counter() - started
    return [*stages, judge("service, upload", found, [exact[row] for row in rows], some, spent)]


def judge(
    name: str, found: list[list[str]], exact: list[list[str]], asked: Asked, seconds: float | None
) -> Stage:
    """Recall@K and overlap of what was found."""
    if len(found) != len(asked.records):
        raise ServiceError(f"{name}: {len(found)} answers to {len(asked.records)} queries")
    hits = dict.fromkeys(asked.ks, 0)
    shared = 0.0
    for row, ids in enumerate(found):
        others = [id for id in ids if id != asked.own[row]][: asked.depth]
        right = [asked.labels.get(id) == asked.records[row].label for id in others]
        for k in asked.ks:
            hits[k] += any(right[:k])
        wanted = [id for id in exact[row] if id != asked.own[row]][: asked.depth]
        shared += len(set(wanted) & set(others)) / max(1, len(wanted))
    count = len(found)
    spent = None if seconds is None else 1000 * seconds / count
    return Stage(name, {k: hits[k] / count for k in asked.ks}, shared / count, spent, count)


def exactly(asked: Asked, items: Sequence[Item], stored: Vectors) -> list[list[str]]:
    """The ids of the truly nearest items, by comparing with every one."""
    ids = [item.id for item in items]
    found = neighbours(
        asked.vectors,
        stored,
        asked.depth,
        query_ids=[own if own is not None else ("query", row) for row, own in enumerate(asked.own)],
        gallery_ids=ids,
    )
    return [[ids[position] for position in row if position >= 0] for row in found.positions]


def contents(collection: Collection) -> tuple[list[Item], Vectors]:
    """All items and their vectors (N, D)."""
    items: list[Item] = []
    after: str | None = None
    while True:
        page, after = collection.scroll(after=after, limit=1000, with_vector=True)
        items += page
        if after is None:
            break
    vectors = [item.vector for item in items if item.vector is not None]
    return items, np.stack(vectors) if vectors else np.empty((0, collection.dim), np.float32)


def choose_queries(
    records: Sequence[Record],
    vectors: Vectors,
    collection: Collection,
    items: Sequence[Item],
    *,
    ks: Sequence[int],
    most: int,
) -> Asked:
    """Queries that have something to find, and the item that each of them is."""
    labels = {item.id: item.label for item in items if item.label is not None}
    item_of = files_of(collection, items)
    own = [item_of.get(record.path.resolve()) for record in records]
    sizes: dict[str, int] = {}
    for label in labels.values():
        sizes[label] = sizes.get(label, 0) + 1
    rows = [
        row
        for row, record in enumerate(records)
        if record.label is not None
        and sizes.get(record.label, 0) > (1 if labels.get(own[row] or "") == record.label else 0)
    ]
    if not rows:
        raise DataError(
            f'No item of the collection "{collection.name}" has the label of a query, so nothing in it is '
            f"right. Build it from labelled folders, or with payloads that have a label."
        )
    rows = [rows[place] for place in spread(len(rows), most)]
    return Asked(
        tuple(records[row] for row in rows),
        vectors[rows],
        tuple(own[row] for row in rows),
        labels,
        tuple(sorted(ks)),
    )


def files_of(collection: Collection, items: Sequence[Item]) -> dict[Path, str]:
    """Referenced picture file -> the id of its item."""
    roots = collection.info().manifest.get("roots", {})
    return {
        (Path(roots[item.picture.root]) / item.picture.path).resolve(): item.id
        for item in items
        if item.picture is not None and item.picture.path is not None and item.picture.root in roots
    }


def spread(count: int, most: int) -> list[int]:
    """At most `most` of range(count), evenly spread."""
    if count <= most:
        return list(range(count))
    return [round(place) for place in np.linspace(0, count - 1, most).tolist()]
