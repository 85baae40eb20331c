"""Contrastive loss: positives closer than one margin, negatives farther than another."""

from typing import Literal

from torch import Tensor, nn

from dml.losses.pairs import IndicesTuple, compare, count, distance, mean_over_batch


class ContrastiveLoss(nn.Module):
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

    Shapes:
        embeddings: (B, D) float; rows need not be unit length.
        labels: (B,) class ids, or (B, C) multi-hot for several labels per image.
        indices_tuple: a miner's pairs or triplets instead of all pairs; one chosen twice counts twice.
        ref_emb, ref_labels: the whole candidate set, (N, D) and (N,) or (N, C); None: the batch.
        ids, ref_ids: (B,) and (N,) image ids; a candidate with the anchor's id is never its pair.
        returns: () float, at least 0.

    Raises:
        ValueError: for an unknown measure or average, margins out of range, or shapes that do not match.

    Source: Hadsell et al., "Dimensionality Reduction by Learning an Invariant Mapping", CVPR 2006 (there
    squared); this linear form and its averages as in pytorch-metric-learning.
    """

    takes = "unit"
    candidates = True

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

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
    ) -> Tensor:
        pairs = compare(embeddings, labels, ref_emb, ref_labels, ids=ids, ref_ids=ref_ids)
        near, far = pairs.positive, pairs.negative
        if indices_tuple is not None:
            near, far = count(pairs, indices_tuple)
        if self.measure == "cosine":
            lacks, exceeds = self.positive_margin - pairs.similarity, pairs.similarity - self.negative_margin
        else:
            d = distance(pairs.similarity)
            lacks, exceeds = d - self.positive_margin, self.negative_margin - d
        pull, push = lacks.relu() * near, exceeds.relu() * far
        if self.average == "anchors":
            return mean_over_batch(pull + push, len(embeddings))
        return mean_of_active(pull, near) + mean_of_active(push, far)

    def extra_repr(self) -> str:
        return (
            f"positive_margin={self.positive_margin}, negative_margin={self.negative_margin}, "
            f"measure={self.measure}, average={self.average}"
        )


def mean_of_active(charges: Tensor, times: Tensor) -> Tensor:
    """Mean of the charges above 0, each counted as often as it was chosen."""
    return charges.sum() / ((charges > 0) * times).sum().clamp_min(1)
