"""An objective says what to minimise on one batch. The loop knows nothing else."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from dml.data.batch import Batch


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    epoch: int  # the current epoch, from 0
    epochs: int  # of the whole run
    step: int  # optimiser steps done
    steps: int  # of the whole run

    @property
    def share(self) -> float:
        """Share of the run's steps that are done, in [0, 1]."""
        return self.step / self.steps if self.steps else 0.0


class Candidates(NamedTuple):
    """Rows that anchors are compared with, besides their own batch."""

    embeddings: Tensor  # (N, D); raw from an augmenter, unit from a memory
    labels: Tensor  # (N,) int64, or (N, C) multi-hot
    ids: Tensor  # (N,) int64, the image that each row comes from


Batches = Callable[[], Iterable[Batch]]
"""Starts a pass over the training set."""


class Objective(nn.Module):
    """Base of every training method.

    Keep whatever must survive a restart (proxies, memories, statistics) as parameters, buffers or submodules:
    then `state_dict()` already carries it.
    """

    def forward(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return {"loss": () tensor to minimise, ...}; the other entries are scalars for the log."""
        raise NotImplementedError

    def before_epoch(self, model: nn.Module, batches: Batches, progress: Progress) -> None:
        """Refresh anything computed over the whole training set."""

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        """Follow the updated weights, e.g. move an averaged teacher."""

    def loss_parameters(self) -> list[nn.Parameter]:
        """What is learned outside the model (proxies, classifiers), for an optimiser group of its own."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]
