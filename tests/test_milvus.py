"""What is special about collections in Milvus; what they share with others is in test_collection_contract."""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

from dml.collection import NewItem, create_collection, in_milvus, is_collection, open_collection
from dml.collection import milvus as milvus_module
from dml.collection import milvus_table as table_module
from dml.collection import move as move_module
from dml.collection.filters import parse_filter
from dml.collection.filters_milvus import LONGEST_FACT, bounds_of, facts_of
from dml.collection.milvus_create import attach_milvus, create_milvus, milvus_name
from dml.collection.milvus_table import MilvusTable, check_uri, in_order, messages
from dml.collection.move import move_collection
from dml.errors import (
    CollectionError,
    ConfigError,
    DamagedFile,
    ModelMismatch,
    NotAvailable,
    UnknownCollection,
    Unreachable,
    UsageError,
)

pytestmark = [
    pytest.mark.usefixtures("plain_faiss"),
    # The embedded engine leaves files to the garbage collector when several threads write.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DIM = 8
FINGERPRINT = "f" * 64


def unit(seed, count, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def created(path, **options):
    options = {"uri": str(path / "milvus.db"), "dim": DIM, "fingerprint": FINGERPRINT, **options}
    return create_milvus(path, **options)


def numbered(count, seed=0):
    return [NewItem(f"i{n:04d}", v, {"n": n, "odd": bool(n % 2)}) for n, v in enumerate(unit(seed, count))]


@pytest.fixture
def things(tmp_path):
    with created(tmp_path / "things") as collection:
        yield collection


# Facts


def facts(payload):
    return facts_of(payload, "x").facts


def test_facts_say_what_is_where():
    assert facts({"label": "boot", "n": 2, "on": True, "none": None}) == [
        "label?", 'label="boot"', "n?", "n=2", "n#", "on?", "on=true", "none=null",
    ]  # fmt: skip
    assert set(facts({"tags": ["a", "a"]})) == {"tags?", 'tags="a"', "tags[]?", 'tags[]="a"'}
    assert {"tags+", "tags[]+"} <= set(facts({"tags": ["a", "b"]}))
    assert "tags+" not in facts({"tags": [1, 1.0]})  # the same number
    assert {"shop{", "shop.city?", '"a.b".c?'} <= set(facts({"shop": {"city": "Bern"}, "a.b": {"c": 1}}))
    assert facts({"made": "2024-05-01"}) == ["made?", 'made="2024-05-01"', "made@"]
    assert facts({'quote"d': 1, "": 2}) == facts({"": 2})  # the first cannot be asked for
    long = facts({"text": "x" * 1000})
    assert long[0] == "text?"
    assert len(long[1]) == 65


def test_facts_have_bounds():
    assert max(map(len, facts({"x": ["y" * n for n in range(600)]}))) <= LONGEST_FACT
    with pytest.raises(UsageError, match=r'item "x" says .* Milvus'):
        facts({"list": list(range(5000))})
    assert facts({"deep": json.loads("[" * 40 + "1" + "]" * 40)})


def test_an_expression_is_exact_wherever_it_can_be():
    for tree in (
        {"must": [{"key": "a", "match": {"any": ["x", 1, True]}}, {"key": "n", "range": {"gte": 3}}]},
        {"must_not": [{"key": "a[].b", "match": {"value": 'x"] or'}}], "should": [{"is_null": {"key": "b"}}]},
        {"must": [{"key": "a", "match": {"except": ["x"]}}, {"has_id": ["a", "b"]}]},
    ):  # fmt: skip
        assert bounds_of(parse_filter(tree)).exact, tree
    for tree in (
        {"must": [{"key": "n", "range": {"gte": 3, "lt": 5}}]},
        {"must": [{"key": "a[0]", "match": {"value": 1}}]},
        {"must": [{"key": "a", "match": {"except": ["x", "y"]}}]},
        {"must": [{"key": "n", "range": {"gt": 2**60}}]},
    ):
        assert not bounds_of(parse_filter(tree)).exact, tree


def test_nothing_of_a_value_stands_outside_its_quotes():
    hostile = 'x"] ) or id != "" or (id in ["\\'
    expression = bounds_of(parse_filter({"must": [{"key": "a", "match": {"value": hostile}}]})).over
    inside = expression.removeprefix('(array_contains_any(facts, ["').removesuffix('"]))')
    escaped = inside.replace("\\\\", "").replace('\\"', "")
    assert '"' not in escaped
    assert "\\" not in escaped


# Addresses, names and what is written down


def test_an_address_may_not_hold_a_password(tmp_path):
    for uri in ("http://root:secret@localhost:19530", "https://token@host"):
        with pytest.raises(UsageError, match="DML_MILVUS_TOKEN") as caught:
            created(tmp_path / "a", uri=uri)
        assert "secret" not in str(caught.value)
    for uri in ("localhost:19530", "http://", "ftp://host", "file.sqlite"):
        with pytest.raises(UsageError, match="no address of Milvus"):
            check_uri(uri)
    assert check_uri("http://localhost:19530") == "http://localhost:19530"
    assert not (tmp_path / "a").exists()


def test_the_folder_says_where_the_collection_is(things, monkeypatch):
    monkeypatch.setenv("DML_MILVUS_TOKEN", "root:verysecret")
    things.add(numbered(3))
    things.set_root("files", things.path)
    tree = json.loads((things.path / "manifest.json").read_text())
    assert tree["backend"] == {
        "kind": "milvus", "uri": "milvus.db", "collection": "things", "consistency": "Strong",
    }  # fmt: skip
    assert "verysecret" not in (things.path / "manifest.json").read_text()
    assert is_collection(things.path)
    assert in_milvus(things.path)


def test_a_folder_with_its_file_can_be_moved(tmp_path):
    with created(tmp_path / "one") as collection:
        collection.add(numbered(3))
    (tmp_path / "one").rename(tmp_path / "two")
    with open_collection(tmp_path / "two") as collection:
        assert len(collection) == 3


def test_names_are_made_for_milvus():
    assert [milvus_name(n) for n in ("shoes.collection", "red shoes", "2024", "Übung", "")] == [
        "shoes", "red_shoes", "c_2024", "bung", "c",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["1abc", "a-b", "", "a" * 256])
def test_a_name_that_milvus_does_not_take_is_refused(tmp_path, name):
    with pytest.raises(UsageError):
        created(tmp_path / "a", name=name or " ", collection=name or " ")


def test_another_folder_can_describe_the_same_collection(things, tmp_path):
    things.add(numbered(5))
    uri = things.place.uri
    with attach_milvus(tmp_path / "again", uri=uri, collection="things") as again:
        assert (len(again), again.fingerprint, again.dim, again.name) == (5, FINGERPRINT, DIM, "things")
        again.delete(["i0001"])
    assert len(things) == 4
    with pytest.raises(UnknownCollection, match="nowhere"):
        attach_milvus(tmp_path / "other", uri=uri, collection="nowhere")
    assert not (tmp_path / "other").exists()
    with pytest.raises(CollectionError, match="attach"):
        created(tmp_path / "third", uri=uri, collection="things")
    assert not (tmp_path / "third").exists()


def test_what_milvus_says_must_fit_the_manifest(things, tmp_path):
    path = things.path
    manifest = things.manifest
    things._save_manifest(manifest.with_(fingerprint="0" * 64))
    with pytest.raises(ModelMismatch, match="cannot be compared"):
        open_collection(path)
    things._save_manifest(manifest.with_(dim=9))
    with pytest.raises(CollectionError, match="8 numbers"):
        open_collection(path)
    things._save_manifest(manifest.with_(backend={"kind": "milvus"}))
    with pytest.raises(DamagedFile, match="does not say where"):
        open_collection(path)
    things._save_manifest(manifest)
    newer = {"format": 99, "dim": DIM, "fingerprint": FINGERPRINT}
    things._table._client.alter_collection_properties("things", {"dml": json.dumps(newer)})
    with pytest.raises(DamagedFile, match="update dml"):
        open_collection(path)
    things._table.drop()
    with pytest.raises(UnknownCollection, match="not there"):
        open_collection(path)


def test_a_collection_of_others_is_not_taken_for_ours(things, tmp_path):
    client = things._table._client
    client.create_collection("foreign", dimension=DIM)
    with pytest.raises(CollectionError, match="not made by dml"):
        attach_milvus(tmp_path / "foreign", uri=things.place.uri, collection="foreign")


# Servers that do not answer, files that are open


def test_a_server_that_does_not_answer_is_named(tmp_path):
    with pytest.raises(Unreachable, match="http://127.0.0.1:1 does not answer"):
        created(tmp_path / "a", uri="http://127.0.0.1:1")
    assert not (tmp_path / "a").exists()


def test_the_command_shows_no_traceback(tmp_path):
    command = [sys.executable, "-m", "dml", "index"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    create_collection(tmp_path / "a", dim=DIM, fingerprint=FINGERPRINT).close()
    move = [*command, "move", str(tmp_path / "a"), str(tmp_path / "b"), "--uri", "http://127.0.0.1:1"]
    done = subprocess.run(move, capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "does not answer" in done.stderr


def test_a_second_process_is_told_why_the_file_cannot_be_opened(things):
    code = f"from dml.collection import open_collection; open_collection({str(things.path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another process has it open" in done.stderr.splitlines()[-1]


def test_the_file_is_free_after_the_last_collection_is_closed(tmp_path):
    created(tmp_path / "a").close()
    code = f"from dml.collection import open_collection; print(len(open_collection({str(tmp_path / 'a')!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "0", done.stderr


# Indexes


def test_milvus_lite_has_the_indexes_that_it_has(things):
    things.add(numbered(40))
    for kind in ("hnsw", "hnsw_sq8", "ivf", "ivf_sq8", "flat"):
        options = {"cells": 4} if kind.startswith("ivf") else {}
        assert things.build_index(kind, options=options)["kind"] == kind
        assert things.info().index["kind"] == kind
        [result] = things.search(unit(0, 1), limit=3, effort=64)
        assert result.hits[0].id == "i0000"
        assert result.approximate == (kind != "flat")
    for kind in ("ivf_pq", "diskann"):
        with pytest.raises(NotAvailable, match="Milvus Lite"):
            things.build_index(kind)
    for kind, options in (
        ("nsg", {}),
        ("hnsw", {"cells": 4}),
        ("hnsw", {"links": 0}),
        ("auto", {"links": 4}),
    ):
        with pytest.raises(ConfigError):
            things.build_index(kind, options=options)
    assert things.info().index["kind"] == "flat"


def test_the_recall_of_an_approximate_index_is_measured(things):
    things.add(numbered(60))
    measured = things.build_index("ivf", options={"cells": 8})["measured"]
    assert measured["queries"] == 60
    assert things.info().measured_recall == measured["recall_at_10"]
    assert 0.5 <= measured["recall_at_10"] <= 1
    assert things.build_index("hnsw")["measured"] is None  # nobody knows the truth any more


def test_the_sizes_on_paper_are_those_of_the_indexes():
    pytest.importorskip("faiss")
    names, text = {}, (Path(__file__).parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(block, "docs/scale.md", "exec"), names)
    for (kind, precision), size in names["measured"].items():
        row, *_ = re.findall(rf"^\| `{kind}`, {precision} \| .*$", text, flags=re.MULTILINE)
        assert size == pytest.approx(float(row.split("|")[4]), rel=0.01)


# Batches


def test_a_batch_is_cut_into_messages_that_milvus_takes(things, monkeypatch):
    monkeypatch.setattr(table_module, "MESSAGE_BYTES", 2000)
    monkeypatch.setattr(table_module, "MOST_ROWS", 7)
    monkeypatch.setattr(table_module, "PAGE_ROWS", 10)
    rows = [things._row(item.id, item.vector, item.payload, None) for item in numbered(50)]
    parts = list(messages(rows))
    assert [row for part in parts for row in part] == rows
    assert max(map(len, parts)) <= 7
    assert all(sum(map(table_module.weight_of, part)) <= 2000 for part in parts)
    assert sum(things.add(numbered(50))) == 50
    assert len(things) == 50
    assert things.count({"must": [{"key": "odd", "match": {"value": True}}]}) == 25
    assert things.delete_matching({"must": [{"key": "n", "range": {"gte": 10, "lt": 45}}]}) == 35
    assert len(things.get([f"i{n:04d}" for n in range(10)])) == 10


def test_a_payload_that_milvus_would_not_take_is_refused_before_anything_is_written(things):
    good, bad, kept = numbered(3)
    things.add([NewItem("kept", kept.vector)])
    for payload, reason in (
        ({"x": "y" * 70_000}, "bytes"),
        ({"x": 2**70}, "64 bits"),
        ({"x": [{"y": -(2**64)}]}, "64 bits"),
        ({"x": "\ud800"}, "surrogate"),
    ):
        with pytest.raises(UsageError, match=reason):
            things.add([good, NewItem("bad", bad.vector, payload)])
        with pytest.raises(UsageError):
            things.update_payload("kept", payload)
    assert [item.id for item in things.scroll()[0]] == ["kept"]


def test_pictures_are_not_stored(things):
    [item] = numbered(1)
    with pytest.raises(NotAvailable, match="by its path"):
        things.add([NewItem("a", item.vector, image=b"bytes")])


def test_more_results_than_milvus_returns_are_refused(things):
    with pytest.raises(UsageError, match="16,384"):
        things.search(unit(0, 1), limit=16_000, offset=1000)


def test_a_search_looks_on_until_enough_pass(things):
    """Most of what the expression lets through does not pass: the range is inside the list's two ends."""
    vectors = unit(5, 300)
    things.add([NewItem(f"i{n:03d}", v, {"at": [0, 9] if n % 10 else [5]}) for n, v in enumerate(vectors)])
    inside = {"must": [{"key": "at", "range": {"gt": 4, "lt": 6}}]}
    assert not bounds_of(parse_filter(inside)).exact
    [result] = things.search(vectors[:1], limit=12, filter=inside)
    expected = sorted(range(0, 300, 10), key=lambda n: -float(vectors[n] @ vectors[0]))[:12]
    assert [hit.id for hit in result.hits] == [f"i{n:03d}" for n in expected]
    assert things.count(inside) == 30
    assert not result.approximate


def test_nearly_equal_scores_are_in_the_order_of_ids():
    hits = [(0.5, {"id": "c"}), (0.5 + 6e-8, {"id": "b"}), (0.4, {"id": "a"}), (0.5 - 6e-8, {"id": "0"})]
    assert [row["id"] for _, row in in_order(hits)] == ["0", "b", "c", "a"]
    assert len({score for score, _ in in_order(hits)}) == 2


def test_writes_at_once_from_several_threads(things):
    def write(start):
        for n in range(start, start + 5):
            things.add([NewItem(f"t{n}", unit(n, 1)[0])])

    threads = [threading.Thread(target=write, args=(10 * k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(things) == 20
    assert len({item.sequence for item in things.scroll()[0]}) == 20


# Moving


@pytest.fixture
def source(tmp_path, draw):
    """A local collection: some pictures referred to, some stored, some items without."""
    (tmp_path / "pictures").mkdir()
    with create_collection(
        tmp_path / "source", dim=DIM, fingerprint=FINGERPRINT, roots={"files": tmp_path / "pictures"}
    ) as collection:
        draw(1).save(tmp_path / "pictures" / "a.png")
        vectors = unit(6, 53)
        collection.add([NewItem(f"i{n:02d}", vectors[n], {"n": n}) for n in range(50)])
        collection.add([NewItem("file", vectors[50], file=tmp_path / "pictures" / "a.png")])
        collection.add([NewItem("one", vectors[51], image=b"1"), NewItem("same", vectors[52], image=b"1")])
    return tmp_path / "source"


def contents(path):
    with open_collection(path, read_only=True) as collection:
        items, _ = collection.scroll(limit=1000, with_vector=True)
        return {
            item.id: (item.payload, item.vector.tobytes(), item.picture and collection.picture(item.id))
            for item in items
        }


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(move_module, "BATCH", 10)


def test_a_collection_moves_into_milvus_and_back(source, tmp_path, small_batches):
    moved = move_collection(source, tmp_path / "lite", uri=str(tmp_path / "lite" / "milvus.db"))
    assert (moved.items, moved.resumed, moved.compared, moved.exact, moved.overlap) == (53, 0, 53, True, 1.0)
    assert in_milvus(tmp_path / "lite")
    assert contents(tmp_path / "lite") == contents(source)
    move_collection(tmp_path / "lite", tmp_path / "back")
    assert not in_milvus(tmp_path / "back")
    assert contents(tmp_path / "back") == contents(source)
    move_collection(source, tmp_path / "copy", index="flat")
    assert contents(tmp_path / "copy") == contents(source)
    with open_collection(tmp_path / "copy", read_only=True) as copy:
        kinds = {item.id: item.picture.kind for item in copy.scroll(limit=1000)[0] if item.picture}
    assert kinds == {"file": "referenced", "one": "stored", "same": "stored"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "copy", "lite", "pictures", "source"]


@pytest.mark.parametrize("uri", [None, "milvus.db"])
def test_an_interrupted_move_goes_on(source, tmp_path, small_batches, uri):
    where = None if uri is None else str(tmp_path / "target" / uri)

    def stop(done, total, bad):
        if done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move_collection(source, tmp_path / "target", uri=where, progress=stop)
    assert not (tmp_path / "target").exists()
    moved = move_collection(source, tmp_path / "target", uri=where)
    assert (moved.items, moved.resumed) == (53, 30)
    assert contents(tmp_path / "target") == contents(source)


KILLED = """
import os, sys
from dml.collection import move
move.BATCH = 10
def stop(done, total, bad):
    if done >= 20:
        os.kill(os.getpid(), 9)
move.move_collection(sys.argv[1], sys.argv[2], uri=sys.argv[3], progress=stop)
"""


def test_a_killed_move_goes_on(source, tmp_path):
    arguments = [str(source), str(tmp_path / "target"), str(tmp_path / "target" / "milvus.db")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -9
    moved = move_collection(source, tmp_path / "target", uri=arguments[2])
    assert (moved.items, moved.resumed) == (53, 20)
    assert contents(tmp_path / "target") == contents(source)


def test_a_move_to_something_else_is_refused(source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(CollectionError, match="not empty"):
        move_collection(source, tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"
    with pytest.raises(UnknownCollection):
        move_collection(tmp_path / "nothing", tmp_path / "target")

    def stop(done, total, bad):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        move_collection(source, tmp_path / "target", progress=stop)
    create_collection(tmp_path / "other", dim=DIM, fingerprint=FINGERPRINT).close()
    with pytest.raises(CollectionError, match="interrupted move of"):
        move_collection(tmp_path / "other", tmp_path / "target")
    with pytest.raises(CollectionError, match="another backend"):
        move_collection(source, tmp_path / "target", uri=str(tmp_path / "x.db"))
    (tmp_path / ".target.moving" / "move.json").write_text("{")
    with pytest.raises(DamagedFile, match="begin anew"):
        move_collection(source, tmp_path / "target")


def test_a_copy_that_is_not_the_same_is_not_put_into_place(source, tmp_path, small_batches):
    def meddle(done, total, bad):
        if done == 53:
            with open_collection(source) as collection:
                collection.delete(["i07"])

    with pytest.raises(CollectionError, match="52 items and the copy 53"):
        move_collection(source, tmp_path / "target", progress=meddle)
    assert not (tmp_path / "target").exists()

    def change(done, total, bad):
        if done == 52:
            with open_collection(source) as collection:
                collection.add([NewItem("i08", unit(99, 1)[0])])

    with pytest.raises(CollectionError, match="neighbours of item"):
        move_collection(source, tmp_path / "second", progress=change)
    assert not (tmp_path / "second").exists()


def test_an_approximate_source_gives_an_overlap(tmp_path, small_batches):
    with created(tmp_path / "lite") as collection:
        collection.add(numbered(60))
        collection.build_index("ivf", options={"cells": 8})
    moved = move_collection(tmp_path / "lite", tmp_path / "local", sample=20)
    assert (moved.compared, moved.exact) == (20, False)
    assert 0.3 <= moved.overlap <= 1


# Commands and the service


def test_commands_build_search_and_sync_it(tiny_folder, tiny_encoder, tmp_path, capsys):
    from dml.cli import main

    out, uri = tmp_path / "shop", str(tmp_path / "shop" / "milvus.db")

    def dml(*arguments):
        sys.argv = ["dml", *map(str, arguments)]
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert not ended.value.code, capsys.readouterr().err
        return capsys.readouterr().out

    before = sys.argv
    try:
        build = ("index", "build", tiny_folder, "--encoder", tiny_encoder, "--out", out, "--json")
        made = json.loads(dml(*build, "--backend", "milvus", "--uri", uri))
        assert (made["added"], made["index"]["kind"]) == (48, "flat")
        again = json.loads(dml(*build, "--backend", "milvus", "--uri", uri))
        assert again["added"] == 0
        found = json.loads(dml("search", out, tiny_folder / "class_1" / "3.jpg", "-k", 3, "--json"))
        assert found["hits"][0]["id"] == "class_1/3.jpg"
        dml("index", "remove", out, "class_1/3.jpg")
        dml("index", "sync", out)
        info = json.loads(dml("index", "info", out, "--json"))
        assert (info["count"], info["index"]["backend"]) == (48, "milvus")
        dml("index", "rebuild", out, "--index", "hnsw")
        assert "copied" in dml("index", "move", out, tmp_path / "local")
        dml(
            "index",
            "attach",
            tmp_path / "again",
            "--uri",
            uri,
            "--collection",
            "shop",
            "--encoder",
            tiny_encoder,
        )
        found = json.loads(dml("search", tmp_path / "again", tiny_folder / "class_1" / "3.jpg", "--json"))
        assert found["hits"][0]["id"] == "class_1/3.jpg"
    finally:
        sys.argv = before


@pytest.mark.parametrize("wrong", [("--backend", "milvus"), ("--uri", "x.db"), ("--backend", "qdrant")])
def test_a_backend_needs_an_address(wrong, tiny_folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "dml",
        "index",
        "build",
        str(tiny_folder),
        "--out",
        str(tmp_path / "x"),
        *wrong,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--backend" in done.stderr


def test_the_service_serves_it(tiny_folder, tiny_encoder, tmp_path):
    pytest.importorskip("fastapi")
    from dml.collection.build import build_collection
    from dml.encoder import Encoder
    from service.engine import Engine, Query, Search

    out, uri = tmp_path / "shop", str(tmp_path / "shop" / "milvus.db")
    build_collection(tiny_folder, out, encoder=Encoder.load(tiny_encoder), uri=uri)
    engine = Engine.open([out])
    try:
        image = (tiny_folder / "class_2" / "1.jpg").read_bytes()
        answer = engine.search("shop", Search(Query(image=image), limit=3))
        assert answer.hits[0].id == "class_2/1.jpg"
        written = engine.put("shop", "new", vector=[1.0] * 16, payload={"label": "new"})
        assert written.created
        assert engine.get("shop", "new").payload == {"label": "new"}
        with pytest.raises(NotAvailable, match="stored"):
            engine.put("shop", "picture", image=image)
        assert engine.picture("shop", "class_2/1.jpg") == image
        assert engine.thumbnail("shop", "class_2/1.jpg")[:2] == b"\xff\xd8"
    finally:
        engine.close()


def test_a_search_that_a_write_overtakes_is_tried_again(things, monkeypatch):
    things.add(numbered(3))
    real, failures = things._table._client.search, [1, 2]

    def overtaken(*args, **kwargs):
        if failures:
            from pymilvus.exceptions import MilvusException

            failures.pop()
            raise MilvusException(code=65535, message="incomplete query result, missing id i2")
        return real(*args, **kwargs)

    monkeypatch.setattr(things._table._client, "search", overtaken)
    assert len(things.search(unit(0, 1), limit=3)[0].hits) == 3
    assert not failures


def test_a_table_that_is_not_there(tmp_path):
    table = MilvusTable(str(tmp_path / "x.db"), "nothing")
    assert not table.exists()
    with pytest.raises(CollectionError, match="refuses"):
        table.count('id != ""')
    table.close()
    with pytest.raises(UsageError, match="no folder"):
        MilvusTable(str(tmp_path / "no" / "x.db"), "nothing")
    with pytest.raises(ConfigError):
        MilvusTable(str(tmp_path / "x.db"), "nothing", consistency="strong")
    assert milvus_module.FORMAT == 1
