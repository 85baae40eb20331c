"""Profiles: the quick ways make the same vectors, and what does not agree is refused."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dml.cli.encoder import app
from dml.collection import open_collection
from dml.collection.build import add_to_collection, build_collection
from dml.collection.encoding import load_encoder_of
from dml.collection.importing import Settings
from dml.encoder import Encoder, Preprocess, Profile
from dml.encoder.agreement import compared, measure_profiles, store
from dml.encoder.decoders import DECODERS
from dml.encoder.profiles import (
    REFERENCE,
    ProfileAgreement,
    profiles_in,
    require_comparable,
    stored_agreements,
    why_not_comparable,
)
from dml.errors import EncoderError, MissingExtra, ModelMismatch, UsageError
from dml.imaging import decode

FUSED = Profile("fused", "onnx", "f32")


@pytest.fixture
def copied(tiny_encoder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


def agreement(one: Profile, other: Profile, **figures) -> ProfileAgreement:
    known = {"queries": 1000, "top1_equal": 1.0, "overlap_at_10": 1.0, "cosine_p1": 1.0, "cosine_min": 1.0}
    return ProfileAgreement((str(one), str(other)), **{**known, **figures})


# Names


def test_a_profile_is_its_name() -> None:
    assert str(Profile.parse("fused/openvino-bf16")) == "fused/openvino-bf16"
    assert Profile.parse("pillow/onnx-f32") == REFERENCE == Profile()


@pytest.mark.parametrize("name", ["onnx", "pillow/onnx", "magic/onnx-f32", "pillow/onnx-bf16", "a/b-c", ""])
def test_what_is_no_profile_is_named(name: str) -> None:
    with pytest.raises(UsageError, match="profile"):
        Profile.parse(name)


def test_collections_from_before_profiles_name_their_runtime() -> None:
    assert profiles_in({"runtime": "torch"}) == (Profile("pillow", "torch", "f32"),)
    assert profiles_in({}) == profiles_in({"runtime": "onnx", "profiles": []}) == ()


# Decoders


def jpeg(draw, size: tuple[int, int], **options) -> bytes:
    out = io.BytesIO()
    draw(3, (64, 48)).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90, **options)
    return out.getvalue()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(draw, fit: str) -> None:
    preprocess = Preprocess(32, fit, (0.5,) * 3, (0.2,) * 3)
    data = jpeg(draw, (800, 600))
    small = DECODERS["fused"](data, preprocess)
    assert small.size in ((100, 75), (200, 150))
    difference = np.abs(preprocess.pixels(small).astype(int) - preprocess.pixels(decode(data)))
    assert difference.mean() < 2


def test_what_is_not_much_larger_than_needed_comes_out_bit_for_bit(draw) -> None:
    preprocess = Preprocess(32, "crop", (0.5,) * 3, (0.2,) * 3)
    data = jpeg(draw, (120, 90))
    assert DECODERS["fused"](data, preprocess).tobytes() == decode(data).tobytes()


def test_other_formats_are_decoded_in_full(draw) -> None:
    out = io.BytesIO()
    draw(3).resize((800, 600)).save(out, "PNG")
    preprocess = Preprocess(32, "crop", (0.5,) * 3, (0.2,) * 3)
    assert DECODERS["fused"](out.getvalue(), preprocess).size == (800, 600)


def test_small_or_not_a_picture_is_turned_upright(draw) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    preprocess = Preprocess(32, "crop", (0.5,) * 3, (0.2,) * 3)
    data = jpeg(draw, (800, 600), exif=exif)
    assert DECODERS["fused"](data, preprocess).size in ((75, 100), (150, 200))


def test_a_box_counts_in_the_full_picture(tiny_encoder: Path, draw, tmp_path: Path) -> None:
    from dml.data.table import Record

    (tmp_path / "a.jpg").write_bytes(jpeg(draw, (800, 600)))
    record = Record(tmp_path / "a.jpg", None, box=(400, 300, 640, 540))
    by = [Encoder.load(tiny_encoder, profile=p, threads=1) for p in (REFERENCE, FUSED)]
    one, other = (encoder.embed_files([record]).vectors for encoder in by)
    np.testing.assert_array_equal(one, other)


# Runtimes


@pytest.mark.parametrize("name", ["fused/onnx-f32", "pillow/torch-f32", "fused/openvino-f32"])
def test_profiles_in_float32_make_the_same_vectors(tiny_encoder: Path, tiny_folder: Path, name: str) -> None:
    if "openvino" in name:
        pytest.importorskip("openvino")
    files = sorted(tiny_folder.rglob("*.jpg"))[:20]
    encoder = Encoder.load(tiny_encoder, profile=name, device="cpu", threads=2)
    assert str(encoder.profile) == name
    expected = Encoder.load(tiny_encoder, device="cpu", threads=2).embed(files)
    np.testing.assert_allclose(encoder.embed(files), expected, atol=1e-5)
    np.testing.assert_allclose(encoder.embed_files(files).vectors, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["pillow/torch-bf16", "pillow/openvino-bf16"])
def test_bfloat16_is_near_and_of_unit_length(tiny_encoder: Path, tiny_folder: Path, name: str) -> None:
    if "openvino" in name:
        pytest.importorskip("openvino")
    files = sorted(tiny_folder.rglob("*.jpg"))[:20]
    try:
        encoder = Encoder.load(tiny_encoder, profile=name, device="cpu", threads=2)
    except EncoderError as error:
        if "no bfloat16 instructions" not in str(error):
            raise
        pytest.skip(str(error))
    vectors, expected = encoder.embed(files), Encoder.load(tiny_encoder, device="cpu").embed(files)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert not np.array_equal(vectors, expected)
    assert (vectors * expected).sum(axis=1).min() > 0.999


def test_an_encoder_in_8_bit_integers_is_near_and_checked_like_the_others(
    copied: Path, tiny_folder: Path
) -> None:
    pytest.importorskip("openvino")
    from dml.encoder import check_encoder

    with pytest.raises(EncoderError, match="dml encoder quantize"):
        Encoder.load(copied, profile="pillow/openvino-int8")
    before = Encoder.load(copied, device="cpu")
    made = CliRunner().invoke(app, ["quantize", str(copied), "--data", str(tiny_folder), "--pictures", "24"])
    assert "model.int8.onnx" in made.stdout
    quick = Encoder.load(copied, profile="pillow/openvino-int8", threads=2)
    assert quick.fingerprint == before.fingerprint
    files = sorted(tiny_folder.rglob("*.jpg"))
    vectors, expected = quick.embed(files), before.embed(files)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * expected).sum(axis=1).min() > 0.99
    assert check_encoder(copied).files["model.int8.onnx"] == "ok"
    again = CliRunner().invoke(app, ["quantize", str(copied), "--data", str(tiny_folder)])
    assert "already" in str(again.exception)
    with (copied / "model.int8.onnx").open("r+b") as file:
        file.seek(100)
        file.write(b"?")
    with pytest.raises(EncoderError, match="is damaged"):
        Encoder.load(copied, profile="pillow/openvino-int8")


def test_without_openvino_the_error_says_what_to_install(tiny_encoder: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtra, match=r'pip install "dml\[openvino\]"'):
        Encoder.load(tiny_encoder, runtime="openvino")


def test_a_runtime_that_is_not_the_profile_s_is_refused(tiny_encoder: Path) -> None:
    with pytest.raises(UsageError, match="does not run on"):
        Encoder.load(tiny_encoder, profile="pillow/onnx-f32", runtime="torch")
    with pytest.raises(UsageError, match="runs on the CPU"):
        Encoder.load(tiny_encoder, runtime="openvino", device="cuda")


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 1), (5, 3), (64, 2)])
def test_a_stream_keeps_the_order_however_many_work_on_it(
    tiny_encoder: Path, tiny_folder: Path, batch_size: int, workers: int
) -> None:
    files = sorted(tiny_folder.rglob("*.jpg"))
    encoder = Encoder.load(tiny_encoder, device="cpu", threads=2)
    batches = list(encoder.embed_stream(files, batch_size=batch_size, workers=workers))
    assert np.concatenate([batch.indices for batch in batches]).tolist() == list(range(len(files)))
    expected = encoder.embed(files)
    np.testing.assert_allclose(np.concatenate([b.vectors for b in batches]), expected, atol=2e-6)


def test_pictures_that_are_not_wanted_are_read_and_not_embedded(
    tiny_encoder: Path, tiny_folder: Path
) -> None:
    import hashlib

    files = sorted(tiny_folder.rglob("*.jpg"))[:10]
    stream = Encoder.load(tiny_encoder, device="cpu").embed_stream(
        files, batch_size=3, workers=2, wanted=lambda file: file.index % 2 == 0
    )
    batches = list(stream)
    assert [i for batch in batches for i in batch.indices] == [0, 2, 4, 6, 8]
    passed = [file for batch in batches for file in batch.passed]
    assert [file.index for file in passed] == [1, 3, 5, 7, 9]
    assert passed[0].sha256 == hashlib.sha256(files[1].read_bytes()).hexdigest()


# Agreement


def test_agreement_counts_answers_and_takes_the_worse_direction() -> None:
    rng = np.random.default_rng(0)
    left = rng.standard_normal((200, 16)).astype(np.float32)
    left /= np.linalg.norm(left, axis=1, keepdims=True)
    same = compared(REFERENCE, FUSED, left, left)
    assert (same.top1_equal, same.overlap_at_10, same.queries) == (1, 1, 200)
    assert same.cosine_p1 == pytest.approx(1)
    right = left + 0.15 * rng.standard_normal(left.shape).astype(np.float32)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    found = compared(REFERENCE, FUSED, left, right)
    top1, overlap = [], []
    for stored, queries in ((left, right), (right, left)):
        equal = shared = 0.0
        for i in range(200):
            own, foreign = (np.delete(side @ stored.T, i) for side in (stored[i], queries[i]))
            first, answer = np.argsort(-own)[:10], np.argsort(-foreign)[:10]
            equal += first[0] == answer[0]
            shared += len(set(first) & set(answer)) / 10
        top1.append(equal / 200)
        overlap.append(shared / 200)
    assert found.top1_equal == pytest.approx(min(top1))
    assert found.overlap_at_10 == pytest.approx(min(overlap))


def test_copies_that_are_equally_near_are_equally_right() -> None:
    rng = np.random.default_rng(0)
    half = rng.standard_normal((50, 8)).astype(np.float32)
    both = np.concatenate([half, half, half]) / np.linalg.norm(np.tile(half, (3, 1)), axis=1, keepdims=True)
    assert compared(REFERENCE, FUSED, both, both).top1_equal == 1


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"queries": 999}, "999 queries only"),
        ({"top1_equal": 0.985}, "nearest picture is the same for 98.50%"),
        ({"overlap_at_10": 0.97}, r"overlap@10 is 0\.97"),
    ],
)
def test_a_pair_below_a_limit_is_refused(copied: Path, figures: dict, reason: str) -> None:
    store(copied, [agreement(REFERENCE, FUSED, **figures)])
    encoder = Encoder.load(copied, profile=FUSED)
    with pytest.raises(ModelMismatch, match=reason):
        require_comparable(encoder.manifest, [REFERENCE], encoder.profile)


def test_a_stored_pair_may_be_mixed_both_ways_and_the_fingerprint_stays(copied: Path) -> None:
    before = Encoder.load(copied)
    assert why_not_comparable(before.manifest, REFERENCE, FUSED) == "their agreement has not been measured"
    store(copied, [agreement(FUSED, REFERENCE, queries=10)])
    store(copied, [agreement(REFERENCE, FUSED)])
    after = Encoder.load(copied)
    assert after.fingerprint == before.fingerprint
    assert len(stored_agreements(after.manifest)) == 1
    for one, other in ((REFERENCE, FUSED), (FUSED, REFERENCE)):
        assert why_not_comparable(after.manifest, one, other) is None


def test_what_the_export_has_compared_needs_no_measuring(copied: Path) -> None:
    tree = Encoder.load(copied).manifest
    assert why_not_comparable(tree, REFERENCE, Profile("pillow", "torch", "f32")) is None
    assert why_not_comparable(tree, REFERENCE, Profile("pillow", "torch", "bf16")) is not None
    assert why_not_comparable(tree, REFERENCE, Profile("fused", "torch", "f32")) is not None


def test_measuring_keeps_its_figures_in_the_manifest(copied: Path, tiny_folder: Path) -> None:
    [found] = measure_profiles(copied, [REFERENCE, FUSED], tiny_folder, threads=2)
    assert (found.queries, found.top1_equal, found.problem) == (
        48,
        1.0,
        "measured on 48 queries only, at least 1,000 are needed",
    )
    assert stored_agreements(Encoder.load(copied).manifest) == [found]


def test_check_measures_a_profile_on_the_command_line(copied: Path, tiny_folder: Path) -> None:
    from dml.errors import GateNotMet

    arguments = ["check", str(copied), "--profile", "fused/onnx-f32", "--data", str(tiny_folder)]
    found = CliRunner().invoke(app, [*arguments, "--threads", "2"])
    assert isinstance(found.exception, GateNotMet)
    assert "profiles pillow/onnx-f32 and fused/onnx-f32: nearest equal 100.00%" in found.stdout
    assert isinstance(CliRunner().invoke(app, arguments[:-2]).exception, UsageError)
    assert CliRunner().invoke(app, ["check", str(copied), "--json"]).exit_code == 0


# Collections


@pytest.fixture
def shop(tiny_folder: Path, copied: Path, tmp_path: Path) -> Path:
    encoder = Encoder.load(copied, profile=FUSED)
    return build_collection(
        tiny_folder, tmp_path / "shop", encoder=encoder, settings=Settings(workers=2)
    ).path


def test_a_collection_names_the_profile_that_made_it_and_is_asked_with_it(shop: Path) -> None:
    about = json.loads((shop / "manifest.json").read_text())
    assert about["encoder"]["profiles"] == ["fused/onnx-f32"]
    assert load_encoder_of(shop).profile == FUSED


def test_another_profile_is_refused_until_it_was_measured(shop: Path, tiny_folder: Path, draw) -> None:
    with pytest.raises(ModelMismatch, match=r"profile fused/onnx-f32, .* has not been measured"):
        load_encoder_of(shop, runtime="onnx")
    reference = Encoder.load(shop)
    with open_collection(shop, merge="manual") as there:
        with pytest.raises(ModelMismatch):
            add_to_collection(there, tiny_folder / "class_1", encoder=reference)
        assert there.generation == 48
    store(shop / "encoder", [agreement(REFERENCE, FUSED)])
    assert load_encoder_of(shop, runtime="onnx").profile == REFERENCE
    with open_collection(shop, merge="manual") as there:
        add_to_collection(there, tiny_folder / "class_1", encoder=Encoder.load(shop))
        assert profiles_in(there.manifest.encoder) == (FUSED, REFERENCE)


def test_a_service_refuses_what_it_could_not_answer_rightly(shop: Path) -> None:
    pytest.importorskip("fastapi")
    from service.engine import Engine

    with pytest.raises(ModelMismatch):
        Engine.open([shop], runtime="onnx")
    engine = Engine.open([shop])
    engine.close()
