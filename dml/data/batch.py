"""What one training step sees."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A batch of images (or of vectors). Methods use the fields they need."""

    ids: Tensor  # (B,) int64, position in the training set
    inputs: Tensor  # (B, 3, H, W) float images, or (B, D) vectors for reduction
    labels: Tensor | None = None  # (B,) int64 class ids, or (B, C) multi-hot
    partners: Tensor | None = None  # (B, ...) second view, neighbour, or caption tokens
    labelled: Tensor | None = None  # (B,) bool, when only some labels are known

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{k: v.to(device, non_blocking=True) for k, v in moved.items() if v is not None}
        )
