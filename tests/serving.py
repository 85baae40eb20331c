"""What the tests of the service share: an encoder that sees colours, pictures, a real server on loopback."""

import io
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image, ImageDraw
from starlette.types import ASGIApp

from dml.collection import create_collection
from dml.collection.base import NewItem
from dml.collection.local import LocalCollection
from dml.imaging import decode

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "gold": (210, 170, 40)}


class ColourEncoder:
    """Pictures as 4 x 4 mean colours: no network, so that tests know which picture is nearest."""

    fingerprint = "c0104e" + "0" * 58
    dim = 48
    manifest: Mapping[str, Any] = {"provenance": {}}

    decode = staticmethod(decode)

    def preprocess(self, picture: Image.Image) -> np.ndarray:
        small = picture.resize((4, 4), Image.Resampling.BOX)
        return np.asarray(small, dtype=np.float32).transpose(2, 0, 1) / 255 - 0.45

    def embed_arrays(self, arrays: np.ndarray) -> np.ndarray:
        rows = arrays.reshape(len(arrays), -1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def paint(colour: str, number: int = 0, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A picture of one colour with a stripe whose place depends on the number."""
    picture = Image.new("RGB", size, COLOURS[colour])
    left = 4 + 11 * (number % 8)
    ImageDraw.Draw(picture).rectangle((left, 0, left + 14, size[1]), fill=(235, 235, 230))
    return picture


def encoded(picture: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def jpeg(colour: str, number: int = 0) -> bytes:
    return encoded(paint(colour, number), quality=90)


def colour_collection(
    path: Path, *, pictures: int = 5, encoder: ColourEncoder | None = None
) -> LocalCollection:
    """A real collection of painted pictures, "red/0" to "gold/4", labelled by colour."""
    encoder = encoder or ColourEncoder()
    collection = create_collection(path, dim=encoder.dim, fingerprint=encoder.fingerprint, index="flat")
    items = []
    for colour in COLOURS:
        for number in range(pictures):
            image = jpeg(colour, number)
            pixels = encoder.preprocess(Image.open(io.BytesIO(image)).convert("RGB"))
            vector = encoder.embed_arrays(pixels[None])[0]
            items.append(
                NewItem(f"{colour}/{number}", vector, {"label": colour, "price": number}, image=image)
            )
    if items:
        collection.add(items)
    return collection


@contextmanager
def running(app: ASGIApp, config: uvicorn.Config | None = None) -> Iterator[str]:
    """A real server on a free loopback port, for as long as the block lasts; gives its address."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = config or uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started and thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)
        assert server.started, "the server did not start"
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
    assert not thread.is_alive(), "the server did not stop"
