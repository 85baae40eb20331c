"""A memory of rows as candidates: constants without gradient, and far more of them than anchors.

The limit here is in blocks, so that no B × M matrix is held: similarities of a block, one pass in place, and
the product back to the anchors. Zero rows of memory means the batch against itself, with both products back.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dml import losses
from eval.speed import losses as pair_losses
from eval.speed.losses import Case, inputs
from eval.speed.peak import extra_memory
from eval.speed.race import machine, race

BLOCK = 8192
"""Candidates at once in the limit, and anchors where there are that many."""
COMPARED = 16_384
"""Largest batch against itself whose contenders are compared before they are timed."""
LIMIT = "limit, in blocks"
OURS = ("dml Multi-Similarity", "dml Multi-Similarity, all pairs", "dml CBML", "dml contrastive")
LIBRARY = "pytorch-metric-learning"
THEIRS = {
    f"{LIBRARY} XBM, Multi-Similarity": "dml Multi-Similarity, all pairs",
    f"{LIBRARY} XBM, Multi-Similarity + miner": "dml Multi-Similarity",
    f"{LIBRARY} XBM, contrastive": "dml contrastive",
}


@dataclass(frozen=True)
class BankCase:
    """B anchors against M remembered rows; M = 0: against themselves."""

    batch: int
    rows: int
    dim: int


def bank_of(case: BankCase) -> tuple[pair_losses.Inputs, Tensor, Tensor, Tensor]:
    """Anchors, and remembered rows, labels and ids; the newest rows are the batch itself."""
    given = inputs(Case(case.rows or case.batch, case.dim))
    if not case.rows:
        return given, given.embeddings, given.labels, given.ids
    newest = slice(case.rows - case.batch, None)
    anchors = given.embeddings[newest].clone()
    batch = pair_losses.Inputs(anchors, given.labels[newest].clone(), given.ids[newest].clone(), given.noise)
    return batch, given.embeddings, given.labels, given.ids


def loss_named(name: str) -> torch.nn.Module:
    """Ours, by the name in the table."""
    if name == "dml CBML":
        return losses.ContrastiveBayesianLoss(variance_reduction="mean")
    if name == "dml contrastive":
        return losses.ContrastiveLoss()
    return losses.MultiSimilarityLoss(epsilon=None if name.endswith("all pairs") else 0.1)


def call_of(case: BankCase, name: str) -> Callable[[], Any]:
    """A contender's call on its inputs."""
    batch, rows, labels, ids = bank_of(case)
    if name == LIMIT:
        return lambda: limit(batch.embeddings, rows, both=not case.rows)
    if name in THEIRS:
        loss_of = library(name, case, rows, labels)
    elif case.rows:
        loss_of = remembered(loss_named(name), rows, labels, ids)
    else:
        loss_of = pair_losses.ours(loss_named(name))
    return lambda: pair_losses.step(loss_of, batch)


def remembered(loss: torch.nn.Module, rows: Tensor, labels: Tensor, ids: Tensor) -> pair_losses.LossOf:
    """Ours against remembered rows, which get no gradient."""
    return lambda x, given: loss(x, given.labels, None, rows, labels, ids=given.ids, ref_ids=ids)


def limit(x: Tensor, y: Tensor, *, both: bool) -> object:
    """Blocks of similarities, a pass, and the product back to the anchors (`both`: and to the candidates)."""
    to_x, to_y = torch.zeros_like(x), torch.zeros_like(y) if both else None
    for some, gradient in zip(x.split(BLOCK), to_x.split(BLOCK), strict=True):
        for start in range(0, len(y), BLOCK):
            part = slice(start, start + BLOCK)
            s = some @ y[part].T
            s.clamp_min_(0)
            gradient.addmm_(s, y[part])
            if to_y is not None:
                to_y[part].addmm_(s.T, some)
    return to_x, to_y


def library(name: str, case: BankCase, rows: Tensor, labels: Tensor) -> pair_losses.LossOf:
    """pytorch-metric-learning's memory, full, with the batch about to replace its own older copy."""
    from pytorch_metric_learning import losses as theirs
    from pytorch_metric_learning import miners

    miner = miners.MultiSimilarityMiner(epsilon=0.1) if name.endswith("miner") else None
    kind = theirs.ContrastiveLoss() if name.endswith("contrastive") else None
    loss = kind or theirs.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)
    memory: Any = theirs.CrossBatchMemory(loss, case.dim, memory_size=case.rows, miner=miner)
    memory.embedding_memory, memory.label_memory, memory.has_been_filled = rows, labels, True

    def loss_of(x: Tensor, given: pair_losses.Inputs) -> Tensor:
        memory.queue_idx = case.rows - case.batch
        return memory(x, given.labels)

    return loss_of


def speed_of_bank(
    *,
    batch: int,
    rows: Sequence[int],
    dim: int,
    repeats: int,
    patience: float = 120,
    memory_limit: float = 8,
    only: Sequence[str] = (),
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The table of memories; 0 rows: the batch against itself.

    Args:
        only: parts of names that are raced against the limit; none: all.

    Raises:
        Disagreement: a contender computes something else than ours.
    """
    here = machine()
    found = []
    for count in rows:
        case = BankCase(min(batch, count) if count else batch, count, dim)
        installed = importlib.util.find_spec("pytorch_metric_learning") is not None
        names = [*OURS, *(THEIRS if installed and count else ())]
        names = [LIMIT, *(name for name in names if not only or any(part in name for part in only))]
        say(f"{case.batch:,} anchors, {count:,} remembered rows")
        found.append(
            vars(case)
            | {
                "rows of table": speed_of_case(
                    case, names, repeats=repeats, patience=patience, memory_limit=memory_limit
                )
            }
        )
    return {"what": "bank", "machine": here, "repeats": repeats, "sizes": found}


def speed_of_case(
    case: BankCase, names: Sequence[str], *, repeats: int, patience: float, memory_limit: float
) -> list[dict[str, Any]]:
    """Memory of each, agreement, and the race."""
    small = BankCase(64, 256 if case.rows else 0, case.dim)
    table = {}
    for name in names:
        peak = extra_memory(call_of, case, name, small=(small, name), patience=patience, limit=memory_limit)
        table[name] = {"name": name, "extra bytes": peak.extra, "problem": peak.problem}
    calls = {name: call_of(case, name) for name in names if not table[name]["problem"]}
    if case.rows or case.batch <= COMPARED:
        for name, reference in THEIRS.items():
            if name in calls and reference in calls:
                table[name]["gradient differs"] = agree(name, calls[name](), calls[reference]())
    return in_ratios(table, race(calls, repeats=repeats))


def in_ratios(table: dict[str, dict[str, Any]], timings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with their times, relative to the limit and to our loss of the same definition."""
    for name, timing in timings.items():
        table[name] |= {"seconds": timing.seconds, "spread": timing.spread}
        for column, reference in (("x limit", LIMIT), ("x dml", THEIRS.get(name))):
            if reference in timings:
                table[name][column] = timing.seconds / timings[reference].seconds
        own = table.get(THEIRS.get(name, ""), {}).get("extra bytes")
        if own:
            table[name]["memory x dml"] = table[name]["extra bytes"] / own
    return list(table.values())


def agree(name: str, theirs: tuple[float, Tensor], expected: tuple[float, Tensor]) -> float:
    """The largest relative difference of value or gradient; raises as `disagreement`."""
    return max(pair_losses.disagreement(name, theirs, expected))
