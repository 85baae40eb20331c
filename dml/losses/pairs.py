"""Who is positive, who is negative, and who is no pair at all.

A candidate with the anchor's id is never its pair, neither in mining nor in the sum. That one rule covers the
pair of an image with itself, its own synthetic copies, a memory's older copy of it, rows gathered from other
processes, and repeated rows of a batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IndicesTuple = tuple[Tensor, ...]
"""A miner's choice: (anchors, positives, anchors, negatives) of pairs, or (anchors, positives, negatives)."""


def relate(
    labels: Tensor, ref_labels: Tensor | None, ids: Tensor | None, ref_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Who is positive, negative, or the same image: (B, N) bools. Without ref_labels: the batch itself."""
    alone = ref_labels is None
    same_label = share_label(labels, labels if ref_labels is None else ref_labels)
    ref_ids = ids if alone else ref_ids
    if ids is not None and ref_ids is not None:
        same_image = ids[:, None] == ref_ids[None, :]
    elif alone:
        same_image = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    else:
        same_image = torch.zeros_like(same_label)
    return same_label & ~same_image, ~same_label & ~same_image, same_image


def check(embeddings: Tensor, labels: Tensor, ids: Tensor | None, name: str) -> None:
    """Refuse rows, labels and ids that do not belong together."""
    if embeddings.ndim != 2 or labels.ndim not in (1, 2) or len(embeddings) != len(labels):
        raise ValueError(
            f"expected {name} (B, D) and B labels, class ids (B,) or multi-hot (B, C), "
            f"got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
        )
    if ids is not None and ids.shape != (len(embeddings),):
        raise ValueError(f"expected one id per row of {name}, ({len(embeddings)},), got {tuple(ids.shape)}")


def share_label(left: Tensor, right: Tensor) -> Tensor:
    """(B, N) bool: equal class ids (1-D labels), or at least one class in common (multi-hot)."""
    one_kind(left, right)
    if left.ndim == 1:
        return left[:, None] == right[None, :]
    return (left.float() @ right.float().T) > 0


def one_kind(left: Tensor, right: Tensor) -> None:
    """Refuse to compare class ids with multi-hot labels."""
    if left.ndim != right.ndim:
        raise ValueError(
            f"expected labels of one kind, class ids (N,) or multi-hot (N, C), "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their length, in float32 or float64; rows of zeros stay zero, with a finite gradient.

    The largest entry is divided out first, so that no length overflows or vanishes. A unit vector does not
    depend on its row's scale, so the gradient is exact with that factor held constant.
    """
    rows = rows if rows.dtype == torch.float64 else rows.float()
    largest = rows.detach().abs().amax(dim=1, keepdim=True)
    scaled = rows / torch.where(largest > 0, largest, 1)
    length = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    return scaled / torch.where(largest > 0, length, 1)


class Padded(NamedTuple):
    """For every anchor of a block some candidates, in rows of equal length."""

    columns: Tensor  # (b, K) numbers of candidates; anything where there is none
    there: Tensor  # (b, K) bool


class EqualKeys:
    """For every anchor the candidates with an equal key, found by sorting instead of comparing all with all.

    Args:
        keys: (B,) integers.
        ref_keys: (N,) integers, N >= 1.
    """

    def __init__(self, keys: Tensor, ref_keys: Tensor) -> None:
        ordered, self.order = ref_keys.sort(stable=True)
        keys = keys.contiguous()
        self.first = torch.searchsorted(ordered, keys)
        self.count = torch.searchsorted(ordered, keys, right=True) - self.first

    def of(self, rows: slice) -> Padded:
        """The candidates of the anchors `rows`, in ascending order."""
        first, count = self.first[rows, None], self.count[rows, None]
        place = torch.arange(int(count.max()), device=count.device)
        return Padded(self.order[(first + place).clamp_max(len(self.order) - 1)], place < count)


def padded(mask: Tensor) -> Padded:
    """The columns of a (b, N) mask that are True, row by row."""
    row, column = mask.nonzero(as_tuple=True)
    count = mask.sum(dim=1)
    place = torch.arange(len(row), device=mask.device) - (count.cumsum(0) - count)[row]
    columns = row.new_zeros(len(mask), int(count.max()))
    columns[row, place] = column
    return Padded(columns, torch.arange(columns.shape[1], device=mask.device) < count[:, None])


class Kin(NamedTuple):
    """What a block of anchors must know about its candidates besides their similarities."""

    positive: Padded  # share a label, and are not the same image
    excluded: tuple[Tensor, Tensor]  # (row, column) of every candidate that is no negative
    negatives: Tensor  # (b,) how many negatives there are


class Relations:
    """Positives and non-negatives of any block of anchors, without a (B, N) mask where labels are class ids.

    Args:
        labels: (B,) class ids, or (B, C) multi-hot.
        ref_labels: of the N >= 1 candidates; None: the batch itself.
        ids, ref_ids: (B,) and (N,) image ids. Without them only the diagonal of the batch against itself is
            the same image.
    """

    def __init__(
        self, labels: Tensor, ref_labels: Tensor | None, ids: Tensor | None, ref_ids: Tensor | None
    ) -> None:
        self.alone = ref_labels is None
        self.labels, self.ref_labels = labels, labels if ref_labels is None else ref_labels
        one_kind(self.labels, self.ref_labels)
        self.ids, self.ref_ids = ids, ids if self.alone else ref_ids
        self.by_label = EqualKeys(self.labels, self.ref_labels) if labels.ndim == 1 else None
        self.by_id = None
        if self.ids is not None and self.ref_ids is not None:
            self.by_id = EqualKeys(self.ids, self.ref_ids)

    @property
    def widest(self) -> int:
        """The most candidates that share a label with one anchor."""
        return len(self.ref_labels) if self.by_label is None else int(self.by_label.count.max())

    def same_image(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether anchors and candidates, given by their numbers, show the same image."""
        if self.ids is not None and self.ref_ids is not None:
            return self.ids[rows] == self.ref_ids[columns]
        return rows == columns if self.alone else torch.zeros_like(rows == columns)

    def of(self, rows: slice) -> Kin:
        """Positives and non-negatives of the anchors `rows`."""
        anchors = torch.arange(rows.start, rows.stop, device=self.labels.device)[:, None]
        alike = self.share_label_with(rows)
        twin = self.twins(rows, anchors)
        positive = alike.there & ~self.same_image(anchors, alike.columns)
        stranger = twin.there & ~self.share_label_at(anchors, twin.columns)
        excluded = [
            (row, columns[row, place])
            for columns, there in (alike, Padded(twin.columns, stranger))
            for row, place in [there.nonzero(as_tuple=True)]
        ]
        row, column = (torch.cat(parts) for parts in zip(*excluded, strict=True))
        lost = alike.there.sum(dim=1) + stranger.sum(dim=1)
        return Kin(Padded(alike.columns, positive), (row, column), len(self.ref_labels) - lost)

    def share_label_with(self, rows: slice) -> Padded:
        """The candidates that share a label with each anchor, the same image among them."""
        if self.by_label is not None:
            return self.by_label.of(rows)
        return padded(share_label(self.labels[rows], self.ref_labels))

    def twins(self, rows: slice, anchors: Tensor) -> Padded:
        """The candidates that show the same image as each anchor."""
        if self.by_id is not None:
            return self.by_id.of(rows)
        itself = anchors if self.alone else anchors[:, :0]
        return Padded(itself, torch.ones_like(itself, dtype=torch.bool))

    def share_label_at(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether anchors and candidates, given by their numbers, share a label."""
        left, right = self.labels[rows], self.ref_labels[columns]
        return left == right if self.labels.ndim == 1 else ((left > 0) & (right > 0)).any(dim=-1)


class Choice:
    """A miner's pairs and triplets, by blocks of anchors; the same image is never a pair.

    Args:
        indices_tuple: (anchors, positives, anchors, negatives) or (anchors, positives, negatives).
        relations: of the batch and its candidates.

    Raises:
        ValueError: another number of tensors.
    """

    def __init__(self, indices_tuple: IndicesTuple, relations: Relations) -> None:
        self.relations, self.indices = relations, indices_tuple
        if len(indices_tuple) == 3:
            anchors, positives, negatives = indices_tuple
            others = anchors
        elif len(indices_tuple) == 4:
            anchors, positives, others, negatives = indices_tuple
        else:
            raise ValueError(
                f"expected indices_tuple to be pairs (a1, p, a2, n) or triplets (a, p, n), "
                f"got {len(indices_tuple)} tensors"
            )
        self.near, self.far = self.apart(anchors, positives), self.apart(others, negatives)

    def apart(self, rows: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        """The entries whose columns are all other images than their row, sorted by row."""
        keep = torch.ones_like(rows, dtype=torch.bool)
        for column in columns:
            keep &= ~self.relations.same_image(rows, column)
        rows, order = rows[keep].sort(stable=True)
        return (rows, *(column[keep][order] for column in columns))

    def triplets(self) -> tuple[Tensor, ...]:
        """(anchors, positives, negatives), sorted by anchor; pairs are joined to all their triplets."""
        if len(self.indices) == 3:
            return self.apart(*self.indices)
        (first, near), (second, far) = self.near, self.far
        start, stop = torch.searchsorted(second, first), torch.searchsorted(second, first, right=True)
        left = torch.arange(len(first), device=first.device).repeat_interleave(stop - start)
        before = (stop - start).cumsum(0) - (stop - start)
        right = torch.arange(len(left), device=first.device) - before[left] + start[left]
        return first[left], near[left], far[right]


def within(entries: tuple[Tensor, ...], rows: slice) -> tuple[Tensor, ...]:
    """The entries whose row lies in a block of anchors, with rows counted from the block's first."""
    first = entries[0]
    start, stop = torch.searchsorted(first, torch.tensor([rows.start, rows.stop], device=first.device))
    return (first[start:stop] - rows.start, *(column[start:stop] for column in entries[1:]))
