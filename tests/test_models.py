"""The model: any trunk becomes a feature map, every pooling a vector, and the head unit vectors."""

import math
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dml.config import ModelConfig
from dml.errors import ConfigError
from dml.models import build_model
from dml.models.embedder import deployed_config
from dml.models.pooling import POOLINGS, GeneralizedMeanPooling
from dml.models.trunks import published_input


class Strip(nn.Module):
    """A trunk of the user's own: three tokens in a row, which make no square."""

    def __init__(self, image_size: int, *, width: int = 6) -> None:
        super().__init__()
        self.project = nn.Linear(3 * image_size * image_size // 3, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x.flatten(1).reshape(len(x), 3, -1))


class Nonsense(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


def pictures(size: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


TRUNKS = [
    ("tiny", 32),
    ("tiny", 64),
    ("resnet18", 32),
    ("vit_tiny_patch16_224", 32),
    (f"{__name__}:Strip", 18),
]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("trunk", "size"), TRUNKS)
def test_every_trunk_and_pooling_gives_unit_vectors_and_gradients(
    trunk: str, size: int, pooling: str
) -> None:
    model = build_model(ModelConfig(trunk=trunk, pooling=pooling, dim=7), image_size=size).train()  # type: ignore[arg-type]
    output = model(pictures(size), features=True)
    assert output.unit.shape == output.raw.shape == (3, 7)
    assert model.dim == 7
    assert output.features is not None
    assert output.features.ndim == 4
    assert output.features.shape[:2] == (3, model.channels)
    assert torch.allclose(output.unit.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.allclose(output.unit, output.raw / output.raw.norm(dim=1, keepdim=True), atol=1e-6)
    output.unit[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.head.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trunk.parameters())


def test_tokens_become_a_square_map_without_the_class_token() -> None:
    model = build_model(ModelConfig(trunk="vit_tiny_patch16_224"), image_size=48).eval()
    with torch.no_grad():
        tokens = model.trunk.net(pictures(48))
        maps = model.trunk(pictures(48))
    assert tokens.shape[1] == 1 + 9
    assert maps.shape == (3, model.channels, 3, 3)
    assert torch.equal(maps[:, :, 1, 2], tokens[:, 1 + 3 * 1 + 2])


def test_channels_last_maps_are_turned() -> None:
    name = "swin_tiny_patch4_window7_224"
    model = build_model(ModelConfig(trunk=name, trunk_args={"depths": (1, 1, 1, 1)}), image_size=56).eval()
    with torch.no_grad():
        assert model.trunk(pictures(56)).shape == (3, 768, 2, 2)
        assert model.trunk.net(pictures(56)).shape == (3, 2, 2, 768)


def test_a_trunk_that_pools_itself_is_taken_as_it_is_and_refuses_another_pooling() -> None:
    name, args = "deit_tiny_distilled_patch16_224", {"depth": 1}
    model = build_model(ModelConfig(trunk=name, trunk_args=args), image_size=32)
    assert model(pictures(32), features=True).features.shape == (3, 192, 1, 1)
    with pytest.raises(ConfigError, match=r"pools its features itself.*gem"):
        build_model(ModelConfig(trunk=name, trunk_args=args, pooling="gem"), image_size=32)


def test_generalised_mean_is_its_formula() -> None:
    pool = GeneralizedMeanPooling(p=3.0)
    features = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2).requires_grad_()
    assert pool(features).item() == pytest.approx(25 ** (1 / 3), abs=1e-6)
    pool(features).sum().backward()
    assert pool.p.grad is not None
    assert pool.p.grad.abs() > 0
    assert GeneralizedMeanPooling(p=1.0)(features).item() == pytest.approx(2.5, abs=1e-6)
    assert GeneralizedMeanPooling(p=80.0)(features / 4).item() == pytest.approx(1.0, abs=0.02)
    half = GeneralizedMeanPooling(p=6.0)(torch.full((1, 1, 2, 2), 50.0, dtype=torch.float16))
    assert half.item() == pytest.approx(50.0, rel=1e-4), "50^6 does not fit into float16"


@pytest.mark.parametrize(("p", "eps"), [(0.0, 1e-6), (-1.0, 1e-6), (3.0, 0.0)])
def test_generalised_mean_refuses_what_is_not_positive(p: float, eps: float) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        GeneralizedMeanPooling(p=p, eps=eps)


def test_sum_pooling_adds_mean_and_maximum() -> None:
    features = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    assert POOLINGS["avg"]()(features).item() == 2.5
    assert POOLINGS["max"]()(features).item() == 4.0
    assert POOLINGS["avg+max"]()(features).item() == 6.5


def test_the_head_starts_kaiming_normal_fan_out_without_bias() -> None:
    torch.manual_seed(0)
    head = build_model(ModelConfig(dim=512), image_size=32).head
    assert head.bias.abs().max() == 0
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.02)


def test_the_same_seed_builds_the_same_model() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model(ModelConfig(), image_size=32).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_frozen_batch_norm_keeps_its_statistics_but_trains_its_weights() -> None:
    model = build_model(ModelConfig(freeze_batch_norm=True), image_size=32).train()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [n.running_mean.clone() for n in norms if n.running_mean is not None]
    model(pictures(32)).unit[:, 0].sum().backward()
    assert norms
    assert model.training
    assert not any(n.training for n in norms)
    assert all(torch.equal(n.running_mean, b) for n, b in zip(norms, before, strict=True))  # type: ignore[arg-type]
    assert all(n.weight.grad is not None for n in norms)
    free = build_model(ModelConfig(), image_size=32).train()
    assert all(m.training for m in free.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_branch_only_reads_the_features_and_a_gate_changes_them() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(attention="branch"), image_size=32).eval()
    with torch.no_grad():
        branch = model(pictures(32), features=True)
        model.gate = True
        gate = model(pictures(32), features=True)
        model.attention = None
        none = model(pictures(32))
    assert branch.attention is not None
    assert branch.attention.shape == (3, model.channels)
    assert ((branch.attention > 0) & (branch.attention < 1)).all()
    assert torch.equal(branch.unit, none.unit)
    assert none.attention is None
    assert not torch.allclose(gate.raw, none.raw)
    assert torch.equal(gate.features, branch.features), "the feature map is the trunk's, before the gate"


def test_what_is_deployed_has_no_branch_and_nothing_to_fetch() -> None:
    config = ModelConfig(attention="branch", weights="somewhere.safetensors")
    assert deployed_config(config).attention == "none"
    assert deployed_config(config).weights == ""
    assert deployed_config(ModelConfig(attention="gate", pretrained=True)).attention == "gate"
    assert not deployed_config(ModelConfig(pretrained=True)).pretrained


def test_vectors_are_float32_of_unit_length_under_autocast() -> None:
    model = build_model(ModelConfig(attention="gate", pooling="gem"), image_size=32).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pictures(32), features=True)
    assert output.features.dtype == torch.bfloat16
    assert output.raw.dtype == output.unit.dtype == torch.float32
    assert torch.allclose(output.unit.norm(dim=1), torch.ones(3), atol=1e-6)
    output.unit[:, 0].sum().backward()


@pytest.mark.parametrize(("size", "side"), [(32, 4), (48, 6), (64, 4), (96, 6), (128, 8), (224, 7)])
def test_the_tiny_trunk_keeps_its_map_small_whatever_the_picture(size: int, side: int) -> None:
    model = build_model(ModelConfig(), image_size=size)
    assert model(pictures(size), features=True).features.shape[2:] == (side, side)


def test_the_tiny_trunk_is_tiny() -> None:
    trunk = build_model(ModelConfig(), image_size=64).trunk
    assert 300_000 < sum(p.numel() for p in trunk.parameters()) < 700_000


def test_the_tiny_trunk_learns_from_scratch(draw) -> None:
    """Six kinds of shape: after a few steps of cross entropy on cosines, unseen pictures find their class."""
    import numpy as np

    def batch(seeds: range) -> Tensor:
        drawn = [np.asarray(draw(kind + 36 * seed, (32, 32))) for seed in seeds for kind in range(6)]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1

    torch.manual_seed(0)
    model = build_model(ModelConfig(dim=16), image_size=32).train()
    anchors = nn.functional.normalize(torch.randn(6, 16), dim=1)
    labels = torch.arange(6).repeat(4)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(40):
        logits = 8 * model(batch(range(4 * step, 4 * step + 4))).unit @ anchors.T
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    with torch.no_grad():
        guesses = (model.eval()(batch(range(900, 904))).unit @ anchors.T).argmax(1)
    assert (guesses == labels).float().mean() >= 0.8, "chance is one in six"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(trunk="resnet8"), r'Unknown trunk "resnet8".*Did you mean resnet'),
        (ModelConfig(trunk="tinny"), r'Unknown trunk "tinny".*Did you mean tiny'),
        (ModelConfig(trunk="resnet18.a1_in2k"), r'no published weights "a1_in2k".*a1_in1k'),
        (ModelConfig(trunk="nowhere.nothing:Net"), r'no module "nowhere.nothing"'),
        (ModelConfig(trunk_args={"width": (3,)}), r"width.*Known:.*widths"),
        (ModelConfig(trunk_args={"widths": (8,)}), r"same length"),
        (ModelConfig(trunk_args={"stem_stride": 3}), r"stem_stride must be"),
        (ModelConfig(trunk="resnet18", trunk_args={"colour": 1}), r"colour"),
        (ModelConfig(trunk=f"{__name__}:Nonsense"), r"must return a tensor.*gave list"),
        (ModelConfig(pretrained=True), r'no pretrained weights for the trunk "tiny"'),
        (ModelConfig(weights="nowhere.safetensors"), r"no weights file nowhere.safetensors"),
    ],
    ids=lambda value: value.trunk if isinstance(value, ModelConfig) else "",
)
def test_what_cannot_be_built_says_why(config: ModelConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        build_model(config, image_size=32)


def test_a_picture_too_small_for_the_net_is_refused_with_its_size() -> None:
    with pytest.raises(ConfigError, match="32 x 32 px"):
        build_model(ModelConfig(trunk="levit_128s", trunk_args={"img_size": 224}), image_size=32)


def test_published_weights_without_a_network_are_refused_at_once_and_in_one_message(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")  # nobody is there any more
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(trunk="resnet18", pretrained=True), image_size=32)
    said = str(caught.value)
    assert f"http://127.0.0.1:{port} does not answer" in said
    assert "--weights FILE.safetensors" in said
    assert 'model.weights = "FILE.safetensors"' in said
    assert not caplog.records, "no line for each of a dozen retries"
    assert not constants.HF_HUB_OFFLINE, "the next call looks for a network again"


def test_local_weights_fill_the_trunk_and_its_classifier_is_not_needed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = build_model(ModelConfig(trunk="resnet18"), image_size=32)
    state = {**source.trunk.net.state_dict(), "fc.weight": torch.zeros(5, 512), "fc.bias": torch.zeros(5)}
    save_file(state, tmp_path / "trunk.safetensors")
    config = ModelConfig(trunk="resnet18", weights=str(tmp_path / "trunk.safetensors"))
    loaded = build_model(config, image_size=32)
    assert torch.equal(loaded.eval().trunk(pictures(32)), source.eval().trunk(pictures(32)))


def test_the_weights_of_an_encoder_fill_a_trunk(tiny_encoder: Path) -> None:
    config = ModelConfig(weights=str(tiny_encoder / "model.safetensors"), dim=5)
    torch.manual_seed(9)
    model = build_model(config, image_size=32)
    from safetensors.torch import load_file

    state = load_file(tiny_encoder / "model.safetensors")
    for key, value in model.trunk.state_dict().items():
        assert torch.equal(value, state[f"trunk.{key}"])


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    state = build_model(ModelConfig(), image_size=32).trunk.net.state_dict()
    first, second, *_ = state
    del state[first]
    state[second] = torch.zeros(3)
    state["stranger"] = torch.zeros(1)
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ConfigError) as caught:
        build_model(ModelConfig(weights=str(tmp_path / "bad.safetensors")), image_size=32)
    text = str(caught.value)
    assert f"missing (1): {first}" in text
    assert "not in the trunk (1): stranger" in text
    assert f"{second}: file (3,)" in text


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match="Pickled files"):
        build_model(ModelConfig(weights=str(tmp_path / "weights.pth")), image_size=32)


def test_position_embeddings_are_resized_to_the_picture(tmp_path: Path) -> None:
    args = {"depth": 1}
    source = build_model(ModelConfig(trunk="vit_tiny_patch16_224", trunk_args=args), image_size=64)
    save_file(source.trunk.net.state_dict(), tmp_path / "vit.safetensors")
    config = ModelConfig(
        trunk="vit_tiny_patch16_224", trunk_args=args, weights=str(tmp_path / "vit.safetensors")
    )
    assert build_model(config, image_size=32)(pictures(32)).unit.shape == (3, 128)


def test_pictures_are_prepared_as_the_published_weights_expect() -> None:
    expected = published_input("resnet50.a1_in1k")
    assert (expected.size, expected.interpolation) == (224, "bicubic")
    assert expected.margin == pytest.approx(1 / 0.95)
    assert published_input("tiny") == (64, 1.0, "bilinear")
    model = build_model(ModelConfig(trunk="resnet18"), image_size=32)
    assert model.input_stats == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert build_model(ModelConfig(), image_size=32).input_stats == ((0.5,) * 3, (0.5,) * 3)
