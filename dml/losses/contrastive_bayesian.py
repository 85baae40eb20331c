"""Contrastive-Bayesian metric learning (CBML): pair losses from posterior odds, and calm negatives."""

from typing import Literal

import torch
from torch import Tensor, nn

from dml.losses.pairs import IndicesTuple, Pairs, choose, compare, mean_over_batch, mine_hard, soft_total

DUPLICATE = 1e-5
"""Positives with a similarity of at least 1 minus this are the anchor itself or an exact duplicate."""
TOP_NEGATIVES = 100
"""Without adaptive negatives, so many of the most similar ones are kept."""
LARGEST_EXPONENT = 80.0
"""exp() of more than this would soon overflow float32."""


class ContrastiveBayesianLoss(nn.Module):
    """Minus the log posterior of being right about each pair, and a constraint on the spread of negatives.

    The likelihood ratio p(s | same class) / p(s | other class) of a similarity s is modelled as exponential
    in s, so the posterior of "same class" is a logistic curve with a centre a and a scale b. For anchor i,
    with all positives P⁰ (exact duplicates, s >= 1 - 1e-5, left out) and all negatives N⁰::

        P_i = {s ∈ P⁰ : s - m < max N⁰}          N_i = {s ∈ N⁰ : s + m > min P⁰}      hard pairs, margin m

        E⁺ = Σ_{P_i} exp(-(s - a⁺)/b⁺)           E⁻ = Σ_{N_i} exp((s - a⁻)/b⁻)

        form        A_i                          C_i
        "log"       log(1 + E⁺)                  log(1 + E⁻)
        "sqrt"      sqrt(1 + E⁺)                 sqrt(1 + E⁻)
        "constant"  1 + w⁺ E⁺                    1 + w⁻ E⁻

        ξ_i = h mean(P⁰) + (1 - h) mean(N⁰)      V_i = Σ_{s∈N⁰} (s - ξ_i)²             metric variance

        L = 1/B Σ_i (A_i + C_i + ω V_i)

    An anchor without positives or negatives, or left without either by the mining, contributes 0, its V_i
    included; the division is by the full batch. The gradient passes through ξ.

    Args:
        positive_center, positive_scale: a⁺, b⁺ (> 0), cosine similarities.
        negative_center, negative_scale: a⁻, b⁻ (> 0). At 0.01 only negatives within a few hundredths of a⁻
            matter.
        margin: m of the mining (>= 0), a cosine similarity.
        variance_weight: ω (>= 0). 1 is released for pretrained trunks; from scratch 0.1 to 0.3 is a better
            start.
        variance_reduction: "sum" as released, so that V grows with the number of negatives; "mean" divides by
            it, which a candidate set much larger than the batch needs.
        positive_share: h in [0, 1]; released: 0.2 on CUB.
        form: outer function.
        adaptive_negatives: mine negatives by the margin; False: the 100 most similar negatives of each
            anchor.
        positive_weight, negative_weight: w⁺, w⁻ (>= 0), only for form="constant".

    Shapes:
        embeddings: (B, D) float; rows need not be unit length.
        labels: (B,) class ids, or (B, C) multi-hot for several labels per image.
        indices_tuple: a miner's pairs or triplets in place of P_i and N_i; ξ and V keep looking at all pairs.
        ref_emb, ref_labels: the whole candidate set, (N, D) and (N,) or (N, C); None: the batch.
        ids, ref_ids: (B,) and (N,) image ids; a candidate with the anchor's id is never its pair.
        returns: () float, at least 0; computed in float32 or float64.

    Raises:
        ValueError: for settings out of range, or shapes that do not match.

    Source: Kan et al., "Contrastive Bayesian Analysis for Deep Metric Learning", TPAMI 2022,
    arXiv:2210.04402. Follows the authors' released code; the logistic reading above is ours, the paper's
    derivation was not at hand.
    """

    takes = "unit"
    candidates = True

    def __init__(
        self,
        positive_center: float = 0.5,
        positive_scale: float = 0.5,
        negative_center: float = 1.0,
        negative_scale: float = 0.01,
        margin: float = 0.1,
        variance_weight: float = 1.0,
        variance_reduction: Literal["sum", "mean"] = "sum",
        positive_share: float = 0.2,
        form: Literal["log", "sqrt", "constant"] = "log",
        adaptive_negatives: bool = True,
        positive_weight: float = 0.25,
        negative_weight: float = 0.25,
    ) -> None:
        super().__init__()
        if positive_scale <= 0 or negative_scale <= 0:
            raise ValueError(
                f"scales must be above 0, got positive_scale={positive_scale}, "
                f"negative_scale={negative_scale}"
            )
        if min(margin, variance_weight, positive_weight, negative_weight) < 0:
            raise ValueError(
                f"margin and weights must be at least 0, got margin={margin}, "
                f"variance_weight={variance_weight}, positive_weight={positive_weight}, "
                f"negative_weight={negative_weight}"
            )
        if not 0 <= positive_share <= 1:
            raise ValueError(f"positive_share must be between 0 and 1, got {positive_share}")
        if form not in ("log", "sqrt", "constant"):
            raise ValueError(f'form must be "log", "sqrt" or "constant", got {form!r}')
        if variance_reduction not in ("sum", "mean"):
            raise ValueError(f'variance_reduction must be "sum" or "mean", got {variance_reduction!r}')
        self.positive_center, self.positive_scale = positive_center, positive_scale
        self.negative_center, self.negative_scale = negative_center, negative_scale
        self.margin, self.adaptive_negatives = margin, adaptive_negatives
        self.variance_weight, self.variance_reduction = variance_weight, variance_reduction
        self.positive_share, self.form = positive_share, form
        self.positive_weight, self.negative_weight = positive_weight, negative_weight

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
        everyone = compare(embeddings, labels, ref_emb, ref_labels, ids=ids, ref_ids=ref_ids)
        s = everyone.similarity
        everyone = everyone._replace(positive=everyone.positive & (s.detach() < 1 - DUPLICATE))
        positive, negative = (
            self.mine(everyone) if indices_tuple is None else choose(everyone, indices_tuple)[1:3]
        )

        pull = self.outer((self.positive_center - s) / self.positive_scale, positive, self.positive_weight)
        push = self.outer((s - self.negative_center) / self.negative_scale, negative, self.negative_weight)
        each = pull + push
        if self.variance_weight > 0:
            each = each + self.variance_weight * self.variance(everyone)
        counts = positive.any(dim=1) & negative.any(dim=1)
        return mean_over_batch(torch.where(counts, each, 0), len(embeddings))

    def mine(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """The hard positives and negatives of each anchor; those without one kind keep none of the other."""
        positive, negative = mine_hard(pairs.similarity, pairs.positive, pairs.negative, self.margin)
        if self.adaptive_negatives:
            return positive, negative
        return positive, pairs.negative & among_largest(pairs.similarity, pairs.negative, TOP_NEGATIVES)

    def outer(self, logits: Tensor, keep: Tensor, weight: float) -> Tensor:
        """(B,) the chosen function of 1 + Σ exp(logits) over the kept columns."""
        if self.form == "log":
            return soft_total(logits, keep)
        logits = logits.clamp_max(LARGEST_EXPONENT)
        if self.form == "sqrt":
            return (0.5 * soft_total(logits, keep)).exp()
        return 1 + weight * logits.masked_fill(~keep, float("-inf")).exp().sum(dim=1)

    def variance(self, pairs: Pairs) -> Tensor:
        """(B,) V_i: how far all negatives of each anchor are from the point ξ_i between the two means."""
        s, positive, negative = pairs.similarity, pairs.positive, pairs.negative
        negatives = negative.sum(dim=1).clamp_min(1)
        mean_positive = (s * positive).sum(dim=1) / positive.sum(dim=1).clamp_min(1)
        mean_negative = (s * negative).sum(dim=1) / negatives
        center = self.positive_share * mean_positive + (1 - self.positive_share) * mean_negative
        spread = ((s - center[:, None]).square() * negative).sum(dim=1)
        return spread if self.variance_reduction == "sum" else spread / negatives

    def extra_repr(self) -> str:
        return (
            f"form={self.form}, positive=({self.positive_center}, {self.positive_scale}), "
            f"negative=({self.negative_center}, {self.negative_scale}), margin={self.margin}, "
            f"variance_weight={self.variance_weight} ({self.variance_reduction}), "
            f"positive_share={self.positive_share}, adaptive_negatives={self.adaptive_negatives}"
        )


def among_largest(values: Tensor, keep: Tensor, number: int) -> Tensor:
    """(B, N) bool: the columns of the `number` largest kept values of each row."""
    number = min(number, values.shape[1])
    largest = values.detach().masked_fill(~keep, float("-inf")).topk(number, dim=1).indices
    return torch.zeros_like(keep).scatter_(1, largest, True) & keep
