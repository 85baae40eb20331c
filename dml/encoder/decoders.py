"""From the bytes of a picture to an upright RGB picture for the encoder: the reference, and a quicker way.

::

    pillow   every pixel is decoded: the reference
    fused    a JPEG is made smaller while it is decoded, to 1/2, 1/4 or 1/8, in the frequencies that it is
             stored in, and never below `GAP` times what the model sees. Other formats: as pillow

What follows is the same for both: the one preprocessing resizes whatever it gets. Of JPEGs whose used side is
at least 2 · GAP times the model's, "fused" decodes a small part of the pixels (a phone's photo for 224 px: an
eighth of the time), and differs by about 1 to 2 grey levels of 255. Smaller JPEGs come out the same, bit for
bit.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image

from dml.encoder.preprocess import Preprocess
from dml.imaging import DEFAULT_MAX_PIXELS, decode

DecoderName = Literal["pillow", "fused"]

GAP = 1.5
"""At least so many pixels are left for every pixel that the model sees, so that the last step is a resize
with the encoder's own filter. 1 would spare little more (the scales are powers of two), and would move
pictures of 448 to 671 px by 2 to 3 grey levels, where decoding in full costs little."""


class Decoder(Protocol):
    """Bytes or a file to an upright RGB picture, perhaps smaller than it was."""

    def __call__(
        self,
        source: bytes | Path,
        preprocess: Preprocess,
        *,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        name: str | None = None,
    ) -> Image.Image:
        """Raises InvalidImage, as `dml.imaging.decode`; `name` is what messages call the bytes."""
        ...


def pillow(
    source: bytes | Path,
    preprocess: Preprocess,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """Every pixel."""
    return decode(source, max_pixels=max_pixels, name=name)


def fused(
    source: bytes | Path,
    preprocess: Preprocess,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    name: str | None = None,
) -> Image.Image:
    """As many pixels of a JPEG as the preprocessing has use for."""
    return decode(source, max_pixels=max_pixels, name=name, least=share_needed(preprocess))


def share_needed(preprocess: Preprocess) -> Callable[[int, int], float]:
    """(width, height) -> the share of both that must be left, so that resizing still makes it smaller."""
    side = GAP * preprocess.size * preprocess.margin
    used = max if preprocess.fit == "pad" else min  # the side that becomes the square's
    return lambda width, height: side / used(width, height)


DECODERS: Mapping[str, Decoder] = {"pillow": pillow, "fused": fused}
