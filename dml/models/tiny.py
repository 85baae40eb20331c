"""A small residual net for small pictures: quick to train on a CPU, good enough to be useful."""

import torch
from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias (BatchNorm has one) and its BatchNorm."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), the basic block of a ResNet.

    A block that halves the map averages 2 x 2 pixels on its shortcut instead of dropping three of four
    (ResNet-D).
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *conv_norm(inputs, outputs, stride=stride), nn.ReLU(inplace=True), *conv_norm(outputs, outputs)
        )
        shortcut: list[nn.Module] = []
        if stride > 1:
            shortcut.append(nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False))
        if inputs != outputs:
            shortcut += conv_norm(inputs, outputs, kernel=1)
        self.shortcut = nn.Sequential(*shortcut)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.shortcut(x) + self.residual(x))


class TinyTrunk(nn.Module):
    """Pictures (N, 3, S, S) to a feature map (N, widths[-1], S / r, S / r).

    A stem that divides the side by `stem_stride`, then one stage of residual blocks per width, each but the
    first halving the map. Weights start Kaiming-normal (fan out), as in a ResNet trained from scratch.

    Args:
        image_size: S in pixels; it only chooses the stem's stride, so that the first stage works on a map of
            about 16 x 16: 2 below 64 px, 4 below 160 px, else 8.
        widths: channels of the stages.
        blocks: residual blocks of each stage.
        stem_stride: 1, 2, 4 or 8, instead of the choice by image_size.

    Raises:
        ValueError: for widths and blocks of different lengths, or another stem_stride.

    Source: He et al., "Deep Residual Learning", CVPR 2016, arXiv:1512.03385; the shortcut of He et al., "Bag
    of Tricks", CVPR 2019, arXiv:1812.01187.
    """

    mean = (0.5, 0.5, 0.5)
    std = (0.5, 0.5, 0.5)

    def __init__(
        self,
        image_size: int = 64,
        *,
        widths: tuple[int, ...] = (48, 96, 160),
        blocks: tuple[int, ...] = (1, 1, 1),
        stem_stride: int | None = None,
    ) -> None:
        super().__init__()
        if len(widths) != len(blocks) or not widths:
            raise ValueError(f"widths and blocks must be of the same length, got {widths} and {blocks}")
        if stem_stride is None:
            stem_stride = 2 if image_size < 64 else 4 if image_size < 160 else 8
        if stem_stride not in (1, 2, 4, 8):
            raise ValueError(f"stem_stride must be 1, 2, 4 or 8, got {stem_stride}")
        self.channels = widths[-1]
        first = widths[0]
        stem: list[nn.Module] = [*conv_norm(3, first // 2, stride=min(stem_stride, 2)), nn.ReLU(inplace=True)]
        stem += [*conv_norm(first // 2, first, stride=2 if stem_stride >= 4 else 1), nn.ReLU(inplace=True)]
        if stem_stride == 8:
            stem.append(nn.MaxPool2d(3, stride=2, padding=1))
        stages: list[nn.Module] = []
        inputs = first
        for stage, (width, depth) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(depth):
                stages.append(Block(inputs, width, stride=2 if stage and not block else 1))
                inputs = width
        self.stem = nn.Sequential(*stem)
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        # Channels-last convolutions are a quarter faster on CPUs, whatever the layout of the pictures that
        # come in.
        return self.stages(self.stem(x.contiguous(memory_format=torch.channels_last)))
