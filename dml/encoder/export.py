"""Write a model as ONNX, and measure that both runtimes agree."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from torch import Tensor, nn

from dml.encoder.preprocess import Preprocess
from dml.errors import EncoderError
from dml.models.embedder import Embedder

MIN_COSINE = 0.9999
"""Below this agreement an export is refused: neighbours would change."""
PICTURES = 12
OPSET = 20
LARGEST_SINGLE_FILE = 1_900_000_000
"""Bytes of weights that still fit into one ONNX file (protobuf ends at 2 GiB); above, they get a file beside
it.
"""

Embed = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Units(nn.Module):
    """What is deployed: pictures in, unit vectors out, nothing else."""

    def __init__(self, model: Embedder) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).unit


@dataclass(frozen=True)
class Agreement:
    """How far two runtimes are apart on the same pictures."""

    max_abs_difference: float
    min_cosine: float
    pictures: int

    def as_json(self) -> dict[str, float | int]:
        return asdict(self)


def write_onnx(model: Embedder, path: Path, *, image_size: int) -> None:
    """Export the unit vectors of a model in eval mode, with a free batch size.

    Raises:
        EncoderError: when the exporter does not know something in the model, or its packages are missing.
    """
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it and says so less clearly
    except ImportError as error:
        raise EncoderError(
            f'The ONNX exporter cannot be imported ({error}). Install it with: pip install "dml[train]"'
        ) from None
    module = Units(model).eval()
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    example = torch.zeros(2, 3, image_size, image_size)
    try:
        # The exporter warns about its own internals; what matters here is measured afterwards.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                (example,),
                str(path),
                input_names=["pixels"],
                output_names=["embedding"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                opset_version=OPSET,
                dynamo=True,
                external_data=size > LARGEST_SINGLE_FILE,
                verbose=False,
            )
    except OSError:  # the disk, not the model: whoever has opened the folder says so
        raise
    except Exception as error:  # the exporter raises what the model's own code raises under tracing
        first = (str(error).strip().splitlines() or [""])[0]
        raise EncoderError(
            f"The model cannot be exported to ONNX ({type(error).__name__}: {first[:300]}). Save it without: "
            f"--format safetensors; it then runs with torch only."
        ) from error


def check_pictures(count: int = PICTURES, *, seed: int = 0) -> list[Image.Image]:
    """Pictures with what photos have: smooth light, edges, texture, noise, several sizes and proportions."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        width, height = (int(v) for v in rng.integers(48, 400, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        light = coarse.resize((width, height), Image.Resampling.BICUBIC)
        patches = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        edges = patches.resize((width, height), Image.Resampling.NEAREST)
        noise = rng.normal(0, 8, (height, width, 3))
        mixed = np.asarray(
            Image.blend(light, edges.filter(ImageFilter.GaussianBlur(0.7)), rng.uniform(0.2, 0.6))
        )
        pictures.append(Image.fromarray(np.clip(mixed + noise, 0, 255).astype(np.uint8)))
    return pictures


def measure_agreement(
    first: Embed, second: Embed, preprocess: Preprocess, pictures: Sequence[Image.Image]
) -> Agreement:
    """Embed the pictures with both, all at once with one and in batches of 1, 2 and the rest with the other.

    Raises:
        EncoderError: when a vector is not finite or not of unit length: the model itself is broken.
    """
    pixels = np.stack([preprocess(picture) for picture in pictures])
    one = first(pixels)
    two = np.concatenate([second(part) for part in np.split(pixels, [1, 3]) if len(part)])
    lengths = np.linalg.norm(one, axis=1)
    if not np.isfinite(one).all() or (np.abs(lengths - 1) > 1e-3).any():
        raise EncoderError(
            f"The model makes vectors that are not of unit length (lengths {lengths.min():.4g} to "
            f"{lengths.max():.4g}). Has its training diverged? Lower the learning rate."
        )
    cosine = (
        (one.astype(np.float64) * two).sum(axis=1) / lengths / np.linalg.norm(two.astype(np.float64), axis=1)
    )
    return Agreement(
        max_abs_difference=float(np.abs(one - two).max()),
        min_cosine=float(np.nan_to_num(cosine, nan=-1.0).min()),
        pictures=len(pictures),
    )


def require_agreement(agreement: Agreement) -> None:
    """Raises EncoderError when the runtimes are too far apart to be called the same encoder."""
    if agreement.min_cosine < MIN_COSINE:
        raise EncoderError(
            f"ONNX Runtime and torch disagree: cosine {agreement.min_cosine:.6f} on {agreement.pictures} "
            f"pictures (largest difference {agreement.max_abs_difference:.2e}), at least {MIN_COSINE} is "
            f"needed. The model has something that does not export faithfully; save it with --format "
            f"safetensors and run it with torch."
        )
