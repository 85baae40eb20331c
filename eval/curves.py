"""Plots of a report as SVG text that follows the page's colours, light or dark."""

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dml.errors import MissingExtra

# Colours that no plot uses by itself; in the finished SVG each becomes a variable of the page's style sheet.
INK, MUTED, LINE, FIRST, SECOND = "#010203", "#020304", "#030405", "#040506", "#050607"
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", FIRST: "--accent", SECOND: "--second"}

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "dml",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class History:
    """What a run wrote into metrics.jsonl."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    evaluated: list[int] = field(default_factory=list)  # steps
    validation: list[dict[str, float]] = field(default_factory=list)

    @property
    def best(self) -> int | None:
        """Which evaluation has the highest MAP@R: the model that was kept."""
        values = [figures.get("map_at_r", float("-inf")) for figures in self.validation]
        return max(range(len(values)), key=values.__getitem__) if values else None


def read_history(path: Path) -> History:
    """Read metrics.jsonl; a last line cut short by a kill is left out, a missing file is an empty history."""
    history = History()
    if not path.is_file():
        return history
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if "validation" in entry:
            history.evaluated.append(int(entry["step"]))
            history.validation.append(entry["validation"])
        elif "loss" in entry:
            history.steps.append(int(entry["step"]))
            history.losses.append(float(entry["loss"]))
    return history


def training_curves(history: History) -> str:
    """Loss over steps beside MAP@R and Recall@1 on validation; "" for an empty history."""
    if not history.steps and not history.evaluated:
        return ""
    figure_class, style = _matplotlib()
    with style(STYLE):
        figure = figure_class(figsize=(9.6, 3.0), layout="constrained")
        left, right = figure.subplots(1, 2, gridspec_kw={"wspace": 0.08})
        left.set_title("Training loss")
        left.plot(history.steps, history.losses, color=FIRST, alpha=0.25, linewidth=1)
        left.plot(history.steps, smoothed(history.losses), color=FIRST, linewidth=1.8)
        left.set_xlabel("step")
        right.set_title("Validation")
        kept = "" if history.best is None else f" (kept: {history.validation[history.best]['map_at_r']:.3f})"
        for name, label, colour in (("recall_at_1", "Recall@1", SECOND), ("map_at_r", f"MAP@R{kept}", FIRST)):
            values = [figures.get(name, float("nan")) for figures in history.validation]
            right.plot(
                history.evaluated, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=label
            )
        if history.best is not None:
            step, value = history.evaluated[history.best], history.validation[history.best]["map_at_r"]
            right.plot([step], [value], marker="o", markersize=9, markerfacecolor="none", markeredgecolor=INK)
        right.set_xlabel("step")
        right.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, borderaxespad=0, handlelength=1.4)
        return as_svg(figure, "Training loss and validation figures over optimiser steps")


def smoothed(values: Sequence[float], share: float = 0.04) -> list[float]:
    """Exponential moving average whose memory is about `share` of the series."""
    keep = 1 - 1 / max(1.0, share * len(values))
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def as_svg(figure: Any, description: str) -> str:
    """The figure as an <svg> element without fixed size, its colours taken from the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<svg ([^>]*?)width=\"[^\"]*\" height=\"[^\"]*\"", r"<svg \1", text, count=1)
    text = re.sub(
        r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg role="img" \1>', text, count=1, flags=re.DOTALL
    )
    text = text.replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    return text.replace(">", f"><title>{description}</title>", 1)


def _matplotlib() -> tuple[Any, Any]:
    """Figure and rc_context: no pyplot, so no window system and no global state."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingExtra("matplotlib, which draws the report,", "train") from None
    return Figure, rc_context
