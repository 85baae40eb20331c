"""Where pytorch-metric-learning has the loss, ours equals it; its others keep their documented values."""

import pytest
import torch
from pytorch_metric_learning import losses as library
from pytorch_metric_learning import miners
from pytorch_metric_learning.distances import CosineSimilarity

from dml.config import Part
from dml.losses import ContrastiveLoss, MultiSimilarityLoss, TripletLoss, build_loss
from dml.training.supervised import adapt

T4 = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
T4_LABELS = torch.tensor([0, 0, 1, 1])

PAIRS = {
    "contrastive": (ContrastiveLoss(), library.ContrastiveLoss(), None),
    "contrastive tuned": (ContrastiveLoss(0.3, 0.9), library.ContrastiveLoss(0.3, 0.9), None),
    "contrastive cosine": (
        ContrastiveLoss(1.0, 0.5, measure="cosine"),
        library.ContrastiveLoss(1.0, 0.5, distance=CosineSimilarity()),
        None,
    ),
    "multi-similarity": (MultiSimilarityLoss(epsilon=None), library.MultiSimilarityLoss(), None),
    "multi-similarity mined": (
        MultiSimilarityLoss(2, 40, 0.4, epsilon=0.2),
        library.MultiSimilarityLoss(2, 40, 0.4),
        miners.MultiSimilarityMiner(0.2),
    ),
    "triplet all": (TripletLoss(0.2, "all"), library.TripletMarginLoss(0.2), None),
    "triplet semihard": (
        TripletLoss(0.1, "semihard", window=0.3),
        library.TripletMarginLoss(0.1),
        miners.TripletMarginMiner(0.3, type_of_triplets="semihard"),
    ),
    "triplet hard": (
        TripletLoss(0.1, "hard"),
        library.TripletMarginLoss(0.1),
        miners.TripletMarginMiner(0.3, type_of_triplets="hard"),
    ),
}
MINERS = {
    "pairs": miners.MultiSimilarityMiner(0.3),
    "triplets": miners.TripletMarginMiner(0.3),
    "easy and hard pairs": miners.BatchEasyHardMiner(),
}


def example(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(18, 5, generator=generator, dtype=torch.float64)
    rows[:, 0] += 1
    weights = torch.tensor([6.0, 4.0, 2.0, 1.0])
    labels = torch.multinomial(weights, 18, replacement=True, generator=generator)
    return rows.requires_grad_(), labels


def assert_equal_with_gradient(ours, theirs, leaves):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    mine = torch.autograd.grad(ours, leaves, allow_unused=True)
    reference = torch.autograd.grad(theirs, leaves, allow_unused=True)
    for grad, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", PAIRS)
def test_a_batch_costs_what_it_costs_in_the_library(name, scale):
    ours, theirs, miner = PAIRS[name]
    for seed in range(5 * scale):
        rows, labels = example(seed)
        indices = miner(rows, labels) if miner is not None else None
        assert_equal_with_gradient(ours(rows, labels), theirs(rows, labels, indices), [rows])


@pytest.mark.parametrize("name", PAIRS)
def test_candidates_cost_what_they_cost_in_the_library(name, scale):
    ours, theirs, miner = PAIRS[name]
    for seed in range(5 * scale):
        (rows, labels), (candidates, candidate_labels) = example(seed), example(seed + 500)
        given = (candidates, candidate_labels)
        indices = miner(rows, labels, *given) if miner is not None else None
        value = ours(rows, labels, None, *given)
        assert_equal_with_gradient(value, theirs(rows, labels, indices, *given), [rows, candidates])


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
@pytest.mark.parametrize("name", PAIRS)
def test_a_miner_of_the_library_replaces_our_choice(name, miner):
    ours, theirs, _ = PAIRS[name]
    rows, labels = example(7)
    indices = miner(rows, labels)
    assert_equal_with_gradient(ours(rows, labels, indices), theirs(rows, labels, indices), [rows])


def test_a_miners_pair_of_an_image_with_itself_is_left_out():
    rows, labels = example(1)
    indices = (torch.tensor([0, 0]), torch.tensor([0, 5]), torch.tensor([0]), torch.tensor([3]))
    cleaned = (torch.tensor([0]), torch.tensor([5]), torch.tensor([0]), torch.tensor([3]))
    for name in PAIRS:
        loss = PAIRS[name][0]
        assert loss(rows, labels, indices) == loss(rows, labels, cleaned), name


def test_indices_of_another_length_are_refused():
    rows, labels = example(1)
    for name in PAIRS:
        with pytest.raises(ValueError, match="got 2 tensors"):
            PAIRS[name][0](rows, labels, (torch.tensor([0]), torch.tensor([1])))


# -------- baselines on the four toy vectors


def with_proxies(name: str, proxies: torch.Tensor, **args) -> torch.nn.Module:
    loss = build_loss(Part(name, args), num_classes=2, dim=2)
    for parameter in loss.parameters():
        shaped = proxies if parameter.shape == proxies.shape else proxies.T
        parameter.data = shaped.double().clone()
    return adapt(loss)


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("proxy_nca", {"softmax_scale": 9}, 0.013479),
        ("proxy_nca", {"softmax_scale": 1}, 0.319972),
        ("proxy_anchor", {}, 22.4),
        ("soft_triple", {"centers_per_class": 1}, 0.011062),
        ("arcface", {}, 5.914524),
        ("arcface", {"margin": 0, "scale": 1}, 0.455700),
    ],
)
def test_the_librarys_baselines_keep_their_documented_values(name, args, expected):
    loss = with_proxies(name, torch.eye(2), **args)
    assert loss(T4, T4_LABELS).item() == pytest.approx(expected, abs=2e-6)


def test_soft_triple_with_two_centres_keeps_its_documented_value():
    centres = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [0.6, 0.8]])
    loss = with_proxies("soft_triple", centres.T, centers_per_class=2)
    assert loss(T4, T4_LABELS).item() == pytest.approx(0.274386, abs=2e-6)
