"""Recall@K, MAP@R and R-Precision of rows searched among themselves, by several programs; their memory."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.metrics import retrieval_metrics
from eval.speed.peak import peak_memory
from eval.speed.race import Disagreement, machine, race

Points = NDArray[np.float32]
Figures = Callable[[], dict[str, float]]

TOLERANCE = 1e-4
"""Largest difference of a figure; products summed in another order decide a few ties differently."""
LIMIT = "limit: the product alone"
EVERY_NEIGHBOUR = 20_000
"""Rows up to which AccuracyCalculator also runs as it is set by default: it then looks for all neighbours of
each row, and 60,000 rows take 43 GB."""


def speed_of_metrics(
    *,
    rows: Sequence[int],
    dim: int,
    per_class: Sequence[int],
    repeats: int,
    reference: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Recall@1, MAP@R and R-Precision of N x D vectors searched among themselves, by several programs.

    Raises:
        Disagreement: a contender finds other figures than ours.
    """
    here = machine()
    sizes = []
    for count in rows:
        for each in per_class:
            say(f"metrics of {count:,} rows, {each:,} a class")
            points, labels = clouds(count, dim=dim, classes=max(2, count // each))
            calls = metric_contenders(points, labels, reference=reference)
            figures = {name: call() for name, call in calls.items()}
            worst = agreement(figures)
            timings = race(calls, repeats=repeats)
            table = [
                {
                    "name": name,
                    "seconds": timing.seconds,
                    "spread": timing.spread,
                    "x limit": timing.seconds / timings[LIMIT].seconds,
                    "x dml": timing.seconds / timings["dml"].seconds,
                    "figures": figures[name],
                }
                for name, timing in timings.items()
            ]
            sizes.append(
                {
                    "rows": count,
                    "dim": dim,
                    "classes": int(labels.max()) + 1,
                    "contenders": table,
                    "agreement": worst,
                }
            )
    return {"what": "metrics", "machine": here, "repeats": repeats, "sizes": sizes}


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


def metric_contenders(points: Points, labels: NDArray[np.int64], *, reference: bool) -> dict[str, Figures]:
    """Name -> a call that gives the figures. Ours first; those that are not installed are left out."""
    found: dict[str, Figures] = {"dml": lambda: ours(points, labels)}
    try:
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    except ModuleNotFoundError:
        pass
    else:
        wanted = ("precision_at_1", "r_precision", "mean_average_precision_at_r")

        def theirs(depth: str | None) -> Figures:
            calculator = AccuracyCalculator(include=wanted, k=depth)

            def call() -> dict[str, float]:
                figures = calculator.get_accuracy(points, labels)
                return {
                    "recall@1": float(figures["precision_at_1"]),
                    "map@r": float(figures["mean_average_precision_at_r"]),
                    "r_precision": float(figures["r_precision"]),
                }

            return call

        found['pytorch-metric-learning, k="max_bin_count"'] = theirs("max_bin_count")
        if len(points) <= EVERY_NEIGHBOUR:
            found["pytorch-metric-learning, as set by default"] = theirs(None)
    try:
        import torch
    except ModuleNotFoundError:
        pass
    else:
        found["torch, tiled product + topk"] = lambda: tiled_torch(torch, points, labels)
    found[LIMIT] = lambda: product_alone(points)
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


def agreement(figures: dict[str, dict[str, float]]) -> float:
    """The largest difference of a figure between ours and another contender.

    Raises:
        Disagreement: above `TOLERANCE`.
    """
    expected = figures["dml"]
    worst = 0.0
    for name, found in figures.items():
        for figure, value in found.items():
            difference = abs(value - expected[figure])
            if not difference <= TOLERANCE:
                raise Disagreement(
                    f'"{name}" finds {figure} {value:.6f} and dml {expected[figure]:.6f}; '
                    f"a race needs equal results"
                )
            worst = max(worst, difference)
    return worst


def clouds(count: int, *, dim: int, classes: int, seed: int = 0) -> tuple[Points, NDArray[np.int64]]:
    """Unit vectors around random class centres, hard enough that figures are neither 0 nor 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    points = rng.standard_normal((classes, dim), dtype=np.float32)[labels] * np.float32(0.35)
    points += rng.standard_normal((count, dim), dtype=np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True), labels
