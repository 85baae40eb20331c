"""Random changes to training pictures: what may differ between two photos of one thing."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml.config import Part
from dml.errors import ConfigError
from dml.registry import resolve

AUGMENTATIONS: dict[str, str] = {
    "none": "dml.data.augment:Unchanged",
    "standard": "dml.data.augment:Standard",
}


class Augmentation(Protocol):
    """The same changes in two forms: for a whole batch kept in memory, and for one decoded picture."""

    def on_batch(
        self,
        pictures: Tensor,
        aspect: Tensor,
        size: int,
        generator: torch.Generator,
        part: slice = slice(None),
    ) -> Tensor:
        """Change and cut a batch.

        Args:
            pictures: (B, C, H, W) uint8, whole pictures squeezed into a square.
            aspect: (G,) width / height of each picture of the whole batch before it was squeezed.
            size: side of the result in pixels.
            generator: source of all randomness, on the CPU.
            part: which B of the whole batch's G rows `pictures` are, where several processes share it; what
                is drawn for a row must not depend on it. Without this argument whole batches are given, and
                cut afterwards.

        Returns:
            (B, C, size, size) float32 in [0, 1].
        """
        ...

    def on_picture(self, size: int, *, squash: bool) -> nn.Module:
        """A torchvision transform from a uint8 (C, H, W) picture to float32 (C, size, size) in [0, 1].

        Args:
            squash: ignore the proportions of the picture.
        """
        ...


@dataclass(frozen=True)
class Standard:
    """Random resized crop, mirror image, rotation and mild changes of brightness, contrast and saturation."""

    scale: tuple[float, float] = (0.4, 1.0)
    """Share of the middle square's area that the crop covers."""
    ratio: tuple[float, float] = (0.8, 1.25)
    """Width / height of the crop before it becomes square."""
    flip: float = 0.5
    """Probability of mirroring left and right; 0 where sides have a meaning (letters, shoes of a pair)."""
    rotation: float = 0.0
    """Largest turn to either side, in degrees."""
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    """Each factor is drawn from [1 - x, 1 + x]."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the area, 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be 0 < low <= high, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation must be 0 to 180 degrees, got {self.rotation}")

    def on_batch(
        self,
        pictures: Tensor,
        aspect: Tensor,
        size: int,
        generator: torch.Generator,
        part: slice = slice(None),
    ) -> Tensor:
        theta = self._views(aspect.cpu(), generator)
        factors = 1 + (2 * torch.rand(3, len(aspect), generator=generator) - 1) * torch.tensor(
            [[self.brightness], [self.contrast], [self.saturation]]
        )
        cut = view(pictures, theta[part].to(pictures.device), size)
        return jitter(cut, *factors[:, part].to(pictures.device))

    def _views(self, aspect: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 2, 3) affine maps from the square of the result, [-1, 1]², into that of the stored picture.

        Lengths are counted in sides of the middle square: the picture is `wide` x `high` of them, one of the
            two is 1.
        """
        count = len(aspect)
        share, shape, x, y, mirror, turn = torch.rand(6, count, generator=generator)
        side = (self.scale[0] + share * (self.scale[1] - self.scale[0])).sqrt()
        low, high_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
        stretch = (low + shape * (high_ratio - low)).exp().sqrt()
        wide, high = aspect.clamp(min=1), (1 / aspect).clamp(min=1)
        width, height = torch.minimum(side * stretch, wide), torch.minimum(side / stretch, high)
        centre_x, centre_y = (2 * x - 1) * (wide - width), (2 * y - 1) * (high - height)
        angle = (2 * turn - 1) * math.radians(self.rotation)
        sign = torch.where(mirror < self.flip, -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        rows = [
            torch.stack([sign * width * cos / wide, -height * sin / wide, centre_x / wide], dim=1),
            torch.stack([sign * width * sin / high, height * cos / high, centre_y / high], dim=1),
        ]
        return torch.stack(rows, dim=1)

    def on_picture(self, size: int, *, squash: bool) -> nn.Module:
        from torchvision.transforms import v2

        steps: list[nn.Module] = [v2.RandomRotation([-self.rotation, self.rotation])] if self.rotation else []
        # torchvision counts the share from the whole picture, the batch form from its middle square: for wide
        # pictures the first one shows a little more.
        steps += [v2.Resize((size * 8 // 7, size * 8 // 7), antialias=True)] if squash else []
        steps += [
            v2.RandomResizedCrop(size, scale=self.scale, ratio=self.ratio, antialias=True),
            v2.RandomHorizontalFlip(self.flip),
            v2.ToDtype(torch.float32, scale=True),
            v2.ColorJitter(self.brightness, self.contrast, self.saturation),
        ]
        return v2.Compose(steps)


@dataclass(frozen=True)
class Unchanged:
    """The middle square, with no randomness: for checks, and for sets that are augmented already."""

    def on_batch(
        self,
        pictures: Tensor,
        aspect: Tensor,
        size: int,
        generator: torch.Generator,
        part: slice = slice(None),
    ) -> Tensor:
        aspect = aspect[part]
        theta = torch.zeros(len(aspect), 2, 3)
        theta[:, 0, 0] = (1 / aspect).clamp(max=1)
        theta[:, 1, 1] = aspect.clamp(max=1)
        return view(pictures, theta.to(pictures.device), size)

    def on_picture(self, size: int, *, squash: bool) -> nn.Module:
        from torchvision.transforms import v2

        first = v2.Resize((size, size), antialias=True) if squash else v2.Resize(size, antialias=True)
        return v2.Compose([first, v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True)])


def view(pictures: Tensor, theta: Tensor, size: int) -> Tensor:
    """Cut one affine view of every picture: (B, C, H, W) uint8 and (B, 2, 3) maps to (B, C, size, size) in
    [0, 1]."""
    grid = F.affine_grid(theta, [len(pictures), pictures.shape[1], size, size], align_corners=False)
    values = pictures.to(torch.float32) / 255
    return F.grid_sample(values, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def jitter(pictures: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Scale brightness, the distance from the mean grey, and the distance from each pixel's grey, by (B,)
    factors."""

    def shape(factor: Tensor) -> Tensor:
        return factor[:, None, None, None]

    bright = pictures * shape(brightness)
    grey = luminance(bright)
    middle = grey.mean(dim=(1, 2, 3), keepdim=True)
    # Contrast and saturation are linear in the picture, its grey and its mean grey: one pass instead of two.
    contrasted_grey = middle + (grey - middle) * shape(contrast)
    contrasted = middle + (bright - middle) * shape(contrast)
    return (contrasted_grey + (contrasted - contrasted_grey) * shape(saturation)).clamp_(0, 1)


def luminance(pictures: Tensor) -> Tensor:
    """(B, 1, H, W) grey of RGB pictures (ITU-R 601 weights); grey ones are returned as they are."""
    if pictures.shape[1] == 1:
        return pictures
    weights = torch.tensor([0.299, 0.587, 0.114], device=pictures.device)
    return (pictures * weights[:, None, None]).sum(dim=1, keepdim=True)


def build_augmentation(part: Part) -> Augmentation:
    """The augmentation of a recipe.

    Raises:
        ConfigError: an unknown name, or arguments that it does not take.
    """
    make = resolve("augmentation", part.name, AUGMENTATIONS)
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in part.args.items()}
    try:
        return make(**args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.augmentation ({part.name}): {error}") from error
