"""The training loop. It yields after every step; logging, evaluation and checkpoints belong to the caller."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from dml.config import TrainConfig
from dml.data.batch import Batch
from dml.training.objective import Objective, Progress


class Batches(Protocol):
    """The training set, cut into batches. The same (epoch, step) always gives the same batch."""

    def __len__(self) -> int:
        """Steps in an epoch."""
        ...

    def epoch(self, number: int, *, start: int = 0) -> Iterable[Batch]:
        """The batches of one epoch, from step `start` on."""
        ...

    def sweep(self, number: int) -> Iterable[Batch]:
        """Every training picture once, prepared as for training; for statistics of the whole set."""
        ...


class Learner(nn.Module):
    """Model and objective as one module, so that whatever wraps one (devices, processes) wraps both."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, parts: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """`parts` are the fields of a `Batch`: what wraps this converts dictionaries of tensors only."""
        return self.objective(self.model, Batch(**parts))  # type: ignore[arg-type]


class Step(NamedTuple):
    """What happened in one optimiser step."""

    number: int  # steps done, this one included
    epoch: int  # from 0
    terms: dict[str, Tensor]  # "loss" and its parts, detached
    learning_rate: float  # of the first parameter group


def steps(
    fabric: Fabric,
    learner: nn.Module,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[float], float],
    *,
    total: int,
    start: int = 0,
    clip_norm: float = 0.0,
) -> Iterator[Step]:
    """Train to step `total`, in passes over `batches`, pausing after every step.

    Args:
        learner: a `Learner`, set up by Fabric together with the optimiser.
        rate: share of the run done, in [0, 1) -> factor on every group's initial learning rate.
        start: steps that an earlier run has done; training goes on behind them.
        clip_norm: longest gradient; 0: any.
    """
    inner = cast(Learner, getattr(learner, "module", learner))  # Fabric wraps it
    model, objective = inner.model, inner.objective
    first_epoch, skipped = divmod(start, len(batches))
    epochs = math.ceil(total / len(batches))
    number = start
    for epoch in range(first_epoch, epochs):
        begin = skipped if epoch == first_epoch else 0
        if begin == 0:  # an epoch entered in the middle has this behind it already
            objective.before_epoch(
                model,
                lambda epoch=epoch: moved(batches.sweep(epoch), fabric),
                Progress(epoch, epochs, number, total),
            )
        for batch in moved(batches.epoch(epoch, start=begin), fabric):
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate(number / total)
            learner.train()
            terms = learner(vars(batch))
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(terms["loss"])
            if clip_norm > 0:
                fabric.clip_gradients(learner, optimizer, max_norm=clip_norm, error_if_nonfinite=False)
            optimizer.step()
            number += 1
            objective.after_step(model, Progress(epoch, epochs, number, total))
            detached = {name: term.detach() for name, term in terms.items()}
            yield Step(number, epoch, detached, optimizer.param_groups[0]["lr"])
            if number == total:
                return


def moved(batches: Iterable[Batch], fabric: Fabric) -> Iterator[Batch]:
    """The same batches on the device of the run."""
    return (batch.to(fabric.device) for batch in batches)


def learning_rate_schedule(config: TrainConfig) -> Callable[[float], float]:
    """Share of the run done -> factor on the learning rate: a linear warm-up, then cosine, steps or nothing.

    With t the share of the run behind the warm-up, in [0, 1]: cosine is (1 + cos πt)/2; step multiplies by
    `decay` at each milestone passed.
    """

    def factor(done: float) -> float:
        if done < config.warmup_share:
            return (done + 1e-3) / (config.warmup_share + 1e-3)
        t = (done - config.warmup_share) / (1 - config.warmup_share)
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(t, 1.0)))
        if config.schedule == "step":
            return config.decay ** sum(done >= milestone for milestone in config.milestones)
        return 1.0

    return factor


def make_optimizer(learner: Learner, config: TrainConfig) -> torch.optim.Optimizer:
    """Weights; biases and norms, without decay; and the loss's own parameters, at their own rate."""
    own = list(learner.objective.loss_parameters())
    known = {id(p) for p in own}
    rest = [p for p in learner.parameters() if p.requires_grad and id(p) not in known]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"params": own, "weight_decay": 0.0, "lr": config.loss_learning_rate or config.learning_rate},
    ]
    groups = [{"lr": config.learning_rate, **group} for group in groups if group["params"]]
    for group in groups:
        group["initial_lr"] = group["lr"]
    match config.optimizer:
        case "adamw":
            return torch.optim.AdamW(groups)
        case "adam":
            return torch.optim.Adam(groups)
        case "sgd":
            return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
        case "rmsprop":
            return torch.optim.RMSprop(groups, momentum=config.momentum)
