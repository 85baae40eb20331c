"""Run an encoder with torch: on a GPU, or where no ONNX file was made."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dml.config import ModelConfig
from dml.encoder.manifest import WEIGHTS, Manifest
from dml.errors import ConfigError, EncoderError
from dml.models import build_model
from dml.models.embedder import Embedder


class TorchRuntime:
    """The model rebuilt from its manifest and weights, (N, 3, S, S) float32 → (N, D) float32.

    Args:
        manifest: of the encoder.
        device: "cpu", "cuda" or "cuda:N".
        threads: torch's threads on a CPU, for the whole process (torch knows no other way); None: as they
            are.
        precision: "f32", or "bf16": the trunk's convolutions and products in bfloat16.

    Raises:
        EncoderError: the model cannot be rebuilt, or the device is not there.
    """

    name = "torch"

    def __init__(
        self,
        manifest: Manifest,
        *,
        device: str = "cpu",
        threads: int | None = None,
        precision: str = "f32",
    ) -> None:
        if device != "cpu" and not torch.cuda.is_available():
            raise EncoderError(
                f'torch {torch.__version__} sees no CUDA device, so "{device}" cannot be used here. Leave '
                f"--device out, or say --device cpu."
            )
        if threads is not None and device == "cpu":
            torch.set_num_threads(threads)
        self.device, self.precision = device, precision
        self.model = rebuild(manifest).to(device)

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        inputs = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device, non_blocking=True)
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.model(inputs).unit.float().cpu().numpy()

    def concurrent(self, calls: int) -> None:
        """torch spreads every call over its own threads, or over a GPU: several at a time gain nothing."""
        return


def rebuild(manifest: Manifest) -> Embedder:
    """The model of an encoder folder, in eval mode on the CPU.

    Raises:
        EncoderError: its trunk is not known here, or its weights do not fit it.
    """
    config = read_config(manifest.tree["model"], manifest.folder)
    try:
        model = build_model(config, image_size=manifest.tree["image_size"])
    except ConfigError as error:
        raise EncoderError(f"The model of {manifest.folder} cannot be rebuilt: {error}") from error
    load_weights(model, manifest.folder / WEIGHTS)
    return model.eval().requires_grad_(False)


def read_config(tree: Mapping[str, Any], where: Path) -> ModelConfig:
    """The model's part of a manifest."""
    try:
        return TypeAdapter(ModelConfig).validate_python(dict(tree))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise EncoderError(f"The model of {where} cannot be read: {problems}") from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill a model from safetensors, every key and nothing else."""
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise EncoderError(f"{path} cannot be read: {error}") from error
    except RuntimeError as error:
        raise EncoderError(
            f"The weights {path} do not fit the model that its manifest describes: {error}"
        ) from error
