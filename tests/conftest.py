"""Fixtures that every test file may use: small drawn pictures, a folder of them, an encoder."""

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from browsing import browser  # noqa: F401  a fixture, for every test of the page
from PIL import Image, ImageDraw, ImageFilter

from dml.startup import prepare_process

# Before any test file loads a library that starts threads.
prepare_process()
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "2")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell has what it starts in the background ignore Ctrl-C, and so would the commands of the tests.
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHAPES = ("ellipse", "rectangle", "triangle", "cross", "ring", "bars")
COLOURS = ((200, 60, 50), (50, 120, 200), (60, 160, 80), (220, 170, 40), (140, 80, 170), (40, 40, 50))


@pytest.fixture(autouse=True, scope="session")
def state_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Services of the tests keep their state here, and see no keys of the developer's own."""
    folder = tmp_path_factory.mktemp("state")
    os.environ["DML_STATE"] = str(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def logs_as_they_were() -> Iterator[None]:
    """What a file's tests set of this process's logs, as a service does, is gone for those of the next."""
    names = ("dml", "service", "eval", "uvicorn", "uvicorn.error")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logs = sys.modules.get("service.logs")
    if logs is not None:
        root = logging.getLogger()
        root.handlers[:] = [handler for handler in root.handlers if not isinstance(handler, logs.Bridge)]
        sys.modules["structlog"].reset_defaults()


@pytest.fixture(scope="session")
def scale() -> int:
    """Multiplies the counts of randomised work: 1 in `make test`, more in the longer tiers."""
    return int(os.environ.get("DML_TEST_SCALE", "1"))


def draw_class(kind: int, seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of class `kind`: one shape in one colour; `seed` moves it, lights it and adds noise."""
    rng = np.random.default_rng([kind, seed])
    width, height = size
    light = tuple(int(v) for v in rng.integers(190, 250, 3))
    image = Image.new("RGB", size, light)
    pen = ImageDraw.Draw(image)
    side = min(size) * rng.uniform(0.5, 0.75)
    left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
    box = (left, top, left + side, top + side)
    colour = tuple(int(c * rng.uniform(0.8, 1.1)) for c in COLOURS[kind % len(COLOURS)])
    colour = tuple(min(255, c) for c in colour)
    shape = SHAPES[(kind + kind // len(SHAPES)) % len(SHAPES)]
    middle_x, middle_y = left + side / 2, top + side / 2
    if shape == "ellipse":
        pen.ellipse(box, fill=colour)
    elif shape == "rectangle":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(middle_x, top), (left, top + side), (left + side, top + side)], fill=colour)
    elif shape == "cross":
        pen.rectangle((middle_x - side / 8, top, middle_x + side / 8, top + side), fill=colour)
        pen.rectangle((left, middle_y - side / 8, left + side, middle_y + side / 8), fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=max(2, int(side / 6)))
    else:
        for step in range(3):
            x = left + step * side / 2.5
            pen.rectangle((x, top, x + side / 6, top + side), fill=colour)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float32)
    noisy = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy)


@pytest.fixture(scope="session")
def draw() -> Callable[..., Image.Image]:
    """draw(seed, size=(64, 64)) -> an RGB picture with something in it."""

    def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
        return draw_class(seed % 36, seed, size)

    return picture


@pytest.fixture
def plain_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    """faiss's own `search`, which Milvus's embedded engine calls with parameters.

    pytorch-metric-learning, once another test of this process has loaded it, has put one into its place that
    takes none.
    """
    faiss = pytest.importorskip("faiss")
    for kind in vars(faiss).values():
        if isinstance(kind, type) and "search_numpy" in vars(kind):
            monkeypatch.setattr(kind, "search", vars(kind)["search_numpy"])


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLASS/name.jpg: 6 classes of 8 small pictures each."""
    root = tmp_path_factory.mktemp("pictures")
    for kind in range(6):
        folder = root / f"class_{kind}"
        folder.mkdir()
        for number in range(8):
            draw_class(kind, number).save(folder / f"{number}.jpg", quality=92)
    return root


@pytest.fixture
def photos(tiny_folder: Path, tmp_path: Path) -> Path:
    """A test's own copy of `tiny_folder`, whose times of change lie back, as those of photos do."""
    folder = tmp_path / "photos"
    shutil.copytree(tiny_folder, folder)
    for path in folder.rglob("*.jpg"):
        os.utime(path, (1e9, 1e9))
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder folder made of an untrained tiny trunk: 32 px pictures, 16 dimensions."""
    torch = pytest.importorskip("torch")
    from dml.config import ModelConfig
    from dml.encoder.artifact import save_encoder
    from dml.encoder.preprocess import Preprocess
    from dml.models import build_model

    torch.manual_seed(0)
    config = ModelConfig(dim=16)
    model = build_model(config, image_size=32).eval()
    mean, std = model.input_stats
    out = tmp_path_factory.mktemp("encoder") / "encoder"
    preprocess = Preprocess(size=32, fit="squash", mean=mean, std=std)
    save_encoder(model, preprocess, out, provenance={}, model_config=config, image_size=32)
    return out
