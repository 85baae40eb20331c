"""Photographing a drawn product: pose, light, background, and all that makes two photos of one thing differ.

The order is that of a camera: the product is placed by one homography and painted back to front, shaded by
one lamp, laid on a background with its shadow; something may hide a part of it; then come white balance and
exposure, blur and sensor noise. Drawn at twice the size and reduced, so that edges are smooth.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from dml.data.patterns import GLYPHS, PALETTES, PATTERNS, Outline, Plane, circle, edge, points, rgb
from dml.data.products import SHAPES, Frame, Part, Product, box, smooth, strip

Range = tuple[float, float]

OVERSAMPLING = 2


@dataclass(frozen=True)
class Nuisances:
    """How much photos of one product differ. Every number is drawn uniformly from its range, photo by photo.

    The ranges are those of hand-held phone photos of things on a table, fixed once; nothing is tuned to a
    method.
    """

    roll: Range = (-14, 14)
    """Turn of the camera, in degrees."""
    yaw: Range = (-22, 22)
    """Turn of the product about its upright axis, in degrees: prints wander around a mug."""
    tilt: Range = (-0.16, 0.16)
    """Perspective: relative difference in size between two ends of the product."""
    scale: Range = (0.6, 0.92)
    """Height of the product as a share of the frame."""
    offset: Range = (-0.08, 0.08)
    """Distance from the middle, in frames, each way."""
    lamp: Range = (-65, 65)
    """Direction of the light, left to right, in degrees."""
    ambient: Range = (0.45, 0.7)
    """Share of the light that comes from everywhere; the lower, the harder the shading."""
    exposure: Range = (0.72, 1.22)
    """Factor on the brightness: about half a stop either way."""
    warmth: Range = (-0.13, 0.13)
    """White balance: red up and blue down by this share, or the reverse (about 4000 K to 9000 K)."""
    contrast: Range = (0.85, 1.12)
    clutter: Range = (0, 3)
    """Things that lie around, whole numbers."""
    occlusion: float = 0.35
    """Probability that something lies in front of the product."""
    occluder: Range = (0.1, 0.2)
    """Its half width, in frames: hides 5 to 20 % of the product."""
    blur: Range = (0.0, 0.9)
    """Standard deviation of the blur, in pixels of a 96-pixel picture."""
    noise: Range = (0.0, 0.03)
    """Standard deviation of the sensor noise; white is 1."""
    jpeg_quality: Range = (55, 92)
    """Pillow's scale."""

    def without(self, *names: str) -> "Nuisances":
        """The same with these fixed in the middle of their ranges (probabilities: 0), to see what each one
        costs."""
        calm: dict[str, float | Range] = {}
        for name in names:
            value = getattr(self, name)
            calm[name] = ((value[0] + value[1]) / 2,) * 2 if isinstance(value, tuple) else 0.0
        return replace(self, **calm)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Pose:
    """Where the product is: product coordinates to pixels and back."""

    forward: NDArray[np.floating]  # (3, 3)
    yaw: float  # radians
    side: int  # pixels

    def to_frame(self, outline: Outline) -> NDArray[np.floating]:
        x, y, w = self.forward[:, :2] @ outline.T + self.forward[:, 2:]
        return np.stack([x / w, y / w], axis=1)

    def to_product(self) -> tuple[Plane, Plane]:
        """Product coordinates of every pixel's centre, two (S, S) planes."""
        across = np.arange(self.side, dtype=np.float32) + 0.5
        back = np.linalg.inv(self.forward).astype(np.float32)
        x, y, w = (row[0] * across[None, :] + row[1] * across[:, None] + row[2] for row in back)
        return x / w, y / w

    @property
    def pixel(self) -> float:
        """About the size of a pixel in product coordinates."""
        return float(1 / np.sqrt(abs(np.linalg.det(self.forward[:2, :2]))))


@dataclass(frozen=True)
class Light:
    x: float
    y: float
    z: float
    ambient: float

    def on(self, normal_x: Plane, normal_y: Plane | float, normal_z: Plane) -> Plane:
        """Lambert's law with some ambient light; 1 where the surface faces the lamp."""
        lit = normal_x * self.x + normal_y * self.y + normal_z * self.z
        return self.ambient + (1 - self.ambient) * np.maximum(lit, 0)

    def shine(self, normal_x: Plane, normal_y: Plane | float, normal_z: Plane) -> Plane:
        """Highlight of a glossy surface, seen from the front (Blinn)."""
        half = np.array([self.x, self.y, self.z + 1])
        half /= np.linalg.norm(half)
        return np.maximum(normal_x * half[0] + normal_y * half[1] + normal_z * half[2], 0) ** 40


def draw_product(
    rng: np.random.Generator, product: Product, size: int, *, nuisances: Nuisances | None = None
) -> Image.Image:
    """One photo of a product, (size, size) RGB. Equal generators give equal photos."""
    ranges = nuisances or Nuisances()
    side = OVERSAMPLING * size
    shape = SHAPES[product.kind]
    pose = _pose(rng, ranges, side)
    lamp = np.radians(rng.uniform(*ranges.lamp))
    light = Light(np.sin(lamp) * 0.92, -0.38, np.cos(lamp) * 0.92, rng.uniform(*ranges.ambient))
    picture = _background(
        rng, side, stands=shape.stands, horizon=float(pose.to_frame(points((0, 0.3)))[0, 1])
    )
    _clutter(rng, picture, int(rng.integers(int(ranges.clutter[0]), int(ranges.clutter[1]) + 1)), light)
    colours, cover = _paint(product, pose, light)
    _cast_shadow(picture, cover, pose, light, stands=shape.stands)
    picture += cover[..., None] * (colours - picture)
    if rng.random() < ranges.occlusion:
        _occlude(rng, picture, pose, light, rng.uniform(*ranges.occluder))
    return _develop(rng, picture, size, ranges)


def _pose(rng: np.random.Generator, ranges: Nuisances, side: int) -> Pose:
    roll, yaw = np.radians(rng.uniform(*ranges.roll)), np.radians(rng.uniform(*ranges.yaw))
    scale = rng.uniform(*ranges.scale) * side
    x, y = (0.5 + rng.uniform(*ranges.offset, size=2)) * side
    tilt_x, tilt_y = rng.uniform(*ranges.tilt, size=2)
    turn = np.array([[np.cos(roll), -np.sin(roll)], [np.sin(roll), np.cos(roll)]])
    narrow = np.diag([0.4 + 0.6 * np.cos(yaw), 1.0])
    forward = np.eye(3)
    forward[:2, :2] = scale * turn @ narrow
    forward[2, :2] = tilt_x, tilt_y
    place = np.eye(3)
    place[:2, 2] = x, y
    return Pose(place @ forward, float(yaw), side)


def _fill(side: int, *outlines: NDArray) -> Plane:
    """1 inside the outlines (pixels), 0 outside."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for outline in outlines:
        pen.polygon([tuple(p) for p in outline.tolist()], fill=255)
    return np.asarray(mask, dtype=np.float32) / 255


def _window(side: int, outline: NDArray, *, margin: int = 2) -> tuple[slice, slice]:
    """The rows and columns of the frame that an outline in pixels can touch; empty when it lies outside."""
    (left, top), (right, bottom) = (
        np.clip(corner, 0, side).astype(int)
        for corner in (np.floor(outline.min(axis=0)) - margin, np.ceil(outline.max(axis=0)) + margin)
    )
    return slice(top, bottom), slice(left, right)


def _soften(plane: Plane, pixels: float) -> Plane:
    image = Image.fromarray((plane * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(pixels)), dtype=np.float32) / 255


def _paint(product: Product, pose: Pose, light: Light) -> tuple[Frame, Plane]:
    """The product alone: colours (S, S, 3) and cover (S, S)."""
    side = pose.side
    x, y = pose.to_product()
    colours = np.zeros((side, side, 3), dtype=np.float32)
    cover = np.zeros((side, side), dtype=np.float32)
    shape = SHAPES[product.kind]
    for part in shape.parts(*product.form):
        outline = pose.to_frame(part.outline)
        mask = _fill(side, outline)
        if part.hole is not None:
            mask *= 1 - _fill(side, pose.to_frame(part.hole))
        here = _window(side, outline)
        if not mask[here].any():
            continue
        painted = _surface(product, part, x[here], y[here], mask[here], pose, light)
        alpha = mask[here][..., None]
        colours[here] += alpha * (painted - colours[here])
        cover[here] = np.maximum(cover[here], mask[here])
    if product.glyph:
        _emblem(product, colours, cover, pose)
    return colours, cover


def _surface(
    product: Product, part: Part, x: Plane, y: Plane, mask: Plane, pose: Pose, light: Light
) -> Frame:
    """Colour of a part where it is seen: paint, texture and shading."""
    u, v, normals = _geometry(part, x, y, pose)
    paint = _colour(product, part, u, v, pose)
    if part.paint in ("pattern", "base"):
        paint = paint * _texture(product.texture, u, v)[..., None]
    shade = light.on(*normals) * (0.8 + 0.2 * _soften(mask, pose.side / 40))
    painted = paint * shade[..., None]
    if product.texture == "glossy" and part.shade != "flat":
        painted = painted + 0.55 * light.shine(*normals)[..., None]
    return np.clip(painted, 0, 1)


def _geometry(part: Part, x: Plane, y: Plane, pose: Pose) -> tuple[Plane, Plane, tuple[Plane, Plane, Plane]]:
    """Surface coordinates and the direction the surface faces."""
    low, high = part.outline.min(axis=0), part.outline.max(axis=0)
    middle, half = (low + high) / 2, np.maximum((high - low) / 2, 1e-3)
    flat = np.zeros_like(x)
    if part.shade == "flat":
        return x, y, (flat + 0.1 * (x - middle[0]), flat + 0.15 * (y - middle[1]), flat + 0.98)
    if part.shade == "ball":
        nx, ny = 0.8 * (x - middle[0]) / half[0], 0.8 * (y - middle[1]) / half[1]
        nz = np.sqrt(np.clip(1 - nx**2 - ny**2, 0.05, 1))
        return x + half[0] * np.sin(pose.yaw) * 0.7, y, (nx, ny, nz)
    right = part.outline[part.outline[:, 0] >= middle[0]]
    order = np.argsort(right[:, 1], kind="stable")
    radius = np.interp(y, right[order, 1], right[order, 0] - middle[0]).astype(np.float32)
    n = np.clip((x - middle[0]) / np.maximum(radius, 0.02), -0.999, 0.999)
    u = half[0] * (np.arcsin(n) * 0.9 + pose.yaw)
    return u, y, (n, flat, np.sqrt(1 - n**2))


def _colour(product: Product, part: Part, u: Plane, v: Plane, pose: Pose) -> Frame:
    base, second, accent = (rgb(c) for c in PALETTES[product.palette])
    if part.paint == "pattern":
        formula, _ = PATTERNS[product.pattern]
        share = formula(u, v, product.period, 1.5 * pose.pixel).astype(np.float32)[..., None]
        return base + share * (second - base)
    fixed = {
        "base": base,
        "second": second,
        "accent": accent,
        "wood": rgb("#a9764a"),
        "dark": 0.25 * base + 0.1,
        "paper": rgb("#f7f3ea"),
        "metal": rgb("#b9bec6"),
    }
    return np.broadcast_to(fixed[part.paint], (*u.shape, 3)).astype(np.float32)


_TILE = np.random.default_rng(7).normal(size=(256, 256)).astype(np.float32)
"""One sheet of noise for all surfaces, fixed: grain belongs to the product, not to the photo."""


def _texture(name: str, u: Plane, v: Plane) -> Plane:
    """A factor around 1 that lies on the surface."""
    if name == "woven":
        return 1 + 0.09 * np.sign(np.sin(90 * u) * np.sin(90 * v))
    if name in ("grainy", "speckled"):
        noise = _TILE[(v * 110).astype(int) % 256, (u * 110).astype(int) % 256]
        return 1 + 0.06 * noise if name == "grainy" else np.where(noise > 1.5, 0.5, 1.0)
    return np.ones_like(u)


def _emblem(product: Product, colours: Frame, cover: Plane, pose: Pose) -> None:
    """A disc with the glyph, on the surface, turned with it."""
    x, y, radius = SHAPES[product.kind].emblem
    squeeze = np.array([np.cos(pose.yaw), 1.0])
    centre = np.array([x + (0.25 * np.sin(pose.yaw) if SHAPES[product.kind].stands else 0.0), y])
    base, second, accent = (rgb(c) for c in PALETTES[product.palette])
    rim = pose.to_frame((circle() * radius * squeeze + centre).astype(np.float32))
    here = _window(pose.side, rim)
    colours, cover = colours[here], cover[here]  # views: only the emblem's surroundings are worked on
    disc = _fill(pose.side, rim)
    glyph = _fill(
        pose.side,
        *(
            pose.to_frame((g * 0.7 * radius * squeeze + centre).astype(np.float32))
            for g in GLYPHS[product.glyph]
        ),
    )
    # The disc takes over the shading below it: its colour times how bright that surface is against its own
    # paint.
    bright = np.clip(colours.mean(axis=2) / max(float(base.mean()), 0.25), 0.75, 1.1)[..., None]
    bright = 0.5 + 0.5 * bright
    paper = second if second.mean() > 0.6 else rgb("#f7f3ea")
    for mask, colour in ((disc, paper), (glyph, accent)):
        seen = (mask[here] * cover)[..., None]
        colours += seen * (np.clip(colour * bright, 0, 1) - colours)


def _cloud(rng: np.random.Generator, side: int, cells: int) -> Plane:
    """Smooth noise, about -1 to 1, with `cells` bumps across."""
    coarse = Image.fromarray(rng.uniform(-1, 1, size=(cells + 1, cells + 1)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def _tone(rng: np.random.Generator, value: Range, saturation: Range) -> NDArray[np.floating]:
    """A colour of random hue."""
    hue, s, v = rng.uniform(0, 6), rng.uniform(*saturation), rng.uniform(*value)
    ramp = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (v * (1 - s + s * ramp)).astype(np.float32)


def _background(rng: np.random.Generator, side: int, *, stands: bool, horizon: float) -> Frame:
    """A place: for things that stand a table before a wall, for others a surface seen from above."""
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    if not stands:
        picture = _floor(rng, side, x, y)
    else:
        wall = _wall(rng, side, x, y)
        table = _floor(rng, side, x, (y - horizon / side) * 2.2)
        line = np.clip(horizon / side + rng.uniform(-0.16, 0.08), 0.45, 0.85)
        below = edge(y - line + rng.uniform(-0.08, 0.08) * (x - 0.5), 1.5 / side)[..., None]
        far = (0.86 + 0.3 * np.clip(y - line, 0, 0.5))[..., None]
        picture = wall + below * (table * far - wall)
    vignette = 1 - rng.uniform(0.05, 0.35) * ((x - 0.5) ** 2 + (y - 0.5) ** 2)
    return np.clip(picture.astype(np.float32) * vignette.astype(np.float32)[..., None], 0, 1)


def _wall(rng: np.random.Generator, side: int, x: Plane, y: Plane) -> Frame:
    tone = _tone(rng, (0.55, 0.97), (0.02, 0.32))
    kind = rng.integers(4)
    plane = 1 + 0.05 * _cloud(rng, side, 3) + 0.1 * (y - 0.5)
    if kind == 1:  # a room out of focus
        spots = np.broadcast_to(tone, (side, side, 3)) * 0.7
        for _ in range(int(rng.integers(5, 11))):
            far = np.hypot(x - rng.uniform(0, 1), y - rng.uniform(0, 0.8))
            glow = edge(rng.uniform(0.04, 0.15) - far, 0.02)[..., None] * rng.uniform(0.15, 0.5)
            spots = spots + glow * (_tone(rng, (0.8, 1), (0.1, 0.5)) - spots)
        return spots
    if kind == 2:  # panels
        plane = plane * (1 - 0.12 * edge(0.03 - np.abs((x * rng.uniform(3, 6)) % 1 - 0.5), 0.02))
    if kind == 3:  # the light of a window
        slope, shift = rng.uniform(-0.8, 0.8), rng.uniform(0, 1)
        plane = plane * (0.82 + 0.28 * edge(0.28 - np.abs((1.6 * x + slope * y + shift) % 1 - 0.5), 0.08))
    return tone * plane[..., None]


def _floor(rng: np.random.Generator, side: int, x: Plane, y: Plane) -> Frame:
    kind = rng.integers(5)
    if kind == 0:  # boards
        wood = np.array([[0.72, 0.52, 0.34], [0.5, 0.34, 0.22], [0.85, 0.72, 0.55], [0.62, 0.58, 0.54]])
        tone = (wood[rng.integers(len(wood))] * rng.uniform(0.85, 1.1)).astype(np.float32)
        width = rng.uniform(3, 6)
        board = np.floor(y * width)
        grain = _cloud(rng, side, 24).mean(axis=1)[:, None] + 0.6 * np.sin(9 * x + 40 * y + board * 4)
        gap = edge(0.03 - np.abs((y * width) % 1 - 0.5), 0.02)
        return tone * (1 + 0.05 * grain + 0.07 * np.sin(board * 12.9) - 0.35 * gap)[..., None]
    tone = _tone(rng, (0.5, 0.96), (0.02, 0.4))
    if kind == 1:  # tiles
        count = rng.uniform(3, 6)
        gap = np.maximum(0.47 - np.abs((x * count) % 1 - 0.5), 0) * np.maximum(
            0.47 - np.abs((y * count) % 1 - 0.5), 0
        )
        shade = 0.05 * np.sin(np.floor(x * count) * 7.3 + np.floor(y * count) * 3.1)
        return tone * (np.where(gap > 0, 1.0, 0.82) + shade)[..., None]
    if kind == 2:  # marble
        vein = np.abs(_cloud(rng, side, 4) + 0.5 * _cloud(rng, side, 9))
        return (0.45 * tone + 0.52) * (1 - 0.13 * np.clip(0.2 - vein, 0, 0.2) / 0.2)[..., None]
    if kind == 3:  # cloth with folds
        fold = np.sin(rng.uniform(5, 11) * (x + rng.uniform(-1, 1) * y) + 2 * _cloud(rng, side, 3))
        return (
            tone
            * (0.93 + 0.08 * fold + 0.02 * rng.standard_normal((side, side), dtype=np.float32))[..., None]
        )
    return tone * (1 + 0.07 * _cloud(rng, side, 3))[..., None]  # paper


def _clutter(rng: np.random.Generator, picture: Frame, count: int, light: Light) -> None:
    """Small things near the borders, with shadows."""
    side = len(picture)
    for _ in range(count):
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(0.4, 0.6) * side
        centre = np.array([side / 2 + far * np.cos(angle), side / 2 + far * np.sin(angle)])
        outline = _thing(rng) * rng.uniform(0.08, 0.18) * side
        _lay(
            picture,
            outline + centre,
            _tone(rng, (0.35, 0.92), (0.08, 0.5)),
            light,
            blur=rng.uniform(0.8, 3.0),
        )


def _thing(rng: np.random.Generator) -> Outline:
    """A pebble, a leaf, a card, a pencil or a ribbon, about 1 in size, turned at random."""
    wave = np.linspace(-1.6, 1.6, 14)
    shapes = (
        smooth((-1, 0.1), (-0.4, -0.7), (0.6, -0.6), (1, 0.1), (0.3, 0.7), (-0.6, 0.6)),
        GLYPHS["leaf"][0] * np.float32(1.2),
        box(-0.7, -1, 0.7, 1, 0.12),
        strip((-1.6, 0), (1.6, 0), width=0.28),
        strip(*[(float(t), float(0.4 * np.sin(2.4 * t))) for t in wave], width=0.4),
    )
    outline = shapes[rng.integers(len(shapes))]
    turn = rng.uniform(0, 2 * np.pi)
    return outline @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]], dtype=np.float32)


def _lay(picture: Frame, outline: NDArray, colour: NDArray, light: Light, *, blur: float) -> None:
    """Put a soft-edged thing and its shadow on the picture."""
    side = len(picture)
    mask = _fill(side, outline)
    shift = np.array([-light.x * 0.02, 0.02]) * side
    shadow = _fill(side, outline + shift)
    here = _window(side, outline, margin=side // 10)
    part = picture[here]
    part *= 1 - 0.35 * _soften(shadow[here], blur + side * 0.012)[..., None]
    part += _soften(mask[here], blur)[..., None] * (colour * np.float32(0.9 + 0.1 * light.z) - part)


def _cast_shadow(picture: Frame, cover: Plane, pose: Pose, light: Light, *, stands: bool) -> None:
    side = pose.side
    if stands:
        rows = np.flatnonzero(cover.max(axis=1) > 0.5)
        if not len(rows):
            return
        foot = rows[-1]
        columns = np.flatnonzero(cover[max(0, foot - side // 16) : foot + 1].max(axis=0) > 0.5)
        middle, half = (columns[0] + columns[-1]) / 2, max(4.0, (columns[-1] - columns[0]) / 2)
        for stretch, strength, soft in ((1.1, 0.5, 0.012), (1.8, 0.28, 0.035)):
            spot = circle() * points((half * stretch, 0.025 * side * stretch))
            spot = spot + points((middle - light.x * half * (stretch - 1), foot - 0.008 * side))
            picture *= 1 - strength * _soften(_fill(side, spot), soft * side)[..., None]
        return
    shift = (round(0.03 * side), round(-light.x * 0.035 * side))
    dark = _soften(np.roll(cover, shift, axis=(0, 1)), 0.025 * side)
    picture *= 1 - 0.42 * dark[..., None]


def _occlude(rng: np.random.Generator, picture: Frame, pose: Pose, light: Light, half: float) -> None:
    """Something in front of the product, away from its centre, slightly out of focus."""
    angle = rng.uniform(0, 2 * np.pi)
    centre = pose.to_frame(points((0.34 * np.cos(angle), 0.34 * np.sin(angle))))[0]
    outline = _thing(rng) * half * pose.side + centre
    _lay(picture, outline, _tone(rng, (0.3, 0.92), (0.08, 0.55)), light, blur=rng.uniform(0.8, 3.0))


def _develop(rng: np.random.Generator, picture: Frame, size: int, ranges: Nuisances) -> Image.Image:
    """White balance, exposure and contrast, blur, sensor noise."""
    warmth = rng.uniform(*ranges.warmth)
    gains = np.array([1 + warmth, 1, 1 - warmth], dtype=np.float32) * rng.uniform(*ranges.exposure)
    exposed = np.clip(0.5 + (picture * gains - 0.5) * rng.uniform(*ranges.contrast), 0, 1)
    image = Image.fromarray((exposed * 255).astype(np.uint8)).reduce(OVERSAMPLING)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*ranges.blur) * size / 96))
    noisy = np.asarray(image, dtype=np.float32)
    noisy = noisy + rng.standard_normal(noisy.shape, dtype=np.float32) * 255 * rng.uniform(*ranges.noise)
    return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
