"""Squeeze-and-excitation: one weight per channel and image, read from the feature map."""

import torch
from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """How much each channel matters for each image.

    ::

        s_i = mean over H and W of X_i                (C,)    squeeze
        h_i = relu(W₁ s_i + b₁)                       (hidden,)
        a_i = sigmoid(W₂ h_i + b₂)                    (C,)    excite

    The second layer starts close to zero, so that every attention starts near 0.5, where the sigmoid is
    steepest. The squeeze is not detached: a loss on the attention reaches the trunk through it.

    Args:
        channels: C, channels of the feature map.
        reduction: r; the hidden layer has max(C // r, 4) units.

    Shapes:
        features: (N, C, H, W) feature map, or (N, C) already pooled features.
        returns: (N, C) attention, every entry in (0, 1).

    Raises:
        ValueError: for channels or reduction below 1, or features that do not have C channels.

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, arXiv:1709.01507. Its use for the channel
    correlation loss: Song et al., arXiv:2010.05469; the paper's hidden width and start are unknown, these are
    our choice.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(
                f"channels and reduction must be at least 1, got channels={channels}, reduction={reduction}"
            )
        self.channels, self.reduction = channels, reduction
        hidden = max(channels // reduction, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        nn.init.normal_(self.excite.weight, std=0.01)
        nn.init.zeros_(self.excite.bias)

    def forward(self, features: Tensor) -> Tensor:
        if features.ndim not in (2, 4) or features.shape[1] != self.channels:
            raise ValueError(
                f"expected features (N, {self.channels}, H, W) or (N, {self.channels}), "
                f"got {tuple(features.shape)}"
            )
        pooled = features.mean(dim=(2, 3)) if features.ndim == 4 else features
        return torch.sigmoid(self.excite(torch.relu(self.squeeze(pooled))))
