"""A collection follows its folder: real folders, real pictures, real interruptions."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dml.cli.index import app
from dml.collection import NewItem, open_collection
from dml.collection.build import add_to_collection, build_collection
from dml.collection.importing import Settings
from dml.collection.sync import sync_collection
from dml.encoder import Encoder
from dml.errors import CollectionLocked, DataError, TooManyRemovals, UsageError

ONE = Settings(workers=2)


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    return Encoder.load(tiny_encoder, device="cpu", threads=2)


@pytest.fixture
def shop(photos, encoder, tmp_path):
    with open_after(build_collection(photos, tmp_path / "shop", encoder=encoder, settings=ONE)) as there:
        yield there


def open_after(report):
    return open_collection(report.path, merge="manual")


class Counting(Encoder):
    """A real encoder that counts the pictures that it embeds."""

    def __init__(self, inner):
        super().__init__(inner._manifest, inner._runtime)
        self.count = 0

    def _run(self, pixels, runtime=None):
        self.count += len(pixels)
        return super()._run(pixels, runtime)


def follow(shop, encoder, source=None, **options):
    """Counts of a sync, after which the collection is sound and a second sync has nothing to do."""
    report = sync_collection(shop, source, encoder=encoder, settings=ONE, **options)
    assert shop.verify() == []
    again = sync_collection(shop, source, encoder=encoder, settings=ONE, dry_run=True, most_removed=1)
    differs = {name: n for name, n in again.plan.counts.items() if n and name != "unchanged"}
    assert not differs or report.imported.bad, differs
    return {name: count for name, count in report.plan.counts.items() if count}


def draw_into(path, draw, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(seed).save(path, quality=92)


def ids(shop):
    return {item.id for item in shop.scroll(limit=999)[0]}


def vector(shop, id):
    return shop.get([id], with_vector=True)[0].vector


# What differs


def test_nothing_to_do_reads_and_writes_nothing(shop, encoder):
    counting, generation = Counting(encoder), shop.generation
    report = sync_collection(shop, encoder=counting, settings=ONE)
    assert report.plan.counts == {
        "new": 0,
        "changed": 0,
        "moved": 0,
        "relabelled": 0,
        "removed": 0,
        "unchanged": 48,
    }
    assert (counting.count, shop.generation, report.plan.read) == (0, generation, {})


def test_new_and_changed_pictures_are_embedded_and_the_others_are_not(shop, photos, encoder, draw):
    shop.update_payload("class_1/1.jpg", {"price": 3})
    draw_into(photos / "class_1" / "1.jpg", draw, 77)
    draw_into(photos / "class_9" / "new.jpg", draw, 78)
    counting = Counting(encoder)
    assert follow(shop, counting) == {"new": 1, "changed": 1, "unchanged": 47}
    assert counting.count == 2
    changed, new = shop.get(["class_1/1.jpg", "class_9/new.jpg"])
    assert (changed.payload, new.payload) == ({"label": "class_1", "price": 3}, {"label": "class_9"})
    expected = encoder.embed([photos / "class_1" / "1.jpg"])[0]
    np.testing.assert_allclose(vector(shop, "class_1/1.jpg"), expected, atol=2e-6)


def test_a_file_that_was_only_touched_is_unchanged(shop, photos, encoder):
    os.utime(photos / "class_0" / "0.jpg")
    counting = Counting(encoder)
    assert follow(shop, counting) == {"unchanged": 48}
    assert counting.count == 0


def test_a_moved_picture_keeps_its_vector_and_what_is_known_and_takes_the_new_label(shop, photos, encoder):
    before = vector(shop, "class_1/1.jpg")
    shop.update_payload("class_1/1.jpg", {"price": 3, "stock": {"red": 1}})
    os.rename(photos / "class_1" / "1.jpg", photos / "class_2" / "elsewhere.jpg")
    counting = Counting(encoder)
    assert follow(shop, counting) == {"moved": 1, "unchanged": 47}
    assert counting.count == 0
    [item] = shop.get(["class_2/elsewhere.jpg"])
    assert item.payload == {"label": "class_2", "price": 3, "stock": {"red": 1}}
    np.testing.assert_array_equal(vector(shop, item.id), before)
    assert shop.picture(item.id) == (photos / "class_2" / "elsewhere.jpg").read_bytes()
    assert "class_1/1.jpg" not in ids(shop)


def test_a_picture_that_leaves_its_class_folder_loses_the_label(shop, photos, encoder):
    os.rename(photos / "class_1" / "1.jpg", photos / "loose.jpg")
    assert follow(shop, encoder) == {"moved": 1, "unchanged": 47}
    assert shop.get(["loose.jpg"])[0].payload == {}


def test_a_whole_class_that_is_renamed_moves(shop, photos, encoder):
    os.rename(photos / "class_1", photos / "boots")
    counting = Counting(encoder)
    assert follow(shop, counting) == {"moved": 8, "unchanged": 40}
    assert counting.count == 0
    assert {shop.get([f"boots/{n}.jpg"])[0].label for n in range(8)} == {"boots"}


def test_names_that_differ_in_case_only_are_other_names(shop, photos, encoder):
    os.rename(photos / "class_1" / "1.jpg", photos / "class_1" / "tmp")
    os.rename(photos / "class_1" / "tmp", photos / "class_1" / "1.JPG")
    if (photos / "class_1" / "1.jpg").exists():
        pytest.skip("this file system does not tell case apart")
    assert follow(shop, encoder) == {"moved": 1, "unchanged": 47}
    assert "class_1/1.JPG" in ids(shop)
    assert "class_1/1.jpg" not in ids(shop)


def test_two_pictures_that_change_places_change_vectors_without_being_embedded(shop, photos, encoder):
    one, other = photos / "class_1" / "1.jpg", photos / "class_2" / "2.jpg"
    vectors = [vector(shop, "class_1/1.jpg"), vector(shop, "class_2/2.jpg")]
    os.rename(one, photos / "aside")
    os.rename(other, one)
    os.rename(photos / "aside", other)
    os.utime(one, (2e9, 2e9))
    counting = Counting(encoder)
    assert follow(shop, counting) == {"changed": 2, "unchanged": 46}
    assert counting.count == 0
    np.testing.assert_array_equal(vector(shop, "class_1/1.jpg"), vectors[1])
    np.testing.assert_array_equal(vector(shop, "class_2/2.jpg"), vectors[0])


def test_what_is_gone_is_forgotten_and_what_came_from_elsewhere_stays(shop, photos, encoder, draw, tmp_path):
    shop.add([NewItem("upload", vector(shop, "class_0/0.jpg"), {"by": "hand"}, image=b"bytes")])
    draw_into(tmp_path / "other" / "x.jpg", draw, 5)
    add_to_collection(shop, tmp_path / "other", encoder=encoder, settings=ONE)
    (photos / "class_1" / "1.jpg").unlink()
    report = sync_collection(shop, encoder=encoder, settings=ONE)
    assert [item.id for item in report.plan.removed] == ["class_1/1.jpg"]
    assert len(shop) == 49
    assert {"upload", "other/x.jpg"} <= ids(shop)


def test_a_label_that_somebody_corrected_stays(shop, photos, encoder):
    shop.update_payload("class_1/1.jpg", {"label": "corrected"})
    assert follow(shop, encoder) == {"unchanged": 48}
    assert shop.get(["class_1/1.jpg"])[0].label == "corrected"


def test_links_are_followed_as_reading_a_folder_follows_them(shop, photos, encoder, tmp_path):
    shutil.copytree(photos / "class_0", tmp_path / "outside")
    os.symlink(tmp_path / "outside", photos / "linked")
    os.symlink(photos, photos / "class_0" / "loop")  # entered already: not entered again
    os.symlink(tmp_path / "nowhere.jpg", photos / "class_0" / "dangling.jpg")
    counting = Counting(encoder)
    report = sync_collection(shop, encoder=counting, settings=ONE)
    assert report.plan.counts["new"] == 9
    assert [Path(one.path).name for one in report.imported.bad] == ["dangling.jpg"]
    assert counting.count == 0  # the bytes have vectors
    assert shop.get(["linked/3.jpg"])[0].label == "linked"
    shutil.rmtree(tmp_path / "outside")
    assert sync_collection(shop, encoder=encoder, settings=ONE, most_removed=1).plan.counts["removed"] == 8


def test_a_picture_that_became_unreadable_stays_as_it_was(shop, photos, encoder):
    before = vector(shop, "class_1/1.jpg")
    (photos / "class_1" / "1.jpg").write_bytes(b"half an upload")
    report = sync_collection(shop, encoder=encoder, settings=ONE)
    assert [Path(one.path).name for one in report.imported.bad] == ["1.jpg"]
    np.testing.assert_array_equal(vector(shop, "class_1/1.jpg"), before)


def test_stored_copies_follow_too_and_uploads_do_not_go(photos, encoder, tmp_path):
    store = Settings(store=True, workers=2)
    with open_after(build_collection(photos, tmp_path / "shop", encoder=encoder, settings=store)) as shop:
        shop.add([NewItem("class_7/upload.jpg", vector(shop, "class_0/0.jpg"), image=b"bytes")])
        (photos / "class_1" / "1.jpg").unlink()
        os.rename(photos / "class_2" / "2.jpg", photos / "class_3" / "moved.jpg")
        assert follow(shop, encoder) == {"moved": 1, "removed": 1, "unchanged": 46}
        assert shop.get(["class_3/moved.jpg"])[0].picture.kind == "stored"
        assert shop.picture("class_3/moved.jpg") == (photos / "class_3" / "moved.jpg").read_bytes()
        assert "class_7/upload.jpg" in ids(shop)


def test_a_manifest_s_rows_are_followed(photos, encoder, tmp_path):
    def write(rows):
        lines = [f"photos/class_{k}/{n}.jpg,{label},{price}" for k, n, label, price in rows]
        (tmp_path / "list.csv").write_text("\n".join(["path,label,price", *lines]) + "\n")

    rows = [(k, n, f"kind {k}", 10 * k + n) for k in range(6) for n in range(4)]
    write(rows)
    source = tmp_path / "list.csv"
    with open_after(build_collection(source, tmp_path / "shop", encoder=encoder, settings=ONE)) as shop:
        shop.update_payload(next(iter(sorted(ids(shop)))), {"seen": True})
        write([(0, 0, "kind 0", 99), *rows[1:-1], (5, 7, "kind 5", 1)])
        counts = follow(shop, encoder, source)
        assert counts == {"new": 1, "relabelled": 1, "removed": 1, "unchanged": 22}
        first = min(ids(shop))
        assert shop.get([first])[0].payload == {"label": "kind 0", "price": 99, "seen": True}


def test_a_picture_stays_in_its_root_by_whatever_way_it_is_added(
    shop, photos, encoder, tmp_path, monkeypatch
):
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    for way in (
        "photos/class_1/1.jpg",
        "photos/../photos/class_1/1.jpg",
        "link/class_1/1.jpg",
        "link/class_1",
    ):
        assert add_to_collection(shop, way, encoder=encoder, settings=ONE).added == 0
        assert list(shop.manifest.roots) == ["files"]
        assert shop.get(["class_1/1.jpg"])[0].label == "class_1"
    assert follow(shop, encoder) == {"unchanged": 48}
    assert follow(shop, encoder, tmp_path / "link" / "class_1") == {"unchanged": 8}


def test_a_folder_of_the_same_name_elsewhere_takes_no_ids_away(shop, photos, encoder, draw, tmp_path):
    draw_into(tmp_path / "other" / "class_1" / "1.jpg", draw, 80)
    report = add_to_collection(shop, tmp_path / "other" / "class_1", encoder=encoder, settings=ONE)
    assert (report.added, report.replaced) == (1, 0)
    assert {"class_1/1.jpg", "class_1-2/1.jpg"} <= ids(shop)
    assert follow(shop, encoder) == {"unchanged": 48}
    assert follow(shop, encoder, tmp_path / "other" / "class_1") == {"unchanged": 1}


def test_a_root_above_another_is_followed_as_a_whole(photos, encoder, tmp_path):
    build_collection(photos / "class_1", tmp_path / "shop", encoder=encoder, settings=ONE)
    with open_collection(tmp_path / "shop", merge="manual") as shop:
        add_to_collection(shop, photos, encoder=encoder, settings=ONE)
        assert {"1.jpg", "photos/class_1/1.jpg", "photos/class_2/1.jpg"} <= ids(shop)
        assert follow(shop, encoder, photos).get("new", 0) == 0
        assert follow(shop, encoder) == {"unchanged": 16}
        (photos / "class_1" / "1.jpg").unlink()
        assert follow(shop, encoder, photos)["removed"] == 2
        assert not {"1.jpg", "photos/class_1/1.jpg"} & ids(shop)


def test_a_root_may_be_named_by_a_way_with_dots(shop, photos, encoder, tmp_path):
    shop.set_root("files", tmp_path / "elsewhere" / ".." / "photos")
    assert shop.manifest.roots == {"files": str(photos)}
    assert follow(shop, encoder) == {"unchanged": 48}


def test_a_folder_below_a_root_is_followed_alone(shop, photos, encoder, draw):
    draw_into(photos / "class_1" / "new.jpg", draw, 40)
    draw_into(photos / "class_2" / "new.jpg", draw, 41)
    assert follow(shop, encoder, photos / "class_1") == {"new": 1, "unchanged": 8}
    assert shop.get(["class_1/new.jpg"])[0].label == "class_1"


# What is refused


def test_more_than_a_tenth_is_not_deleted_unasked(shop, photos, encoder):
    shutil.rmtree(photos / "class_1")
    with pytest.raises(TooManyRemovals, match=r"8 of 48 items .* --yes\. Nothing was changed"):
        sync_collection(shop, encoder=encoder, settings=ONE)
    assert len(shop) == 48
    assert follow(shop, encoder, most_removed=1) == {"removed": 8, "unchanged": 40}


def test_a_folder_that_is_not_there_or_empty_deletes_nothing(shop, photos, encoder):
    os.rename(photos, photos.with_name("unmounted"))
    with pytest.raises(DataError):
        sync_collection(shop, encoder=encoder, most_removed=1)
    photos.mkdir()
    with pytest.raises(DataError):
        sync_collection(shop, encoder=encoder, most_removed=1)
    assert len(shop) == 48


def test_a_folder_that_the_collection_does_not_know_is_refused(shop, tiny_folder, encoder):
    with pytest.raises(UsageError, match="not below a folder that this collection knows"):
        sync_collection(shop, tiny_folder, encoder=encoder)


# On the command line, by cron


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


def test_the_command_says_first_and_does_then(photos, shop, encoder, draw):
    shop.close()
    draw_into(photos / "class_1" / "new.jpg", draw, 40)
    dry = run("sync", shop.path, "--dry-run", "--json")
    assert json.loads(dry.stdout)["new"] == ["class_1/new.jpg"]
    with open_collection(shop.path) as there:
        assert len(there) == 48
        assert isinstance(run("sync", shop.path).exception, CollectionLocked)
    done = run("sync", shop.path, "--workers", "2")
    assert "done: 1 new, 0 changed, 0 moved, 0 relabelled, 0 removed, 48 unchanged" in done.stdout
    assert "0 new" in run("sync", shop.path).stdout


KILLED = """
import os, signal, sys
from dml.collection import open_collection
from dml.collection.catalog import Catalog
from dml.collection.sync import sync_collection
from dml.collection import importing, sync
from dml.encoder import Encoder
importing.COMMIT_EVERY = sync.COMMIT_EVERY = 3
left = int(sys.argv[3])

def dying(write):
    def call(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*args, **kwargs)
    return call

for name in ("put", "remove", "merge_payload"):
    setattr(Catalog, name, dying(getattr(Catalog, name)))
with open_collection(sys.argv[1], merge="manual") as shop:
    sync_collection(shop, encoder=Encoder.load(sys.argv[2], device="cpu", threads=1), most_removed=1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("writes", [0, 1, 2, 4, 6])
def test_whoever_is_killed_on_the_way_goes_on_with_the_same_command(shop, photos, encoder, draw, writes):
    for n in range(5):
        draw_into(photos / "class_8" / f"{n}.jpg", draw, 60 + n)
        os.rename(photos / "class_1" / f"{n}.jpg", photos / "class_2" / f"moved {n}.jpg")
    for n in range(4):
        (photos / "class_3" / f"{n}.jpg").unlink()
    shop.update_payload("class_1/1.jpg", {"price": 3})
    shop.close()
    command = [sys.executable, "-c", KILLED, str(shop.path), str(encoder.path), str(writes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with open_collection(shop.path, merge="manual") as there:
        follow(there, encoder)
        assert ids(there) == {p.relative_to(photos).as_posix() for p in photos.rglob("*.jpg")}
        assert there.get(["class_2/moved 1.jpg"])[0].payload == {"label": "class_2", "price": 3}
