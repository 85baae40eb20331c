"""What filters cost and whether they keep the recall: selectivity x index kind, on whole collections.

What passes a filter may have nothing to do with the query, or everything: a colour that all items near the
query have, or none of them. Graphs and cells find their way through what is near, so all three are measured.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.collection import NewItem, create_collection
from dml.collection.base import SearchResult
from dml.collection.local import LocalCollection
from dml.index.base import Vectors
from eval.speed import race
from eval.speed.embeddings import queries_beside
from eval.speed.search import opened

SHARES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.9, 1.0)
PLACES = ("anywhere", "near", "far")
NEIGHBOURS = 10
ALLOWANCE = 0.02
"""How much recall a filter may cost."""

Say = Callable[[str], None]


def speed_of_filters(
    *,
    rows: int,
    dim: int,
    kinds: Sequence[str],
    queries: int,
    say: Say,
    shares: Sequence[float] = SHARES,
    vectors: Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall and speed of single searches in a collection of each kind, with and without filters.

    Args:
        queries: of each kind of filter; they lie around one point, what passes around it or away from it.
        vectors: .npy file of (N, D) unit rows to use instead of drawn ones: so many `rows` of it with the
            queries beside it (see `eval.speed.embeddings`), or all but the queries, which are drawn from it.

    Raises:
        DataError: a file that is no array of rows.
    """
    rng = np.random.default_rng(seed)
    if vectors is None:
        data = drawn(rows + queries, dim, rng)
        stored, held = data[:-queries], data[-queries:]
    elif queries_beside(vectors).exists():
        stored, held = opened(vectors)[:rows], opened(queries_beside(vectors))[:queries]
        stored, held = np.ascontiguousarray(stored), np.ascontiguousarray(held)
    else:
        data = np.asarray(opened(vectors))
        data = data[rng.permutation(len(data))]
        stored, held = data[:-queries], data[-queries:]
    anchored = nearest_to(held[0], held)[: max(1, queries // 4)]
    payloads = places(stored, held[0], rng)
    tables = []
    for kind in kinds:
        say(f"{kind}: {len(stored):,} items of {stored.shape[1]} numbers")
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            with filled(Path(folder) / "c", kind, stored, payloads) as collection:
                say(f"{kind}: built in {time.perf_counter() - started:.0f} s")
                tables.append(table(collection, kind, held, held[anchored], shares, say=say))
    return {
        "machine": race.machine(), "repeats": queries, "rows": len(stored), "dim": stored.shape[1],
        "tables": tables,
    }  # fmt: skip


def drawn(count: int, dim: int, rng: np.random.Generator) -> Vectors:
    """Unit vectors in wide clusters of uneven size: harder for an index than embeddings usually are."""
    centres = rng.standard_normal((max(8, count // 200), dim))
    weights = rng.dirichlet(np.full(len(centres), 2.0))
    found = centres[rng.choice(len(centres), count, p=weights)] + rng.standard_normal((count, dim)) * 1.6
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def nearest_to(point: NDArray[np.float32], vectors: Vectors) -> NDArray[np.int64]:
    """Positions of the vectors, nearest first."""
    return np.argsort(-(vectors @ point), kind="stable")


def places(stored: Vectors, point: NDArray[np.float32], rng: np.random.Generator) -> list[dict[str, Any]]:
    """A payload per item: its place in a random order, and among those near and far from a point."""
    near = np.empty(len(stored), np.int64)
    near[nearest_to(point, stored)] = np.arange(len(stored))
    anywhere = rng.permutation(len(stored))
    return [
        {"label": f"class {n % 100}", "anywhere": int(a), "near": int(b), "far": len(near) - 1 - int(b)}
        for n, (a, b) in enumerate(zip(anywhere, near, strict=True))
    ]


def filled(
    folder: Path, kind: str, stored: Vectors, payloads: Sequence[Mapping[str, Any]]
) -> LocalCollection:
    collection = create_collection(folder, dim=stored.shape[1], fingerprint="f" * 64, index=kind)
    for start in range(0, len(stored), 10_000):
        part = slice(start, start + 10_000)
        collection.add(
            NewItem(f"{n:08}", vector, payload)
            for n, (vector, payload) in enumerate(zip(stored[part], payloads[part], strict=True), start)
        )
    collection.build_index(measure=False)
    return collection


def table(
    collection: LocalCollection,
    kind: str,
    anywhere: Vectors,
    anchored: Vectors,
    shares: Sequence[float],
    *,
    say: Say,
) -> dict[str, Any]:
    """The rows of one kind."""
    free = {
        place: measured(collection, anywhere if place == "anywhere" else anchored, None) for place in PLACES
    }
    found = [{"name": "no filter", **free["anywhere"]}, {"name": "no filter, around a point", **free["near"]}]
    for place in PLACES:
        for share in shares:
            condition = {"key": place, "range": {"lt": share * len(collection)}}
            queries = anywhere if place == "anywhere" else anchored
            row = measured(collection, queries, {"must": [condition]})
            lost = free[place]["recall"] - row["recall"]
            found.append({"name": f"{share:.1%} {place}", **row, "lost": lost, "kept": lost <= ALLOWANCE})
            say(json.dumps(found[-1]))
    return {"kind": kind, "index": dict(collection.info().index), "rows": found}


def measured(
    collection: LocalCollection, queries: Vectors, filter: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Recall@10 against comparing everything, single searches per second, and the filter's first use."""
    started = time.perf_counter()
    passing = collection.count(filter)
    first = time.perf_counter() - started
    true = search(collection, queries, filter, exact=True)
    started = time.perf_counter()
    found = [search(collection, query[None], filter)[0] for query in queries]
    seconds = time.perf_counter() - started
    shares = [
        sum(hit.score >= t.hits[-1].score for hit in f.hits) / len(t.hits)
        for t, f in zip(true, found, strict=True)
        if t.hits
    ]
    return {
        "passing": passing,
        "recall": float(np.mean(shares)) if shares else 1.0,
        "searches/s": len(queries) / seconds,
        "how": "index" if found[0].approximate else "exact",
        "first use ms": 1e3 * first if filter else None,
    }


def search(
    collection: LocalCollection, queries: Vectors, filter: Mapping[str, Any] | None, *, exact: bool = False
) -> list[SearchResult]:
    return collection.search(queries, limit=NEIGHBOURS, filter=filter, exact=exact)


COLUMNS: Mapping[str, Callable[[Any], str]] = {
    "passing": lambda value: f"{value:,}",
    "recall": lambda value: f"{value:.4f}",
    "lost": lambda value: f"{value:+.4f}",
    "how": str,
    "searches/s": lambda value: f"{value:,.0f}",
    "first use ms": race.milliseconds,
}


def print_filters(result: Mapping[str, Any]) -> str:
    lines = [race.heading(result["machine"], result["repeats"])]
    for found in result["tables"]:
        lines.append(
            f"\n{found['kind']}: {result['rows']:,} items of {result['dim']} numbers, recall@{NEIGHBOURS}"
        )
        rows = found["rows"]
        lines += race.lines_of(rows, COLUMNS)
        bad = [row["name"] for row in rows if row.get("kept") is False]
        lines.append(f"more than {ALLOWANCE} of recall lost: {', '.join(bad) or 'nowhere'}")
    return "\n".join(lines)
