"""Searches with filters, thresholds, groups and cursors give what brute force gives, and say how exact."""

import re
import threading
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from dml.collection import NewItem, create_collection, open_collection
from dml.collection import cursors as cursors_module
from dml.collection import query as query_module
from dml.collection import row_sets as row_sets_module
from dml.collection.filters import matches, parse_filter
from dml.errors import CursorExpired, CursorInvalid, FilterInvalid, ReadOnly, UsageError

DIM = 16
COLOURS = ("red", "green", "blue")


def unit(seed, count, dim=DIM):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def payload(n):
    found = {
        "colour": COLOURS[n % 3],
        "n": n,
        "tags": [f"t{n % 5}", f"t{n % 7}"],
        "shop": {"open": n % 2 == 0},
    }
    return found if n % 11 else {"n": n}


class Model:
    """What a collection should hold, and what a search in it should answer, by definition."""

    def __init__(self):
        self.vectors, self.payloads = {}, {}

    def put(self, id, vector, payload):
        self.vectors[id], self.payloads[id] = vector, payload

    def remove(self, id):
        del self.vectors[id], self.payloads[id]

    def passing(self, filter=None):
        tree = parse_filter(filter)
        return [id for id in self.vectors if matches(tree, self.payloads[id], id)]

    def ranked(self, query, filter=None, *, threshold=-2.0, exclude=()):
        ids = [id for id in self.passing(filter) if id not in exclude]
        scores = {
            id: np.float32(self.vectors[id].astype(np.float64) @ query.astype(np.float64)) for id in ids
        }
        return sorted((id for id in ids if scores[id] >= threshold), key=lambda id: -scores[id])


@pytest.fixture(params=["flat", "faiss_flat", "hnsw", "ivf", "pq", "rabitq"])
def kind(request):
    if request.param != "flat":
        pytest.importorskip("faiss")
    return request.param


@pytest.fixture
def shop(tmp_path):
    """shop(kind) -> (collection, model) of 300 items: most in the index, some beside it, some gone."""
    opened = []

    def make(kind="flat", count=300, **kwargs):
        if kind in ("pq", "rabitq"):  # to be compared with brute force to the last digit
            kwargs["options"] = {"precision": "float32"}
        collection = create_collection(tmp_path / "shop", dim=DIM, fingerprint="f" * 64, index=kind, **kwargs)
        opened.append(collection)
        model, vectors = Model(), unit(1, count)
        for start, end in ((0, int(0.8 * count)), (int(0.8 * count), count)):
            collection.add(NewItem(f"i{n}", vectors[n], payload(n)) for n in range(start, end))
            if not start:
                collection.build_index(measure=False)
        for n, vector in enumerate(vectors):
            model.put(f"i{n}", vector, payload(n))
        for n in range(0, count, 13):
            model.remove(f"i{n}")
        collection.delete([f"i{n}" for n in range(0, count, 13)])
        return collection, model

    yield make
    for collection in opened:
        collection.close()


def ids_of(result):
    return [hit.id for hit in result.hits]


RED = {"must": [{"key": "colour", "match": {"value": "red"}}]}
FILTERS = [
    RED,
    {"must_not": [{"key": "colour", "match": {"value": "red"}}]},
    {"should": [{"key": "tags", "match": {"any": ["t1", "t6"]}}, {"key": "n", "range": {"lt": 20}}]},
    {"must": [{"key": "shop.open", "match": {"value": True}}], "must_not": [{"has_id": ["i4", "i8"]}]},
    {"must": [{"is_empty": {"key": "colour"}}]},
    {"must": [{"key": "n", "range": {"gte": 100, "lt": 101}}]},
    {"must": [{"key": "n", "range": {"gt": 1000}}]},
    {"must": []},
]

# Filters


@pytest.mark.parametrize("few", [10_000, 5])
def test_a_search_under_a_filter_is_the_best_of_what_passes(kind, shop, few, monkeypatch):
    monkeypatch.setattr(query_module, "FEW", few)  # 5: all but the smallest are left to the index
    collection, model = shop(kind)
    queries = unit(2, 4)
    for filter in FILTERS:
        expected = [model.ranked(query, filter) for query in queries]
        assert collection.count(filter) == len(expected[0])
        for result, best in zip(collection.search(queries, limit=7, filter=filter), expected, strict=True):
            assert (result.total, result.total_is_exact) == (len(best), True)
            assert set(ids_of(result)) <= set(best)
            assert len(result.hits) == min(7, len(best))
            many = len(best) > max(few, 0.03 * len(collection)) or len(best) == len(collection)
            assert result.approximate == (kind not in ("flat", "faiss_flat") and many)
            if not result.approximate:
                assert ids_of(result) == best[:7]
        for result, best in zip(
            collection.search(queries, limit=7, filter=filter, exact=True), expected, strict=True
        ):
            assert ids_of(result) == best[:7]
            assert not result.approximate


@pytest.mark.parametrize("few_changes", [0, 1000])
def test_a_filter_sees_what_has_just_been_written(shop, few_changes, monkeypatch):
    monkeypatch.setattr(row_sets_module, "FEW_CHANGES", few_changes)
    collection, model = shop()
    [query] = unit(3, 1)

    def check():
        for filter in FILTERS:
            assert (
                ids_of(collection.search(query[None], limit=20, filter=filter)[0])
                == model.ranked(query, filter)[:20]
            )

    check()
    collection.update_payload("i5", {"colour": "red", "n": 19})
    model.payloads["i5"] |= {"colour": "red", "n": 19}
    check()
    collection.add([NewItem("i6", query, {"colour": "red"}), NewItem("new", query, {"colour": "green"})])
    model.put("i6", query, {"colour": "red"})
    model.put("new", query, {"colour": "green"})
    check()
    collection.delete(["i1", "i2", "new"])
    for id in ("i1", "i2", "new"):
        model.remove(id)
    check()
    for n in range(100, 200):  # with few_changes 0 more than are brought up to date
        if f"i{n}" in model.vectors:
            collection.update_payload(f"i{n}", {"colour": "blue"})
            model.payloads[f"i{n}"]["colour"] = "blue"
    check()


def test_a_filter_is_evaluated_once_while_nothing_changes(shop, monkeypatch):
    collection, _ = shop()
    asked = []
    original = row_sets_module.matching_rows
    monkeypatch.setattr(
        row_sets_module,
        "matching_rows",
        lambda db, f, **kw: asked.append(kw.get("after")) or original(db, f, **kw),
    )
    for _ in range(3):
        collection.search(unit(3, 1), filter=RED)
        collection.count(RED)
    assert asked == [None]
    collection.update_payload("i1", {"x": 1})
    before = collection.generation - 1
    collection.count(RED)
    assert asked == [None, before, before]  # the changed item only
    collection.delete(["i1"])
    collection.count(RED)
    assert asked[3:] == [before + 1]


def test_what_filters_remember_is_bounded(shop):
    collection, model = shop()
    sets = collection._row_sets = row_sets_module.RowSets(most_bytes=1500)
    for number in range(50):
        filter = {"must": [{"key": "n", "range": {"lt": 2 * number}}]}
        assert collection.count(filter) == len(model.passing(filter))
        assert sets._bytes == sum(found.rows.nbytes for found in sets._sets.values()) <= 1500
    assert 0 < len(sets._sets) < 50


def test_readers_of_another_process_filter_the_same(shop, tmp_path):
    collection, model = shop()
    with open_collection(tmp_path / "shop", read_only=True) as reader:
        assert reader.count(RED) == len(model.passing(RED))
        collection.update_payload("i1", {"colour": "red"})
        model.payloads["i1"]["colour"] = "red"
        assert reader.count(RED) == len(model.passing(RED))
        assert sorted(item.id for item in reader.scroll(limit=1000, filter=RED)[0]) == sorted(
            model.passing(RED)
        )
        with pytest.raises(ReadOnly):
            reader.delete_matching(RED)


def test_items_are_scrolled_counted_and_deleted_by_filter(shop):
    collection, model = shop()
    after, seen = None, []
    while True:
        items, after = collection.scroll(after=after, limit=7, filter=RED)
        seen += [item.id for item in items]
        if after is None:
            break
    assert seen == sorted(model.passing(RED))
    assert collection.count() == len(collection) == len(model.vectors)
    assert collection.delete_matching(RED) == len(seen)
    assert (collection.count(RED), collection.count()) == (0, len(model.vectors) - len(seen))
    assert collection.delete_matching(RED) == 0
    for filter in ({}, {"must": []}, {"must": [{}]}, {"should": [{}, RED]}):
        with pytest.raises(FilterInvalid, match="every item"):
            collection.delete_matching(filter)
    with pytest.raises(FilterInvalid, match="/must/0"):
        collection.search(unit(1, 1), filter={"must": [5]})
    with pytest.raises(FilterInvalid):
        collection.count([])  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["anywhere", "near the query", "far from the query"])
def test_recall_holds_under_filters(kind, tmp_path, where, scale, monkeypatch):
    """Also when what passes has to do with what is looked for."""
    monkeypatch.setattr(query_module, "FEW", 0)
    monkeypatch.setattr(query_module, "FEW_SHARE", 0.0)
    rng = np.random.default_rng(0)
    count, centres = 3000 * scale, unit(5, 20)
    cluster = rng.integers(0, 20, count)
    rows = centres[cluster] + 0.25 * unit(6, count)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near = np.argsort(-(rows @ centres[0]), kind="stable")
    order = {"anywhere": rng.permutation(count), "near the query": near, "far from the query": near[::-1]}[
        where
    ]
    place = np.empty(count, int)
    place[order] = np.arange(count)
    queries = centres[0] + 0.25 * unit(7, 50)
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    with create_collection(tmp_path / "c", dim=DIM, fingerprint="f" * 64, index=kind) as collection:
        collection.add(NewItem(f"i{n}", rows[n], {"place": int(place[n])}) for n in range(count))
        collection.build_index(measure=False)
        free = recall(collection, queries, None)
        for share in (0.001, 0.01, 0.1, 0.5, 0.999):
            filter = {"must": [{"key": "place", "range": {"lt": share * count}}]}
            assert recall(collection, queries, filter) >= free - 0.02, share


def recall(collection, queries, filter):
    """Share of the true ten best that a search with the index's own effort finds."""
    true = collection.search(queries, limit=10, filter=filter, exact=True)
    found = collection.search(queries, limit=10, filter=filter)
    assert all(len(t.hits) == len(f.hits) for t, f in zip(true, found, strict=True))
    return np.mean([len({*ids_of(t)} & {*ids_of(f)}) / len(t.hits) for t, f in zip(true, found, strict=True)])


@pytest.mark.parametrize("index", ["flat", "ivf"])
def test_filtered_searches_beside_a_writer_are_those_of_their_generation(shop, tmp_path, index, scale):
    """Every answer, of the writer's process and of a reader, is brute force over the state that it names."""
    if index == "ivf":
        pytest.importorskip("faiss")
    collection, model = shop(index, merge="manual")
    states = {collection.generation: (dict(model.vectors), dict(model.payloads))}
    stop, failed = threading.Event(), []

    def write():
        rng = np.random.default_rng(11)
        try:
            while not stop.is_set():
                n, turn = int(rng.integers(0, 320)), rng.random()
                vectors, payloads = (dict(part) for part in states[collection.generation])
                id = f"i{n}"
                if turn < 0.3 and id in vectors:
                    del vectors[id], payloads[id]
                    states[collection.generation + 1] = vectors, payloads  # before anybody can see it
                    collection.delete([id])
                elif turn < 0.6 and id in vectors:
                    payloads[id] = payloads[id] | {"colour": COLOURS[int(rng.integers(3))]}
                    states[collection.generation + 1] = vectors, payloads
                    collection.update_payload(id, payloads[id])
                elif turn < 0.99:
                    vectors[id], payloads[id] = unit(int(rng.integers(1 << 30)), 1)[0], payload(n)
                    states[collection.generation + 1] = vectors, payloads
                    collection.add([NewItem(id, vectors[id], payloads[id])])
                else:
                    collection.build_index(measure=False)
        except Exception as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    seen = set()
    try:
        with open_collection(tmp_path / "shop", read_only=True) as reader:
            for number in range(60 * scale):
                there = reader if number % 3 == 0 else collection
                query, filter = unit(number, 1), FILTERS[number % 5]
                [result] = there.search(query, limit=6, filter=filter)
                state = Model()
                state.vectors, state.payloads = states[result.generation]
                best = state.ranked(query[0], filter)
                assert (ids_of(result), result.total) == (best[:6], len(best))
                assert all(hit.item.payload == state.payloads[hit.id] for hit in result.hits)
                seen.add(result.generation)
    finally:
        stop.set()
        writer.join()
    assert not failed
    assert len(seen) > 1


def test_a_reader_walks_through_its_own_state(shop, tmp_path):
    collection, model = shop()
    [query] = unit(8, 1)
    with open_collection(tmp_path / "shop", read_only=True) as reader:
        best = model.ranked(query, RED)
        number = iter(range(1000))
        assert (
            walk(reader, query, filter=RED, between=lambda: collection.delete([best[-1 - next(number)]]))
            == best
        )


# Thresholds and exclusions


@pytest.mark.parametrize("first_look", [1, 256])
def test_a_range_search_gives_all_above_the_threshold(kind, shop, first_look, monkeypatch):
    monkeypatch.setattr(query_module, "FIRST_LOOK", first_look)
    collection, model = shop(kind)
    queries = unit(2, 3)
    for filter in (None, RED):
        for threshold in (0.9, 0.3, 0.0, -1.0):
            found = collection.search(
                queries, limit=1000, score_threshold=threshold, filter=filter, exact=True
            )
            for query, result in zip(queries, found, strict=True):
                best = model.ranked(query, filter, threshold=threshold)
                assert ids_of(result) == best
                assert (result.total, result.total_is_exact) == (len(best), True)
            capped = collection.search(queries, limit=5, score_threshold=threshold, filter=filter, exact=True)
            for full, part in zip(found, capped, strict=True):
                assert ids_of(part) == ids_of(full)[:5]
                assert part.total_is_exact == (
                    len(full.hits) < 5 or part.total == len(full.hits) == collection.count(filter)
                )
                assert part.total <= full.total


def test_totals_offsets_ranks_and_exclusions(shop):
    collection, model = shop()
    [query] = unit(2, 1)
    best = model.ranked(query)
    hidden = [best[0], best[3], "nobody", best[0]]
    left = model.ranked(query, exclude=hidden)
    [result] = collection.search(query[None], limit=4, offset=3, exclude=hidden)
    assert ids_of(result) == left[3:7]
    assert [hit.rank for hit in result.hits] == [4, 5, 6, 7]
    assert (result.total, result.total_is_exact) == (len(best) - 2, True)
    [result] = collection.search(query[None], limit=4, exclude=hidden, filter=RED)
    reds = model.ranked(query, RED, exclude=hidden)
    assert (ids_of(result), result.total) == (reds[:4], len(reds))
    [result] = collection.search(query[None], limit=4, exclude=list(model.vectors))
    assert (result.hits, result.total) == ([], 0)
    [result] = collection.search(query[None], limit=4, exclude=hidden, score_threshold=0.2)
    assert ids_of(result) == model.ranked(query, exclude=hidden, threshold=0.2)[:4]
    [result] = collection.search(query[None], limit=4, offset=10_000)
    assert (result.hits, result.total) == ([], len(best))


@pytest.mark.parametrize(
    "wrong",
    [{"limit": 0}, {"offset": -1}, {"effort": 0}, {"group_by": "a", "group_size": 0}, {"group_by": "a..b"}],
)
def test_numbers_out_of_range_are_refused(shop, wrong):
    collection, _ = shop()
    with pytest.raises(UsageError):
        collection.search(unit(1, 1), **wrong)


# Groups


def grouped(model, query, key, *, limit, size, offset=0, filter=None, threshold=-2.0):
    """[(value, [ids])] by definition."""
    groups = defaultdict(list)
    for id in model.ranked(query, filter, threshold=threshold):
        value = model.payloads[id].get(key)
        for entry in dict.fromkeys(value) if isinstance(value, list) else [value]:
            if entry is not None:
                groups[entry].append(id)
    return [(value, ids[:size]) for value, ids in groups.items()][offset : offset + limit], len(groups)


@pytest.mark.parametrize("key", ["colour", "tags", "n", "nothing"])
@pytest.mark.parametrize(
    ("limit", "size", "offset"), [(2, 3, 0), (10, 100, 0), (1, 1, 1), (4, 2, 2), (300, 1, 0)]
)
def test_groups_are_the_best_groups_with_their_best_items(shop, key, limit, size, offset):
    collection, model = shop("hnsw" if key == "tags" else "flat")
    for query in unit(4, 3):
        for extra in ({}, {"filter": RED}, {"score_threshold": 0.1}):
            [result] = collection.search(
                query[None], limit=limit, offset=offset, group_by=key, group_size=size, exact=True, **extra
            )
            expected, total = grouped(
                model, query, key, limit=limit, size=size, offset=offset,
                filter=extra.get("filter"), threshold=extra.get("score_threshold", -2.0),
            )  # fmt: skip
            flat = [(value, id) for value, ids in expected for id in ids]
            assert [(hit.group, hit.id) for hit in result.hits] == flat
            assert [hit.rank for hit in result.hits] == list(range(1, len(flat) + 1))
            assert result.total == total if result.total_is_exact else result.total <= total
            assert result.total >= min(total, offset + limit)


def test_rare_groups_are_found_behind_a_large_one(tmp_path):
    with create_collection(tmp_path / "c", dim=DIM, fingerprint="f" * 64, index="flat") as collection:
        [query] = unit(0, 1)
        near = query + 0.01 * unit(1, 2000)
        near /= np.linalg.norm(near, axis=1, keepdims=True)
        collection.add(NewItem(f"many{n}", row, {"g": "many"}) for n, row in enumerate(near))
        collection.add([NewItem("a1", -query, {"g": 1}), NewItem("a2", unit(2, 1)[0], {"g": 1.0})])
        collection.add([NewItem("b", unit(3, 1)[0], {"g": True}), NewItem("none", query, {"g": None})])
        [result] = collection.search(query[None], limit=3, group_by="g", group_size=2)
        groups = defaultdict(list)
        for hit in result.hits:
            groups[repr(hit.group)].append(hit.id)
        assert set(groups["True"]) == {"b"}
        assert {*groups.get("1", []), *groups.get("1.0", [])} == {"a1", "a2"}
        assert len(groups["'many'"]) == 2
        assert result.total == 3


# Cursors


def walk(collection, query, *, limit=7, between=lambda: None, **kwargs):
    """All pages of a search with a cursor."""
    cursor, ids, generations = "*", [], set()
    while cursor is not None:
        [result] = collection.search(query[None], limit=limit, cursor=cursor, **kwargs)
        ids += ids_of(result)
        assert [hit.rank for hit in result.hits] == list(range(len(ids) - len(result.hits) + 1, len(ids) + 1))
        generations.add(result.generation)
        cursor = result.next_cursor
        between()
    assert len(generations) == 1
    return ids


def test_a_walk_sees_everything_once_in_order(kind, shop, monkeypatch):
    monkeypatch.setattr(cursors_module, "FIRST_RANKING", 10)
    collection, model = shop(kind)
    for query in unit(8, 2):
        assert walk(collection, query) == model.ranked(query)
        assert walk(collection, query, filter=RED, limit=1000) == model.ranked(query, RED)
        assert walk(collection, query, score_threshold=0.2) == model.ranked(query, threshold=0.2)
        assert walk(collection, query, exclude=["i1", "i2"]) == model.ranked(query, exclude=["i1", "i2"])
        assert walk(collection, query, score_threshold=0.999) == []


def test_pages_neither_repeat_nor_skip_while_a_writer_changes_everything(shop, scale):
    collection, model = shop("hnsw")
    stop, failed = threading.Event(), []

    def write():
        rng = np.random.default_rng(9)
        try:
            while not stop.is_set():
                n = int(rng.integers(0, 400))
                if rng.random() < 0.4:
                    collection.delete([f"i{n}"])
                elif rng.random() < 0.3 and collection.find([f"i{n}"]):
                    collection.update_payload(f"i{n}", {"colour": "red"})
                else:
                    collection.add([NewItem(f"i{n}", unit(int(rng.integers(1 << 30)), 1)[0], payload(n))])
                if rng.random() < 0.02:
                    collection.build_index(measure=False)
        except Exception as error:
            failed.append(error)

    writer = threading.Thread(target=write)
    queries = unit(8, 3)
    cursors = [collection.search(q[None], limit=5, cursor="*", filter=RED)[0] for q in queries]
    expected = [model.ranked(query, RED) for query in queries]
    writer.start()
    try:
        for query, first, best in zip(queries, cursors, expected, strict=True):
            ids, cursor = ids_of(first), first.next_cursor
            while cursor is not None:
                [result] = collection.search(query[None], limit=3, cursor=cursor, filter=RED)
                ids, cursor = ids + ids_of(result), result.next_cursor
                assert all(hit.item.payload["colour"] == "red" for hit in result.hits)
            assert ids == best
        for number in range(5 * scale):  # walks that begin amid the writing
            ids = walk(collection, queries[number % 3], filter=RED, limit=4)
            assert len(ids) == len(set(ids))
    finally:
        stop.set()
        writer.join()
    assert not failed


def test_the_filter_of_a_walk_is_evaluated_once(shop, monkeypatch):
    collection, model = shop()
    asked = []
    original = row_sets_module.matching_rows
    monkeypatch.setattr(
        row_sets_module, "matching_rows", lambda db, f, **kw: asked.append(f) or original(db, f, **kw)
    )
    [query] = unit(8, 1)
    best, turn = model.ranked(query, RED), iter(range(1000))
    assert walk(collection, query, filter=RED, between=lambda: collection.delete([f"i{next(turn)}"])) == best
    assert len(asked) == 1


def test_cursors_of_another_search_and_forged_ones_are_refused(shop):
    collection, _ = shop()
    one, other = unit(8, 2)
    cursor = collection.search(one[None], limit=5, cursor="*", filter=RED)[0].next_cursor
    for changed in (
        {"vectors": other[None]},
        {"filter": None},
        {"score_threshold": 0.0},
        {"exclude": ["i1"]},
    ):
        with pytest.raises(CursorInvalid, match="another search"):
            collection.search(**({"vectors": one[None], "filter": RED, "cursor": cursor} | changed))
    swapped = cursor[:-4] + ("AAAA" if cursor[-4:] != "AAAA" else "BBBB")
    for forged in ("", "x", "§", swapped, cursor + "A", cursor[1:], "AAAA" * 20, cursor[:10]):
        with pytest.raises((CursorInvalid, CursorExpired)):
            collection.search(one[None], filter=RED, cursor=forged)
    for position in range(0, len(cursor), 7):
        flipped = cursor[:position] + ("A" if cursor[position] != "A" else "B") + cursor[position + 1 :]
        with pytest.raises((CursorInvalid, CursorExpired)):
            collection.search(one[None], filter=RED, cursor=flipped)
    with pytest.raises(UsageError, match="no offset"):
        collection.search(one[None], cursor="*", offset=1)
    with pytest.raises(UsageError, match="one query"):
        collection.search(np.stack([one, other]), cursor="*")
    assert collection.search(one[None], limit=9, cursor=cursor, filter=RED)[0].hits[0].rank == 6


def test_states_are_kept_for_minutes_and_only_a_few(shop, tmp_path):
    collection, _ = shop()
    [query] = unit(8, 1)
    now = [0.0]
    collection._walks = cursors_module.Walks(
        collection._present.hold, collection._row_sets, clock=lambda: now[0]
    )

    def first():
        return collection.search(query[None], limit=5, cursor="*")[0].next_cursor

    def go_on(cursor):
        return collection.search(query[None], limit=5, cursor=cursor)[0].next_cursor

    cursor = first()
    for _ in range(3):
        now[0] += cursors_module.IDLE_SECONDS - 1
        cursor = go_on(cursor)
    now[0] += cursors_module.IDLE_SECONDS + 1
    with pytest.raises(CursorExpired, match="Start again"):
        go_on(cursor)
    cursor = first()
    while now[0] < cursors_module.AGE_SECONDS * 2:
        now[0] += 60
        try:
            go_on(cursor)
        except CursorExpired:
            break
    else:
        pytest.fail("a state was kept for ever")
    assert first()
    assert first()
    assert len(collection._walks) == 1  # of one moment there is one state
    cursors = []
    for n in range(cursors_module.MOST_STATES + 2):
        cursors.append(first())
        collection.update_payload("i1", {"turn": n})
    assert len(collection._walks) == cursors_module.MOST_STATES
    for cursor in cursors[:2]:
        with pytest.raises(CursorExpired):
            go_on(cursor)
    assert all(go_on(cursor) for cursor in cursors[2:])
    now[0] += cursors_module.IDLE_SECONDS + 1
    collection.update_payload("i1", {"turn": -1})  # a write lets go of what is too old
    assert len(collection._walks) == 0
    cursor = first()
    collection.close()
    with open_collection(tmp_path / "shop") as again, pytest.raises(CursorExpired):
        again.search(query[None], limit=5, cursor=cursor)


def test_the_catalogue_is_folded_in_when_no_cursor_is_left(shop, tmp_path):
    collection, _ = shop()
    collection.search(unit(8, 1), limit=5, cursor="*")
    collection.update_payload("i1", {"x": 1})
    collection.close()
    assert not (tmp_path / "shop" / "catalog.sqlite-wal").exists()


# Documentation


def test_the_python_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parent.parent / "docs" / "queries.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 6
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/queries.md", "exec"), names)
    shown = capsys.readouterr().out
    assert "1.000 shoe/0 20" in shown
    for line, promised in re.findall(r"^(print.*?)  # (\d.*)$", text, re.MULTILINE):
        assert f"\n{promised}\n" in shown, line
