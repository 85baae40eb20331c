"""Search at equal recall: our kinds of index, tuned faiss, hnswlib and usearch, over the same vectors.

Every contender gets the same rows, threads and queries. Its effort is sought until its recall@10 reaches a
target, with queries that are kept for that; what is raced then is that effort, with other queries, one at a
time and in batches of 64. Memory is what the engine keeps: by its own count, or reckoned from its arrays.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dml.errors import DataError
from dml.index import make_index
from dml.index.base import Ids, VectorIndex, Vectors, check_vectors
from dml.index.faiss_index import numpy_search
from dml.index.tune import Asked, Plan, asked_of, plans, recalls
from eval.speed import race

K = 10
BATCH = 64
TUNING = SCORING = 500
"""Queries of each set."""

TIMED = 64
"""Queries in a turn of the race, one by one or at once."""

EFFORTS = (8, 4096)


class Engine(Protocol):
    """One contender, built over the rows. Effort 0: it has none."""

    efforts: tuple[int, int]

    @property
    def nbytes(self) -> int: ...

    def search(self, queries: Vectors, effort: int) -> Ids: ...


@dataclass
class Ours:
    """One of our kinds, called as a collection calls it."""

    index: VectorIndex
    efforts: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def search(self, queries: Vectors, effort: int) -> Ids:
        return self.index.search(queries, K, effort=effort or None).ids


@dataclass
class Faiss:
    """A bare faiss index: int64 positions, no ids, no removal, faiss's own scores."""

    engine: Any
    nbytes: int
    efforts: tuple[int, int]

    def search(self, queries: Vectors, effort: int) -> Ids:
        import faiss

        parameters: Any = faiss
        chosen = parameters.SearchParametersHNSW(efSearch=effort) if effort else None
        return numpy_search(self.engine)(queries, K, params=chosen)[1]


@dataclass
class Hnswlib:
    engine: Any
    nbytes: int
    efforts: tuple[int, int] = EFFORTS

    def search(self, queries: Vectors, effort: int) -> Ids:
        self.engine.set_ef(max(effort, K))
        return self.engine.knn_query(queries, K)[0].astype(np.int64)


@dataclass
class Usearch:
    engine: Any
    nbytes: int
    threads: int
    efforts: tuple[int, int] = EFFORTS

    def search(self, queries: Vectors, effort: int) -> Ids:
        self.engine.expansion_search = max(effort, K)
        found = self.engine.search(queries, K, threads=self.threads)
        return np.asarray(found.keys, np.int64).reshape(len(queries), -1)


Build = Callable[[Vectors], Engine]


def our_engine(plan: Plan, rows: Vectors) -> Engine:
    index = make_index(plan.kind, rows.shape[1], device="cpu", **plan.options)
    index.prepare(rows, len(rows))
    index.add(np.arange(len(rows)), rows)
    return Ours(index, plan.efforts if plan.efforts != (1, 1) else (0, 0))


def faiss_flat(rows: Vectors) -> Engine:
    import faiss

    engine = faiss.IndexFlatIP(rows.shape[1])
    engine.add(rows)
    return Faiss(engine, rows.nbytes, (0, 0))


def faiss_hnsw(rows: Vectors, *, links: int = 32) -> Engine:
    import faiss

    engine = faiss.IndexHNSWFlat(rows.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    engine.hnsw.efConstruction = 100
    engine.add(rows)
    graph: Any = engine.hnsw
    nbytes = rows.nbytes + 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
    return Faiss(engine, nbytes, EFFORTS)


def hnswlib_index(rows: Vectors, *, threads: int, links: int = 16) -> Engine:
    import hnswlib

    engine = hnswlib.Index("ip", rows.shape[1])
    engine.init_index(len(rows), M=links, ef_construction=100)
    engine.set_num_threads(threads)
    engine.add_items(rows)
    per_row = rows.shape[1] * 4 + (2 * links + 1) * 4 + 8  # vector, links of the lowest level, label
    return Hnswlib(engine, len(rows) * per_row)


def usearch_index(rows: Vectors, *, threads: int, dtype: str) -> Engine:
    from usearch.index import Index

    engine = Index(ndim=rows.shape[1], metric="ip", dtype=dtype, connectivity=16, expansion_add=100)
    engine.add(np.arange(len(rows)), rows, threads=threads)
    return Usearch(engine, int(engine.memory_usage), threads)


def contenders(count: int, dim: int, *, threads: int, only: Sequence[str]) -> dict[str, Build]:
    """name -> what builds it. Ours are those that tuning would try, and the matrix units."""
    ours = [*plans(count, dim), Plan("matrix", "matrix", {})]
    found: dict[str, Build] = {
        "faiss Flat": faiss_flat,
        "faiss HNSW32": faiss_hnsw,
        "hnswlib M16": partial(hnswlib_index, threads=threads),
        **{
            f"usearch {dtype}": partial(usearch_index, threads=threads, dtype=dtype)
            for dtype in ("f32", "bf16", "i8")
        },
        **{f"dml {plan.name}": partial(our_engine, plan) for plan in ours},
    }
    return {name: build for name, build in found.items() if not only or any(part in name for part in only)}


def speed_of_search(
    *,
    rows: int,
    dim: int,
    vectors: Path | None,
    targets: Sequence[float],
    repeats: int,
    threads: int,
    only: Sequence[str],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Build all contenders, find each one's effort for every target, and race those that reach it.

    Raises:
        DataError: `vectors` is no array of unit rows, or too small.
    """
    everything = drawn(rows + TUNING + SCORING, dim) if vectors is None else read(vectors, rows)
    indexed = everything[: -(TUNING + SCORING)]
    blocks = [(np.arange(len(indexed)), indexed)]
    tuning = asked_of(everything[len(indexed) : len(indexed) + TUNING], blocks)
    scoring = asked_of(everything[len(indexed) + TUNING :], blocks)
    engines: dict[str, Engine] = {}
    about: dict[str, dict[str, Any]] = {}
    for name, build in contenders(len(indexed), indexed.shape[1], threads=threads, only=only).items():
        say(f"building {name}")
        started = time.perf_counter()
        try:
            engines[name] = build(indexed)
        except ImportError as error:
            about[name] = {"name": name, "problem": f"{error.name} is not installed"}
            continue
        seconds = time.perf_counter() - started
        about[name] = {"name": name, "MB": engines[name].nbytes, "build s": seconds}
    tables = [table(engines, about, target, tuning, scoring, repeats, say) for target in targets]
    return {
        "machine": {**race.machine(), "features": features()},
        "repeats": repeats,
        "rows": len(indexed),
        "dim": indexed.shape[1],
        "vectors": "drawn" if vectors is None else vectors.name,
        "targets": tables,
        "overhead": overhead(indexed, scoring.queries, repeats=repeats, say=say) if not only else None,
    }


def table(
    engines: Mapping[str, Engine],
    about: Mapping[str, Mapping[str, Any]],
    target: float,
    tuning: Asked,
    scoring: Asked,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One target: who reaches it, with which effort, and how fast they are then."""
    result = {name: dict(row) for name, row in about.items()}
    chosen: dict[str, int] = {}
    for name, engine in engines.items():
        say(f"recall {target:g}: {name}")
        effort = least_effort(engine, tuning, target)
        if effort is None:
            result[name]["problem"] = f"stays below recall {target:g}"
            continue
        chosen[name] = effort
        result[name] |= {"effort": effort or None, "recall": recall_of(engine, scoring, effort)}
    if chosen:
        single = {
            name: partial(one_by_one, engines[name], scoring, effort) for name, effort in chosen.items()
        }
        batch = {
            name: partial(engines[name].search, scoring.queries[:BATCH], effort)
            for name, effort in chosen.items()
        }
        for name, timing in race.race(single, repeats=repeats).items():
            result[name] |= {"single": TIMED / timing.seconds, "spread": timing.spread}
        for name, timing in race.race(batch, repeats=repeats).items():
            result[name]["batch 64"] = BATCH / timing.seconds
    return {"target": target, "rows": list(result.values())}


def one_by_one(engine: Engine, asked: Asked, effort: int) -> None:
    for query in asked.queries[:TIMED]:
        engine.search(query[None], effort)


def recall_of(engine: Engine, asked: Asked, effort: int) -> float:
    return float(recalls(asked, engine.search(asked.queries, effort)).mean())


def least_effort(engine: Engine, asked: Asked, target: float) -> int | None:
    """The least effort, to a twentieth, whose recall reaches the target; None when none does."""
    low, high = engine.efforts
    if not high:
        return 0 if recall_of(engine, asked, 0) >= target else None
    bad, good = low - 1, low
    while recall_of(engine, asked, good) < target:
        if good >= high:
            return None
        bad, good = good, min(2 * good, high)
    while good - bad > max(1, good // 20):
        middle = (bad + good) // 2
        bad, good = (bad, middle) if recall_of(engine, asked, middle) >= target else (middle, good)
    return good


def overhead(
    indexed: Vectors, queries: Vectors, *, repeats: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """What a collection's ids, payloads and bookkeeping cost beside the bare call of the same index."""
    from dml.collection import NewItem, create_collection

    say("the collection's own overhead")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "collection"
        with create_collection(path, dim=indexed.shape[1], fingerprint="0" * 64, index="hnsw") as there:
            for start in range(0, len(indexed), BLOCK):
                rows = indexed[start : start + BLOCK]
                there.add([NewItem(f"{start + n}", row, {"label": n % 10}) for n, row in enumerate(rows)])
            there.build_index(measure=False)
            bare = make_index("hnsw", indexed.shape[1], device="cpu")
            bare.add(np.arange(len(indexed)), indexed)
            some = queries[:TIMED]
            found = race.race(
                {
                    "index": lambda: [bare.search(query[None], K) for query in some],
                    "collection": lambda: [there.search(query[None], limit=K) for query in some],
                },
                repeats=repeats,
            )
    return {
        "index ms": found["index"].seconds / TIMED * 1e3,
        "collection ms": found["collection"].seconds / TIMED * 1e3,
        "share": found["collection"].seconds / found["index"].seconds - 1,
    }


BLOCK = 10_000  # items added at once


def drawn(count: int, dim: int, *, seed: int = 0) -> Vectors:
    """Unit rows spread as those of a trained model: classes, and directions that matter less and less."""
    rng = np.random.default_rng(seed)
    weight = np.arange(1, dim + 1, dtype=np.float32) ** -0.7
    centres = rng.standard_normal((2000, dim), np.float32) * weight
    rows = centres[rng.integers(0, len(centres), count)]
    rows = rows + np.float32(0.6) * weight * rng.standard_normal((count, dim), np.float32)
    rows = rows @ np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def read(path: Path, rows: int) -> Vectors:
    """Up to so many rows and the queries, in an order that mixes them. Raises DataError."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an array of vectors: {error}") from None
    if found.ndim != 2 or len(found) < 10 * (TUNING + SCORING):
        raise DataError(
            f"{path} holds an array of shape {found.shape}; wanted are at least "
            f"{10 * (TUNING + SCORING):,} rows"
        )
    order: NDArray[np.int64] = np.random.default_rng(0).permutation(len(found))[: rows + TUNING + SCORING]
    return check_vectors(found[np.sort(order)], found.shape[1], str(path))[np.argsort(np.argsort(order))]


def features() -> list[str]:
    """What of the processor matters here."""
    from dml.startup import processor_flags

    return sorted(
        processor_flags() & {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}
    )


COLUMNS: Mapping[str, Callable[[Any], str]] = {
    "effort": str,
    "recall": "{:.4f}".format,
    "single": "{:,.0f}".format,
    "batch 64": "{:,.0f}".format,
    "MB": race.megabytes,
    "build s": "{:,.1f}".format,
    "spread": race.share,
}


def print_search(result: Mapping[str, Any]) -> str:
    """The tables, and the ratios to the best rival."""
    lines = [race.heading(result["machine"], result["repeats"])]
    lines.append(f"features: {' '.join(result['machine']['features']) or 'none known'}")
    for one in result["targets"]:
        lines.append(
            f"\n{result['rows']:,} x {result['dim']} ({result['vectors']}), recall@10 >= {one['target']:g}; "
            f"queries per second"
        )
        lines += race.lines_of(one["rows"], COLUMNS)
        lines += best_ratio(one["rows"])
    if result["overhead"]:
        cost = result["overhead"]
        lines.append(
            f"\nhnsw: {cost['index ms']:.3f} ms a query bare, {cost['collection ms']:.3f} ms as a collection "
            f"(+{cost['share']:.0%})"
        )
    return "\n".join(lines)


def best_ratio(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Our quickest against the quickest rival, with what both take."""
    reached = [row for row in rows if "single" in row]
    ours = [row for row in reached if row["name"].startswith("dml")]
    theirs = [row for row in reached if not row["name"].startswith("dml")]
    if not ours or not theirs:
        return []
    best, rival = (max(some, key=lambda row: row["single"]) for some in (ours, theirs))
    return [
        f"{best['name']} answers {best['single'] / rival['single']:.2f} x as many single queries as "
        f"{rival['name']}, with {best['MB'] / rival['MB']:.2f} x its memory and "
        f"{best['build s'] / max(rival['build s'], 1e-9):.2f} x its build time"
    ]
