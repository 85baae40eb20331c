"""Contrastive loss: positives closer than one margin, negatives farther than another."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from dml.losses.kernel import Apart, Block, Blocks, Charge, PairLoss, distance, distance_slope
from dml.losses.pairs import Padded


class ContrastiveLoss(PairLoss):
    """Charge each pair for what it lacks to its margin.

    With Euclidean distances d of unit vectors (`measure="euclidean"`)::

        pull_ij = max(0, d_ij - m_p)  for positives        push_ij = max(0, m_n - d_ij)  for negatives

    and with cosine similarities s (`measure="cosine"`)::

        pull_ij = max(0, m_p - s_ij)  for positives        push_ij = max(0, s_ij - m_n)  for negatives

    `average="active"`: mean of the pulls above 0 plus mean of the pushes above 0.
    `average="anchors"`: the sum of all pulls and pushes, divided by the batch size.

    Args:
        positive_margin: m_p; a distance in [0, 2], or a cosine in [-1, 1].
        negative_margin: m_n; likewise.
        measure: what the margins measure.
        average: over what the pairs are averaged.

    Well-known settings: (0, 1, "euclidean", "active") is pytorch-metric-learning's default;
    (0.8, 0.5, "cosine", "anchors") is the one that IAA was published with.

    Call and shapes: see `PairLoss`; a miner's pairs go instead of all pairs, and one chosen twice counts
    twice.

    Raises:
        ValueError: for an unknown measure or average, margins out of range, or shapes that do not match.

    Source: Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006 (there
    squared); this linear form and its averages as in pytorch-metric-learning.
    """

    def __init__(
        self,
        positive_margin: float = 0.0,
        negative_margin: float = 1.0,
        measure: Literal["euclidean", "cosine"] = "euclidean",
        average: Literal["active", "anchors"] = "active",
    ) -> None:
        super().__init__()
        if measure not in ("euclidean", "cosine"):
            raise ValueError(f'measure must be "euclidean" or "cosine", got {measure!r}')
        if average not in ("active", "anchors"):
            raise ValueError(f'average must be "active" or "anchors", got {average!r}')
        low, high = (0.0, 2.0) if measure == "euclidean" else (-1.0, 1.0)
        if not (low <= positive_margin <= high and low <= negative_margin <= high):
            raise ValueError(
                f"margins of {measure} pairs must be between {low:g} and {high:g}, "
                f"got positive_margin={positive_margin}, negative_margin={negative_margin}"
            )
        self.positive_margin, self.negative_margin = positive_margin, negative_margin
        self.measure, self.average = measure, average

    def prepare(self, blocks: Blocks) -> tuple[int, int] | None:
        """How many pulls and pushes are active; None: that does not matter, or need not be known before."""
        if self.average == "anchors" or blocks.single or blocks.few_positives:
            return None
        pulls = pushes = 0
        for block in blocks:
            near, far = pairs_of(block)
            pulls += int(self.pull(block.similarity[near])[1].count_nonzero())
            other = block.hide_others() if far is None else block.similarity[far]
            pushes += int(self.active(other))
        return pulls, pushes

    def charge(self, block: Block, known: tuple[int, int] | None) -> Charge:
        near, far = pairs_of(block)
        pulls, pull_slopes = self.pull(block.similarity[near])
        other = block.hide_others() if far is None else block.similarity[far]
        if self.average == "active" and known is None and not block.single:
            active = self.active(other)
            return Charge(
                self.push_(other), active, Apart(near, pull_slopes, pulls.sum(), pull_slopes.count_nonzero())
            )
        pull_weight = push_weight = 1.0
        if self.average == "active":
            counts = known or (int(pull_slopes.count_nonzero()), int(self.active(other)))
            # Dividing by the batch size, as for "anchors", then gives the mean of the active.
            pull_weight, push_weight = (block.batch / max(count, 1) for count in counts)
        pushes = self.push_(other)
        if far is not None:
            block.similarity.zero_().index_put_(far, other.mul_(push_weight), accumulate=True)
        elif push_weight != 1:
            other.mul_(push_weight)
        block.similarity.index_put_(near, pull_slopes * pull_weight, accumulate=True)
        return Charge(pulls.sum() * pull_weight + pushes * push_weight, len(block))

    def active(self, similarity: Tensor) -> Tensor:
        """() how many negatives are charged."""
        return (similarity > self.farthest).count_nonzero()

    @property
    def farthest(self) -> float:
        """The similarity above which negatives are charged."""
        return self.negative_margin if self.measure == "cosine" else 1 - self.negative_margin**2 / 2

    def pull(self, similarity: Tensor) -> tuple[Tensor, Tensor]:
        """The charges of positives, and their derivatives by the similarities."""
        if self.measure == "cosine":
            charges = (self.positive_margin - similarity).clamp_min_(0)
            return charges, -(charges > 0).to(charges.dtype)
        d = distance(similarity)
        charges = (d - self.positive_margin).clamp_min_(0)
        return charges, torch.where(charges > 0, distance_slope(d), 0)

    def push_(self, similarity: Tensor) -> Tensor:
        """The total charge of negatives, whose similarities become its derivatives; -inf is never charged."""
        s, margin = similarity, self.negative_margin
        if self.measure == "cosine":
            total = s.sub_(margin).clamp_min_(0).sum()
            s.sign_()
            return total
        # Below the rounding error of the similarity a distance is 0, without slope: see `distance`.
        squared = torch.add(s.new_tensor(2), s, alpha=-2, out=s)
        functional.threshold(squared, 16 * torch.finfo(s.dtype).eps, 0, inplace=True)
        d = squared.sqrt_().clamp_max_(margin)
        # In float64 what is not charged cancels to the last digit.
        total = margin * d.numel() - d.sum(dtype=torch.float64)
        # 1 / d, and 0 where d is 0 or the margin; masks would take longer than all of this.
        functional.threshold(d, 0, float("inf"), inplace=True).neg_()
        functional.threshold(d, -margin, float("-inf"), inplace=True).reciprocal_().neg_()
        return total.to(s.dtype)

    def extra_repr(self) -> str:
        return (
            f"positive_margin={self.positive_margin}, negative_margin={self.negative_margin}, "
            f"measure={self.measure}, average={self.average}"
        )


def pairs_of(block: Block) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """(rows, columns) of the positives, and of the negatives where a miner chose them; None: all others."""
    if block.chosen:
        return block.chosen_near(), block.chosen_far()
    return entries(block.positives), None


def entries(places: Padded) -> tuple[Tensor, Tensor]:
    """(rows, columns) of what is there."""
    row, place = places.there.nonzero(as_tuple=True)
    return row, places.columns[row, place]
