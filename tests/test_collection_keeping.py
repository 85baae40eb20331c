"""Damage is found wherever it is, what can be derived is made again, and a backup is a whole collection."""

import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import threading
from contextlib import ExitStack, closing, suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from dml.checksums import seal
from dml.collection import NewItem, catalog, create_collection, open_collection, snapshots
from dml.collection.backup import back_up, check_backup, restore
from dml.collection.repair import Repairs, repair
from dml.errors import (
    CollectionError,
    CollectionLocked,
    CursorExpired,
    DamagedFile,
    DmlError,
    ImageNotKept,
    UnknownCollection,
    UsageError,
)
from dml.index import load_index, make_index

DIM = 16
HARMLESS = {"writer.lock", "catalog.sqlite-shm"}
"""What says nothing: who writes just now, and memory that SQLite makes anew."""


def unit(seed, count, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def jpeg(image):
    out = BytesIO()
    image.save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tiny_encoder, draw):
    """A collection with everything in it: encoder, pictures, thumbnails, two snapshots, a log of changes."""
    made = tmp_path_factory.mktemp("shelf") / "made"
    about = json.loads((tiny_encoder / "manifest.json").read_text())
    with create_collection(
        made, dim=DIM, fingerprint=about["fingerprint"], index="flat", merge="manual"
    ) as shop:
        shutil.copytree(tiny_encoder, made / "encoder")
        vectors = unit(0, 300)
        shop.add([NewItem(f"i{n}", v, {"label": f"l{n % 3}", "n": n}) for n, v in enumerate(vectors[:200])])
        shop.add([NewItem(f"p{n}", vectors[n], {"n": n}, image=jpeg(draw(n))) for n in range(200, 206)])
        shop.build_index()
        shop.delete([f"i{n}" for n in range(10)])
        shop.merge()
        shop.add([NewItem(f"i{n}", vectors[n + 250]) for n in range(10)])
        shop.delete(["i20"])
        for n in range(200, 206):
            shop.thumbnail(f"p{n}", 64)
        shop.update_payload("i30", {"seen": "yes"})
        folder = made.with_name("shop")
        shutil.copytree(made, folder)  # as a kill leaves it: with the log of changes
    assert (folder / "catalog.sqlite-wal").stat().st_size > 100_000
    return folder


@pytest.fixture
def shop(shelf, tmp_path):
    return shutil.copytree(shelf, tmp_path / "shop")


def contents(folder):
    """Everything that a collection answers."""
    with open_collection(folder, read_only=True) as shop:
        items, _ = shop.scroll(limit=1000, with_vector=True)
        found = shop.search(unit(9, 3), limit=20, with_vector=True)
        return (
            [(i.id, i.payload, i.sequence, i.picture, i.vector.tobytes()) for i in items],
            [[(hit.id, hit.score) for hit in result.hits] for result in found],
            [shop.picture(i.id) for i in items if i.picture],
            [shop.thumbnail(i.id, 64) for i in items if i.picture],
            (shop.generation, len(shop), shop.name, dict(shop.manifest.roots), shop.manifest.created),
        )


def problems_of(folder):
    try:
        with open_collection(folder, read_only=True) as shop:
            return shop.verify()
    except DmlError as error:
        return [str(error)]


def flip(path, rng):
    """Change one byte of a file to another value; where it is."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data))
    data[place] ^= rng.randrange(1, 256)
    path.write_bytes(bytes(data))
    return place


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in HARMLESS)


def test_a_whole_collection_has_no_problems(shop):
    assert problems_of(shop) == []


def test_a_flipped_byte_in_any_file_is_found(shelf, shop, scale):
    before = contents(shelf)
    unseen = []
    for seed in range(5 * scale):
        rng = random.Random(seed)
        for source in files_of(shelf):
            path = shop / source.relative_to(shelf)
            place = flip(path, rng)
            found = problems_of(shop)
            if not found:
                # What SQLite does not use may hold anything: free space in its pages.
                assert path.name in ("catalog.sqlite", "catalog.sqlite-wal"), (seed, path, place)
                assert contents(shop) == before, (seed, path, place)
                unseen.append((path.name, place))
            shutil.copy(source, path)
            shop.joinpath("catalog.sqlite-shm").unlink(missing_ok=True)
    print(len(unseen), "of", 12 * scale * len(files_of(shelf)), "changed bytes are in use by nobody")


# Repair


def test_a_flipped_byte_is_mended_or_what_is_lost_is_named(shelf, shop, scale):
    whole = contents(shelf)
    everything = {id: rest for id, *rest in whole[0]}
    for seed in range(2 * scale):
        rng = random.Random(seed)
        for source in files_of(shelf):
            name = str(source.relative_to(shelf))
            place = flip(shop / name, rng)
            where = (seed, name, place)
            found = problems_of(shop)
            if found and not any("update dml" in problem for problem in found):
                check_repair(shop, name, everything, where=where)
            shutil.rmtree(shop)
            shutil.copytree(shelf, shop)


def check_repair(shop, name, everything, *, where):
    """Repairing leaves only the damage of what is nowhere else, and names all that is lost."""
    repairs = repair(shop, replace_catalog=True)
    assert repairs.waiting is None, where
    with open_collection(shop) as mended:
        items, _ = mended.scroll(limit=1000, with_vector=True)
        there = {i.id: [i.payload, i.sequence, i.picture, i.vector.tobytes()] for i in items}
        assert len(mended) == len(there)
        assert {hit.id for hit in mended.search(unit(9, 1), limit=1000)[0].hits} == set(there), where
    if "catalog" not in name:
        assert there == everything, where
        assert not repairs.lost, where
    lost = everything.keys() - there.keys()
    for id in lost:
        assert any(f'"{id}"' in sentence for sentence in repairs.lost) or name.endswith("-wal"), (where, id)
    if not name.endswith("-wal"):  # what is lost with the log of changes are changes
        assert all(there[id] == everything[id] for id in there), where
        assert len(lost) < 60, where
    nowhere_else = name.startswith(("images", "encoder"))
    assert bool(repairs.left) == nowhere_else, (where, repairs.left)
    assert all("picture" in problem or "encoder" in problem for problem in repairs.left), (
        where,
        repairs.left,
    )


def test_a_damaged_catalogue_is_replaced_only_when_that_is_asked_for(shop):
    catalogue = shop / "catalog.sqlite"
    fold_log(catalogue)
    data = bytearray(catalogue.read_bytes())
    data[data.index(unit(0, 300)[30].tobytes()) + 5] ^= 1
    catalogue.write_bytes(bytes(data))
    damaged = catalogue.read_bytes()
    first = repair(shop)
    assert first.waiting == shop / "catalog.sqlite.salvaged"
    assert first.lost == ['item "i30": its vector is lost']
    assert catalogue.read_bytes() == damaged
    second = repair(shop, replace_catalog=True)
    assert (second.lost, second.left, second.waiting) == (first.lost, [], None)
    assert (shop / "catalog.sqlite.damaged").read_bytes() == damaged
    assert not (shop / "catalog.sqlite.salvaged").exists()
    assert repair(shop) == Repairs()
    with open_collection(shop) as mended:
        assert len(mended) == 204
        before = mended.generation
        mended.add([NewItem("i30", unit(0, 300)[30])])
        assert mended.generation == before + 1
        assert mended.verify() == []


def rows_of(folder):
    with open_collection(folder, read_only=True) as there:
        items, _ = there.scroll(limit=999, with_vector=True)
        assert len(items) == len(there)
        return {item.id: (item.payload, item.vector.tobytes()) for item in items}


def fold_log(catalogue):
    with closing(sqlite3.connect(catalogue)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.mark.parametrize("what", ["a page", "many pages", "the header", "the end"])
def test_what_can_be_read_of_a_catalogue_is_saved(shop, what):
    catalogue = shop / "catalog.sqlite"
    with open_collection(shop) as whole:
        everything = {
            i.id: (i.payload, i.vector.tobytes()) for i in whole.scroll(limit=999, with_vector=True)[0]
        }
    fold_log(catalogue)
    data = bytearray(catalogue.read_bytes())
    page = data.index(unit(0, 300)[30].tobytes()) // 4096  # a leaf of the vectors
    if what == "the header":
        data[:100] = bytes(100)
    elif what == "the end":
        del data[len(data) * 2 // 3 :]
    else:
        for number in range(page, page + (1 if what == "a page" else 6)):
            data[4096 * number : 4096 * number + 4096] = bytes(4096)
    catalogue.write_bytes(bytes(data))
    repairs = repair(shop, replace_catalog=True)
    assert repairs.left == []
    there = rows_of(shop)
    assert problems_of(shop) == []
    assert there.items() <= everything.items()
    if what == "the header":
        assert there == everything
    elif what == "a page":
        assert 100 < len(there) < len(everything)
        named = {sentence.split('"')[1] for sentence in repairs.lost}
        assert named == everything.keys() - there.keys()


def test_repairing_says_what_is_of_a_newer_format_and_touches_nothing(shop):
    manifest = (shop / "manifest.json").read_bytes()
    newer = seal({**json.loads(manifest), "format": 99})
    (shop / "manifest.json").write_bytes(newer)
    with pytest.raises(DamagedFile, match="format 99.*update dml"):
        repair(shop)
    assert (shop / "manifest.json").read_bytes() == newer


def test_repairing_needs_the_writer_s_turn_and_a_collection(shop, tmp_path):
    with open_collection(shop), pytest.raises(CollectionLocked):
        repair(shop)
    with pytest.raises(UnknownCollection, match="no catalog.sqlite"):
        repair(tmp_path / "nowhere")


def test_a_manifest_that_nobody_remembers_is_made_of_what_an_index_says(shop):
    with closing(sqlite3.connect(shop / "catalog.sqlite")) as db:
        db.execute("DELETE FROM facts")
        db.commit()
    (shop / "manifest.json").unlink()
    repairs = repair(shop)
    assert "its roots are not known" in repairs.done[0]
    with open_collection(shop) as mended:
        assert (mended.name, mended.dim, len(mended)) == ("shop", DIM, 205)


# Backup


@pytest.fixture(params=["folder", "file"])
def backup(request, tmp_path):
    return tmp_path / ("backup" if request.param == "folder" else "backup.tar")


def test_a_backup_brings_everything_back(shelf, shop, backup, tmp_path):
    before = contents(shop)
    report = back_up(shop, backup)
    assert (report.count, report.problems) == (205, [])
    assert check_backup(backup) == []
    shutil.rmtree(shop)
    about = restore(backup, tmp_path / "again")
    assert about["count"] == 205
    assert contents(tmp_path / "again") == before
    with open_collection(tmp_path / "again") as again:
        assert again.verify() == []
        assert again.info().pending == 11
        again.add([NewItem("new", unit(4, 1)[0])])
    assert (tmp_path / "again" / "encoder" / "manifest.json").is_file()


def test_a_picture_is_not_deleted_while_a_backup_needs_it(shop):
    script = (
        "import sys; from pathlib import Path; from dml.collection.pictures import kept\n"
        "with kept(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with open_collection(shop) as served:
        before = set(served._pictures.stored())
        command = [sys.executable, "-c", script, str(shop)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            served.add([NewItem("new", unit(4, 1)[0], image=b"a picture")])
            added = set(served._pictures.stored()) - before
            assert served.delete(["new"]) == 1
            assert added <= set(served._pictures.stored()), "the other process needs it"
            other.communicate()
        served.build_index()
        assert not added & set(served._pictures.stored())
        served.add([NewItem("new", unit(4, 1)[0], image=b"a picture")])
        served.delete(["new"])
        assert not added & set(served._pictures.stored()), "at once when nobody needs it"


def test_a_backup_is_made_while_another_process_serves_and_writes(shop, backup, tmp_path):
    with open_collection(shop) as served:
        done, trouble = threading.Event(), []

        def write():
            try:
                for n in range(10_000):
                    if done.is_set():
                        return
                    served.add([NewItem(f"w{n}", unit(n, 1)[0], {"n": n}, image=b"picture %d" % n)])
                    if n > 3:
                        served.delete([f"w{n - 3}"])
            except Exception as error:
                trouble.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        script = "import sys; from dml.cli.main import main; sys.argv[0] = 'dml'; main()"
        command = [sys.executable, "-c", script, "index", "backup", str(shop), str(backup), "--json"]
        made = subprocess.run(command, capture_output=True, text=True, timeout=100)
        done.set()
        writer.join()
    assert not trouble
    assert made.returncode == 0, made.stderr
    report = json.loads(made.stdout)
    assert report["generation"] < served.generation
    restore(backup, tmp_path / "again")
    with open_collection(tmp_path / "again") as again:
        assert again.verify() == []
        assert (again.generation, len(again)) == (report["generation"], report["count"])
        # The writer's own rule, as of one moment: at most four of its items, one after the other.
        written = sorted(int(i.id[1:]) for i in again.scroll(limit=999)[0] if i.id.startswith("w"))
        assert 0 < len(written) <= 5
        assert max(written) - min(written) <= 4 or min(written) == 0


def test_a_second_backup_copies_only_new_pictures_and_drops_those_gone(shop, tmp_path):
    backup = tmp_path / "backup"
    assert back_up(shop, backup).reused == 0
    with open_collection(shop) as there:
        there.add([NewItem("p9", unit(9, 1)[0], image=b"new")])
        there.delete(["p200"])
    report = back_up(shop, backup)
    assert report.reused == 5
    assert len(list(backup.glob("images/??/*"))) == 6
    assert check_backup(backup) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backup", "shop"]


def test_linking_shares_bytes_with_the_collection(shop, tmp_path):
    back_up(shop, tmp_path / "backup", link=True)
    for picture in (tmp_path / "backup").glob("images/??/*"):
        assert picture.stat().st_nlink == 2
    with open_collection(shop) as there:
        there.delete([f"p{n}" for n in range(200, 206)])
    restore(tmp_path / "backup", tmp_path / "again")
    with open_collection(tmp_path / "again") as again:
        assert len(again.picture("p203")) > 100


def test_a_flipped_byte_in_a_backup_is_found_and_not_restored(shop, backup, tmp_path, scale):
    back_up(shop, backup)
    contents = contents_of_tar(backup) if backup.is_file() else []
    for seed in range(10 * scale):
        rng = random.Random(seed)
        files = [backup] if backup.is_file() else files_of(backup)
        path = rng.choice(files)
        data = path.read_bytes()
        place = flip(path, rng)
        if path == backup and not any(place in content for content in contents):
            path.write_bytes(data)
            continue
        with suppress(DmlError):
            assert check_backup(backup), (seed, path, place)
        with pytest.raises(DmlError):
            restore(backup, tmp_path / "again")
        assert not (tmp_path / "again").exists()
        path.write_bytes(data)
    restore(backup, tmp_path / "again")


def contents_of_tar(path):
    """Where in a .tar file the bytes of its files are."""
    with tarfile.open(path) as tar:
        return [range(m.offset_data, m.offset_data + m.size) for m in tar.getmembers()]


def test_a_backup_never_replaces_what_is_none_of_its_own(shop, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not touch")
    with pytest.raises(CollectionError, match="no backup that can be replaced"):
        back_up(shop, mine)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    with create_collection(tmp_path / "other", dim=4, fingerprint="e"):
        pass
    back_up(tmp_path / "other", tmp_path / "backup")
    with pytest.raises(CollectionError, match="a backup of another collection"):
        back_up(shop, tmp_path / "backup")
    with pytest.raises(UsageError, match="in the collection itself"):
        back_up(shop, shop / "backup")


def test_restoring_replaces_only_when_that_is_asked_for(shop, tmp_path):
    back_up(shop, tmp_path / "backup")
    before = contents(shop)
    with open_collection(shop) as there:
        there.delete(["i100"])
        with pytest.raises(CollectionError, match="--overwrite"):
            restore(tmp_path / "backup", shop)
        with pytest.raises(CollectionLocked):
            restore(tmp_path / "backup", shop, overwrite=True)
    restore(tmp_path / "backup", shop, overwrite=True)
    assert contents(shop) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(CollectionError, match="not a collection"):
        restore(tmp_path / "backup", tmp_path / "mine", overwrite=True)
    with pytest.raises(UsageError, match="no backup at"):
        restore(tmp_path / "nothing", tmp_path / "new")
    with pytest.raises(DamagedFile, match=r"no backup\.json"):
        restore(shop, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backup", "mine", "shop"]


def test_a_lost_picture_is_named_and_the_rest_is_backed_up(shop, tmp_path):
    [first, second, *_] = sorted(shop.glob("images/??/*"))
    first.unlink()
    second.write_bytes(b"other bytes")
    report = back_up(shop, tmp_path / "backup")
    assert [first.name in report.problems[0], second.name in report.problems[1]] == [True, True]
    assert check_backup(tmp_path / "backup") == []


@pytest.mark.skipif(os.name != "posix", reason="limits on the size of files are POSIX")
def test_a_backup_on_a_full_disk_leaves_the_old_one(shop, backup, tmp_path):
    back_up(shop, backup)
    old = backup.read_bytes() if backup.is_file() else (backup / "backup.json").read_bytes()
    with open_collection(shop) as there:
        there.add([NewItem(f"n{n}", v) for n, v in enumerate(unit(7, 300))])
    script = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from dml.cli.main import main
import sqlite3, tarfile
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
sys.argv = ["dml", "index", "backup", {str(shop)!r}, {str(backup)!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: " in done.stderr
    assert (backup.read_bytes() if backup.is_file() else (backup / "backup.json").read_bytes()) == old
    assert check_backup(backup) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [backup.name, "shop"]


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_backup_that_is_killed_leaves_the_old_one_or_the_new(shop, backup, tmp_path, scale):
    back_up(shop, backup)
    script = f"""
from pathlib import Path
from dml.collection.backup import back_up
print("ready", flush=True)
back_up(Path({str(shop)!r}), Path({str(backup)!r}))
"""
    for seed in range(4 * scale):
        print("seed", seed)
        with open_collection(shop) as there:
            there.add([NewItem(f"k{seed}", unit(seed, 1)[0])])
            generation = there.generation
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            with suppress(subprocess.TimeoutExpired):
                process.wait(random.Random(seed).uniform(0, 0.4))
            process.send_signal(signal.SIGKILL)
        assert check_backup(backup) == [], seed
        restore(backup, tmp_path / "again", overwrite=True)
        with open_collection(tmp_path / "again", read_only=True) as again:
            assert again.generation <= generation
            assert again.verify() == [], seed
    assert back_up(shop, backup).generation == generation
    left = {p.name for p in tmp_path.iterdir()} - {backup.name, "shop", "again"}
    assert not left


# While somebody reads


@pytest.mark.parametrize("mixed", ["fails", "answers wrongly"])
@pytest.mark.parametrize("times", [1, 1000])
def test_an_index_that_is_exchanged_while_it_is_read_is_read_again(shop, monkeypatch, mixed, times):
    calls = []
    with open_collection(shop, merge="manual") as writer:
        writer.merge()
        newest = max((shop / "snapshots").iterdir())

        def load(path, *, device):
            calls.append(path.name)
            if len(calls) > times or path != newest:
                return load_index(path, device=device)
            writer.build_index()  # nothing was written: another file of the same name
            if mixed == "fails":
                raise AttributeError("half of one file, half of another")
            return make_index("flat", DIM)

        monkeypatch.setattr(snapshots, "load_index", load)
        with open_collection(shop, read_only=True) as reader:
            monkeypatch.undo()
            assert (len(reader), reader.generation, reader.verify()) == (205, writer.generation, [])
            for n in (30, 100, 205):
                [found] = reader.search(unit(0, 300)[n : n + 1], limit=1)
                assert found.hits[0].score > 0.999
    assert calls.count(newest.name) == (2 if times == 1 else snapshots.TRIES)


def test_a_damaged_index_that_stays_is_still_damaged(shop):
    [newest, *_] = sorted((shop / "snapshots").iterdir(), reverse=True)
    flip(newest, random.Random(0))
    with open_collection(shop, read_only=True) as reader:
        assert len(reader) == 205
    assert newest.exists(), "a reader deletes nothing"


def test_a_reader_follows_the_roots_and_the_name(shop, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(b"picture")
    with open_collection(shop) as writer, open_collection(shop, read_only=True) as reader:
        writer.set_root("more", tmp_path / "a")
        writer.add([NewItem("x", unit(5, 1)[0], file=tmp_path / "a" / "x.jpg")])
        assert reader.picture("x") == b"picture"
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(ImageNotKept, match="cannot be read"):
            reader.picture("x")
        writer.set_root("more", tmp_path / "b")  # no change of items
        assert reader.picture("x") == b"picture"
        writer.rename("boots")
        writer.delete(["x"])
        assert (len(reader), reader.name) == (205, "boots")


@pytest.mark.parametrize("how", ["repair", "restore"])
def test_a_reader_goes_over_to_the_catalogue_that_takes_the_place(tmp_path, how):
    """With the same numbers of rows and changes for other items, so that whatever is mixed shows."""
    shop, vectors = tmp_path / "shop", unit(0, 40)
    with create_collection(shop, dim=DIM, fingerprint="e", index="flat") as writer:
        writer.add([NewItem(f"i{n}", vectors[n], {"kind": "i"}) for n in range(10)])
        writer.build_index()
    back_up(shop, tmp_path / "backup")
    with open_collection(shop) as writer:
        writer.add([NewItem(f"j{n}", vectors[10 + n], {"kind": "j"}) for n in range(10)])
    with open_collection(shop, read_only=True) as reader:
        with ExitStack() as several:  # as threads have them
            for _ in range(8):
                several.enter_context(reader._catalog.reading())
        kinds = [{"must": [{"key": "kind", "match": {"value": kind}}]} for kind in "ijk"]
        assert [reader.count(kind) for kind in kinds] == [10, 10, 0]
        [found] = reader.search(vectors[10:11], limit=20)
        assert (found.hits[0].id, len(found.hits), found.generation) == ("j0", 20, 20)
        [page] = reader.search(vectors[10:11], limit=5, cursor="*")
        if how == "restore":
            restore(tmp_path / "backup", shop, overwrite=True)
            lost = set()
        else:
            change = "UPDATE vectors SET crc = 1 WHERE row IN (5, 15)"
            with closing(sqlite3.connect(shop / "catalog.sqlite")) as db:
                db.execute(change)
                db.commit()
            lost = {sentence.split('"')[1] for sentence in repair(shop, replace_catalog=True).lost}
            assert lost == {"i4", "j4"}
        with open_collection(shop) as writer:
            writer.add([NewItem(f"k{n}", vectors[20 + n], {"kind": "k"}) for n in range(10)])
            there = {item.id for item in writer.scroll(limit=99)[0]}
            assert not there & lost
            for n in (0, 4, 10, 14, 20):
                [ours] = reader.search(vectors[n : n + 1], limit=40)
                [own] = writer.search(vectors[n : n + 1], limit=40)
                assert [(h.id, h.score) for h in ours.hits] == [(h.id, h.score) for h in own.hits]
                assert {hit.id for hit in ours.hits} == there
                assert ours.generation == writer.generation
            assert [reader.count(kind) for kind in kinds] == [writer.count(kind) for kind in kinds]
            [begun] = reader.search(vectors[20:21], limit=5, cursor="*")
            [own] = writer.search(vectors[20:21], limit=5, exact=True)
            assert [hit.id for hit in begun.hits] == [hit.id for hit in own.hits]
            with suppress(CursorExpired):  # the state of an old cursor is kept, or is gone
                [page] = reader.search(vectors[10:11], limit=5, cursor=page.next_cursor)
                assert not any(hit.id.startswith("k") for hit in page.hits)
            assert reader.verify() == []


def test_a_transaction_that_began_before_a_replacement_stays_in_its_file(shop, tmp_path):
    back_up(shop, tmp_path / "backup")
    with open_collection(shop) as writer:
        writer.delete(["i100"])
    with open_collection(shop, read_only=True) as reader:
        with reader._present.moment() as (db, state):
            restore(tmp_path / "backup", shop, overwrite=True)
            assert (len(state), len(reader)) == (204, 205)
            assert db.execute("SELECT count(*) FROM items").fetchone() == (204,)
            private = reader._present._catch_up(db)  # of a thread that was late
            assert (len(private), private.sequence) == (204, state.sequence)
        assert (len(reader), reader.generation) == (205, state.sequence - 1)


def test_a_reader_notices_that_another_collection_took_the_place(shop, tmp_path):
    with create_collection(tmp_path / "other", dim=DIM, fingerprint="another") as other:
        other.add([NewItem("o", unit(0, 1)[0])])
    with open_collection(shop, read_only=True) as reader:
        shop.rename(tmp_path / "away")
        (tmp_path / "other").rename(shop)
        with pytest.raises(CollectionError, match="Another collection"):
            reader.search(unit(0, 1))


def test_a_reader_that_may_not_write_follows_who_may(tmp_path, monkeypatch):
    shop, vectors = tmp_path / "shop", unit(0, 400)
    with create_collection(shop, dim=DIM, fingerprint="e", index="flat") as writer:
        writer.add([NewItem(f"i{n}", vector) for n, vector in enumerate(vectors[:200])])
        writer.build_index()
    opened = catalog.Catalog._open

    def open_without_rights(self, mode, **how):
        if self.read_only and not how and not Path(f"{self.path}-shm").exists():
            raise sqlite3.OperationalError("unable to open database file")
        return opened(self, mode, **how)

    def nearest(reader, n):
        [found] = reader.search(vectors[n : n + 1], limit=1)
        return found.hits[0].id

    def is_frozen(reader):
        with reader._catalog.reading() as db:
            return db.frozen

    monkeypatch.setattr(catalog.Catalog, "_open", open_without_rights)
    monkeypatch.setattr(catalog.os, "access", lambda *_: False)
    with open_collection(shop, read_only=True) as reader:
        assert (len(reader), nearest(reader, 3)) == (200, "i3")
        assert is_frozen(reader)
        with open_collection(shop) as writer:
            writer.delete(["i3"])
            writer.add([NewItem(f"i{n}", vector) for n, vector in enumerate(vectors[200:], 200)])
        # The writer has gone, and the log is folded in.
        assert (len(reader), nearest(reader, 333)) == (399, "i333")
        assert nearest(reader, 3) != "i3"
        assert is_frozen(reader)
        with open_collection(shop) as writer:
            writer.delete(["i333"])
            assert (len(reader), nearest(reader, 333) != "i333") == (398, True)
            writer.delete(["i4"])
            assert len(reader) == 397
        assert (len(reader), reader.verify()) == (397, [])


# As commands


def dml(*arguments):
    command = [sys.executable, "-m", "dml", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_commands_say_what_they_did(shop, tmp_path):
    merged = dml("index", "merge", shop).stdout
    assert merged.startswith("11 changes merged\nindex flat over 205 items: exact")
    assert dml("index", "rename", shop, "boots").returncode == 0
    assert "everything reads back" in dml("index", "backup", shop, tmp_path / "b.tar").stdout
    assert dml("index", "verify", tmp_path / "b.tar").stdout == "everything fits its checksums\n"
    [snapshot, *_] = sorted(shop.glob("snapshots/*"), reverse=True)
    flip(snapshot, random.Random(0))
    found = dml("index", "verify", shop)
    assert (found.returncode, "is damaged" in found.stdout) == (1, True)
    mended = dml("index", "repair", shop)
    assert mended.returncode == 0, mended.stderr
    assert "was deleted (a checksum does not fit)" in mended.stdout
    assert dml("index", "repair", shop).stdout == "nothing had to be mended\n"
    assert dml("index", "verify", shop).stdout == "205 items, everything fits its checksums\n"
    refused = dml("index", "restore", tmp_path / "b.tar", shop)
    assert (refused.returncode, "--overwrite" in refused.stderr) == (1, True)
    assert (
        "205 items of generation" in dml("index", "restore", tmp_path / "b.tar", shop, "--overwrite").stdout
    )
    with open_collection(shop, read_only=True) as again:
        assert again.name == "boots"


# Documentation


def test_the_python_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "collections.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/collections.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "pending: 101\nmerged: 499 items, built as a whole over 400\n" in shown
    assert "new in generation 502\n500 items of generation 502 []\n" in shown
    assert "was deleted (a checksum does not fit)" in shown
    with open_collection(tmp_path / "again.collection") as again:
        assert len(again) == 500
