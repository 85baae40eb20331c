"""Forward and backward of the pair losses: ours, the plain vectorised form, other libraries, and the limit.

The limit of B anchors and N candidates is what every exact method on dense matrices does: the similarities
``S = X Yᵀ``, one pass over them in place (``G = max(S, 0)``), and the products back, ``∂X = G Y`` and
``∂Y = Gᵀ X``, in plain torch. Where X and Y are the same rows, both products are needed as well, unless
``G + Gᵀ`` is formed first: that way is a row of its own.
"""

import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dml import losses
from eval.speed import rivals
from eval.speed.peak import extra_memory
from eval.speed.race import Disagreement, Timing, machine, race

TOLERANCE = 1e-3
"""Largest difference of values and gradients, relative to the largest of ours; float32 and temperatures of
0.01 leave about a hundredth of it."""
SMALL = 64
"""Rows of the small call that comes before memory is measured."""


@dataclass(frozen=True)
class Case:
    """The size of what is compared."""

    batch: int  # B
    dim: int  # D
    copies: int = 0  # synthetic rows of each, as intra-class augmentation makes them: N = (1 + copies) B


class Inputs(NamedTuple):
    """Unit embeddings of four images a class, their labels and ids, and the noise of their copies."""

    embeddings: Tensor  # (B, D)
    labels: Tensor  # (B,)
    ids: Tensor  # (B,)
    noise: Tensor  # (copies B, D)

    def candidates(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) rows, labels and ids of the batch and its copies, through which the gradient passes."""
        if not len(self.noise):
            return x, self.labels, self.ids
        copies = len(self.noise) // len(x)
        rows = torch.cat([x, x.repeat(copies, 1) + self.noise])
        return rows, self.labels.repeat(copies + 1), self.ids.repeat(copies + 1)


LossOf = Callable[[Tensor, Inputs], Tensor]


class Contender(NamedTuple):
    """One way to compute a loss."""

    loss_of: LossOf
    against: LossOf | None = None  # ours with the same definition, where it is not the first of the group
    compiled: bool = False


def inputs(case: Case, seed: int = 0) -> Inputs:
    """Classes whose centres lie in few dimensions: many of them are neighbours, as in training, so that
    mining keeps a few in a hundred negatives instead of none."""
    generator = torch.Generator().manual_seed(seed)
    classes = max(1, case.batch // 4)
    centers = torch.zeros(classes, case.dim)
    near = min(6, case.dim)
    centers[:, :near] = torch.randn(classes, near, generator=generator) / math.sqrt(near)
    labels = torch.arange(case.batch) % classes
    rows = centers[labels] + torch.randn(case.batch, case.dim, generator=generator) * (
        0.6 / math.sqrt(case.dim)
    )
    noise = torch.randn(case.copies * case.batch, case.dim, generator=generator)
    return Inputs(
        torch.nn.functional.normalize(rows),
        labels,
        torch.arange(case.batch),
        noise * (0.4 / math.sqrt(case.dim)),
    )


def ours(loss: torch.nn.Module) -> LossOf:
    """Our loss on the batch, or on the batch and its copies."""

    def loss_of(x: Tensor, given: Inputs) -> Tensor:
        if not len(given.noise):
            return loss(x, given.labels, ids=given.ids)
        rows, labels, ids = given.candidates(x)
        return loss(x, given.labels, None, rows, labels, ids=given.ids, ref_ids=ids)

    return loss_of


def plain(function: Callable[..., Tensor], **settings: Any) -> LossOf:
    """A form of `rivals`."""
    return lambda x, given: function(x, given.labels, given.ids, *given.candidates(x), **settings)


def compiled(function: Callable[..., Tensor]) -> LossOf:
    """The same under torch.compile."""
    fast = torch.compile(function, dynamic=False)
    return lambda x, given: fast(x, given.labels, given.ids, *given.candidates(x))


def library(loss: Any, miner: Any = None) -> LossOf:
    """pytorch-metric-learning's way: a miner first, where there is one. Candidates have no ids there."""

    def loss_of(x: Tensor, given: Inputs) -> Tensor:
        if len(given.noise):
            rows, labels, _ = given.candidates(x)
            chosen = None if miner is None else miner(x.detach(), given.labels, rows.detach(), labels)
            return loss(x, given.labels, chosen, rows, labels)
        chosen = None if miner is None else miner(x.detach(), given.labels)
        return loss(x, given.labels, chosen)

    return loss_of


def without_ids(loss: Any) -> LossOf:
    """Our loss as that library sees the candidates: a copy is another image."""
    return lambda x, given: loss(x, given.labels, None, *given.candidates(x)[:2])


def with_miner(loss: Any, miner: Any) -> LossOf:
    """Our loss on the pairs that another library's miner chose."""
    return lambda x, given: loss(x, given.labels, miner(x.detach(), given.labels))


@cache
def groups(*, loop: bool = False, compile_too: bool = False) -> Mapping[str, Mapping[str, Contender]]:
    """Definition -> name -> contender; ours is the first of each."""
    found: dict[str, dict[str, Contender]] = {}
    cosine = losses.ContrastiveLoss(0.8, 0.5, "cosine")
    semihard = losses.TripletLoss(mining="semihard")
    pairs = losses.MultiSimilarityLoss(epsilon=None)
    found["contrastive, euclidean"] = {
        "dml": Contender(ours(losses.ContrastiveLoss())),
        "vectorised": Contender(plain(rivals.contrastive, measure="euclidean")),
    }
    found["contrastive, cosine"] = {
        "dml": Contender(ours(cosine)),
        "vectorised": Contender(plain(rivals.contrastive, measure="cosine")),
    }
    found["triplet, hardest"] = {
        "dml": Contender(ours(losses.TripletLoss(mining="hardest"))),
        "vectorised": Contender(plain(rivals.triplet_hardest)),
    }
    found["triplet, semihard"] = {"dml": Contender(ours(semihard))}
    found["Multi-Similarity, all pairs"] = {"dml": Contender(ours(pairs))}
    for name, loss, form, slow in (
        (
            "Multi-Similarity",
            losses.MultiSimilarityLoss(),
            rivals.multi_similarity,
            rivals.multi_similarity_loop,
        ),
        (
            "CBML",
            losses.ContrastiveBayesianLoss(),
            rivals.contrastive_bayesian,
            rivals.contrastive_bayesian_loop,
        ),
    ):
        rows = {"dml": Contender(ours(loss)), "vectorised": Contender(plain(form))}
        if compile_too:
            rows["vectorised, torch.compile"] = Contender(compiled(form), compiled=True)
        found[f"{name} + IAA"] = dict(rows)
        if loop:
            rows["loop over anchors"] = Contender(plain(slow))
        found[name] = rows
    add_library(found, pairs)
    return found


def add_library(found: dict[str, dict[str, Contender]], pairs: torch.nn.Module) -> None:
    """pytorch-metric-learning's nearest to each definition, where it is installed."""
    if importlib.util.find_spec("pytorch_metric_learning") is None:
        return
    from pytorch_metric_learning import distances, miners
    from pytorch_metric_learning import losses as theirs

    name = "pytorch-metric-learning"
    similarity = theirs.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    mining = miners.MultiSimilarityMiner(epsilon=0.1)
    triplets, hard = theirs.TripletMarginLoss(margin=0.05), miners.BatchHardMiner()
    found["contrastive, euclidean"][name] = Contender(library(theirs.ContrastiveLoss()))
    margins: dict[str, Any] = {"pos_margin": 0.8, "neg_margin": 0.5}
    by_cosine = theirs.ContrastiveLoss(**margins, distance=distances.CosineSimilarity())
    found["contrastive, cosine"][name] = Contender(library(by_cosine))
    found["triplet, hardest"][f"{name}, batch-hard"] = Contender(
        library(triplets, hard), against=with_miner(losses.TripletLoss(), hard)
    )
    window = miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard")
    found["triplet, semihard"][name] = Contender(library(triplets, window))
    found["Multi-Similarity, all pairs"][name] = Contender(library(similarity))
    found["Multi-Similarity"][f"{name} + miner"] = Contender(library(similarity, mining))
    found["Multi-Similarity + IAA"][f"{name}, all pairs"] = Contender(
        library(similarity), against=without_ids(pairs)
    )


def step(loss_of: LossOf, given: Inputs) -> tuple[float, Tensor]:
    """One forward and backward pass: the value and the (B, D) gradient."""
    x = given.embeddings.detach().requires_grad_()
    value = loss_of(x, given)
    value.backward()
    if x.grad is None:
        raise RuntimeError("the loss did not reach the embeddings")
    return value.item(), x.grad


def limit(case: Case, *, fold: bool = False) -> Callable[[], object]:
    """What cannot be left out; `fold`: one product back, of G + Gᵀ (a batch with itself only)."""
    given = inputs(case)
    x = given.embeddings
    y = given.candidates(x)[0]

    def call() -> object:
        s = x @ y.T
        s.clamp_min_(0)
        return (s + s.T) @ x if fold else (s @ y, s.T @ x)

    return call


LIMIT, FOLDED = "limit", "limit, G + Gᵀ first"


def call_of(case: Case, group: str, name: str, loop: bool, compile_too: bool) -> Callable[[], object]:
    """A contender's step on its inputs, by name: what the memory of is measured in another process."""
    if name in (LIMIT, FOLDED):
        return limit(case, fold=name == FOLDED)
    given = inputs(case)
    loss_of = groups(loop=loop, compile_too=compile_too)[group][name].loss_of
    return lambda: step(loss_of, given)


def speed_of_losses(
    *,
    batches: Sequence[int],
    dim: int,
    repeats: int,
    loop: bool = False,
    compile_too: bool = False,
    only: Sequence[str] = (),
    patience: float = 60,
    memory_limit: float = 8,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The table of losses.

    Args:
        batches: each B.
        dim: D.
        repeats: turns on the clock.
        loop: also the loops over anchors.
        compile_too: also the vectorised forms under torch.compile.
        only: parts of the names of the definitions wanted; all without any.
        patience: seconds for a first call; slower contenders are left out.
        memory_limit: GiB for a call; larger contenders are left out.
        say: told what is about to be measured.

    Raises:
        Disagreement: a contender computes another value or gradient than ours.
    """
    here = machine()
    found = []
    for batch in batches:
        for group, contenders in groups(loop=loop, compile_too=compile_too).items():
            if only and not any(part.lower() in group.lower() for part in only):
                continue
            case = Case(batch, dim, 3 if group.endswith("IAA") else 0)
            say(f"{group}, {batch:,} anchors")
            rows = speed_of_group(
                case,
                group,
                contenders,
                repeats=repeats,
                options=(loop, compile_too),
                patience=patience,
                memory_limit=memory_limit,
            )
            found.append(
                {"definition": group, **vars(case), "candidates": (1 + case.copies) * batch, "rows": rows}
            )
    return {"what": "losses", "machine": here, "repeats": repeats, "groups": found}


def speed_of_group(
    case: Case,
    group: str,
    contenders: Mapping[str, Contender],
    *,
    repeats: int,
    options: tuple[bool, bool],
    patience: float,
    memory_limit: float,
) -> list[dict[str, Any]]:
    """Memory of each (not of what is compiled), agreement of each, then the race of those that are left."""
    small = Case(min(SMALL, case.batch), case.dim, case.copies)
    names = [LIMIT, *([] if case.copies else [FOLDED]), *contenders]
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        rows[name] = {"name": name, "extra bytes": None, "problem": ""}
        if name in contenders and contenders[name].compiled:
            continue  # half a minute of compiling in yet another process
        peak = extra_memory(
            call_of,
            *(case, group, name, *options),
            small=(small, group, name, *options),
            patience=patience,
            limit=memory_limit,
        )
        rows[name] |= {"extra bytes": peak.extra, "problem": peak.problem}
    given = inputs(case)
    kept = [name for name in contenders if not rows[name]["problem"]]
    for name in kept:
        rows[name] |= compare(name, contenders[name], contenders["dml"].loss_of, given)
    calls = {name: call_of(case, group, name, *options) for name in names if not rows[name]["problem"]}
    return in_ratios(rows, race(calls, repeats=repeats))


def in_ratios(rows: dict[str, dict[str, Any]], timings: Mapping[str, Timing]) -> list[dict[str, Any]]:
    """Rows with their times, and the ratios to the limit and to ours, where those ran."""
    for name, timing in timings.items():
        rows[name] |= {"seconds": timing.seconds, "spread": timing.spread}
        for column, reference in (("x limit", LIMIT), ("x dml", "dml")):
            if reference in timings:
                rows[name][column] = timing.seconds / timings[reference].seconds
    return list(rows.values())


def disagreement(
    name: str, found: tuple[float, Tensor], expected: tuple[float, Tensor]
) -> tuple[float, float]:
    """The largest relative differences of value and gradient.

    Raises:
        Disagreement: above `TOLERANCE`.
    """
    of_value = abs(found[0] - expected[0]) / max(abs(expected[0]), 1e-12)
    of_gradient = float((found[1] - expected[1]).abs().max() / expected[1].abs().max().clamp_min(1e-12))
    if not max(of_value, of_gradient) <= TOLERANCE:  # also when either is NaN
        raise Disagreement(
            f'"{name}" does not compute the same as dml: value {found[0]:.6g} against {expected[0]:.6g}, '
            f"gradients differ by {of_gradient:.1e} of the largest entry; a race needs equal results"
        )
    return of_value, of_gradient


def compare(name: str, contender: Contender, reference: LossOf, given: Inputs) -> dict[str, float]:
    """The largest relative differences of value and gradient from ours.

    Raises:
        Disagreement: above `TOLERANCE`.
    """
    started = time.perf_counter()
    value, gradient = step(contender.loss_of, given)
    first = time.perf_counter() - started
    expected, expected_gradient = step(contender.against or reference, given)
    of_value, of_gradient = disagreement(name, (value, gradient), (expected, expected_gradient))
    figures = {"value differs": of_value, "gradient differs": of_gradient}
    return figures | ({"compile seconds": first} if contender.compiled else {})
