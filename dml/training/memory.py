"""Cross-batch memory: embeddings of past batches as further candidates."""

import math

import torch
from torch import Tensor, nn

from dml.losses.pairs import unit_rows
from dml.training.objective import Batches, Candidates, Progress


class CrossBatchMemory(nn.Module):
    """The newest unit embeddings, first in, first out, compared with every batch.

    Weights move slowly, so an embedding of some hundred steps ago is still nearly right, and a batch of 64
    sees thousands of negatives for the price of one product of matrices. While weights still move fast, old
    rows mislead: remembering starts after a share of the run.

    A remembered older copy of an anchor's own image is recognised by its id and never a pair.

    Args:
        dim: D, length of the embedding.
        size: rows kept (>= 1); about the training set's size is the published choice.
        start: share of the run's steps after which remembering begins, in [0, 1).
        classes: 0: labels are class ids; otherwise the width of multi-hot labels.

    State: buffers `embeddings` (size, D) float32, `labels` (size,) or (size, classes), `ids` (size,),
    `position` (next row to write), `filled` (rows in use), `started`. All of it survives a restart.

    Source: Wang et al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, arXiv:1912.06798. There the
    memory gets a loss term of its own; here its rows join the candidates of one loss.
    """

    embeddings: Tensor
    labels: Tensor
    ids: Tensor
    position: Tensor
    filled: Tensor
    started: Tensor

    def __init__(self, dim: int, size: int = 4096, start: float = 0.1, classes: int = 0) -> None:
        super().__init__()
        if dim < 1 or size < 1:
            raise ValueError(f"dim and size must be at least 1, got dim={dim}, size={size}")
        if not 0 <= start < 1:
            raise ValueError(f"start must be at least 0 and below 1, got {start}")
        if classes < 0:
            raise ValueError(f"classes must be at least 0, got {classes}")
        self.dim, self.size, self.start, self.classes = dim, size, start, classes
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("labels", torch.zeros((size, classes) if classes else size, dtype=torch.int64))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("started", torch.tensor(start == 0))
        self.register_load_state_dict_post_hook(lambda module, keys: module.recall())
        self.recall()

    def recall(self) -> None:
        """Read the counters into plain numbers once, so that a step on a GPU does not wait for them."""
        self._position, self._filled = int(self.position), int(self.filled)
        self._started = bool(self.started)

    def __len__(self) -> int:
        return self._filled

    def forward(self) -> Candidates | None:
        """The remembered rows, None while there are none; views, which the next `add` changes."""
        if not self._filled:
            return None
        rows = slice(0, self._filled)
        return Candidates(self.embeddings[rows], self.labels[rows], self.ids[rows])

    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Remember rows, in place of the oldest; nothing before remembering has started.

        Args:
            embeddings: (B, D); stored as unit rows, without gradient.
            labels: (B,) or (B, classes).
            ids: (B,) image ids.

        Raises:
            ValueError: shapes that do not fit this memory.
        """
        expected = (len(embeddings), self.classes) if self.classes else (len(embeddings),)
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim or tuple(labels.shape) != expected:
            raise ValueError(
                f"a memory of ({self.dim},) rows with labels {expected} got embeddings "
                f"{tuple(embeddings.shape)} and labels {tuple(labels.shape)}; set its dim and classes to fit"
            )
        if not self._started or not len(embeddings):
            return
        newest = slice(max(len(embeddings) - self.size, 0), None)
        embeddings, labels, ids = embeddings[newest], labels[newest], ids[newest]
        places = (torch.arange(len(embeddings), device=self.ids.device) + self._position) % self.size
        self.embeddings[places] = unit_rows(embeddings).to(self.embeddings.dtype)
        self.labels[places] = labels.to(self.labels.dtype)
        self.ids[places] = ids
        self._position = (self._position + len(embeddings)) % self.size
        self._filled = min(self._filled + len(embeddings), self.size)
        self.position.fill_(self._position)
        self.filled.fill_(self._filled)

    def before_epoch(self, model: nn.Module, batches: Batches, progress: Progress) -> None:
        self.follow(progress)

    def after_step(self, model: nn.Module, progress: Progress) -> None:
        self.follow(progress)

    def follow(self, progress: Progress) -> None:
        """Begin remembering once the share of steps is reached."""
        if not self._started and progress.step >= math.floor(self.start * progress.steps):
            self._started = True
            self.started.fill_(True)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, size={self.size}, start={self.start}"
