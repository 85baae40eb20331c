"""The kernel of the pair losses: blocks, parts, gradients by hand, and memory that stays within a block."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from dml.losses import ContrastiveBayesianLoss, ContrastiveLoss, MultiSimilarityLoss, TripletLoss, kernel
from dml.losses.pairs import Relations

LOSSES = {
    "multi_similarity": MultiSimilarityLoss(),
    "multi_similarity, all pairs": MultiSimilarityLoss(epsilon=None),
    "contrastive": ContrastiveLoss(),
    "contrastive, cosine": ContrastiveLoss(0.8, 0.3, measure="cosine", average="anchors"),
    "triplet all": TripletLoss(0.2, "all"),
    "triplet semihard": TripletLoss(0.1, "semihard", window=0.5),
    "triplet hard, anchors": TripletLoss(0.1, "hard", average="anchors"),
    "triplet hardest": TripletLoss(0.2, "hardest"),
    "cbml": ContrastiveBayesianLoss(negative_scale=0.2),
    "cbml, mean": ContrastiveBayesianLoss(negative_scale=0.2, variance_reduction="mean"),
    "cbml sqrt": ContrastiveBayesianLoss(negative_scale=0.2, form="sqrt"),
    "cbml constant, top": ContrastiveBayesianLoss(
        negative_scale=0.2, form="constant", adaptive_negatives=False
    ),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@pytest.fixture
def two_anchors_at_a_time(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(kernel, "ANCHORS", 2)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Random rows with a common direction, so that similarities are spread over positive values too."""
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows[:, 0] += 1.5
    return rows.requires_grad_()


LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])
MINED = {
    "pairs": (
        torch.tensor([4, 0, 0, 6, 0]),
        torch.tensor([3, 1, 2, 5, 1]),
        torch.tensor([0, 6, 4]),
        torch.tensor([4, 0, 8]),
    ),
    "triplets": (torch.tensor([7, 0, 0, 3]), torch.tensor([5, 1, 1, 4]), torch.tensor([0, 4, 8, 1])),
}


@every_loss
@pytest.mark.parametrize("few", [0, 1], ids=["counted before", "apart"])
@pytest.mark.parametrize(("height", "panel"), [(1, 2), (2, 1), (2, 5)])
@pytest.mark.parametrize("mined", [None, "pairs", "triplets"])
def test_blocks_give_what_one_block_gives(loss, mined, height, panel, few, monkeypatch):
    chosen = MINED[mined] if mined else None
    whole = numbers(9, 6)
    expected = loss(whole, LABELS, chosen)
    (gradient,) = torch.autograd.grad(expected, whole)
    row = 9 + 8 * 3  # candidates, and eight numbers for each that shares a label with the anchor
    monkeypatch.setattr(kernel, "BLOCK", {"cpu": height * row, "cuda": height * row})
    monkeypatch.setattr(kernel, "ANCHORS", panel)
    monkeypatch.setattr(kernel, "FEW", few)
    heights = [len(block) for block in blocks_of(whole)]
    assert max(heights) == height
    assert len(list(blocks_of(whole).panels())) == -(-9 // max(height, panel))
    value = loss(whole, LABELS, chosen)
    (by_blocks,) = torch.autograd.grad(value, whole)
    assert gradient.any()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_blocks, gradient, rtol=1e-10, atol=1e-13)


def blocks_of(rows: Tensor) -> kernel.Blocks:
    """The batch against itself."""
    return kernel.Blocks(rows.detach(), [rows.detach()], Relations(LABELS, None, None, None), None)


@every_loss
@pytest.mark.parametrize("few", [0, 1], ids=["counted before", "apart"])
@pytest.mark.parametrize("panel", [1, 4, 1000])
def test_candidates_in_parts_give_what_they_give_as_one(loss, panel, few, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(kernel, "ANCHORS", panel)
    monkeypatch.setattr(kernel, "FEW", few)
    rows, made, bank = numbers(9, 6), numbers(18, 6, seed=1), numbers(30, 6, seed=2).detach()
    labels = torch.cat([LABELS, LABELS, LABELS, torch.arange(30) % 5])
    ids = torch.arange(9)
    given = {"ids": ids, "ref_ids": torch.cat([ids, ids, ids, torch.arange(30)])}
    expected = loss(rows, LABELS, None, torch.cat([rows, made, bank]), labels, **given)
    gradients = torch.autograd.grad(expected, (rows, made))
    monkeypatch.setattr(kernel, "FEW", 1 - few)
    value = loss(rows, LABELS, None, (rows, made, bank), labels, **given)
    in_parts = torch.autograd.grad(value, (rows, made))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for found, wanted in zip(in_parts, gradients, strict=True):
        assert wanted.any()
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@every_loss
def test_gradients_of_anchors_and_candidates_agree_with_finite_differences(loss, two_anchors_at_a_time):
    labels, ids = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 3])
    others, other_ids = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([7, 2, 8, 9, 0])
    assert torch.autograd.gradcheck(
        lambda rows, parts: loss(
            rows,
            labels,
            None,
            (rows, parts),
            torch.cat([labels, others]),
            ids=ids,
            ref_ids=torch.cat([ids, other_ids]),
        ),
        (numbers(4, 3, seed=5), numbers(5, 3, seed=6)),
        eps=1e-7,
        atol=1e-4,
        rtol=1e-3,
    )


MEANS = {n: loss for n, loss in LOSSES.items() if getattr(loss, "average", "anchors") == "anchors"}


@pytest.mark.parametrize("loss", MEANS.values(), ids=MEANS)
def test_gathered_rows_cost_what_the_whole_batch_costs(loss):
    """Anchors of one process against the rows of all: the mean over processes is the loss of one process."""
    rows, ids = numbers(9, 6), torch.arange(9)
    halves = [
        loss(rows[part], LABELS[part], None, rows, LABELS, ids=ids[part], ref_ids=ids) * len(ids[part])
        for part in (slice(0, 4), slice(4, 9))
    ]
    torch.testing.assert_close(sum(halves) / 9, loss(rows, LABELS, ids=ids), rtol=1e-12, atol=0)


@every_loss
def test_the_gradient_follows_what_comes_behind_the_loss(loss):
    rows = numbers(9, 6)
    (once,) = torch.autograd.grad(loss(rows, LABELS), rows)
    (thrice,) = torch.autograd.grad(3 * loss(rows, LABELS) - 1, rows)
    torch.testing.assert_close(thrice, 3 * once)


def test_a_second_derivative_is_refused_instead_of_wrong():
    # Behind a layer: there the gradient has a graph, which only lacks the part that goes through the loss.
    pictures, layer = numbers(9, 6), torch.nn.Linear(6, 4).double()
    value = MultiSimilarityLoss()(layer(pictures), LABELS)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(value, pictures, create_graph=True)


@every_loss
def test_without_a_gradient_the_value_is_the_same(loss):
    rows = numbers(9, 6)
    with torch.no_grad():
        value = loss(rows, LABELS)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss(rows, LABELS).detach(), rtol=1e-12, atol=0)


@every_loss
def test_candidates_of_any_length_and_kind_are_made_unit_rows(loss):
    rows, bank = numbers(9, 6), numbers(12, 6, seed=3).detach()
    labels = torch.arange(12) % 4
    expected = loss(rows, LABELS, None, bank, labels)
    lengths = torch.linspace(0.1, 30, 12, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss(rows, LABELS, None, bank * lengths, labels), expected, rtol=1e-12, atol=0)
    unit = torch.nn.functional.normalize(bank)
    torch.testing.assert_close(loss(rows, LABELS, None, unit, labels), expected, rtol=1e-12, atol=0)
    half = loss(rows.float(), LABELS, None, bank.bfloat16(), labels)
    torch.testing.assert_close(half, loss(rows.float(), LABELS, None, bank.bfloat16().float(), labels))


@every_loss
def test_no_part_at_all_is_an_empty_candidate_set(loss):
    rows = numbers(9, 6)
    assert loss(rows, LABELS, None, (), LABELS[:0]) == 0


def test_mismatched_parts_are_refused():
    rows = numbers(9, 6)
    with pytest.raises(ValueError, match="6 columns and ref_emb 5"):
        MultiSimilarityLoss()(rows, LABELS, None, (rows, numbers(3, 5)), torch.zeros(12))
    with pytest.raises(ValueError, match=r"\(12, 6\) and \(11,\)"):
        MultiSimilarityLoss()(rows, LABELS, None, (rows, numbers(3, 6)), torch.zeros(11))


def test_exponents_that_would_be_denormal_are_cut_off_without_a_trace():
    """exp() below the smallest normal number takes twenty times as long and adds nothing."""
    loss = ContrastiveBayesianLoss()
    rows = torch.nn.functional.normalize(torch.randn(64, 8)).requires_grad_()
    labels = torch.arange(64) // 2
    exact = rows.detach().double().requires_grad_()
    torch.testing.assert_close(loss(rows, labels), loss(exact, labels).float(), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss(rows, labels), rows)
    (reference,) = torch.autograd.grad(loss(exact, labels), exact)
    torch.testing.assert_close(gradient, reference.float(), rtol=1e-3, atol=1e-4)


MEMORY = """
import re, torch
from pathlib import Path
from dml.losses import ContrastiveBayesianLoss, MultiSimilarityLoss

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
b, n, d = 1024, 150_000, 8
rows, labels = torch.randn(b, d, requires_grad=True), torch.arange(b) // 4
bank = torch.nn.functional.normalize(torch.randn(n, d))
for loss in (MultiSimilarityLoss(), ContrastiveBayesianLoss(variance_reduction="mean")):
    loss(rows[:8], labels[:8], None, bank[:80], torch.arange(80) // 4).backward()
    before = peak()
    loss(rows, labels, None, bank, torch.arange(n) // 4).backward()
    print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_a_large_memory_is_compared_in_bounded_memory():
    """1,024 anchors × 150,000 candidates: one float matrix of it would be 586 MiB, a block of 256 is 146."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    grown = [float(line) for line in done.stdout.split()]
    assert len(grown) == 2
    assert max(grown) < 500, grown
