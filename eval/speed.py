"""How fast, against whom: side by side in one run, on this machine.

    python -m eval.speed metrics --rows 10000 60000 --out metrics.json
    python -m eval.speed memory --rows 120000 --limit-gib 2

Every contender gets the same vectors and threads; repeats alternate between the contenders, so that a busy
neighbour slows all of them; what counts are medians and ratios inside one run.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.errors import DmlError
from dml.metrics import retrieval_metrics

Points = NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One contender's result."""

    name: str
    seconds: float  # median
    spread: float  # (largest - smallest) / median
    figures: dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write JSON; return the exit code."""
    args = parser().parse_args(arguments)
    if args.threads:
        limit_threads(args.threads)
    try:
        if args.what == "memory":
            result = memory_of_metrics(
                args.rows[0], dim=args.dim, per_class=args.per_class, limit=args.limit_gib
            )
        else:
            result = speed_of_metrics(
                rows=args.rows,
                dim=args.dim,
                per_class=args.per_class,
                repeats=args.repeats,
                reference=args.loop,
            )
    except DmlError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(table(result) if args.what == "metrics" else json.dumps(result, indent=1))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))
    return 0


def parser() -> argparse.ArgumentParser:
    usage = argparse.ArgumentParser(prog="python -m eval.speed", description=(__doc__ or "").split("\n")[0])
    usage.add_argument("what", choices=("metrics", "memory"))
    usage.add_argument(
        "--rows", type=int, nargs="+", default=[10_000], help="vectors, searched among themselves"
    )
    usage.add_argument("--dim", type=int, default=512)
    usage.add_argument("--per-class", type=int, default=20, help="vectors of a class on average")
    usage.add_argument("--repeats", type=int, default=5)
    usage.add_argument("--threads", type=int, default=0, help="of every contender; 0: their own choice")
    usage.add_argument("--loop", action="store_true", help="also a plain loop over queries, for context")
    usage.add_argument("--limit-gib", type=float, default=2.0, help="memory: address space of the process")
    usage.add_argument("--out", type=Path, help="JSON file")
    return usage


def speed_of_metrics(
    *, rows: Sequence[int], dim: int, per_class: int, repeats: int, reference: bool = False
) -> dict[str, Any]:
    """Recall@1, MAP@R and R-Precision of N x D vectors searched among themselves, by several programs."""
    sizes = []
    for count in rows:
        points, labels = clouds(count, dim=dim, classes=max(2, count // per_class))
        contenders = metric_contenders(points, labels, reference=reference)
        measured = race(contenders, repeats=repeats)
        sizes.append(
            {
                "rows": count,
                "dim": dim,
                "classes": int(labels.max()) + 1,
                "contenders": [vars(row) for row in measured],
                "agreement": agreement(measured),
            }
        )
    return {"what": "metrics", "machine": machine(), "repeats": repeats, "sizes": sizes}


def memory_of_metrics(rows: int, *, dim: int, per_class: int, limit: float) -> dict[str, Any]:
    """Peak memory and time of our metrics in a process that may not have more than `limit` GiB in all.

    Raises:
        MemoryError: the limit is too low.
    """
    import resource

    allowed = int(limit * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    classes = max(2, rows // per_class)
    rng = np.random.default_rng(0)
    labels = rng.integers(classes, size=rows)
    points = np.empty((rows, dim), np.float32)
    for start in range(0, rows, 4096):  # in parts: making the vectors must not take more than measuring them
        part = np.random.default_rng([1, start]).standard_normal(
            (min(4096, rows - start), dim), dtype=np.float32
        )
        for row, label in enumerate(labels[start : start + len(part)]):
            part[row] += 0.35 * np.random.default_rng([2, label]).standard_normal(dim, dtype=np.float32)
        points[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    before = peak_memory()
    started = time.perf_counter()
    figures = retrieval_metrics(points, labels).figures()
    return {
        "what": "memory",
        "rows": rows,
        "dim": dim,
        "classes": classes,
        "limit_gib": limit,
        "vectors_gib": round(points.nbytes / 2**30, 3),
        "before_gib": round(before / 2**30, 3),
        "peak_gib": round(peak_memory() / 2**30, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "figures": figures,
        "machine": machine(),
    }


def peak_memory() -> int:
    """The most bytes that this process has had in memory.

    Linux's `ru_maxrss` starts from the peak of the process that started this one; /proc does not.
    """
    import resource

    status = Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def metric_contenders(
    points: Points, labels: NDArray[np.int64], *, reference: bool
) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> a call that gives the figures. Ours first; those that are not installed are left out."""
    found: dict[str, Callable[[], dict[str, float]]] = {"dml": lambda: ours(points, labels)}
    try:
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    except ModuleNotFoundError:
        pass
    else:
        wanted = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
        calculator = AccuracyCalculator(include=wanted)

        def theirs() -> dict[str, float]:
            figures = calculator.get_accuracy(points, labels)
            return {
                "recall@1": float(figures["precision_at_1"]),
                "map@r": float(figures["mean_average_precision_at_r"]),
                "r_precision": float(figures["r_precision"]),
            }

        found["pytorch-metric-learning"] = theirs
    try:
        import torch
    except ModuleNotFoundError:
        pass
    else:
        found["torch, tiled product + topk"] = lambda: tiled_torch(torch, points, labels)
    found["limit: the product alone"] = lambda: product_alone(points)
    if reference:
        found["loop over queries"] = lambda: loop(points, labels)
    return found


def ours(points: Points, labels: NDArray[np.int64]) -> dict[str, float]:
    metrics = retrieval_metrics(points, labels, ks=(1,))
    return metrics.figures()


def tiled_torch(torch: Any, points: Points, labels: NDArray[np.int64], tile: int = 1024) -> dict[str, float]:
    """The best straightforward alternative: products of tiles and torch.topk, in float32."""
    x, y = torch.from_numpy(points), torch.from_numpy(labels)
    relevant = torch.bincount(y)[y] - 1
    depth = int(relevant.max())
    ranks = torch.arange(1, depth + 1)
    first = average = precision = 0.0
    for start in range(0, len(x), tile):
        product = x[start : start + tile] @ x.T
        here = torch.arange(len(product))
        product[here, here + start] = -torch.inf
        nearest = product.topk(depth, dim=1).indices
        wanted = relevant[start : start + tile, None]
        every = y[nearest] == y[start : start + tile, None]
        hits = every & (ranks <= wanted)
        found = hits.cumsum(1)
        counted = wanted[:, 0] > 0
        size = wanted.clamp(min=1)
        first += float(every[:, 0][counted].sum())
        average += float(((found / ranks * hits).sum(1, keepdim=True) / size)[counted].sum())
        precision += float((found[:, -1:] / size)[counted].sum())
    queries = int((relevant > 0).sum())
    return {"recall@1": first / queries, "map@r": average / queries, "r_precision": precision / queries}


def product_alone(points: Points, rows: int = 1024) -> dict[str, float]:
    """What no exact method can do without: every similarity, thrown away at once."""
    space = np.empty((min(rows, len(points)), len(points)), np.float32)
    for start in range(0, len(points), rows):
        part = points[start : start + rows]
        np.matmul(part, points.T, out=space[: len(part)])
    return {}


def loop(points: Points, labels: NDArray[np.int64]) -> dict[str, float]:
    """One query at a time with a full sort, as the definitions read."""
    sums = np.zeros(3)
    queries = 0
    for row, point in enumerate(points):
        scores = points @ point
        scores[row] = -np.inf
        order = np.argsort(-scores, kind="stable")[:-1]
        hits = labels[order] == labels[row]
        relevant = int(hits.sum())
        if not relevant:
            continue
        queries += 1
        top = hits[:relevant]
        precision = np.cumsum(top) / np.arange(1, relevant + 1)
        sums += (hits[0], (precision * top).sum() / relevant, top.mean())
    return dict(zip(("recall@1", "map@r", "r_precision"), (sums / queries).tolist(), strict=True))


def race(contenders: dict[str, Callable[[], dict[str, float]]], *, repeats: int) -> list[Row]:
    """Time all contenders in turns after one warm-up each."""
    figures = {name: call() for name, call in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        names = list(contenders)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            started = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - started)
    return [
        Row(
            name,
            statistics.median(taken),
            (max(taken) - min(taken)) / statistics.median(taken),
            figures[name],
        )
        for name, taken in seconds.items()
    ]


def agreement(rows: Sequence[Row]) -> float:
    """The largest difference of a figure between ours and another contender."""
    reference = rows[0].figures
    return max(
        (abs(value - reference[name]) for row in rows[1:] for name, value in row.figures.items()), default=0.0
    )


def clouds(count: int, *, dim: int, classes: int, seed: int = 0) -> tuple[Points, NDArray[np.int64]]:
    """Unit vectors around random class centres, hard enough that figures are neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    points = rng.standard_normal((classes, dim), dtype=np.float32)[labels] * np.float32(0.35)
    points += rng.standard_normal((count, dim), dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True), labels


def table(result: dict[str, Any]) -> str:
    """The result as text; the last two columns are ratios of medians."""
    here = result["machine"]
    lines = [
        f"{here['processor']}, {here['threads']} of {here['processors']} processors, {result['repeats']} "
        f"repeats"
    ]
    for size in result["sizes"]:
        rows = size["contenders"]
        limit = next(row["seconds"] for row in rows if row["name"].startswith("limit"))
        own = rows[0]["seconds"]
        lines.append(f"\nmetrics, {size['rows']:,} x {size['dim']}, {size['classes']:,} classes")
        lines.append(f"{'':<32}{'seconds':>10}{'spread':>9}{'x limit':>9}{'x dml':>9}")
        lines += [
            f"{row['name']:<32}{row['seconds']:>10.3f}{row['spread']:>9.0%}"
            f"{row['seconds'] / limit:>9.2f}{row['seconds'] / own:>9.2f}"
            for row in rows
        ]
        lines.append(f"largest difference of a figure: {size['agreement']:.1e}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor_name(),
        "processors": processors,
        "threads": os.environ.get("OMP_NUM_THREADS", str(processors)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def processor_name() -> str:
    """The model as the system names it."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def limit_threads(count: int) -> None:
    """Give every contender the same number of threads: start again with it in the environment."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    if all(os.environ.get(name) == str(count) for name in names):
        return
    os.environ.update(dict.fromkeys(names, str(count)))
    os.execv(sys.executable, [sys.executable, "-m", "eval.speed", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
