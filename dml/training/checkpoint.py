"""State that lets a killed run go on as if nothing had happened.

A checkpoint holds tensors and plain values only and is read with `weights_only=True`: no code runs on
loading.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dml.errors import ConfigError, DataError
from dml.storage import opened_aside
from dml.training.processes import from_first, is_first, process_rank

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


Randomness = dict[str, Any]
"""State of the generators that draw without being given one: initial weights, dropout."""


def randomness() -> Randomness:
    """That of this process, as it is now."""
    return {
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def save_checkpoint(
    path: Path,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    standing: Standing,
    identity: Mapping[str, str],
    *,
    others: Sequence[Randomness] = (),
) -> None:
    """Write everything that continuing needs: weights, optimiser, progress, random state.

    Args:
        others: `randomness()` of the other processes that train together with this one, by rank from 1.
    """
    state = {
        "format": FORMAT,
        "identity": dict(identity),
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "standing": asdict(standing),
        **randomness(),
        "others": list(others),
    }
    with opened_aside(path) as file:  # torch given a name cannot say why a disk refuses
        torch.save(state, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        DataError: the file cannot be read as a checkpoint.
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
    return state


def load_checkpoint(
    path: Path, learner: nn.Module, optimizer: torch.optim.Optimizer, identity: Mapping[str, str]
) -> Standing:
    """Put a run back where its checkpoint was written.

    Where several processes train together, the first reads the file for all. With as many as wrote it, each
    goes on with its own random state; with another number, those that are new keep the one they have.

    Args:
        identity: what must be the same for a run to go on, as it was given to `save_checkpoint`: what it is
            called in a message -> its hash or name.

    Raises:
        DataError: the file cannot be read as a checkpoint.
        ConfigError: it belongs to a run with another identity; names what differs. Nothing was changed.
    """
    state = from_first(read_checkpoint(path) if is_first() else {})
    differs = [name for name, value in identity.items() if state["identity"].get(name) != value]
    if differs:
        raise ConfigError(
            f"The run in {path.parent.parent} cannot go on: since it was started, {' and '.join(differs)} "
            f"changed, and its figures would mean nothing. Choose another --out, or delete the folder."
        )
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    states: list[Randomness] = [state, *state.get("others", [])]
    if process_rank() < len(states):
        own = states[process_rank()]
        torch.set_rng_state(own["random"])
        if own["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(own["random_cuda"][: torch.cuda.device_count()])
    return Standing(**state["standing"])
