"""A picture of the embedding: every vector a dot in the plane, near where its neighbours are."""

import colorsys
import html
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dml.errors import MissingExtra

WIDTH, HEIGHT, MARGIN = 960, 600, 26
MOST_POINTS = 1500
"""t-SNE takes seconds up to here; more dots would hide each other anyway."""


@dataclass(frozen=True)
class Dot:
    """One picture on the map."""

    row: int  # of the vectors
    x: float  # in the drawing
    y: float


def place(vectors: NDArray[np.float32], *, seed: int = 0, most: int = MOST_POINTS) -> list[Dot]:
    """Positions of (at most `most`, randomly chosen) vectors: PCA to 50 dimensions, then t-SNE to the plane.

    Distances between far groups mean little on such a map; being in one clump means something. Below 10
    vectors the first two principal components are the map.

    Raises:
        MissingExtra: without scikit-learn.
    """
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ModuleNotFoundError:
        raise MissingExtra("scikit-learn, which draws the map of the embedding,", "train") from None
    rng = np.random.default_rng(seed)
    rows = (
        np.sort(rng.choice(len(vectors), most, replace=False))
        if len(vectors) > most
        else np.arange(len(vectors))
    )
    points = np.asarray(vectors, dtype=np.float64)[rows]
    points = points + rng.normal(0, 1e-6, points.shape)  # a collapsed embedding has no variance to divide by
    if len(rows) > 1:
        points = PCA(min(50, *points.shape), random_state=seed).fit_transform(points)
    if len(rows) >= 10:
        # The usual start: the first components, scaled so small that t-SNE can still move everything.
        start = points[:, :2] / points[:, 0].std() * 1e-4 if points.shape[1] >= 2 else "random"
        perplexity = float(min(30, (len(rows) - 1) / 3))
        points = TSNE(2, perplexity=perplexity, init=start, random_state=seed).fit_transform(points)
    plane = np.zeros((len(rows), 2))
    plane[:, : min(2, points.shape[1])] = points[:, :2]
    low, high = plane.min(axis=0), plane.max(axis=0)
    unit = (plane - low) / np.where(high > low, high - low, 1)
    size = np.array([WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN])
    return [Dot(int(row), float(x), float(y)) for row, (x, y) in zip(rows, MARGIN + unit * size, strict=True)]


def thumbnails_on(dots: Sequence[Dot], *, apart: float = 62) -> list[Dot]:
    """Dots that may carry a thumbnail of about `apart` pixels without covering another one."""
    chosen: list[Dot] = []
    order = np.random.default_rng(0).permutation(
        len(dots)
    )  # rows come class by class; first come, first shown
    for dot in (dots[place] for place in order):
        if all(abs(dot.x - o.x) >= apart or abs(dot.y - o.y) >= apart for o in chosen):
            chosen.append(dot)
    return chosen


def draw_map(dots: Sequence[Dot], labels: Sequence[str], pictures: dict[int, str], *, size: int = 48) -> str:
    """The map as an <svg> element; thumbnails form a layer of class "thumbs" that the page shows or hides.

    Args:
        labels: class of every row of the vectors.
        pictures: row -> data URI, for the dots that carry a thumbnail.
    """
    colours = class_colours([labels[dot.row] for dot in dots])
    circles = "".join(
        f'<circle cx="{dot.x:.1f}" cy="{dot.y:.1f}" r="4" style="fill:{colours[labels[dot.row]]}">'
        f"<title>{html.escape(labels[dot.row])}</title></circle>"
        for dot in dots
    )
    images = ""
    for dot in dots:
        if dot.row in pictures:
            x = min(max(dot.x - size / 2, 2), WIDTH - size - 2)
            y = min(max(dot.y - size - 7, 2), HEIGHT - size - 2)  # above its dot, which stays to be seen
            images += (
                f'<g transform="translate({x:.1f} {y:.1f})"><title>{html.escape(labels[dot.row])}</title>'
                f'<image href="{pictures[dot.row]}" width="{size}" height="{size}" '
                f'clip-path="url(#rounded)"/>'
                f'<rect width="{size}" height="{size}" rx="7" style="stroke:{colours[labels[dot.row]]}"/></g>'
            )
    return (
        f'<svg role="img" viewBox="0 0 {WIDTH} {HEIGHT}" class="map"><title>Map of the embedding</title>'
        f'<defs><clipPath id="rounded"><rect width="{size}" height="{size}" rx="7"/></clipPath></defs>'
        f'<g class="dots">{circles}</g><g class="thumbs">{images}</g></svg>'
    )


def class_colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour per class, the same for the same set of classes: hues in turns of the golden angle."""
    colours = {}
    for number, label in enumerate(sorted(set(labels))):
        hue = (0.58 + number * 0.381966) % 1
        red, green, blue = colorsys.hls_to_rgb(hue, 0.56 if number % 2 else 0.48, 0.58)
        colours[label] = f"#{int(red * 255):02x}{int(green * 255):02x}{int(blue * 255):02x}"
    return colours
