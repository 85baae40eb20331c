"""What is printed on a drawn product: patterns, glyphs and colours. Everything is a formula on surface
coordinates.

A pattern maps surface coordinates (u to the right, v down, in units in which a product is about 1 wide and
high) to the share, 0 to 1, of the second colour. Edges are softened over about a pixel by the caller's
`soft`.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Plane = NDArray[np.floating]  # (H, W)
Outline = NDArray[np.floating]  # (N, 2) x to the right, y down
Pattern = Callable[[Plane, Plane, float, float], Plane]

GOLDEN = 2.399963  # radians between neighbouring seeds of a sunflower: no two line up


def edge(distance: Plane, soft: float) -> Plane:
    """1 where distance > 0, 0 where below, and a ramp `soft` wide between them."""
    return np.clip(distance / soft + 0.5, 0, 1)


def cell(value: Plane) -> Plane:
    """Position inside a repeated unit cell, -0.5 to 0.5."""
    return value - np.floor(value) - 0.5


def plain(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    return np.zeros_like(u)


def stripes(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    return edge(np.abs(cell(v / size)) - 0.25, soft / size)


def pinstripes(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    return edge(0.14 - np.abs(cell(u / size)), soft / size)


def diagonal(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    return edge(np.abs(cell((u + v) / (1.4 * size))) - 0.25, soft / size)


def dots(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    row = np.floor(v / size)
    return edge(0.3 - np.hypot(cell(u / size + 0.5 * (row % 2)), cell(v / size)), soft / size)


def checks(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    """Gingham: half tone on the bands, full tone where they cross."""
    across = edge(np.abs(cell(u / size)) - 0.25, soft / size)
    down = edge(np.abs(cell(v / size)) - 0.25, soft / size)
    return (across + down) / 2


def chevrons(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    return edge(np.abs(cell(v / size + np.abs(cell(0.6 * u / size)))) - 0.25, soft / size)


def waves(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    return edge(np.abs(cell(v / size + 0.22 * np.sin(5 * u / size))) - 0.25, soft / size)


def diamonds(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    return edge(0.42 - np.abs(cell(u / size)) - np.abs(cell(0.62 * v / size)), soft / size)


def scales(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    """Overlapping fans, as on a fish or a roof."""
    row = np.floor(2 * v / size)
    x, y = cell(u / size + 0.5 * (row % 2)), 2 * v / size - row
    return edge(0.1 - np.abs(np.hypot(x, 0.5 * y) - 0.46), soft / size)


def flowers(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    """Five petals in every cell, cells offset row by row."""
    row = np.floor(v / size)
    x, y = cell(u / size + 0.5 * (row % 2)), cell(v / size)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    return edge(0.26 + 0.14 * np.cos(5 * angle) - radius, soft / size) * edge(radius - 0.09, soft / size)


def terrazzo(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    """Scattered chips: ellipses of golden-angle directions, one in each cell of a jittered grid."""
    i, j = np.floor(u / size), np.floor(v / size)
    turn = (i * 12.9898 + j * 78.233) * GOLDEN
    x = cell(u / size) + 0.16 * np.sin(3 * turn)
    y = cell(v / size) + 0.16 * np.cos(5 * turn)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    return edge(0.3 - np.hypot(along, 1.9 * across), soft / size)


def triangles(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    row = np.floor(v / size)
    x, y = cell(u / size + 0.5 * (row % 2)), v / size - row
    return edge(0.8 * y - 2 * np.abs(x) + 0.02, 2 * soft / size)


def lattice(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    thin = np.minimum(np.abs(cell((u + v) / (1.6 * size))), np.abs(cell((u - v) / (1.6 * size))))
    return edge(0.09 - thin, soft / size)


def band(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    """One broad belt around the middle with a thin line above and below."""
    far = np.abs(v - 0.02)
    return np.maximum(edge(0.8 * size - far, soft), edge(0.025 - np.abs(far - 0.8 * size - 0.06), soft))


def dipped(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    """The lower part in the second colour, its edge in slow waves."""
    return edge(v - 0.16 + size + 0.03 * np.sin(11 * u), soft)


def ombre(u: Plane, v: Plane, size: float, soft: float) -> Plane:
    return np.clip(v / (4 * size) + 0.5, 0, 1)


PATTERNS: Mapping[str, tuple[Pattern, tuple[float, float]]] = {
    "plain": (plain, (0.1, 0.2)),
    "stripes": (stripes, (0.13, 0.24)),
    "pinstripes": (pinstripes, (0.08, 0.13)),
    "diagonal": (diagonal, (0.12, 0.2)),
    "dots": (dots, (0.12, 0.22)),
    "checks": (checks, (0.14, 0.24)),
    "chevrons": (chevrons, (0.14, 0.22)),
    "waves": (waves, (0.14, 0.22)),
    "diamonds": (diamonds, (0.14, 0.22)),
    "scales": (scales, (0.16, 0.24)),
    "flowers": (flowers, (0.2, 0.28)),
    "terrazzo": (terrazzo, (0.1, 0.17)),
    "triangles": (triangles, (0.13, 0.22)),
    "lattice": (lattice, (0.12, 0.19)),
    "band": (band, (0.1, 0.2)),
    "dipped": (dipped, (0.0, 0.18)),
    "ombre": (ombre, (0.14, 0.24)),
}
"""Name -> formula, and the range of its period in product widths."""


def polar(radii: NDArray, turn: float = 0.0) -> Outline:
    """A closed outline from radii at equal angles, starting upwards."""
    angle = np.linspace(0, 2 * np.pi, len(radii), endpoint=False) + turn
    return np.stack([radii * np.sin(angle), -radii * np.cos(angle)], axis=1).astype(np.float32)


def star(points: int, depth: float) -> Outline:
    return polar(np.tile([1.0, depth], points))


def circle(count: int = 40) -> Outline:
    return polar(np.ones(count))


def points(*pairs: tuple[float, float]) -> Outline:
    return np.array(pairs, dtype=np.float32)


def _heart() -> Outline:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([16 * np.sin(t) ** 3 / 16, y / 16], axis=1).astype(np.float32)


def _moon() -> Outline:
    outer = np.linspace(0.6, 2 * np.pi - 0.6, 30)
    inner = np.linspace(2 * np.pi - 0.95, 0.95, 30)
    x = np.concatenate([np.cos(outer), 0.42 + 0.72 * np.cos(inner)])
    y = np.concatenate([np.sin(outer), 0.72 * np.sin(inner)])
    return np.stack([x, y], axis=1).astype(np.float32)


def _leaf() -> Outline:
    t = np.linspace(0, np.pi, 24)
    side = 0.55 * np.sin(t) ** 0.8
    right = np.stack([side, -np.cos(t)], axis=1)
    return np.concatenate([right, right[::-1] * [-1, 1]]).astype(np.float32)


def _drop() -> Outline:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([0.72 * np.sin(t) * np.sin(t / 2) ** 1.2, -np.cos(t)], axis=1).astype(np.float32)


def _flower() -> Outline:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return polar(0.68 + 0.32 * np.cos(6 * t))


def _cloud() -> Outline:
    bumps = [(-0.55, 0.15, 0.42), (-0.1, -0.2, 0.52), (0.5, 0.05, 0.45)]
    t = np.linspace(np.pi, 2 * np.pi, 16)
    top = np.concatenate([np.stack([x + r * np.cos(t), y + r * np.sin(t)], axis=1) for x, y, r in bumps])
    return np.concatenate([top, [[0.95, 0.5], [-0.97, 0.5]]]).astype(np.float32)


GLYPHS: Mapping[str, tuple[Outline, ...]] = {
    "star": (star(5, 0.42),),
    "sun": (star(12, 0.66),),
    "heart": (_heart(),),
    "moon": (_moon(),),
    "leaf": (_leaf(),),
    "drop": (_drop(),),
    "flower": (_flower(),),
    "cloud": (_cloud(),),
    "bolt": (
        points((0.2, -1), (-0.6, 0.15), (-0.08, 0.15), (-0.25, 1), (0.6, -0.25), (0.06, -0.25), (0.5, -1)),
    ),
    "mountain": (points((-1, 0.7), (-0.35, -0.65), (0.0, -0.05), (0.3, -0.35), (1, 0.7)),),
    "crown": (
        points((-0.9, 0.65), (-1, -0.5), (-0.45, 0.0), (0, -0.8), (0.45, 0.0), (1, -0.5), (0.9, 0.65)),
    ),
    "diamond": (points((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),),
    "arrow": (points((0, -1), (0.85, 0), (0.35, 0), (0.35, 1), (-0.35, 1), (-0.35, 0), (-0.85, 0)),),
    "cross": (
        points((-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)),
        points((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)),
    ),
    "fish": (
        np.concatenate([polar(np.array([0.5, 0.55, 0.72, 0.55, 0.5, 0.55, 0.72, 0.55])) * [1, 0.85]]).astype(
            np.float32
        ),
        points((0.5, 0), (1.05, -0.5), (1.05, 0.5)),
    ),
    "hourglass": (points((-0.75, -0.9), (0.75, -0.9), (-0.75, 0.9), (0.75, 0.9)),),
}
"""Name -> outlines within the unit circle, drawn on a disc in the middle of the product."""

PALETTES: Mapping[str, tuple[str, str, str]] = {
    "terracotta": ("#c8643f", "#f4e1c6", "#2f5d62"),
    "teal": ("#1f7a78", "#f2e8cf", "#e07a5f"),
    "navy": ("#23395b", "#f1dca7", "#d1495b"),
    "mustard": ("#e0a526", "#fff4d6", "#5b3a29"),
    "sage": ("#8aa682", "#f6f1e4", "#b5523b"),
    "rose": ("#e6a4a4", "#fbeee6", "#7a3b52"),
    "plum": ("#5e3a5f", "#e9c7d4", "#f0b347"),
    "sky": ("#7fb4d6", "#fdfbf3", "#1d3557"),
    "cherry": ("#b3242f", "#fbe9dd", "#28282e"),
    "mint": ("#9ad1b9", "#fffaf0", "#e4572e"),
    "charcoal": ("#3b3f46", "#d9d4c7", "#f2a541"),
    "cream": ("#efe3cb", "#b07d4f", "#3d5a5b"),
    "lavender": ("#a79cc9", "#f5f0ff", "#5f4b8b"),
    "forest": ("#2e5339", "#dfe8c9", "#d98e3f"),
    "coral": ("#f07f63", "#fff1e0", "#2b7a8c"),
    "sand": ("#d8c09a", "#7d6143", "#c44536"),
    "cobalt": ("#2a52be", "#eaf0ff", "#ffb400"),
    "olive": ("#7b7d3a", "#f3eccb", "#8c2f39"),
    "blush": ("#f3c9bd", "#b56576", "#355070"),
    "ink": ("#1d1f2b", "#8ecae6", "#ffb703"),
    "berry": ("#93385f", "#f9d5d3", "#3c6e71"),
    "lemon": ("#f4d747", "#fffdf0", "#3a6ea5"),
    "rust": ("#9c4a1a", "#f2cc8f", "#264653"),
    "pearl": ("#f3f1ec", "#9aa5b1", "#c8553d"),
}
"""Name -> base, second colour, accent. Chosen by eye to go together."""


def rgb(colour: str) -> NDArray[np.floating]:
    """ "#rrggbb" to three numbers in [0, 1]."""
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32) / 255
