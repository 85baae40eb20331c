"""The one currency of pair losses: similarities, who is positive, who is negative, and who is no pair at all.

A candidate with the anchor's id is never its pair, neither in mining nor in the sum. That one rule covers the
pair of an image with itself, its own synthetic copies, a memory's older copy of it, and repeated rows of a
batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IndicesTuple = tuple[Tensor, ...]
"""A miner's choice: (anchors, positives, anchors, negatives) of pairs, or (anchors, positives, negatives)."""


class Pairs(NamedTuple):
    """Every anchor (row) against every candidate (column)."""

    similarity: Tensor  # (B, N) float32 or float64, cosine in [-1, 1]
    positive: Tensor  # (B, N) bool: share a label, and are not the same image
    negative: Tensor  # (B, N) bool: share no label, and are not the same image
    same_image: Tensor  # (B, N) bool: equal ids, or the anchor itself


def compare(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    ref_ids: Tensor | None = None,
) -> Pairs:
    """Compare every row of a batch with the batch itself, or with the given candidates.

    Args:
        embeddings: (B, D) anchors; rows need not be unit length, they are made so.
        labels: (B,) class ids, or (B, C) multi-hot.
        ref_emb, ref_labels: the whole candidate set, (N, D) and (N,) or (N, C); None: the batch itself.
        ids, ref_ids: (B,) and (N,) image ids. Without them only the diagonal of the batch against itself is
            the same image.

    Returns:
        The similarities in float32 (float64 stays), also under autocast, and three (B, N) masks.

    Raises:
        ValueError: shapes that do not fit together, labels of different kinds, or candidates with only one of
            ids and ref_ids.
    """
    check(embeddings, labels, ids, "embeddings")
    alone = ref_emb is None or ref_emb is embeddings
    if ref_emb is None:
        if ref_labels is not None or ref_ids is not None:
            raise ValueError("got ref_labels or ref_ids without ref_emb; candidates need all of their parts")
        ref_emb, ref_labels, ref_ids = embeddings, labels, ids
    if ref_labels is None:
        raise ValueError(f"got {len(ref_emb)} candidates in ref_emb without ref_labels")
    check(ref_emb, ref_labels, ref_ids, "ref_emb")
    if alone and ref_ids is None:
        ref_ids = ids
    if (ids is None) != (ref_ids is None):
        raise ValueError("give both ids and ref_ids, or neither: an image is recognised by equal ids")
    if embeddings.shape[1] != ref_emb.shape[1]:
        raise ValueError(
            f"embeddings have {embeddings.shape[1]} columns and ref_emb {ref_emb.shape[1]}; they must agree"
        )
    similarity = cosine(embeddings, None if alone else ref_emb)
    return Pairs(similarity, *relate(labels, None if alone else ref_labels, ids, ref_ids))


def relate(
    labels: Tensor, ref_labels: Tensor | None, ids: Tensor | None, ref_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Who is positive, negative, or the same image: (B, N) bools. Without ref_labels: the batch itself."""
    alone = ref_labels is None
    same_label = share_label(labels, labels if ref_labels is None else ref_labels)
    ref_ids = ids if alone else ref_ids
    if ids is not None and ref_ids is not None:
        same_image = ids[:, None] == ref_ids[None, :]
    elif alone:
        same_image = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    else:
        same_image = torch.zeros_like(same_label)
    return same_label & ~same_image, ~same_label & ~same_image, same_image


def check(embeddings: Tensor, labels: Tensor, ids: Tensor | None, name: str) -> None:
    """Refuse rows, labels and ids that do not belong together."""
    if embeddings.ndim != 2 or labels.ndim not in (1, 2) or len(embeddings) != len(labels):
        raise ValueError(
            f"expected {name} (B, D) and B labels, class ids (B,) or multi-hot (B, C), "
            f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    if ids is not None and ids.shape != (len(embeddings),):
        raise ValueError(f"expected one id per row of {name}, ({len(embeddings)},), got {tuple(ids.shape)}")


def cosine(rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """(B, N) cosines of (B, D) rows with (N, D) columns (None: the rows), never in half precision.

    At half precision a similarity near 1 is known to 5e-4 at best, which a temperature of 0.01 turns into
    noise.
    """
    with torch.autocast(rows.device.type, enabled=False):
        left = unit_rows(rows)
        right = left if columns is None else unit_rows(columns).to(left.dtype)
        return left @ right.T


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their length, in float32 or float64; rows of zeros stay zero, with a finite gradient.

    The largest entry is divided out first, so that no length overflows or vanishes. A unit vector does not
    depend on its row's scale, so the gradient is exact with that factor held constant.
    """
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(largest > 0, length, 1)


def share_label(left: Tensor, right: Tensor) -> Tensor:
    """(B, N) bool: equal class ids (1-D labels), or at least one class in common (multi-hot)."""
    if left.ndim != right.ndim:
        raise ValueError(
            f"expected labels of one kind, class ids (N,) or multi-hot (N, C), "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    if left.ndim == 1:
        return left[:, None] == right[None, :]
    return (left.float() @ right.float().T) > 0


def choose(pairs: Pairs, indices_tuple: IndicesTuple) -> Pairs:
    """The same pairs with the masks replaced by a miner's choice; the same image is still never a pair."""
    anchors, positives, others, negatives = as_pairs(indices_tuple)
    positive, negative = torch.zeros_like(pairs.positive), torch.zeros_like(pairs.negative)
    positive[anchors, positives] = True
    negative[others, negatives] = True
    return pairs._replace(positive=positive & ~pairs.same_image, negative=negative & ~pairs.same_image)


def count(pairs: Pairs, indices_tuple: IndicesTuple) -> tuple[Tensor, Tensor]:
    """How often a miner chose each pair, as positive and as negative: two (B, N) tensors.

    A pair that takes part in several triplets counts several times.
    """
    anchors, positives, others, negatives = as_pairs(indices_tuple)
    zero, one = torch.zeros_like(pairs.similarity), pairs.similarity.new_ones(())
    near = zero.index_put((anchors, positives), one.expand(len(anchors)), accumulate=True)
    far = zero.index_put((others, negatives), one.expand(len(others)), accumulate=True)
    return near.masked_fill(pairs.same_image, 0), far.masked_fill(pairs.same_image, 0)


def as_pairs(indices_tuple: IndicesTuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(anchors, positives, anchors, negatives) of a miner's pairs or triplets."""
    if len(indices_tuple) == 3:
        anchors, positives, negatives = indices_tuple
        return anchors, positives, anchors, negatives
    if len(indices_tuple) == 4:
        anchors, positives, others, negatives = indices_tuple
        return anchors, positives, others, negatives
    raise ValueError(
        f"expected indices_tuple to be pairs (a1, p, a2, n) or triplets (a, p, n), "
        f"got {len(indices_tuple)} tensors"
    )


def mine_hard(similarity: Tensor, positive: Tensor, negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Keep pairs that are hard beside the anchor's hardest pair of the other kind.

    Positives with s - margin < max negative, and negatives with s + margin > min positive. An anchor without
    pairs of one kind keeps none of the other.

    Args:
        similarity: (B, N); used for comparisons only, no gradient passes.
        positive, negative: (B, N) bool.
        margin: width of the band, a cosine similarity.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, arXiv:1904.06627.
    """
    s = similarity.detach()
    if s.shape[1] == 0:
        return positive, negative
    hardest_positive = s.masked_fill(~positive, float("inf")).amin(dim=1, keepdim=True)
    hardest_negative = s.masked_fill(~negative, float("-inf")).amax(dim=1, keepdim=True)
    return positive & (s - margin < hardest_negative), negative & (s + margin > hardest_positive)


def soft_total(logits: Tensor, keep: Tensor) -> Tensor:
    """(B,) log(1 + Σ exp(logits)) over the kept columns of each row, without overflow; 0 without any."""
    logits = logits.masked_fill(~keep, float("-inf"))
    return torch.cat([logits.new_zeros(len(logits), 1), logits], dim=1).logsumexp(dim=1)


def mean_over_batch(values: Tensor, batch_size: int) -> Tensor:
    """Σ values / B as a scalar that stays connected to the graph; 0 for an empty batch."""
    return values.sum() / max(batch_size, 1)


def distance(similarity: Tensor) -> Tensor:
    """Euclidean distance of unit vectors from their cosine, sqrt(2 - 2s), in [0, 2].

    Below the rounding error of the similarity it is exactly 0 with gradient 0: there the square root is
    infinitely steep and its value is noise.
    """
    squared = 2 - 2 * similarity
    apart = squared > 16 * torch.finfo(similarity.dtype).eps
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)
