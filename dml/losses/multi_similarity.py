"""Multi-Similarity loss: hard pairs are mined, and the hardest of them count most."""

import torch
from torch import Tensor

from dml.losses.kernel import Block, Charge, PairLoss, drop_below, soft_total
from dml.losses.pairs import Padded, padded


class MultiSimilarityLoss(PairLoss):
    """Pull positives above a similarity threshold and push negatives below it.

    For anchor i with cosine similarities S, positives P and negatives N that pass the mining::

        P_i: positives with S_ik < max negative + ε        N_i: negatives with S_ik > min positive - ε

        L_i = 1/α · log(1 + Σ_{k∈P_i} exp(-α (S_ik - λ)))
            + 1/β · log(1 + Σ_{k∈N_i} exp( β (S_ik - λ)))

    and the loss is the mean of L_i over the batch.

    Args:
        alpha: α, sharpness on positives (> 0); larger looks only at the farthest ones.
        beta: β, sharpness on negatives (> 0); larger looks only at the nearest ones.
        base: λ, the threshold, a cosine similarity in [-1, 1].
        epsilon: ε, width of the mining band, a cosine similarity (>= 0); None: every pair counts.

    Call and shapes: see `PairLoss`; a miner's pairs replace the mining. Exactly 0 when nobody has a pair.

    Raises:
        ValueError: for α or β not above 0, ε below 0, or embeddings and labels that do not match.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR
    2019, arXiv:1904.06627. Equal to pytorch-metric-learning's loss with its miner.
    """

    def __init__(
        self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float | None = 0.1
    ) -> None:
        super().__init__()
        if alpha <= 0 or beta <= 0:
            raise ValueError(f"alpha and beta must be above 0, got alpha={alpha}, beta={beta}")
        if epsilon is not None and epsilon < 0:
            raise ValueError(f"epsilon must be at least 0, or None for no mining, got {epsilon}")
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon

    def charge(self, block: Block, known: None) -> Charge:
        near, similar, largest = hard_pairs(block, block.positives, self.epsilon)
        push = block.similarity
        value, factor = soft_total(
            push, center=self.base, scale=self.beta, largest=(largest - self.base) * self.beta
        )
        push.mul_(factor[:, None])
        value /= self.beta
        if similar.shape[1]:
            farthest = similar.amin(dim=1)
            pull, factor = soft_total(
                similar, center=self.base, scale=-self.alpha, largest=(self.base - farthest) * self.alpha
            )
            value += pull / self.alpha
            block.gradient(near, similar * -factor[:, None])
        return Charge(value.sum(), len(block))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}, epsilon={self.epsilon}"


def hard_pairs(block: Block, positives: Padded, margin: float | None) -> tuple[Padded, Tensor, Tensor]:
    """Choose the pairs that are hard beside the anchor's hardest pair of the other kind.

    Positives with s - margin < max negative, and negatives with s + margin > min positive. An anchor without
    pairs of one kind keeps none of the other. A miner's choice, where there is one, goes instead.

    Args:
        block: its similarities become -inf at every candidate that is no chosen negative.
        positives: what to choose from.
        margin: width of the band, a cosine similarity; None: everything is chosen.

    Returns:
        The chosen positives, (b, K) their similarities, inf at others, and (b,) the largest similarity of a
        chosen negative, -inf where there is none.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting", CVPR 2019, arXiv:1904.06627.
    """
    if block.chosen:
        return miners_pairs(block)
    similar = block.at(positives).masked_fill_(~positives.there, float("inf"))
    s = block.hide_others()
    largest = s.amax(dim=1)
    if margin is None:
        return positives, similar, largest
    smallest = similar.amin(dim=1) if similar.shape[1] else torch.full_like(largest, float("inf"))
    hard = positives.there & (similar - margin < largest[:, None])
    floor = smallest - margin
    drop_below(s, floor)
    largest = largest.masked_fill(largest <= floor, float("-inf"))
    return Padded(positives.columns, hard), similar.masked_fill_(~hard, float("inf")), largest


def miners_pairs(block: Block) -> tuple[Padded, Tensor, Tensor]:
    """As `hard_pairs`, for the pairs that a miner chose, each once."""
    mask = torch.zeros_like(block.similarity, dtype=torch.bool)
    mask[block.chosen_near()] = True
    near = padded(mask)
    similar = block.at(near).masked_fill_(~near.there, float("inf"))
    far = block.chosen_far()
    values = block.similarity[far]
    block.similarity.fill_(float("-inf"))
    block.similarity[far] = values
    return near, similar, block.similarity.amax(dim=1)
