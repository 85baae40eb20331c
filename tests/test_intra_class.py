"""IAA: class statistics, neighbour correction and synthetic rows, as the specification works them out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dml.data.batch import Batch
from dml.losses import MultiSimilarityLoss
from dml.models.output import Output
from dml.training.intra_class import IntraClassAugmentation, class_moments, drawn_noise
from dml.training.objective import Progress


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def wide(num_classes: int, dim: int, **settings) -> IntraClassAugmentation:
    """In float64, so that values by hand are met to the last digit."""
    return IntraClassAugmentation(num_classes, dim, **settings).double()


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_near(actual: torch.Tensor, expected, tolerance: float = 1e-6):
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=tolerance)


# -------- statistics


def test_mean_and_variance_of_one_class_by_hand():
    iaa = wide(2, 2)
    iaa.update(tensor([[1, 0], [3, 2], [2, 4]]), torch.tensor([1, 1, 1]))
    assert_near(iaa.mean[1], [2, 2])
    assert_near(iaa.variance[1], [2 / 3, 8 / 3])
    assert iaa.count.tolist() == [0, 3]
    assert not iaa.mean[0].any()


def test_two_updates_without_clamp_are_the_pooled_statistics():
    iaa = wide(1, 2, momentum=1.0)
    iaa.update(tensor([[1, 0], [3, 2]]), torch.tensor([0, 0]))
    assert_near(iaa.mean[0], [2, 1])
    assert_near(iaa.variance[0], [1, 1])
    iaa.update(tensor([[2, 4]]), torch.tensor([0]))
    assert_near(iaa.mean[0], [2, 2])
    assert_near(iaa.variance[0], [2 / 3, 8 / 3])


def test_the_momentum_makes_new_rows_weigh_at_least_four_fifths():
    iaa = wide(1, 2, momentum=0.2)
    iaa.update(tensor([[1, 0], [3, 2]]), torch.tensor([0, 0]))
    iaa.update(tensor([[2, 4]]), torch.tensor([0]))
    assert_near(iaa.mean[0], [2, 3.4])
    assert_near(iaa.variance[0], [0.2, 1.64])
    assert iaa.count.tolist() == [3]


@pytest.mark.parametrize("momentum", [0.0, 0.2, 0.7, 1.0])
def test_any_sequence_of_updates_follows_the_recurrence(momentum, scale):
    for seed in range(3 * scale):
        generator = torch.Generator().manual_seed(seed)
        iaa = wide(4, 3, momentum=momentum)
        known = {}  # class -> (mean, variance, count), one row at a time
        for _ in range(6):
            rows = torch.randn(9, 3, generator=generator, dtype=torch.float64)
            labels = torch.randint(0, 4, (9,), generator=generator)
            iaa.update(rows, labels)
            for k in labels.unique().tolist():
                own = rows[labels == k]
                m, v, n = own.mean(dim=0), own.var(dim=0, correction=0), len(own)
                mean, variance, count = known.get(k, (torch.zeros(3), torch.zeros(3), 0))
                w = max(n / (count + n), 1 - momentum)
                variance = (1 - w) * variance + w * v + w * (1 - w) * (mean - m) ** 2
                known[k] = ((1 - w) * mean + w * m, variance, count + n)
        for k, (mean, variance, count) in known.items():
            torch.testing.assert_close(iaa.mean[k], mean, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(iaa.variance[k], variance, rtol=1e-10, atol=1e-12)
            assert iaa.count[k] == count


def test_labels_and_shapes_that_do_not_fit_are_refused():
    iaa = IntraClassAugmentation(3, 2)
    with pytest.raises(ValueError, match="must be below 3, got 5"):
        iaa.update(torch.randn(2, 2), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"\(N, 2\).*\(4, 3\)"):
        iaa.update(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="one class id per row"):
        iaa.synthesize(torch.randn(2, 2), torch.eye(2, 3), torch.arange(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"copies": 0}, "copies must be at least 1, got 0"),
        ({"scale": -1}, "scale must be at least 0"),
        ({"momentum": 2}, "momentum must be between 0 and 1"),
        ({"start": 1.5}, "start must be between"),
        ({"refresh_every": 0}, "refresh_every must be at least 1"),
        ({"mean_width": 0}, "mean_width must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        IntraClassAugmentation(3, 2, **settings)


# -------- neighbour correction


def three_classes(**settings) -> IntraClassAugmentation:
    iaa = wide(3, 2, neighbor_correction=True, normalize_distances=False, **settings)
    iaa.mean.copy_(tensor([[1, 0], [0.8, 0.6], [0, 1]]))
    iaa.variance.copy_(tensor([[0.04, 0.01], [0.02, 0.02], [0.01, 0.09]]))
    iaa.count.copy_(torch.tensor([2, 4, 8]))
    return iaa


def test_the_corrected_variance_by_hand():
    assert_near(three_classes(neighbors=2).corrected_variance()[0], [0.017741, 0.048820])
    assert_near(three_classes(neighbors=1).corrected_variance()[0], [0.021479, 0.022651])


def test_more_neighbours_than_classes_are_all_of_them():
    few, many = three_classes(neighbors=2), three_classes(neighbors=25)
    torch.testing.assert_close(many.corrected_variance(), few.corrected_variance())


@pytest.mark.parametrize(
    ("images", "share"),
    [(1, 1.0), (2, 0.912983), (5, 0.748239), (10, 0.609068), (39, 0.389315), (40, 0.386214), (41, 0.0)],
)
def test_the_fewer_images_the_more_is_borrowed(images, share):
    iaa = three_classes(global_share=1.0)  # all that is borrowed is the overall variance
    iaa.count.copy_(torch.tensor([images, 100, 100]))
    iaa.variance.copy_(tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]))
    overall = 200 / (200 + (images if images > 1 else 0))
    assert_near(iaa.corrected_variance()[0], [share * overall] * 2)


def test_classes_with_one_image_lend_nothing():
    iaa = three_classes(neighbors=2)
    iaa.count.copy_(torch.tensor([2, 1, 8]))
    iaa.variance[1] = 1000.0
    assert iaa.corrected_variance()[0].max() < 0.1


def test_without_any_lender_the_overall_variance_is_used():
    iaa = three_classes()
    iaa.count.copy_(torch.tensor([1, 1, 8]))
    alone = iaa.corrected_variance()[2]  # nobody lends to the only class that could lend
    assert_near(alone, [0.01, 0.09])
    iaa.count.zero_()
    assert not iaa.corrected_variance()[0].any()


def test_far_classes_still_lend_to_each_other():
    iaa = three_classes(neighbors=2)
    iaa.mean.mul_(100)  # raw squared means are 10,000 apart: every plain weight would be 0
    corrected = iaa.corrected_variance()
    assert corrected.isfinite().all()
    few = 0.912983
    borrowed = (corrected[0] - (1 - few) * iaa.variance[0]) / few
    overall = tensor([0.24 / 14, 0.82 / 14])
    assert_near((borrowed - 0.1 * overall) / 0.9, iaa.variance[1].tolist(), 1e-5)


def test_normalised_distances_do_not_depend_on_the_scale_of_the_embedding():
    generator = torch.Generator().manual_seed(0)
    small, large = (wide(30, 5, neighbor_correction=True, neighbors=4) for _ in range(2))
    small.mean.copy_(torch.randn(30, 5, generator=generator))
    small.variance.copy_(torch.rand(30, 5, generator=generator))
    large.mean.copy_(small.mean * 50)
    large.variance.copy_(small.variance * 2500)
    for iaa in (small, large):
        iaa.count.copy_(torch.arange(30) + 1)
    torch.testing.assert_close(large.corrected_variance(), small.corrected_variance() * 2500)


def test_classes_corrected_in_blocks_are_the_same_as_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    iaa = wide(23, 4, neighbor_correction=True, neighbors=5)
    iaa.mean.copy_(torch.randn(23, 4, generator=generator))
    iaa.variance.copy_(torch.rand(23, 4, generator=generator))
    iaa.count.copy_(torch.arange(23))
    whole = iaa.corrected_variance()
    monkeypatch.setattr("dml.training.intra_class.BLOCK", 3)
    torch.testing.assert_close(iaa.corrected_variance(), whole)


def test_synthesis_uses_the_corrected_variance_only_when_asked():
    rows, labels = tensor([[1, 0], [3, 2], [5, 9], [2, 4]]), torch.tensor([0, 0, 0, 1])
    corrected, plain = wide(2, 2, neighbor_correction=True, seed=1), wide(2, 2, seed=1)
    for iaa in (corrected, plain):
        iaa.update(rows, labels)
    one = torch.ones(1, 1, 2, dtype=torch.float64)
    anchor = (tensor([[2, 4]]), torch.tensor([1]), torch.tensor([0]))
    assert_near(
        plain.synthesize(*anchor, noise=one).embeddings, [[2, 4]]
    )  # a class of one image has no variance
    expected = tensor([[2, 4]]) + (0.8 * corrected.corrected_variance()[1]).sqrt()
    torch.testing.assert_close(corrected.synthesize(*anchor, noise=one).embeddings, expected)
    assert (expected > tensor([[2, 4]])).all()


# -------- synthesis


def test_synthesis_with_given_noise_by_hand():
    iaa = wide(1, 2)
    iaa.variance.copy_(tensor([[0.04, 0.09]]))
    anchor = (tensor([[3, 4]]), torch.tensor([0]), torch.tensor([7]))
    made = iaa.synthesize(*anchor, scale=0.64, noise=tensor([[[1, -1]]] * 3))
    assert_near(made.embeddings, [[3.16, 3.76]] * 3)  # the same deviation for every copy
    assert_near(F.normalize(made.embeddings)[0], [0.643383, 0.765544])
    assert_near(iaa.synthesize(*anchor, scale=0.0).embeddings, [[3, 4]] * 3)


def test_copies_come_copy_by_copy_with_their_sources_label_and_id():
    iaa = wide(5, 4, copies=3)
    iaa.variance.fill_(0.25)
    raw, labels, ids = torch.randn(2, 4).double(), torch.tensor([4, 1]), torch.tensor([30, 10])
    made = iaa.synthesize(raw, labels, ids)
    assert made.labels.tolist() == [4, 1, 4, 1, 4, 1]
    assert made.ids.tolist() == [30, 10, 30, 10, 30, 10]
    noise = drawn_noise(ids, 3, 4, seed=0, step=0).double()
    expected = torch.cat([raw + (0.8 * 0.25) ** 0.5 * noise[m] for m in range(3)])
    torch.testing.assert_close(made.embeddings, expected)


def test_the_gradient_passes_through_the_source_and_not_through_the_variance():
    iaa = wide(1, 3, copies=2)
    iaa.variance.fill_(1.0)
    raw = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    made = iaa.synthesize(raw, torch.zeros(4, dtype=torch.int64), torch.arange(4))
    made.embeddings.sum().backward()
    assert (raw.grad == 2).all()
    assert not iaa.variance.requires_grad


def test_half_precision_rows_are_synthesised_in_float32():
    iaa = IntraClassAugmentation(1, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = iaa.synthesize(torch.ones(2, 3).bfloat16(), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    assert made.embeddings.dtype == torch.float32


def test_synthetic_rows_have_the_spread_of_their_class():
    iaa = wide(2, 6, copies=1)
    iaa.variance.copy_(torch.stack([torch.full((6,), 4.0), torch.linspace(0, 1, 6)]))
    raw = torch.zeros(20_000, 6, dtype=torch.float64)
    for k in (0, 1):
        made = iaa.synthesize(raw, torch.full((20_000,), k), torch.arange(20_000), scale=0.5).embeddings
        torch.testing.assert_close(made.var(dim=0), 0.5 * iaa.variance[k], rtol=0.05, atol=0)
        assert (made.mean(dim=0).abs() < 0.05).all()


def test_an_image_never_meets_its_own_copies():
    iaa = wide(3, 4)
    raw = torch.randn(3, 4, dtype=torch.float64)
    labels, ids = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    made = iaa.synthesize(raw, labels, ids, noise=torch.zeros(3, 3, 4))
    loss = MultiSimilarityLoss(epsilon=None)
    everyone = (torch.cat([raw, made.embeddings]), torch.cat([labels, made.labels]))
    with_copies = loss(raw, labels, None, *everyone, ids=ids, ref_ids=torch.cat([ids, made.ids]))
    pull = loss(raw, labels, None, *everyone) - with_copies
    assert pull > 0.1  # without ids, each would have three copies of itself as positives


# -------- noise


def test_noise_is_standard_normal_and_independent():
    noise = drawn_noise(torch.arange(4000), 2, 16, seed=3, step=11).double()
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.var().item() == pytest.approx(1, abs=0.02)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.15)
    assert noise.abs().max() < 7
    flat = noise.reshape(2, 4000, 16)
    columns = torch.corrcoef(torch.cat([flat[0], flat[1]], dim=1).T) - torch.eye(32)
    assert columns.abs().max() < 0.08
    neighbours = torch.corrcoef(torch.stack([flat[0, :-1].flatten(), flat[0, 1:].flatten()]))
    assert neighbours[0, 1].abs() < 0.02


def test_noise_depends_on_seed_step_and_image_and_on_nothing_else():
    ids = torch.tensor([3, 900, 41])
    noise = drawn_noise(ids, 2, 5, seed=1, step=4)
    assert torch.equal(drawn_noise(ids, 2, 5, seed=1, step=torch.tensor(4)), noise)
    assert torch.equal(drawn_noise(ids[[2, 0]], 2, 5, seed=1, step=4), noise[:, [2, 0]])
    for other in ({"seed": 2, "step": 4}, {"seed": 1, "step": 5}):
        assert not torch.isclose(drawn_noise(ids, 2, 5, **other), noise).any()
    assert len(noise.unique()) == noise.numel()


# -------- the pass over the training set


class Net(nn.Module):
    """A linear embedding with everything that a pass must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, inputs: torch.Tensor) -> Output:
        raw = self.drop(self.norm(self.linear(inputs)))
        return Output(raw, F.normalize(raw))


def training_set(images: int = 24):
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(images, 5, generator=generator), torch.arange(images) % 3

    def batches():
        for rows in torch.arange(images).split(8):
            yield Batch(ids=rows, inputs=inputs[rows], labels=labels[rows])

    return batches


class Plain(nn.Module):
    def forward(self, inputs: torch.Tensor) -> Output:
        return Output(inputs[:, :4], F.normalize(inputs[:, :4]))


def test_a_pass_gives_the_statistics_of_all_rows_at_once():
    batches, iaa = training_set(), IntraClassAugmentation(3, 4)
    iaa.refresh(Plain(), batches())
    rows = torch.cat([b.inputs[:, :4] for b in batches()])
    mean, variance, count = class_moments(rows.double(), torch.arange(24) % 3, 3)
    torch.testing.assert_close(iaa.mean, mean.float())
    torch.testing.assert_close(iaa.variance, variance.float())
    assert iaa.count.tolist() == iaa.images.tolist() == count.tolist() == [8, 8, 8]


def test_a_second_pass_weighs_four_fifths_and_does_not_double_the_images():
    batches, iaa = training_set(), IntraClassAugmentation(3, 4)
    iaa.refresh(Plain(), batches())
    first = iaa.mean.clone()
    shifted = [Batch(b.ids, b.inputs + 1, b.labels) for b in batches()]
    iaa.refresh(Plain(), shifted)
    torch.testing.assert_close(iaa.mean, first + 0.8)
    assert iaa.count.tolist() == [16, 16, 16]
    assert iaa.images.tolist() == [8, 8, 8]


def test_a_pass_leaves_model_modes_statistics_and_random_numbers_as_they_were():
    model, iaa = Net(), IntraClassAugmentation(3, 4)
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    iaa.refresh(model, training_set()())
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert iaa.variance.any()


def test_a_pass_that_breaks_leaves_the_model_as_it_was():
    model = Net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken():
        yield from training_set()()
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        IntraClassAugmentation(3, 4).refresh(model, broken())
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pass_without_batches_or_labels_is_refused():
    iaa = IntraClassAugmentation(3, 4)
    with pytest.raises(ValueError, match="no batches"):
        iaa.refresh(Plain(), [])
    with pytest.raises(ValueError, match="no labels"):
        iaa.refresh(Plain(), [Batch(torch.arange(2), torch.randn(2, 5))])


# -------- the schedule


def lambdas(epochs: int, **settings) -> list[float]:
    """λ in each epoch of a run."""
    iaa = IntraClassAugmentation(3, 4, **settings)
    values = []
    for epoch in range(epochs):
        iaa.before_epoch(Plain(), training_set(), Progress(epoch, epochs, epoch * 3, epochs * 3))
        values.append(float(iaa.strength))
    return values


def test_the_strength_follows_the_released_schedule():
    values = lambdas(100)
    assert values[:30] == [0.0] * 30
    assert values[30:40] == pytest.approx([0.8] * 10)
    assert values[40:60] == pytest.approx([0.72] * 20)
    assert values[60:80] == pytest.approx([0.6] * 20)
    assert values[80:] == pytest.approx([0.48] * 20)
    assert lambdas(10, decay_scale=False, scale=0.5)[3:] == [0.5] * 7
    assert lambdas(4, start=0.0)[0] == 0.8


def test_the_training_set_is_passed_every_second_epoch_from_the_start_on():
    iaa, passes = IntraClassAugmentation(3, 4, start=0.3, refresh_every=2), []

    for epoch in range(10):

        def batches(epoch=epoch):
            passes.append(epoch)
            return training_set()()

        iaa.before_epoch(Plain(), batches, Progress(epoch, 10, epoch, 10))
        iaa.before_epoch(
            Plain(), batches, Progress(epoch, 10, epoch, 10)
        )  # an epoch begun again after a restart
    assert passes == [3, 5, 7, 9]


def test_nothing_is_synthesised_before_the_start():
    iaa = IntraClassAugmentation(3, 4)
    anchor = (torch.randn(2, 4), torch.tensor([0, 1]), torch.arange(2))
    assert iaa(*anchor) is None
    iaa.before_epoch(Plain(), training_set(), Progress(3, 10, 9, 30))
    assert len(iaa(*anchor).ids) == 6


def test_noise_changes_from_step_to_step():
    iaa = IntraClassAugmentation(3, 4, start=0.0)
    iaa.before_epoch(Plain(), training_set(), Progress(0, 10, 0, 30))
    anchor = (torch.randn(2, 4), torch.tensor([0, 1]), torch.arange(2))
    first = iaa(*anchor).embeddings
    assert torch.equal(iaa(*anchor).embeddings, first)
    iaa.after_step(Plain(), Progress(0, 10, 1, 30))
    assert not torch.isclose(iaa(*anchor).embeddings, first).any()


@pytest.mark.parametrize("neighbor_correction", [False, True])
def test_a_restored_state_goes_on_with_the_same_rows(neighbor_correction):
    settings = {"neighbor_correction": neighbor_correction, "start": 0.2}
    iaa, resumed = (IntraClassAugmentation(3, 4, **settings) for _ in range(2))
    iaa.before_epoch(Plain(), training_set(), Progress(2, 10, 6, 30))
    iaa.after_step(Plain(), Progress(2, 10, 7, 30))
    resumed.load_state_dict(iaa.state_dict())
    anchor = (torch.randn(2, 4), torch.tensor([0, 1]), torch.arange(2))
    assert torch.equal(resumed(*anchor).embeddings, iaa(*anchor).embeddings)


# -------- statistics of the batches


def epochs_of_batches(iaa: IntraClassAugmentation, epochs: int) -> list[tuple[float, torch.Tensor]]:
    """λ and the mean of class 1 in each epoch; an epoch is one batch of three rows of class 1 around it."""
    seen = []
    for epoch in range(epochs):
        iaa.before_epoch(Plain(), refused_pass, Progress(epoch, epochs, epoch, epochs))
        seen.append((float(iaa.strength), iaa.mean[1].clone()))
        rows = tensor([[1, 0], [3, 2], [2, 4]]) + 10 * epoch
        iaa(rows.requires_grad_(), torch.tensor([1, 1, 1]), torch.arange(3))
    return seen


def refused_pass():
    raise AssertionError("the training set was passed")


def test_batches_give_the_statistics_of_what_was_seen_since_the_last_time():
    iaa = wide(2, 2, statistics="batches", start=0.5, refresh_every=1, decay_scale=False, momentum=0.0)
    seen = epochs_of_batches(iaa, 4)
    assert [strength for strength, _ in seen] == [0, 0, 0.8, 0.8]
    assert_near(seen[2][1], [12, 12])  # of epoch 1 alone: what came before is forgotten
    assert_near(seen[3][1], [22, 22])
    assert_near(iaa.variance[1], [2 / 3, 8 / 3])


def test_batches_before_the_first_statistics_synthesise_nothing():
    iaa = wide(2, 2, statistics="batches", start=0.0, refresh_every=2, decay_scale=False)
    assert [strength for strength, _ in epochs_of_batches(iaa, 5)] == [0, 0, 0.8, 0.8, 0.8]


def test_gathered_statistics_survive_a_restart():
    iaa, resumed = (wide(2, 2, statistics="batches", start=0.0, refresh_every=2) for _ in range(2))
    epochs_of_batches(iaa, 3)
    resumed.load_state_dict(iaa.state_dict())
    for either in (iaa, resumed):
        either.before_epoch(Plain(), refused_pass, Progress(4, 6, 4, 6))
    assert iaa.mean.any()
    assert torch.equal(iaa.mean, resumed.mean)
    assert torch.equal(iaa.variance, resumed.variance)


def test_a_correction_needs_a_pass_that_counts_images():
    with pytest.raises(ValueError, match='only statistics="pass"'):
        IntraClassAugmentation(2, 2, statistics="batches", neighbor_correction=True)
    with pytest.raises(ValueError, match='"pass" or "batches"'):
        IntraClassAugmentation(2, 2, statistics="none")
