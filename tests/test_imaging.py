"""Whatever comes in, an upright 8-bit RGB picture comes out, or an error that says why not."""

import io
import os
import struct
import subprocess
import sys
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from dml.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from dml.imaging import IMAGE_SUFFIXES, crop_box, decode, probe

FORMATS_WITH_EXIF = ("JPEG", "PNG", "WEBP", "TIFF")


def encoded(picture, format="PNG", **options):
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.getvalue()


def corners():
    """Red, green, blue and yellow quarters, 48 x 32: every turn of it looks different."""
    picture = Image.new("RGB", (48, 32))
    for box, colour in (
        ((0, 0, 24, 16), "red"),
        ((24, 0, 48, 16), "lime"),
        ((0, 16, 24, 32), "blue"),
        ((24, 16, 48, 32), "yellow"),
    ):
        picture.paste(colour, box)
    return picture


def quarters(picture):
    """The colours of the four corners, read line by line, as names."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 0): "y"}
    width, height = picture.size
    spots = ((5, 5), (width - 6, 5), (5, height - 6), (width - 6, height - 6))
    return "".join(names[tuple(round(v / 255) for v in picture.getpixel(spot))] for spot in spots)


@pytest.mark.parametrize("format", FORMATS_WITH_EXIF)
@pytest.mark.parametrize(
    ("orientation", "expected"),
    [(1, "rgby"), (2, "gryb"), (3, "ybgr"), (4, "byrg"), (5, "rbgy"), (6, "bryg"), (7, "ygbr"), (8, "gyrb")],
)
def test_exif_orientation_is_applied_exactly_once(format, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode(encoded(corners(), format, exif=exif))
    assert picture.size == ((48, 32) if orientation < 5 else (32, 48))
    assert quarters(picture) == expected
    assert 0x0112 not in picture.getexif()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow says so, and goes on
def test_a_damaged_exif_block_does_not_lose_the_picture():
    data = encoded(corners(), "JPEG", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x00")
    assert quarters(decode(data)) == "rgby"


def test_the_result_carries_no_metadata():
    picture = decode(encoded(corners(), "JPEG", comment=b"secret", dpi=(300, 300)))
    assert picture.info == {}


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "LA", "RGBA"])
def test_every_colour_mode_becomes_rgb(mode):
    picture = decode(encoded(corners().convert(mode), "TIFF"))
    assert (picture.mode, picture.size) == ("RGB", (48, 32))
    if mode in ("RGB", "P", "CMYK", "RGBA"):
        assert quarters(picture) == "rgby"


def test_a_cmyk_jpeg_keeps_its_colours():
    picture = decode(encoded(corners().convert("CMYK"), "JPEG", quality=95))
    assert quarters(picture) == "rgby"


def test_16_bit_grey_is_scaled_to_8_bits_by_257():
    values = np.arange(256 * 256, dtype=np.uint16).reshape(256, 256)
    grey = np.asarray(decode(encoded(Image.fromarray(values))))
    assert np.array_equal(grey[..., 0], np.round(values / 257).astype(np.uint8))
    assert np.array_equal(grey[..., 0], grey[..., 2])


def test_a_float_picture_from_0_to_1_uses_the_whole_range():
    values = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    grey = np.asarray(decode(encoded(Image.fromarray(values), "TIFF")))[..., 0]
    assert (grey.min(), grey.max()) == (0, 255)


def test_a_float_picture_with_nan_is_read():
    values = np.full((4, 4), np.nan, dtype=np.float32)
    assert decode(encoded(Image.fromarray(values), "TIFF")).size == (4, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(mode):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    assert decode(encoded(clear)).getpixel((3, 3)) == (255, 255, 255)


def test_half_transparent_black_over_white_is_middle_grey():
    assert decode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))).getpixel((1, 1)) == (127, 127, 127)


def test_a_transparent_palette_entry_lies_over_white():
    picture = Image.new("P", (8, 8), 0)
    picture.putpalette([10, 20, 30, 200, 0, 0])
    picture.paste(1, (0, 0, 4, 8))
    flat = decode(encoded(picture, transparency=0))
    assert flat.getpixel((6, 4)) == (255, 255, 255)
    assert flat.getpixel((1, 4)) == (200, 0, 0)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert decode(data).getpixel((8, 8)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_refused(format, draw):
    data = encoded(draw(3, (200, 160)), format)
    for keep in (len(data) // 10, len(data) // 2, len(data) - 40):
        with pytest.raises(InvalidImage, match=r"damaged|not a picture"):
            decode(data[:keep])


def test_flipped_bytes_never_raise_anything_but_our_own_error(scale):
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
        original = np.frombuffer(encoded(corners(), format), dtype=np.uint8)
        for _ in range(60 * scale):
            data = original.copy()
            places = rng.integers(0, len(data), size=rng.integers(1, 8))
            data[places] = rng.integers(0, 256, size=len(places))
            with suppress(InvalidImage):
                assert decode(data.tobytes()).mode == "RGB"


def png(width, height, *, depth=8, colour=2, content=bytes(1000)):
    """A PNG of any claimed size and kind of colour (2 RGB, 0 grey, 4 grey and alpha, 6 RGB and alpha)."""

    def chunk(name, content):
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(content, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [8_001, 12_000, 100_000, 2_000_000])
def test_a_decompression_bomb_is_refused_by_its_header(side):
    with pytest.raises(ImageTooLarge, match="pixels"):
        decode(png(side, side))
    with pytest.raises(ImageTooLarge, match="pixels"):
        probe(png(side, side))


def test_a_jpeg_of_very_many_scans_is_refused_before_it_keeps_a_core_busy():
    """Two hundred kilobytes of them would take minutes."""
    whole = encoded(Image.new("L", (2000, 2000), 90), "JPEG", progressive=True)
    last_scan = whole[whole.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageTooLarge, match="16,006 passes"):
        decode(whole[:-2] + last_scan * 16_000 + whole[-2:])
    assert decode(whole[:-2] + last_scan * 3 + whole[-2:]).size == (2000, 2000)


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
@pytest.mark.parametrize(("colour", "depth", "stored"), [(4, 8, 2), (6, 8, 4), (0, 16, 2), (2, 8, 3)])
def test_a_large_picture_takes_few_copies_of_itself(tmp_path, colour, depth, stored):
    """In a process that may grow by 12 bytes per pixel: one copy as stored, one as RGB, and some room."""
    side = 4000
    path = tmp_path / "large.png"
    path.write_bytes(png(side, side, colour=colour, depth=depth, content=bytes((side * stored + 1) * side)))
    assert path.stat().st_size < side * side // 50
    script = """
import resource, sys
from pathlib import Path
from dml.imaging import decode, probe
path = Path(sys.argv[1])
data = path.read_bytes()
width, height = probe(data)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
most = used + 12 * width * height
resource.setrlimit(resource.RLIMIT_AS, (most, most))
print(decode(data).getextrema())
"""
    command = [sys.executable, "-c", script, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    value = 255 if colour in (4, 6) else 0  # transparent black lies over white
    assert done.stdout.strip() == str(((value, value),) * 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I", "F", "I;16"])
def test_pictures_of_several_strips_are_as_of_one(monkeypatch, draw, mode):
    """Values of 32 bits are stretched by the range of the whole picture, wherever its largest value lies."""
    picture = draw(5, (70, 50))
    if mode in ("I", "F", "I;16"):
        values = np.asarray(picture.convert("L")).astype(np.float64) * (257 if mode == "I;16" else 3000)
        values[-1, -1] = 60_000 if mode == "I;16" else 900_000
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        data = encoded(Image.fromarray(values.astype(kind)), "TIFF")
    elif mode == "P":
        data = encoded(picture.convert("P"), transparency=3)
    else:
        picture.putalpha(picture.getchannel("G"))
        data = encoded(picture.convert(mode))
    monkeypatch.setattr("dml.imaging.STRIP_PIXELS", 10**9)
    whole = np.asarray(decode(data))
    monkeypatch.setattr("dml.imaging.STRIP_PIXELS", 500)
    assert whole.std() > 1
    assert np.array_equal(np.asarray(decode(data)), whole)


def test_the_pixel_limit_is_the_callers(draw):
    data = encoded(draw(0, (100, 50)))
    assert decode(data, max_pixels=5000).size == (100, 50)
    with pytest.raises(ImageTooLarge, match=r"100 x 50 = 5,000 pixels; at most 4,999"):
        decode(data, max_pixels=4999)


def test_pillows_global_limit_is_left_alone(draw):
    before = Image.MAX_IMAGE_PIXELS
    decode(encoded(draw(0)), max_pixels=10_000)
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_byte_limit_is_checked_before_reading(tmp_path):
    path = tmp_path / "large.jpg"
    with path.open("wb") as stream:
        stream.truncate(50_000_000)
    with pytest.raises(ImageTooLarge, match=r"large\.jpg has 50,000,000 bytes; at most 16,000,000"):
        decode(path, max_bytes=16_000_000)
    with pytest.raises(ImageTooLarge, match="the image has 11 bytes"):
        decode(b"hello world", max_bytes=10)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"just some text\n", "not a picture"), (bytes(500), "not a picture")],
)
def test_what_is_no_picture_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    with pytest.raises(InvalidImage, match=message) as caught:
        decode(path)
    assert "holiday.jpg" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"%PDF-1.7 ...", "PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "HEIC"),
    ],
)
def test_a_format_that_is_not_read_is_named(content, what):
    with pytest.raises(UnsupportedImage, match=what):
        decode(content)


def test_a_missing_file_a_folder_and_a_pipe_are_refused(tmp_path):
    with pytest.raises(InvalidImage, match="does not exist"):
        decode(tmp_path / "nothing.jpg")
    with pytest.raises(InvalidImage, match="is not a file"):
        decode(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(InvalidImage, match="is not a file"):
        decode(tmp_path / "pipe.jpg")


def test_a_name_that_no_file_system_takes_is_refused(tmp_path):
    with pytest.raises(InvalidImage):
        decode(tmp_path / ("x" * 5000))
    with pytest.raises(InvalidImage):
        decode(tmp_path / "null\0byte.jpg")


def test_probe_reads_the_size_from_the_header(tmp_path, draw):
    path = tmp_path / "a.png"
    draw(1, (70, 30)).save(path)
    assert probe(path) == (70, 30)
    assert probe(path.read_bytes()) == (70, 30)
    with pytest.raises(InvalidImage, match="empty"):
        probe(b"")
    path.write_text("no picture")
    with pytest.raises(InvalidImage, match="not a picture"):
        probe(path)


def test_a_box_is_cut_at_the_border_of_the_picture():
    assert crop_box(corners(), (24, 16, 500, 500), "x").size == (24, 16)
    assert crop_box(corners(), None, "x").size == (48, 32)


def test_a_box_outside_the_picture_is_refused():
    with pytest.raises(InvalidImage, match=r"a\.jpg: the box \(60, 0, 70, 10\).*48 x 32"):
        crop_box(corners(), (60, 0, 70, 10), "a.jpg")


def test_suffixes_are_lower_case_with_a_dot():
    assert {".jpg", ".jpeg", ".png", ".webp"} <= IMAGE_SUFFIXES
    assert all(s == s.lower() and s.startswith(".") for s in IMAGE_SUFFIXES)
