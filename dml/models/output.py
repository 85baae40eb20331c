"""What a model returns."""

from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True)
class Output:
    """Embeddings of a batch, before and after normalisation."""

    raw: Tensor  # (B, D) the head's output; synthesis and classification work on it
    unit: Tensor  # (B, D) raw / ‖raw‖; pair losses and retrieval work on it
    features: Tensor | None = None  # (B, C, H, W) feature map of the trunk, when asked for
    attention: Tensor | None = None  # (B, C) channel attention in (0, 1), when the model has one

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: Tensor) -> "Output":
        """The same for some rows (a bool mask or indices)."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: part[rows] for name, part in parts.items() if part is not None})
