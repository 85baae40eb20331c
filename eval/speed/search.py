"""Search at equal recall: our kinds of index and other engines, over the same vectors; see `search_rivals`.

Every contender gets the same rows, threads and queries. What is raced, one query at a time and in batches of
64, is the least effort at which its recall@10 over these queries reaches a target: so all rows of a table
have found as much. (Whether an effort keeps its recall for other queries is for an index's promise,
`dml.index.tune`.) Memory is what the engine keeps: by its own count, or reckoned from its arrays.
"""

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.collection import NewItem, create_collection, open_collection
from dml.collection.local import LocalCollection
from dml.errors import DataError
from dml.index import load_index, make_index
from dml.index.base import VectorIndex, Vectors, check_vectors
from dml.index.tune import Asked, Plan, asked_of, plans, recalls
from eval.speed import race
from eval.speed.embeddings import queries_beside
from eval.speed.search_rivals import (
    Build,
    Engine,
    K,
    LeftOut,
    Ours,
    autofaiss_index,
    faiss_flat,
    faiss_hnsw,
    hnswlib_index,
    keep,
    kept,
    milvus_lite,
    usearch_index,
)

BATCH = 64
QUERIES = 1000

TIMED = 64
"""Queries in a turn of the race, one by one."""

TURN = 0.5
"""Seconds that a turn of single queries takes at most, about."""

OVERHEAD_ROWS = 100_000
"""Items of the collections whose overhead is measured, at most."""

PAYLOAD = {"label": "class 7", "price": 12.5, "tags": ["red", "leather"], "source": "catalogue/2024"}


def our_engine(plan: Plan, rows: Vectors) -> Engine:
    index = make_index(plan.kind, rows.shape[1], device="cpu", **plan.options)
    index.prepare(rows, len(rows))
    index.add(np.arange(len(rows)), rows)
    return Ours(index, plan.efforts if plan.efforts != (1, 1) else (0, 0))


def contenders(
    count: int, dim: int, *, threads: int, only: Sequence[str], autofaiss: Path | None = None
) -> dict[str, Build]:
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
        "autofaiss's choice": partial(autofaiss_index, python=autofaiss, threads=threads),
        "Milvus Lite HNSW16": milvus_lite,
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
    autofaiss: Path | None = None,
    keep_in: Path | None = None,
) -> dict[str, Any]:
    """Build all contenders, find each one's effort for every target, and race those that reach it.

    Args:
        only: parts of names; "overhead" is that of a collection. None: all.
        autofaiss: an interpreter that has it.
        keep_in: folder for what is built: a run that was stopped goes on with it, and another need not build.

    Raises:
        DataError: `vectors` is no array of unit rows, or too small.
    """
    indexed, queries = drawn_apart(rows, dim) if vectors is None else read(vectors, rows)
    blocks = [(np.arange(len(indexed)), indexed)]
    asked = asked_of(queries, blocks)
    engines: dict[str, Engine] = {}
    about: dict[str, dict[str, Any]] = {}
    builds = contenders(len(indexed), indexed.shape[1], threads=threads, only=only, autofaiss=autofaiss)
    for name, build in builds.items():
        try:
            say(f"building {name}")
            engines[name], seconds = built(name, build, indexed, threads=threads, folder=keep_in)
        except ImportError as error:
            about[name] = {"name": name, "problem": f"{error.name} is not installed"}
        except LeftOut as error:
            about[name] = {"name": name, "problem": str(error)}
        else:
            about[name] = {"name": name, "MB": engines[name].nbytes, "build s": seconds}
    tables = [table(engines, about, target, asked, repeats, say) for target in targets]
    return {
        "machine": {**race.machine(), "features": features()},
        "repeats": repeats,
        "rows": len(indexed),
        "dim": indexed.shape[1],
        "vectors": "drawn" if vectors is None else vectors.name,
        "targets": tables,
        "overhead": overhead(indexed, asked.queries, repeats=repeats, say=say)
        if not only or "overhead" in only
        else [],
    }


def built(
    name: str, build: Build, rows: Vectors, *, threads: int, folder: Path | None
) -> tuple[Engine, float]:
    """A contender over the rows, and the seconds that building it took; from the folder, if it is there."""
    about = {
        "rows": len(rows),
        "dim": rows.shape[1],
        "threads": threads,
        "digest": zlib.crc32(rows[-1].tobytes()),
    }
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    path = None if folder is None else folder / f"{slug}-{len(rows)}x{rows.shape[1]}.index"
    found = None if path is None else kept(path, about)
    if found is not None:
        return found
    started = time.perf_counter()
    engine = build(rows)
    seconds = time.perf_counter() - started
    if path is not None:
        keep(engine, path, {**about, "seconds": seconds})
    return engine, seconds


def table(
    engines: Mapping[str, Engine],
    about: Mapping[str, Mapping[str, Any]],
    target: float,
    asked: Asked,
    repeats: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One target: who reaches it, with which effort, and how fast they are then."""
    result = {name: dict(row) for name, row in about.items()}
    chosen: dict[str, int] = {}
    for name, engine in engines.items():
        say(f"recall {target:g}: {name}")
        effort = least_effort(engine, asked, target)
        if effort is None:
            result[name]["problem"] = f"stays below recall {target:g}"
            continue
        chosen[name] = effort
        result[name] |= {"effort": effort or None, "recall": recall_of(engine, asked, effort)}
    if chosen:
        turns = {name: turn_of(engines[name], asked, effort) for name, effort in chosen.items()}
        single = {
            name: partial(one_by_one, engines[name], asked.queries[: turns[name]], effort)
            for name, effort in chosen.items()
        }
        batch = {
            name: partial(engines[name].search, asked.queries[:BATCH], effort)
            for name, effort in chosen.items()
        }
        for name, timing in race.race(single, repeats=repeats).items():
            result[name] |= {"single": turns[name] / timing.seconds, "spread": timing.spread}
        for name, timing in race.race(batch, repeats=repeats).items():
            result[name]["batch 64"] = BATCH / timing.seconds
    return {"target": target, "rows": list(result.values())}


def turn_of(engine: Engine, asked: Asked, effort: int) -> int:
    """Single queries in a turn: fewer where they take long."""
    started = time.perf_counter()
    one_by_one(engine, asked.queries[:2], effort)
    each = (time.perf_counter() - started) / 2
    return max(2, min(TIMED, round(TURN / max(each, 1e-6))))


def one_by_one(engine: Engine, queries: Vectors, effort: int) -> None:
    for query in queries:
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
) -> list[dict[str, Any]]:
    """What a collection's ids, payloads and bookkeeping cost beside the bare call of the same index."""
    indexed = indexed[:OVERHEAD_ROWS]
    found = []
    for kind in ("hnsw", "faiss_flat"):
        for payload in ({}, PAYLOAD):
            say(f"the overhead of a collection, {kind}, {'with' if payload else 'without'} payloads")
            with TemporaryDirectory() as folder:
                path = Path(folder) / "collection"
                fill(path, kind, indexed, payload)
                snapshot = max((path / "snapshots").glob("*.index"), key=lambda file: int(file.stem))
                with open_collection(path, merge="manual") as there:
                    found += raced_overhead(
                        there, load_index(snapshot, device="cpu"), queries, kind, repeats=repeats
                    )
                    found[-2]["payload"] = found[-1]["payload"] = bool(payload)
    return found


def fill(path: Path, kind: str, rows: Vectors, payload: Mapping[str, Any]) -> None:
    with create_collection(path, dim=rows.shape[1], fingerprint="0" * 64, index=kind) as there:
        for start in range(0, len(rows), BLOCK):
            part = enumerate(rows[start : start + BLOCK], start)
            there.add([NewItem(f"{n}", row, payload) for n, row in part])
        there.build_index(measure=False)


def raced_overhead(
    there: LocalCollection, bare: VectorIndex, queries: Vectors, kind: str, *, repeats: int
) -> list[dict[str, Any]]:
    """Single queries and a batch of `BATCH`, as the collection and its index answer them."""
    rows = []
    for name, parts in (("single", [query[None] for query in queries[:TIMED]]), ("batch", [queries[:BATCH]])):
        calls = {
            "index": partial(each, lambda part: bare.search(part, K), parts),
            "collection": partial(each, lambda part: there.search(part, limit=K), parts),
        }
        taken = race.race(calls, repeats=repeats)
        count = sum(map(len, parts))
        rows.append(
            {
                "kind": kind,
                "queries": name,
                "index ms": taken["index"].seconds / count * 1e3,
                "collection ms": taken["collection"].seconds / count * 1e3,
                "share": taken["collection"].seconds / taken["index"].seconds - 1,
            }
        )
    return rows


def each(call: Callable[[Vectors], object], parts: Sequence[Vectors]) -> None:
    for part in parts:
        call(part)


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


def drawn_apart(rows: int, dim: int) -> tuple[Vectors, Vectors]:
    """Rows to index and queries."""
    everything = drawn(rows + QUERIES, dim)
    return everything[:rows], everything[rows:]


def read(path: Path, rows: int) -> tuple[Vectors, Vectors]:
    """Up to so many rows, and the queries: those beside the file, or some of its rows. Raises DataError."""
    found, beside = opened(path), queries_beside(path)
    if beside.exists():
        asked = opened(beside)
        if asked.shape[1:] != found.shape[1:] or len(asked) < QUERIES:
            raise DataError(
                f"{beside} holds an array of shape {asked.shape}; wanted are {QUERIES:,} queries "
                f"for the rows of {path.name}, {found.shape}"
            )
        parts = ((found[:rows], path), (asked[:QUERIES], beside))
        indexed, queries = (check_vectors(part, found.shape[1], str(name)) for part, name in parts)
        return indexed, queries
    if len(found) < 10 * QUERIES:
        raise DataError(
            f"{path} holds an array of shape {found.shape}; wanted are at least {10 * QUERIES:,} rows"
        )
    order: NDArray[np.int64] = np.random.default_rng(0).permutation(len(found))[: rows + QUERIES]
    mixed = check_vectors(found[np.sort(order)], found.shape[1], str(path))[np.argsort(np.argsort(order))]
    return mixed[:-QUERIES], mixed[-QUERIES:]


def opened(path: Path) -> NDArray[Any]:
    """An array of rows, read as it is used. Raises DataError."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an array of vectors: {error}") from None
    if found.ndim != 2:
        raise DataError(f"{path} holds an array of shape {found.shape}, not rows of numbers")
    return found


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
        lines.append(f"\na collection of up to {OVERHEAD_ROWS:,} items, ms a query:")
        lines += race.lines_of([named(row) for row in result["overhead"]], OVERHEAD_COLUMNS)
    return "\n".join(lines)


def named(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the overhead as the table prints it."""
    payload = "with payloads" if row["payload"] else "without"
    return {**row, "name": f"{row['kind']}, {row['queries']}, {payload}"}


def best_ratio(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Our quickest against the quickest rival, also within half of its memory and a fifth of its build time;
    and what compares all vectors against faiss doing so.
    """
    reached = {row["name"]: row for row in rows if "single" in row}
    ours = [row for name, row in reached.items() if name.startswith("dml")]
    theirs = [row for name, row in reached.items() if not name.startswith("dml")]
    if not ours or not theirs:
        return []
    rival = max(theirs, key=lambda row: row["single"])
    small = [row for row in ours if row["MB"] <= rival["MB"] / 2]
    quick = [row for row in small if row["build s"] <= rival["build s"] / 5]
    lines = []
    limits = {"": ours, "half the memory": small, "half the memory and a fifth of the build time": quick}
    for limit, some in limits.items():
        best = max(some, key=lambda row: row["single"], default=None)
        within = limit and f" (the quickest within {limit})"
        lines.append(f"ours within {limit}: none" if best is None else against(best, rival, within))
    flat = reached.get("faiss Flat")
    for name in ("dml flat, float32", "dml matrix"):
        if flat is not None and name in reached:
            row = reached[name]
            lines.append(
                f"{name} answers {row['single'] / flat['single']:.2f} x as many single queries as faiss "
                f"Flat, and {row['batch 64'] / flat['batch 64']:.2f} x as many in batches of {BATCH}"
            )
    return lines


def against(best: Mapping[str, Any], rival: Mapping[str, Any], within: str) -> str:
    return (
        f"{best['name']}{within} answers {best['single'] / rival['single']:.2f} x as many single queries as "
        f"{rival['name']}, with {best['MB'] / rival['MB']:.2f} x its memory and "
        f"{best['build s'] / max(rival['build s'], 1e-9):.2f} x its build time"
    )


OVERHEAD_COLUMNS: Mapping[str, Callable[[Any], str]] = {
    "index ms": "{:,.3f}".format,
    "collection ms": "{:,.3f}".format,
    "share": "{:+.0%}".format,
}
