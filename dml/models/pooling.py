"""From a feature map (N, C, H, W) to one vector (N, C)."""

import torch
from torch import Tensor, nn


class AveragePooling(nn.Module):
    """The mean over all positions."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3))


class MaxPooling(nn.Module):
    """The largest value over all positions."""

    def forward(self, features: Tensor) -> Tensor:
        return features.amax(dim=(2, 3))


class SumPooling(nn.Module):
    """Mean plus maximum, as IAA and many retrieval recipes use it."""

    def forward(self, features: Tensor) -> Tensor:
        return features.mean(dim=(2, 3)) + features.amax(dim=(2, 3))


class GeneralizedMeanPooling(nn.Module):
    """The generalised mean, between average (p = 1) and maximum (p → ∞), with p learned.

    ::

        GeM(x)_c = (mean over positions of max(x_c, ε)^p)^(1/p)

    Computed in float32 whatever the precision of the features: powers overflow quickly below it. Values below
        ε count
    as ε, so features should be mostly positive (after a ReLU).

    Args:
        p: where the exponent starts (> 0).
        eps: ε, the smallest value that is raised to a power (> 0).

    Raises:
        ValueError: for p or eps that are not positive.

    Source: Radenović et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", TPAMI 2019,
    arXiv:1711.02512, eq. 2.
    """

    def __init__(self, *, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        if p <= 0 or eps <= 0:
            raise ValueError(f"p and eps must be positive, got p={p}, eps={eps}")
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        powers = features.float().clamp(min=self.eps).pow(self.p)
        return powers.mean(dim=(2, 3)).pow(1 / self.p)


POOLINGS: dict[str, type[nn.Module]] = {
    "avg": AveragePooling,
    "max": MaxPooling,
    "avg+max": SumPooling,
    "gem": GeneralizedMeanPooling,
}
