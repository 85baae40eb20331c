"""The embedded data set: product photos drawn by code, so that the whole way can be walked without a
download.

Every class is a product: kind x pattern x colours x texture x glyph x proportions. Products come in families
of three that share kind, colours and proportions, and differ in pattern, texture and glyph only: telling
these apart is the task. What differs between two photos of a product is named in `dml.data.photo.Nuisances`,
with its range. A family lies in one split.

The difficulty is fixed by those ranges, before and apart from any method; the set belongs in no comparison of
methods. Measured on its test classes (query = gallery, self excluded; seeds 0, 1, 2): see docs/data.md.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dml.data.patterns import GLYPHS, PALETTES, PATTERNS
from dml.data.photo import Nuisances, draw_product
from dml.data.products import SHAPES, TEXTURES, Product
from dml.data.table import ImageTable
from dml.errors import DataError, StorageError

SPLIT_SHARES: Mapping[str, float] = {"train": 0.6, "validation": 0.16, "test": 0.24}
FAMILY = 3
"""Products in a family."""
MARKER = ".demo.json"
"""Says what is being drawn, and at the end that it is complete: half a set is never taken for a whole one."""


def demo_products(*, seed: int = 0, classes: int = 102) -> dict[str, list[Product]]:
    """Split -> its products. The first products of a seed do not depend on how many there are.

    Raises:
        DataError: fewer than 18 classes (two families for each split).
    """
    if classes < 6 * FAMILY:
        raise DataError(
            f"the demo set needs at least {6 * FAMILY} classes, two families for each split; got {classes}"
        )
    families = _families(np.random.default_rng([seed, 1]), -(-classes // FAMILY))
    counts = {split: max(2, round(share * len(families))) for split, share in SPLIT_SHARES.items()}
    counts["train"] = len(families) - counts["validation"] - counts["test"]
    parts: dict[str, list[Product]] = {}
    start = 0
    left = classes
    for split, count in counts.items():
        members = [product for family in families[start : start + count] for product in family]
        parts[split] = members[:left]
        start, left = start + count, left - len(parts[split])
    return parts


def _families(rng: np.random.Generator, count: int) -> list[list[Product]]:
    """Families in a fixed order: all kinds in turn, so that every split shows most of them."""
    kinds, palettes = list(SHAPES), list(PALETTES)
    used: set[tuple[str, str]] = set()
    families = []
    for number in range(count):
        if number % len(kinds) == 0:
            rng.shuffle(kinds)
        kind = kinds[number % len(kinds)]
        free = [p for p in palettes if (kind, p) not in used] or palettes
        palette = str(rng.choice(free))
        used.add((kind, palette))
        families.append(_family(rng, kind, palette))
    return families


def _family(rng: np.random.Generator, kind: str, palette: str) -> list[Product]:
    patterns = rng.choice(list(PATTERNS), size=FAMILY, replace=False)
    glyphs = rng.choice(list(GLYPHS), size=FAMILY, replace=False)
    form = (float(rng.uniform()), float(rng.uniform()), float(rng.uniform()))
    members = []
    for pattern, glyph in zip(map(str, patterns), map(str, glyphs), strict=True):
        period = float(rng.uniform(*PATTERNS[pattern][1]))
        # A plain product is told apart by its glyph alone, and one with a busy pattern may go without.
        shown = glyph if pattern in ("plain", "ombre", "dipped") or rng.random() < 0.6 else ""
        members.append(Product(kind, palette, pattern, str(rng.choice(TEXTURES)), shown, period, form))
    return members


def draw_demo(
    root: Path,
    *,
    seed: int = 0,
    classes: int = 102,
    images_per_class: int = 16,
    size: int = 96,
    nuisances: Nuisances | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Draw the set into `root` as SPLIT/CLASS/NNN.jpg; a finished set of the same settings is left as it is.

    Args:
        root: a folder that is new, empty, or an earlier drawing.
        seed: decides products and photos; equal arguments give equal files.
        classes: products, at least 18.
        images_per_class: photos of each, at least 2.
        size: side of the photos in pixels, at least 32.
        nuisances: what differs between photos.
        progress: called with (done, all).

    Raises:
        DataError: numbers below these, or a folder that holds something else.
        StorageError: the disk is full or refuses.
    """
    if images_per_class < 2 or size < 32:
        raise DataError(f"at least 2 images per class of 32 pixels, got {images_per_class} of {size}")
    ranges = nuisances or Nuisances()
    parts = demo_products(seed=seed, classes=classes)
    facts: dict[str, Any] = {
        "format": 1,
        "seed": seed,
        "classes": classes,
        "images_per_class": images_per_class,
        "size": size,
    }
    facts["nuisances"] = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(ranges).items()}
    if _finished(root, facts):
        return root
    total = classes * images_per_class
    try:
        _mark(root, facts, complete=False)
        for done, (split, index, product, photo) in enumerate(_plan(parts, images_per_class), 1):
            folder = root / split / product.name
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([seed, 2, index, photo])
            picture = draw_product(rng, product, size, nuisances=ranges)
            quality = round(rng.uniform(*ranges.jpeg_quality))
            picture.save(folder / f"{photo:03d}.jpg", quality=quality, subsampling=2 if quality < 80 else 0)
            if progress is not None:
                progress(done, total)
        _mark(root, facts, complete=True)
    except OSError as error:
        raise StorageError(f"the demo set cannot be written to {root}: {error.strerror or error}") from error
    return root


def _plan(parts: Mapping[str, list[Product]], images: int) -> Iterator[tuple[str, int, Product, int]]:
    index = 0
    for split, products in parts.items():
        for product in products:
            for photo in range(images):
                yield split, index, product, photo
            index += 1


def _mark(root: Path, facts: Mapping[str, object], *, complete: bool) -> None:
    root.mkdir(parents=True, exist_ok=True)
    aside = root / f"{MARKER}.part"
    aside.write_text(json.dumps({**facts, "complete": complete}, indent=1))
    aside.replace(root / MARKER)


def _finished(root: Path, facts: Mapping[str, object]) -> bool:
    """Whether the same set is there already, complete.

    Raises:
        DataError: another set, or foreign files: nothing of a user's is ever overwritten.
    """
    if root.exists() and not root.is_dir():
        raise DataError(f"{root} is a file; give a folder")
    if not (root / MARKER).is_file():
        found = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
        if found:
            raise DataError(
                f"{root} is not empty ({', '.join(found[:5])}); give a new folder for the demo set"
            )
        return False
    drawn = _read_mark(root)
    complete = drawn.pop("complete")
    if drawn != facts:
        raise DataError(f"{root} holds a demo set drawn with other settings; give a new folder or remove it")
    return complete


def _read_mark(root: Path) -> dict[str, Any]:
    try:
        drawn = json.loads((root / MARKER).read_text())
        return {**drawn, "complete": bool(drawn["complete"])}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{root / MARKER} is damaged; remove {root}, or give a new folder") from error


def open_demo(root: Path) -> ImageTable:
    """The demo set as a table, for "demo:FOLDER" as a source; drawn first where it is not complete."""
    from dml.data.layouts import read_folder

    if not (root / MARKER).is_file() or not _read_mark(root)["complete"]:
        draw_demo(root)
    return read_folder(root)
