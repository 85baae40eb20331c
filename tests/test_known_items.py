"""Items that searches remember: right after every kind of change, in every state that is still searched."""

import threading

import numpy as np
import pytest

from dml.collection import NewItem, create_collection, open_collection
from dml.collection.known_items import KnownItems
from dml.errors import CollectionError

DIM = 8


def unit(rng, count):
    rows = rng.standard_normal((count, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def rows():
    return unit(np.random.default_rng(0), 30)


@pytest.fixture
def collection(tmp_path, rows):
    with create_collection(tmp_path / "c", dim=DIM, fingerprint="f" * 64, index="flat") as found:
        found.add([NewItem(f"{n}", row, {"n": n, "tags": ["a"]}) for n, row in enumerate(rows)])
        yield found


def first(collection, row, **how):
    return collection.search(row[None], **how)[0].hits[0]


def test_a_search_that_comes_again_asks_the_catalogue_for_nothing(collection, rows, monkeypatch):
    before = collection.search(rows[:3], limit=5)
    monkeypatch.setattr(collection._catalog, "reading", lambda: pytest.fail("the catalogue was asked"))
    assert collection.search(rows[:3], limit=5) == before


def test_changes_show_at_once(collection, rows):
    assert first(collection, rows[3]).item.payload == {"n": 3, "tags": ["a"]}
    collection.update_payload("3", {"n": None, "colour": "red"})
    assert first(collection, rows[3]).item.payload == {"tags": ["a"], "colour": "red"}
    collection.add([NewItem("3", -rows[3], {"moved": True})])
    assert first(collection, rows[3]).id != "3"
    assert first(collection, -rows[3]).item.payload == {"moved": True}
    collection.delete(["3"])
    assert first(collection, -rows[3]).id != "3"


def changed_and_deleted(collection, known) -> list[int]:
    """All rows, known as they were before the first was changed and then deleted; and the change between."""
    with collection._catalog.reading() as db:
        rows = known.read(db, range(1, 31), collection.generation)
    collection.update_payload("0", {"n": "changed"})
    between = collection.generation
    collection.delete(["0"])
    return [*rows, between]


def test_an_item_changed_and_deleted_between_two_looks_is_not_known_as_it_was_before(collection):
    """A slow search may still have the state between the two, in which the change was made already."""
    known, catalog = KnownItems(), collection._catalog
    row, *others, between = changed_and_deleted(collection, known)
    with catalog.reading() as db:
        known.read(db, others, collection.generation)
    assert known.find([row], between) is None
    assert len(known.find(others, collection.generation)) == 29


def test_where_removals_are_forgotten_nothing_is_known_any_more(collection):
    known, catalog = KnownItems(), collection._catalog
    row, *others, between = changed_and_deleted(collection, known)
    catalog.forget_removed(collection.generation)
    with catalog.reading() as db:
        known.read(db, others[:3], collection.generation)
    assert known.find([row], between) is None
    assert known.find(others, between) is None


def test_a_walk_sees_the_payloads_of_its_state(collection, rows):
    [page] = collection.search(rows[:1], limit=5, cursor="*")
    later = [hit.id for hit in collection.search(rows[:1], limit=30)[0].hits][5:]
    for id in later:
        collection.update_payload(id, {"n": "changed"})
    assert {hit.item.payload["n"] for hit in collection.search(rows[:1], limit=30)[0].hits[5:]} == {"changed"}
    [page] = collection.search(rows[:1], limit=25, cursor=page.next_cursor)
    assert [hit.item.payload["n"] for hit in page.hits] == [int(id) for id in later]


def test_a_reader_follows_the_writer(collection, rows):
    with open_collection(collection.path, read_only=True) as reader:
        assert first(reader, rows[3]).item.payload["n"] == 3
        collection.update_payload("3", {"n": "new"})
        assert first(reader, rows[3]).item.payload["n"] == "new"


def test_a_closed_collection_answers_no_more_though_all_is_known(collection, rows):
    collection.search(rows[:1])
    collection.close()
    with pytest.raises(CollectionError, match="has been closed"):
        collection.search(rows[:1])


def test_more_changes_than_are_known_forget_everything(collection, rows):
    collection.search(rows[:1], limit=2)
    for n in range(10):
        collection.update_payload(f"{n}", {"n": -n})
    shown = collection.search(rows[:10], limit=1)
    assert [result.hits[0].item.payload["n"] for result in shown] == [-n for n in range(10)]


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"n": 1, "on": None},
        {"tags": ["a", 2, None]},
        {"of": {"a": [1]}},
        {"tags": [["a"], {"b": 1}], "n": 0.5},
    ],
)
def test_a_payload_that_was_shown_belongs_to_whoever_asked(collection, rows, payload):
    collection.add([NewItem("0", rows[0], payload)])
    for _ in range(3):
        shown = first(collection, rows[0]).item.payload
        assert shown == payload
        shown["more"] = "mine"
        for value in shown.values():
            if isinstance(value, list):
                value.append("mine")
                for part in value:
                    part.clear() if isinstance(part, (list, dict)) else None
            if isinstance(value, dict):
                value["a"].append("mine")


def test_what_is_remembered_stays_within_its_bytes(collection, rows):
    known = collection._known = KnownItems(most_bytes=2_000)
    for row in rows:
        collection.search(row[None], limit=3)
    assert 0 < len(known._items) < 6
    assert 0 < known._bytes <= 2_000


def test_threads_see_payload_and_generation_of_one_moment(collection, rows, scale):
    wrong, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            for result in collection.search(rows[:4], limit=4):
                wrong.extend(
                    hit
                    for hit in result.hits
                    if hit.item.sequence > result.generation
                    or hit.item.payload.get("at", hit.item.sequence) != hit.item.sequence
                )

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for turn in range(60 * scale):
        collection.update_payload(f"{turn % 30}", {"at": collection.generation + 1})
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    at_last = {item.id: item for item in collection.get([f"{n}" for n in range(30)])}
    assert all(hit.item == at_last[hit.id] for hit in collection.search(rows[:1], limit=30)[0].hits)
