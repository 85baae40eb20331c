"""What every collection promises, whoever keeps it: local files, Milvus Lite, or a Milvus server.

The server's part runs where DML_TEST_MILVUS_URI says where one is. What an implementation does not name among
its capabilities, it refuses; it never answers approximately instead.
"""

import os
import random
import threading
import uuid
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from dml.collection import NewItem, create_collection, is_collection, open_collection
from dml.collection.base import PayloadTooLarge
from dml.collection.filters import matches, parse_filter
from dml.errors import (
    DimensionMismatch,
    FilterInvalid,
    ImageNotKept,
    ModelMismatch,
    NotAvailable,
    ReadOnly,
    UnknownItem,
    UsageError,
    VectorError,
)

# Milvus's embedded engine leaves files to the garbage collector when several threads write.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DIM = 8
FINGERPRINT = "f" * 64
SERVER = os.environ.get("DML_TEST_MILVUS_URI", "")
TOLERANCE = 1e-6  # of scores


def unit(seed, count, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@dataclass
class Kept:
    """Where the collection of a test is kept, and how it is made and opened."""

    backend: str
    path: Path
    name: str = field(default_factory=lambda: f"contract_{uuid.uuid4().hex[:12]}")
    opened: list = field(default_factory=list)

    def create(self, **options):
        if self.backend == "local":
            made = create_collection(self.path, dim=DIM, fingerprint=FINGERPRINT, **options)
        else:
            from dml.collection.milvus_create import create_milvus

            uri = SERVER if self.backend == "milvus server" else str(self.path / "milvus.db")
            made = create_milvus(
                self.path, dim=DIM, fingerprint=FINGERPRINT, uri=uri, collection=self.name, **options
            )
        self.opened.append(made)
        return made

    def open(self, **options):
        self.close()
        self.opened.append(open_collection(self.path, **options))
        return self.opened[-1]

    def close(self):
        for collection in self.opened:
            collection.close()
        self.opened.clear()

    def remove(self):
        self.close()
        if self.backend == "milvus server":
            from dml.collection.milvus_table import MilvusTable

            table = MilvusTable(SERVER, self.name)
            if table.exists():
                table.drop()
            table.close()


@pytest.fixture(params=["local", "milvus lite", "milvus server"])
def kept(request, tmp_path):
    if request.param != "local":
        pytest.importorskip("pymilvus")
    if request.param == "milvus lite":
        pytest.importorskip("milvus_lite")
        request.getfixturevalue("plain_faiss")
    if request.param == "milvus server" and not SERVER:
        pytest.skip("DML_TEST_MILVUS_URI is not set, so there is no server to ask")
    place = Kept(request.param, tmp_path / "things")
    yield place
    place.remove()


@pytest.fixture
def collection(kept):
    return kept.create()


@pytest.fixture
def few(kept, scale):
    """Rounds of random work: less where every call crosses a network."""
    return scale * (4 if kept.backend == "milvus server" else 15)


def needs(collection, capability):
    if capability not in collection.capabilities():
        pytest.skip(f"{type(collection).__name__} does not have {capability}")


class Model:
    """What a collection should hold, and what it should answer, by definition."""

    def __init__(self):
        self.vectors, self.payloads = {}, {}

    def put(self, id, vector, payload):
        self.vectors[id], self.payloads[id] = vector, payload

    def drop(self, id):
        self.vectors.pop(id, None)
        self.payloads.pop(id, None)

    def passing(self, filter=None):
        tree = parse_filter(filter)
        return sorted(id for id in self.vectors if matches(tree, self.payloads[id], id))

    def ranked(self, query, filter=None, *, threshold=-2.0, exclude=()):
        scores = {id: float(self.vectors[id] @ query) for id in self.passing(filter) if id not in exclude}
        return sorted((id for id in scores if scores[id] >= threshold), key=lambda id: -scores[id])


def payload(n):
    if not n % 11:
        return {"n": n}
    return {
        "colour": ("red", "green", "blue")[n % 3],
        "n": n,
        "price": n / 8,
        "tags": [f"t{n % 5}", f"t{n % 7}"],
        "sizes": [n % 4, n % 9 + 0.5],
        "shop": {"open": n % 2 == 0, "city": "Zürich" if n % 4 else None},
        "made": f"2024-{n % 12 + 1:02d}-01",
    }


def filled(collection, count=60):
    """Items in the collection and in a model of it."""
    model, vectors = Model(), unit(1, count)
    collection.add([NewItem(f"i{n}", vectors[n], payload(n)) for n in range(count)])
    for n in range(count):
        model.put(f"i{n}", vectors[n], payload(n))
    return model


def ids_of(result):
    return [hit.id for hit in result.hits]


def all_ids(collection, **options):
    """Ids of a whole scroll, page by page."""
    ids, after = [], None
    while True:
        items, after = collection.scroll(after=after, **{"limit": 7, **options})
        ids += [item.id for item in items]
        if after is None:
            return ids
        assert after == ids[-1]


# Writing and reading


def test_random_writes_are_found_as_a_model_says(kept, few):
    collection, model, chance = kept.create(), Model(), random.Random(7)
    for turn in range(few):
        ids = [f"i{chance.randrange(30)}" for _ in range(chance.randrange(1, 12))]
        if chance.random() < 0.7:
            rows = unit([turn, 1], len(ids))
            expected = []
            for id, row in zip(ids, rows, strict=True):
                expected.append(id not in model.vectors)
                model.put(id, row, {"turn": turn})
            made = [NewItem(id, row, {"turn": turn}) for id, row in zip(ids, rows, strict=True)]
            assert collection.add(made) == expected
        else:
            assert collection.delete(ids) == len(set(ids) & set(model.vectors))
            for id in ids:
                model.drop(id)
        assert len(collection) == collection.count() == len(model.vectors)
        [query] = unit([turn, 2], 1)
        [result] = collection.search(query[None], limit=5)
        assert ids_of(result) == model.ranked(query)[:5]
        assert not result.approximate
    assert all_ids(collection) == sorted(model.vectors)


def test_a_search_gives_scores_ranks_and_items(collection):
    model = filled(collection)
    queries = unit(2, 3)
    for query, result in zip(queries, collection.search(queries, limit=10, with_vector=True), strict=True):
        best = model.ranked(query)[:10]
        assert ids_of(result) == best
        assert [hit.rank for hit in result.hits] == list(range(1, 11))
        for hit in result.hits:
            assert hit.score == pytest.approx(float(model.vectors[hit.id] @ query), abs=TOLERANCE)
            assert hit.item.payload == model.payloads[hit.id]
            np.testing.assert_array_equal(hit.item.vector, model.vectors[hit.id])
    assert collection.search(queries[:1], limit=1)[0].hits[0].item.vector is None


def test_offset_threshold_and_exclusions(collection):
    model = filled(collection)
    [query] = unit(3, 1)
    best = model.ranked(query)
    assert ids_of(collection.search(query[None], limit=5, offset=3)[0]) == best[3:8]
    assert [hit.rank for hit in collection.search(query[None], limit=5, offset=3)[0].hits] == [4, 5, 6, 7, 8]
    assert ids_of(collection.search(query[None], limit=5, exclude=[best[0], best[2], "nobody"])[0]) == [
        id for id in best[:7] if id not in (best[0], best[2])
    ]
    [result] = collection.search(query[None], limit=1000, score_threshold=0.2)
    assert ids_of(result) == model.ranked(query, threshold=0.2)
    assert (result.total, result.total_is_exact) == (len(result.hits), True)
    [result] = collection.search(query[None], limit=2, score_threshold=0.2)
    assert ids_of(result) == best[:2]
    assert not result.total_is_exact or result.total == len(model.ranked(query, threshold=0.2))
    assert collection.search(query[None], limit=5, offset=60)[0].hits == []
    assert collection.search(query[None], limit=5, score_threshold=1.0)[0].hits == []


def test_equal_items_come_in_the_order_of_their_ids(collection):
    [vector, query] = unit(4, 2)
    collection.add([NewItem(id, vector) for id in "abcdefg"])
    first = ids_of(collection.search(query[None], limit=7)[0])
    assert first == list("abcdefg")
    assert ids_of(collection.search(query[None], limit=7)[0]) == first


def test_an_empty_collection_answers(collection):
    [query] = unit(5, 1)
    [result] = collection.search(query[None], limit=3, filter={"must": [{"has_id": ["x"]}]})
    assert (result.hits, result.total, result.total_is_exact) == ([], 0, True)
    assert (len(collection), collection.count(), collection.scroll()) == (0, 0, ([], None))
    assert collection.add([]) == []
    assert collection.delete(["x"]) == 0
    assert collection.find(["x"]) == {}


def test_items_come_back_in_the_order_asked_for(collection):
    model = filled(collection, 5)
    items = collection.get(["i3", "i1", "i3"], with_vector=True)
    assert [item.id for item in items] == ["i3", "i1", "i3"]
    np.testing.assert_array_equal(items[1].vector, model.vectors["i1"])
    assert collection.get(["i3"])[0].vector is None
    assert set(collection.find(["i1", "nobody"])) == {"i1"}
    for ids in (["nobody"], ["i1", "nobody", "no one"], ["a\nb"], ["x" * 3000]):
        with pytest.raises(UnknownItem):
            collection.get(ids)


def test_the_number_of_a_change_grows(collection):
    [vector] = unit(6, 1)
    numbers = []
    for turn in range(4):
        collection.add([NewItem("a", vector, {"turn": turn})])
        numbers.append(collection.get(["a"])[0].sequence)
    numbers.append(collection.update_payload("a", {"turn": 9}).sequence)
    assert numbers == sorted(set(numbers))
    assert collection.get(["a"])[0].sequence == numbers[-1]
    assert collection.search(vector[None], limit=1)[0].generation >= numbers[-1]


def test_of_two_of_one_id_the_last_counts(collection):
    one, two = unit(7, 2)
    assert collection.add([NewItem("a", one, {"n": 1}), NewItem("a", two, {"n": 2})]) == [True, False]
    assert len(collection) == 1
    assert collection.get(["a"])[0].payload == {"n": 2}
    [hit] = collection.search(two[None], limit=5)[0].hits
    assert hit.score == pytest.approx(1, abs=TOLERANCE)


# Ids, vectors, payloads


IDS = [
    "plain",
    "x" * 512,
    "é" * 512,
    "😀" * 512,
    "a/b c.jpg#2",
    "quote\"'`",
    "back\\slash\\",
    "{brace} %s $1 :f0",
    'x"] or id != "',
    "line\u2028separator",
    "delete\x7f",
    "עברית العربية",
    "e\u0301 is not é",
    "é is not e\u0301",
    "中文",
    " leading and trailing ",
    "-1",
    "null",
]


def test_any_text_is_an_id(collection):
    vectors = unit(8, len(IDS))
    items = [NewItem(id, vector, {"of": id}) for id, vector in zip(IDS, vectors, strict=True)]
    assert all(collection.add(items))
    assert all_ids(collection, limit=4) == sorted(IDS)
    for id, vector in zip(IDS, vectors, strict=True):
        assert collection.get([id])[0].payload == {"of": id}
        assert collection.search(vector[None], limit=1)[0].hits[0].id == id
        assert collection.search(vector[None], limit=1, exclude=[id])[0].hits[0].id != id
    has_id = {"must": [{"has_id": [*IDS[:9], "nobody", "a\tb", ""]}]}
    assert all_ids(collection, filter=has_id) == sorted(IDS[:9])
    assert collection.delete(IDS[9:]) == len(IDS) - 9
    assert all_ids(collection) == sorted(IDS[:9])


@pytest.mark.parametrize("id", ["", "x" * 513, "a\nb", "a\0b", "\ud800", 7, None])
def test_what_is_no_id_is_refused(collection, id):
    [vector] = unit(9, 1)
    with pytest.raises(UsageError, match="id"):
        collection.add([NewItem("good", vector), NewItem(id, vector)])
    assert len(collection) == 0


def test_vectors_that_do_not_fit_are_refused_before_anything_is_written(collection):
    good = unit(10, 1)[0]
    wrong = {
        DimensionMismatch: unit(10, 1, DIM + 1)[0],
        VectorError: np.full(DIM, np.nan, np.float32),
    }
    for error, vector in [*wrong.items(), (VectorError, 2 * good), (VectorError, np.zeros(DIM, np.float32))]:
        with pytest.raises(error):
            collection.add([NewItem("a", good), NewItem("b", vector)])
        with pytest.raises(error):
            collection.search(vector[None], limit=1)
    assert len(collection) == 0
    for wrong in ({"limit": 0}, {"offset": -1}, {"effort": 0}):
        with pytest.raises(UsageError):
            collection.search(good[None], **wrong)
    with pytest.raises(UsageError):
        collection.scroll(limit=0)


PAYLOADS = [
    {},
    {"": "empty key", " ": [], "[]": {}, "a.b": {"c": {"d": [[1, [2]], {}]}}},
    {"text": "quotes \" ' ` and \\ and \n\t\r and \u2028 and \x00 and 😀"},
    {"key \" with ' all \\ of \n it 😀": 1},
    {"numbers": [0, -1, 2**53 + 1, 2**63 - 1, -(2**63), 0.1, -0.0, 1e300, 5e-324, 1.0]},
    {"flags": [True, False, None], "null": None},
    {"list": list(range(300))},
    {"long": "x" * 30_000},
    {"$field": "x", "id": 1, "vector": 2, "payload": 3},
]


def test_payloads_come_back_as_they_were(collection):
    vectors = unit(11, len(PAYLOADS))
    ids = [f"p{n}" for n in range(len(PAYLOADS))]
    collection.add([NewItem(id, vectors[n], PAYLOADS[n]) for n, id in enumerate(ids)])
    for item, tree in zip(collection.get(ids), PAYLOADS, strict=True):
        assert item.payload == tree
        assert repr(item.payload) == repr(tree)  # 1.0 stays a float, and members keep their order
    for tree in ({"x": float("nan")}, {"x": {1, 2}}, {"x": b"bytes"}):
        with pytest.raises(UsageError):
            collection.add([NewItem("bad", vectors[0], tree)])
    assert len(collection) == len(PAYLOADS)


def test_payloads_are_merged(collection):
    [vector] = unit(12, 1)
    collection.add([NewItem("a", vector, {"keep": 1, "drop": 2, "deep": {"x": 1}})])
    item = collection.update_payload("a", {"drop": None, "new": [1], "deep": {"y": 2}})
    assert item.payload == {"keep": 1, "deep": {"y": 2}, "new": [1]}
    [found] = collection.get(["a"], with_vector=True)
    assert (found.payload, found.sequence) == (item.payload, item.sequence)
    np.testing.assert_array_equal(found.vector, vector)
    assert collection.count({"must": [{"key": "drop", "match": {"value": 2}}]}) == 0
    assert collection.count({"must": [{"key": "new", "match": {"value": 1}}]}) == 1
    with pytest.raises(PayloadTooLarge):
        collection.update_payload("a", {"new": "x" * 100}, max_bytes=50)
    assert collection.update_payload("a", {"new": None}, max_bytes=1).payload == {"keep": 1, "deep": {"y": 2}}
    with pytest.raises(UnknownItem):
        collection.update_payload("nobody", {})


def test_changes_of_several_threads_at_once_are_all_there(collection):
    [vector] = unit(13, 1)
    collection.add([NewItem("a", vector)])
    threads = [
        threading.Thread(target=collection.update_payload, args=("a", {f"from {n}": n})) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert collection.get(["a"])[0].payload == {f"from {n}": n for n in range(6)}


# Filters


FILTERS = [
    {"must": [{"key": "colour", "match": {"value": "red"}}]},
    {"must_not": [{"key": "colour", "match": {"value": "red"}}]},
    {"should": [{"key": "tags", "match": {"any": ["t1", "t6"]}}, {"key": "n", "range": {"lt": 20}}]},
    {"must": [{"key": "shop.open", "match": {"value": True}}], "must_not": [{"has_id": ["i4", "i8"]}]},
    {"must": [{"is_empty": {"key": "colour"}}]},
    {"must": [{"is_null": {"key": "shop.city"}}]},
    {"must": [{"key": "n", "range": {"gte": 20, "lt": 21}}]},
    {"must": [{"key": "n", "range": {"gt": 1000}}]},
    {"must": [{"key": "sizes", "range": {"gt": 1, "lt": 3}}]},
    {"must_not": [{"key": "sizes", "range": {"gt": 1, "lt": 3}}]},
    {"must": [{"key": "sizes[0]", "range": {"gte": 2}}]},
    {"must": [{"key": "tags", "match": {"except": ["t1", "t2"]}}]},
    {"must": [{"key": "made", "range": {"gte": "2024-03-01", "lt": "2024-06-15T12:00:00Z"}}]},
    {"must": []},
]


@pytest.mark.parametrize("number", range(len(FILTERS)))
def test_counts_scrolls_searches_and_deletes_under_a_filter(collection, number):
    needs(collection, "filter")
    filter, model = FILTERS[number], filled(collection)
    expected = model.passing(filter)
    assert collection.count(filter) == len(expected)
    assert all_ids(collection, filter=filter) == expected
    queries = unit(14, 2)
    for query, result in zip(queries, collection.search(queries, limit=5, filter=filter), strict=True):
        assert ids_of(result) == model.ranked(query, filter)[:5]
        assert result.total <= len(expected)
        assert not result.total_is_exact or result.total == len(expected)
    [result] = collection.search(queries[:1], limit=100, filter=filter)
    assert (result.total, result.total_is_exact) == (len(expected), True)
    if not parse_filter(filter):
        with pytest.raises(FilterInvalid):
            collection.delete_matching(filter)
        return
    assert collection.delete_matching(filter) == len(expected)
    assert all_ids(collection) == sorted(set(model.vectors) - set(expected))


WORDS = ["red", "1", "true", "", "q\"u'o\\te", "é😀", "2024-05-01", "2024-05-01T12:00:00+02:00", "x" * 300]
NUMBERS = [0, 1, 1.0, -1, 0.5, 2, 2**53 + 1, -7.25, 1e300]
KEYS = ["a", "b", "a.b", "a[].b", "a[]", "a[][]", "a[0]", '"x.y"', '"x y".a', "b[1].a", "5", "ключ"]


def some_value(chance, depth=0):
    kind = chance.randrange(8 if depth < 3 else 4)
    if kind == 0:
        return chance.choice(WORDS)
    if kind in (1, 2):
        return chance.choice(NUMBERS)
    if kind == 3:
        return chance.choice([True, False, None])
    if kind in (4, 5):
        return [some_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return some_tree(chance, depth + 1)


def some_tree(chance, depth=0):
    names = ["a", "b", "x.y", "x y", "5", "ключ"]
    return {chance.choice(names): some_value(chance, depth) for _ in range(chance.randrange(4))}


def some_condition(chance, depth=0):
    key, kind = chance.choice(KEYS), chance.randrange(8 if depth < 3 else 7)
    scalars = [*WORDS, *NUMBERS, True, False]
    if kind in (0, 1):
        return {"key": key, "match": {"any": chance.sample(scalars, chance.randrange(4))}}
    if kind == 2:
        return {"key": key, "match": {"except": chance.sample(scalars, chance.randrange(4))}}
    if kind == 3:
        bounds = NUMBERS if chance.random() < 0.7 else ["2024-05-01", "2024-05-01T10:30:00Z", "2023-01-01"]
        ends = chance.sample(["gt", "gte", "lt", "lte"], chance.randrange(1, 4))
        return {"key": key, "range": {end: chance.choice(bounds) for end in ends}}
    if kind in (4, 5):
        return {chance.choice(["exists", "is_empty", "is_null"]): {"key": key}}
    if kind == 6:
        return {"has_id": [f"i{chance.randrange(60)}" for _ in range(chance.randrange(5))]}
    return some_filter(chance, depth + 1)


def some_filter(chance, depth=0):
    clauses = {name: chance.randrange(3) for name in ("must", "should", "must_not")}
    return {name: [some_condition(chance, depth) for _ in range(count)] for name, count in clauses.items()}


def test_random_filters_on_random_payloads_let_pass_what_they_say(kept, few):
    collection, chance, model = kept.create(), random.Random(3), Model()
    needs(collection, "filter")
    for n, vector in enumerate(unit(15, 60)):
        model.put(f"i{n}", vector, some_tree(chance))
    collection.add(
        [NewItem(id, vector, model.payloads[id]) for id, vector in model.vectors.items()],
    )
    [query] = unit(16, 1)
    for _ in range(4 * few):
        filter = some_filter(chance)
        expected = model.passing(filter)
        assert collection.count(filter) == len(expected), filter
        assert all_ids(collection, filter=filter, limit=100) == expected, filter
        [result] = collection.search(query[None], limit=8, filter=filter)
        assert ids_of(result) == model.ranked(query, filter)[:8], filter


def test_a_filter_that_cannot_be_read_is_refused(collection):
    filled(collection, 3)
    wrong = {"must": [{"key": "a..b", "match": {"value": 1}}]}
    for call in (collection.count, collection.delete_matching):
        with pytest.raises(FilterInvalid, match="/must/0/key"):
            call(wrong)
    with pytest.raises(FilterInvalid):
        collection.scroll(filter=wrong)
    with pytest.raises(FilterInvalid):
        collection.search(unit(17, 1), filter=wrong)
    assert len(collection) == 3


# Capabilities


def test_what_is_not_among_the_capabilities_is_refused(collection):
    filled(collection, 12)
    [query] = unit(18, 1)
    asked = {
        "exact": lambda: collection.search(query[None], exact=True)[0].approximate is False,
        "group_by": lambda: collection.search(query[None], group_by="colour")[0].hits[0].group is not None,
        "generation_cursor": lambda: collection.search(query[None], cursor="*", limit=5)[0].next_cursor,
        "filter": lambda: collection.search(query[None], filter=FILTERS[0])[0].hits,
        "count": lambda: collection.count(FILTERS[0]),
        "verify": lambda: collection.verify() == [],
    }
    for capability, ask in asked.items():
        if capability in collection.capabilities():
            assert ask()
        else:
            with pytest.raises(NotAvailable):
                ask()


def test_an_approximate_index_says_so_and_finds_most(kept):
    pytest.importorskip("faiss")
    collection = kept.create()
    model = filled(collection, 60)
    built = collection.build_index("hnsw", options={"links": 8})
    assert (built["kind"], built["exact"], built["count"]) == ("hnsw", False, 60)
    queries = unit(19, 10)
    results = collection.search(queries, limit=10, effort=200)
    assert all(result.approximate for result in results)
    found = [len(set(ids_of(r)) & set(model.ranked(q)[:10])) for q, r in zip(queries, results, strict=True)]
    assert np.mean(found) >= 9
    if "exact" not in collection.capabilities():
        with pytest.raises(NotAvailable, match="--index flat"):
            collection.search(queries, exact=True)
    assert collection.info().index["kind"] == "hnsw"
    collection.build_index("flat")
    assert "exact" in collection.capabilities()
    for query, result in zip(queries, collection.search(queries, exact=True), strict=True):
        assert ids_of(result) == model.ranked(query)[:10]


def test_referenced_pictures(kept, draw, tmp_path):
    (tmp_path / "pictures").mkdir()
    file = tmp_path / "pictures" / "a.png"
    draw(1).save(file)
    collection = kept.create(roots={"files": tmp_path / "pictures"})
    needs(collection, "pictures")
    one, two = unit(20, 2)
    collection.add([NewItem("a", one, file=file), NewItem("b", two)])
    picture = collection.get(["a"])[0].picture
    assert (picture.kind, picture.root, picture.path) == ("referenced", "files", "a.png")
    assert collection.picture("a") == file.read_bytes()
    assert collection.thumbnail("a", 32)[:2] == b"\xff\xd8"
    assert [known.id for known in collection.known_pictures()] == ["a"]
    assert collection.update_payload("a", {"x": 1}).picture == picture
    with pytest.raises(ImageNotKept):
        collection.picture("b")
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    with pytest.raises(ImageNotKept):
        collection.picture("a")
    collection.set_root("files", tmp_path / "elsewhere")
    assert collection.picture("a") == (tmp_path / "elsewhere" / "a.png").read_bytes()
    with pytest.raises(Exception, match="no root"):
        collection.add([NewItem("c", one, file=Path(__file__))])


# Closing and opening


def test_everything_is_there_after_opening_again(kept):
    collection = kept.create(name="Things")
    model = filled(collection, 20)
    collection.update_payload("i3", {"colour": "pink"})
    collection.delete(["i4"])
    model.payloads["i3"]["colour"] = "pink"
    model.drop("i4")
    before = collection.get(["i3"])[0]
    again = kept.open()
    assert (again.name, again.dim, again.fingerprint, len(again)) == ("Things", DIM, FINGERPRINT, 19)
    assert again.get(["i3"])[0] == before
    assert all_ids(again) == sorted(model.vectors)
    [query] = unit(21, 1)
    assert ids_of(again.search(query[None], limit=19)[0]) == model.ranked(query)
    assert is_collection(kept.path)
    info = again.info()
    assert (info.count, info.dim, info.metric, info.fingerprint) == (19, DIM, "cosine", FINGERPRINT)


def test_vectors_of_another_encoder_are_refused(kept):
    collection = kept.create()
    with pytest.raises(ModelMismatch):
        collection.add([NewItem("a", unit(22, 1)[0])], fingerprint="0" * 64)
    assert len(collection) == 0
    collection.check_fingerprint(FINGERPRINT)
    with pytest.raises(ModelMismatch):
        kept.open(fingerprint="0" * 64)
    assert len(kept.open(fingerprint=FINGERPRINT)) == 0


def test_what_is_opened_to_read_is_not_written(kept):
    filled(kept.create(), 3)
    reader = kept.open(read_only=True)
    for write in (
        lambda: reader.add([NewItem("x", unit(23, 1)[0])]),
        lambda: reader.delete(["i1"]),
        lambda: reader.delete_matching(FILTERS[0]),
        lambda: reader.update_payload("i1", {"x": 1}),
        lambda: reader.build_index(),
        lambda: reader.set_root("files", kept.path),
    ):
        with pytest.raises(ReadOnly):
            write()
    assert all_ids(reader) == ["i0", "i1", "i2"]


def test_searches_while_others_write_see_whole_items(collection):
    """An item has the payload that its vector came with, whichever of its versions a search sees."""
    vectors = unit(24, 8)
    collection.add([NewItem(f"i{n}", vectors[n], {"of": n}) for n in range(4)])
    stop, wrong = threading.Event(), []

    def look():
        while not stop.is_set():
            hits = collection.search(vectors[:1], limit=8, with_vector=True)[0].hits
            wrong.extend(
                hit for hit in hits if not np.array_equal(hit.item.vector, vectors[hit.item.payload["of"]])
            )

    readers = [threading.Thread(target=look) for _ in range(2)]
    for reader in readers:
        reader.start()
    for turn in range(8):
        collection.add([NewItem(f"i{n}", vectors[(n + turn) % 8], {"of": (n + turn) % 8}) for n in range(4)])
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
