"""A plot of a suite as SVG text: a dot and an interval for each row, readable on light and dark pages.

Written by hand rather than by a plotting library: the same results give the same file, byte for byte, on any
machine, text stays text, and its colours follow the reader's setting.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from eval.benchmark.compare import Line, Table
from eval.benchmark.statistics import Estimate

WIDTH, LEFT, RIGHT, TOP, STEP, GAP = 760, 230, 116, 62, 24, 14
"""Pixels: of the picture, of titles, of figures at the right, above the rows, per row, between groups."""

COLOURS = (("#2a6fbb", "#6cb0f5"), ("#b4532a", "#f09a6c"))
"""Validation and test: (on light pages, on dark ones)."""

STYLE = f"""
 text {{ font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #333 }}
 .group {{ font-size: 11px; fill: #767676 }}
 .axis {{ font-size: 11px; fill: #767676 }}
 .figure {{ font-size: 12px; font-variant-numeric: tabular-nums }}
 .grid {{ stroke: #e3e3e3 }}
 .at {{ fill: {COLOURS[0][0]} }}
 .bt {{ fill: {COLOURS[1][0]} }}
 .a {{ stroke: {COLOURS[0][0]}; fill: {COLOURS[0][0]} }}
 .b {{ stroke: {COLOURS[1][0]}; fill: {COLOURS[1][0]} }}
 @media (prefers-color-scheme: dark) {{
  text {{ fill: #ddd }}
  .group, .axis {{ fill: #999 }}
  .grid {{ stroke: #3a3a3a }}
  .at {{ fill: {COLOURS[0][1]} }}
  .bt {{ fill: {COLOURS[1][1]} }}
  .a {{ stroke: {COLOURS[0][1]}; fill: {COLOURS[0][1]} }}
  .b {{ stroke: {COLOURS[1][1]}; fill: {COLOURS[1][1]} }}
 }}
"""


@dataclass(frozen=True)
class Scale:
    """From a figure to a place on the picture."""

    low: float
    high: float
    step: float

    def x(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def marks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + number * self.step for number in range(count + 1)]


def plot(table: Table) -> str:
    """The SVG of a table's MAP@R, or an empty text where nothing is finished enough to be shown."""
    shown = [line for line in table.lines if line.figures]
    if not shown:
        return ""
    tested = any(line.test for line in shown)
    scale = scale_of([x for x in shown if table.suite.rows[x.row].kind == "trained"] or shown)
    parts, y = [], float(TOP)
    for group in dict.fromkeys(line.group for line in shown):
        rows = [line for line in shown if line.group == group]
        parts.append(f'<text class="group" x="0" y="{y + 4:g}">{escape(group)}</text>')
        y += STEP - 6
        for line in rows:
            parts += row_marks(line, y, scale)
            y += STEP
        y += GAP
    height = y + 12
    title = escape(f"{table.suite.title}: MAP@R")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
            f'aria-label="{title}">',
            f"<style>{STYLE}</style>",
            f'<text x="0" y="16" style="font-weight: 600">{title}</text>',
            *legend(tested),
            *grid(scale, y - GAP),
            *parts,
            "</svg>",
            "",
        ]
    )


def scale_of(lines: Sequence[Line]) -> Scale:
    """An axis with round marks around every dot and interval."""
    values = [
        value
        for line in lines
        for found in (line.figures, line.test)
        if found
        for estimate in [found["map_at_r"]]
        for value in (estimate.mean, estimate.low, estimate.high)
        if value is not None
    ]
    low, high = max(0.0, min(values)), min(1.0, max(values))
    step = next((s for s in (0.01, 0.02, 0.05, 0.1) if (high - low) / s <= 8), 0.2)
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    return Scale(bottom, top if top > bottom else bottom + step, step)


def grid(scale: Scale, bottom: float) -> list[str]:
    parts = []
    for mark in scale.marks():
        x = f"{scale.x(mark):.1f}"
        parts.append(f'<line class="grid" x1="{x}" y1="{TOP - 10}" x2="{x}" y2="{bottom:g}"/>')
        parts.append(f'<text class="axis" x="{x}" y="{bottom + 16:g}" text-anchor="middle">{mark:.2f}</text>')
    return parts


def legend(tested: bool) -> list[str]:
    """What the dots mean."""
    parts = [
        '<circle class="a" cx="6" cy="34" r="4.5"/>',
        '<text class="axis" x="16" y="38">validation classes, mean and 95 % interval over seeds</text>',
    ]
    if tested:
        parts += [
            '<rect class="b" x="352" y="30" width="8" height="8"/>',
            '<text class="axis" x="366" y="38">test classes, looked at once per frozen recipe</text>',
        ]
    return parts


def row_marks(line: Line, y: float, scale: Scale) -> list[str]:
    """Title, dots, intervals and figures of one row."""
    unfinished = f" ({line.seeds} of {line.wanted} seeds)" if line.seeds < line.wanted else ""
    parts = [f'<text x="12" y="{y + 4:g}">{escape(line.title + unfinished)}</text>']
    both = bool(line.test)
    for kind, found, shift in (("a", line.figures, -4 if both else 0), ("b", line.test, 4)):
        if not found:
            continue
        estimate = found["map_at_r"]
        parts += dot(kind, estimate, y + shift, scale)
        column = WIDTH - 48 if kind == "a" else WIDTH
        parts.append(
            f'<text class="figure {kind}t" x="{column}" y="{y + 4:g}" text-anchor="end">'
            f"{estimate.mean:.3f}</text>"
        )
    return parts


def dot(kind: str, estimate: Estimate, y: float, scale: Scale) -> list[str]:
    """A mean with its interval; an arrow at the edge for one that lies outside of the axis."""
    if estimate.mean < scale.low:
        x = LEFT - 2
        return [f'<path class="{kind}" stroke="none" d="M{x} {y:g} l9 -5 v10 z"/>']
    parts, x = [], scale.x(estimate.mean)
    if estimate.low is not None and estimate.high is not None:
        left, right = scale.x(max(estimate.low, scale.low)), scale.x(min(estimate.high, scale.high))
        parts.append(
            f'<line class="{kind}" x1="{left:.1f}" y1="{y:g}" x2="{right:.1f}" y2="{y:g}" '
            f'stroke-width="2" stroke-linecap="round"/>'
        )
    if kind == "a":
        return [*parts, f'<circle class="a" cx="{x:.1f}" cy="{y:g}" r="4.5"/>']
    return [*parts, f'<rect class="b" x="{x - 4:.1f}" y="{y - 4:g}" width="8" height="8" stroke="none"/>']
