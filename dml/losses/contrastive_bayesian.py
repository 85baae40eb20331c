"""Contrastive-Bayesian metric learning (CBML): pair losses from posterior odds, and calm negatives."""

from typing import Literal

import torch
from torch import Tensor

from dml.losses.kernel import Block, Charge, PairLoss, soft_total
from dml.losses.multi_similarity import hard_pairs
from dml.losses.pairs import Padded

DUPLICATE = 1e-5
"""Positives with a similarity of at least 1 minus this are the anchor itself or an exact duplicate."""
TOP_NEGATIVES = 100
"""Without adaptive negatives, so many of the most similar ones are kept."""
LARGEST_EXPONENT = 80.0
"""exp() of more than this would soon overflow float32."""


class ContrastiveBayesianLoss(PairLoss):
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

    Call and shapes: see `PairLoss`; a miner's pairs go in place of P_i and N_i; ξ and V keep looking at all.

    Raises:
        ValueError: for settings out of range, or shapes that do not match.

    Source: Kan et al., "Contrastive Bayesian Analysis for Deep Metric Learning", TPAMI 2022,
    arXiv:2210.04402. Follows the authors' released code; the logistic reading above is ours, the paper's
    derivation was not at hand.
    """

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

    @property
    def against_memory(self) -> str:  # type: ignore[override]
        """See `PairLoss`: a sum over all remembered negatives drowns everything else."""
        if self.variance_reduction == "mean" or self.variance_weight == 0:
            return ""
        return (
            "its metric variance is a sum over all negatives, remembered ones too. Set "
            'loss.args.variance_reduction = "mean", and loss.args.variance_weight so many times as large as '
            "a batch has negatives"
        )

    def charge(self, block: Block, known: None) -> Charge:
        everyone = self.without_duplicates(block)
        spread, pulls, pushes = self.variance(block, everyone)
        near, similar, largest = self.mine(block, everyone)
        active = near.there.any(dim=1) & largest.isfinite()

        push = block.similarity
        value, factor = self.outer(
            push, self.negative_center, 1 / self.negative_scale, largest, self.negative_weight
        )
        if pushes is None:
            push.mul_(factor[:, None])
        else:
            torch.addcmul(pushes, push, factor[:, None], out=push)
        value += spread
        if similar.shape[1]:
            farthest = similar.amin(dim=1)
            pull, factor = self.outer(
                similar, self.positive_center, -1 / self.positive_scale, farthest, self.positive_weight
            )
            value += pull
            block.gradient(near, similar.mul_(factor[:, None]))
        if pulls is not None:
            block.gradient(everyone, pulls[:, None].expand_as(everyone.columns))
        if not bool(active.all()):
            block.similarity.masked_fill_(~active[:, None], 0)
        return Charge(torch.where(active, value, 0).sum(), len(block))

    def without_duplicates(self, block: Block) -> Padded:
        """All positives of each anchor but its exact duplicates."""
        columns, there = block.positives
        return Padded(columns, there & (block.at(block.positives) < 1 - DUPLICATE))

    def variance(self, block: Block, positives: Padded) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(b,) ω V_i, and its derivatives by each positive (b,) and by the candidates (b, N), 0 at others.

        V = Σ (s - ξ)², so ∂V/∂ξ = -2 Σ (s - ξ) = -2 n h (μ⁻ - μ⁺), and ξ moves with both means.
        """
        s = block.similarity
        if self.variance_weight == 0:
            return s.new_zeros(len(s)), None, None
        negatives = block.negatives.clamp_min(1).to(s.dtype)
        number = positives.there.sum(dim=1).clamp_min(1).to(s.dtype)
        mean_positive = torch.where(positives.there, block.at(positives), 0).sum(dim=1) / number
        mean_negative = block.total_of_negatives() / negatives
        h = self.positive_share
        center = h * mean_positive + (1 - h) * mean_negative
        weight = torch.full_like(negatives, self.variance_weight)
        if self.variance_reduction == "mean":
            weight = weight / negatives
        away = block.hide_others(0, of=s - center[:, None])
        spread = weight * torch.linalg.vector_norm(away, dim=1).square()
        by_center = -2 * negatives * h * (mean_negative - mean_positive)
        shift = weight * (1 - h) * by_center / negatives
        away.mul_(2 * weight[:, None]).add_(shift[:, None])
        return spread, weight * h * by_center / number, block.hide_others(0, of=away)

    def mine(self, block: Block, positives: Padded) -> tuple[Padded, Tensor, Tensor]:
        """The pairs that count; see `hard_pairs`."""
        if self.adaptive_negatives or block.chosen:
            return hard_pairs(block, positives, self.margin)
        near, similar, largest = hard_pairs(block, positives, None)
        hard = near.there & (similar - self.margin < largest[:, None])
        s = block.similarity
        kept = s.topk(min(TOP_NEGATIVES, s.shape[1]), dim=1)
        s.fill_(float("-inf")).scatter_(1, kept.indices, kept.values)
        return Padded(near.columns, hard), similar.masked_fill_(~hard, float("inf")), largest

    def outer(
        self, similarity: Tensor, center: float, scale: float, extreme: Tensor, weight: float
    ) -> tuple[Tensor, Tensor]:
        """The chosen function of 1 + Σ exp(u) of each row, u = scale (s - center), and the way to its slopes.

        Exponents are cut off where exp() would soon overflow, but for "log", which takes any.

        Args:
            similarity: (b, K), overwritten.
            extreme: (b,) the one with the largest u.
            weight: w of "constant".

        Returns:
            (b,) values, and (b,) factors: the derivative by s is what `similarity` holds by now, times the
            factor of its row.
        """
        largest = (extreme - center) * scale
        if self.form == "log":
            value, factor = soft_total(similarity, center=center, scale=scale, largest=largest)
            return value, factor.mul_(scale)
        beyond = (similarity - center) * scale > LARGEST_EXPONENT
        similarity.masked_fill_(beyond, center + LARGEST_EXPONENT / scale)
        if self.form == "constant":
            similarity.sub_(center).mul_(scale).exp_()
            value = 1 + weight * similarity.sum(dim=1)
            factor = torch.full_like(value, weight * scale)
        else:
            largest = largest.clamp_max(LARGEST_EXPONENT)
            value, factor = soft_total(similarity, center=center, scale=scale, largest=largest)
            value.mul_(0.5).exp_()
            # d sqrt(1 + E) = ½ sqrt(1 + E) d log(1 + E)
            factor.mul_(0.5 * scale * value)
        similarity.masked_fill_(beyond, 0)
        return value, factor

    def extra_repr(self) -> str:
        return (
            f"form={self.form}, positive=({self.positive_center}, {self.positive_scale}), "
            f"negative=({self.negative_center}, {self.negative_scale}), margin={self.margin}, "
            f"variance_weight={self.variance_weight} ({self.variance_reduction}), "
            f"positive_share={self.positive_share}, adaptive_negatives={self.adaptive_negatives}"
        )
