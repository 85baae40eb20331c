"""Bytes to a picture: the one decoder used by training, embedding and serving alike.

Whatever comes in, an upright 8-bit RGB picture comes out, or an InvalidImage that says why not. Nothing here
trusts the bytes: the size is read from the header and checked before a pixel is decoded, only formats with a
safe decoder are opened, and no process-wide setting of Pillow is touched.
"""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from dml.errors import ImageTooLarge, InvalidImage, UnsupportedImage

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "DIB", "AVIF", "JPEG2000")
"""Formats (Pillow's names) that are opened. Left out on purpose: those that start other programs (EPS) and
rare ones."""

IMAGE_SUFFIXES: frozenset[str] = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib")
) | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2"}
"""Endings (lower case, with the dot) by which a file in a folder counts as a picture."""

DEFAULT_MAX_PIXELS = 64_000_000
MAX_SCANS = 100
"""Passes over the pixels in one JPEG; encoders make about ten. Each takes 12 bytes of a file, and up to a
twentieth of a second: a megabyte of them would keep a core for an hour."""
SCAN = b"\xff\xda"
"""Starts a scan. Inside of one, bytes of 255 are followed by a 0."""
STRIP_PIXELS = 1_000_000
"""Conversions that need several copies of the pixels make them of so many at a time."""

_FOREIGN = {  # signature at an offset -> what it is: known, but not read here
    (0, b"%PDF"): "a PDF document",
    (0, b"%!PS"): "a PostScript file",
    (0, b"8BPS"): "a Photoshop document",
    (0, b"<svg"): "an SVG drawing",
    (0, b"<?xml"): "an XML or SVG file",
    (4, b"ftypheic"): "a HEIC photo",
    (4, b"ftypheix"): "a HEIC photo",
    (4, b"ftypmif1"): "a HEIF photo",
    (4, b"ftypisom"): "an MP4 video",
    (4, b"ftypmp42"): "an MP4 video",
    (0, b"PK\x03\x04"): "a ZIP archive",
}

_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class BadImage:
    """A picture that was skipped, and why."""

    path: str
    reason: str


def decode(
    source: bytes | Path,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    max_bytes: int | None = None,
    least: Callable[[int, int], float] | None = None,
    name: str | None = None,
) -> Image.Image:
    """Return the picture as upright 8-bit RGB, without metadata.

    EXIF orientation is applied exactly once; transparency is laid over white; 16-bit grey is scaled to 8 bits
    (v / 257, rounded); of an animation the first frame is taken; CMYK and palettes are converted.

    Beside what the decoder of the format needs for itself, this takes about 8 bytes of memory per pixel at
    its peak: one copy as stored and one as RGB, whatever the mode. A JPEG is decoded in full size unless
    `least` allows less: scaling while decoding is another filter, and gives slightly other vectors.

    Args:
        source: the bytes, or the file that holds them.
        max_pixels: width x height above this is refused before decoding (a small file can unpack to
            gigabytes).
            Pillow's own ceiling (about 179 million pixels) stays in force above it.
        max_bytes: files and byte strings longer than this are refused unread; None: any length.
        least: (width, height) as stored -> the share of both that must be left. A JPEG may then come out at
            1/2, 1/4 or 1/8 of its size; pixels are counted in full all the same. None: in full size.
        name: what messages call bytes whose file was read before.

    Raises:
        ImageTooLarge: more pixels or bytes than allowed, or a JPEG of more scans than any encoder makes.
        UnsupportedImage: a known format that is not read here, or a colour space without a conversion.
        InvalidImage: no such file, empty, not a picture, truncated or damaged.
    """
    where = name or (str(source) if isinstance(source, Path) else "the image")
    data = _read(source, where, max_bytes)
    picture = _open(io.BytesIO(data), where, max_pixels)
    if picture.format in ("JPEG", "MPO") and (scans := data.count(SCAN)) > MAX_SCANS:
        raise ImageTooLarge(
            f"{where} is decoded in {scans:,} passes; at most {MAX_SCANS} are made. Save it again as a JPEG."
        )
    try:
        if least is not None:
            _ask_for_less(picture, least(*picture.size))
        picture.load()
        # Read after loading: Pillow turns TIFFs itself and clears the tag, and a PNG may carry it behind the
        # pixels.
        orientation = _orientation(picture)
        flat = _to_rgb(picture)
        if flat is picture and orientation not in _UPRIGHT:
            flat = picture.copy()  # a plain picture, without the file and its metadata
        del picture  # or turning would hold three copies
    except (MemoryError, InvalidImage):
        raise
    except (
        Exception
    ) as error:  # decoders raise anything on damaged bytes: OSError, SyntaxError, struct.error, ...
        raise InvalidImage(
            f"{where} is damaged or incomplete ({_short(error)}); get the file again"
        ) from error
    if orientation in _UPRIGHT:
        flat = flat.transpose(_UPRIGHT[orientation])
    flat.info = {}
    return flat


def read_file(path: Path) -> bytes:
    """The bytes of a file, to be decoded. Raises InvalidImage: not there, no file, unreadable, or empty."""
    return _read(path, str(path), None)


def probe(source: bytes | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Width and height of a picture as stored, from its header: quick, and no proof that the rest is sound.

    Raises:
        InvalidImage: as `decode` does, for what the header shows.
    """
    if not isinstance(source, Path):
        return _open(io.BytesIO(_read(source, "the image", None)), "the image", max_pixels).size
    where = str(source)
    _check_file(source, where)
    try:
        with source.open("rb") as stream:
            return _open(stream, where, max_pixels).size
    except OSError as error:
        raise InvalidImage(f"{where} cannot be read: {error.strerror or error}") from error


def crop_box(picture: Image.Image, box: tuple[int, int, int, int] | None, where: str) -> Image.Image:
    """The part (left, top, right, bottom) of an upright picture, cut at its borders; the whole for None.

    Raises:
        InvalidImage: when the box lies outside the picture.
    """
    if box is None:
        return picture
    left, top = max(0, box[0]), max(0, box[1])
    right, bottom = min(picture.width, box[2]), min(picture.height, box[3])
    if left >= right or top >= bottom:
        raise InvalidImage(
            f"{where}: the box {box} (left, top, right, bottom) lies outside the picture, "
            f"which is {picture.width} x {picture.height} pixels; correct the box"
        )
    return picture.crop((left, top, right, bottom))


def _read(source: bytes | Path, where: str, max_bytes: int | None) -> bytes:
    if not isinstance(source, Path):
        length = len(source)
    else:
        _check_file(source, where)
        length = source.stat().st_size
    if length == 0:
        raise InvalidImage(f"{where} is empty (0 bytes)")
    if max_bytes is not None and length > max_bytes:
        raise ImageTooLarge(
            f"{where} has {length:,} bytes; at most {max_bytes:,} are allowed. Make it smaller."
        )
    if not isinstance(source, Path):
        return source
    try:
        return source.read_bytes()
    except OSError as error:
        raise InvalidImage(f"{where} cannot be read: {error.strerror or error}") from error


def _check_file(path: Path, where: str) -> None:
    try:
        if path.is_file():
            return
        found = "is not a file" if path.exists() else "does not exist"
    except (OSError, ValueError) as error:  # a name too long for the file system, or with a null byte
        found = f"cannot be read: {_short(error)}"
    raise InvalidImage(f"{where} {found}")


def _open(stream: io.IOBase, where: str, max_pixels: int) -> Image.Image:
    """Read the header only, and refuse what is no picture or too large."""
    try:
        picture = Image.open(stream, formats=FORMATS)  # type: ignore[arg-type]
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"{where} has too many pixels: {error}") from error
    except UnidentifiedImageError:
        stream.seek(0)
        head = stream.read(32)
        for (offset, signature), what in _FOREIGN.items():
            if head[offset : offset + len(signature)] == signature:
                raise UnsupportedImage(
                    f"{where} is {what}, which is not read here; save it as JPEG or PNG"
                ) from None
        raise InvalidImage(
            f"{where} is not a picture in a format known here (JPEG, PNG, WebP, GIF, ...)"
        ) from None
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # a damaged header can raise anything
        raise InvalidImage(
            f"{where} is damaged or incomplete ({_short(error)}); get the file again"
        ) from error
    width, height = picture.size
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"{where} has {width} x {height} = {width * height:,} pixels; at most {max_pixels:,} are "
            "allowed. Make it smaller."
        )
    return picture


def _ask_for_less(picture: Image.Image, share: float) -> None:
    """Have a JPEG in grey or RGB scaled while it is decoded, leaving at least this share of both sides."""
    if picture.format in ("JPEG", "MPO") and picture.mode in ("RGB", "L") and share < 1:
        width, height = picture.size
        picture.draft(picture.mode, (math.ceil(width * share), math.ceil(height * share)))


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1..8; 1 when there is none or the EXIF block is damaged (the pixels may still be
    fine)."""
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    """The picture as RGB: itself, when it is opaque RGB already."""
    if picture.mode in _DEEP:
        return _deep_to_rgb(picture)
    if picture.has_transparency_data:
        flat = Image.new("RGB", picture.size)
        for top, strip in _strips(picture):
            clear = strip.convert("RGBA")
            white = Image.new("RGBA", clear.size, "white")
            flat.paste(Image.alpha_composite(white, clear).convert("RGB"), (0, top))
        return flat
    if picture.mode == "RGB":
        return picture
    try:
        return picture.convert("RGB")
    except ValueError as error:
        raise UnsupportedImage(
            f'the colour space "{picture.mode}" has no conversion to RGB here; save it as JPEG or PNG'
        ) from error


def _strips(picture: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The picture in horizontal strips of about STRIP_PIXELS, from the top, each with its first row."""
    rows = max(1, STRIP_PIXELS // picture.width)
    for top in range(0, picture.height, rows):
        yield top, picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def _deep_to_rgb(picture: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled by the range of the whole picture."""

    def values(strip: Image.Image) -> np.ndarray:
        return np.nan_to_num(np.asarray(strip).astype(np.float64))

    low = high = 0.0
    if picture.mode in ("I", "F"):
        for _, strip in _strips(picture):
            found = values(strip)
            low, high = min(low, float(found.min())), max(high, float(found.max()))
    flat = Image.new("RGB", picture.size)
    for top, strip in _strips(picture):
        grey = _DEEP[picture.mode](values(strip), low, high).round().clip(0, 255).astype(np.uint8)
        flat.paste(Image.fromarray(grey).convert("RGB"), (0, top))
    return flat


def _from_16_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return values / 257  # 65535 -> 255 exactly


def _from_32_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """32-bit integers: nearly always 16-bit data in a wide file; wider ones are stretched to their own
    maximum."""
    return _from_16_bits(values, low, high) if high <= 65535 else values * (255 / high)


def _from_floats(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0..1 and 0..255 are both usual; anything else is stretched to its own range."""
    if low >= 0 and high <= 1:
        return values * 255
    if low >= 0 and high <= 255:
        return values
    return (values - low) * (255 / (high - low))


_DEEP: dict[str, Callable[[np.ndarray, float, float], np.ndarray]] = {
    "I;16": _from_16_bits,
    "I;16B": _from_16_bits,
    "I;16L": _from_16_bits,
    "I;16N": _from_16_bits,
    "I": _from_32_bits,
    "F": _from_floats,
}


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__
