"""Recall against queries per second of all indexes that were tried, with the chosen one marked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dml.errors import MissingExtra


def draw_tuning(table: Mapping[str, Any], out: Path) -> None:
    """Draw what `dml.index.tune.choose` found.

    Args:
        table: `Choice.table`, as manifests keep it under built["tuning"].
        out: SVG (or PNG, by its ending).

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtra("matplotlib (needed to draw)", "train") from None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, trial in enumerate(table["trials"]):
        points = [*trial["curve"], *([trial["point"]] if trial["point"] else [])]
        if not points:
            continue
        points = sorted(points, key=lambda point: point["recall"])
        recall = [point["recall"] for point in points]
        speed = [1 / max(point["latency"], 1e-9) for point in points]
        chosen = trial["name"] == table["chosen"]
        axes.plot(
            recall,
            speed,
            marker="o",
            markersize=3,
            color=f"C{number % 10}",
            linestyle=("-", "--", ":")[number // 10 % 3],
            linewidth=2.5 if chosen else 1,
            label=trial["name"],
        )
        if chosen:
            best = trial["point"]
            axes.plot(
                [best["recall"]],
                [1 / max(best["latency"], 1e-9)],
                "*",
                color="black",
                markersize=14,
                zorder=5,
            )
    target = table["promise"]["recall"]
    axes.axvline(target, color="grey", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel(f"recall@10 (line: the target, {target:g}; star: the choice)")
    axes.set_ylabel(f"single queries per second, over {table['sample']:,} vectors")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)
