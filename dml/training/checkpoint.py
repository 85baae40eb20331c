"""State that lets a killed run go on as if nothing had happened.

A checkpoint holds tensors and plain values only and is read with `weights_only=True`: no code runs on
loading.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from dml.errors import ConfigError, DataError
from dml.storage import opened_aside

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


def save_checkpoint(
    path: Path,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    standing: Standing,
    identity: Mapping[str, str],
) -> None:
    """Write everything that continuing needs: weights, optimiser, progress, random state."""
    state = {
        "format": FORMAT,
        "identity": dict(identity),
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "standing": asdict(standing),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with opened_aside(path) as file:  # torch given a name cannot say why a disk refuses
        torch.save(state, file)


def load_checkpoint(
    path: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, identity: Mapping[str, str]
) -> Standing:
    """Put a run back where its checkpoint was written.

    Args:
        identity: what must be the same for a run to go on, as it was given to `save_checkpoint`: what it is
            called in a message -> its hash or name.

    Raises:
        DataError: the file cannot be read as a checkpoint.
        ConfigError: it belongs to a run with another identity; names what differs. Nothing was changed.
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
    differs = [name for name, value in identity.items() if state["identity"].get(name) != value]
    if differs:
        raise ConfigError(
            f"The run in {path.parent.parent} cannot go on: since it was started, {' and '.join(differs)} "
            f"changed, and its figures would mean nothing. Choose another --out, or delete the folder."
        )
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if state["random_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["random_cuda"])
    return Standing(**state["standing"])
