"""Cross entropy on a linear classifier: the classification baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dml.losses.pairs import IndicesTuple, check


class CrossEntropyLoss(nn.Module):
    """Minus the log softmax probability of the right class, from a linear classifier that the loss owns.

    ::

        z_i = W x_i + b            L = mean_i ( logsumexp(z_i) - z_{i, y_i} )

    x is the raw embedding, before its length is made 1. The normalised variant is "normalized_softmax".

    Args:
        num_classes: K, classes of the training set.
        embedding_size: D.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1).

    Shapes:
        embeddings: (B, D) float, raw.
        labels: (B,) class ids below K.
        returns: () float, at least 0; 0 for an empty batch.

    Raises:
        ValueError: for settings out of range, multi-hot labels, or candidates: a classifier compares with its
            own weights, so give synthetic rows as samples.
    """

    takes = "raw"
    candidates = False

    def __init__(self, num_classes: int, embedding_size: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        if num_classes < 1 or embedding_size < 1:
            raise ValueError(
                f"num_classes and embedding_size must be at least 1, got {num_classes} and {embedding_size}"
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and below 1, got {label_smoothing}")
        self.classifier = nn.Linear(embedding_size, num_classes)
        self.label_smoothing = label_smoothing

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
        check(embeddings, labels, ids, "embeddings")
        if labels.ndim != 1:
            raise ValueError(f"expected one class id per image, (B,), got labels {tuple(labels.shape)}")
        if ref_emb is not None and ref_emb is not embeddings:
            raise ValueError("cross entropy compares with its own weights and takes no candidates (ref_emb)")
        with torch.autocast(embeddings.device.type, enabled=False):
            logits = self.classifier(embeddings.to(self.classifier.weight.dtype))
            total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        return total / max(len(labels), 1)
