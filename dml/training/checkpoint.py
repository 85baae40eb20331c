"""State that lets a killed run go on as if nothing had happened.

A checkpoint holds tensors and plain values only and is read with `weights_only=True`: no code runs on
loading.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dml.errors import ConfigError, DataError, StorageError

FORMAT = 1


@dataclass
class Standing:
    """How far a run has come, and the best it has seen."""

    step: int = 0
    best_value: float = -1.0  # MAP@R on the validation split
    best_step: int = 0
    best_epoch: int = 0
    evaluations_since_best: int = 0
    seconds: float = 0.0


def write_aside(path: Path, write: Any) -> None:
    """Call `write(other_path)`, make it durable, and put it in place in one move.

    Raises:
        StorageError: when the disk is full or refuses; what was there before stays.
    """
    aside = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(aside)
        with aside.open("rb+") as handle:
            os.fsync(handle.fileno())
        aside.replace(path)
    except (OSError, RuntimeError) as error:  # torch wraps a full disk into a RuntimeError
        aside.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and "write" not in str(error).lower():
            raise
        raise StorageError(
            f"{path} cannot be written: {error}. The file that was there before is untouched."
        ) from None


def save_checkpoint(
    path: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, standing: Standing, recipe_digest: str
) -> None:
    """Write everything that continuing needs: weights, optimiser, progress, random state."""
    state = {
        "format": FORMAT,
        "recipe": recipe_digest,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "standing": asdict(standing),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    write_aside(path, lambda aside: torch.save(state, aside))


def load_checkpoint(
    path: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, recipe_digest: str
) -> Standing:
    """Put a run back where its checkpoint was written.

    Raises:
        DataError: the file cannot be read as a checkpoint.
        ConfigError: it belongs to another recipe.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"The checkpoint {path} cannot be read: {first_line}. Delete it to start the run again."
        ) from None
    if state.get("format") != FORMAT:
        raise DataError(
            f"The checkpoint {path} has format {state.get('format')}; this version reads {FORMAT}."
        )
    if state["recipe"] != recipe_digest:
        raise ConfigError(
            f"The checkpoint {path} was written by another recipe. Use its recipe.toml, or another --out."
        )
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return Standing(**state["standing"])
