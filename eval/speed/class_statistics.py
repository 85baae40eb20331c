"""What intra-class augmentation costs: its class statistics, and its part of a training step.

The statistics of N rows of C classes are raced against the one-hot form of released code (an N × C × D
tensor) and a loop over classes. The step is that of a ResNet-50 on random pictures, measured in the same run;
the synthesis and the larger loss are measured on the same batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dml import losses
from dml.training.intra_class import IntraClassAugmentation
from eval.speed.peak import extra_memory
from eval.speed.race import Disagreement, machine, race

TOLERANCE = 1e-4
"""Largest difference of a mean or variance, relative to the largest."""
NAMES = ("dml", "one-hot, N × C × D", "loop over classes")


def rows_of_classes(rows: int, classes: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator)
    return torch.randn(rows, dim, generator=generator) + labels[:, None] / classes, labels


def one_hot(embeddings: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each class, every row beside every class."""
    member = torch.nn.functional.one_hot(labels, classes).to(embeddings.dtype)[:, :, None]
    spread = embeddings[:, None, :] * member
    amount = member.sum(dim=0).clamp_min(1)
    mean = spread.sum(dim=0) / amount
    variance = (spread - mean[None] * member).square().sum(dim=0) / amount
    return mean, variance


def by_class(embeddings: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each class, one after another."""
    mean = embeddings.new_zeros(classes, embeddings.shape[1])
    variance = torch.zeros_like(mean)
    for number in range(classes):
        members = embeddings[labels == number]
        if len(members):
            mean[number] = members.mean(dim=0)
            variance[number] = (members - mean[number]).square().mean(dim=0)
    return mean, variance


def call_of(name: str, rows: int, classes: int, dim: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """A contender's call on its inputs, by its name in the table."""
    embeddings, labels = rows_of_classes(rows, classes, dim)
    if name != "dml":
        form = one_hot if name.startswith("one-hot") else by_class
        return lambda: form(embeddings, labels, classes)

    def ours() -> tuple[Tensor, Tensor]:
        statistics = IntraClassAugmentation(classes, dim)
        statistics.update(embeddings, labels)
        return statistics.mean, statistics.variance

    return ours


def speed_of_statistics(
    *,
    rows: int,
    classes: int,
    dim: int,
    repeats: int,
    trunk: str,
    pictures: int,
    size: int,
    patience: float = 60,
    memory_limit: float = 8,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The table of class statistics, and the share of a training step.

    Raises:
        Disagreement: a contender finds other means or variances.
    """
    here = machine()
    say(f"statistics of {rows:,} rows, {classes:,} classes")
    table = {}
    for name in NAMES:
        peak = extra_memory(
            call_of,
            *(name, rows, classes, dim),
            small=(name, 64, 4, 8),
            patience=patience,
            limit=memory_limit,
        )
        table[name] = {"name": name, "extra bytes": peak.extra, "problem": peak.problem}
    calls = {name: call_of(name, rows, classes, dim) for name in NAMES if not table[name]["problem"]}
    expected = calls["dml"]()
    for name, call in calls.items():
        table[name]["differs"] = agree(name, call(), expected)
    timings = race(calls, repeats=repeats)
    for name, timing in timings.items():
        ratio = timing.seconds / timings["dml"].seconds
        table[name] |= {"seconds": timing.seconds, "spread": timing.spread, "x dml": ratio}
    say(f"a step of {trunk} on {pictures} pictures of {size} px")
    return {
        "what": "statistics",
        "machine": here,
        "repeats": repeats,
        "rows": rows,
        "classes": classes,
        "dim": dim,
        "table": list(table.values()),
        "step": share_of_step(trunk, pictures=pictures, size=size, dim=dim, classes=classes, repeats=repeats),
    }


def agree(name: str, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The largest relative difference of a mean or a variance.

    Raises:
        Disagreement: above `TOLERANCE`.
    """
    worst = max(
        float((mine - theirs).abs().max() / theirs.abs().max())
        for mine, theirs in zip(found, expected, strict=True)
    )
    if not worst <= TOLERANCE:
        raise Disagreement(
            f'"{name}" finds other class statistics than dml: they differ by {worst:.1e} of the largest'
        )
    return worst


def share_of_step(
    trunk: str, *, pictures: int, size: int, dim: int, classes: int, repeats: int
) -> dict[str, Any]:
    """Times of a training step without augmentation and of what augmentation adds to it.

    `pass` is the forward pass over one batch that renews the statistics; it is made for every batch of the
    training set, every `refresh_every` epochs, and counted apart.
    """
    from dml.config import ModelConfig
    from dml.models import build_model

    torch.manual_seed(0)
    model = build_model(ModelConfig(trunk=trunk, dim=dim), image_size=size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    shown = torch.randn(pictures, 3, size, size)
    labels, ids = torch.arange(pictures) // 4 % classes, torch.arange(pictures)
    loss = losses.MultiSimilarityLoss()
    augment = IntraClassAugmentation(classes, dim)
    fixed = model(shown).raw.detach()
    augment.update(fixed, labels)

    def step() -> None:
        value = loss(model(shown).raw, labels, ids=ids)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    def alone() -> None:
        loss(fixed.clone().requires_grad_(), labels, ids=ids).backward()

    def enlarged() -> None:
        raw = fixed.clone().requires_grad_()
        more = augment.synthesize(raw, labels, ids)
        rows = torch.cat([raw, more.embeddings])
        both, all_ids = torch.cat([labels, more.labels]), torch.cat([ids, more.ids])
        loss(raw, labels, None, rows, both, ids=ids, ref_ids=all_ids).backward()

    @torch.no_grad()
    def renewal() -> None:
        augment.update(model(shown).raw, labels)

    calls = {"step": step, "loss": alone, "loss with IAA": enlarged, "pass": renewal}
    for call in calls.values():
        call()
    seconds = {name: timing.seconds for name, timing in race(calls, repeats=repeats).items()}
    return {
        "trunk": trunk,
        "pictures": pictures,
        "size": size,
        "seconds": seconds,
        "share": (seconds["loss with IAA"] - seconds["loss"]) / seconds["step"],
        "pass share": seconds["pass"] / seconds["step"] / augment.refresh_every,
        "refresh_every": augment.refresh_every,
    }
