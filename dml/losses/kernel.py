"""The kernel of the pair losses: similarities by blocks of anchors, gradients by hand.

A pair loss is a function of the similarities S = X Yᵀ alone. Knowing G = ∂L/∂S, the gradients are two more
products, ∂L/∂X = G Y and ∂L/∂Y = Gᵀ X. So the forward pass takes some anchors after the others, lets the loss
turn their similarities into its value and, in place, into G, and adds up both products. Nothing of size B × N
is kept for a backward pass, and no memory grows with B × N at all.

Products want many anchors at a time, and what the loss does to the similarities between them wants few: a
dozen passes over a matrix that no cache holds would take longer than the products. So a `Panel` of them is
charged in blocks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dml.losses.pairs import Choice, IndicesTuple, Kin, Padded, Relations, check, unit_rows, within

BLOCK = {"cpu": 2**21, "cuda": 2**27}
"""Numbers in a block of similarities: on a CPU what its cache holds, on a GPU what keeps it busy."""
ANCHORS, LARGEST_PANEL = 256, 2**27
"""A panel has so many anchors even where it holds several blocks, since thin products are slow; but no more
numbers than this."""
FEW = 1 / 100
"""Up to this share of positives among the candidates, adding theirs one by one beats another product."""
TINY, HUGE = 1e-15, 1e15
"""Rows of a length beyond these are scaled first: squares of their entries would overflow or vanish."""


class Apart(NamedTuple):
    """Pairs whose gradient does not stand in the similarities, since they are averaged by themselves."""

    pairs: tuple[Tensor, Tensor]  # (rows, columns) within the block, sorted by row
    slopes: Tensor  # the derivative of `value` by each pair's similarity
    value: Tensor
    weight: Tensor | int


class Charge(NamedTuple):
    """What a block of anchors costs: the sums over all blocks of value / weight, and the same of `apart`."""

    value: Tensor  # () sum over the block
    weight: Tensor | int  # what the sum over all blocks is divided by, summed over blocks too
    apart: Apart | None = None


class Block:
    """Some anchors beside all candidates.

    Attributes:
        similarity: (b, N) cosines, which the loss overwrites with their gradient.
        positives: (b, K) candidates that share a label with their anchor and show another image.
        batch: B, anchors of all blocks.
    """

    def __init__(
        self, similarity: Tensor, rows: slice, kin: Kin, choice: Choice | None, *, batch: int
    ) -> None:
        self.similarity, self.rows, self.choice, self.batch = similarity, rows, choice, batch
        self.positives, self.excluded, self.negatives = kin

    def __len__(self) -> int:
        return len(self.similarity)

    @property
    def single(self) -> bool:
        """Whether it holds all anchors."""
        return len(self) == self.batch

    @property
    def chosen(self) -> bool:
        """Whether a miner has chosen the pairs."""
        return self.choice is not None

    def at(self, places: Padded) -> Tensor:
        """(b, K) similarities at some candidates; meaningless where there is none."""
        return self.similarity.gather(1, places.columns)

    def hide_others(self, value: float = float("-inf"), *, of: Tensor | None = None) -> Tensor:
        """Overwrite the entries of all candidates that are no negatives; in `of`, or in the similarities."""
        matrix = self.similarity if of is None else of
        matrix[self.excluded] = value
        return matrix

    def total_of_negatives(self) -> Tensor:
        """(b,) sum of the similarities with all negatives."""
        others = self.similarity[self.excluded]
        total = self.hide_others(0).sum(dim=1)
        self.similarity[self.excluded] = others
        return total

    def chosen_near(self) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the miner's positives; one that it chose twice is there twice."""
        assert self.choice is not None
        row, column = within(self.choice.near, self.rows)
        return row, column

    def chosen_far(self) -> tuple[Tensor, Tensor]:
        """(rows, columns) of the miner's negatives; one that it chose twice is there twice."""
        assert self.choice is not None
        row, column = within(self.choice.far, self.rows)
        return row, column

    def gradient(self, places: Padded, slope: Tensor) -> None:
        """Add the gradient at some candidates to what the similarities hold by now."""
        self.similarity.scatter_add_(1, places.columns, torch.where(places.there, slope, 0))


class PairLoss(nn.Module):
    """Base of the losses that compare pairs. A loss defines `charge`, and `prepare` where it needs to.

    Call: `(embeddings, labels, indices_tuple=None, ref_emb=None, ref_labels=None, *, ids=None,
    ref_ids=None)`.

    Shapes:
        embeddings: (B, D) float anchors; rows need not be unit length, they are made so.
        labels: (B,) class ids, or (B, C) multi-hot for several labels per image.
        indices_tuple: a miner's pairs (a1, p, a2, n) or triplets (a, p, n) in place of the loss's own choice.
        ref_emb: the whole candidate set, (N, D), or a sequence of such parts, of which some may want a
            gradient and others not; None: the batch itself.
        ref_labels: (N,) or (N, C), of the candidates.
        ids, ref_ids: (B,) and (N,) image ids; a candidate with the anchor's id is never its pair. Without
            them only the diagonal of the batch against itself is the same image.
        returns: () float, at least 0; computed in float32 (float64 stays), also under autocast: near 1, half
            precision knows a similarity to 5e-4 at best, which a temperature of 0.01 turns into noise.

    Memory: a panel of similarities, a gradient of the size of each input that wants one, and a copy of each
    input that is not made of unit rows in float32 already. It does not grow with B × N.

    The gradient is exact, derived by hand, and computed in the forward pass; it cannot be differentiated
    again.

    Raises:
        ValueError: shapes that do not fit together, labels of different kinds, or candidates with only one of
            ids and ref_ids.
    """

    takes = "unit"
    candidates = True
    against_memory = ""
    """Why these settings make no sense with candidates by the thousand, and what to set instead; empty: they
    do."""

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: IndicesTuple | None = None,
        ref_emb: Tensor | Sequence[Tensor] | None = None,
        ref_labels: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        ref_ids: Tensor | None = None,
    ) -> Tensor:
        check(embeddings, labels, ids, "embeddings")
        parts = as_parts(embeddings, ref_emb, ref_labels, ids, ref_ids)
        relations = Relations(labels, ref_labels if parts else None, ids, ref_ids if parts else None)
        choice = None if indices_tuple is None else Choice(indices_tuple, relations)
        if not len(embeddings) or not len(relations.ref_labels):
            return 0 * torch.cat([embeddings, *parts])[:0].to(working_type(embeddings)).sum()
        inputs = (embeddings, *parts)
        if not torch.is_grad_enabled():
            # An autograd function is still told that its inputs want gradients.
            inputs = tuple(rows.detach() for rows in inputs)
        return _Compared.apply(self, relations, choice, *inputs)  # type: ignore[no-any-return]

    def prepare(self, blocks: "Blocks") -> Any:
        """What `charge` must know of all blocks at once; None: nothing."""
        return None

    def charge(self, block: Block, known: Any) -> Charge:
        """The cost of a block; overwrites `block.similarity` with the gradient of `Charge.value`."""
        raise NotImplementedError


def as_parts(
    embeddings: Tensor,
    ref_emb: Tensor | Sequence[Tensor] | None,
    ref_labels: Tensor | None,
    ids: Tensor | None,
    ref_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    """The candidates as parts, checked; empty where the candidates are the batch itself."""
    if ref_emb is None:
        if ref_labels is not None or ref_ids is not None:
            raise ValueError("got ref_labels or ref_ids without ref_emb; candidates need all of their parts")
        return ()
    parts = (ref_emb,) if isinstance(ref_emb, Tensor) else tuple(ref_emb) or (embeddings[:0],)
    total = sum(len(part) for part in parts)
    if ref_labels is None:
        raise ValueError(f"got {total} candidates in ref_emb without ref_labels")
    for part in parts:
        if part.ndim == 2 and part.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"embeddings have {embeddings.shape[1]} columns and ref_emb {part.shape[1]}; they must agree"
            )
    shape = parts[0].shape if len(parts) == 1 else torch.Size((total, embeddings.shape[1]))
    check(torch.empty(shape, device="meta"), ref_labels, ref_ids, "ref_emb")
    if ref_emb is embeddings and ref_ids is None:
        return ()
    if (ids is None) != (ref_ids is None):
        raise ValueError("give both ids and ref_ids, or neither: an image is recognised by equal ids")
    return parts


def working_type(rows: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


class UnitRows:
    """Rows made unit length, and the way back of their gradient."""

    def __init__(self, given: Tensor, dtype: torch.dtype) -> None:
        self.given = given
        rows = given.to(dtype)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        if not bool(((length > TINY) & (length < HUGE)).all()):
            largest = rows.abs().amax(dim=1, keepdim=True)
            factor = torch.where(largest > 0, largest, 1).reciprocal()
            length = torch.linalg.vector_norm(rows * factor, dim=1, keepdim=True)
            # A row of zeros stays one, and its gradient passes as it is.
            self.inverse = torch.where(largest > 0, length.reciprocal() * factor, 1)
            self.rows = unit_rows(rows)
            return
        self.inverse = length.reciprocal()
        already = not given.requires_grad and bool(((length - 1).abs() <= 4 * torch.finfo(dtype).eps).all())
        self.rows = rows if already else rows * self.inverse

    def back(self, gradient: Tensor, scale: Tensor) -> Tensor:
        """The gradient of the given rows from that of the unit rows: (I - x̂ x̂ᵀ) g / length, times `scale`."""
        along = (gradient * self.rows).sum(dim=1, keepdim=True)
        return gradient.addcmul_(self.rows, along, value=-1).mul_(self.inverse * scale).to(self.given.dtype)


class Panel(NamedTuple):
    """The similarities of some anchors with all candidates, one product."""

    similarity: Tensor  # (h, N)
    rows: slice


class Blocks:
    """The similarities of all anchors with all candidates, block by block; computed anew each time."""

    def __init__(
        self, anchors: Tensor, candidates: Sequence[Tensor], relations: Relations, choice: Choice | None
    ) -> None:
        self.anchors, self.candidates = anchors, candidates
        self.relations, self.choice = relations, choice
        self.width = sum(len(part) for part in candidates)
        # A candidate that shares a label takes some numbers of its own beside its similarity.
        row = self.width + 8 * min(relations.widest, self.width)
        budget = BLOCK.get(anchors.device.type, BLOCK["cuda"])
        self.height = min(len(anchors), max(1, budget // row))
        self.panel_height = min(len(anchors), max(self.height, min(ANCHORS, LARGEST_PANEL // row)))

    @property
    def single(self) -> bool:
        """Whether one block holds all anchors."""
        return self.height == len(self.anchors)

    @property
    def few_positives(self) -> bool:
        """Whether no anchor has many, and no miner chose them."""
        return self.choice is None and self.relations.widest <= FEW * self.width

    def __iter__(self) -> Iterator[Block]:
        for panel in self.panels():
            yield from self.of(panel)

    def panels(self) -> Iterator[Panel]:
        """All products, one after the other in the same memory."""
        space = self.anchors.new_empty(self.panel_height, self.width)
        for rows in ranges(0, len(self.anchors), self.panel_height):
            similarity = space[: rows.stop - rows.start]
            filled = 0
            for part in self.candidates:
                target = similarity[:, filled : filled + len(part)]
                torch.mm(self.anchors[rows], part.T, out=target)
                filled += len(part)
            yield Panel(similarity, rows)

    def of(self, panel: Panel) -> Iterator[Block]:
        """The blocks of a panel."""
        start, stop = panel.rows.start, panel.rows.stop
        for rows in ranges(start, stop, self.height):
            similarity = panel.similarity[rows.start - start : rows.stop - start]
            yield Block(similarity, rows, self.relations.of(rows), self.choice, batch=len(self.anchors))


def ranges(start: int, stop: int, step: int) -> Iterator[slice]:
    """Slices of at most `step` that cover start to stop."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


class _Compared(torch.autograd.Function):
    """Value and gradients of a pair loss in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        loss: PairLoss,
        relations: Relations,
        choice: Choice | None,
        embeddings: Tensor,
        *parts: Tensor,
    ) -> Tensor:
        wanted = ctx.needs_input_grad[3:]
        with torch.autocast(embeddings.device.type, enabled=False):
            value, gradients = evaluate(loss, relations, choice, embeddings, parts, wanted)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Asked under `create_graph`. What is kept here is a constant to autograd: a gradient penalty behind a
        # network would find a graph up to here, and be wrong without a word.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the gradient of a pair loss cannot be differentiated again, and create_graph=True asks for "
                "that; write the loss in plain torch, or take the gradient without create_graph"
            )
        found = (None if g is None else g * upstream.to(g.dtype) for g in ctx.saved_tensors)
        return (None, None, None, *found)


def evaluate(
    loss: PairLoss,
    relations: Relations,
    choice: Choice | None,
    embeddings: Tensor,
    parts: Sequence[Tensor],
    wanted: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The value of a loss, and its gradient for each of (embeddings, *parts) that wants one."""
    dtype = working_type(embeddings)
    inputs = [UnitRows(given, dtype) for given in (embeddings, *parts)]
    anchors, candidates = inputs[0].rows, [unit.rows for unit in inputs[1:] or inputs]
    together, apart = Total(inputs, wanted), None
    blocks = Blocks(anchors, candidates, relations, choice)
    known = loss.prepare(blocks)
    for panel in blocks.panels():
        for block in blocks.of(panel):
            charge = loss.charge(block, known)
            together.count(charge.value, charge.weight)
            if charge.apart is not None:
                apart = apart or Total(inputs, wanted)
                apart.count(charge.apart.value, charge.apart.weight)
                apart.add_pairs(charge.apart, block.rows, anchors, candidates)
        together.add_products(panel, anchors, candidates)
    if apart is not None:
        together.join(apart)
    gradients = [
        None if total is None else unit.back(total, together.scale.to(dtype))
        for unit, total in zip(inputs, together.sums, strict=True)
    ]
    return (together.value * together.scale).to(dtype), gradients


class Total:
    """Value and weight over all blocks, and the gradient of the value by each input that wants one."""

    def __init__(self, inputs: Sequence[UnitRows], wanted: Sequence[bool]) -> None:
        self.sums = [
            torch.zeros_like(unit.rows) if want else None for unit, want in zip(inputs, wanted, strict=True)
        ]
        self.value, self.weight = torch.zeros(2, dtype=torch.float64, device=inputs[0].rows.device)

    @property
    def scale(self) -> Tensor:
        """() what value and gradients are multiplied by in the end."""
        return self.weight.clamp_min(1).reciprocal()

    def count(self, value: Tensor, weight: Tensor | int) -> None:
        """Add a block's."""
        self.value += value
        self.weight += weight

    def add_products(self, panel: Panel, anchors: Tensor, candidates: Sequence[Tensor]) -> None:
        """Add G Y to the anchors' gradient and Gᵀ X to the candidates', where they want one."""
        (gradient, rows), (to_anchors, *to_parts) = panel, self.sums
        if not to_parts and to_anchors is not None:
            if len(gradient) == len(anchors):
                # G Y + Gᵀ X is one product where both are the batch.
                to_anchors.addmm_(gradient + gradient.T, anchors)
                return
            to_anchors[rows].addmm_(gradient, anchors)
            to_anchors.addmm_(gradient.T, anchors[rows])
            return
        filled = 0
        for part, total in zip(candidates, to_parts, strict=False):
            columns = gradient[:, filled : filled + len(part)]
            filled += len(part)
            if to_anchors is not None:
                to_anchors[rows].addmm_(columns, part)
            if total is not None:
                total.addmm_(columns.T, anchors[rows])

    def add_pairs(self, apart: Apart, rows: slice, anchors: Tensor, candidates: Sequence[Tensor]) -> None:
        """As `add_products`, for pairs that are few."""
        to_anchors, *to_parts = self.sums
        row, column = apart.pairs
        row = row + rows.start
        first = 0
        for part, total in zip(candidates, to_parts or [to_anchors], strict=True):
            here = (column >= first) & (column < first + len(part)) if to_parts else slice(None)
            anchor, candidate, slopes = row[here], column[here] - first, apart.slopes[here]
            first += len(part)
            if to_anchors is not None:
                add_rows(to_anchors, anchor, part, candidate, slopes)
            if total is not None:
                order = candidate.argsort(stable=True)
                add_rows(total, candidate[order], anchors, anchor[order], slopes[order])

    def join(self, other: "Total") -> None:
        """Become the sum of both quotients, value / weight."""
        ratio = other.scale / self.scale
        self.value += other.value * ratio
        for total, more in zip(self.sums, other.sums, strict=True):
            if total is not None and more is not None:
                total.addcmul_(more, ratio.to(more.dtype))


def add_rows(total: Tensor, row: Tensor, source: Tensor, column: Tensor, factor: Tensor) -> None:
    """total[row] += factor source[column]; `row` ascending, so that equal ones are summed first."""
    if not len(row):
        return
    some, count = row.unique_consecutive(return_counts=True)
    total[some] += functional.embedding_bag(
        column, source, count.cumsum(0) - count, mode="sum", per_sample_weights=factor
    )


def drop_below(similarity: Tensor, floor: Tensor) -> Tensor:
    """Overwrite what is not above its row's floor, (b,), with -inf; what stays may change in its last digit.

    Three passes that compute are quicker than one that compares and one that fills.
    """
    low = floor.clamp_max(2)[:, None]
    return functional.threshold(similarity.sub_(low), 0, float("-inf"), inplace=True).add_(low)


def soft_total(similarity: Tensor, *, center: float, scale: float, largest: Tensor) -> tuple[Tensor, Tensor]:
    """log(1 + Σ exp(u)) of each row, with u = scale (s - center), and the way to its derivatives.

    Args:
        similarity: (b, K); -inf (for a negative scale: inf) where there is nothing to count. Overwritten.
        largest: (b,) of u in each row, or anything nearly as large; what keeps exp() from overflowing.

    Returns:
        (b,) values, 0 for a row without entries, and (b,) factors: the derivative by u is what `similarity`
        holds by now, times the factor of its row.
    """
    shift = largest.clamp_min(0)
    start = -scale * center - shift
    exponents = torch.add(start[:, None], similarity, alpha=scale, out=similarity)
    # What exp() gives as hardly a normal number is nothing beside 1. Denormal ones cost twenty times as much,
    # and exp(-inf) three times.
    tiny = torch.finfo(similarity.dtype).tiny
    odds = functional.threshold(exponents, math.log(2 * tiny), math.log(2 * tiny), inplace=True).exp_()
    functional.threshold(odds, 4 * tiny, 0, inplace=True)
    total = odds.sum(dim=1).add_((-shift).exp())
    return total.log().add_(shift), total.reciprocal_()


def distance(similarity: Tensor) -> Tensor:
    """Euclidean distance of unit vectors from their cosine, sqrt(2 - 2s), in [0, 2].

    Below the rounding error of the similarity it is exactly 0: there the square root is infinitely steep and
    its value is noise. -inf, which is no similarity, is infinitely far.
    """
    squared = 2 - 2 * similarity
    return torch.where(squared > 16 * torch.finfo(similarity.dtype).eps, squared.clamp_min_(0), 0).sqrt_()


def distance_slope(distances: Tensor) -> Tensor:
    """Derivative of `distance` by the similarity, -1 / d; 0 where the distance is 0."""
    return torch.where(distances > 0, -distances.reciprocal(), 0)
