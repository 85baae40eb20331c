"""What a collection keeps: everything acknowledged, nothing else, and one moment per search."""

import hashlib
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from dml.checksums import seal
from dml.collection import NewItem, create_collection, is_collection, open_collection
from dml.collection import catalog as sql
from dml.collection.repair import Repairs, repair
from dml.errors import (
    CollectionError,
    CollectionLocked,
    ConfigError,
    DamagedFile,
    DimensionMismatch,
    ImageNotKept,
    ModelMismatch,
    ReadOnly,
    StorageError,
    UnknownCollection,
    UnknownItem,
    UsageError,
    VectorError,
)
from dml.index import make_index
from dml.index.file import FORMAT, PREFIX

DIM = 16
FINGERPRINT = "f" * 64


def unit(seed, count, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def items(vectors, prefix="i", start=0):
    return [
        NewItem(f"{prefix}{n}", vector, {"label": f"l{n % 3}", "n": n})
        for n, vector in enumerate(vectors, start=start)
    ]


def ids_of(result):
    return [hit.id for hit in result.hits]


def nearest(query, model, k):
    """Ids of the k nearest in {id: vector}, by definition."""
    scores = {
        id: np.float32(np.dot(v.astype(np.float64), query.astype(np.float64))) for id, v in model.items()
    }
    return sorted(scores, key=lambda id: -scores[id])[:k]


def jpeg(image, **kwargs):
    out = BytesIO()
    image.save(out, "JPEG", **kwargs)
    return out.getvalue()


@pytest.fixture
def create(tmp_path):
    """create(**kwargs) -> an empty collection at tmp_path/shop; all are closed at the end."""
    opened = []

    def make(name="shop", **kwargs):
        kwargs = {"dim": DIM, "fingerprint": FINGERPRINT, "index": "flat", **kwargs}
        opened.append(create_collection(tmp_path / name, **kwargs))
        return opened[-1]

    yield make
    for collection in opened:
        collection.close()


@pytest.fixture
def reopen(tmp_path):
    opened = []

    def again(name="shop", **kwargs):
        opened.append(open_collection(tmp_path / name, **kwargs))
        return opened[-1]

    yield again
    for collection in opened:
        collection.close()


# Adding, finding, replacing, forgetting


def test_what_is_added_is_found_at_once_with_payload_and_score(create):
    shop = create()
    vectors = unit(0, 50)
    assert shop.add(items(vectors)) == [True] * 50
    [result] = shop.search(vectors[7:8], limit=3)
    assert ids_of(result) == nearest(vectors[7], {f"i{n}": v for n, v in enumerate(vectors)}, 3)
    best = result.hits[0]
    assert (best.id, best.rank, best.item.label, best.item.payload["n"]) == ("i7", 1, "l1", 7)
    assert best.score == pytest.approx(1)
    assert result.generation == shop.generation == 50
    assert not result.approximate
    assert len(shop) == 50


def test_an_updated_item_returns_its_new_vector_at_once(create):
    shop = create()
    vectors = unit(0, 20)
    shop.add(items(vectors))
    shop.build_index()
    new = unit(1, 1)
    assert shop.add([NewItem("i3", new[0], {"label": "new"})]) == [False]
    assert len(shop) == 20
    assert ids_of(shop.search(new)[0])[0] == "i3"
    assert shop.search(vectors[3:4])[0].hits[0].score < 0.999
    [item] = shop.get(["i3"], with_vector=True)
    assert item.payload == {"label": "new"}
    assert (item.vector == new[0]).all()


def test_the_last_of_equal_ids_in_one_batch_wins(create, reopen):
    shop = create()
    a, b = unit(0, 2)
    assert shop.add([NewItem("x", a), NewItem("x", b)]) == [True, False]
    assert len(shop) == 1
    assert shop.search(b[None])[0].hits[0].score == pytest.approx(1)
    shop.close()
    again = reopen()
    assert len(again) == 1
    assert again.search(b[None])[0].hits[0].score == pytest.approx(1)


@pytest.mark.parametrize("built", [False, True])
def test_deleted_items_never_return(create, built):
    shop = create()
    vectors = unit(0, 30)
    shop.add(items(vectors))
    if built:
        shop.build_index()
    assert shop.delete(["i4", "i5", "nobody", "i4"]) == 2
    assert len(shop) == 28
    for exact in (False, True):
        [result] = shop.search(vectors[4:5], limit=1000, exact=exact)
        assert len(result.hits) == 28
        assert not {"i4", "i5"} & set(ids_of(result))
    with pytest.raises(UnknownItem, match='"i4"'):
        shop.get(["i1", "i4"])
    assert shop.delete(["i4"]) == 0


def test_a_payload_is_merged_and_none_removes_a_key(create, reopen):
    shop = create()
    shop.add(items(unit(0, 3)))
    item = shop.update_payload("i1", {"price": 5, "n": None})
    assert item.payload == {"label": "l1", "price": 5}
    assert item.sequence == shop.generation == 4
    assert shop.search(unit(0, 3)[1:2])[0].hits[0].item.payload == item.payload
    with pytest.raises(UnknownItem):
        shop.update_payload("nobody", {"a": 1})
    shop.close()
    assert reopen().get(["i1"])[0].payload == {"label": "l1", "price": 5}


def test_sequence_numbers_grow_with_every_change(create):
    shop = create()
    shop.add(items(unit(0, 3)))
    shop.delete(["i0"])
    shop.add(items(unit(1, 1), start=1))
    assert [item.sequence for item in shop.get(["i2", "i1"])] == [3, 5]
    assert shop.generation == 5


def test_scrolling_meets_every_item_once_in_the_order_of_ids(create):
    shop = create()
    shop.add(items(unit(0, 25)))
    seen, after = [], None
    while True:
        page, after = shop.scroll(after=after, limit=10, with_vector=True)
        seen += page
        if after is None:
            break
    assert [item.id for item in seen] == sorted(f"i{n}" for n in range(25))
    assert all(item.vector is not None for item in seen)
    assert shop.scroll(after="zzz") == ([], None)


def test_offset_exclude_and_threshold_choose_among_the_results(create):
    shop = create()
    vectors = unit(0, 40)
    shop.add(items(vectors))
    order = nearest(vectors[0], {f"i{n}": v for n, v in enumerate(vectors)}, 40)
    [page] = shop.search(vectors[:1], limit=5, offset=10)
    assert ids_of(page) == order[10:15]
    assert [hit.rank for hit in page.hits] == [11, 12, 13, 14, 15]
    assert ids_of(shop.search(vectors[:1], limit=5, exclude=order[:3])[0]) == order[3:8]
    assert ids_of(shop.search(vectors[:1], limit=50, offset=45)[0]) == []
    [near] = shop.search(vectors[:1], limit=40, score_threshold=0.3)
    assert 0 < len(near.hits) < 40
    assert min(hit.score for hit in near.hits) >= 0.3
    assert len(shop.search(vectors[:7], limit=2, with_vector=True)) == 7
    [found] = shop.search(vectors[:1], limit=1, with_vector=True)
    assert (found.hits[0].item.vector == vectors[0]).all()


def test_searching_an_empty_collection_finds_nothing(create):
    [result] = create().search(unit(0, 1))
    assert result.hits == []


@pytest.mark.parametrize("kind", ["flat", "faiss_flat", "hnsw", "ivf"])
def test_changes_after_a_build_are_searched_with_every_kind(kind, create, reopen):
    pytest.importorskip("faiss")
    shop = create(index=kind)
    vectors = unit(0, 600)
    shop.add(items(vectors[:500]))
    built = shop.build_index()
    assert built["kind"] == kind
    assert built["count"] == 500
    shop.add(items(vectors[500:], start=500))
    shop.add(items(unit(5, 20)))
    shop.delete([f"i{n}" for n in range(20, 60)])
    model = {f"i{n}": v for n, v in enumerate(vectors)} | {f"i{n}": v for n, v in enumerate(unit(5, 20))}
    for n in range(20, 60):
        del model[f"i{n}"]
    assert shop.info().pending == 100 + 20 + 20 + 40
    shop.close()
    for again in (reopen(), reopen(read_only=True)):
        assert len(again) == 560
        assert again.info().index["kind"] == kind
        for query in unit(9, 10):
            [result] = again.search(query[None], limit=10, exact=True)
            assert ids_of(result) == nearest(query, model, 10)
            assert not result.approximate
            [quick] = again.search(query[None], limit=10, effort=500)
            assert set(ids_of(quick)) == set(nearest(query, model, 10))
            assert quick.approximate == (kind in ("hnsw", "ivf"))


# Refusals


def test_a_bad_vector_anywhere_in_a_batch_leaves_nothing_of_it(create):
    shop = create()
    good = unit(0, 3)
    nan = good[1].copy()
    nan[2] = np.nan
    for wrong, error in (
        (nan, VectorError),
        (2 * good[1], VectorError),
        (good[1][:-1], DimensionMismatch),
        (good[:2], VectorError),
    ):
        with pytest.raises(error):
            shop.add([NewItem("a", good[0]), NewItem("b", wrong), NewItem("c", good[2])])
    assert len(shop) == 0
    assert shop.generation == 0


def test_bad_queries_are_refused(create):
    shop = create()
    shop.add(items(unit(0, 3)))
    with pytest.raises(DimensionMismatch):
        shop.search(unit(0, 1, dim=8))
    with pytest.raises(VectorError, match="NaN"):
        shop.search(np.full((1, DIM), np.nan, np.float32))
    for wrong in ({"limit": 0}, {"offset": -1}, {"effort": 0}):
        with pytest.raises(UsageError, match="at least"):
            shop.search(unit(0, 1), **wrong)


@pytest.mark.parametrize("id", ["", "x" * 513, "a\nb", "a\x00", "\ud800", 7])
def test_ids_that_are_none_are_refused(create, id):
    with pytest.raises(UsageError, match="id must"):
        create().add([NewItem(id, unit(0, 1)[0])])


@pytest.mark.parametrize("payload", [{"a": float("nan")}, {"a": object()}, {"a": b"bytes"}])
def test_payloads_that_json_cannot_say_are_refused(create, payload):
    shop = create()
    with pytest.raises(UsageError, match='payload of item "a"'):
        shop.add([NewItem("a", unit(0, 1)[0], payload)])
    assert len(shop) == 0


def test_forgetting_what_is_no_text_is_refused_and_nothing_is_forgotten(create):
    shop = create()
    shop.add(items(unit(0, 2)))
    with pytest.raises(UsageError, match=r"Unicode text, got 'latin\\udcff'"):
        shop.delete(["i0", "latin\udcff"])
    assert len(shop) == 2


def test_bytes_and_file_together_are_refused(create, tmp_path):
    with pytest.raises(UsageError, match="both image and file"):
        create().add([NewItem("a", unit(0, 1)[0], image=b"x", file=tmp_path / "y")])


def test_vectors_of_another_encoder_are_refused_when_opening_and_when_adding(create, reopen):
    shop = create()
    with pytest.raises(ModelMismatch, match="cannot be compared"):
        shop.add(items(unit(0, 1)), fingerprint="e" * 64)
    assert len(shop) == 0
    shop.close()
    with pytest.raises(ModelMismatch, match="eeeeeeeeeeee"):
        reopen(fingerprint="e" * 64)
    reopen(fingerprint=FINGERPRINT)


def test_a_folder_without_a_collection_says_so(tmp_path):
    with pytest.raises(UnknownCollection, match="dml index build"):
        open_collection(tmp_path / "nowhere")
    assert not is_collection(tmp_path)
    (tmp_path / "manifest.json").write_text("{]")
    with pytest.raises(DamagedFile):
        open_collection(tmp_path)


def test_a_folder_with_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    with pytest.raises(CollectionError, match="not an empty folder"):
        create_collection(tmp_path / "mine", dim=4, fingerprint="f")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(ConfigError, match='Did you mean "hnsw"'):
        create_collection(tmp_path / "new", dim=4, fingerprint="f", index="hsnw")
    assert not (tmp_path / "new").exists()


def test_a_second_writer_is_refused_until_the_first_lets_go(create, reopen):
    shop = create()
    shop.add(items(unit(0, 2)))
    with pytest.raises(CollectionLocked, match="being written to by process"):
        reopen()
    assert len(reopen(read_only=True)) == 2
    shop.close()
    assert len(reopen()) == 2


def test_a_reader_may_not_write(create, reopen):
    create().add(items(unit(0, 2)))
    reader = reopen(read_only=True)
    for write in (
        lambda: reader.add(items(unit(0, 1))),
        lambda: reader.delete(["i0"]),
        lambda: reader.update_payload("i0", {}),
        lambda: reader.build_index(),
        lambda: reader.set_root("files", "/"),
    ):
        with pytest.raises(ReadOnly):
            write()


def test_a_closed_collection_says_so(create):
    shop = create()
    shop.close()
    shop.close()
    with pytest.raises(CollectionError, match="closed"):
        shop.search(unit(0, 1))
    with pytest.raises(CollectionError, match="closed"):
        shop.add(items(unit(0, 1)))


# Readers, threads


def test_a_reader_follows_the_writer(create, reopen):
    shop = create()
    vectors = unit(0, 80)
    shop.add(items(vectors[:20]))
    reader = reopen(read_only=True)
    assert len(reader) == 20
    for round in range(1, 4):
        shop.add(items(vectors[20 * round : 20 * round + 10], start=20 * round))
        shop.delete([f"i{round}"])
        assert len(reader) == len(shop)
        assert reader.generation == shop.generation
        assert ids_of(reader.search(vectors[:1], limit=100)[0]) == ids_of(
            shop.search(vectors[:1], limit=100)[0]
        )
        shop.build_index()
        shop.build_index("faiss_flat" if round == 2 else "flat")
    assert len(reader) == len(shop) == 47


def test_a_reader_that_slept_through_several_builds_catches_up(create, reopen):
    shop = create()
    vectors = unit(0, 60)
    shop.add(items(vectors[:20]))
    reader = reopen(read_only=True)
    for round in range(5):  # the log of removals that the reader would need is gone after this
        shop.delete([f"i{round}"])
        shop.add(items(vectors[20 + round : 21 + round], start=20 + round))
        shop.build_index()
    assert reader.generation < shop.generation
    [result] = reader.search(vectors[:1], limit=100)
    assert set(ids_of(result)) == {f"i{n}" for n in range(5, 25)}
    assert result.generation == shop.generation


@pytest.mark.parametrize("as_reader", [False, True])
def test_every_search_sees_one_generation_while_another_thread_writes(create, reopen, as_reader, scale):
    shop = create()
    rng = np.random.default_rng(7)
    pool = unit(3, 400)
    shop.add(items(pool[:60]))
    model = {f"i{n}": pool[n] for n in range(60)}
    history = {shop.generation: dict(model)}
    watched = reopen(read_only=True) if as_reader else shop
    queries = unit(8, 3)
    answers, trouble, done = [], [], threading.Event()

    def search():
        try:
            while not done.is_set():
                answers.extend(zip(queries, watched.search(queries, limit=5), strict=True))
        except Exception as error:
            trouble.append(error)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(60 * scale):
        kind = rng.integers(10)
        if kind < 6:
            names = [f"i{n}" for n in rng.integers(0, 100, 3)]
            rows = pool[rng.integers(0, 400, 3)]
            shop.add([NewItem(name, row, {"step": step}) for name, row in zip(names, rows, strict=True)])
            model.update(zip(names, rows, strict=True))
        elif kind < 9:
            names = [f"i{n}" for n in rng.integers(0, 100, 3)]
            shop.delete(names)
            for name in names:
                model.pop(name, None)
        else:
            shop.build_index("flat")
        history[shop.generation] = dict(model)
    done.set()
    for thread in threads:
        thread.join()
    assert not trouble
    assert len({result.generation for _, result in answers}) > 3
    for query, result in answers:
        then = history[result.generation]
        assert [hit.score for hit in result.hits] == sorted((hit.score for hit in result.hits), reverse=True)
        wanted = sorted(
            (float(np.dot(v.astype(float), query.astype(float))) for v in then.values()), reverse=True
        )
        assert [hit.score for hit in result.hits] == pytest.approx(wanted[:5], abs=1e-6)
        assert all(hit.id in then for hit in result.hits)


def test_writes_from_several_threads_are_all_there(create, reopen):
    shop = create()
    vectors = unit(0, 200)

    def write(part):
        for n in range(part, 200, 4):
            shop.add([NewItem(f"i{n}", vectors[n])])

    threads = [threading.Thread(target=write, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shop) == 200
    shop.close()
    assert ids_of(reopen().search(vectors[:1], limit=1)[0]) == ["i0"]


def test_searches_and_writes_go_on_during_a_build(create, monkeypatch):
    shop = create()
    vectors = unit(0, 40)
    shop.add(items(vectors[:30]))
    reached, go_on = threading.Event(), threading.Event()
    from dml.collection import derive

    original = derive.fill

    def slow(*args, **kwargs):
        reached.set()
        assert go_on.wait(20)
        return original(*args, **kwargs)

    monkeypatch.setattr(derive, "fill", slow)
    builder = threading.Thread(target=shop.build_index)
    builder.start()
    assert reached.wait(20)
    shop.add(items(vectors[30:], start=30))
    shop.delete(["i0"])
    assert ids_of(shop.search(vectors[35:36], limit=1)[0]) == ["i35"]
    go_on.set()
    builder.join()
    assert len(shop) == 39
    assert shop.info().pending == 10 + 1
    assert set(ids_of(shop.search(vectors[:1], limit=100)[0])) == {f"i{n}" for n in range(1, 40)}


# The index


def test_the_measured_recall_is_kept_with_the_snapshot(create, reopen):
    pytest.importorskip("faiss")
    shop = create(index="ivf", options={"cells": 30, "effort": 1})
    shop.add(items(unit(0, 2000)))
    low = shop.build_index()["measured"]
    assert low["queries"] == 200
    assert 0.05 < low["recall_at_10"] < 0.9
    high = shop.build_index(options={"cells": 30, "effort": 30})["measured"]
    assert high["recall_at_10"] == 1
    assert shop.build_index("flat")["measured"]["recall_at_10"] == 1
    shop.build_index("ivf", options={"cells": 30, "effort": 1})
    shop.close()
    info = reopen().info()
    assert info.measured_recall == pytest.approx(low["recall_at_10"], abs=0.1)
    assert info.manifest["built"]["measured"]["recall_at_10"] == info.measured_recall
    assert info.index["effort"] == 1


def test_measured_recall_is_what_a_user_would_measure(create):
    """The held-out figure against the same figure for fresh queries of the same kind."""
    pytest.importorskip("faiss")
    shop = create(index="ivf", options={"cells": 30, "effort": 4})
    shop.add(items(unit(0, 3000)))
    measured = shop.build_index()["measured"]["recall_at_10"]
    fresh = unit(99, 300)
    pairs = zip(shop.search(fresh), shop.search(fresh, exact=True), strict=True)
    seen = np.mean([len(set(ids_of(a)) & set(ids_of(b))) / 10 for a, b in pairs])
    assert measured == pytest.approx(seen, abs=0.06)


def test_building_with_what_cannot_be_had_changes_nothing(create):
    pytest.importorskip("faiss")
    shop = create()
    shop.add(items(unit(0, 30)))
    shop.build_index()
    before = shop.manifest
    with pytest.raises(ConfigError, match="Unknown index kind"):
        shop.build_index("tree")
    with pytest.raises(ConfigError, match="no option"):
        shop.build_index("hnsw", options={"colour": 3})
    assert shop.manifest == before
    assert shop.info().index["kind"] == "flat"
    assert len(shop.search(unit(0, 1), limit=30)[0].hits) == 30


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hnsw", {"links": "x"}, r'option "links".*whole number.*links = 32; got \'x\''),
        ("hnsw", {"links": 1.5}, "got 1.5"),
        ("hnsw", {"links": True}, "got True"),
        ("hnsw", {"links": 2**40}, "got 1099511627776"),
        ("hnsw", {"color": 3}, r'no option "color" \(given: color = 3\). It takes: .*links'),
        ("hnsw", {"dim": 3}, 'no option "dim"'),
        ("flat", {"links": 3}, "It takes: none"),
        ("auto", {"links": 3}, "Name the kind"),
    ],
)
def test_options_that_a_kind_does_not_take_are_named(create, tmp_path, kind, options, message):
    with pytest.raises(ConfigError, match=message):
        create(index=kind, options=options)
    assert not (tmp_path / "shop").exists()
    shop = create()
    with pytest.raises(ConfigError, match=message):
        shop.build_index(kind, options=options)
    if kind != "auto" and "dim" not in options:
        with pytest.raises(ConfigError, match=message):
            make_index(kind, DIM, **options)


def test_auto_without_faiss_is_flat(create, monkeypatch):
    monkeypatch.setattr("dml.index.faiss_index.find_spec", lambda name: None)
    shop = create(index="auto")
    shop.add(items(unit(0, 5)))
    assert shop.build_index()["kind"] == "flat"


def test_a_collection_built_with_faiss_opens_without_it(create, reopen, monkeypatch, caplog):
    pytest.importorskip("faiss")
    shop = create(index="hnsw")
    vectors = unit(0, 100)
    shop.add(items(vectors))
    shop.build_index()
    shop.close()
    monkeypatch.setitem(sys.modules, "faiss", None)
    again = reopen()
    assert "searched exactly" in caplog.text
    assert ids_of(again.search(vectors[9:10], limit=1)[0]) == ["i9"]
    assert len(again) == 100
    assert again.info().index["kind"] == "flat"


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "gone"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_damaged_snapshot_is_passed_over_and_nothing_is_lost(
    create, reopen, tmp_path, harm, read_only, caplog
):
    shop = create()
    vectors = unit(0, 80)
    shop.add(items(vectors[:60]))
    shop.build_index()
    shop.add(items(vectors[60:], start=60))
    shop.delete(["i0"])
    shop.close()
    [snapshot] = (tmp_path / "shop" / "snapshots").glob("*.index")
    data = bytearray(snapshot.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 4
    snapshot.write_bytes({"flip": data, "cut": data[: len(data) // 2], "empty": b"", "gone": b""}[harm])
    if harm == "gone":
        snapshot.unlink()
    again = reopen(read_only=read_only)
    if harm != "gone":
        assert "passed over, nothing is lost" in caplog.text
    assert len(again) == 79
    expected = {f"i{n}" for n in range(1, 80)}
    assert set(ids_of(again.search(vectors[:1], limit=100)[0])) == expected
    again.close()
    if not read_only:
        assert "built again from the catalogue" in caplog.text
        caplog.clear()
        healed = reopen()
        assert caplog.text == ""
        assert healed.verify() == []
        assert healed.info().pending == 0


def test_the_older_snapshot_serves_when_the_newest_is_damaged(create, reopen, tmp_path, caplog):
    shop = create()
    vectors = unit(0, 60)
    for round in range(4):
        shop.add(items(vectors[10 * round : 10 * round + 10], start=10 * round))
        shop.delete([f"i{10 * round}"])
        shop.build_index()
    shop.delete(["i39"])
    shop.close()
    snapshots = sorted((tmp_path / "shop" / "snapshots").glob("*.index"))
    assert [int(p.stem) for p in snapshots] == [33, 44]
    snapshots[-1].write_bytes(b"half")
    again = reopen()
    assert "built again" not in caplog.text
    expected = {f"i{n}" for n in range(40) if n % 10} - {"i39"}
    assert set(ids_of(again.search(vectors[:1], limit=100)[0])) == expected


def test_a_half_written_snapshot_is_ignored_and_removed_by_the_next_build(create, reopen, tmp_path):
    shop = create()
    shop.add(items(unit(0, 10)))
    shop.close()
    leftover = tmp_path / "shop" / "snapshots" / ".000000000010.index.99-1.aside"
    leftover.write_bytes(b"half of it")
    again = reopen()
    assert len(again) == 10
    again.build_index()
    assert not leftover.exists()


def test_a_snapshot_of_another_catalogue_is_not_believed(create, reopen, tmp_path, caplog):
    other = create("other", fingerprint="e" * 64)
    other.add(items(unit(1, 10)))
    other.build_index()
    other.close()
    shop = create()
    shop.add(items(unit(0, 10)))
    shop.build_index()
    shop.close()
    [alien] = (tmp_path / "other" / "snapshots").glob("*.index")
    shutil.copy(alien, tmp_path / "shop" / "snapshots" / "000000000011.index")
    again = reopen()
    assert "does not belong" in caplog.text
    assert ids_of(again.search(unit(0, 1), limit=1)[0]) == ["i0"]


def rewrite_header(path, **changes):
    """Change what an index file says about itself, with a checksum that fits."""
    data = path.read_bytes()
    magic, offset, length, _ = PREFIX.unpack(data[: PREFIX.size])
    header = json.dumps({**json.loads(data[offset : offset + length]), **changes}).encode()
    prefix = PREFIX.pack(magic, offset, len(header), hashlib.sha256(header).digest())
    path.write_bytes(prefix + data[PREFIX.size : offset] + header)


@pytest.mark.parametrize("why", ["newer", "kind", "refused", "engine"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_snapshot_that_is_not_damaged_is_never_deleted(
    create, reopen, tmp_path, why, read_only, monkeypatch, caplog
):
    shop = create()
    vectors = unit(0, 40)
    shop.add(items(vectors))
    shop.build_index()
    shop.close()
    [snapshot] = (tmp_path / "shop" / "snapshots").glob("*.index")
    if why in ("newer", "kind"):
        rewrite_header(snapshot, **{"newer": {"format": FORMAT + 1}, "kind": {"kind": "scann"}}[why])
    before = snapshot.read_bytes()

    def refuse(*args, **kwargs):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as trouble:
        if why == "refused":
            trouble.setattr("dml.index.file.PREFIX", type("P", (), {"size": 48, "unpack": refuse}))
        elif why == "engine":
            trouble.setattr("dml.collection.snapshots.load_index", refuse)
        again = reopen(read_only=read_only)
    assert "passed over" in caplog.text
    assert "searched exactly until its index can be read" in caplog.text
    assert ids_of(again.search(vectors[7:8], limit=1)[0]) == ["i7"]
    assert len(again) == 40
    again.close()
    assert snapshot.read_bytes() == before
    if not read_only:
        again = reopen()
        again.build_index()
        again.close()
        caplog.clear()
        assert reopen().verify() == []
        assert caplog.text == ""


def test_a_device_that_is_not_there_is_an_error_and_costs_no_snapshot(create, reopen, tmp_path):
    pytest.importorskip("faiss")
    shop = create(index="hnsw")
    shop.add(items(unit(0, 40)))
    shop.build_index()
    shop.close()
    [snapshot] = (tmp_path / "shop" / "snapshots").glob("*.index")
    for read_only in (False, True):
        with pytest.raises(ConfigError, match="no GPU form"):
            reopen(device="cuda:0", read_only=read_only)
    assert snapshot.exists()
    assert reopen().info().index["kind"] == "hnsw"


# Formats


def test_newer_formats_are_refused_and_nothing_is_touched(create, tmp_path):
    create().close()
    folder = tmp_path / "shop"
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(seal({**json.loads(manifest), "format": 99}))
    with pytest.raises(DamagedFile, match="format 99.*update dml"):
        open_collection(folder)
    (folder / "manifest.json").write_bytes(manifest)
    change_version(folder, 99)
    for read_only in (False, True):
        with pytest.raises(DamagedFile, match="format 99.*update dml"):
            open_collection(folder, read_only=read_only)
    change_version(folder, sql.VERSION)
    open_collection(folder).close()


def change_version(folder, version):
    connection = sqlite3.connect(folder / "catalog.sqlite")
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()


def test_an_older_collection_is_migrated_on_a_copy(create, reopen, tmp_path):
    shop = create()
    shop.add(items(unit(0, 10)))
    shop.build_index()
    shop.delete(["i0"])
    shop.close()
    shop = tmp_path / "shop"
    make_format_1(shop)
    reader = reopen(read_only=True)
    assert len(reader) == 9
    assert reader.verify() == []
    assert "checksum" not in (shop / "manifest.json").read_text()
    reader.close()
    again = reopen()
    assert (len(again), again.generation) == (9, 11)
    assert again.verify() == []
    assert again.info().manifest["format"] == 2
    again.close()
    assert repair(shop) == Repairs()
    again = reopen()
    again.delete(["i1"])
    again.close()
    with closing(sqlite3.connect(shop / "catalog.sqlite")) as new:
        assert new.execute("PRAGMA user_version").fetchone() == (2,)
        assert new.execute("SELECT sequence, horizon FROM state").fetchone() == (12, 0)
    with closing(sqlite3.connect(shop / "catalog.sqlite.format1")) as old:
        assert old.execute("PRAGMA user_version").fetchone() == (1,)
        assert old.execute("SELECT count(*) FROM items").fetchone() == (9,)
    assert len(reopen()) == 8


@pytest.fixture
def old_shop(create, tmp_path):
    """A collection of the first format with 10 items in the catalogue, 5 in its log, and a reader of it."""
    create().close()
    folder = tmp_path / "shop"
    with open_collection(folder) as shop:
        shop.add(items(unit(0, 10)))
    make_format_1(folder)
    with open_collection(folder, read_only=True) as reader:
        assert len(reader) == 10
        with closing(sqlite3.connect(folder / "catalog.sqlite", isolation_level=None)) as db:
            db.execute("BEGIN")
            for n, vector in enumerate(unit(1, 5)):
                sql.insert(db, sql.Change(f"log{n}", vector, "{}", None), 11 + n)
            db.execute("UPDATE state SET sequence = 15")
            db.execute("COMMIT")
        assert (folder / "catalog.sqlite-wal").stat().st_size
        yield folder, reader


def test_a_catalogue_that_somebody_reads_is_migrated_with_its_log(old_shop, reopen):
    folder, reader = old_shop
    with reopen() as shop:
        assert (len(shop), shop.generation, shop.verify()) == (15, 15, [])
        shop.add(items(unit(2, 200), prefix="new"))
        shop.delete(["i3", "log3"])
        assert (len(shop), shop.verify()) == (213, [])
        assert (len(reader), reader.generation) == (213, 217)
        assert ids_of(reader.search(unit(1, 5)[3:4], limit=1)[0]) != ["log3"]
    reader.close()
    assert reopen().verify() == []
    with closing(sqlite3.connect(folder / "catalog.sqlite.format1")) as old:
        assert old.execute("SELECT count(*) FROM items").fetchone() == (15,)
        assert old.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_migration_that_is_cut_short_loses_nothing_of_the_log(old_shop, monkeypatch, tmp_path):
    folder, _ = old_shop
    steps = []

    def count(step):
        def counted(*arguments, **how):
            steps.append(step)
            if len(steps) == last:
                raise OSError(5, "cut short")
            return step(*arguments, **how)

        return counted

    for last in range(1, 20):
        steps.clear()
        shop = shutil.copytree(folder, tmp_path / f"copy{last}")
        (shop / "catalog.sqlite-shm").unlink(missing_ok=True)
        with closing(sqlite3.connect(shop / "catalog.sqlite")) as held, monkeypatch.context() as patched:
            held.execute("SELECT count(*) FROM items").fetchone()
            for name in ("replace", "link"):
                patched.setattr(sql.os, name, count(getattr(sql.os, name)))
            patched.setattr(sql, "flush_to_disk", count(sql.flush_to_disk))
            patched.setattr(sql.Path, "unlink", count(sql.Path.unlink))
            with suppress(StorageError, OSError):
                sql.migrate(shop / "catalog.sqlite")
            patched.undo()
            left = shutil.copytree(shop, tmp_path / f"left{last}")  # as a power cut would
        (left / "catalog.sqlite-shm").unlink(missing_ok=True)
        with open_collection(left, read_only=True) as reader:
            assert (len(reader), reader.verify()) == (15, []), last
        with open_collection(left) as again:
            assert (len(again), again.verify()) == (15, []), last
        if len(steps) < last:
            return
    raise AssertionError("it never came to its end")


def change_catalog(folder, statement):
    with closing(sqlite3.connect(folder / "catalog.sqlite", isolation_level=None)) as db:
        db.execute(statement)


def make_format_1(folder):
    """Turn a collection into what the first format was: no checksums of state and manifest, no facts."""
    with closing(sqlite3.connect(folder / "catalog.sqlite", isolation_level=None)) as db:
        sequence, horizon = db.execute("SELECT sequence, horizon FROM state").fetchone()
        db.executescript(
            "BEGIN; DROP TABLE facts; DROP TABLE state; DROP INDEX items_sequence;"
            "CREATE TABLE state (\n    only INTEGER PRIMARY KEY CHECK (only = 1), sequence INTEGER NOT NULL, "
            "horizon INTEGER NOT NULL\n);"
            f"INSERT INTO state VALUES (1, {sequence}, {horizon}); PRAGMA user_version = 1; COMMIT;"
        )
    path = folder / "manifest.json"
    tree = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"}
    path.write_text(json.dumps({**tree, "format": 1}, indent=2) + "\n")


def test_a_catalogue_of_the_second_format_without_its_last_index_is_sound(create, reopen, tmp_path):
    shop = create()
    shop.add(items(unit(0, 10)))
    shop.index_payload("label")
    shop.close()
    change_catalog(tmp_path / "shop", "DROP INDEX items_sequence")
    assert repair(tmp_path / "shop") == Repairs()
    change_catalog(tmp_path / "shop", "CREATE INDEX items_sequencf ON items (sequence)")
    assert 'definition of "items_sequence"' in reopen(read_only=True).verify()[0]


def test_a_migration_that_fails_leaves_the_old_catalogue(create, reopen, monkeypatch, tmp_path):
    shop = create()
    shop.add(items(unit(0, 10)))
    shop.close()

    def fail(db):
        db.execute("DELETE FROM items")
        raise RuntimeError("a bug")

    monkeypatch.setattr(sql, "VERSION", sql.VERSION + 1)
    monkeypatch.setattr(sql, "MIGRATIONS", {sql.VERSION - 1: fail})
    with pytest.raises(RuntimeError):
        reopen()
    monkeypatch.undo()
    assert len(reopen()) == 10


# Checking


def test_verify_names_every_kind_of_damage(create, reopen, tmp_path, draw):
    photo = tmp_path / "photos" / "a.jpg"
    photo.parent.mkdir()
    photo.write_bytes(jpeg(draw(1)))
    shop = create(roots={"files": photo.parent})
    vectors = unit(0, 5)
    shop.add([*items(vectors[:3]), NewItem("kept", vectors[3], image=jpeg(draw(2)))])
    shop.add([NewItem("referenced", vectors[4], file=photo)])
    shop.build_index()
    assert shop.verify() == []
    shop.close()

    folder = tmp_path / "shop"
    [snapshot] = (folder / "snapshots").glob("*.index")
    [picture] = (folder / "images").glob("*/*")
    catalogue = folder / "catalog.sqlite"
    where = catalogue.read_bytes().index(vectors[1].tobytes())
    label = catalogue.read_bytes().index(b'"label": "l2"') + 10
    for path, place, message in (
        (snapshot, 100, "checksum of its"),
        (picture, 50, 'picture of item "kept"'),
        (photo, 50, 'picture of item "referenced"'),
        (catalogue, where, 'vector of item "i1" does not fit'),
        (catalogue, label, 'entry of item "i2" does not fit'),
    ):
        whole = path.read_bytes()
        broken = bytearray(whole)
        broken[place] ^= 1
        path.write_bytes(broken)
        reader = reopen(read_only=True)
        problems = reader.verify()
        reader.close()
        assert any(message in problem for problem in problems), (path, problems)
        path.write_bytes(whole)
    photo.unlink()
    assert any("cannot be read" in problem for problem in reopen(read_only=True).verify())


def test_a_catalogue_that_is_garbage_is_refused_as_damaged(create, reopen, tmp_path):
    shop = create()
    shop.add(items(unit(0, 200)))
    shop.close()
    path = tmp_path / "shop" / "catalog.sqlite"
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(DamagedFile):
        reopen()


def test_info_says_what_there_is(create):
    shop = create(name="shop", index="flat", encoder_info={"trunk": "tiny"})
    shop.add(items(unit(0, 10)))
    info = shop.info()
    assert (info.name, info.count, info.dim, info.metric) == ("shop", 10, DIM, "cosine")
    assert (info.fingerprint, info.generation, info.pending) == (FINGERPRINT, 10, 10)
    assert info.measured_recall is None
    assert info.bytes_on_disk > 10_000
    assert info.manifest["encoder"] == {"trunk": "tiny"}
    json.dumps(info.manifest)
    shop.build_index()
    assert shop.info().pending == 0
    assert {"exact", "verify", "pictures", "count"} <= shop.capabilities()


# Pictures


def test_stored_pictures_are_kept_by_content_and_collected_when_unused(create, tmp_path, draw):
    shop = create()
    vectors = unit(0, 4)
    one, two = jpeg(draw(1)), jpeg(draw(2))
    shop.add([NewItem("a", vectors[0], image=one), NewItem("b", vectors[1], image=one)])
    shop.add([NewItem("c", vectors[2], image=two)])

    def stored():
        return len(list((tmp_path / "shop" / "images").glob("*/*")))

    assert shop.picture("a") == shop.picture("b") == one
    assert stored() == 2
    shop.thumbnail("c", 64)
    shop.delete(["a"])
    assert shop.picture("b") == one
    shop.add([NewItem("c", vectors[2], image=one)])
    assert stored() == 1
    assert not list((tmp_path / "shop" / "thumbnails").glob("*/*"))
    shop.delete(["b", "c"])
    assert stored() == 0


def test_an_item_with_a_vector_only_has_no_picture(create):
    shop = create()
    shop.add(items(unit(0, 1)))
    for ask in (shop.picture, shop.thumbnail):
        with pytest.raises(ImageNotKept, match="vector only"):
            ask("i0")
        with pytest.raises(UnknownItem):
            ask("nobody")


def test_referenced_pictures_stay_where_they_are_and_can_move_with_their_root(create, reopen, tmp_path, draw):
    (tmp_path / "photos" / "red").mkdir(parents=True)
    photo = tmp_path / "photos" / "red" / "ä b.jpg"
    photo.write_bytes(jpeg(draw(1)))
    shop = create(roots={"files": tmp_path / "photos"})
    shop.add([NewItem("a", unit(0, 1)[0], file=photo)])
    [item] = shop.get(["a"])
    assert (item.picture.kind, item.picture.root, item.picture.path) == ("referenced", "files", "red/ä b.jpg")
    assert shop.picture("a") == photo.read_bytes()
    assert not (tmp_path / "shop" / "images").exists()
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(ImageNotKept, match="cannot be read"):
        shop.picture("a")
    shop.set_root("files", tmp_path / "moved")
    shop.close()
    assert reopen().picture("a") == (tmp_path / "moved" / "red" / "ä b.jpg").read_bytes()


def test_a_referenced_picture_that_changed_is_not_shown_as_the_old_one(create, tmp_path, draw):
    photo = tmp_path / "a.jpg"
    photo.write_bytes(jpeg(draw(1)))
    shop = create(roots={"files": tmp_path})
    shop.add([NewItem("a", unit(0, 1)[0], file=photo)])
    photo.write_bytes(b"something secret")
    with pytest.raises(ImageNotKept, match="has changed"):
        shop.picture("a")


def test_paths_outside_the_roots_are_refused(create, tmp_path, draw):
    (tmp_path / "photos").mkdir()
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(jpeg(draw(1)))
    shop = create(roots={"files": tmp_path / "photos"})
    for path in (secret, tmp_path / "photos" / ".." / "secret.jpg"):
        with pytest.raises(CollectionError, match="below no root"):
            shop.add([NewItem("a", unit(0, 1)[0], file=path)])
    with pytest.raises(ImageNotKept, match="cannot be read"):
        shop.add([NewItem("a", unit(0, 1)[0], file=tmp_path / "photos" / "absent.jpg")])
    assert len(shop) == 0


@pytest.mark.parametrize("path", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", ""])
def test_a_catalogue_that_points_outside_is_not_followed(create, tmp_path, draw, path):
    (tmp_path / "photos").mkdir()
    photo, secret = tmp_path / "photos" / "a.jpg", tmp_path / "secret.jpg"
    photo.write_bytes(jpeg(draw(1)))
    secret.write_bytes(photo.read_bytes())
    shop = create(roots={"files": tmp_path / "photos"})
    shop.add([NewItem("a", unit(0, 1)[0], file=photo)])
    connection = sqlite3.connect(tmp_path / "shop" / "catalog.sqlite")
    connection.execute("UPDATE items SET picture_path = ?", (path,))
    connection.commit()
    connection.close()
    with pytest.raises(ImageNotKept, match="outside its root"):
        shop.picture("a")


def test_thumbnails_are_small_upright_jpegs_without_metadata(create, tmp_path, draw):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    exif[0x010F] = "a maker whose name is nobody's business"
    data = jpeg(draw(1, size=(200, 100)), exif=exif)
    shop = create()
    shop.add([NewItem("a", unit(0, 1)[0], image=data)])
    small = shop.thumbnail("a", 64)
    assert b"nobody's business" not in small
    with Image.open(BytesIO(small)) as image:
        assert image.format == "JPEG"
        assert image.size == (32, 64)
        assert not image.getexif()
    [cached] = (tmp_path / "shop" / "thumbnails").glob("*/*.jpg")
    assert cached.read_bytes()[:-32] == small == shop.thumbnail("a", 64)
    shutil.rmtree(tmp_path / "shop" / "thumbnails")
    assert shop.thumbnail("a", 64) == small
    with Image.open(BytesIO(shop.thumbnail("a", 1000))) as image:
        assert image.size == (100, 200)  # never enlarged
    with pytest.raises(ValueError, match="between 16 and"):
        shop.thumbnail("a", 5)


def test_a_picture_of_a_write_that_failed_is_swept_away(create, tmp_path, draw, monkeypatch):
    shop = create()
    vectors = unit(0, 2)
    shop.add([NewItem("a", vectors[0], image=jpeg(draw(1)))])
    orphan = tmp_path / "shop" / "images" / "ab" / ("ab" + "0" * 62)
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"from a write that was killed before its commit")
    monkeypatch.setattr(shop._catalog, "put", lambda changes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shop.add(
            [NewItem("b", vectors[1], image=jpeg(draw(2))), NewItem("c", vectors[1], image=jpeg(draw(1)))]
        )
    monkeypatch.undo()
    assert len(list((tmp_path / "shop" / "images").glob("*/*"))) == 2
    shop.build_index()
    assert [p.read_bytes() for p in (tmp_path / "shop" / "images").glob("*/*")] == [jpeg(draw(1))]


# Disk full


def test_a_full_disk_loses_nothing_and_the_collection_goes_on_when_there_is_room(tmp_path):
    script = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from dml.collection import NewItem, create_collection
from dml.errors import StorageError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
rows = np.eye(64, dtype=np.float32)
folder = Path(sys.argv[1])
shop = create_collection(folder, dim=64, fingerprint="f", index="flat")

def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

def refused(write):
    try:
        write()
    except StorageError as error:
        assert "could not be" in str(error), error
        return True
    return False

def add(n):
    shop.add([NewItem(f"i{n}-{m}", rows[m], {"text": "x" * 300}) for m in range(64)])

room(300_000)
kept = 0
while not refused(lambda: add(kept)):
    kept += 1
assert 0 < kept < 100, kept
assert len(shop) == 64 * kept
assert refused(lambda: shop.add([NewItem("picture", rows[0], image=b"y" * 400_000)]))
assert not list(folder.glob("images/*/*"))
room(20_000)
assert refused(lambda: shop.build_index())
assert len(shop.search(rows[:1], limit=1000)[0].hits) == min(1000, 64 * kept)
room(resource.RLIM_INFINITY)
add(kept)
shop.build_index()
assert shop.verify() == []
print(len(shop))
shop.close()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "shop")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with open_collection(tmp_path / "shop") as shop:
        assert len(shop) == int(done.stdout) >= 128
        assert shop.verify() == []
