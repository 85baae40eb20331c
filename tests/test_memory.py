"""The cross-batch memory: first in, first out, unit rows, and nothing lost in a restart."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dml.losses import MultiSimilarityLoss
from dml.training.memory import CrossBatchMemory
from dml.training.objective import Progress


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def rows(first: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Embeddings, labels and ids that say which they are."""
    ids = torch.arange(first, first + count)
    return torch.stack([ids + 1.0, torch.ones(count)], dim=1), ids % 3, ids


def test_the_oldest_rows_are_forgotten_first():
    memory = CrossBatchMemory(dim=2, size=5, start=0)
    assert memory() is None
    held = []
    for first, count in ((0, 2), (2, 2), (4, 3), (7, 1), (8, 4), (12, 9)):
        memory.add(*rows(first, count))
        held = [*held, *range(first, first + count)][-5:]
        kept = memory()
        assert sorted(kept.ids.tolist()) == held
        assert len(memory) == len(held)
        expected = F.normalize(torch.stack([kept.ids + 1.0, torch.ones(len(held))], dim=1))
        torch.testing.assert_close(kept.embeddings, expected)
        assert torch.equal(kept.labels, kept.ids % 3)


def test_rows_are_stored_without_gradient_and_handed_out_without_a_copy():
    memory = CrossBatchMemory(dim=2, size=4, start=0)
    embeddings, labels, ids = rows(0, 4)
    memory.add(embeddings.requires_grad_(), labels, ids)
    remembered = memory()
    assert not remembered.embeddings.requires_grad
    assert remembered.embeddings.data_ptr() == memory.embeddings.data_ptr()


def test_a_loss_can_go_back_through_a_memory_that_has_moved_on():
    memory = CrossBatchMemory(dim=2, size=4, start=0)
    memory.add(*rows(0, 4))
    batch = torch.randn(3, 2, requires_grad=True)
    held = memory()
    labels, ids = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 9])
    loss = MultiSimilarityLoss()(batch, labels, None, *held[:2], ids=ids, ref_ids=held.ids)
    memory.add(batch.detach(), labels, ids)
    loss.backward()
    assert batch.grad.isfinite().all()


def test_remembering_starts_after_a_share_of_the_steps():
    memory = CrossBatchMemory(dim=2, size=8, start=0.25)
    for step in range(10):
        memory.add(*rows(step, 1))
        memory.after_step(nn.Identity(), Progress(0, 1, step + 1, 10))
        assert len(memory) == max(0, step + 1 - 2)  # from the third step on: two of ten are done


def test_a_restored_memory_goes_on_where_it_was():
    memory, resumed = (CrossBatchMemory(dim=2, size=5, start=0.5) for _ in range(2))
    memory.after_step(nn.Identity(), Progress(0, 1, 5, 10))
    memory.add(*rows(0, 7))
    resumed.load_state_dict(memory.state_dict())
    for either in (memory, resumed):
        either.add(*rows(7, 2))
    assert all(torch.equal(a, b) for a, b in zip(memory(), resumed(), strict=True))
    assert sorted(resumed().ids.tolist()) == [4, 5, 6, 7, 8]


def test_multi_hot_labels_need_their_width():
    memory = CrossBatchMemory(dim=2, size=3, start=0, classes=4)
    labels = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    memory.add(torch.randn(2, 2), labels, torch.arange(2))
    assert torch.equal(memory().labels, labels)
    with pytest.raises(ValueError, match=r"labels \(1, 4\).*set its dim and classes"):
        memory.add(*rows(0, 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "at least 1"),
        ({"start": 1.0}, "below 1"),
        ({"classes": -1}, "classes must be at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CrossBatchMemory(dim=2, **settings)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) rows.*\(3, 4\)"):
        CrossBatchMemory(dim=2).add(torch.randn(3, 4), torch.zeros(3), torch.arange(3))
