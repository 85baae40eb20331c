"""Where a collection is put: the old one or the new one is there, whatever happens on the way."""

import csv
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dml.collection import NewItem, create_collection, open_collection, place
from dml.collection.backup import made_aside
from dml.collection.build import build_collection
from dml.errors import CollectionError, CollectionLocked

OLD, NEW = "old", "new"


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    from dml.encoder import Encoder

    return Encoder.load(tiny_encoder, device="cpu")


def make(path, name):
    with create_collection(path, dim=4, fingerprint="f", name=name, index="flat") as shop:
        shop.add([NewItem(name, np.array([1, 0, 0, 0], np.float32))])


def name_of(path):
    with open_collection(path) as shop:
        assert [item.id for item in shop.scroll()[0]] == [shop.name]
        return shop.name


@pytest.fixture
def out(tmp_path):
    """A collection, and a finished one beside it that is to replace it."""
    make(tmp_path / "shop", OLD)
    make(place.building(tmp_path / "shop"), NEW)
    return tmp_path / "shop"


@pytest.fixture(params=["exchanged", "renamed"])
def way(request, monkeypatch):
    """Both ways of replacing: in one step, and with two renames where the system knows no better."""
    if request.param == "renamed":
        monkeypatch.setattr(place, "exchange", lambda one, other: False)
    return request.param


def test_a_second_build_into_the_same_place_is_refused_and_the_first_goes_on(tiny_folder, encoder, tmp_path):
    refused = []

    def begin_another(done, total, bad):
        with pytest.raises(CollectionLocked) as error:
            build_collection(tiny_folder, tmp_path / "shop", encoder=encoder)
        refused.append(error)

    report = build_collection(tiny_folder, tmp_path / "shop", encoder=encoder, progress=begin_another)
    assert refused
    assert report.added == 48
    with open_collection(tmp_path / "shop") as shop:
        assert shop.verify() == []
    assert os.listdir(tmp_path) == ["shop"]


def test_what_has_come_to_be_during_a_build_is_left_alone(tiny_folder, encoder, tmp_path):
    def come(done, total, bad):
        (tmp_path / "shop").mkdir(exist_ok=True)
        (tmp_path / "shop" / "thesis.txt").write_text("do not touch")

    with pytest.raises(CollectionError, match="has come to be"):
        build_collection(tiny_folder, tmp_path / "shop", encoder=encoder, progress=come)
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["shop", "shop/thesis.txt"]


def test_the_new_collection_takes_the_place_of_the_old(out, way):
    with place.turn(out.parent):
        place.put_into_place(out, overwrite=True)
        place.clear(out)
    assert name_of(out) == NEW
    assert os.listdir(out.parent) == ["shop"]


def test_two_names_are_swapped_in_one_step_or_nothing_happens(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    swapped = place.exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / ("b" if swapped else "a")).exists()
    assert (tmp_path / "b" / ("a" if swapped else "b")).exists()
    assert not place.exchange(tmp_path / "a", tmp_path / "absent")
    assert (tmp_path / "a").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("at", [0, 1])
def test_an_interruption_between_two_renames_puts_the_old_one_back(out, monkeypatch, error, at):
    monkeypatch.setattr(place, "exchange", lambda one, other: False)
    rename, calls = os.rename, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == at + 1:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with place.turn(out.parent), pytest.raises(error):
        place.put_into_place(out, overwrite=True)
    assert name_of(out) == OLD


KILLED = """
import os, signal, sys
from pathlib import Path
from dml.collection import place
out, renames, exchanges = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchanged"
rename, calls = os.rename, []
def killed(source, target):
    if len(calls) == renames:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(target)
    rename(source, target)
os.rename = killed
if not exchanges:
    place.exchange = lambda one, other: False
with place.turn(out.parent):
    place.put_into_place(out, overwrite=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
@pytest.mark.parametrize("then", ["open", "build"])
@pytest.mark.parametrize(
    ("way", "renames", "left"), [("renamed", 1, OLD), ("renamed", 2, NEW), ("exchanged", 0, NEW)]
)
def test_after_a_kill_while_replacing_there_is_a_collection(
    out, tiny_folder, encoder, way, renames, left, then
):
    if way == "exchanged" and not place.exchange(out, place.building(out)):
        pytest.skip("this file system cannot exchange two names")
    if way == "exchanged":
        place.exchange(out, place.building(out))
    done = subprocess.run([sys.executable, "-c", KILLED, str(out), str(renames), way], timeout=60)
    assert done.returncode == -signal.SIGKILL
    if then == "open":
        assert name_of(out) == left
    with pytest.raises(CollectionError, match="another encoder"):  # it is there, and is not built over
        build_collection(tiny_folder, out, encoder=encoder)
    assert name_of(out) == left
    build_collection(tiny_folder, out, encoder=encoder, overwrite=True)
    assert os.listdir(out.parent) == ["shop"]


# Ids and pictures by way of embeddings


@pytest.fixture
def manifest(tiny_folder, tmp_path):
    """A manifest with absolute paths of pictures that do not lie below its folder."""
    pictures = Path(shutil.copytree(tiny_folder, tmp_path / "elsewhere" / "pictures"))
    path = tmp_path / "lists" / "list.csv"
    path.parent.mkdir()
    files = [pictures / f"class_{k}" / f"{n}.jpg" for k in range(3) for n in range(3)]
    rows = [f"{file},{file.parent.name},{box}" for file in files for box in ("", "0 0 9 9", "0 0 9 9")]
    path.write_text("path,label,box\n" + "\n".join(rows) + "\n")
    return path


def embed(encoder, manifest, out):
    from dml.data.table import open_table
    from dml.encoder.embeddings import embed_table

    embed_table(encoder, open_table(manifest), out)


def entries(path):
    with open_collection(path, read_only=True) as shop:
        assert shop.verify() == []
        return [(i.id, dict(i.payload), i.picture) for i in shop.scroll(limit=99)[0]]


def record_absolute_paths(vectors, pictures, root):
    """As `dml embed` once wrote what lies outside of the manifest's folder."""
    with (vectors / "items.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    with (vectors / "items.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(
            [header, *([f"{pictures}/{id}", f"{pictures}/{path}", *more] for id, path, *more in rows)]
        )
    about = json.loads((vectors / "manifest.json").read_text())
    assert about["root"] == str(pictures)
    (vectors / "manifest.json").write_text(json.dumps({**about, "root": str(root)}))


@pytest.mark.parametrize("recorded", ["relative", "absolute"])
def test_embeddings_give_the_ids_and_pictures_of_a_direct_build(manifest, encoder, tmp_path, recorded):
    embed(encoder, manifest, tmp_path / "vectors")
    if recorded == "absolute":
        record_absolute_paths(tmp_path / "vectors", tmp_path / "elsewhere" / "pictures", manifest.parent)
    build_collection(manifest, tmp_path / "direct", encoder=encoder)
    report = build_collection(tmp_path / "vectors", tmp_path / "by_way", encoder=encoder)
    assert report.without_picture == 0
    expected = entries(tmp_path / "direct")
    assert len(expected) == 27
    assert expected[0][0] == "class_0/0.jpg"
    assert entries(tmp_path / "by_way") == expected


def test_items_whose_pictures_have_gone_are_counted(manifest, encoder, tmp_path, caplog):
    embed(encoder, manifest, tmp_path / "vectors")
    (tmp_path / "elsewhere" / "pictures" / "class_0" / "0.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        report = build_collection(tmp_path / "vectors", tmp_path / "shop", encoder=encoder)
    assert (report.added, report.without_picture) == (27, 3)
    assert "3 of 27 items have a vector only" in caplog.text
    shutil.rmtree(tmp_path / "elsewhere")
    report = build_collection(tmp_path / "vectors", tmp_path / "none", encoder=encoder)
    assert (report.added, report.without_picture) == (27, 27)


def test_a_backup_leaves_alone_what_the_next_one_has_begun_under_the_same_name(tmp_path):
    """The next one waits for the turn, and may have it before the first looks what it has left behind."""
    with made_aside(tmp_path / "copy") as first:
        first.rename(tmp_path / "copy")
        second = made_aside(tmp_path / "copy")
        aside = second.__enter__()
        (aside / "half").touch()
        assert aside == first
    assert (aside / "half").exists()
    second.__exit__(None, None, None)
    assert not aside.exists()
