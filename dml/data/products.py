"""Drawing a product and photographing it: outlines, surfaces, light, and what goes wrong in a photo.

A product is a list of parts in its own coordinates (x to the right, y down, the whole about 1 x 1 around the
origin). A photo maps them onto the frame by one homography (pose), paints them back to front, and lays the
result on a background; then come light, occlusion, blur and noise. Pillow fills outlines, numpy does the
rest.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dml.data.patterns import Outline, circle, points

Paint = Literal["pattern", "base", "second", "accent", "wood", "dark", "paper", "metal"]
Shade = Literal["round", "ball", "flat"]
Frame = NDArray[np.floating]  # (S, S, 3) in [0, 1]

TEXTURES = ("smooth", "glossy", "woven", "grainy", "speckled")


@dataclass(frozen=True)
class Product:
    """What a class is: everything here is the same in all of its photos."""

    kind: str
    palette: str
    pattern: str
    texture: str
    glyph: str
    """A name in GLYPHS, or "" for none."""
    period: float = 0.18
    """Size of the pattern's repeat, in product widths."""
    form: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Proportions of the shape, each 0 to 1."""

    @property
    def name(self) -> str:
        return "-".join(filter(None, (self.palette, self.pattern, self.texture, self.kind, self.glyph)))


@dataclass(frozen=True)
class Part:
    """One outline of a product, and how it is painted."""

    outline: Outline
    paint: Paint
    shade: Shade = "flat"
    hole: Outline | None = None


@dataclass(frozen=True)
class Shape:
    """A kind of product: its parts for given proportions, where its glyph sits, and how it is placed."""

    parts: Callable[[float, float, float], list[Part]]
    emblem: tuple[float, float, float]
    """Centre x, y and radius of the glyph."""
    stands: bool = True
    """On a table (contact shadow), or lying and hanging flat (drop shadow)."""


def smooth(*pairs: tuple[float, float], steps: int = 6) -> Outline:
    """A closed curve through the given points (Catmull-Rom)."""
    p = points(*pairs)
    return _spline(np.concatenate([p[-1:], p, p[:2]]), steps)


def _spline(p: Outline, steps: int) -> Outline:
    """`steps` points on each stretch of a Catmull-Rom curve; the outer two points only give directions."""
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, steps, endpoint=False, dtype=np.float32)[None, :, None]
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return curve.reshape(-1, 2)


def turned(*profile: tuple[float, float], steps: int = 6) -> Outline:
    """The outline of a body of revolution from (radius, y) down its right side."""
    p = points(*profile)
    right = np.concatenate([_spline(np.concatenate([p[:1], p, p[-1:]]), steps), p[-1:]])
    return np.concatenate([right, right[::-1] * points((-1, 1))])


def ellipse(x: float, y: float, across: float, down: float) -> Outline:
    return circle() * points((across, down)) + points((x, y))


def box(left: float, top: float, right: float, bottom: float, corner: float = 0.03) -> Outline:
    """A rectangle with round corners."""
    quarter = np.linspace(0, np.pi / 2, 6)
    arcs = [
        (x + corner * np.cos(quarter + turn), y + corner * np.sin(quarter + turn))
        for x, y, turn in (
            (right - corner, bottom - corner, 0.0),
            (left + corner, bottom - corner, np.pi / 2),
            (left + corner, top + corner, np.pi),
            (right - corner, top + corner, 3 * np.pi / 2),
        )
    ]
    return np.concatenate([np.stack(arc, axis=1) for arc in arcs]).astype(np.float32)


def ring(x: float, y: float, across: float, down: float, thick: float, paint: Paint) -> Part:
    """A handle: an ellipse with a hole."""
    return Part(ellipse(x, y, across, down), paint, "flat", ellipse(x, y, across - thick, down - thick))


def strip(*line: tuple[float, float], width: float) -> Outline:
    """A line with a width: legs, straps, hands of a clock."""
    p = np.array(line, dtype=np.float32)
    way = np.gradient(p, axis=0)
    aside = np.stack([-way[:, 1], way[:, 0]], axis=1)
    aside *= width / 2 / np.maximum(np.linalg.norm(aside, axis=1, keepdims=True), 1e-6)
    return np.concatenate([p + aside, (p - aside)[::-1]])


def mug(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.27 + 0.07 * a, 0.3 + 0.08 * b
    foot = w * (0.72 + 0.28 * c)
    body = turned((w, -h), (w, -h * 0.3), (w * 0.5 + foot * 0.5, h * 0.5), (foot, h * 0.9), (foot * 0.9, h))
    return [
        ring(w + 0.03, -0.02, 0.15, 0.17 + 0.04 * b, 0.055, "base"),
        Part(body, "pattern", "round"),
        Part(ellipse(0, -h, w, 0.065), "second", "round"),
        Part(ellipse(0, -h + 0.008, w * 0.9, 0.048), "dark"),
    ]


def vase(a: float, b: float, c: float) -> list[Part]:
    neck, belly, foot = 0.08 + 0.1 * a, 0.24 + 0.12 * b, 0.13 + 0.08 * c
    low = -0.05 + 0.25 * c
    body = turned((neck * 1.3, -0.48), (neck, -0.36), (belly, low), (foot * 1.1, 0.4), (foot, 0.47))
    return [
        Part(body, "pattern", "round"),
        Part(ellipse(0, -0.48, neck * 1.3, 0.035), "second", "round"),
        Part(ellipse(0, -0.476, neck * 1.1, 0.024), "dark"),
    ]


def bottle(a: float, b: float, c: float) -> list[Part]:
    w, neck, shoulder = 0.15 + 0.07 * a, 0.055 + 0.03 * b, -0.22 + 0.16 * c
    body = turned((neck, -0.4), (neck, shoulder - 0.06), (w, shoulder + 0.12), (w, 0.4), (w * 0.92, 0.48))
    return [
        Part(body, "pattern", "round"),
        Part(box(-neck * 1.25, -0.5, neck * 1.25, -0.38, 0.02), "accent", "round"),
    ]


def teapot(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.27 + 0.05 * a, 0.22 + 0.07 * b
    spout = smooth(
        (w * 0.7, 0.12), (w + 0.08, 0.02), (w + 0.17, -0.2 - 0.06 * c), (w + 0.1, -0.2 - 0.06 * c), (w, -0.06)
    )
    return [
        ring(-w - 0.02, 0.0, 0.14, 0.17, 0.05, "accent"),
        Part(spout, "base"),
        Part(ellipse(0, 0.05, w, h), "pattern", "ball"),
        Part(ellipse(0, 0.05 - h * 0.93, w * 0.48, 0.05 + 0.03 * c), "accent", "ball"),
        Part(ellipse(0, 0.05 - h - 0.06, 0.045, 0.045), "second", "ball"),
        Part(box(-w * 0.5, h + 0.02, w * 0.5, h + 0.07, 0.02), "base", "round"),
    ]


def lamp(a: float, b: float, c: float) -> list[Part]:
    top, low, depth = 0.12 + 0.14 * a, 0.31 + 0.06 * b, 0.02 + 0.1 * c
    shade = turned((top, -0.46), (top * 0.6 + low * 0.4, -0.24), (low, depth), steps=8)
    return [
        Part(turned((0.03, -0.1), (0.03 + 0.05 * c, 0.24), (0.035, 0.42)), "accent", "round"),
        Part(ellipse(0, 0.44, 0.17, 0.045), "accent", "round"),
        Part(shade, "pattern", "round"),
        Part(ellipse(0, -0.46, top, 0.03), "paper"),
    ]


def clock(a: float, b: float, c: float) -> list[Part]:
    r = 0.42
    face = {0: ellipse(0, 0, r, r), 1: box(-r, -r, r, r, 0.12), 2: circle(8) * np.float32(r * 1.04)}[
        int(2.99 * a)
    ]
    inner = face * np.float32(0.8 + 0.08 * b)
    ticks = [
        Part(
            strip((0.29 * np.sin(t), -0.29 * np.cos(t)), (0.33 * np.sin(t), -0.33 * np.cos(t)), width=0.025),
            "dark",
        )
        for t in np.linspace(0, 2 * np.pi, 4 if c > 0.5 else 12, endpoint=False)
    ]
    hands = [
        Part(strip((0, 0), tip, width=w), "dark")
        for tip, w in (((-0.13, -0.12), 0.04), ((0.17, -0.2), 0.026))
    ]
    return [
        Part(face, "accent", "ball"),
        Part(inner, "pattern"),
        *ticks,
        *hands,
        Part(ellipse(0, 0, 0.03, 0.03), "dark"),
    ]


def book(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.27 + 0.08 * a, 0.36 + 0.09 * b
    return [
        Part(points((-w, -h), (w + 0.06, -h - 0.02), (w + 0.06, h + 0.02), (-w, h + 0.06)), "dark"),
        Part(
            points((-w + 0.02, h), (w + 0.045, h - 0.02), (w + 0.045, h + 0.01), (-w + 0.02, h + 0.045)),
            "paper",
        ),
        Part(points((w, -h), (w + 0.045, -h - 0.01), (w + 0.045, h), (w, h)), "paper"),
        Part(box(-w, -h, w, h, 0.012), "pattern"),
        Part(box(-w, -h, -w + 0.05 + 0.05 * c, h, 0.01), "accent"),
    ]


def cushion(a: float, b: float, c: float) -> list[Part]:
    w, h, pull = 0.42, 0.32 + 0.1 * a, 0.03 + 0.05 * b
    body = smooth(
        (-w, -h), (0, -h + pull), (w, -h), (w - pull, 0), (w, h), (0, h - pull), (-w, h), (-w + pull, 0)
    )
    trim = [Part(body * np.float32(1.05), "accent")] if c > 0.4 else []
    return [*trim, Part(body, "pattern", "ball")]


def shirt(a: float, b: float, c: float) -> list[Part]:
    low, sleeve = 0.4 + 0.06 * a, 0.05 + 0.3 * b
    body = points(
        (-0.13, -0.4), (0.13, -0.4), (0.25, -0.36), (0.46, -0.1 + sleeve), (0.34, -0.02 + sleeve),
        (0.25, -0.12), (0.26, low), (-0.26, low), (-0.25, -0.12), (-0.34, -0.02 + sleeve),
        (-0.46, -0.1 + sleeve), (-0.25, -0.36),
    )  # fmt: skip
    neck = ellipse(0, -0.4, 0.13, 0.08 + 0.03 * c)
    cuffs = [
        Part(points((s * 0.46, -0.1 + sleeve), (s * 0.34, -0.02 + sleeve), (s * 0.325, -0.06 + sleeve),
                    (s * 0.445, -0.14 + sleeve)), "accent")
        for s in (-1, 1)
    ]  # fmt: skip
    opened = ellipse(0, -0.42, 0.1, 0.06 + 0.03 * c)
    return [Part(body, "pattern"), *cuffs, Part(neck, "accent"), Part(opened, "dark")]


def tote(a: float, b: float, c: float) -> list[Part]:
    w, top = 0.3 + 0.07 * a, -0.12 - 0.06 * b
    handle = Part(ellipse(0, top, 0.16, 0.3), "accent", "flat", ellipse(0, top, 0.12, 0.26))
    body = points((-w * 0.92, top), (w * 0.92, top), (w, 0.44), (-w, 0.44))
    hem = Part(
        points((-w * 0.92, top), (w * 0.92, top), (w * 0.93, top + 0.05), (-w * 0.93, top + 0.05)), "second"
    )
    foot = Part(points((-w * 0.98, 0.36), (w * 0.98, 0.36), (w, 0.44), (-w, 0.44)), "accent")
    return [handle, Part(body, "pattern"), hem, *([foot] if c > 0.5 else [])]


def backpack(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.27 + 0.06 * a, 0.4
    pocket = 0.02 + 0.08 * b
    return [
        ring(0, -h - 0.01, 0.09, 0.08, 0.03, "accent"),
        Part(box(-w - 0.07, -0.05, -w + 0.08, 0.34, 0.06), "accent", "round"),
        Part(box(w - 0.08, -0.05, w + 0.07, 0.34, 0.06), "accent", "round"),
        Part(box(-w, -h, w, 0.46, 0.15 + 0.05 * c), "pattern", "ball"),
        Part(box(-w * 0.76, pocket + 0.1, w * 0.76, 0.42, 0.06), "base", "ball"),
        Part(strip((-w * 0.7, pocket + 0.16), (w * 0.7, pocket + 0.16), width=0.02), "dark"),
    ]


def cap(a: float, b: float, c: float) -> list[Part]:
    h = 0.3 + 0.1 * a
    dome = smooth(
        (-0.38, 0.16), (-0.35, -0.1), (-0.18, -h), (0.08, -h - 0.02), (0.27, -0.12), (0.31, 0.16), (0, 0.2)
    )
    brim = smooth(
        (0.1, 0.12), (0.32, 0.1), (0.5, 0.2 + 0.06 * b), (0.46, 0.27 + 0.06 * b), (0.2, 0.24), (-0.1, 0.2)
    )
    return [
        Part(dome, "pattern", "ball"),
        Part(brim, "accent", "flat"),
        Part(ellipse(-0.04, -h - 0.015, 0.035, 0.025), "accent", "ball"),
    ]


def sneaker(a: float, b: float, c: float) -> list[Part]:
    top = -0.16 - 0.1 * a
    upper = smooth(
        (-0.45, 0.16), (-0.44, -0.05), (-0.42, top), (-0.22, top + 0.03), (-0.05, -0.03), (0.2, 0.04),
        (0.42, 0.1), (0.47, 0.17), (0.4, 0.21), (-0.4, 0.21),
    )  # fmt: skip
    toe = smooth((0.27, 0.06), (0.42, 0.1), (0.47, 0.18), (0.42, 0.21), (0.24, 0.21), (0.22, 0.14))
    laces = [
        Part(strip((x, y), (x + 0.13, y - 0.045), width=0.028), "paper")
        for x, y in ((-0.17, 0.05), (-0.1, 0.07), (-0.03, 0.09), (0.04, 0.11))
    ]
    return [
        Part(upper, "pattern", "ball"),
        Part(toe, "second" if c > 0.5 else "accent", "ball"),
        Part(smooth((-0.45, 0.14), (-0.45, -0.04), (-0.36, -0.02), (-0.32, 0.2), (-0.43, 0.21)), "accent"),
        Part(box(-0.47, 0.19, 0.49, 0.26 + 0.05 * b, 0.035), "paper", "flat"),
        *laces,
    ]


def chair(a: float, b: float, c: float) -> list[Part]:
    w, top = 0.23 + 0.06 * a, -0.46
    back = box(-w, top, w, -0.02, 0.05 + 0.12 * b)
    seat = points((-w * 0.96, 0.0), (w * 0.96, 0.0), (w * 1.2, 0.14), (-w * 1.2, 0.14))
    spread = 0.04 + 0.05 * c
    legs = [
        Part(strip((s * w * r, y), (s * (w * r + spread), y + 0.34 * f), width=0.035), "wood")
        for r, y, f in ((0.8, 0.08, 0.85), (1.05, 0.13, 1.0))
        for s in (-1, 1)
    ]
    posts = [Part(box(s * w * 0.75 - 0.02, -0.1, s * w * 0.75 + 0.02, 0.05, 0.01), "wood") for s in (-1, 1)]
    front = Part(points((-w * 1.2, 0.14), (w * 1.2, 0.14), (w * 1.18, 0.18), (-w * 1.18, 0.18)), "accent")
    return [*legs, *posts, Part(back, "pattern", "ball"), Part(seat, "base"), front]


def umbrella(a: float, b: float, c: float) -> list[Part]:
    w, h = 0.46, 0.4 + 0.08 * a
    arc = [(w * np.cos(t), -0.02 - h * np.sin(t)) for t in np.linspace(0, np.pi, 24)]
    count = 3 + int(2.9 * b)
    hem = [
        (-w + 2 * w * t, -0.02 - (0.05 + 0.02 * c) * abs(np.sin(np.pi * count * t)))
        for t in np.linspace(0, 1, 40)
    ]
    ribs = [
        Part(
            strip(
                *[(s * w * np.cos(t), -0.04 - h * np.sin(t)) for t in np.linspace(0.1, 1.5, 10)], width=0.012
            ),
            "dark",
        )
        for s in (-0.35, 0.35)
    ]
    hook = [(0.06 * np.cos(t) - 0.06, 0.4 + 0.06 * np.sin(t)) for t in np.linspace(0, np.pi, 10)]
    return [
        Part(strip((0, -0.1), (0, 0.4), width=0.025), "wood"),
        Part(strip(*hook, width=0.035), "wood"),
        Part(points(*arc, *hem), "pattern", "ball"),
        *ribs,
        Part(box(-0.012, -0.5 - 0.08 * a, 0.012, -0.4, 0.005), "dark"),
    ]


def plate(a: float, b: float, c: float) -> list[Part]:
    r, inner = 0.45, 0.62 + 0.14 * a
    return [
        Part(ellipse(0, 0, r, r), "pattern"),
        Part(ellipse(0, 0, r * inner, r * inner), "second"),
        Part(ellipse(0, 0, r * (inner - 0.05), r * (inner - 0.05)), "base" if b > 0.5 else "paper"),
        *(
            [Part(ellipse(0, 0, r, r), "accent", "flat", ellipse(0, 0, r * 0.95, r * 0.95))]
            if c > 0.4
            else []
        ),
    ]


SHAPES: Mapping[str, Shape] = {
    "mug": Shape(mug, (0, 0.02, 0.13)),
    "vase": Shape(vase, (0, 0.08, 0.12)),
    "bottle": Shape(bottle, (0, 0.15, 0.1)),
    "teapot": Shape(teapot, (0, 0.06, 0.13)),
    "lamp": Shape(lamp, (0, -0.18, 0.1)),
    "clock": Shape(clock, (0, 0.12, 0.09), stands=False),
    "book": Shape(book, (0.03, -0.08, 0.14), stands=False),
    "cushion": Shape(cushion, (0, 0, 0.15), stands=False),
    "shirt": Shape(shirt, (0, -0.04, 0.12), stands=False),
    "tote": Shape(tote, (0, 0.14, 0.14), stands=False),
    "backpack": Shape(backpack, (0, -0.16, 0.11)),
    "cap": Shape(cap, (-0.02, -0.08, 0.11), stands=False),
    "sneaker": Shape(sneaker, (-0.24, 0.07, 0.08)),
    "chair": Shape(chair, (0, -0.25, 0.12)),
    "umbrella": Shape(umbrella, (0, -0.24, 0.11), stands=False),
    "plate": Shape(plate, (0, 0, 0.14), stands=False),
}
"""Kind -> how it is drawn."""
