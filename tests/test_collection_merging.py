"""Pending changes are folded into the index beside searches and writes; every answer stays right."""

import json
import logging
import os
import subprocess
import sys
import threading
import time
from itertools import count, pairwise

import numpy as np
import pytest

from dml.collection import (
    NewItem,
    create_collection,
    derive,
    lock,
    merging,
    open_collection,
    present,
    upkeep,
)
from dml.collection.derive import Stopped
from dml.collection.generation import Generation, Snapshot
from dml.collection.measure import FEWEST, HeldOut, measure_recall
from dml.collection.merging import Background, is_due, why_build_anew
from dml.errors import CollectionLocked, ConfigError, ReadOnly, StorageError, UsageError
from dml.index import make_index
from dml.index.flat import FlatIndex
from dml.index.tune import Promise
from dml.storage import ASIDE

DIM = 16
MANY = merging.DUE_ROWS + 200


def unit(seed, count, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def items(vectors, start=0):
    return [NewItem(f"i{start + n}", vector) for n, vector in enumerate(vectors)]


def ids_of(result):
    return [hit.id for hit in result.hits]


def nearest(query, model, k):
    """Brute force over {id: vector}."""
    scores = {id: float(np.dot(v.astype(float), query.astype(float))) for id, v in model.items()}
    return sorted(scores, key=lambda id: -scores[id])[:k]


@pytest.fixture
def create(tmp_path, request):
    def make(name="shop", **options):
        options = {"dim": DIM, "fingerprint": "f", "merge": "manual", **options}
        shop = create_collection(tmp_path / name, **options)
        request.addfinalizer(shop.close)
        return shop

    return make


@pytest.fixture
def reopen(tmp_path, request):
    def open_again(name="shop", **options):
        shop = open_collection(tmp_path / name, **{"merge": "manual", **options})
        request.addfinalizer(shop.close)
        return shop

    return open_again


@pytest.fixture
def held(monkeypatch):
    """(reached, go_on): the filling of an index says that it has begun, and waits."""
    reached, go_on = threading.Event(), threading.Event()
    original = derive.fill

    def slow(*args, **kwargs):
        reached.set()
        assert go_on.wait(20)
        return original(*args, **kwargs)

    monkeypatch.setattr(derive, "fill", slow)
    yield reached, go_on
    go_on.set()


# What a merge makes


def test_the_first_merge_chooses_the_index_for_a_promise(create, reopen):
    pytest.importorskip("faiss")
    shop = create(promise=Promise(0.9))
    assert shop.info().manifest["index"] == {
        "kind": "auto", "options": {}, "promise": {"recall": 0.9, "memory": None, "latency": None}
    }  # fmt: skip
    shop.add(items(unit(0, 700)))
    built = shop.merge()
    assert built["promise"]["holds"] is True
    assert built["tuning"]["trials"], "kinds were tried"
    shop.close()
    chosen = reopen().info().manifest["index"]
    assert (chosen["kind"], chosen["promise"]["recall"]) == (built["kind"], 0.9)
    with pytest.raises(ConfigError, match='"hnsw" was given too'):
        create("other", index="hnsw", promise=Promise(0.9))


def test_a_promise_that_nothing_keeps_leaves_the_usual_index_and_says_so(create, caplog):
    pytest.importorskip("faiss")
    shop = create(promise=Promise(1.0, memory=100))
    shop.add(items(unit(0, 300)))
    built = shop.merge()
    assert built["promise"]["holds"] is False
    assert "no index keeps its promise" in caplog.text
    assert ids_of(shop.search(unit(0, 1), limit=1)[0]) == ["i0"]


@pytest.mark.parametrize("kind", ["flat", "faiss_flat", "hnsw", "ivf"])
def test_a_merge_adds_to_the_index_and_every_answer_stays_right(kind, create, reopen):
    if kind != "flat":
        pytest.importorskip("faiss")
    shop = create(index=kind)
    vectors = unit(0, 700)
    shop.add(items(vectors[:500]))
    shop.build_index()
    shop.add(items(vectors[500:], start=500))
    shop.add(items(unit(5, 20)))
    shop.delete([f"i{n}" for n in range(20, 40)])
    model = {f"i{n}": v for n, v in enumerate(vectors)} | {f"i{n}": v for n, v in enumerate(unit(5, 20))}
    model = {name: v for name, v in model.items() if not 20 <= int(name[1:]) < 40}
    built = shop.merge()
    assert (built["kind"], built["count"], built["built_over"]) == (kind, 680, 500)
    assert shop.info().pending == 0
    shop.add(items(unit(6, 3), start=900))
    model |= {f"i{900 + n}": v for n, v in enumerate(unit(6, 3))}
    shop.close()
    for again in (reopen(), reopen(read_only=True)):
        assert again.info().pending == 3
        assert len(again) == 683
        for query in unit(9, 10):
            assert ids_of(again.search(query[None], exact=True)[0]) == nearest(query, model, 10)
            assert set(ids_of(again.search(query[None], effort=500)[0])) == set(nearest(query, model, 10))
        assert again.verify() == []


def test_a_merge_without_changes_does_nothing(create, tmp_path):
    shop = create()
    shop.add(items(unit(0, 20)))
    first = shop.merge()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "shop" / "snapshots").iterdir()}
    assert shop.merge() == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "shop" / "snapshots").iterdir()} == before


def test_an_index_with_many_removed_rows_is_built_anew(create):
    pytest.importorskip("faiss")
    shop = create(index="hnsw")
    shop.add(items(unit(0, 300)))
    shop.build_index()
    shop.delete([f"i{n}" for n in range(30)])
    assert shop.merge()["built_over"] == 300
    shop.delete([f"i{n}" for n in range(30, 60)])
    built = shop.merge()
    assert (built["built_over"], built["count"]) == (240, 240)


def test_an_index_that_learned_from_few_vectors_is_built_anew_when_there_are_many(create):
    pytest.importorskip("faiss")
    shop = create(index="ivf", options={"cells": 4})
    shop.add(items(unit(0, 200)))
    shop.build_index()
    shop.add(items(unit(1, 150), start=200))
    assert shop.merge()["built_over"] == 200
    shop.add(items(unit(2, 150), start=350))
    assert shop.merge()["built_over"] == 500


def test_why_an_index_is_built_anew(tmp_path):
    index = FlatIndex(DIM)
    wanted = {"kind": "flat", "options": {}}
    state = Generation.of(Snapshot(index, 0, 0), DIM)
    saved = tmp_path / "saved"
    saved.touch()
    assert "no saved index" in str(why_build_anew(state, wanted, saved))
    index.add(np.arange(10), unit(0, 10))
    state = Generation.of(Snapshot(index, 10, 9, built_over=10), DIM)
    assert why_build_anew(state, wanted, saved) is None
    assert "no saved index" in str(why_build_anew(state, wanted, tmp_path / "gone"))
    assert "were with flat" in str(why_build_anew(state, {"kind": "hnsw", "options": {}}, saved))
    none = np.empty((0, DIM), np.float32)
    fewer = state.changed(13, rows=np.empty(0, np.int64), vectors=none, removed=np.arange(3))
    assert "3 of its rows are removed" in str(why_build_anew(fewer, wanted, saved))


def test_new_items_measure_the_index_that_they_are_merged_into(create):
    pytest.importorskip("faiss")
    shop = create(index="ivf", options={"cells": 30, "effort": 1})
    shop.add(items(unit(0, 2000)))
    first = shop.build_index()["measured"]
    shop.add(items(unit(1, 50), start=2000))
    assert shop.merge()["measured"] == first
    shop.add(items(unit(2, 200), start=2100))
    second = shop.merge()["measured"]
    assert second["queries"] == 200
    assert second["recall_at_10"] == pytest.approx(first["recall_at_10"], abs=0.1)


@pytest.mark.parametrize(("seconds", "queries"), [(float("inf"), 400), (1e-9, FEWEST)])
def test_measuring_asks_as_many_as_the_time_allows_and_says_how_many(seconds, queries):
    pytest.importorskip("faiss")
    vectors = unit(0, 3_000)
    index = make_index("ivf", DIM, device="cpu", cells=30, effort=2)
    index.add(np.arange(2_600), vectors[:2_600])
    held = HeldOut(np.arange(2_600, 3_000), vectors[2_600:])
    blocks = [(np.arange(start, start + 500), vectors[start : start + 500]) for start in range(0, 3_000, 500)]
    measured = measure_recall(index, held, blocks, count=2_600, seconds=seconds)
    assert measured is not None
    assert measured["queries"] == queries
    model = {str(n): v for n, v in enumerate(vectors[:2_600])}
    order = np.random.default_rng(0).permutation(400)[:queries]
    found = index.search(held.vectors[order], 10).ids
    right = [
        len({*map(str, row.tolist())} & {*nearest(query, model, 10)})
        for row, query in zip(found, held.vectors[order], strict=True)
    ]
    assert measured["recall_at_10"] == pytest.approx(np.mean(right) / 10, abs=1e-5)
    assert 0.1 < measured["lower"] < measured["recall_at_10"] < 0.99


def test_measuring_is_given_up_between_two_batches():
    pytest.importorskip("faiss")
    vectors = unit(0, 1_000)
    index = make_index("hnsw", DIM, device="cpu")
    index.add(np.arange(800), vectors[:800])
    held = HeldOut(np.arange(800, 1_000), vectors[800:])
    blocks = [(np.arange(800), vectors[:800])]

    def measured(until):
        """With a check that gives up when it is called for the so-manieth time."""
        calls = count(1)

        def check():
            if next(calls) == until:
                raise Stopped

        return measure_recall(index, held, blocks, count=800, check=check)

    for until in (1, 4, 5, 8):  # four batches are compared with everything, then searched
        with pytest.raises(Stopped):
            measured(until)
    assert measured(9) is not None


def test_a_merge_sweeps_pictures_that_nobody_uses_as_far_as_the_time_goes(create, tmp_path, monkeypatch):
    shop = create()
    shop.add([NewItem("a", unit(0, 1)[0], image=b"used")])
    folder = tmp_path / "shop" / "images" / "ab"
    folder.mkdir(exist_ok=True)
    orphan, half = folder / ("ab" + "0" * 62), folder / f".cut-short{ASIDE}"
    for path in (orphan, half):
        path.write_bytes(b"of a write that was killed before its commit")
    monkeypatch.setattr(upkeep, "SWEEP_SECONDS", -1.0)
    shop.merge()
    assert orphan.exists()
    monkeypatch.undo()
    shop.add(items(unit(1, MANY)))
    shop.close()
    with open_collection(tmp_path / "shop", merge="auto") as again:
        again.settle()
        assert again.info().pending == 0
        assert again.picture("a") == b"used"
    assert not orphan.exists()
    assert not half.exists()


# When


def test_a_merge_is_due_by_the_root_of_the_count():
    def pending(changes, count):
        index, delta = FlatIndex(2), FlatIndex(2)
        for part, rows in ((index, count - changes), (delta, changes)):
            part.rows.append(np.arange(rows) + (count if part is delta else 0))
        return is_due(Generation(0, Snapshot(index, 0, 0), index, delta))

    assert not pending(1_000, 1_000)
    assert pending(1_001, 1_001)
    assert not pending(2_000, 10_000)
    assert pending(2_001, 10_000)
    assert not pending(6_300, 100_000)
    assert pending(6_400, 100_000)


def test_a_writer_merges_by_itself_and_a_manual_one_does_not(create):
    left_alone, shop = create("left alone"), create(merge="auto")
    for start in range(0, MANY, 100):
        for each in (left_alone, shop):
            each.add(items(unit(start, 100), start=start))
    shop.settle()
    assert shop.info().pending < 200
    assert left_alone.info().pending == MANY
    assert left_alone.wants_merge
    assert not shop.wants_merge
    assert len(shop) == len(left_alone) == MANY
    for query in unit(9, 5):
        assert ids_of(shop.search(query[None])[0]) == ids_of(left_alone.search(query[None])[0])


def test_opening_with_much_pending_merges(create, reopen):
    shop = create()
    shop.add(items(unit(0, MANY)))
    shop.close()
    again = reopen(merge="auto")
    again.settle()
    assert again.info().pending == 0


def test_merging_is_a_writer_s_right_and_the_mode_a_word(create, reopen):
    shop = create()
    shop.add(items(unit(0, 5)))
    with pytest.raises(ReadOnly):
        reopen(read_only=True).merge()
    shop.close()
    with pytest.raises(UsageError, match='"auto" or "manual", got \'later\''):
        reopen(merge="later")


# Meanwhile


def test_searches_and_writes_go_on_during_a_merge(create, held):
    shop = create(merge="auto")
    reached, go_on = held
    vectors = unit(0, MANY + 20)
    shop.add(items(vectors[:MANY]))
    assert reached.wait(20)
    shop.add(items(vectors[MANY:], start=MANY))
    shop.delete(["i0"])
    assert ids_of(shop.search(vectors[MANY + 3 :][:1], limit=1)[0]) == [f"i{MANY + 3}"]
    go_on.set()
    shop.settle()
    assert shop.info().pending == 20 + 1
    assert len(shop) == MANY + 19
    assert "i0" not in ids_of(shop.search(vectors[:1], limit=5)[0])


def test_closing_gives_a_merge_up_and_loses_nothing(create, reopen, held):
    shop = create(merge="auto")
    reached, go_on = held
    shop.add(items(unit(0, MANY)))
    assert reached.wait(20)
    closing = threading.Thread(target=shop.close)
    closing.start()
    time.sleep(0.05)
    assert closing.is_alive()
    go_on.set()
    closing.join(20)
    assert not closing.is_alive()
    assert not any(thread.name == "merging" for thread in threading.enumerate())
    again = reopen()
    assert len(again) == again.info().pending == MANY
    assert again.manifest.built == {}


def test_a_build_takes_the_place_of_a_merge_that_is_under_way(create, held):
    shop = create(merge="auto")
    reached, go_on = held
    shop.add(items(unit(0, MANY)))
    assert reached.wait(20)
    builder = threading.Thread(target=shop.build_index)
    builder.start()
    go_on.set()
    builder.join(20)
    shop.settle()
    assert shop.info().pending == 0
    assert shop.manifest.built["count"] == MANY


def test_a_reader_takes_up_the_merged_index_and_keeps_answering(create, reopen):
    shop = create()
    vectors = unit(0, 2 * MANY)
    shop.add(items(vectors[:MANY]))
    shop.build_index()
    reader = reopen(read_only=True)
    shop.add(items(vectors[MANY:], start=MANY))
    assert len(reader) == 2 * MANY
    assert reader.info().pending == MANY
    shop.merge()
    shop.delete(["i1"])
    assert ids_of(reader.search(vectors[-1:], limit=1)[0]) == [f"i{2 * MANY - 1}"]
    reader.settle()
    assert reader.info().pending == 1
    assert reader.generation == shop.generation
    assert len(reader) == 2 * MANY - 1


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_every_answer_is_the_brute_force_of_its_generation_while_merges_run(create, reopen, kind, scale):
    if kind == "hnsw":
        pytest.importorskip("faiss")
    shop = create(index=kind)
    rng = np.random.default_rng(7)
    pool = unit(3, 600)
    shop.add(items(pool[:300]))
    shop.build_index()
    model = {f"i{n}": pool[n] for n in range(300)}
    history = {shop.generation: dict(model)}
    watched = [shop, reopen(read_only=True)]
    queries = unit(8, 3)
    answers, trouble, done = [], [], threading.Event()

    def search(there):
        try:
            while not done.is_set():
                answers.extend(zip(queries, there.search(queries, limit=5, exact=True), strict=True))
        except Exception as error:
            trouble.append(error)

    def merge():
        try:
            while not done.is_set():
                shop.merge()
        except Exception as error:
            trouble.append(error)

    threads = [threading.Thread(target=search, args=(there,)) for there in watched]
    threads.append(threading.Thread(target=merge))
    for thread in threads:
        thread.start()
    for turn in range(60 * scale):
        seen, end = len(answers), time.monotonic() + 30
        while turn % 10 == 0 and len(answers) == seen and not trouble and time.monotonic() < end:
            time.sleep(0.001)  # on a machine that hardly lets the readers in
        names = [f"i{n}" for n in rng.integers(0, 400, 4)]
        if rng.random() < 0.6:
            rows = pool[rng.integers(0, 600, 4)]
            shop.add([NewItem(name, row) for name, row in zip(names, rows, strict=True)])
            model.update(zip(names, rows, strict=True))
        else:
            shop.delete(names)
            for name in names:
                model.pop(name, None)
        history[shop.generation] = dict(model)
    done.set()
    for thread in threads:
        thread.join()
    assert not trouble
    assert len({result.generation for _, result in answers}) > 3
    for query, result in answers:
        then = history[result.generation]
        scores = sorted(
            (float(np.dot(v.astype(float), query.astype(float))) for v in then.values()), reverse=True
        )
        assert [hit.score for hit in result.hits] == pytest.approx(scores[:5], abs=1e-6)
        for hit in result.hits:
            assert hit.score == pytest.approx(
                float(np.dot(then[hit.id].astype(float), query.astype(float))), abs=1e-6
            )


# Failures


@pytest.mark.skipif(os.name != "posix", reason="limits on the size of files are POSIX")
def test_a_merge_on_a_full_disk_leaves_everything_and_is_tried_again(create, reopen, tmp_path):
    shop = create()
    vectors = unit(0, 2 * MANY)
    shop.add(items(vectors[:MANY]))
    shop.build_index()
    shop.close()
    script = f"""
import logging, resource, signal, sys, time
import numpy as np
from pathlib import Path
from dml.collection import NewItem, merging, open_collection
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(message)s")
merging.FIRST_PAUSE = 0.2
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
shop = open_collection({str(tmp_path / "shop")!r}, merge="manual")
vectors = np.load({str(tmp_path / "vectors.npy")!r})
shop.add([NewItem(f"i{{n}}", vectors[n]) for n in range({MANY}, {2 * MANY})])
shop.close()
size = max(p.stat().st_size for p in Path({str(tmp_path / "shop" / "snapshots")!r}).iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
shop = open_collection({str(tmp_path / "shop")!r})
shop.settle()
print("pending", shop.info().pending, len(shop), shop.search(vectors[:1], limit=1)[0].hits[0].id)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for _ in range(200):
    if not shop.info().pending:
        break
    time.sleep(0.05)
print("pending", shop.info().pending, len(shop), shop.search(vectors[:1], limit=1)[0].hits[0].id)
shop.close()
"""
    np.save(tmp_path / "vectors.npy", vectors)
    before = {p.name for p in (tmp_path / "shop" / "snapshots").iterdir()}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("WARNING", "pending"))]
    assert "merging failed, and is tried again in" in said[0]
    assert "nothing has changed" in said[0]
    assert f"pending {MANY} {2 * MANY} i0" in said
    assert said[-1] == f"pending 0 {2 * MANY} i0"
    assert before < {p.name for p in (tmp_path / "shop" / "snapshots").iterdir()}
    assert reopen().verify() == []


def test_failures_are_tried_again_with_growing_pauses(caplog, monkeypatch):
    monkeypatch.setattr(merging, "FIRST_PAUSE", 0.05)
    tries, fixed = [], threading.Event()

    def work(stop):
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise StorageError("the disk is full")
        fixed.set()

    job = Background("sweeping", due=lambda: not fixed.is_set(), work=work)
    with caplog.at_level(logging.WARNING):
        job.wake()
        job.wake()
        assert fixed.wait(20)
    job.close()
    pauses = np.diff(tries)
    assert (pauses >= [0.05, 0.1, 0.2]).all()
    assert caplog.text.count("sweeping failed, and is tried again in") == 3


def test_a_fault_of_ours_is_logged_with_its_traceback_and_does_not_end_the_process(caplog):
    done = threading.Event()

    def work(stop):
        done.set()
        raise ZeroDivisionError("oh")

    job = Background("dividing", due=lambda: True, work=work)
    job.wake()
    job.wait()
    job.close()
    assert done.is_set()
    assert "Traceback" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_work_stops_when_it_is_asked_to(caplog):
    started = threading.Event()

    def work(stop):
        started.set()
        while not stop():
            time.sleep(0.001)
        raise derive.Stopped

    job = Background("waiting", due=lambda: True, work=work)
    job.wake()
    assert started.wait(20)
    with job.paused():
        job.wake()
        started.clear()
        assert not started.wait(0.05)
    assert started.wait(20)
    job.close()
    assert not caplog.text


# Processes


SHARED = """
import itertools, json, random, sys, time
from pathlib import Path
import numpy as np
from dml.collection import NewItem, merging, open_collection

folder, seconds = sys.argv[1], float(sys.argv[2])
merging.DUE_ROWS, merging.DUE_ROOT = 8, 0  # one merge after the other
NAMES = [f"i{n}" for n in range(60)]

def vector(number):
    row = np.random.default_rng(number).standard_normal(8)
    return (row / np.linalg.norm(row)).astype(np.float32)

def operations():
    # Endless and always the same; each is one change, so that the generation says how many were done.
    rng, there = random.Random(5), set()
    for number in itertools.count():
        if there and rng.random() < 0.4:
            name = rng.choice(sorted(there))
            there.discard(name)
            yield name, None
        else:
            name = rng.choice(NAMES)
            there.add(name)
            yield name, number
"""
WRITER = (
    SHARED
    + """
with open_collection(folder) as shop:
    for name, number in operations():
        if Path(folder + ".stop").exists() and shop.manifest.built:
            break
        if number is None:
            assert shop.delete([name]) == 1
        else:
            shop.add([NewItem(name, vector(number))])
    shop.settle()
    print(json.dumps([shop.generation, shop.manifest.built["sequence"]]))
"""
)
READER = (
    SHARED
    + """
history, coming = [{}], operations()
answers, generations, rng = 0, set(), np.random.default_rng(int(sys.argv[3]))
end = time.monotonic() + seconds
with open_collection(folder, read_only=True) as shop:
    while time.monotonic() < end or len(generations) < 5:
        query = vector(rng.integers(10**6))
        [result] = shop.search(query[None], limit=10, with_vector=True)
        while len(history) <= result.generation:
            name, number = next(coming)
            model = dict(history[-1])
            model.pop(name, None)
            history.append(model if number is None else {**model, name: vector(number)})
        then = history[result.generation]
        scores = {name: float(np.dot(v.astype(float), query.astype(float))) for name, v in then.items()}
        best = sorted(scores.values(), reverse=True)[:10]
        assert np.allclose([hit.score for hit in result.hits], best, atol=1e-6), result.generation
        assert all((hit.item.vector == then[hit.id]).all() for hit in result.hits), result.generation
        answers += 1
        generations.add(result.generation)
print(json.dumps([answers, len(generations)]))
"""
)


def test_readers_in_other_processes_answer_by_the_generation_that_they_name(create, tmp_path, scale):
    create(index="flat", dim=8).close()
    seconds = 1.5 * min(scale, 20)
    everybody = [(WRITER, "0"), (READER, "1"), (READER, "2")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "shop"), str(seconds), number],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for script, number in everybody
    ]
    said = [process.communicate(timeout=seconds + 100) for process in processes[1:]]
    (tmp_path / "shop.stop").touch()
    said.append(processes[0].communicate(timeout=100))
    assert [err for _, err in said] == ["", "", ""]
    *read, (last, merged) = [json.loads(out) for out, _ in said]
    assert last >= merged > 0
    print("(answers, generations) of each reader:", *read, "changes:", last)


def test_a_reader_that_the_writer_overtakes_looks_again_and_says_nothing(create, reopen, caplog, monkeypatch):
    rows = unit(7, 40)
    shop = create(index="flat")
    shop.add(items(rows[:10]))
    shop.merge()
    reader = reopen(read_only=True)
    snapshots = reader._present.snapshots
    with reader._present.catalog.reading() as db:
        assert snapshots.load(db).sequence == 10
        for n in (10, 20, 30):  # merges that delete what this transaction could have read
            shop.add(items(rows[n : n + 10], start=n))
            shop.merge()
        assert snapshots.load(db) is None
        assert snapshots.overtaken
    with reader._present.catalog.reading() as db:
        assert snapshots.load(db).sequence == 40
        assert not snapshots.overtaken
    # deleted between being listed and being read
    there = snapshots.paths()
    gone = snapshots.path(39)
    monkeypatch.setattr(snapshots, "paths", lambda: [gone])
    with reader._present.catalog.reading() as db:
        assert snapshots.load(db) is None
    assert snapshots.overtaken
    reader._upkeep._adopt(lambda: False)
    monkeypatch.setattr(snapshots, "paths", lambda: there)
    reader._upkeep._adopt(lambda: False)
    assert reader._present.state.base.sequence == 40
    [result] = reader.search(rows[35][None], limit=1)
    assert result.hits[0].id == "i35"
    assert not caplog.records


def test_a_reader_overtaken_before_it_takes_up_an_index_brings_nothing_back(create, reopen, monkeypatch):
    rows = unit(8, 40)
    shop = create(index="flat")
    shop.add(items(rows[:10]))
    shop.merge()
    reader = reopen(read_only=True)
    shop.add(items(rows[10:20], start=10))
    shop.merge()
    take_up = reader._present.take_up

    def late(state):
        shop.delete(["i3"])
        for n in (20, 30):  # after these merges the catalogue does not know any more that i3 was removed
            shop.add(items(rows[n : n + 10], start=n))
            shop.merge()
        take_up(state)

    monkeypatch.setattr(reader._present, "take_up", late)
    reader._upkeep._adopt(lambda: False)
    monkeypatch.undo()
    there = {f"i{n}" for n in range(40)} - {"i3"}
    assert set(ids_of(reader.search(rows[3][None], limit=50)[0])) == there
    assert reader._present.state.base.sequence == shop._present.state.base.sequence
    reader._upkeep._adopt(lambda: False)  # the search has done it; that is no failure


@pytest.mark.parametrize("change", ["add", "delete"])
def test_a_change_whose_writer_is_interrupted_after_its_commit_is_searched(create, change, monkeypatch):
    """Ctrl-C in a notebook: between the commit and the moment at which searches see it."""
    rows = unit(9, 6)
    shop = create(index="flat")
    shop.add(items(rows[:5]))

    def interrupted(written):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shop._present, "_follow", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shop.add(items(rows[5:], start=5)) if change == "add" else shop.delete(["i1"])
    there = {f"i{n}" for n in range(6)} if change == "add" else {"i0", "i2", "i3", "i4"}
    assert set(ids_of(shop.search(rows[:1], limit=10)[0])) == there
    assert shop.count() == len(there)
    shop.delete(["i2"])
    assert set(ids_of(shop.search(rows[:1], limit=10)[0])) == there - {"i2"}


def test_a_writer_that_waited_keeps_what_the_one_before_it_changed(create, tmp_path, monkeypatch):
    """It has read the manifest before the lock was its own."""
    shop = create(index="flat")
    before = present.read_manifest(shop.path)
    shop.rename("another name")
    shop.close()
    answers = iter([before])
    read = present.read_manifest
    monkeypatch.setattr(present, "read_manifest", lambda path: next(answers, None) or read(path))
    with open_collection(shop.path) as second:
        assert second.name == "another name"
        second.set_root("photos", tmp_path)
    assert open_collection(shop.path, read_only=True).name == "another name"


def test_a_lock_of_a_folder_that_was_replaced_is_taken_again(tmp_path):
    """Whoever opened the lock before the exchange holds the lock of a folder that is gone."""
    for name in ("here", "new"):
        (tmp_path / name).mkdir()
    path, opened = tmp_path / "here" / "writer.lock", []

    def exchange(file, mode):
        opened.append(open(file, mode))  # noqa: SIM115 - the lock closes it
        if len(opened) == 1:
            (tmp_path / "here").rename(tmp_path / "old")
            (tmp_path / "new").rename(tmp_path / "here")
        return opened[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lock, "open", exchange, raising=False)
        held = lock.WriterLock(path)
    assert len(opened) == 2
    assert json.loads(path.read_text())["pid"] == os.getpid()
    with pytest.raises(CollectionLocked):
        lock.WriterLock(path)
    held.release()


def test_verifying_beside_a_busy_writer_finds_nothing(create, tmp_path):
    shop = create(index="flat")
    done, trouble = threading.Event(), []

    def write():
        try:
            for n in range(100_000):
                if done.is_set():
                    return
                shop.add([NewItem(f"i{n % 50}", unit(n, 1)[0], image=b"picture %d" % n)])
                if n % 3 == 0:
                    shop.delete([f"i{(n + 25) % 50}"])
                if n % 5 == 0:
                    shop.merge()
        except Exception as error:
            trouble.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    command = [sys.executable, "-m", "dml", "index", "verify", str(tmp_path / "shop")]
    for _ in range(3):
        checked = subprocess.run(command, capture_output=True, text=True, timeout=100)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    done.set()
    writer.join()
    assert not trouble


def test_rows_added_one_by_one_share_their_room():
    """Views of the delta: a row costs a copy of all only when the room doubles."""
    rows = unit(0, 5_000, dim=4)
    views = [FlatIndex(4)]
    for n in range(5_000):
        views.append(views[-1].extended(np.array([n]), rows[n : n + 1]))
    pairs = list(pairwise(views))
    for part in (lambda v: v.vectors, lambda v: v.rows.ids, lambda v: v.rows.alive):
        copies = sum(not np.shares_memory(part(before), part(after)) for before, after in pairs)
        assert copies < 10
    fewer = views[-1].without(np.arange(10))
    more = fewer.extended(np.array([9_000]), rows[:1])
    assert [len(v) for v in (views[100], views[-1], fewer, more)] == [100, 5_000, 4_990, 4_991]
    assert ids_alive(more) == {*range(10, 5_000), 9_000}
    assert ids_alive(views[100]) == set(range(100))


def ids_alive(index):
    return set(index.rows.ids[index.rows.living()].tolist())
