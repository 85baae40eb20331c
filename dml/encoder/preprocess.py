"""The one eval-time preprocessing: from an upright RGB picture to the numbers a model reads.

Training's evaluation, batch embedding and serving all call this, so what is measured is what is served. It
needs Pillow and numpy only, and gives the same numbers for the same picture every time.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dml.errors import EncoderError

Fit = Literal["crop", "pad", "squash"]
Interpolation = Literal["bilinear", "bicubic", "lanczos"]

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
REDUCING_GAP = 3.0
"""Pillow may first average whole blocks of pixels, down to this many times the wanted size, before it
filters; from 3 on the result cannot be told from filtering every pixel, and large photos take a fraction of
the time.
"""


@dataclass(frozen=True)
class Preprocess:
    """Picture → float32 (3, S, S).

    ::

        crop     the central square of side min(W, H) / margin          proportions kept, borders lost
        pad      the central W/margin x H/margin, on the mean colour    proportions kept, nothing lost
        squash   the central W/margin x H/margin                        proportions lost

    is resized to S x S with antialiasing, cut and resize in one call (at the cut, the filter still sees the
    pixels next to it), and becomes (value / 255 - mean) / std.

    Args:
        size: S in pixels.
        fit: "crop", "pad" or "squash".
        mean, std: per channel (R, G, B) of values in [0, 1].
        interpolation: the filter, antialiased when shrinking.
        margin: 1 uses the whole picture; 256 / 224 is the usual "resize to 256, cut 224".

    Raises:
        ValueError: for values outside their ranges.
    """

    size: int
    fit: Fit
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Interpolation = "bilinear"
    margin: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))
        if self.size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {self.size}")
        if self.fit not in get_args(Fit):
            raise ValueError(f"fit must be one of {', '.join(get_args(Fit))}, got {self.fit!r}")
        if self.interpolation not in FILTERS:
            raise ValueError(f"interpolation must be one of {', '.join(FILTERS)}, got {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"mean and std must be three numbers, std positive; got {self.mean} and {self.std}"
            )
        if not self.margin >= 1:
            raise ValueError(f"margin must be at least 1, got {self.margin}")

    def __call__(self, picture: Image.Image) -> NDArray[np.float32]:
        """One upright RGB picture to (3, S, S)."""
        return self.normalise(self.pixels(picture)[None])[0]

    def pixels(self, picture: Image.Image) -> NDArray[np.uint8]:
        """The resized picture before normalisation, (S, S, 3)."""
        if picture.mode != "RGB":
            raise ValueError(
                f"expected an RGB picture, got mode {picture.mode}; read it with dml.imaging.decode"
            )
        if self.fit == "pad":
            return np.asarray(self._padded(picture))
        return np.asarray(self._resized(picture, (self.size, self.size)))

    def normalise(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels (N, S, S, 3) to model input (N, 3, S, S)."""
        scale = (1 / (255 * np.asarray(self.std, np.float64))).astype(np.float32)
        shift = (-np.asarray(self.mean, np.float64) / np.asarray(self.std, np.float64)).astype(np.float32)
        out = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32)
        out *= scale[:, None, None]
        out += shift[:, None, None]
        return out

    def _resized(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        width, height = picture.width / self.margin, picture.height / self.margin
        if self.fit == "crop":
            width = height = min(width, height)
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        box = (left, top, left + width, top + height)
        return picture.resize(size, FILTERS[self.interpolation], box=box, reducing_gap=REDUCING_GAP)

    def _padded(self, picture: Image.Image) -> Image.Image:
        longer = max(picture.size)
        width, height = (max(1, round(side * self.size / longer)) for side in picture.size)
        red, green, blue = (round(255 * min(max(v, 0.0), 1.0)) for v in self.mean)
        canvas = Image.new("RGB", (self.size, self.size), (red, green, blue))
        place = ((self.size - width) // 2, (self.size - height) // 2)
        canvas.paste(self._resized(picture, (width, height)), place)
        return canvas

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> "Preprocess":
        """The inverse of `as_json`.

        Raises:
            EncoderError: for a key that is missing or unknown, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        if set(tree) != known:
            raise EncoderError(
                f"The preprocessing of this encoder cannot be read: it needs exactly "
                f"{', '.join(sorted(known))}; got {', '.join(sorted(map(str, tree)))}."
            )
        try:
            return cls(**tree)
        except (TypeError, ValueError) as error:
            raise EncoderError(f"The preprocessing of this encoder cannot be read: {error}") from None
