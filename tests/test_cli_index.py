"""`dml index` and `dml search`, from pictures on the disk to an answer."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from dml.cli.index import app as index_app
from dml.cli.search import search
from dml.collection import create_collection, open_collection
from dml.collection.build import build_collection
from dml.errors import (
    CollectionError,
    CollectionLocked,
    ConfigError,
    DataError,
    DmlError,
    EncoderError,
    InvalidImage,
    ModelMismatch,
    StorageError,
    TooManyBadImages,
    UnknownCollection,
    UnknownItem,
    UsageError,
)


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    from dml.encoder import Encoder

    return Encoder.load(tiny_encoder, device="cpu")


@pytest.fixture(scope="session")
def other_encoder(tmp_path_factory):
    """As tiny_encoder, with other weights."""
    torch = pytest.importorskip("torch")
    from dml.config import ModelConfig
    from dml.encoder import Preprocess, save_encoder
    from dml.models import build_model

    torch.manual_seed(1)
    config = ModelConfig(dim=16)
    model = build_model(config, image_size=32).eval()
    mean, std = model.input_stats
    out = tmp_path_factory.mktemp("other") / "encoder"
    preprocess = Preprocess(size=32, fit="squash", mean=mean, std=std)
    save_encoder(model, preprocess, out, provenance={}, model_config=config, image_size=32)
    return out


@pytest.fixture
def pictures(tiny_folder, tmp_path):
    """A copy of tiny_folder that the test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "pictures"))


@pytest.fixture(scope="module")
def built(tiny_folder, encoder, tmp_path_factory):
    """A collection of tiny_folder, only to be read."""
    out = tmp_path_factory.mktemp("built") / "shop"
    build_collection(tiny_folder, out, encoder=encoder)
    return out


@pytest.fixture
def shop(built, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(built, tmp_path / "shop"))


def run(*arguments, app=index_app):
    """Standard output of a command; our own errors are raised as they are."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_search(*arguments):
    app = typer.Typer()
    app.command()(search)
    return run(*arguments, app=app)


def files_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# build


def test_a_folder_becomes_a_collection_that_finds_its_pictures(tiny_folder, tiny_encoder, tmp_path, encoder):
    out = tmp_path / "deep" / "shop"
    said = run("build", tiny_folder, "--encoder", tiny_encoder, "--out", out, "--json")
    report = json.loads(said.stdout)
    assert (report["added"], report["replaced"], report["bad"]) == (48, 0, [])
    assert report["index"]["exact"]
    with open_collection(out, fingerprint=encoder.fingerprint) as there:
        assert len(there) == 48
        assert there.name == "shop"
        [item] = there.get(["class_3/5.jpg"])
        assert item.label == "class_3"
        assert item.picture is not None
        assert item.picture.kind == "referenced"
        assert there.picture(item.id) == (tiny_folder / "class_3" / "5.jpg").read_bytes()
        vector = encoder.embed([tiny_folder / "class_3" / "5.jpg"])
        best = there.search(vector, limit=1)[0].hits[0]
        assert (best.id, round(best.score, 4)) == ("class_3/5.jpg", 1)
        assert there.verify() == []
        assert there.encoder_path is not None
    assert [p.name for p in out.parent.iterdir()] == ["shop"]


def test_splits_and_unlabelled_pictures_are_taken_as_they_are(pictures, encoder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for n, path in enumerate(sorted(pictures.rglob("*.jpg"))[:5]):
        shutil.copy(path, flat / f"{n}.jpg")
    build_collection(flat, tmp_path / "one", encoder=encoder)
    with open_collection(tmp_path / "one") as there:
        assert [(i.id, i.payload) for i in there.scroll()[0]] == [(f"{n}.jpg", {}) for n in range(5)]
    split = tmp_path / "split"
    for kind, name in enumerate(("train", "train", "test", "test")):
        shutil.copytree(pictures / f"class_{kind}", split / name / f"class_{kind}")
    build_collection(split, tmp_path / "two", encoder=encoder)
    with open_collection(tmp_path / "two") as there:
        [item] = there.get(["test/class_2/0.jpg"])
        assert item.payload == {"label": "class_2", "split": "test"}


def test_a_manifest_keeps_its_columns_as_payload(pictures, encoder, tmp_path):
    manifest = tmp_path / "list.csv"
    rows = [f"pictures/class_{k}/0.jpg,colour {k},{k + 0.5}" for k in range(4)]
    manifest.write_text("path,label,price\n" + "\n".join(rows) + "\n")
    build_collection(manifest, tmp_path / "shop", encoder=encoder)
    with open_collection(tmp_path / "shop") as there:
        [item] = there.get(["pictures/class_2/0.jpg"])
        assert item.label == "colour 2"
        assert float(item.payload["price"]) == 2.5
        assert there.picture(item.id) == (pictures / "class_2" / "0.jpg").read_bytes()


def test_stored_pictures_survive_the_folder(pictures, encoder, tiny_encoder, tmp_path):
    run("build", pictures, "--encoder", tiny_encoder, "--out", tmp_path / "shop", "--store")
    expected = (pictures / "class_1" / "1.jpg").read_bytes()
    shutil.rmtree(pictures)
    with open_collection(tmp_path / "shop") as there:
        assert there.picture("class_1/1.jpg") == expected
        assert there.verify() == []


def test_embeddings_become_the_same_collection_as_their_pictures(pictures, encoder, built, tmp_path):
    from dml.data.table import open_table
    from dml.encoder.embeddings import embed_table

    for format in ("npy", "parquet"):
        embed_table(encoder, open_table(pictures), tmp_path / format, format=format)
        build_collection(tmp_path / format, tmp_path / f"{format}.shop")
        with (
            open_collection(tmp_path / f"{format}.shop") as there,
            open_collection(built, read_only=True) as other,
        ):
            assert there.fingerprint == other.fingerprint
            assert there.encoder_path is not None
            pairs = zip(there.scroll(limit=99)[0], other.scroll(limit=99)[0], strict=True)
            assert all((a.id, a.payload, a.picture) == (b.id, b.payload, b.picture) for a, b in pairs)
            vector = encoder.embed([pictures / "class_0" / "3.jpg"])
            scores = [[h.score for h in c.search(vector)[0].hits] for c in (there, other)]
            assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_embeddings_of_another_encoder_are_refused(pictures, encoder, other_encoder, tmp_path):
    from dml.data.table import open_table
    from dml.encoder.embeddings import embed_table

    embed_table(encoder, open_table(pictures), tmp_path / "vectors")
    with pytest.raises(ModelMismatch, match="were made by the encoder"):
        run("build", tmp_path / "vectors", "--encoder", other_encoder, "--out", tmp_path / "shop")
    assert not (tmp_path / "shop").exists()


@pytest.mark.parametrize("kind", ["flat", "faiss_flat", "hnsw", "ivf"])
def test_the_index_kind_and_its_options_are_the_users(kind, tiny_folder, tiny_encoder, tmp_path):
    pytest.importorskip("faiss")
    options = {"hnsw": ["--option", "links=8"], "ivf": ["--option", "cells=3"]}.get(kind, [])
    run(
        "build", tiny_folder, "--encoder", tiny_encoder, "--out", tmp_path / "shop", "--index", kind, *options
    )
    about = json.loads(run("info", tmp_path / "shop", "--json").stdout)
    assert about["index"]["kind"] == kind
    assert about["index"].get("links", 8) == 8
    assert about["index"].get("cells", 3) == 3
    assert about["measured_recall"] is not None


def test_bad_pictures_are_skipped_counted_and_listed(pictures, tiny_encoder, tmp_path):
    (pictures / "class_0" / "0.jpg").write_bytes(b"no picture")
    whole = (pictures / "class_0" / "1.jpg").read_bytes()
    (pictures / "class_0" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    said = run("build", pictures, "--encoder", tiny_encoder, "--out", tmp_path / "shop")
    assert "46 added" in said.stdout
    assert "2 unreadable skipped" in said.stdout
    assert "class_0/0.jpg" in said.stderr
    with open_collection(tmp_path / "shop") as there:
        assert len(there) == 46


def test_too_many_bad_pictures_fail_and_leave_nothing(pictures, tiny_encoder, tmp_path):
    for path in (pictures / "class_0").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(TooManyBadImages, match=r"8 of 48 images cannot be read.*\n.*class_0/0.jpg"):
        run("build", pictures, "--encoder", tiny_encoder, "--out", tmp_path / "shop")
    assert [p.name for p in tmp_path.iterdir()] == ["pictures"]
    run("build", pictures, "--encoder", tiny_encoder, "--out", tmp_path / "shop", "--max-bad-share", "0.2")


def test_file_names_that_can_be_no_id_are_skipped_and_listed(pictures, encoder, tmp_path):
    picture = pictures / "class_0" / "0.jpg"
    shutil.copy(picture, pictures / "class_0" / "two\nlines.jpg")
    shutil.copy(picture, os.fsencode(pictures / "class_0") + b"/latin\xff.jpg")
    report = build_collection(pictures, tmp_path / "shop", encoder=encoder)
    assert report.added == 48
    assert len(report.bad) == 2
    assert all("id must not" in one.reason for one in report.bad)


def test_columns_that_json_cannot_hold_are_written_as_text_or_left_out(pictures, encoder, tmp_path):
    import datetime

    from dml.collection.supply import payload_of
    from dml.data.table import Record

    columns = {"day": datetime.date(2024, 5, 1), "price": float("nan"), "tags": ("a", float("inf")), "n": 3}
    assert payload_of(Record(pictures, "red", payload=columns)) == {
        "day": "2024-05-01",
        "tags": ["a", None],
        "n": 3,
        "label": "red",
    }


def test_only_bad_pictures_are_an_error_whatever_the_limit(tmp_path, tiny_encoder):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="None of the 1 pictures"):
        run(
            "build",
            tmp_path / "bad",
            "--encoder",
            tiny_encoder,
            "--out",
            tmp_path / "shop",
            "--max-bad-share",
            "1",
        )


def test_sources_that_are_none_are_refused(tmp_path, tiny_encoder, tiny_folder):
    (tmp_path / "empty").mkdir()
    for source, error in ((tmp_path / "nowhere", DataError), (tmp_path / "empty", DataError)):
        with pytest.raises(error):
            run("build", source, "--encoder", tiny_encoder, "--out", tmp_path / "shop")
    with pytest.raises(DataError, match="give --encoder RUN"):
        run("build", tiny_folder, "--out", tmp_path / "shop")
    with pytest.raises(EncoderError):
        run("build", tiny_folder, "--encoder", tmp_path / "empty", "--out", tmp_path / "shop")
    with pytest.raises(ConfigError, match='Did you mean "hnsw"'):
        run("build", tiny_folder, "--encoder", tiny_encoder, "--out", tmp_path / "shop", "--index", "hsnw")
    with pytest.raises(UsageError, match="KEY=VALUE"):
        run("build", tiny_folder, "--encoder", tiny_encoder, "--out", tmp_path / "shop", "--option", "links")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_options_that_do_not_fit_are_refused_before_anything_is_embedded(
    tiny_folder, tiny_encoder, tmp_path, monkeypatch
):
    from dml.encoder import Encoder

    monkeypatch.setattr(Encoder, "embed_stream", None)
    for option, message in (("links=x", "got 'x'"), ("colour=3", "It takes: links")):
        with pytest.raises(ConfigError, match=message):
            run("build", tiny_folder, "--encoder", tiny_encoder, "--out", tmp_path / "shop",
                "--index", "hnsw", "--option", option)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_if_missing_finds_a_collection_whose_replacement_was_cut_short(shop, tiny_folder):
    shop.rename(shop.with_name(".shop.replaced"))
    assert "nothing to do" in run("build", tiny_folder, "--out", shop, "--if-missing").stderr
    assert "48 items" in run("verify", shop).stdout


def test_items_without_their_pictures_are_said(tiny_folder, pictures, encoder, tmp_path):
    from dml.data.table import open_table
    from dml.encoder.embeddings import embed_table

    embed_table(encoder, open_table(pictures), tmp_path / "vectors")
    shutil.rmtree(pictures / "class_0")
    said = run("build", tmp_path / "vectors", "--out", tmp_path / "shop", "--json")
    assert json.loads(said.stdout)["without_picture"] == 8
    assert "8 items have a vector only" in said.stderr


def test_other_things_at_out_are_left_alone_even_with_overwrite(tiny_folder, tiny_encoder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    for flags in ([], ["--overwrite"]):
        with pytest.raises(CollectionError, match="not a collection"):
            run("build", tiny_folder, "--encoder", tiny_encoder, "--out", tmp_path / "mine", *flags)
    assert files_below(tmp_path) == ["mine/thesis.txt"]


def test_building_again_adds_replaces_only_with_the_same_encoder(pictures, shop, tiny_encoder, other_encoder):
    with pytest.raises(CollectionError, match="another encoder.*--overwrite"):
        run("build", pictures, "--encoder", other_encoder, "--out", shop)
    (pictures / "class_9").mkdir()
    shutil.copy(pictures / "class_1" / "0.jpg", pictures / "class_9" / "new.jpg")
    with open_collection(shop) as there:
        there.set_root("files", pictures)
    report = json.loads(run("build", pictures, "--encoder", tiny_encoder, "--out", shop, "--json").stdout)
    assert (report["added"], report["replaced"]) == (1, 48)
    run("build", pictures, "--encoder", other_encoder, "--out", shop, "--overwrite")
    with open_collection(shop) as there:
        assert len(there) == 49
        assert there.verify() == []
    assert not list(shop.parent.glob(".*"))


def test_a_collection_that_is_written_to_is_not_replaced(pictures, shop, encoder):
    with open_collection(shop) as there:
        with pytest.raises(CollectionLocked):
            build_collection(pictures, shop, encoder=encoder, overwrite=True)
        assert len(there) == 48
    assert not list(shop.parent.glob(".*"))


def test_a_failure_on_the_way_leaves_out_as_it_was(pictures, shop, encoder, monkeypatch):
    from dml.collection.local import LocalCollection

    def fail(*args, **kwargs):
        raise StorageError("the disk is full")

    before = files_below(shop)
    monkeypatch.setattr(LocalCollection, "build_index", fail)
    with pytest.raises(StorageError):
        build_collection(pictures, shop, encoder=encoder, overwrite=True)
    with pytest.raises(StorageError):
        build_collection(pictures, shop.parent / "new", encoder=encoder)
    monkeypatch.undo()
    assert files_below(shop) == before
    left = [".new.building", ".shop.building", "pictures", "shop"]
    assert sorted(p.name for p in shop.parent.iterdir()) == left  # what was embedded is not embedded again
    for out in (shop, shop.parent / "new"):
        report = build_collection(pictures, out, encoder=encoder, overwrite=True)
        assert (report.added, report.resumed) == (0, 48)
    assert sorted(p.name for p in shop.parent.iterdir()) == ["new", "pictures", "shop"]


def test_what_a_killed_build_left_is_cleared_by_the_next(pictures, tmp_path, encoder):
    left = tmp_path / ".shop.building"
    left.mkdir()
    (left / "half").write_text("half")
    build_collection(pictures, tmp_path / "shop", encoder=encoder)
    assert not left.exists()
    assert len(files_below(tmp_path / "shop")) > 3


def test_a_full_disk_during_a_build_says_so_and_leaves_nothing(tiny_folder, tiny_encoder, tmp_path):
    script = f"""
import resource, signal, sys
from dml.collection.build import Settings, build_collection
from dml.encoder import Encoder
from dml.errors import StorageError
encoder = Encoder.load({str(tiny_encoder)!r}, device="cpu")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
settings = Settings(store=True)
try:
    build_collection({str(tiny_folder)!r}, {str(tmp_path / "shop")!r}, encoder=encoder, settings=settings)
except StorageError as error:
    print("refused:", error)
"""
    for room in ("1000", "30000"):
        done = subprocess.run(
            [sys.executable, "-c", script, room], capture_output=True, text=True, timeout=100
        )
        assert done.stdout.startswith("refused:"), (room, done.stdout, done.stderr)
        assert list(tmp_path.iterdir()) == []


def test_ctrl_c_during_a_build_ends_with_130_and_leaves_nothing(tiny_folder, tiny_encoder, tmp_path):
    script = f"""
import sys, time
import dml.encoder
from dml.cli.main import main
from dml.collection import importing
importing.COMMIT_SECONDS = 1000  # however long the first batch takes, nothing is written yet
original = dml.encoder.Encoder.embed_stream
def slow(self, *args, **kwargs):
    for batch in original(self, *args, **kwargs):
        yield batch
        print("embedding", flush=True)
        time.sleep(30)
dml.encoder.Encoder.embed_stream = slow
sys.argv = ["dml", "index", "build", {str(tiny_folder)!r}, "--encoder", {str(tiny_encoder)!r},
            "--out", {str(tmp_path / "shop")!r}, "--batch", "8"]
main()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "embedding\n"
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 130
    assert list(tmp_path.iterdir()) == []


# add, remove, rebuild, verify, root


def test_added_pictures_are_found_at_once_and_known_files_keep_their_ids(tiny_folder, shop, tmp_path, draw):
    new = tmp_path / "new"
    new.mkdir()
    draw(30).save(new / "a.jpg")
    assert "1 added" in run("add", shop, new).stdout
    assert "0 added, 8 replaced" in run("add", shop, tiny_folder / "class_1").stdout
    assert "0 added, 1 replaced" in run("add", shop, tiny_folder / "class_1" / "0.jpg").stdout
    found = json.loads(run_search(shop, new / "a.jpg", "-k", "1", "--json").stdout)
    assert found["hits"][0]["id"] == "new/a.jpg"
    with open_collection(shop) as there:
        assert len(there) == 49
        assert there.get(["class_1/0.jpg"])[0].label == "class_1"  # what was known is kept
        assert there.picture("new/a.jpg") == (new / "a.jpg").read_bytes()
        assert there.info().pending == 1 + 2 * 8  # 8 rows were replaced once, one of them twice


def test_adding_rebuilds_when_asked(shop, tiny_folder):
    run("add", shop, tiny_folder / "class_1", "--rebuild")
    assert json.loads(run("info", shop, "--json").stdout)["pending"] == 0


def test_an_encoder_that_does_not_fit_is_refused(shop, tiny_folder, other_encoder):
    with pytest.raises(ModelMismatch):
        run("add", shop, tiny_folder, "--encoder", other_encoder)


def test_removed_items_are_gone(shop, tmp_path):
    assert (
        "removed 2 of 3 items, 46 are left"
        in run("remove", shop, "class_0/0.jpg", "class_0/1.jpg", "x").stdout
    )
    (tmp_path / "ids.txt").write_text("class_0/2.jpg\n\nclass_0/3.jpg\n")
    said = json.loads(run("remove", shop, "--from", tmp_path / "ids.txt", "--json").stdout)
    assert said == {"removed": 2, "unknown": 0, "count": 44, "files_left": 2}
    with pytest.raises(UnknownItem, match="None of the 1 ids"):
        run("remove", shop, "class_0/0.jpg")
    with pytest.raises(UsageError, match="Unicode text"):
        run("remove", shop, os.fsdecode(b"latin\xff.jpg"))
    with pytest.raises(UsageError, match="No ids"):
        run("remove", shop)
    with open_collection(shop) as there:
        assert not [i for i in there.scroll(limit=99)[0] if i.id in ("class_0/0.jpg", "class_0/2.jpg")]


def test_whoever_removes_items_hears_that_their_files_bring_them_back(pictures, encoder, tmp_path):
    build_collection(pictures, tmp_path / "shop", encoder=encoder)
    said = run("remove", tmp_path / "shop", "class_0/0.jpg", "class_0/1.jpg").stderr
    assert "2 of their files are still there" in said
    assert "`dml index sync` will add them again" in said
    (pictures / "class_0" / "2.jpg").unlink()
    assert run("remove", tmp_path / "shop", "class_0/2.jpg").stderr == ""
    assert "2 new" in run("sync", tmp_path / "shop", "--dry-run").stdout


def test_only_a_known_root_is_moved(shop, tiny_folder, tmp_path):
    with pytest.raises(UsageError, match=r'no root "fles"; it has: files.*dml index add'):
        run("root", shop, "fles", tiny_folder)
    with open_collection(shop) as there:
        manifest = there.manifest
        assert list(manifest.roots) == ["files"]
        there._present.save_manifest(manifest.with_(roots={}))  # as a repair may leave it
    assert "files = " in run("root", shop, "files", tiny_folder).stdout
    assert run("verify", shop).exit_code == 0


def test_pictures_above_a_number_of_pixels_count_as_unreadable(pictures, tiny_encoder, tmp_path):
    Image.new("RGB", (400, 300)).save(pictures / "class_0" / "large.png")
    arguments = ("build", pictures, "--encoder", tiny_encoder, "--out", tmp_path / "shop")
    said = run(*arguments, "--max-pixels", 100_000)
    assert "48 added" in said.stdout
    assert "400 x 300 = 120,000 pixels; at most 100,000 are allowed" in said.stderr
    assert "1 new" in run("sync", tmp_path / "shop", "--max-pixels", 120_000).stdout
    assert "0 new" in run("sync", tmp_path / "shop").stdout


def test_a_build_that_is_refused_leaves_no_empty_folders(pictures, tiny_encoder, tmp_path):
    for path in pictures.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError):
        run("build", pictures, "--encoder", tiny_encoder, "--out", tmp_path / "mine" / "a" / "b" / "shop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "pictures"]
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(("folder", "name"), [("shoes.collection", "shoes"), ("shoes", "shoes")])
def test_the_ending_of_the_folder_is_no_part_of_the_name(folder, name, tiny_folder, encoder, tmp_path):
    build_collection(tiny_folder / "class_0", tmp_path / folder, encoder=encoder)
    assert json.loads(run("info", tmp_path / folder, "--json").stdout)["name"] == name
    with create_collection(tmp_path / f"new.{folder}", dim=4, fingerprint="f") as there:
        assert there.name == f"new.{name}"


def test_a_folder_of_pictures_is_told_how_it_becomes_a_collection(tiny_folder, tmp_path):
    with pytest.raises(
        UnknownCollection, match=rf"dml index build {tiny_folder} .*--out {tiny_folder}\.coll"
    ):
        run("info", tiny_folder)
    with pytest.raises(UnknownCollection, match=rf"There is no collection at {tmp_path / 'new'}\. .*--out"):
        run("info", tmp_path / "new")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnknownCollection, match="is a file"):
        run("info", tmp_path / "file")


def test_rebuild_changes_the_kind(shop):
    pytest.importorskip("faiss")
    assert "index hnsw over 48 items: recall@10" in run("rebuild", shop, "--index", "hnsw").stdout
    assert json.loads(run("info", shop, "--json").stdout)["index"]["kind"] == "hnsw"
    assert "index hnsw" in run("rebuild", shop).stdout


def test_verify_ends_with_1_when_something_is_wrong(shop):
    assert "48 items, everything fits" in run("verify", shop).stdout
    [snapshot] = (shop / "snapshots").glob("*.index")
    snapshot.write_bytes(snapshot.read_bytes()[:-3])
    result = run("verify", shop)
    assert result.exit_code == 1
    assert "cut short" in result.stdout
    assert result.stderr.strip().endswith("1 problem")
    said = run("verify", shop, "--json")
    assert said.exit_code == 1
    assert len(json.loads(said.stdout)["problems"]) == 1


def test_a_moved_folder_is_found_again(pictures, encoder, tmp_path):
    build_collection(pictures, tmp_path / "shop", encoder=encoder)
    pictures.rename(tmp_path / "moved")
    assert run("verify", tmp_path / "shop").exit_code == 1
    run("root", tmp_path / "shop", "files", tmp_path / "moved")
    assert run("verify", tmp_path / "shop").exit_code == 0
    with pytest.raises(UsageError, match="no folder"):
        run("root", tmp_path / "shop", "files", tmp_path / "absent")


def test_help_names_every_command_with_a_whole_sentence():
    said = run("--help").stdout
    assert "..." not in said.partition("Commands:")[2]
    assert "--install-completion" not in said
    assert "goes on after an interruption." in " ".join(said.split())
    examples = run("sync", "--help").stdout.splitlines()
    assert "  dml index sync shoes.collection --dry-run" in examples


def test_info_is_for_people_too(shop):
    said = run("info", shop).stdout
    for part in ("48", "16 numbers, cosine", "faiss_flat" if "faiss_flat" in said else "flat", "1.0000"):
        assert part in said


# search


def test_the_table_names_the_nearest_first(built, tiny_folder):
    lines = run_search(built, tiny_folder / "class_2" / "4.jpg", "-k", "3").stdout.splitlines()
    assert lines[1].split() == ["1", "1.0000", "class_2", "class_2/4.jpg"]
    assert len(lines) == 4


def test_json_has_everything(built, tiny_folder):
    found = json.loads(run_search(built, tiny_folder / "class_2" / "4.jpg", "-k", "5", "--json").stdout)
    assert (found["collection"], found["approximate"]) == ("shop", False)
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3, 4, 5]
    assert found["hits"][0]["payload"] == {"label": "class_2"}
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    strict = run_search(built, tiny_folder / "class_2" / "4.jpg", "--threshold", "0.9999", "--json")
    assert len(json.loads(strict.stdout)["hits"]) == 1


class Page(HTMLParser):
    """Pictures and addresses of a page."""

    def __init__(self, text):
        super().__init__()
        self.pictures, self.links = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "img":
            self.pictures.append(found["src"])
        self.links += [found[name] for name in ("src", "href") if name in found]


def test_the_page_holds_its_pictures_and_asks_nobody(built, tiny_folder, tmp_path):
    run_search(built, tiny_folder / "class_2" / "4.jpg", "-k", "4", "--html", tmp_path / "found.html")
    text = (tmp_path / "found.html").read_text()
    page = Page(text)
    assert len(page.pictures) == 1 + 4
    assert all(link.startswith("data:") for link in page.links)
    assert "<script" not in text
    assert "class_2/4.jpg" in text


def test_names_from_outside_are_text_on_the_page_and_not_markup(shop, tiny_folder, tmp_path, encoder):
    from dml.collection import NewItem

    evil = "<img src=x onerror=alert(1)>"
    picture = tiny_folder / "class_2" / "4.jpg"
    with open_collection(shop) as there:
        there.add(
            [NewItem(evil, encoder.embed([picture])[0], {"label": '"><script>x</script>', "a": "'\">"})]
        )
    run_search(shop, picture, "--html", tmp_path / "found.html")
    text = (tmp_path / "found.html").read_text()
    assert "<script" not in text
    assert evil not in text
    assert "&lt;img src=x" in text
    table = run_search(shop, picture, "-k", "2").stdout
    assert "onerror" in table


def test_a_page_shows_items_whose_pictures_are_gone(shop, tiny_folder, tmp_path):
    with open_collection(shop) as there:
        there.set_root("files", tmp_path / "gone")
    run_search(shop, tiny_folder / "class_2" / "4.jpg", "-k", "3", "--html", tmp_path / "found.html")
    assert (tmp_path / "found.html").read_text().count("no picture") == 3


def test_what_is_no_picture_or_no_collection_is_refused(built, tiny_folder, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    for image in (tmp_path / "text.jpg", tmp_path / "absent.jpg"):
        with pytest.raises(InvalidImage):
            run_search(built, image)
    with pytest.raises(UnknownCollection):
        run_search(tmp_path, tiny_folder / "class_2" / "4.jpg")
    Image.new("L", (1, 1)).save(tmp_path / "small.png")
    assert run_search(built, tmp_path / "small.png", "-k", "1").exit_code == 0


def test_a_search_while_a_writer_has_it_open_works(shop, tiny_folder):
    with open_collection(shop) as there:
        there.delete(["class_2/4.jpg"])
        found = json.loads(run_search(shop, tiny_folder / "class_2" / "4.jpg", "--json").stdout)
    assert "class_2/4.jpg" not in [hit["id"] for hit in found["hits"]]


def test_a_service_that_is_not_there_is_a_clear_error(tiny_folder):
    with pytest.raises(DmlError, match="127.0.0.1:9"):
        run_search("shop", tiny_folder / "class_2" / "4.jpg", "--url", "http://127.0.0.1:9")


def test_a_running_service_gives_the_same_answer_as_the_folder(built, tiny_folder, tmp_path):
    pytest.importorskip("fastapi")
    picture = tiny_folder / "class_2" / "4.jpg"
    script = "from dml.cli.main import main; main()"
    server = subprocess.Popen(
        [sys.executable, "-c", script, "serve", str(built), "--port", "0", "--read-only"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with server:
        try:
            assert server.stdout is not None
            url = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
            served = run_search("shop", picture, "--url", url, "--html", tmp_path / "found.html", "--json")
        finally:
            server.terminate()
    folder = json.loads(run_search(built, picture, "--json").stdout)
    for here, there in zip(folder["hits"], json.loads(served.stdout)["hits"], strict=True):
        assert (here["id"], here["label"], here["payload"]) == (there["id"], there["label"], there["payload"])
        assert here["score"] == pytest.approx(there["score"], abs=1e-5)
    assert len(Page((tmp_path / "found.html").read_text()).pictures) == 11


def test_the_python_of_the_documentation_runs(shop, tiny_folder, tmp_path, monkeypatch, capsys):
    pytest.importorskip("faiss")
    text = (Path(__file__).parent.parent / "docs" / "index.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    shop.rename(tmp_path / "shoes.collection")
    shutil.copy(tiny_folder / "class_0" / "0.jpg", tmp_path / "new.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, "docs/index.md", "exec"), {})
    assert "1.000 class_0/0.jpg class_0" in capsys.readouterr().out


def test_searching_needs_no_torch(built, tiny_folder):
    script = f"""
import sys
sys.modules["torch"] = None
sys.argv = ["dml", "search", {str(built)!r}, {str(tiny_folder / "class_0" / "0.jpg")!r}, "-k", "1"]
from dml.cli.main import main
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert "class_0/0.jpg" in done.stdout, done.stderr
