"""What tests/test_distributed.py trains in one process and in several. Run by torchrun, it plays every case
and writes down what each process saw: `torchrun --nproc-per-node 2 tests/distributed_cases.py FOLDER`."""

import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml.config import ModelConfig, Part, Recipe, Term, TrainConfig
from dml.data.batch import Batch
from dml.errors import ConfigError, DataError
from dml.losses import LOSSES, MultiSimilarityLoss
from dml.models import build_model
from dml.models.output import Output
from dml.training import processes
from dml.training.loop import Learner, steps
from dml.training.supervised import Supervised, build_objective

CLASSES, DIM, CHANNELS, ROWS, STEPS = 6, 8, 5, 48, 4
DTYPES = {"float64": torch.float64, "float32": torch.float32}
IAA = Part("intra_class", {"start": 0.0, "copies": 2, "refresh_every": 1})
MEMORY = Part("cross_batch", {"start": 0.0, "size": 40})
STAGES = {
    "none": {},
    "IAA": {"augment": IAA},
    "memory": {"memory": MEMORY},
    "both": {"augment": IAA, "memory": MEMORY},
}


class Net(nn.Module):
    """A trunk without batch statistics, a head and a channel attention."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(10, 12), nn.Linear(12, DIM)
        self.attention = nn.Linear(12, CHANNELS)

    def forward(self, inputs: Tensor) -> Output:
        maps = torch.tanh(self.trunk(inputs))
        raw = self.head(maps)
        return Output(raw, F.normalize(raw), attention=torch.sigmoid(self.attention(maps)))


class Sliced:
    """Three batches of 4 classes x 4 images; a process gets its slice of each."""

    def __init__(self, dtype: torch.dtype, *, multi_hot: bool, part: int, parts: int) -> None:
        generator = torch.Generator().manual_seed(0)
        centers = torch.randn(CLASSES, 10, generator=generator)
        labels = torch.arange(ROWS) // 4 % CLASSES
        inputs = centers[labels] + 0.7 * torch.randn(ROWS, 10, generator=generator)
        if multi_hot:
            labels = F.one_hot(labels, CLASSES) | F.one_hot((labels * labels) % CLASSES, CLASSES)
        self.rows = Batch(torch.arange(ROWS), inputs.to(dtype), labels)
        self.part, self.parts = part, parts

    def take(self, rows: Tensor) -> Batch:
        assert self.rows.labels is not None
        return Batch(self.rows.ids[rows], self.rows.inputs[rows], self.rows.labels[rows])

    def __len__(self) -> int:
        return 3

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        for rows in torch.arange(ROWS).split(16)[start:]:
            yield self.take(rows.chunk(self.parts)[self.part])

    def sweep(self, number: int) -> Iterator[Batch]:
        for rows in torch.arange(ROWS).split(16)[self.part :: self.parts]:
            yield self.take(rows)


class WithoutLastRows(nn.Module):
    """A cleaner that trusts nothing in the last quarter of a batch: rows of the last process only."""

    def forward(self, unit: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        return ids % 16 < 12


class Uneven(nn.Module):
    """A cleaner that looks at the whole batch: what is nearest to the batch's mean goes."""

    def forward(self, unit: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        near = unit @ unit.mean(dim=0)
        return near < near.sort().values[-5]


class Nothing(nn.Module):
    """A cleaner that trusts nobody in the first batch."""

    def forward(self, unit: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        return ids >= 16


class Mortal(MultiSimilarityLoss):
    """Multi-similarity; in the second process it may end everything at one of its calls."""

    calls = 0

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
    ) -> Tensor:
        self.calls += 1
        if os.environ.get("RANK") == "1":
            if os.environ.get("DML_TEST_KILL_AT") == str(self.calls):
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ.get("DML_TEST_FAIL_AT") == str(self.calls):
                raise DataError("the second process cannot read its pictures")
        return super().forward(
            embeddings, labels, indices_tuple, ref_emb, ref_labels, ids=ids, ref_ids=ref_ids
        )


@dataclass(frozen=True)
class Case:
    recipe: Recipe
    multi_hot: bool = False


def with_correlation(**args: Any) -> dict[str, Any]:
    terms = {"channel_correlation": Term(1.0, args)}
    return {"model": ModelConfig(attention="branch"), "regularizers": terms}


def beside_memory(name: str) -> Part:
    """A loss as it goes with a memory."""
    return Part(name, {"variance_reduction": "mean"} if name == "contrastive_bayesian" else {})


def all_cases() -> dict[str, Case]:
    """Every loss with every combination of stages that is not refused, and what is special."""
    cases = {}
    for name in LOSSES:
        for stages, parts in STAGES.items():
            recipe = Recipe(loss=beside_memory(name) if "memory" in parts else Part(name), **parts)
            try:
                objective_of(recipe)
            except ConfigError:  # the refusals themselves are tested in test_supervised.py
                continue
            cases[f"{name}, {stages}"] = Case(recipe)
    for form in ("difference", "ratio", "hinge"):
        for pair in ("plain", "squared", "center"):
            terms = with_correlation(form=form, pair=pair)
            cases[f"CC-Loss {form} {pair}"] = Case(Recipe(loss=Part("cross_entropy"), **terms))
    corrected = Part("intra_class", {**IAA.args, "neighbor_correction": True})
    cases["everything"] = Case(
        Recipe(
            loss=beside_memory("contrastive_bayesian"),
            augment=corrected,
            memory=MEMORY,
            **with_correlation(),
        )
    )
    of_batches = Part("intra_class", {**IAA.args, "statistics": "batches"})
    cases["multi_similarity, IAA of batches"] = Case(Recipe(augment=of_batches))
    held = Part("cross_batch", {**MEMORY.args, "classes": CLASSES})
    for name in ("multi_similarity", "contrastive_bayesian", "contrastive", "triplet"):
        cases[f"{name}, several labels"] = Case(Recipe(loss=beside_memory(name), memory=held), multi_hot=True)
    for cleaner in (WithoutLastRows, Uneven, Nothing):
        clean = Part(f"distributed_cases:{cleaner.__name__}")
        for name in ("multi_similarity", "proxy_anchor", "cross_entropy"):
            cases[f"{name}, {cleaner.__name__}"] = Case(Recipe(loss=Part(name), clean=clean, augment=IAA))
    return cases


def objective_of(recipe: Recipe) -> Supervised:
    objective = build_objective(recipe, num_classes=CLASSES, dim=DIM, channels=CHANNELS)
    assert isinstance(objective, Supervised)
    return objective


def play(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Train for an epoch of three steps and one more: every step's gradients, and what is left at the end.

    In float32 weights hardly move: the gradients of every step are then those at the same weights, while
    statistics and memory fill.
    """
    torch.manual_seed(0)
    model, objective = Net().to(dtype), objective_of(case.recipe).to(dtype)
    unused = processes.unreached(model, torch.zeros(2, 10, dtype=dtype), objective.reads())
    fabric = processes.make_fabric(TrainConfig(accelerator="cpu"), search_unused=bool(unused))
    rate = 0.05 if dtype == torch.float64 else 1e-6
    learner = Learner(model, objective)
    optimizer = torch.optim.SGD(learner.parameters(), lr=rate, momentum=0.9)
    optimizer.param_groups[0]["initial_lr"] = rate
    learner, optimizer = fabric.setup(learner, optimizer)
    batches = Sliced(
        dtype, multi_hot=case.multi_hot, part=processes.process_rank(), parts=processes.process_count()
    )
    gradients, terms = [], []
    for step in steps(fabric, learner, batches, optimizer, lambda share: 1.0, total=STEPS):
        gradients.append(
            {n: p.grad.clone() for n, p in learner.module.named_parameters() if p.grad is not None}
        )
        terms.append({name: term.item() for name, term in step.terms.items()})
    return {"gradients": gradients, "terms": terms, "state": dict(learner.state_dict())}


def main() -> None:
    """Play every case and save what this process saw."""
    played = {}
    with processes.joined(TrainConfig(accelerator="cpu")):
        for name, case in all_cases().items():
            for kind, dtype in DTYPES.items():
                played[f"{name}, {kind}"] = play(case, dtype)
    torch.save(played, Path(sys.argv[1]) / f"{processes.process_rank()}.pt")


def synchronized_gradients(batch: Batch, *, parts: int) -> dict[str, Tensor]:
    """Gradients of one step of the small trunk with BatchNorm on a GPU."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(dim=DIM), image_size=32)
    objective = objective_of(Recipe(loss=Part("proxy_anchor")))
    learner: nn.Module = Learner(model, objective).cuda()
    if parts > 1:
        model.synchronize_batch_norm()
        learner = nn.parallel.DistributedDataParallel(learner, broadcast_buffers=False)
    learner(vars(batch.to("cuda")))["loss"].backward()
    return {
        name.removeprefix("module."): p.grad.cpu()
        for name, p in learner.named_parameters()
        if p.grad is not None
    }


def compare_batch_norm() -> None:
    """Save the gradients of one process, then those of two that share its GPU and its batch."""
    labels = torch.arange(16) // 4
    inputs = (
        torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + labels[:, None, None, None]
    )
    batch, rank, out = Batch(torch.arange(16), inputs, labels), processes.process_rank(), Path(sys.argv[1])
    torch.backends.cudnn.allow_tf32 = False
    if rank == 0:
        torch.save(synchronized_gradients(batch, parts=1), out / "alone.pt")
    torch.distributed.init_process_group("gloo")
    own = {name: part.chunk(2)[rank] for name, part in vars(batch).items() if part is not None}
    torch.save(synchronized_gradients(Batch(**own), parts=2), out / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.modules["distributed_cases"] = sys.modules[
        "__main__"
    ]  # recipes name classes of this file by import path
    compare_batch_norm() if "batch-norm" in sys.argv else main()
