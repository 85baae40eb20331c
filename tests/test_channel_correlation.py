"""CC-Loss and the attention it reads: the values of the specification, and what must not change them."""

import pytest
import torch
import torch.nn.functional as F

from dml.losses import ChannelCorrelation
from dml.losses.channel_correlation import EXPLICIT, pairwise_squares
from dml.models.channel_attention import ChannelAttention


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


A = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.2, 0.6]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("settings", "intra", "inter"),
    [
        ({"normalize": False}, 0.241421, 0.785096),
        ({"normalize": False, "pair": "squared"}, 0.06, 0.64),
        ({"normalize": False, "pair": "center"}, 0.120711, 0.781025),
        ({}, 0.241421 / 2**0.5, 0.785096 / 2**0.5),
        ({"pair": "squared"}, 0.03, 0.32),
    ],
    ids=str,
)
def test_the_mean_distances_of_the_four_attentions_by_hand(settings, intra, inter):
    measured = ChannelCorrelation(**settings).measure(A, LABELS)
    assert measured.intra.item() == pytest.approx(intra, abs=1e-6)
    assert measured.inter.item() == pytest.approx(inter, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"normalize": False}, -0.543675),
        ({}, -0.384436),
        ({"form": "ratio", "normalize": False}, 0.307506),
        ({"form": "hinge", "margin": 1.0, "normalize": False}, 0.456325),
        ({"form": "hinge", "margin": 0.5, "normalize": False}, 0.0),
        ({"pair": "squared", "normalize": False}, -0.58),
    ],
    ids=str,
)
def test_the_forms_of_the_four_attentions_by_hand(settings, expected):
    assert ChannelCorrelation(**settings)(A, LABELS).item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_of_the_difference_by_hand():
    attention = A.clone().requires_grad_()
    ChannelCorrelation(normalize=False)(attention, LABELS).backward()
    expected = [
        [-0.026657, -0.031467],
        [-0.744703, 0.658954],
        [0.353553, 0.146447],
        [0.417807, -0.773933],
    ]
    torch.testing.assert_close(attention.grad, torch.tensor(expected).double(), rtol=0, atol=1e-6)


every_reading = pytest.mark.parametrize(
    "loss",
    [
        ChannelCorrelation(form, pair)
        for form in ("difference", "ratio", "hinge")
        for pair in ("plain", "squared", "center")
    ],
    ids=lambda loss: f"{loss.form}-{loss.pair}",
)


def some(count: int = 12, channels: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    attention = torch.rand(count, channels, generator=generator, dtype=torch.float64)
    return attention.requires_grad_(), torch.arange(count) % 4


@every_reading
def test_order_of_images_and_of_channels_and_a_common_shift_do_not_matter(loss):
    attention, labels = some()
    expected = loss(attention, labels)
    rows, columns = torch.randperm(12), torch.randperm(7)
    torch.testing.assert_close(loss(attention[rows], labels[rows]), expected)
    torch.testing.assert_close(loss(attention[:, columns], labels), expected)
    torch.testing.assert_close(loss(attention + torch.rand(7).double(), labels), expected)


@every_reading
def test_the_gradients_of_all_images_add_up_to_zero(loss):
    attention, labels = some()
    (grad,) = torch.autograd.grad(loss(attention, labels), attention)
    torch.testing.assert_close(grad.sum(dim=0), torch.zeros(7).double(), rtol=0, atol=1e-9)


@every_reading
def test_gradients_agree_with_finite_differences(loss):
    attention, labels = some()
    assert torch.autograd.gradcheck(lambda a: loss(a, labels), (attention,))


@every_reading
@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 2, 3]], ids=str)
def test_equal_attentions_have_finite_gradients(loss, labels):
    attention = torch.full((4, 6), 0.5, requires_grad=True)
    value = loss(attention, torch.tensor(labels))
    value.backward()
    assert value.isfinite()
    assert attention.grad.isfinite().all()


@every_reading
@pytest.mark.parametrize("count", [0, 1])
def test_a_batch_without_pairs_has_a_finite_gradient(loss, count):
    attention = torch.rand(count, 5, requires_grad=True)
    value = loss(attention, torch.zeros(count, dtype=torch.int64))
    value.backward()
    assert value.isfinite()
    assert attention.grad.isfinite().all()


def test_equal_attentions_are_no_farther_than_the_epsilon():
    measured = ChannelCorrelation().measure(torch.full((4, 9), 0.3, dtype=torch.float64), LABELS)
    assert measured.intra.item() == pytest.approx(1e-6 / 3)
    assert measured.intra == measured.inter


def test_opposite_corners_are_the_minimum_of_the_difference_and_of_the_ratio():
    corners = torch.tensor([[0.0] * 6, [0.0] * 6, [1.0] * 6, [1.0] * 6], dtype=torch.float64)
    assert ChannelCorrelation()(corners, LABELS).item() == pytest.approx(-1, abs=1e-6)
    assert ChannelCorrelation("ratio")(corners, LABELS).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("pair", ["plain", "squared", "center"])
def test_one_class_is_only_pulled_and_single_images_are_only_pushed(pair):
    attention, _ = some()
    loss = ChannelCorrelation(pair=pair)
    together = loss.measure(attention, torch.zeros(12, dtype=torch.int64))
    assert together.inter == 0
    assert together.intra > 0
    apart = loss.measure(attention, torch.arange(12))
    assert apart.intra == 0
    assert loss(attention, torch.arange(12)) == -apart.inter


@pytest.mark.parametrize("pair", ["plain", "squared"])
def test_one_hot_labels_mean_the_same_as_class_ids(pair):
    attention, labels = some()
    loss = ChannelCorrelation(pair=pair)
    torch.testing.assert_close(loss(attention, F.one_hot(labels)), loss(attention, labels))


def test_distances_through_a_product_of_matrices_are_the_explicit_ones():
    attention = 0.5 + 0.02 * torch.randn(400, 128, dtype=torch.float64)
    assert len(attention) * attention.numel() > EXPLICIT
    explicit = (attention[:, None] - attention[None]).square().sum(dim=2)
    torch.testing.assert_close(pairwise_squares(attention), explicit, rtol=1e-10, atol=1e-14)


def test_saturated_attentions_are_counted():
    attention = torch.tensor([[0.01, 0.5], [0.99, 0.5], [0.03, 0.97], [0.5, 0.5]])
    assert ChannelCorrelation().measure(attention, LABELS).saturation == 0.25


def test_autocast_does_not_change_the_value():
    attention, labels = some()
    attention = attention.detach().float()
    expected = ChannelCorrelation()(attention, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ChannelCorrelation()(attention, labels) == expected


def test_wrong_settings_and_shapes_are_refused():
    with pytest.raises(ValueError, match="form must be"):
        ChannelCorrelation("product")
    with pytest.raises(ValueError, match="pair must be"):
        ChannelCorrelation(pair="cosine")
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3,\)"):
        ChannelCorrelation()(A, LABELS[:3])
    with pytest.raises(ValueError, match="one class per image"):
        ChannelCorrelation(pair="center")(A, F.one_hot(LABELS))


def test_the_attention_is_squeeze_and_excitation():
    attention = ChannelAttention(2)
    with torch.no_grad():
        attention.squeeze.weight.zero_()
        attention.squeeze.bias.zero_()
        attention.excite.weight.zero_()
        attention.squeeze.weight[0] = torch.tensor([1.0, -1.0])
        attention.excite.weight[:, 0] = torch.tensor([2.0, -1.0])
    expected = torch.tensor([[0.880797, 0.268941]])
    torch.testing.assert_close(attention(torch.tensor([[2.0, 1.0]])), expected, rtol=0, atol=1e-6)
    spread = torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])  # means 2 and 1
    torch.testing.assert_close(attention(spread), expected, rtol=0, atol=1e-6)


def test_attentions_start_near_one_half_and_reach_the_trunk():
    features = torch.randn(4, 64, 5, 5, requires_grad=True)
    attention = ChannelAttention(64)(features)
    assert attention.shape == (4, 64)
    assert ((attention - 0.5).abs() < 0.1).all()
    ChannelCorrelation()(attention, LABELS).backward()
    assert features.grad.any()


def test_the_attention_refuses_other_channels():
    with pytest.raises(ValueError, match=r"\(N, 8, H, W\) or \(N, 8\), got \(2, 4\)"):
        ChannelAttention(8)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="at least 1"):
        ChannelAttention(0)


def test_the_hidden_layer_never_becomes_too_narrow():
    assert ChannelAttention(512, reduction=16).squeeze.out_features == 32
    assert ChannelAttention(16, reduction=16).squeeze.out_features == 4
    assert sum(p.numel() for p in ChannelAttention(512).parameters()) == 2 * 512**2 // 16 + 512 // 16 + 512


def test_what_the_last_batch_showed_is_kept_for_the_log() -> None:
    loss = ChannelCorrelation()
    loss(torch.tensor([[0.999, 0.5], [0.001, 0.5]], requires_grad=True), torch.tensor([0, 1]))
    told = loss.diagnostics
    assert set(told) == {"intra", "inter", "saturation"}
    assert told["saturation"] == 0.5
    assert not any(value.requires_grad for value in told.values())
