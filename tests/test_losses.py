"""What every loss must do, and what each is worth by hand. A new entry in LOSSES needs no line here."""

import math

import pytest
import torch
import torch.nn.functional as F

from dml.config import Part
from dml.errors import ConfigError
from dml.losses import (
    DESCRIPTIONS,
    LOSSES,
    ContrastiveBayesianLoss,
    ContrastiveLoss,
    CrossEntropyLoss,
    MultiSimilarityLoss,
    TripletLoss,
    build_loss,
)
from dml.losses.kernel import distance, distance_slope, soft_total
from dml.losses.pairs import Relations, relate, unit_rows
from dml.training.supervised import adapt


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


PAIR_LOSSES = {
    "multi_similarity": MultiSimilarityLoss,
    "multi_similarity without mining": lambda: MultiSimilarityLoss(epsilon=None),
    "contrastive": ContrastiveLoss,
    "contrastive on cosines": lambda: ContrastiveLoss(0.8, 0.5, measure="cosine", average="anchors"),
    "triplet semihard": lambda: TripletLoss(window=1.0),
    "triplet hard": lambda: TripletLoss(mining="hard"),
    "triplet all": lambda: TripletLoss(mining="all"),
    "triplet hardest": lambda: TripletLoss(margin=0.3, mining="hardest", average="anchors"),
    "cbml log": ContrastiveBayesianLoss,
    "cbml sqrt": lambda: ContrastiveBayesianLoss(form="sqrt"),
    "cbml constant": lambda: ContrastiveBayesianLoss(form="constant", variance_reduction="mean"),
    "cbml top negatives": lambda: ContrastiveBayesianLoss(adaptive_negatives=False),
}
every_pair_loss = pytest.mark.parametrize("make_loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES)
every_name = pytest.mark.parametrize("name", LOSSES)

# Four unit vectors in the plane, two classes: the example that the hand-worked values belong to.
T4 = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
T4_LABELS = torch.tensor([0, 0, 1, 1])


@pytest.fixture
def batch():
    """Twelve 16-D embeddings, four classes of three."""
    torch.manual_seed(0)
    return torch.randn(12, 16, dtype=torch.float64, requires_grad=True), torch.arange(12) // 3


# -------- laws of every loss


@every_name
def test_every_loss_returns_one_finite_number_and_a_gradient(name, batch):
    embeddings, labels = batch
    loss = adapt(build_loss(Part(name), num_classes=4, dim=16))
    value = loss(embeddings.float(), labels, ids=torch.arange(12))
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()
    assert embeddings.grad.any()


def test_every_loss_is_described_in_one_line():
    assert set(DESCRIPTIONS) == set(LOSSES)
    assert all(line and "\n" not in line and len(line) < 100 for line in DESCRIPTIONS.values())


@every_pair_loss
@pytest.mark.parametrize(
    "labels", [[7], [3, 3, 3, 3], [0, 1, 2, 3]], ids=["one image", "one class", "singletons"]
)
def test_a_batch_without_both_kinds_of_pairs_has_a_finite_gradient(make_loss, labels):
    embeddings = torch.randn(len(labels), 8, requires_grad=True)
    value = make_loss()(embeddings, torch.tensor(labels))
    value.backward()
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()


@every_pair_loss
def test_one_image_alone_costs_nothing(make_loss):
    embeddings = torch.randn(1, 8, requires_grad=True)
    value = make_loss()(embeddings, torch.tensor([7]))
    value.backward()
    assert value == 0
    assert not embeddings.grad.any()


@every_pair_loss
def test_an_empty_batch_costs_nothing(make_loss):
    embeddings = torch.randn(0, 8, requires_grad=True)
    value = make_loss()(embeddings, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value == 0


@every_pair_loss
def test_an_empty_candidate_set_costs_nothing(make_loss, batch):
    embeddings, labels = batch
    value = make_loss()(embeddings, labels, None, embeddings[:0], labels[:0])
    value.backward()
    assert value == 0
    assert embeddings.grad.isfinite().all()


@every_pair_loss
def test_one_hot_labels_mean_the_same_as_class_ids(make_loss, batch):
    embeddings, labels = batch
    loss = make_loss()
    torch.testing.assert_close(loss(embeddings, labels), loss(embeddings, F.one_hot(labels)), rtol=0, atol=0)


@every_pair_loss
def test_order_names_of_classes_rotation_and_length_do_not_matter(make_loss, batch):
    embeddings, labels = batch
    loss = make_loss()
    expected = loss(embeddings, labels)
    order = torch.randperm(12)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    lengths = torch.rand(12, 1, dtype=torch.float64) * 10 + 0.1
    torch.testing.assert_close(loss(embeddings[order], labels[order]), expected)
    torch.testing.assert_close(loss(embeddings, torch.tensor([5, 0, 9, 2])[labels]), expected)
    torch.testing.assert_close(loss(embeddings @ rotation, labels), expected)
    torch.testing.assert_close(loss(embeddings * lengths, labels), expected)


@every_pair_loss
def test_the_batch_given_as_candidates_with_ids_is_the_batch_itself(make_loss, batch):
    embeddings, labels = batch
    loss, ids = make_loss(), torch.arange(12)
    given = loss(embeddings, labels, None, embeddings.clone(), labels.clone(), ids=ids, ref_ids=ids)
    torch.testing.assert_close(given, loss(embeddings, labels), rtol=1e-12, atol=0)


@every_pair_loss
def test_a_candidate_with_the_anchors_id_is_never_its_pair(make_loss, batch):
    """Own copies under another label and at any similarity move nothing, mining thresholds included."""
    embeddings, labels = batch
    loss, ids = make_loss(), torch.arange(12)
    anchor = embeddings[:1]
    alone = loss(anchor, labels[:1], None, embeddings, labels, ids=ids[:1], ref_ids=ids)
    for wrong_label in (0, 1):
        copies = torch.cat([embeddings, anchor.detach() * 3, -anchor.detach(), torch.randn(3, 16).double()])
        copy_labels = torch.cat([labels, torch.full((5,), wrong_label)])
        copy_ids = torch.cat([ids, torch.zeros(5, dtype=torch.int64)])
        beside = loss(anchor, labels[:1], None, copies, copy_labels, ids=ids[:1], ref_ids=copy_ids)
        torch.testing.assert_close(beside, alone, rtol=1e-12, atol=0)


def test_only_the_own_copy_would_move_the_mining_threshold():
    # Anchor at 0°, its class 20°, another 40°: hard only beside a farther positive, the own copy at 60°.
    angles = torch.tensor([0.0, 20.0, 40.0, 60.0], dtype=torch.float64).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels, ids = torch.tensor([0, 0, 1, 0]), torch.tensor([10, 11, 12, 10])
    loss = MultiSimilarityLoss(epsilon=0.1)
    own = loss(rows[:1], labels[:1], None, rows, labels, ids=ids[:1], ref_ids=ids)
    stranger = loss(
        rows[:1], labels[:1], None, rows, labels, ids=ids[:1], ref_ids=torch.tensor([10, 11, 12, 13])
    )
    assert own == 0
    assert stranger > 0


@every_pair_loss
def test_candidates_keep_their_gradient(make_loss, batch):
    embeddings, labels = batch
    candidates = torch.randn(20, 16, dtype=torch.float64, requires_grad=True)
    value = make_loss()(embeddings, labels, None, candidates, torch.arange(20) % 4)
    value.backward()
    assert candidates.grad.isfinite().all()
    assert candidates.grad.any()


@every_pair_loss
@pytest.mark.parametrize("length", [1e-30, 1.0, 1e30])
def test_any_length_of_the_rows_gives_the_same_finite_value(make_loss, batch, length):
    rows = batch[0].detach().float()
    embeddings = (rows * length).requires_grad_()
    loss = make_loss()
    value = loss(embeddings, batch[1])
    value.backward()
    torch.testing.assert_close(value, loss(rows, batch[1]), rtol=1e-4, atol=1e-5)
    assert embeddings.grad.isfinite().all()


@every_pair_loss
def test_opposite_equal_and_zero_rows_stay_finite(make_loss):
    row = torch.randn(1, 8)
    embeddings = torch.cat([row, row, -row, -row, torch.zeros(2, 8), torch.randn(2, 8)]).requires_grad_()
    value = make_loss()(embeddings, torch.tensor([0, 1, 0, 1, 0, 1, 2, 2]))
    value.backward()
    assert value.isfinite()
    assert embeddings.grad.isfinite().all()


@every_pair_loss
def test_half_precision_and_autocast_are_computed_in_float32(make_loss, batch):
    embeddings, labels = batch[0].detach().float(), batch[1]
    loss = make_loss()
    expected = loss(embeddings, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(embeddings, labels) == expected
    half = loss(embeddings.bfloat16(), labels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(embeddings.bfloat16().float(), labels), rtol=0, atol=0)


@every_pair_loss
def test_gradients_agree_with_finite_differences(make_loss, batch):
    embeddings, labels = batch
    loss = make_loss()
    assert torch.autograd.gradcheck(
        lambda rows: loss(rows, labels), (embeddings,), eps=1e-7, atol=1e-4, rtol=1e-3
    )


@every_pair_loss
def test_mismatched_inputs_are_refused_with_their_shapes(make_loss):
    loss, rows, labels = make_loss(), torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match=r"\(4, 8\) and \(3,\)"):
        loss(rows, labels[:3])
    with pytest.raises(ValueError, match="without ref_labels"):
        loss(rows, labels, None, rows.clone())
    with pytest.raises(ValueError, match="without ref_emb"):
        loss(rows, labels, None, None, labels)
    with pytest.raises(ValueError, match="both ids and ref_ids"):
        loss(rows, labels, None, rows.clone(), labels, ids=torch.arange(4))
    with pytest.raises(ValueError, match="8 columns and ref_emb 5"):
        loss(rows, labels, None, torch.randn(4, 5), labels)
    with pytest.raises(ValueError, match="one id per row"):
        loss(rows, labels, ids=torch.arange(3))
    with pytest.raises(ValueError, match="labels of one kind"):
        loss(rows, labels, None, rows.clone(), F.one_hot(labels))


# -------- the kernel


def test_unit_rows_is_exact_and_leaves_zeros_alone():
    rows = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit_rows(rows), F.normalize(rows), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(unit_rows, (rows,))
    zeros = torch.zeros(2, 3, requires_grad=True)
    unit_rows(zeros).sum().backward()
    assert not unit_rows(zeros).any()
    assert zeros.grad.isfinite().all()


def test_distances_of_equal_rows_are_exactly_zero():
    rows = F.normalize(torch.randn(40, 128))
    d = distance(rows @ rows.T)
    assert (d.diagonal() == 0).all()
    assert (distance_slope(d).diagonal() == 0).all()
    similarity = torch.tensor([-1.0, 0.0, 0.5, float("-inf")], dtype=torch.float64, requires_grad=True)
    distance(similarity)[:3].sum().backward()
    torch.testing.assert_close(distance_slope(distance(similarity.detach()))[:3], similarity.grad[:3])
    assert distance(similarity)[3] == float("inf")
    assert distance_slope(distance(similarity))[3] == 0


def test_a_soft_total_does_not_overflow():
    kept = torch.tensor([[True, True], [True, False], [False, False]])
    logits = torch.tensor([[5000.0, 4999.0], [-5000.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    given = (logits / 50 + 0.5).masked_fill(~kept, float("-inf"))
    odds, largest = given.clone(), logits.masked_fill(~kept, float("-inf")).amax(dim=1)
    values, factors = soft_total(odds, center=0.5, scale=50, largest=largest)
    expected = [5000 + math.log(1 + math.exp(-1)), 0.0, 0.0]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    weights = odds * factors[:, None]
    torch.testing.assert_close(weights[0], logits[0].softmax(0))
    assert not weights[1:].any()


def positives_of(labels, ids=None):
    kin = Relations(labels, None, ids, None).of(slice(0, len(labels)))
    mask = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    return mask.scatter_add(1, kin.positive.columns, kin.positive.there.long()).tolist(), kin


def test_images_with_several_labels_are_positive_when_they_share_one():
    labels = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0]])
    positives, kin = positives_of(labels)
    assert positives == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert kin.negatives.tolist() == [2, 2, 3, 3, 4]


def test_rows_of_one_image_repeated_in_a_batch_are_no_pairs():
    positives, kin = positives_of(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 6]))
    assert positives == [[0, 0, 1, 0], [0, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert kin.negatives.tolist() == [1, 1, 0, 2]


@pytest.mark.parametrize("several", [False, True], ids=["class ids", "multi-hot"])
def test_blocks_know_the_same_pairs_as_the_whole_masks(several, scale):
    for seed in range(20 * scale):
        draw = torch.Generator().manual_seed(seed)

        def whole(high, *shape, draw=draw):
            return torch.randint(high, shape, generator=draw)

        b, n = int(whole(9, 1)) + 1, int(whole(30, 1)) + 1
        alone, with_ids = bool(whole(2, 1)), bool(whole(2, 1))
        n = b if alone else n
        labels = whole(2, b, 4) if several else whole(5, b)
        ref_labels = None if alone else whole(2, n, 4) if several else whole(5, n)
        ids = whole(12, b) if with_ids else None
        ref_ids = whole(12, n) if with_ids and not alone else None
        positive, negative, _ = relate(labels, ref_labels, ids, ref_ids)
        start = int(whole(b, 1))
        kin = Relations(labels, ref_labels, ids, ref_ids).of(slice(start, b))
        found = torch.zeros(b - start, n, dtype=torch.int64)
        found.scatter_add_(1, kin.positive.columns, kin.positive.there.long())
        assert torch.equal(found.bool(), positive[start:])
        assert found.max() <= 1
        others = torch.ones_like(found, dtype=torch.bool)
        others[kin.excluded] = False
        assert torch.equal(others, negative[start:])
        assert torch.equal(kin.negatives, negative[start:].sum(1))


# -------- values by hand


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (MultiSimilarityLoss(), 0.339372),
        (MultiSimilarityLoss(epsilon=None), 0.498811),
        (ContrastiveLoss(), 0.941890),
        (ContrastiveLoss(negative_margin=0.5), 0.849613),
        (ContrastiveLoss(1.0, 0.5, measure="cosine"), 0.42),
        (ContrastiveLoss(0.8, 0.5, measure="cosine", average="anchors"), 0.33),
        (TripletLoss(margin=0.2), 0.0),
        (ContrastiveBayesianLoss(), 0.260235),
        (ContrastiveBayesianLoss(variance_weight=0), 0.227819),
        (ContrastiveBayesianLoss(positive_share=0.1), 0.260223),
        (ContrastiveBayesianLoss(form="sqrt"), 1.159230),
        (ContrastiveBayesianLoss(form="constant"), 1.103307),
    ],
    ids=str,
)
def test_the_four_vectors_cost_what_was_worked_out_by_hand(loss, expected):
    assert loss(T4, T4_LABELS).item() == pytest.approx(expected, abs=1e-6)


def test_multi_similarity_matches_the_formula_by_hand():
    # Anchors at 0, 60 and 180 degrees: cosines 0.5, -1 and -0.5. The first two are one class.
    angles = torch.tensor([0.0, math.pi / 3, math.pi], dtype=torch.float64)
    embeddings = torch.stack([angles.cos(), angles.sin()], dim=1)
    loss = MultiSimilarityLoss(alpha=1, beta=2, base=0, epsilon=None)(embeddings, torch.tensor([0, 0, 1]))
    pull = math.log(1 + math.exp(-0.5))
    push = [0.5 * math.log(1 + math.exp(2 * s)) for s in (-1, -0.5)]
    both = 0.5 * math.log(1 + math.exp(-2) + math.exp(-1))
    assert loss.item() == pytest.approx((2 * pull + sum(push) + both) / 3)


def test_synthetic_candidates_cost_what_the_iaa_example_says():
    synthetic = torch.tensor([[0.96, 0.28], [0.6, 0.8], [0.8, 0.6], [0.28, 0.96]], dtype=torch.float64)
    everyone, labels = torch.cat([T4, synthetic]), T4_LABELS.repeat(2)
    ids = torch.arange(4)

    def cost(loss, ref_ids):
        return loss(T4, T4_LABELS, None, everyone, labels, ids=ids, ref_ids=ref_ids).item()

    contrastive = ContrastiveLoss(0.8, 0.5, measure="cosine", average="anchors")
    multi_similarity = MultiSimilarityLoss(beta=40)
    assert cost(multi_similarity, ids.repeat(2)) == pytest.approx(0.786888, abs=1e-6)
    assert cost(contrastive, ids.repeat(2)) == pytest.approx(0.98, abs=1e-6)
    own_copies_kept = torch.cat([ids, ids + 4])
    assert cost(multi_similarity, own_copies_kept) == pytest.approx(0.833011, abs=1e-6)


def test_semi_hard_triplets_by_hand():
    angles = torch.tensor([0.0, 20.0, 28.0, 90.0], dtype=torch.float64).deg2rad()
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    loss = TripletLoss(margin=0.2, mining="semihard", window=0.2)(rows, T4_LABELS)

    def chord(degrees):
        return 2 * math.sin(math.radians(degrees) / 2)

    # (0, 1, 2) and (3, 2, 1); for the others the negative is nearer, or farther than the window.
    expected = (chord(20) - chord(28) + 0.2 + chord(62) - chord(70) + 0.2) / 2
    assert loss.item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(0.073188, abs=1e-6)


def anchor_at_zero(positives, negatives, loss):
    """The loss of an anchor at 0° with candidates at given cosines; other anchors are not in the batch."""
    cosines = torch.tensor([*positives, *negatives], dtype=torch.float64, requires_grad=True)
    rows = torch.stack([cosines, (1 - cosines.square()).clamp_min(0).sqrt()], dim=1)
    labels = torch.tensor([0] * len(positives) + [1] * len(negatives))
    anchor = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    value = loss(anchor, torch.tensor([0]), None, rows, labels)
    value.backward()
    return value.item(), cosines.grad.tolist()


@pytest.mark.parametrize(("s", "expected"), [(0.0, 1.313262), (0.5, 0.693147), (0.8, 0.437488)])
def test_one_bayesian_positive_is_a_softplus(s, expected):
    value, _ = anchor_at_zero([s], [0.0], ContrastiveBayesianLoss(margin=5, variance_weight=0))
    assert value == pytest.approx(expected, abs=1e-6)  # the negative at 0 weighs exp(-100)


@pytest.mark.parametrize(
    ("s", "expected", "slope"),
    [
        (0.90, 0.000045, 0.004540),
        (0.95, 0.006715, 0.669285),
        (0.98, 0.126928, 11.920292),
        (0.99, 0.313262, 26.894142),
    ],
)
def test_one_bayesian_negative_is_a_steep_softplus(s, expected, slope):
    value, grad = anchor_at_zero([0.5], [s], ContrastiveBayesianLoss(variance_weight=0))
    assert value - math.log(2) == pytest.approx(expected, abs=1e-6)  # the positive at its centre costs log 2
    assert grad[1] == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize(
    ("form", "expected"), [("log", 1.112067), ("sqrt", 1.743742), ("constant", 1.510159)]
)
def test_the_forms_of_two_positives_by_hand(form, expected):
    value, _ = anchor_at_zero(
        [0.3, 0.8], [0.0], ContrastiveBayesianLoss(form=form, margin=5, variance_weight=0)
    )
    without_negatives = {"log": 0.0, "sqrt": 1.0, "constant": 1.0}[form]
    assert value - without_negatives == pytest.approx(expected, abs=1e-6)


def test_the_harder_bayesian_positive_gets_the_larger_pull():
    _, grad = anchor_at_zero([0.8, 0.3], [0.0], ContrastiveBayesianLoss(margin=5, variance_weight=0))
    assert grad[:2] == pytest.approx([-0.3610, -0.9813], abs=1e-4)


def test_only_the_nearest_bayesian_negative_is_pushed():
    _, grad = anchor_at_zero([0.5], [0.96, 0.6], ContrastiveBayesianLoss(margin=5, variance_weight=0))
    assert grad[1] == pytest.approx(1.7986, abs=1e-4)
    assert grad[2] == pytest.approx(4e-16, abs=1e-15)


def metric_variance(positives, negatives):
    """V of one anchor, isolated as the difference between weights 1 and 0, with its gradient."""
    weighed = anchor_at_zero(positives, negatives, ContrastiveBayesianLoss(margin=5, variance_weight=1.0))
    plain = anchor_at_zero(positives, negatives, ContrastiveBayesianLoss(margin=5, variance_weight=0.0))
    return weighed[0] - plain[0], [a - b for a, b in zip(weighed[1], plain[1], strict=True)]


def test_the_metric_variance_by_hand():
    assert metric_variance([0.8], [0.6, 0.0])[0] == pytest.approx(0.2, abs=1e-9)
    value, grad = metric_variance([0.8, 0.4], [0.6, 0.0])
    assert value == pytest.approx(0.1872, abs=1e-9)
    assert grad == pytest.approx([0.024, 0.024, 0.576, -0.624], abs=1e-9)


def test_the_mean_of_the_metric_variance_does_not_grow_with_the_candidates(batch):
    rows, labels = batch
    ids = torch.arange(12)

    def cost(copies, reduction):
        loss = ContrastiveBayesianLoss(form="log", margin=5, variance_weight=1, variance_reduction=reduction)
        plain = ContrastiveBayesianLoss(form="log", margin=5, variance_weight=0)
        given = (rows, labels, None, rows.repeat(copies, 1), labels.repeat(copies))
        these = {"ids": ids, "ref_ids": ids.repeat(copies)}
        return (loss(*given, **these) - plain(*given, **these)).item()

    assert cost(3, "mean") == pytest.approx(cost(1, "mean"))
    assert cost(3, "sum") == pytest.approx(3 * cost(1, "sum"))


def test_a_well_separated_batch_costs_bayesian_loss_nothing():
    rows = torch.tensor([[1, 0, 0], [0.96, 0.28, 0], [0, 0, 1], [0, 0.28, 0.96]], requires_grad=True)
    value = ContrastiveBayesianLoss()(rows, T4_LABELS)
    value.backward()
    assert value == 0
    assert not rows.grad.any()


def test_a_tight_bayesian_scale_does_not_overflow():
    rows, labels = torch.randn(12, 4, requires_grad=True), torch.arange(12) // 3
    for form in ("log", "sqrt", "constant"):
        loss = ContrastiveBayesianLoss(
            form=form, positive_scale=1e-3, negative_center=0.0, negative_scale=1e-3
        )
        value = loss(rows, labels)
        (grad,) = torch.autograd.grad(value, rows)
        assert value.isfinite()
        assert grad.isfinite().all()


def test_cross_entropy_is_the_one_of_torch_on_its_own_classifier():
    loss = CrossEntropyLoss(num_classes=3, embedding_size=5, label_smoothing=0.1)
    rows, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = F.cross_entropy(loss.classifier(rows), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss(rows, labels), expected)
    assert loss(rows[:0], labels[:0]) == 0
    with pytest.raises(ValueError, match="takes no candidates"):
        loss(rows, labels, None, rows.clone(), labels)
    with pytest.raises(ValueError, match="one class id per image"):
        loss(rows, F.one_hot(labels))


# -------- settings and names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MultiSimilarityLoss(alpha=0), "above 0, got alpha=0"),
        (lambda: MultiSimilarityLoss(epsilon=-1), "epsilon must be at least 0"),
        (lambda: ContrastiveLoss(measure="l1"), 'measure must be "euclidean"'),
        (lambda: ContrastiveLoss(average="none"), 'average must be "active"'),
        (lambda: ContrastiveLoss(negative_margin=3), "between 0 and 2"),
        (lambda: ContrastiveLoss(2.0, 0.5, measure="cosine"), "between -1 and 1"),
        (lambda: TripletLoss(mining="easy"), "mining must be"),
        (lambda: TripletLoss(average="sum"), "average must be"),
        (lambda: TripletLoss(window=0), "window above 0"),
        (lambda: ContrastiveBayesianLoss(negative_scale=0), "scales must be above 0"),
        (lambda: ContrastiveBayesianLoss(margin=-0.1), "at least 0, got margin=-0.1"),
        (lambda: ContrastiveBayesianLoss(positive_share=2), "positive_share must be between 0 and 1"),
        (lambda: ContrastiveBayesianLoss(form="exp"), "form must be"),
        (lambda: ContrastiveBayesianLoss(variance_reduction="max"), "variance_reduction must be"),
        (lambda: CrossEntropyLoss(0, 4), "at least 1"),
        (lambda: CrossEntropyLoss(2, 4, label_smoothing=1), "label_smoothing must be"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_misspelt_loss_or_argument_gets_a_hint():
    with pytest.raises(ConfigError, match='Did you mean "multi_similarity"'):
        build_loss(Part("multi_similarty"), num_classes=4, dim=8)
    with pytest.raises(ConfigError, match='no argument "betta".*Did you mean "beta"'):
        build_loss(Part("multi_similarity", {"betta": 4}), num_classes=4, dim=8)
    with pytest.raises(ConfigError, match='no argument "alfa".*Did you mean "alpha"'):
        build_loss(Part("proxy_anchor", {"alfa": 4}), num_classes=4, dim=8)
    with pytest.raises(ConfigError, match="scales must be above 0"):
        build_loss(Part("contrastive_bayesian", {"negative_scale": 0}), num_classes=4, dim=8)


def test_classes_and_dimension_reach_the_losses_that_want_them():
    assert build_loss(Part("proxy_anchor"), num_classes=7, dim=9).proxies.shape == (7, 9)
    assert build_loss(Part("cross_entropy"), num_classes=7, dim=9).classifier.weight.shape == (7, 9)
    assert build_loss(Part("soft_triple"), num_classes=7, dim=9).fc.shape == (9, 70)


def test_a_loss_from_anywhere_is_taken_by_its_import_path():
    loss = build_loss(Part("pytorch_metric_learning.losses:AngularLoss", {"alpha": 30}), num_classes=4, dim=8)
    assert type(loss).__name__ == "AngularLoss"


def test_an_unknown_attribute_of_the_package_is_an_attribute_error():
    import dml.losses

    with pytest.raises(AttributeError, match="no attribute 'NoSuchLoss'"):
        dml.losses.NoSuchLoss  # noqa: B018
