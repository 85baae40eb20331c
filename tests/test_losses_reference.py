"""Our losses beside slow, obvious loops that read like the formulas: equal values and gradients.

The loops share nothing with the library: no masks, no kernel, one Python number at a time.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dml.losses import (
    ChannelCorrelation,
    ContrastiveBayesianLoss,
    ContrastiveLoss,
    MultiSimilarityLoss,
    TripletLoss,
)

ZERO = torch.zeros((), dtype=torch.float64)


@dataclass
class Example:
    """Anchors, labels, and optionally candidates with ids."""

    rows: Tensor
    labels: Tensor
    candidates: Tensor | None = None
    candidate_labels: Tensor | None = None
    ids: Tensor | None = None
    candidate_ids: Tensor | None = None

    def call(self, loss) -> Tensor:
        return loss(
            self.rows,
            self.labels,
            None,
            self.candidates,
            self.candidate_labels,
            ids=self.ids,
            ref_ids=self.candidate_ids,
        )


def pairs_of(example: Example, i: int) -> tuple[list[Tensor], list[Tensor]]:
    """The similarities of anchor i with its positives and with its negatives."""
    alone = example.candidates is None
    others = example.rows if alone else example.candidates
    other_labels = example.labels if alone else example.candidate_labels
    other_ids = example.ids if alone else example.candidate_ids
    anchor = example.rows[i] / example.rows[i].norm()
    positives, negatives = [], []
    for j in range(len(others)):
        if alone and i == j:
            continue
        if example.ids is not None and example.ids[i] == other_ids[j]:
            continue
        s = (anchor * (others[j] / others[j].norm())).sum()
        mine, theirs = example.labels[i], other_labels[j]
        alike = bool(mine == theirs) if mine.ndim == 0 else bool((mine * theirs).sum() > 0)
        (positives if alike else negatives).append(s)
    return positives, negatives


def total(terms: list[Tensor]) -> Tensor:
    return sum(terms, ZERO)


def multi_similarity(example: Example, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1) -> Tensor:
    loss = ZERO
    for i in range(len(example.rows)):
        positives, negatives = pairs_of(example, i)
        hard_positives = [p for p in positives if negatives and p - epsilon < max(negatives)]
        hard_negatives = [n for n in negatives if positives and n + epsilon > min(positives)]
        pull = total([torch.exp(-alpha * (p - base)) for p in hard_positives])
        push = total([torch.exp(beta * (n - base)) for n in hard_negatives])
        loss = loss + torch.log(1 + pull) / alpha + torch.log(1 + push) / beta
    return loss / len(example.rows)


def contrastive(example: Example, near=0.0, far=1.0, measure="euclidean", average="active") -> Tensor:
    pulls, pushes = [], []
    for i in range(len(example.rows)):
        positives, negatives = pairs_of(example, i)
        pulls += [near - s if measure == "cosine" else chord(s) - near for s in positives]
        pushes += [s - far if measure == "cosine" else far - chord(s) for s in negatives]
    pulls, pushes = [v for v in pulls if v > 0], [v for v in pushes if v > 0]
    if average == "anchors":
        return (total(pulls) + total(pushes)) / len(example.rows)
    return total(pulls) / max(len(pulls), 1) + total(pushes) / max(len(pushes), 1)


def chord(s: Tensor) -> Tensor:
    """Distance of two unit vectors; equal ones are at 0, where the root has no slope."""
    return torch.sqrt(2 - 2 * s) if s < 1 - 1e-14 else ZERO


def triplet(example: Example, margin=0.05, mining="semihard", window=0.2, average="active") -> Tensor:
    charges = []
    for i in range(len(example.rows)):
        positives, negatives = pairs_of(example, i)
        near, far = [chord(s) for s in positives], [chord(s) for s in negatives]
        for p in near:
            for n in [min(far)] if mining == "hardest" and far else far:
                gap = n - p
                if mining == "semihard" and not 0 < gap <= window:
                    continue
                if mining == "hard" and gap > 0:
                    continue
                charges.append(p - n + margin)
    charges = [c for c in charges if c > 0]
    return total(charges) / (len(example.rows) if average == "anchors" else max(len(charges), 1))


def bayesian(
    example: Example,
    form="log",
    adaptive=True,
    h=0.2,
    weight=1.0,
    reduction="sum",
    margin=0.1,
    negative_scale=0.01,
) -> Tensor:
    loss = ZERO
    for i in range(len(example.rows)):
        positives, negatives = pairs_of(example, i)
        positives = [p for p in positives if p < 1 - 1e-5]
        if not positives or not negatives:
            continue
        hard_positives = [p for p in positives if p - margin < max(negatives)]
        hard_negatives = [n for n in negatives if n + margin > min(positives)]
        if not adaptive:
            hard_negatives = sorted(negatives, key=lambda s: s.item(), reverse=True)[:100]
        if not hard_positives or not hard_negatives:
            continue
        odds_positive = total([torch.exp(-(p - 0.5) / 0.5) for p in hard_positives])
        odds_negative = total([torch.exp((n - 1.0) / negative_scale) for n in hard_negatives])
        center = h * total(positives) / len(positives) + (1 - h) * total(negatives) / len(negatives)
        spread = total([(n - center) ** 2 for n in negatives])
        if reduction == "mean":
            spread = spread / len(negatives)
        outer = {
            "log": lambda odds: torch.log(1 + odds),
            "sqrt": lambda odds: torch.sqrt(1 + odds),
            "constant": lambda odds: 1 + 0.25 * odds,
        }[form]
        loss = loss + outer(odds_positive) + outer(odds_negative) + weight * spread
    return loss / len(example.rows)


LOSSES = {
    "multi-similarity": (MultiSimilarityLoss(), multi_similarity),
    "contrastive": (ContrastiveLoss(), contrastive),
    "contrastive tuned": (
        ContrastiveLoss(0.2, 0.7, average="anchors"),
        lambda e: contrastive(e, 0.2, 0.7, average="anchors"),
    ),
    "contrastive cosine": (
        ContrastiveLoss(0.8, 0.5, measure="cosine"),
        lambda e: contrastive(e, 0.8, 0.5, "cosine"),
    ),
    "triplet semihard": (TripletLoss(0.3, window=0.5), lambda e: triplet(e, 0.3, window=0.5)),
    "triplet hard": (TripletLoss(0.1, "hard"), lambda e: triplet(e, 0.1, "hard")),
    "triplet all": (TripletLoss(0.3, "all"), lambda e: triplet(e, 0.3, "all")),
    "triplet hardest": (
        TripletLoss(0.3, "hardest", average="anchors"),
        lambda e: triplet(e, 0.3, "hardest", average="anchors"),
    ),
    "cbml log": (ContrastiveBayesianLoss(), bayesian),
    "cbml wide negatives": (
        ContrastiveBayesianLoss(negative_scale=0.3, positive_share=0.7),
        lambda e: bayesian(e, negative_scale=0.3, h=0.7),
    ),
    "cbml sqrt, mean": (
        ContrastiveBayesianLoss(form="sqrt", variance_reduction="mean", variance_weight=0.3),
        lambda e: bayesian(e, "sqrt", reduction="mean", weight=0.3),
    ),
    "cbml constant, top": (
        ContrastiveBayesianLoss(form="constant", adaptive_negatives=False, margin=0.4),
        lambda e: bayesian(e, "constant", adaptive=False, margin=0.4),
    ),
}


def rows(count: int, seed: int, dim: int = 6) -> Tensor:
    """Rows of any length around a common direction, so that similarities spread over most of [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    values[:, 0] += 1
    return values * (0.2 + 3 * torch.rand(count, 1, generator=generator, dtype=torch.float64))


def uneven(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])
    return Example(rows(14, seed), torch.multinomial(weights, 14, replacement=True, generator=generator))


def singletons(seed: int) -> Example:
    return Example(rows(9, seed), torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 5]))


def duplicates(seed: int) -> Example:
    values = rows(10, seed)
    values[3], values[7], values[9] = values[2] * 2, values[0], values[1]
    return Example(values, torch.tensor([0, 0, 1, 1, 2, 2, 2, 0, 1, 2]))


def duplicates_apart(seed: int) -> Example:
    """The same, with the pair of two labels a hair apart: where d_ap = d_an exactly, rounding decides."""
    example = duplicates(seed)
    example.rows[9] += 1e-2 * rows(1, seed + 1)[0]
    return example


AT_ZERO = {"triplet semihard", "triplet hard"}
"""Losses that choose triplets by the sign of d_ap - d_an."""


def one_class(seed: int) -> Example:
    return Example(rows(5, seed), torch.zeros(5, dtype=torch.int64))


def all_apart(seed: int) -> Example:
    values = torch.eye(6, dtype=torch.float64)[[0, 0, 1, 1]] + 0.01 * rows(4, seed)
    return Example(values, torch.tensor([0, 0, 1, 1]))


def alone(seed: int) -> Example:
    return Example(rows(1, seed), torch.tensor([3]))


def several_labels(seed: int) -> Example:
    generator = torch.Generator().manual_seed(seed)
    return Example(rows(12, seed), (torch.rand(12, 6, generator=generator) < 0.25).long())


def with_candidates(seed: int) -> Example:
    """Repeated images in the batch, and candidates that repeat them, some under another label."""
    generator = torch.Generator().manual_seed(seed)
    batch, candidates = rows(8, seed), rows(20, seed + 1000)
    candidates[:4] = batch[:4] * 1.5
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 6])
    candidate_ids = torch.cat([ids[:7], torch.randint(0, 30, (13,), generator=generator)])
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0, 0])
    candidate_labels = torch.cat([labels[:7], torch.randint(0, 4, (13,), generator=generator)])
    return Example(batch, labels, candidates, candidate_labels, ids, candidate_ids)


def candidates_without_ids(seed: int) -> Example:
    return Example(rows(6, seed), torch.arange(6) % 3, rows(11, seed + 1), torch.arange(11) % 4)


def more_than_a_hundred(seed: int) -> Example:
    return Example(rows(3, seed), torch.tensor([0, 1, 0]), rows(150, seed + 1), torch.arange(150) % 3)


EXAMPLES = (
    uneven,
    singletons,
    duplicates,
    one_class,
    all_apart,
    alone,
    several_labels,
    with_candidates,
    candidates_without_ids,
)
CASES = [(name, make) for name in LOSSES for make in EXAMPLES] + [("cbml constant, top", more_than_a_hundred)]


@pytest.mark.parametrize(("name", "make_example"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_a_loss_equals_its_loop_in_value_and_gradient(name, make_example, scale):
    loss, loop = LOSSES[name]
    if name in AT_ZERO and make_example is duplicates:
        make_example = duplicates_apart
    for seed in range(3 * scale):
        mine, theirs = make_example(seed), make_example(seed)
        leaves = [
            [t.requires_grad_() for t in (e.rows, e.candidates) if t is not None] for e in (mine, theirs)
        ]
        value, expected = mine.call(loss), loop(theirs)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        if name == "triplet hardest" and make_example is duplicates:
            continue  # several nearest negatives: which of them gets the gradient is a matter of rounding
        grads = torch.autograd.grad(value, leaves[0])
        if not expected.requires_grad:  # the loop found no pair at all
            assert not any(grad.any() for grad in grads)
            continue
        references = torch.autograd.grad(expected, leaves[1], allow_unused=True)
        for grad, reference, leaf in zip(grads, references, leaves[1], strict=True):
            reference = torch.zeros_like(leaf) if reference is None else reference
            torch.testing.assert_close(grad, reference, rtol=1e-9, atol=1e-11)


def correlation(
    attention: Tensor, labels: Tensor, form: str, pair: str, margin=0.3, normalize=True
) -> Tensor:
    n, channels = attention.shape
    unit = math.sqrt(channels) if normalize else 1.0

    def length(difference: Tensor) -> Tensor:
        squared = (difference**2).sum()
        return squared / unit**2 if pair == "squared" else torch.sqrt(squared + 1e-12) / unit

    within, between = [], []
    if pair == "center":
        classes = sorted(set(labels.tolist()))
        members = {k: [attention[i] for i in range(n) if labels[i] == k] for k in classes}
        centers = {k: total(members[k]) / len(members[k]) for k in classes}
        for k in classes:
            alone = len(members[k]) == 1
            within += [ZERO if alone else length(row - centers[k]) for row in members[k]]
        between = [length(centers[k] - centers[m]) for k in classes for m in classes if k < m]
    else:
        for i in range(n):
            for j in range(n):
                if i == j:
                    continue
                alike = labels[i] == labels[j] if labels.ndim == 1 else (labels[i] * labels[j]).sum() > 0
                (within if alike else between).append(length(attention[i] - attention[j]))
    intra, inter = total(within) / max(len(within), 1), total(between) / max(len(between), 1)
    if form == "ratio":
        return intra / (inter + 1e-6)
    return torch.relu(margin + intra - inter) if form == "hinge" else intra - inter


KINDS = ("uneven", "singletons", "one class", "all different", "several labels")
READINGS = [
    (pair, kind)
    for pair in ("plain", "squared", "center")
    for kind in KINDS
    if (pair, kind) != ("center", "several labels")  # class means need one class per image
]


@pytest.mark.parametrize("form", ["difference", "ratio", "hinge"])
@pytest.mark.parametrize(("pair", "kind"), READINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_channel_correlation_equals_its_loop_in_value_and_gradient(form, pair, kind, normalize, scale):
    labels = {
        "uneven": torch.tensor([0, 0, 0, 0, 1, 1, 2]),
        "singletons": torch.tensor([0, 0, 1, 2, 3, 4, 5]),
        "one class": torch.zeros(7, dtype=torch.int64),
        "all different": torch.arange(7),
        "several labels": torch.tensor([[1, 0, 0]] * 2 + [[1, 1, 0]] + [[0, 0, 1]] * 3 + [[0, 1, 0]]),
    }[kind]
    loss = ChannelCorrelation(form, pair, normalize=normalize)
    for seed in range(2 * scale):
        generator = torch.Generator().manual_seed(seed)
        attention = torch.rand(7, 5, generator=generator, dtype=torch.float64).requires_grad_()
        value, expected = (
            loss(attention, labels),
            correlation(attention, labels, form, pair, normalize=normalize),
        )
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
        (grad,) = torch.autograd.grad(value, attention)
        (reference,) = torch.autograd.grad(expected, attention)
        torch.testing.assert_close(grad, reference, rtol=1e-9, atol=1e-9)
