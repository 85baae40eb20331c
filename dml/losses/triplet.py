"""Triplet loss: each positive nearer than each negative, by a margin."""

from typing import Literal

import torch
from torch import Tensor, nn

from dml.losses.pairs import IndicesTuple, Pairs, compare, distance, mean_over_batch


class TripletLoss(nn.Module):
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

    Shapes:
        embeddings: (B, D) float; rows need not be unit length.
        labels: (B,) class ids, or (B, C) multi-hot for several labels per image.
        indices_tuple: a miner's triplets, or pairs that are joined to all their triplets, instead of
            `mining`.
        ref_emb, ref_labels: the whole candidate set, (N, D) and (N,) or (N, C); None: the batch.
        ids, ref_ids: (B,) and (N,) image ids; a candidate with the anchor's id is never its pair.
        returns: () float, at least 0.

    Memory: (number of positive pairs) × N floats, except for "hardest", which takes B × N.

    Raises:
        ValueError: for settings out of range, or shapes that do not match.

    Source: Schroff et al., "FaceNet", CVPR 2015, arXiv:1503.03832. Equal to pytorch-metric-learning's loss
    with its miners ("all": without one).
    """

    takes = "unit"
    candidates = True

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
        d = distance(pairs.similarity)
        if indices_tuple is not None:
            anchors, positives, negatives = as_triplets(pairs, indices_tuple)
            violation = d[anchors, positives] - d[anchors, negatives]
        elif self.mining == "hardest":
            violation = self.against_nearest(d, pairs)
        else:
            violation = self.against_each(d, pairs)
        charge = (violation + self.margin).relu()
        if self.average == "anchors":
            return mean_over_batch(charge, len(embeddings))
        return charge.sum() / (charge > 0).sum().clamp_min(1)

    def against_each(self, d: Tensor, pairs: Pairs) -> Tensor:
        """d_ap - d_an of every positive pair with every negative; -inf where a triplet does not count."""
        anchors, positives = pairs.positive.nonzero(as_tuple=True)
        violation = d[anchors, positives][:, None] - d[anchors]
        keep = pairs.negative[anchors]
        if self.mining == "semihard":
            keep = keep & (violation < 0) & (violation >= -self.window)
        elif self.mining == "hard":
            keep = keep & (violation >= 0)
        return violation.masked_fill(~keep, float("-inf"))

    def against_nearest(self, d: Tensor, pairs: Pairs) -> Tensor:
        """(B, N) d_ap - min d_an of every positive; -inf elsewhere, and for anchors without a negative."""
        if d.shape[1] == 0:
            return d
        nearest = d.masked_fill(~pairs.negative, float("inf")).amin(dim=1, keepdim=True)
        keep = pairs.positive & pairs.negative.any(dim=1, keepdim=True)
        return (d - torch.where(nearest.isfinite(), nearest, 0)).masked_fill(~keep, float("-inf"))

    def extra_repr(self) -> str:
        return f"margin={self.margin}, mining={self.mining}, window={self.window}, average={self.average}"


def as_triplets(pairs: Pairs, indices_tuple: IndicesTuple) -> tuple[Tensor, Tensor, Tensor]:
    """A miner's triplets, or all that its pairs can be joined to; the same image is never a pair."""
    if len(indices_tuple) == 3:
        anchors, positives, negatives = indices_tuple
    elif len(indices_tuple) == 4:
        first, near, second, far = indices_tuple
        left, right = (first[:, None] == second[None, :]).nonzero(as_tuple=True)
        anchors, positives, negatives = first[left], near[left], far[right]
    else:
        raise ValueError(
            f"expected indices_tuple to be triplets (a, p, n) or pairs (a1, p, a2, n), "
            f"got {len(indices_tuple)} tensors"
        )
    keep = ~(pairs.same_image[anchors, positives] | pairs.same_image[anchors, negatives])
    return anchors[keep], positives[keep], negatives[keep]
