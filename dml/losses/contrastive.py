"""Contrastive loss: positives closer than one margin, negatives farther than another."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dml.losses.kernel import Block, Blocks, Charge, PairLoss, distance, distance_slope
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

    def prepare(self, blocks: Blocks) -> "Known":
        """What a pull and a push count for: the batch size over the number of active ones, or 1."""
        if self.average == "anchors":
            return Known(1.0, 1.0, None)
        active = [0, 0]
        charges = None
        for block in blocks:
            charges = self.charges(block)
            for kind, charge in enumerate(charges):
                active[kind] += int((charge.values > 0).sum())
        pulls, pushes = (len(blocks.anchors) / max(count, 1) for count in active)
        return Known(pulls, pushes, charges if blocks.single else None)

    def charge(self, block: Block, known: "Known") -> Charge:
        pull, push = known.charges or self.charges(block)
        value = pull.values.sum() * known.pulls + push.values.sum() * known.pushes
        slope = self.slope(push, sign=1).mul_(known.pushes)
        if push.where is None:
            block.similarity = slope
        else:
            block.similarity.zero_().index_put_(push.where, slope, accumulate=True)
        slope = self.slope(pull, sign=-1).mul_(known.pulls)
        block.similarity.index_put_(pull.where, slope, accumulate=True)
        return Charge(value, len(block))

    def charges(self, block: Block) -> "tuple[Charges, Charges]":
        """What positives and negatives lack to their margins. Not twice: the similarities are overwritten."""
        near = block.chosen_near() if block.chosen else entries(block.positives)
        far = block.chosen_far() if block.chosen else None
        similar = block.similarity[near]
        other = block.similarity[far] if far is not None else block.hide_others()
        if self.measure == "cosine":
            return (
                Charges((self.positive_margin - similar).clamp_min_(0), near),
                Charges((other - self.negative_margin).clamp_min_(0), far),
            )
        d_near, d_far = distance(similar), distance(other)
        return (
            Charges((d_near - self.positive_margin).clamp_min_(0), near, d_near),
            Charges((self.negative_margin - d_far).clamp_min_(0), far, d_far),
        )

    def slope(self, charges: "Charges", *, sign: int) -> Tensor:
        """Derivative of the charges by the similarities; `sign` 1: they grow with it, -1: they shrink."""
        active = charges.values > 0
        if charges.distances is None:
            return active.to(charges.values.dtype).mul_(sign)
        # A pull grows with its distance and a push shrinks with it; a distance shrinks with the similarity.
        return torch.where(active, distance_slope(charges.distances), 0).mul_(-sign)

    def extra_repr(self) -> str:
        return (
            f"positive_margin={self.positive_margin}, negative_margin={self.negative_margin}, "
            f"measure={self.measure}, average={self.average}"
        )


class Charges(NamedTuple):
    """What some pairs lack to their margin."""

    values: Tensor  # at least 0
    where: tuple[Tensor, Tensor] | None  # (rows, columns) of the pairs; None: the whole block
    distances: Tensor | None = None  # where the margins are distances


class Known(NamedTuple):
    """What one charge counts for, and the charges where one block holds them all."""

    pulls: float
    pushes: float
    charges: tuple[Charges, Charges] | None


def entries(places: Padded) -> tuple[Tensor, Tensor]:
    """(rows, columns) of what is there."""
    row, place = places.there.nonzero(as_tuple=True)
    return row, places.columns[row, place]
