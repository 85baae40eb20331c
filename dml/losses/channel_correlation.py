"""Channel correlation (CC-Loss): one class, one pattern of important channels."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dml.losses.pairs import share_label

EPSILON = 1e-12
"""Inside the square root: equal attentions are the optimum of positives; a bare root has no slope there."""
EXPLICIT = 2**24
"""Up to so many N·N·C differences are formed one by one; above, distances come from a product of matrices."""
SATURATED = 0.02
"""An attention this near to 0 or 1 hardly learns any more."""


class Correlation(NamedTuple):
    """How alike the channel attentions of a batch are."""

    intra: Tensor  # () mean distance inside the classes; 0 when no class has two images
    inter: Tensor  # () mean distance between classes; 0 when there is only one
    saturation: Tensor  # () share of attentions outside [0.02, 0.98], for logging


class ChannelCorrelation(nn.Module):
    """Make the channel attentions of one class alike, and those of different classes differ.

    **The formula is a reconstruction.** The paper's idea is established (a squeeze-and-excitation attention
    per image, Euclidean distances within the batch, alike in a class and unlike between classes); how the two
    distances are combined is not, so several readings are offered and named.

    With attentions a_i ∈ (0, 1)^C, over pairs of different images of one class (P) and of two classes (Q)::

        pair        intra                                 inter
        "plain"     mean_P D_ij                           mean_Q D_ij,  D_ij = sqrt(|a_i - a_j|² + 1e-12) / √C
        "squared"   mean_P |a_i - a_j|² / C               mean_Q |a_i - a_j|² / C          in O(N C)
        "center"    mean_i |a_i - ā_{y_i}| / √C           mean_{k<l} |ā_k - ā_l| / √C      in O(N C + K² C)

        form          value
        "difference"  intra - inter                       in (-1, 1), bounded on both sides
        "ratio"       intra / (inter + 1e-6)              steep while all attentions coincide, as at the start
        "hinge"       max(0, margin + intra - inter)

    The term is added to a loss with a small weight (0.1; at 1 most attentions saturate). It owns no
    parameters: the attention is a part of the model. Never detach it, or only the side branch learns.

    Args:
        form: how intra and inter are combined.
        pair: which distances are taken.
        margin: only for form="hinge"; a distance on the scale of `normalize`.
        normalize: divide distances by √C (squared ones by C), so that they lie in [0, 1) for every C.

    Shapes:
        attention: (N, C) in (0, 1).
        labels: (N,) class ids, or (N, C') multi-hot (alike: a class in common; not for pair="center").
        returns: () float.

    Raises:
        ValueError: for an unknown form or pair, or shapes that do not match.

    Source: Song et al., "Channel Correlation Loss", ICPR 2020, arXiv:2010.05469, as far as it could be
    established; no code was released.
    """

    reads = "attention"
    diagnostics: Mapping[str, Tensor] = MappingProxyType({})
    """The two distances and the saturation of the last batch, for the log: a saturated sigmoid has stopped
    learning, which the loss itself does not show."""

    def __init__(
        self,
        form: Literal["difference", "ratio", "hinge"] = "difference",
        pair: Literal["plain", "squared", "center"] = "plain",
        margin: float = 0.3,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        if form not in ("difference", "ratio", "hinge"):
            raise ValueError(f'form must be "difference", "ratio" or "hinge", got {form!r}')
        if pair not in ("plain", "squared", "center"):
            raise ValueError(f'pair must be "plain", "squared" or "center", got {pair!r}')
        self.form, self.pair, self.margin, self.normalize = form, pair, margin, normalize

    def forward(self, attention: Tensor, labels: Tensor) -> Tensor:
        measured = self.measure(attention, labels)
        intra, inter, _ = measured
        self.diagnostics = {name: value.detach() for name, value in measured._asdict().items()}
        if self.form == "ratio":
            return intra / (inter + 1e-6)
        if self.form == "hinge":
            return (self.margin + intra - inter).relu()
        return intra - inter

    def measure(self, attention: Tensor, labels: Tensor) -> Correlation:
        """The two mean distances, and the share of attentions that have saturated."""
        if attention.ndim != 2 or labels.ndim not in (1, 2) or len(attention) != len(labels):
            raise ValueError(
                f"expected attention (N, C) and N labels, "
                f"got {tuple(attention.shape)} and {tuple(labels.shape)}"
            )
        with torch.autocast(attention.device.type, enabled=False):
            attention = attention if attention.dtype == torch.float64 else attention.float()
            unit = attention.shape[1] ** 0.5 if self.normalize else 1.0
            if self.pair == "center":
                intra, inter = center_distances(attention, labels)
            elif self.pair == "squared" and labels.ndim == 1:
                unit = unit**2
                intra, inter = squared_distances(attention, labels)
            else:
                squared = pairwise_squares(attention)
                if self.pair == "squared":
                    unit = unit**2
                intra, inter = means(
                    squared if self.pair == "squared" else (squared + EPSILON).sqrt(), labels
                )
            saturated = ((attention.detach() - 0.5).abs() > 0.5 - SATURATED).to(attention.dtype)
            share = saturated.mean() if saturated.numel() else saturated.sum()
            return Correlation(intra / unit, inter / unit, share)

    def extra_repr(self) -> str:
        return f"form={self.form}, pair={self.pair}, margin={self.margin}, normalize={self.normalize}"


def pairwise_squares(rows: Tensor) -> Tensor:
    """(N, N) squared Euclidean distances."""
    if len(rows) * rows.numel() <= EXPLICIT:
        return (rows[:, None] - rows[None, :]).square().sum(dim=2)
    # Distances do not change when all rows move together; near the origin the product loses least.
    rows = rows - rows.mean(dim=0, keepdim=True)
    squares = rows.square().sum(dim=1)
    return (squares[:, None] + squares[None, :] - 2 * rows @ rows.T).clamp_min(0)


def means(distances: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over pairs of different rows that share a label, and over those that do not; 0 without any."""
    alike = share_label(labels, labels)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    within, between = alike & ~itself, ~alike & ~itself
    intra = torch.where(within, distances, 0).sum() / within.sum().clamp_min(1)
    inter = torch.where(between, distances, 0).sum() / between.sum().clamp_min(1)
    return intra, inter


def class_means(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K, C) means and (K,) sizes of the classes present, and (N,) the place of each row's class there."""
    present, place = labels.unique(return_inverse=True)
    sizes = torch.bincount(place, minlength=len(present))
    sums = rows.new_zeros(len(present), rows.shape[1]).index_add(0, place, rows)
    return sums / sizes[:, None].to(rows.dtype), sizes, place


def squared_distances(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`means` of the squared distances without forming them: O(N C).

    With S_k = Σ |a_i - ā_k|² over the n_k rows of class k, the sum over its ordered pairs is 2 n_k S_k, and
    over those of two classes twice n_l S_k + n_k S_l + n_k n_l |ā_k - ā_l|². Nothing is subtracted.
    """
    centers, sizes, place = class_means(rows, labels)
    n = len(rows)
    scatter = (rows - centers[place]).square().sum(dim=1)
    own, weight = sizes[place].to(rows.dtype), sizes.to(rows.dtype)
    within = 2 * (own * scatter).sum()
    apart = (weight * (centers - rows.mean(dim=0, keepdim=True)).square().sum(dim=1)).sum()
    between = 2 * ((n - own) * scatter).sum() + 2 * n * apart
    pairs_within = (sizes * (sizes - 1)).sum()
    pairs_between = n * n - sizes.square().sum()
    # With one class the between sum is a rounding error, which the ratio would magnify.
    inter = torch.where(pairs_between > 0, between, 0) / pairs_between.clamp_min(1)
    return within / pairs_within.clamp_min(1), inter


def center_distances(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean distance of rows to their class mean, and of class means to each other."""
    if labels.ndim != 1:
        raise ValueError(
            'pair="center" needs one class per image; use "plain" or "squared" with multi-hot labels'
        )
    centers, sizes, place = class_means(rows, labels)
    # A class of one is its own mean: it says nothing about spread, and must not say sqrt(EPSILON).
    to_center = ((rows - centers[place]).square().sum(dim=1) + EPSILON).sqrt()
    intra = torch.where(sizes[place] > 1, to_center, 0).sum() / max(len(rows), 1)
    upper = torch.ones(len(centers), len(centers), dtype=torch.bool, device=rows.device).triu(1)
    between = (pairwise_squares(centers) + EPSILON).sqrt()
    return intra, torch.where(upper, between, 0).sum() / upper.sum().clamp_min(1)
