"""From a folder to a collection: going on after an interruption, equal bytes, labels, where the time went."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dml.cli.index import app
from dml.collection import importing, open_collection
from dml.collection.build import add_to_collection, build_collection
from dml.collection.importing import Settings
from dml.collection.notes import FILE, FileNote, FileNotes
from dml.collection.place import building
from dml.encoder import Encoder
from dml.errors import StorageError, TooManyBadImages

TWO = Settings(workers=2, batch_size=8)


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    return Encoder.load(tiny_encoder, device="cpu", threads=2)


class Interrupted(Encoder):
    """A real encoder that counts its pictures, and is interrupted after `limit` of them."""

    def __init__(self, inner, limit=10**9, decoder="pillow"):
        super().__init__(inner._manifest, inner._runtime, decoder=decoder)
        self.count, self.limit = 0, limit

    def _run(self, pixels, runtime=None):
        if self.count >= self.limit:
            raise KeyboardInterrupt
        self.count += len(pixels)
        return super()._run(pixels, runtime)


@pytest.fixture
def interrupted(photos, encoder, tmp_path, monkeypatch):
    """Where a build of `photos` was interrupted half-way, and how many items it had written."""
    monkeypatch.setattr(importing, "COMMIT_EVERY", 8)
    with pytest.raises(KeyboardInterrupt):
        build_collection(photos, tmp_path / "shop", encoder=Interrupted(encoder, 24), settings=TWO)
    with open_collection(building(tmp_path / "shop"), read_only=True) as left:
        assert 8 <= len(left) <= 24
        return tmp_path / "shop", len(left)


def contents(path):
    with open_collection(path) as shop:
        assert shop.verify() == []
        found, _ = shop.scroll(limit=999, with_vector=True)
        return {item.id: (dict(item.payload), item.picture) for item in found}, {
            item.id: item.vector for item in found
        }


# Going on


def test_an_interrupted_build_goes_on_where_it_was(photos, interrupted, encoder, tmp_path):
    out, written = interrupted
    assert not out.exists()
    said, rest = [], Interrupted(encoder)
    report = build_collection(photos, out, encoder=rest, settings=TWO, announce=said.append)
    assert (report.resumed, report.added, rest.count) == (written, 48 - written, 48 - written)
    assert said == [f"going on with {written:,} items that an interrupted build has left"]
    build_collection(photos, tmp_path / "whole", encoder=encoder, settings=TWO)
    (items, vectors), (whole, expected) = contents(out), contents(tmp_path / "whole")
    assert items == whole
    assert all(np.allclose(vectors[id], expected[id], atol=2e-6) for id in whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "shop", "whole"]
    assert not (out / "begun.json").exists()


def test_what_has_changed_meanwhile_is_embedded_and_what_is_gone_is_dropped(
    photos, interrupted, encoder, draw
):
    out, written = interrupted
    draw(99).save(photos / "class_0" / "0.jpg")
    (photos / "class_0" / "1.jpg").unlink()
    rest = Interrupted(encoder)
    build_collection(photos, out, encoder=rest, settings=TWO)
    assert rest.count == 47 - (written - 2)
    items, vectors = contents(out)
    assert len(items) == 47
    expected = encoder.embed([photos / "class_0" / "0.jpg"])[0]
    np.testing.assert_allclose(vectors["class_0/0.jpg"], expected, atol=2e-6)


@pytest.mark.parametrize("other", ["source", "settings", "profile", "no resume"])
def test_another_build_into_the_same_place_begins_anew(photos, interrupted, encoder, tmp_path, other):
    out, _ = interrupted
    source, settings, decoder = photos, TWO, "pillow"
    if other == "source":
        source = photos.rename(tmp_path / "elsewhere")
    elif other == "settings":
        settings = Settings(workers=2, store=True)
    elif other == "profile":
        decoder = "fused"
    fresh = Interrupted(encoder, decoder=decoder)
    report = build_collection(source, out, encoder=fresh, settings=settings, resume=other != "no resume")
    assert (report.resumed, report.added, fresh.count) == (0, 48, 48)
    contents(out)


def test_too_many_bad_pictures_cost_nothing_that_was_done(photos, encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "COMMIT_EVERY", 8)
    for n in range(4):
        (photos / "class_4" / f"{n}.jpg").write_bytes(b"no picture")
    with pytest.raises(TooManyBadImages):
        build_collection(photos, tmp_path / "shop", encoder=encoder, settings=TWO)
    allowed = Settings(workers=2, max_bad_share=0.5)
    report = build_collection(photos, tmp_path / "shop", encoder=encoder, settings=allowed)
    assert report.resumed > 0
    assert (report.resumed + report.added, len(report.bad)) == (44, 4)


def test_a_damaged_leftover_begins_anew(photos, interrupted, encoder):
    out, _ = interrupted
    (building(out) / "catalog.sqlite").write_bytes(b"nonsense" * 999)
    for name in ("catalog.sqlite-wal", "catalog.sqlite-shm"):
        (building(out) / name).unlink(missing_ok=True)
    assert build_collection(photos, out, encoder=encoder, settings=TWO).added == 48


KILLED = """
import os, signal, sys
from dml.collection import importing
from dml.collection.build import build_collection
from dml.collection.importing import Settings
from dml.encoder import Encoder
importing.COMMIT_EVERY = 8

def watch(done, total, bad):
    if done >= 24:
        os.kill(os.getpid(), signal.SIGKILL)

encoder = Encoder.load(sys.argv[1], device="cpu", threads=1)
build_collection(sys.argv[2], sys.argv[3], encoder=encoder, settings=Settings(workers=1, batch_size=4),
                 progress=watch)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_build_goes_on_on_the_command_line(photos, encoder, tmp_path):
    command = [sys.executable, "-c", KILLED, str(encoder.path), str(photos), str(tmp_path / "shop")]
    assert subprocess.run(command, timeout=100, capture_output=True).returncode == -signal.SIGKILL
    arguments = ["build", photos, "--encoder", encoder.path, "--out", tmp_path / "shop", "--workers", "2"]
    said = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert "going on with" in said.stderr
    assert "were there from an interrupted build" in said.stdout
    assert "work: decode" in said.stdout
    assert len(contents(tmp_path / "shop")[0]) == 48


def test_the_python_of_the_documentation_runs(photos, encoder, tmp_path, monkeypatch, capsys):
    shutil.copytree(encoder.path, tmp_path / "runs" / "shoes" / "encoder")
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "building.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "docs/building.md", "exec"), {})
    assert "48 added, 0 unreadable" in capsys.readouterr().out


# Equal bytes


@pytest.fixture
def copies(photos):
    for n in range(3):
        shutil.copy(photos / "class_0" / "0.jpg", photos / "class_3" / f"copy {n}.jpg")
    return photos


def test_equal_bytes_are_embedded_once_and_reported(copies, encoder, tmp_path):
    counting = Interrupted(encoder)
    report = build_collection(copies, tmp_path / "shop", encoder=counting, settings=TWO)
    assert (report.added, report.skipped, counting.count) == (51, 0, 48)
    assert report.duplicates == [(f"class_3/copy {n}.jpg", "class_0/0.jpg") for n in range(3)]
    items, vectors = contents(tmp_path / "shop")
    assert items["class_3/copy 1.jpg"][0] == {"label": "class_3"}
    np.testing.assert_array_equal(vectors["class_3/copy 1.jpg"], vectors["class_0/0.jpg"])


def test_copies_are_left_out_when_asked(copies, encoder, tmp_path):
    arguments = ["build", copies, "--encoder", encoder.path, "--out", tmp_path / "shop"]
    said = CliRunner().invoke(
        app, [*map(str, arguments), "--duplicates", "skip", "--json"], catch_exceptions=False
    )
    found = json.loads(said.stdout)
    assert (found["added"], found["skipped_duplicates"], len(found["duplicates"])) == (48, 3, 3)
    assert set(found["work_seconds"]) == {"decode", "embed", "write"}


def test_boxes_of_one_picture_are_no_copies_of_each_other(photos, encoder, tmp_path):
    rows = ["path,box", "photos/class_0/0.jpg,0 0 32 32", "photos/class_0/0.jpg,32 32 64 64"]
    (tmp_path / "boxes.csv").write_text("\n".join(rows) + "\n")
    report = build_collection(tmp_path / "boxes.csv", tmp_path / "shop", encoder=encoder, settings=TWO)
    assert (report.added, report.duplicates) == (2, [])
    one, other = contents(tmp_path / "shop")[1].values()
    assert not np.allclose(one, other)


# Adding below a root


def test_what_is_added_below_a_root_has_the_root_s_labels(photos, encoder, draw, tmp_path):
    build_collection(photos, tmp_path / "shop", encoder=encoder, settings=TWO)
    (photos / "class_9").mkdir()
    draw(50).save(photos / "class_9" / "a.jpg")
    draw(51).save(photos / "class_9" / "b.jpg")
    with open_collection(tmp_path / "shop", merge="manual") as shop:
        add_to_collection(shop, photos / "class_9", encoder=encoder, settings=TWO)
        draw(52).save(photos / "class_9" / "c.jpg")
        add_to_collection(shop, photos / "class_9" / "c.jpg", encoder=encoder, settings=TWO)
        assert [item.label for item in shop.get([f"class_9/{n}.jpg" for n in "abc"])] == ["class_9"] * 3


def test_a_second_root_keeps_its_ids_when_it_is_added_again(photos, encoder, draw, tmp_path):
    build_collection(photos, tmp_path / "shop", encoder=encoder, settings=TWO)
    (tmp_path / "new").mkdir()
    draw(50).save(tmp_path / "new" / "a.jpg")
    with open_collection(tmp_path / "shop", merge="manual") as shop:
        for added in (1, 0):
            report = add_to_collection(shop, tmp_path / "new", encoder=encoder, settings=TWO)
            assert (report.added, report.replaced) == (added, 1 - added)
        assert len(shop) == 49


# Notes on files


def test_notes_are_kept_and_a_damaged_file_of_them_is_begun_anew(tmp_path):
    notes = FileNotes(tmp_path)
    assert notes.load("files") == {}
    old = FileNote(10, 10**18, "a" * 64)
    notes.save("files", {"x.jpg": old, "y.jpg": old})
    notes.forget("files", ["y.jpg"])
    assert (notes.load("files"), notes.load("other")) == ({"x.jpg": old}, {})
    (tmp_path / FILE).write_bytes(b"nonsense" * 999)
    assert notes.load("files") == {}
    notes.save("files", {"z.jpg": old})
    assert notes.load("files") == {"z.jpg": old}


def test_a_file_of_this_moment_is_noted_without_its_time(tmp_path):
    import time

    FileNotes(tmp_path).save("files", {"x.jpg": FileNote(10, time.time_ns(), "a")})
    assert FileNotes(tmp_path).load("files") == {"x.jpg": FileNote(10, 0, "a")}


def test_notes_that_cannot_be_written_are_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="could not be written"):
        FileNotes(tmp_path / "nowhere").save("files", {})
