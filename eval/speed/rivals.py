"""What ours is raced against: the losses written plainly for autograd, and as loops over anchors.

Both forms read like the formulas in `dml.losses` and share no code with it, so that they also check it. The
vectorised forms are what a competent reader of the papers would write; torch.compile gets the same. Labels
are class ids; a candidate with the anchor's id is never its pair.
"""

import torch
from torch import Tensor
from torch.nn import functional

INFINITY = float("inf")
DUPLICATE = 1e-5
"""CBML leaves out positives of at least 1 minus this."""


def compared(
    x: Tensor, labels: Tensor, ids: Tensor, y: Tensor, y_labels: Tensor, y_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N) cosines of anchors and candidates, who is positive, and who is negative."""
    s = functional.normalize(x) @ functional.normalize(y).T
    same, itself = labels[:, None] == y_labels[None, :], ids[:, None] == y_ids[None, :]
    return s, same & ~itself, ~same & ~itself


def mined(s: Tensor, positive: Tensor, negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """The pairs that are hard beside the anchor's hardest pair of the other kind."""
    s = s.detach()
    farthest = s.masked_fill(~positive, INFINITY).amin(dim=1, keepdim=True)
    nearest = s.masked_fill(~negative, -INFINITY).amax(dim=1, keepdim=True)
    return positive & (s - margin < nearest), negative & (s + margin > farthest)


def log_one_plus(logits: Tensor, keep: Tensor) -> Tensor:
    """(B,) log(1 + Σ exp(logits)) over the kept columns."""
    logits = logits.masked_fill(~keep, -INFINITY)
    return torch.cat([logits.new_zeros(len(logits), 1), logits], dim=1).logsumexp(dim=1)


def multi_similarity(
    *sides: Tensor, alpha: float = 2, beta: float = 50, base: float = 0.5, epsilon: float | None = 0.1
) -> Tensor:
    """Multi-Similarity with its mining (None: every pair)."""
    s, positive, negative = compared(*sides)
    if epsilon is not None:
        positive, negative = mined(s, positive, negative, epsilon)
    pull = log_one_plus(-alpha * (s - base), positive) / alpha
    push = log_one_plus(beta * (s - base), negative) / beta
    return (pull + push).mean()


def contrastive_bayesian(*sides: Tensor, weight: float = 1.0, average: bool = False) -> Tensor:
    """CBML with the released settings: logarithmic, adaptive negatives, variance as a sum."""
    s, every_positive, every_negative = compared(*sides)
    every_positive = every_positive & (s.detach() < 1 - DUPLICATE)
    positive, negative = mined(s, every_positive, every_negative, 0.1)
    pull = log_one_plus((0.5 - s) / 0.5, positive)
    push = log_one_plus((s - 1.0) / 0.01, negative)
    negatives = every_negative.sum(dim=1).clamp_min(1)
    center = 0.2 * (s * every_positive).sum(dim=1) / every_positive.sum(dim=1).clamp_min(1)
    center = center + 0.8 * (s * every_negative).sum(dim=1) / negatives
    spread = ((s - center[:, None]).square() * every_negative).sum(dim=1)
    each = pull + push + weight * (spread / negatives if average else spread)
    return torch.where(positive.any(dim=1) & negative.any(dim=1), each, 0).mean()


def contrastive(*sides: Tensor, measure: str) -> Tensor:
    """Means of the pulls and pushes above 0; margins (0, 1) of distances, or (0.8, 0.5) of cosines."""
    s, positive, negative = compared(*sides)
    if measure == "cosine":
        lacks, exceeds = 0.8 - s, s - 0.5
    else:
        d = apart(s)
        lacks, exceeds = d, 1 - d
    pull, push = lacks.relu() * positive, exceeds.relu() * negative
    return pull.sum() / (pull > 0).sum().clamp_min(1) + push.sum() / (push > 0).sum().clamp_min(1)


def triplet_hardest(*sides: Tensor, margin: float = 0.05) -> Tensor:
    """Every positive against the anchor's nearest negative; mean of the charges above 0."""
    s, positive, negative = compared(*sides)
    d = apart(s)
    nearest = d.masked_fill(~negative, INFINITY).amin(dim=1, keepdim=True)
    charge = (d - nearest + margin).relu() * positive
    return charge.sum() / (charge > 0).sum().clamp_min(1)


def apart(s: Tensor) -> Tensor:
    """Distance of unit vectors from their cosine; 0 without slope where rounding decides it."""
    squared = 2 - 2 * s
    usable = squared > 16 * torch.finfo(s.dtype).eps
    return torch.where(usable, torch.where(usable, squared, 1).sqrt(), 0)


def multi_similarity_loop(*sides: Tensor) -> Tensor:
    """One anchor after another, as the codes released with papers do it."""
    s, positive, negative = compared(*sides)
    total = s.new_zeros(())
    for row, near, far in zip(s, positive, negative, strict=True):
        near, far = row[near], row[far]
        hard_near = near[near - 0.1 < far.max()] if len(near) and len(far) else near[:0]
        hard_far = far[far + 0.1 > near.min()] if len(near) and len(far) else far[:0]
        total = total + torch.log1p(torch.exp(-2 * (hard_near - 0.5)).sum()) / 2
        total = total + torch.log1p(torch.exp(50 * (hard_far - 0.5)).sum()) / 50
    return total / len(s)


def contrastive_bayesian_loop(*sides: Tensor) -> Tensor:
    """One anchor after another, as the codes released with papers do it."""
    s, positive, negative = compared(*sides)
    total = s.new_zeros(())
    for row, near, far in zip(s, positive, negative, strict=True):
        near, far = row[near], row[far]
        near = near[near < 1 - DUPLICATE]
        if not len(near) or not len(far):
            continue
        hard_near, hard_far = near[near - 0.1 < far.max()], far[far + 0.1 > near.min()]
        if not len(hard_near) or not len(hard_far):
            continue
        center = 0.2 * near.mean() + 0.8 * far.mean()
        pull = torch.log1p(torch.exp((0.5 - hard_near) / 0.5).sum())
        push = torch.log1p(torch.exp((hard_far - 1.0) / 0.01).sum())
        total = total + pull + push + (far - center).square().sum()
    return total / len(s)
