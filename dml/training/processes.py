"""Several processes that train one model, started by torchrun.

Every process embeds its slice of the batch; then the embeddings of the whole batch are gathered, and every
process computes the same objective on all of them. Nothing else in the project has to know: a loss, a memory
or a regulariser sees the batch that one process would have seen.

With W processes, own rows r of rank p, the objective L and the trunk's parameters θ::

    gradient on rank p           W · ∂L/∂r_p · ∂r_p/∂θ      (other ranks' rows are constants there)
    mean over the ranks, by DDP  Σ_p ∂L/∂r_p · ∂r_p/∂θ  =  ∂L/∂θ

which is the gradient of one process on the whole batch, for any L. Parameters of the loss itself have that
gradient on every rank already, and the mean leaves it as it is. The price is that every process computes the
loss of the whole batch, which is little beside the trunk.

Without torchrun nothing here does anything.
"""

import atexit
import inspect
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from dml.config import TrainConfig
from dml.errors import ConfigError

T = TypeVar("T")


def process_count() -> int:
    """Processes that torchrun has started for this run, on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def process_rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if process_count() > 1 else 0


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return process_rank() == 0


def connected() -> bool:
    """Whether there are other processes to exchange something with."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@contextmanager
def joined(config: TrainConfig) -> Iterator[None]:
    """Connect with the other processes for the length of the block; nothing where there are none.

    Raises:
        ConfigError: more processes on this machine than GPUs, or machines with different numbers of them.
    """
    if process_count() == 1 or distributed.is_initialized():
        yield
        return
    check_accelerator(config)
    make_fabric(config)
    yield
    distributed.destroy_process_group()  # not behind an error: that could wait for one who is gone


def check_accelerator(config: TrainConfig) -> None:
    """Raises ConfigError: a GPU that is not there, or not enough of them for the processes here."""
    if config.accelerator == "cuda" and not torch.cuda.is_available():
        raise ConfigError('train.accelerator is "cuda", and torch finds no GPU here. Use "auto" or "cpu".')
    if process_count() == 1:
        return
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), process_count()
    if everywhere % here:
        raise ConfigError(
            f"torchrun started {here} processes on this machine and {everywhere} in all: every machine must "
            f"run the same number. Give all of them the same --nproc-per-node."
        )
    gpus = torch.cuda.device_count()
    if config.accelerator != "cpu" and 0 < gpus < here:
        raise ConfigError(
            f"torchrun started {here} processes on this machine, which has {gpus} "
            f"GPU{'s' if gpus > 1 else ''}. "
            f"Use --nproc-per-node {gpus}, or train on the CPU: --set train.accelerator=cpu."
        )


def make_fabric(config: TrainConfig, *, search_unused: bool = False) -> Fabric:
    """What puts model and batches on a device, sets the precision, and averages gradients over processes.

    Args:
        search_unused: look for parameters without a gradient in every step; needed only where there may be
            some.
    """
    precision = "bf16-mixed" if config.precision == "bfloat16" else "32-true"
    if process_count() == 1:
        return Fabric(accelerator=config.accelerator, devices=1, precision=precision)
    # A hint on speed about 1 x 1 convolutions, which nobody here can act on.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    # Buffers (a memory of a million rows) are equal everywhere or local on purpose; they never travel.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"find_unused_parameters": search_unused, sync: False}
    # An hour: the first one writes the encoder while the others wait.
    strategy = DDPStrategy(timeout=timedelta(minutes=60), **options)
    fabric = Fabric(
        accelerator=config.accelerator,
        devices=here,
        num_nodes=process_count() // here,
        strategy=strategy,
        precision=precision,
        plugins=[TorchElasticEnvironment()],
    )
    with quiet("lightning_fabric"):
        fabric.launch()
    return fabric


@contextmanager
def quiet(logger: str) -> Iterator[None]:
    """Only warnings of a library for the length of the block."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


class Amplified(torch.autograd.Function):
    """The rows themselves; their gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


def everyones(rows: Tensor) -> Tensor:
    """(W·B, …) the rows of all processes in the order of their ranks, as constants.

    Every process must call this, with tensors of one shape and type.
    """
    own = rows.detach().contiguous()
    # As bytes: not every backend knows every type of number.
    flat = own.reshape(-1).view(torch.uint8)
    parts = [torch.empty_like(flat) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, flat)
    return torch.cat([part.view(own.dtype).reshape(own.shape) for part in parts])


def everyones_with_gradient(rows: Tensor) -> Tensor:
    """The same, where own rows stay attached to the graph, with W times their gradient: see above."""
    world, rank = distributed.get_world_size(), distributed.get_rank()
    parts = list(everyones(rows).split(len(rows))) if len(rows) else [rows] * world
    parts[rank] = Amplified.apply(rows, world)  # type: ignore[assignment]
    return torch.cat(parts)


def added_up(numbers: Tensor) -> Tensor:
    """The sum over all processes, the same bits on each."""
    total = numbers.clone()
    distributed.all_reduce(total)
    return total


def from_first(value: T) -> T:
    """What the first process has, for everyone. Only its own `value` counts."""
    if not connected():
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def from_everyone(value: T) -> list[T]:
    """What each process has, by rank, for everyone."""
    if not connected():
        return [value]
    held: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(held, value)
    return held


def to_first(value: T) -> list[T]:
    """What each process has, by rank, for the first one; the others get an empty list."""
    if not connected():
        return [value]
    held: list[Any] | None = [None] * distributed.get_world_size() if is_first() else None
    distributed.gather_object(value, held)
    return held or []


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Give every process the mean of the running statistics that normalisation layers keep.

    Each process has measured its own slices. Layers that are frozen are equal and stay as they are.
    """
    if not connected():
        return
    layers = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats and m.training]
    buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
    if not buffers:
        return
    means = added_up(torch.cat([b.reshape(-1) for b in buffers])) / distributed.get_world_size()
    for buffer, mean in zip(buffers, means.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(mean.reshape(buffer.shape))


def unreached(model: nn.Module, example: Tensor, fields: Iterable[str]) -> list[str]:
    """Names of trainable parameters that no field of the model's output depends on, of those that are read.

    The model runs once, as in evaluation, on the example.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.enable_grad():
        output = model(example)
    for module, mode in modes:
        module.training = mode
    waiting: list[Any] = [getattr(output, field) for field in fields]
    waiting = [value.grad_fn for value in waiting if value is not None]
    seen, reached = set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            reached.add(id(node.variable))
        waiting += [before for before, _ in node.next_functions]
    return [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in reached]


def check_batch(classes: int, images: int, *, available: int) -> None:
    """Raise ConfigError for a batch that the processes cannot share equally, with the numbers that would fit.

    Args:
        classes, images: classes in a batch, and images of each.
        available: classes of the training set.
    """
    world = process_count()
    if classes * images % world == 0:
        return
    fitting = [(classes, n) for n in nearest(images, lambda n: n >= 2 and classes * n % world == 0)]
    fitting += [
        (n, images) for n in nearest(classes, lambda n: 2 <= n <= available and n * images % world == 0)
    ]
    told = "; or ".join(f"train.classes_per_batch={p} and train.images_per_class={k}" for p, k in fitting)
    raise ConfigError(
        f"A batch of {classes} classes x {images} images = {classes * images} cannot be divided equally "
        f"among {world} processes. These would fit: {told}."
    )


def nearest(number: int, fits: Callable[[int], bool]) -> list[int]:
    """The nearest fitting numbers below and above, where there are some in reach."""
    reach = 2 * process_count()
    below = next((n for n in range(number - 1, number - reach, -1) if fits(n)), None)
    above = next((n for n in range(number + 1, number + reach) if fits(n)), None)
    return [n for n in (below, above) if n is not None]


def check_same(identities: Sequence[dict[str, str]]) -> None:
    """Raise ConfigError where processes are about to train on different things."""
    for rank, identity in enumerate(identities):
        differs = [name for name, value in identity.items() if identities[0].get(name) != value]
        if differs:
            raise ConfigError(
                f"Process {rank} of {len(identities)} differs from process 0 in {' and '.join(differs)}. "
                f"Every machine needs the same command and the same data at the same place."
            )


# -------- ends


LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|socket|process group", re.IGNORECASE
)
"""Texts of the errors that a process meets when another one is gone."""


def lost_another(error: Exception) -> bool:
    """Whether an error only says that another process has ended."""
    if isinstance(error, (distributed.DistBackendError, distributed.DistNetworkError)):
        return True
    return isinstance(error, RuntimeError) and bool(LOST.search(str(error)))


def told_by_another(code: int) -> int | None:
    """The exit code of the process that has already met an error, once it has told; None: this one is to.

    They agree through torchrun's own store, which lives as long as torchrun. Where it cannot be reached, the
    first process of each machine reports.

    Args:
        code: what this process is going to exit with.
    """
    mine = f"{process_rank()}:{code}"
    try:
        store = agents_store()
        # returns what is there now: ours only if nobody came before
        there = store.compare_set(store_key("failed"), "", mine).decode()
    except (RuntimeError, OSError):
        return None if os.environ["LOCAL_RANK"] == "0" else code
    if there == mine:
        return None
    with suppress(RuntimeError):  # torchrun ends all as soon as one has ended: not before it was told
        store.wait([store_key("told")], timedelta(seconds=10))
    return int(there.partition(":")[2])


def end_at_once(code: int) -> None:
    """Let the interpreter end without taking leave of the other processes, who may be gone or waiting."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(RuntimeError, OSError):
            agents_store().set(store_key("told"), "")
        os._exit(code)

    atexit.register(leave)  # the last one registered runs first


def agents_store() -> "distributed.TCPStore":  # pyright: ignore[reportPrivateImportUsage]
    """A connection to the store of torchrun."""
    return distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=5),
    )


def store_key(what: str) -> str:
    """A name in the store for this attempt: torchrun may start all processes again."""
    return f"dml/{what}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
