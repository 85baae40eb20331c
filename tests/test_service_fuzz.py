"""Damaged picture files of every format, sent to a service in a process of its own: no crash, no failure.

Scale 10 (`make test-long`) sends more than 20,000 files. DML_FUZZ_FOLDER names a folder of real photos to be
damaged beside the drawn ones. A failure names the seed, from which `damaged` makes the same file again.
"""

import os
import re
import struct
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, ImageFilter
from serving import encoded, paint

from dml.imaging import FORMATS
from service.problems import CATALOGUE

PLACE = "/v1/collections/colours"
READ = {*FORMATS, "MPO", "photos"}
FILES = {True: 170, False: 20}
"""Per format and scale: of those that are read, and of the others, which are told by their heads."""
MOST_MEMORY = 1_500_000_000  # bytes; ten times what the service needs for these pictures
EXPECTED = {"invalid-image", "unsupported-media", "decompression-bomb", "image-too-large", "invalid-request"}

SERVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import uvicorn
from serving import ColourEncoder, colour_collection, running
from service.app import create_app
from service.engine import Engine
from service.run import configure_logs, quiet_decoders
from service.settings import Settings
settings = Settings(max_pixels=2_000_000, max_pixels_in_flight=4_000_000)
configure_logs(settings)
quiet_decoders()
collection = colour_collection(Path(sys.argv[2]), pictures=1)
engine = Engine({"colours": collection}, [ColourEncoder()], settings=settings)
with running(create_app(engine)) as address:
    print(address, flush=True)
    sys.stdin.read()
engine.close()
"""

MAGIC = {
    "cur": b"\x00\x00\x02\x00",
    "dcx": b"\xb1\x68\xde\x3a",
    "fits": b"SIMPLE  =",
    "fli": b"\x00" * 4 + b"\x11\xaf",
    "gbr": b"\x00\x00\x00\x20\x00\x00\x00\x02",
    "heic": b"\x00\x00\x00\x18ftypheic",
    "iptc": b"\x1c\x01",
    "mcidas": b"\x00" * 4 + b"\x00\x00\x00\x04",
    "mp4": b"\x00\x00\x00\x20ftypisom",
    "mpeg": b"\x00\x00\x01\xb3",
    "nothing": b"",
    "pcd": b"\xff" * 2048 + b"PCD_",
    "pdf": b"%PDF-1.7\n",
    "pixar": b"\200\350\000\000",
    "psd": b"8BPS\x00\x01",
    "sun": b"\x59\xa6\x6a\x95",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'",
    "xpm": b"/* XPM */",
    "xvthumb": b"P7 332",
    "zip": b"PK\x03\x04",
}
"""Heads of formats that Pillow reads but does not write, and of some that it does neither; noise follows."""

Image.init()
KINDS = sorted({*Image.SAVE, *MAGIC, "photos"})


@cache
def sources() -> dict[str, list[bytes]]:
    """format -> files of it: every format that Pillow writes, some in several ways, and heads of others."""
    picture = paint("green", 2, (72, 56)).filter(ImageFilter.GaussianBlur(1))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    found: dict[str, list[bytes]] = {}
    for kind in sorted(Image.SAVE):
        for mode in ("RGB", "RGBA", "P", "L", "1", "CMYK", "I;16"):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # of formats that Pillow will drop
                    found.setdefault(kind, []).append(encoded(picture.convert(mode), kind))
            except (OSError, ValueError, KeyError, TypeError, RuntimeError):
                continue  # not a mode of this format, or a writer that needs a plugin
    found["JPEG"] += [
        encoded(picture, "JPEG", progressive=True, exif=exif, icc_profile=b"profile" * 40, comment=b"hello"),
        encoded(picture, "JPEG", quality=20, subsampling=2, restart_marker_rows=1),
    ]
    found["TIFF"] += [encoded(picture, "TIFF", compression=c) for c in ("tiff_lzw", "tiff_deflate", "jpeg")]
    more = [paint("red", n, (72, 56)) for n in range(3)]
    found["GIF"].append(encoded(picture, "GIF", save_all=True, append_images=more, duration=40))
    found["PNG"].append(encoded(picture, "PNG", save_all=True, append_images=more))
    found["WEBP"] += [
        encoded(picture, "WEBP", lossless=True),
        encoded(picture, "WEBP", save_all=True, append_images=more),
    ]
    noise = np.random.default_rng(0).bytes(3000)
    found |= {name: [head + noise] for name, head in MAGIC.items()}
    folder = os.environ.get("DML_FUZZ_FOLDER")
    if folder:
        photos = sorted(
            path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")
        )
        found["photos"] = [path.read_bytes() for path in photos[:: max(1, len(photos) // 200)]]
    return {kind: files for kind, files in found.items() if files}


# Ways to damage a file: (file, another, chance) -> bytes

Chance = np.random.Generator


def flipped(data: bytes, other: bytes, chance: Chance) -> bytes:
    changed = bytearray(data)
    for place in chance.integers(0, len(data), chance.integers(1, 17)):
        changed[place] = chance.integers(256)
    return bytes(changed)


def flipped_head(data: bytes, other: bytes, chance: Chance) -> bytes:
    """One bit of the first bytes, where sizes and kinds stand."""
    changed = bytearray(data)
    changed[chance.integers(min(len(data), 96))] ^= 1 << chance.integers(8)
    return bytes(changed)


def cut(data: bytes, other: bytes, chance: Chance) -> bytes:
    return data[: chance.integers(len(data))]


def cut_out(data: bytes, other: bytes, chance: Chance) -> bytes:
    start, end = sorted(chance.integers(0, len(data) + 1, 2))
    return data[:start] + data[end:]


def spliced(data: bytes, other: bytes, chance: Chance) -> bytes:
    """The beginning of one file and the end of another, of any format."""
    return data[: chance.integers(len(data))] + other[chance.integers(len(other)) :]


def repeated(data: bytes, other: bytes, chance: Chance) -> bytes:
    start, end = sorted(chance.integers(0, len(data) + 1, 2))
    return data[:end] + data[start:end][:2000] * int(chance.integers(1, 40)) + data[end:]


def huge(data: bytes, other: bytes, chance: Chance) -> bytes:
    """Extreme numbers in the head: sizes of gigabytes, lengths below zero, offsets beyond the end."""
    changed = bytearray(data)
    for _ in range(chance.integers(1, 4)):
        value = int(
            chance.choice([0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
        )
        width = int(chance.choice([2, 4]))
        place = int(chance.integers(min(len(data), 200)))
        order = "big" if chance.integers(2) else "little"
        changed[place : place + width] = (value & (256**width - 1)).to_bytes(width, order)
    return bytes(changed)


DAMAGES: tuple[Callable[[bytes, bytes, Chance], bytes], ...] = (
    flipped, flipped_head, cut, cut_out, spliced, repeated, huge,
)  # fmt: skip


def damaged(kind: str, seed: int) -> bytes:
    """A damaged file of a format; the same for the same seed."""
    chance = np.random.default_rng([seed, *kind.encode()])
    files = sources()
    data = files[kind][chance.integers(len(files[kind]))]
    others = files[sorted(files)[chance.integers(len(files))]]
    for _ in range(chance.integers(1, 3)):
        if data:
            data = DAMAGES[chance.integers(len(DAMAGES))](data, others[0], chance)
    return data


# The service


@dataclass
class Service:
    """A service in a process of its own."""

    process: subprocess.Popen
    http: httpx.Client
    outcomes: Counter = field(default_factory=Counter)

    def send(self, data: bytes, what: str) -> httpx.Response:
        """Search with a file; whatever it is, the answer is one that the API knows."""
        try:
            answer = self.http.post(f"{PLACE}/search/image", files={"file": data})
        except httpx.HTTPError as error:
            pytest.fail(f"{what}: no answer ({error!r}); the process {self.state()}")
        self.check(answer, what)
        return answer

    def check(self, answer: httpx.Response, what: str) -> None:
        assert answer.status_code < 500, f"{what}: {answer.text}"
        if answer.status_code >= 400:
            slug = answer.json()["type"].removeprefix("/problems/")
            assert slug in EXPECTED & set(CATALOGUE), f"{what}: {answer.text}"
            self.outcomes[slug] += 1
        else:
            self.outcomes["answered"] += 1

    def state(self) -> str:
        code = self.process.poll()
        return "is alive" if code is None else f"ended with {code}"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzz")
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-c",
        SERVER,
        str(Path(__file__).parent),
        str(folder / "c"),
    ]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with httpx.Client(base_url=address, timeout=60) as http:
            made = Service(process, http)
            yield made
            peak = peak_memory(process.pid)
        _, _ = process.communicate(input="", timeout=60)
        log.seek(0)
        text = log.read()
    print(dict(made.outcomes), f"peak memory {peak / 1e6:.0f} MB")
    assert process.returncode == 0, text[-3000:]
    assert "request failed" not in text, text[-3000:]
    assert "Warning" not in text, "a decoder writes to the log what the sender of a picture likes"
    assert peak < MOST_MEMORY


def peak_memory(process: int) -> int:
    """Bytes; 0 where the system does not tell."""
    status = Path(f"/proc/{process}/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else 0


def test_whole_files_of_formats_that_are_read_are_searched_with_and_others_are_named(service):
    for kind, files in sources().items():
        if kind == "photos":
            continue
        for position, data in enumerate(files):
            answer = service.send(data, f"{kind} {position}")
            if kind in FORMATS:
                assert answer.status_code == 200, (kind, position, answer.text)
            elif kind not in ("MPO",):  # read as JPEG
                assert answer.status_code in (415, 422), (kind, answer.text)
    assert set(FORMATS) <= set(sources()), "a format that is read is not tested"


def test_tens_of_thousands_of_odd_tags_are_no_lines_in_the_log(service):
    """Each of them would be a warning of its own; the log is looked at when the service has ended."""
    picture = encoded(Image.new("L", (10, 10), 90), "TIFF")
    tags = [(256, 4, 1, 10), (257, 4, 1, 10), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 1), (278, 4, 1, 10), (279, 4, 1, 100)]
    tags += [(tag, 1, 1_000_000, 8) for tag in range(1000, 60_000)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + picture
    service.send(data, "odd tags")


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_answered_and_nothing_fails(service, kind, scale):
    if kind not in sources():
        pytest.skip("no folder of photos is named" if kind == "photos" else "not written by this Pillow")
    for seed in range(FILES[kind in READ] * scale):
        data = damaged(kind, seed)
        what = f"damaged({kind!r}, {seed})"
        answer = service.send(data, what)
        if seed % 10 == 0:  # what is taken can be shown, large and small, or is refused like a search
            written = service.http.put(f"{PLACE}/items/damaged", files={"file": data})
            service.check(written, what)
            assert (written.status_code < 300) == (answer.status_code == 200), what
            if written.status_code < 300:
                for size in ("full", "thumb"):
                    shown = service.http.get(f"{PLACE}/items/damaged/image", params={"size": size})
                    service.check(shown, what)
                    assert shown.status_code == 200, what
                assert service.http.delete(f"{PLACE}/items/damaged").status_code == 204
    assert service.process.poll() is None, service.state()
