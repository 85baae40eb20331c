"""Encoders: the same vectors from every input and runtime, and no damaged folder that loads."""

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dml.encoder.export
from dml.config import ModelConfig
from dml.encoder import (
    Encoder,
    Preprocess,
    check_encoder,
    create_encoder,
    export_encoder,
    find_encoder,
    save_encoder,
)
from dml.errors import EncoderError, InvalidImage, MissingExtra, StorageError, UsageError
from dml.imaging import BadImage

torch = pytest.importorskip("torch")

from dml.models import build_model

ROOT = Path(__file__).parent.parent
CLOSE = 2e-6
"""Largest difference between batch sizes and runtimes: float32 sums in another order."""


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Encoder:
    return Encoder.load(tiny_encoder, device="cpu", threads=2)


@pytest.fixture
def copied(tiny_encoder: Path, tmp_path: Path) -> Path:
    """A copy of the encoder that a test may damage."""
    return Path(shutil.copytree(tiny_encoder, tmp_path / "copied"))


@pytest.fixture
def photos(draw) -> list[Image.Image]:
    return [draw(seed, (50 + 7 * seed, 64)) for seed in range(7)]


def as_bytes(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of a manifest; None removes one."""
    tree = {**json.loads((folder / "manifest.json").read_text()), **changes}
    (folder / "manifest.json").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


# The same vectors


def test_torch_and_onnx_runtime_make_the_same_vectors(tiny_encoder: Path, encoder: Encoder, photos) -> None:
    other = Encoder.load(tiny_encoder, runtime="torch", device="cpu")
    assert (encoder.runtime, other.runtime) == ("onnx", "torch")
    ours, theirs = encoder.embed(photos), other.embed(photos)
    assert ours.shape == (7, 16)
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(ours, theirs, atol=CLOSE)
    assert abs(ours[0] - ours[1]).max() > 100 * CLOSE, "different pictures differ by far more"


def test_an_encoder_makes_the_vectors_of_its_model(tmp_path: Path, photos) -> None:
    torch.manual_seed(4)
    config = ModelConfig(dim=8, attention="gate", pooling="gem")
    model = build_model(config, image_size=32).eval()
    preprocess = Preprocess(32, "pad", *model.input_stats)
    saved = save_encoder(model, preprocess, tmp_path / "e", provenance={}, model_config=config, image_size=32)
    pixels = np.stack([preprocess(photo) for photo in photos])
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels)).unit.numpy()
    np.testing.assert_allclose(saved.embed(photos), expected, atol=CLOSE)
    np.testing.assert_allclose(saved.embed_arrays(pixels), expected, atol=CLOSE)


def test_rows_keep_the_order_of_the_pictures(encoder: Encoder, photos) -> None:
    assert abs(encoder.embed(photos[::-1]) - encoder.embed(photos)[::-1]).max() <= CLOSE


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_one_at_a_time_or_in_batches_is_the_same(encoder: Encoder, photos, batch_size: int) -> None:
    alone = np.concatenate([encoder.embed([photo]) for photo in photos])
    np.testing.assert_allclose(encoder.embed(photos, batch_size=batch_size), alone, atol=CLOSE)


def test_a_path_its_bytes_and_its_picture_give_the_same_vector(
    encoder: Encoder, tmp_path: Path, draw
) -> None:
    data = as_bytes(draw(3, (70, 50)), "JPEG")
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    with Image.open(path) as opened:
        vectors = encoder.embed([path, str(path), data, opened])
    assert abs(vectors - vectors[0]).max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once_however_a_picture_comes(
    encoder: Encoder, tmp_path: Path, draw, orientation: int
) -> None:
    upright = draw(8, (70, 50))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that undoes each orientation
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    path.write_bytes(as_bytes(stored, exif=exif))
    with Image.open(path) as opened:
        vectors = encoder.embed([upright, path, path.read_bytes(), opened])
    assert abs(vectors - vectors[0]).max() == 0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_a_picture_in_memory_gives_what_its_file_gives(encoder: Encoder, draw, mode: str) -> None:
    rgb = draw(9, (40, 40))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    elif mode == "RGBA":
        picture = rgb.copy()
        picture.putalpha(rgb.convert("L"))
    else:
        picture = rgb.convert(mode)
    data = as_bytes(picture, "TIFF" if mode == "CMYK" else "PNG")
    one, other = encoder.embed([picture, data])
    assert np.array_equal(one, other)


def test_nothing_in_nothing_out(encoder: Encoder) -> None:
    assert encoder.embed([]).shape == (0, 16)
    assert encoder.embed_arrays(np.empty((0, 3, 32, 32), np.float32)).shape == (0, 16)
    assert encoder.embed_files([]).vectors.shape == (0, 16)


def test_one_picture_instead_of_a_list_is_a_clear_error(encoder: Encoder, photos) -> None:
    with pytest.raises(UsageError, match=r"embed\(\[picture\]\)"):
        encoder.embed(photos[0])


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 3, 33, 32), (1, 1, 32, 32)])
def test_arrays_of_another_shape_are_refused(encoder: Encoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"\(N, 3, 32, 32\)"):
        encoder.embed_arrays(np.zeros(shape, np.float32))


def test_bad_files_are_listed_and_the_others_embedded_in_order(
    encoder: Encoder, tmp_path: Path, draw
) -> None:
    paths = [tmp_path / f"{number}.jpg" for number in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(as_bytes(draw(number), "JPEG"))
    paths[0].write_text("no picture at all")
    paths[4].write_bytes(paths[4].read_bytes()[:300])
    paths[7].unlink()
    reported: list[BadImage] = []
    kept, vectors, bad = encoder.embed_files(paths, batch_size=2, workers=3, on_bad=reported.append)
    assert kept.tolist() == [1, 2, 3, 5, 6, 8]
    assert [one.path for one in bad] == [str(paths[n]) for n in (0, 4, 7)]
    assert reported == bad
    assert all(one.path in one.reason for one in bad)
    good = [paths[n] for n in kept]
    np.testing.assert_allclose(vectors, encoder.embed(good), atol=CLOSE)
    with pytest.raises(InvalidImage, match=r"0\.jpg is not a picture"):
        encoder.embed(paths)


# Without torch, without ONNX Runtime

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it raises
import numpy as np
from dml.encoder import Encoder, check_encoder
from dml.errors import MissingExtra
folder, *files = sys.argv[1:]
encoder = Encoder.load(folder)
np.save(sys.stdout.buffer, encoder.embed(files))
try:
    Encoder.load(folder, runtime="torch")
except MissingExtra as error:
    assert 'pip install "dml[train]"' in str(error), error
else:
    raise SystemExit("torch was loaded")
report = check_encoder(folder)
assert report.ok and report.runtimes["onnx"] == "ok", report
assert "torch is not installed" in report.runtimes["torch"], report
"""


def test_an_encoder_runs_where_torch_is_not_installed(encoder: Encoder, tiny_folder: Path) -> None:
    files = sorted(tiny_folder.rglob("*.jpg"))[:5]
    command = [sys.executable, "-c", WITHOUT_TORCH, str(encoder.path), *map(str, files)]
    done = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    np.testing.assert_allclose(np.load(io.BytesIO(done.stdout)), encoder.embed(files), atol=CLOSE)


def test_loading_for_onnx_runtime_imports_no_torch(encoder: Encoder) -> None:
    load = "import sys, dml.encoder; dml.encoder.Encoder.load(sys.argv[1], device='cpu')"
    code = f"{load}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(encoder.path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_without_onnx_runtime_the_error_says_what_to_install(
    tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EncoderError, match="pip install onnxruntime"):
        Encoder.load(tiny_encoder, runtime="onnx")
    assert Encoder.load(tiny_encoder, runtime="torch", device="cpu").runtime == "torch"


def test_onnx_runtime_gets_its_threads_and_does_not_spin(tiny_encoder: Path) -> None:
    from dml.encoder.onnx_runtime import OnnxRuntime

    options = OnnxRuntime(tiny_encoder / "model.onnx", threads=3).session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorflow"}, "Unknown runtime"),
        ({"device": "tpu"}, "Unknown device"),
        ({"threads": 0}, "threads must be at least 1"),
    ],
)
def test_unknown_runtimes_and_devices_are_named(tiny_encoder: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Encoder.load(tiny_encoder, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test finds missing")
@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_device_that_is_not_there_is_an_error_not_another_device(tiny_encoder: Path, runtime: str) -> None:
    with pytest.raises(EncoderError, match="cuda"):
        Encoder.load(tiny_encoder, runtime=runtime, device="cuda:0")


@pytest.mark.gpu
def test_vectors_made_on_a_gpu_are_those_of_the_cpu(tiny_encoder: Path, encoder: Encoder, photos) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    other = Encoder.load(tiny_encoder)
    assert (other.runtime, other.device) == ("torch", "cuda")
    assert (other.embed(photos) * encoder.embed(photos)).sum(1).min() > 0.9999


# The folder


def test_the_folder_holds_no_pickle_and_says_what_it_is(encoder: Encoder) -> None:
    assert {p.name for p in encoder.path.iterdir()} == {"manifest.json", "model.safetensors", "model.onnx"}
    manifest = encoder.manifest
    assert manifest["format_version"] == 1
    assert manifest["decoder"]["name"] == "Pillow"
    assert manifest["agreement"]["min_cosine"] > 0.99999
    assert manifest["agreement"]["max_abs_difference"] < 1e-5
    assert manifest["made_with"]["torch"]
    assert len(encoder.fingerprint) == 64


def test_a_run_and_a_collection_lead_to_their_encoder(tiny_encoder: Path, tmp_path: Path) -> None:
    assert find_encoder(tiny_encoder) == tiny_encoder
    assert find_encoder(tiny_encoder / "manifest.json") == tiny_encoder
    shutil.copytree(tiny_encoder, tmp_path / "run" / "encoder")
    (tmp_path / "run" / "manifest.json").write_text('{"format": "dml-collection"}')
    assert find_encoder(tmp_path / "run") == tmp_path / "run" / "encoder"
    assert Encoder.load(tmp_path / "run", device="cpu").dim == 16


def test_places_without_an_encoder_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"There is no encoder .*nowhere"):
        find_encoder(tmp_path / "nowhere")
    with pytest.raises(EncoderError, match="holds neither manifest.json nor encoder/"):
        find_encoder(tmp_path)
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(EncoderError, match="has no encoder yet"):
        find_encoder(tmp_path)
    with pytest.raises(EncoderError, match="is a file"):
        find_encoder(tmp_path / "recipe.toml")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "manifest cut short": (lambda f: (f / "manifest.json").write_text('{"format": "dml-enc'), "is damaged"),
    "manifest not an object": (
        lambda f: (f / "manifest.json").write_text("[]"),
        "not the manifest of an encoder",
    ),
    "manifest of something else": (lambda f: edit(f, format="other"), "not the manifest of an encoder"),
    "manifest gone": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be read"),
    "key gone": (lambda f: edit(f, dim=None), "dim missing"),
    "key of a wrong kind": (lambda f: edit(f, files=[]), "files missing or of a wrong kind"),
    "version not a number": (lambda f: edit(f, format_version="1"), "format_version is '1'"),
    "from the future": (lambda f: edit(f, format_version=99), r"format 99.*Upgrade dml"),
    "other metric": (lambda f: edit(f, metric="euclidean"), "euclidean"),
    "dimension edited": (lambda f: edit(f, dim=17), "was changed after it was written"),
    "image size edited": (lambda f: edit(f, image_size=64), "was changed after it was written"),
    "model edited": (lambda f: edit(f, model={"trunk": "tiny", "pooling": "max"}), "was changed after"),
    "fingerprint edited": (lambda f: edit(f, fingerprint="0" * 64), "was changed after it was written"),
    "ONNX byte flipped": (lambda f: flip_byte(f / "model.onnx"), r"model.onnx is damaged: its checksum"),
    "ONNX cut short": (lambda f: os.truncate(f / "model.onnx", 1000), r"1,000 bytes"),
    "ONNX gone": (lambda f: (f / "model.onnx").unlink(), "model.onnx cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_does_not_load(copied: Path, damage: str) -> None:
    mutate, message = DAMAGES[damage]
    mutate(copied)
    with pytest.raises(EncoderError, match=message):
        Encoder.load(copied, device="cpu")


def test_edited_preprocessing_does_not_load(copied: Path) -> None:
    tree = json.loads((copied / "manifest.json").read_text())["preprocess"]
    edit(copied, preprocess={**tree, "fit": "pad"})
    with pytest.raises(EncoderError, match="was changed after it was written"):
        Encoder.load(copied, device="cpu")


def test_a_flipped_byte_in_the_weights_does_not_load_and_is_found_by_check(copied: Path) -> None:
    flip_byte(copied / "model.safetensors")
    with pytest.raises(EncoderError, match=r"model.safetensors is damaged"):
        Encoder.load(copied, runtime="torch", device="cpu")
    report = check_encoder(copied)
    assert not report.ok
    assert report.files["model.onnx"] == "ok"
    assert "is damaged" in report.files["model.safetensors"]
    assert report.runtimes["onnx"] == "ok"
    assert report.measured is None


def test_check_measures_the_agreement_again(tiny_encoder: Path) -> None:
    report = check_encoder(tiny_encoder)
    assert report.ok
    assert (report.runtimes["onnx"], report.runtimes["torch"]) == ("ok", "ok")
    assert report.measured is not None
    assert report.measured["min_cosine"] > 0.99999


def test_weights_swapped_with_their_checksum_are_found_by_check(copied: Path) -> None:
    """A manifest that was made to fit other weights still cannot fake the fingerprint."""
    from safetensors.numpy import load_file, save_file

    from dml.encoder.manifest import describe_file

    weights = load_file(copied / "model.safetensors")
    weights["head.bias"] = weights["head.bias"] + 0.5
    save_file(weights, copied / "model.safetensors")
    tree = json.loads((copied / "manifest.json").read_text())
    edit(copied, files={**tree["files"], "model.safetensors": describe_file(copied / "model.safetensors")})
    report = check_encoder(copied)
    assert any("other weights than those of the fingerprint" in problem for problem in report.problems)
    assert any("disagree" in problem for problem in report.problems)


# Writing


def weights_only(
    out: Path, *, config: ModelConfig | None = None, fit: str = "squash", **others: Any
) -> Encoder:
    """A quick encoder without ONNX, always of the same weights."""
    config = config or ModelConfig(dim=4)
    torch.manual_seed(7)
    model = build_model(config, image_size=32).eval()
    for change in others.pop("changes", ()):
        change(model)
    preprocess = Preprocess(32, fit, *model.input_stats)  # type: ignore[arg-type]
    made = {"provenance": {}, "model_config": config, "image_size": 32, "onnx": False, **others}
    return save_encoder(model, preprocess, out, **made)


def test_the_fingerprint_is_that_of_the_vectors(tmp_path: Path) -> None:
    def nudge(model: Any) -> None:
        with torch.no_grad():
            model.head.bias[0] += 1e-6

    first = weights_only(tmp_path / "a").fingerprint
    config = ModelConfig(dim=4)
    same = [
        weights_only(tmp_path / "b", provenance={"recipe": "x"}, classes=["cat", "dog"]),
        weights_only(tmp_path / "c", config=replace(config, freeze_batch_norm=True)),
    ]
    other = [
        weights_only(tmp_path / "d", changes=[nudge]),
        weights_only(tmp_path / "e", fit="crop"),
        weights_only(tmp_path / "f", config=replace(config, pooling="max")),
    ]
    assert {encoder.fingerprint for encoder in same} == {first}
    assert len({first, *(encoder.fingerprint for encoder in other)}) == 4
    assert same[0].classes == ("cat", "dog")


def test_a_side_branch_stays_behind(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    plain = weights_only(tmp_path / "plain")
    branch = weights_only(
        tmp_path / "branch",
        config=ModelConfig(dim=4, attention="branch"),
        changes=[copy_from(tmp_path / "plain")],
    )
    assert not [key for key in load_file(tmp_path / "branch/model.safetensors") if "attention" in key]
    assert branch.fingerprint == plain.fingerprint
    gate = weights_only(tmp_path / "gate", config=ModelConfig(dim=4, attention="gate"))
    assert [key for key in load_file(tmp_path / "gate/model.safetensors") if "attention" in key]
    assert gate.fingerprint != plain.fingerprint


def copy_from(folder: Path) -> Callable[[Any], object]:
    """Fill a model with the weights of an encoder, as far as it has them."""
    from safetensors.torch import load_file

    return lambda model: model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)


def test_weights_only_run_with_torch_and_export_adds_the_rest(tmp_path: Path, photos) -> None:
    made = weights_only(tmp_path / "e", provenance={"why": "test"}, classes=["a", "b"])
    assert made.runtime == "torch"
    with pytest.raises(EncoderError, match=r"has no model.onnx.*dml encoder export"):
        Encoder.load(tmp_path / "e", runtime="onnx")
    full = export_encoder(tmp_path / "e")
    assert (full.runtime, full.fingerprint, full.path) == ("onnx", made.fingerprint, tmp_path / "e")
    assert full.manifest["provenance"] == {"why": "test"}
    assert full.classes == ("a", "b")
    np.testing.assert_allclose(full.embed(photos), made.embed(photos), atol=CLOSE)
    slim = export_encoder(tmp_path / "e", tmp_path / "slim", onnx=False)
    assert {p.name for p in slim.path.iterdir()} == {"manifest.json", "model.safetensors"}
    assert "agreement" not in slim.manifest


def test_saving_over_an_encoder_replaces_it_and_leaves_nothing_aside(tmp_path: Path) -> None:
    first = weights_only(tmp_path / "e")
    second = weights_only(tmp_path / "e", fit="pad")
    assert Encoder.load(tmp_path / "e").fingerprint == second.fingerprint != first.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_saving_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "thesis.txt").write_text("years of work")
    with pytest.raises(EncoderError, match="is left alone"):
        weights_only(tmp_path / "e")
    assert (tmp_path / "e" / "thesis.txt").read_text() == "years of work"


def test_a_failed_export_leaves_the_old_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = weights_only(tmp_path / "e")

    def broken(*args: object, **others: object) -> None:
        raise RuntimeError("unsupported: aten::nothing")

    monkeypatch.setattr(torch.onnx, "export", broken)
    with pytest.raises(
        EncoderError, match=r"cannot be exported to ONNX \(RuntimeError: unsupported.*safetensors"
    ):
        weights_only(tmp_path / "e", fit="pad", onnx=True)
    assert Encoder.load(tmp_path / "e").fingerprint == old.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_an_export_that_disagrees_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faithful = dml.encoder.export.write_onnx

    def unfaithful(model: Any, path: Path, **others: Any) -> None:
        import copy

        other = copy.deepcopy(model)
        other.head.weight.data[0] *= 1.5
        faithful(other, path, **others)

    monkeypatch.setattr(dml.encoder.export, "write_onnx", unfaithful)
    with pytest.raises(EncoderError, match=r"disagree: cosine 0\."):
        weights_only(tmp_path / "e", onnx=True)
    assert not list(tmp_path.iterdir())


def test_a_model_whose_training_diverged_is_refused(tmp_path: Path) -> None:
    def diverge(model: Any) -> None:
        model.head.weight.data[0, 0] = float("nan")

    with pytest.raises(EncoderError, match=r"not of unit length.*diverged"):
        weights_only(tmp_path / "e", changes=[diverge], onnx=True)


def test_a_full_disk_leaves_the_old_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.numpy
    from safetensors import SafetensorError

    old = weights_only(tmp_path / "e")

    def full(*args: object, **others: object) -> None:
        # its own kind, and no OSError; tests/test_storage.py fills a disk for it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(StorageError, match="disk is full"):
        weights_only(tmp_path / "e", fit="pad")
    monkeypatch.undo()
    assert Encoder.load(tmp_path / "e").fingerprint == old.fingerprint
    assert [p.name for p in tmp_path.iterdir()] == ["e"]


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="do not fit the model"):
        weights_only(tmp_path / "e", model_config=ModelConfig(dim=5))


def test_a_figure_that_is_not_a_number_does_not_spoil_the_manifest(tmp_path: Path) -> None:
    made = weights_only(tmp_path / "e", provenance={"map_at_r": float("nan"), "classes": ("a", "b")})
    assert made.manifest["provenance"] == {"map_at_r": None, "classes": ["a", "b"]}


# Without training


def test_an_encoder_without_training_keeps_the_pooled_features(tmp_path: Path, photos) -> None:
    made = create_encoder(ModelConfig(), tmp_path / "e", image_size=32, onnx=False)
    assert made.dim == 160
    assert made.manifest["provenance"]["trained"] is False
    from dml.encoder.manifest import read_manifest
    from dml.encoder.torch_runtime import rebuild

    model = rebuild(read_manifest(tmp_path / "e"))
    pixels = torch.from_numpy(np.stack([made.preprocess(photo) for photo in photos]))
    with torch.no_grad():
        pooled = model.pooling(model.trunk(pixels))
    np.testing.assert_allclose(made.embed(photos), torch.nn.functional.normalize(pooled), atol=CLOSE)


def test_a_projection_is_orthonormal_and_repeatable(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    made = [
        create_encoder(ModelConfig(), tmp_path / name, image_size=32, dim=12, seed=seed, onnx=False)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    weight = load_file(tmp_path / "a" / "model.safetensors")["head.weight"]
    np.testing.assert_allclose(weight @ weight.T, np.eye(12), atol=1e-5)
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint


def test_missing_torch_is_a_missing_extra() -> None:
    assert 'pip install "dml[train]"' in str(MissingExtra("torch", "train"))
