"""Multi-Similarity loss: hard pairs are mined, and the hardest of them count most."""

from torch import Tensor, nn

from dml.losses.pairs import IndicesTuple, choose, compare, mean_over_batch, mine_hard, soft_total


class MultiSimilarityLoss(nn.Module):
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

    Shapes:
        embeddings: (B, D) float; rows need not be unit length.
        labels: (B,) class ids, or (B, C) multi-hot for several labels per image.
        indices_tuple: a miner's pairs or triplets; they replace the mining.
        ref_emb, ref_labels: the whole candidate set, (N, D) and (N,) or (N, C); None: the batch.
        ids, ref_ids: (B,) and (N,) image ids; a candidate with the anchor's id is never its pair.
        returns: () float, at least 0; exactly 0 when nobody has a pair.

    Raises:
        ValueError: for α or β not above 0, ε below 0, or embeddings and labels that do not match.

    Source: Wang et al., "Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning", CVPR
    2019, arXiv:1904.06627. Equal to pytorch-metric-learning's loss with its miner.
    """

    takes = "unit"
    candidates = True

    def __init__(
        self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float | None = 0.1
    ) -> None:
        super().__init__()
        if alpha <= 0 or beta <= 0:
            raise ValueError(f"alpha and beta must be above 0, got alpha={alpha}, beta={beta}")
        if epsilon is not None and epsilon < 0:
            raise ValueError(f"epsilon must be at least 0, or None for no mining, got {epsilon}")
        self.alpha, self.beta, self.base, self.epsilon = alpha, beta, base, epsilon

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
        if indices_tuple is not None:
            pairs = choose(pairs, indices_tuple)
        positive, negative = pairs.positive, pairs.negative
        if indices_tuple is None and self.epsilon is not None:
            positive, negative = mine_hard(pairs.similarity, positive, negative, self.epsilon)
        excess = pairs.similarity - self.base
        pull = soft_total(-self.alpha * excess, positive) / self.alpha
        push = soft_total(self.beta * excess, negative) / self.beta
        return mean_over_batch(pull + push, len(embeddings))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, base={self.base}, epsilon={self.epsilon}"
