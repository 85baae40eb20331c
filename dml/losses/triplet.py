"""Triplet loss: each positive nearer than each negative, by a margin."""

from typing import Literal

import torch
from torch import Tensor

from dml.losses.kernel import Block, Blocks, Charge, PairLoss, distance, distance_slope
from dml.losses.pairs import within


class TripletLoss(PairLoss):
    """Charge triplets whose positive is not nearer to the anchor than the negative by a margin.

    With Euclidean distances d of unit vectors, for anchor a, positive p and negative n::

        L_apn = max(0, d_ap - d_an + m)

    over the triplets that `mining` leaves::

        "all"        every one
        "semihard"   0 < d_an - d_ap <= w      the negative is farther than the positive, but within a window
        "hard"       d_an - d_ap <= 0          the negative is nearer than the positive
        "hardest"    for each positive the anchor's nearest negative only

    `average="active"`: mean of the charges above 0. `average="anchors"`: their sum divided by the batch size.

    Args:
        margin: m, a distance (>= 0).
        mining: which triplets count.
        window: w, a distance (> 0); only for "semihard".
        average: over what the triplets are averaged.

    Well-known settings: "hardest" with "anchors" is the one that IAA was published with.

    Call and shapes: see `PairLoss`; a miner's triplets, or pairs that are joined to all their triplets, go
    instead of `mining`. Time: B × N, and B × N log N for sorting each anchor's negatives, but for "hardest".

    Raises:
        ValueError: for settings out of range, or shapes that do not match.

    Source: Schroff et al., "FaceNet", CVPR 2015, arXiv:1503.03832. Equal to pytorch-metric-learning's loss
    with its miners ("all": without one).
    """

    def __init__(
        self,
        margin: float = 0.05,
        mining: Literal["all", "semihard", "hard", "hardest"] = "semihard",
        window: float = 0.2,
        average: Literal["active", "anchors"] = "active",
    ) -> None:
        super().__init__()
        if mining not in ("all", "semihard", "hard", "hardest"):
            raise ValueError(f'mining must be "all", "semihard", "hard" or "hardest", got {mining!r}')
        if average not in ("active", "anchors"):
            raise ValueError(f'average must be "active" or "anchors", got {average!r}')
        if margin < 0 or window <= 0:
            raise ValueError(
                f"margin must be at least 0 and window above 0, got margin={margin}, window={window}"
            )
        self.margin, self.mining, self.window, self.average = margin, mining, window, average

    def prepare(self, blocks: Blocks) -> tuple[Tensor, ...] | None:
        """A miner's triplets, sorted by anchor."""
        return None if blocks.choice is None else blocks.choice.triplets()

    def charge(self, block: Block, known: tuple[Tensor, ...] | None) -> Charge:
        if known is not None:
            value, active = self.against_chosen(block, within(known, block.rows))
        elif not block.positives.columns.shape[1]:
            block.similarity.zero_()
            return Charge(block.similarity.new_zeros(()), len(block) if self.average == "anchors" else 0)
        elif self.mining == "hardest":
            value, active = self.against_nearest(block)
        else:
            value, active = self.against_interval(block)
        return Charge(value, len(block) if self.average == "anchors" else active)

    def against_chosen(self, block: Block, triplets: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Total and number of the charges of a miner's triplets."""
        anchors, positives, negatives = triplets
        near, far = (distance(block.similarity[anchors, columns]) for columns in (positives, negatives))
        charge = (near - far + self.margin).clamp_min_(0)
        active = charge > 0
        block.similarity.zero_()
        for columns, distances, sign in ((positives, near, 1), (negatives, far, -1)):
            slope = torch.where(active, distance_slope(distances), 0).mul_(sign)
            block.similarity.index_put_((anchors, columns), slope, accumulate=True)
        return charge.sum(), active.sum()

    def against_nearest(self, block: Block) -> tuple[Tensor, Tensor]:
        """Total and number of the charges of every positive beside the anchor's nearest negative."""
        near = distance(block.at(block.positives))
        largest, nearest = block.hide_others().max(dim=1)
        far = distance(largest)
        there = block.positives.there & largest.isfinite()[:, None]
        charge = (near - far[:, None] + self.margin).clamp_min_(0).masked_fill_(~there, 0)
        active = charge > 0
        block.similarity.zero_()
        slope = -distance_slope(far) * active.sum(dim=1)
        block.similarity.scatter_(1, nearest[:, None], slope[:, None])
        block.gradient(block.positives, torch.where(active, distance_slope(near), 0))
        return charge.sum(), active.sum()

    def against_interval(self, block: Block) -> tuple[Tensor, Tensor]:
        """Total and number of the charges of every positive beside all negatives that count for it.

        With an anchor's negatives sorted by distance, those of a positive lie side by side: prefix sums give
        their total, and a count of how many positives reach each negative gives its gradient.
        """
        near = distance(block.at(block.positives))
        far, order = distance(block.hide_others()).sort(dim=1)
        first, last = self.interval(near, far)
        count = (last - first).clamp_min_(0) * block.positives.there
        # In float64: a sum over all negatives less another would lose the digits of a single distance.
        before = torch.zeros(len(far), far.shape[1] + 1, dtype=torch.float64, device=far.device)
        torch.cumsum(far.masked_fill(far.isinf(), 0), dim=1, dtype=torch.float64, out=before[:, 1:])
        between = before.gather(1, torch.maximum(first, last)) - before.gather(1, first)
        value = count * (near + self.margin).double() - between * block.positives.there

        reach = torch.zeros_like(before, dtype=near.dtype)
        some = (count > 0).to(near.dtype)
        reach.scatter_add_(1, first, some).scatter_add_(1, last.clamp_min(0), -some)
        slope = distance_slope(far).mul_(reach[:, :-1].cumsum(dim=1)).neg_()
        block.similarity.scatter_(1, order, slope)
        block.gradient(block.positives, distance_slope(near) * count)
        return value.sum(), count.sum()

    def interval(self, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """(b, K) first and last (excluded) place among the sorted negatives with a charge above 0."""
        last = torch.searchsorted(far, near + self.margin)
        first = torch.zeros_like(last)
        if self.mining == "semihard":
            first = torch.searchsorted(far, near, right=True)
            last = torch.minimum(last, torch.searchsorted(far, near + self.window, right=True))
        elif self.mining == "hard":
            last = torch.minimum(last, torch.searchsorted(far, near, right=True))
        return first, last

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining}, window={self.window}, average={self.average}"
