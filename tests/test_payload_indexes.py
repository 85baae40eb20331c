"""Indexes on fields of the payload change how long a filter takes, and nothing else."""

import json

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dml.cli.payload import payload_index
from dml.collection import NewItem, create_collection, open_collection
from dml.collection import payload_indexes as indexes
from dml.collection.filters import Filter, Match, matches, parse_filter
from dml.collection.row_sets import matching_rows
from dml.errors import ReadOnly, UsageError

KEYS = ("label", "price", 'shop."the city"', "it's", "mixed")
MIXED = [1, 1.0, True, "1", None, 0, False, [1, "x"], ["1"], {"a": 1}, [], 2**70, -1.5, "x", [[1]]]


def payload(n):
    return {
        "label": f"label {n % 97}" if n % 50 else [f"label {n % 97}", "label 1"],
        "price": n,
        "shop": {"the city": f"city {n % 150}"},
        "it's": n % 60,
        "mixed": MIXED[n % len(MIXED)],
        "n": n,
    }


@pytest.fixture
def shop(tmp_path):
    """600 items; some deleted, some changed."""
    with create_collection(tmp_path / "shop", dim=4, fingerprint="f" * 64, index="flat") as collection:
        vectors = np.eye(4, dtype=np.float32)
        collection.add(NewItem(f"i{n}", vectors[n % 4], payload(n)) for n in range(600))
        yield collection


def label(value):
    return {"key": "label", "match": {"value": value}}


FILTERS = [
    {"must": [label("label 1")]},
    {
        "must": [
            {"key": "label", "match": {"any": ["label 2", "label 3"]}},
            {"key": "price", "range": {"lt": 300}},
        ]
    },
    {"must": [{"key": "price", "range": {"gte": 17, "lt": 21.5}}]},
    {"must": [{"key": "price", "range": {"gte": 17}}], "must_not": [label("label 20")]},
    {"must": [{"must": [{"key": 'shop."the city"', "match": {"value": "city 7"}}]}]},
    {
        "must": [{"key": "it's", "match": {"value": 59}}],
        "should": [{"key": "price", "match": {"any": [59, 119]}}],
    },
    {"should": [label("label 1"), {"key": "price", "match": {"value": 3}}]},
    {"must_not": [{"key": "price", "match": {"value": 3}}]},
    {"must": [{"key": "made", "range": {"gte": "2024-01-01"}}]},
    *({"must": [{"key": "mixed", "match": {"value": v}}]} for v in MIXED if isinstance(v, str | int | float)),
    {"must": [{"key": "mixed", "range": {"lt": 1}}]},
]


def check(collection):
    items = collection.scroll(limit=1000)[0]
    for filter in FILTERS:
        expected = {item.id for item in items if matches(parse_filter(filter), item.payload, item.id)}
        assert {item.id for item in collection.scroll(limit=1000, filter=filter)[0]} == expected
        assert collection.count(filter) == len(expected), filter


def test_filters_mean_the_same_with_and_without(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(indexes, "USEFUL_SHARE", 1.0)  # indexes are used wherever they can be
    check(shop)
    assert [shop.index_payload(key) for key in KEYS] == [True] * len(KEYS)
    assert shop.payload_indexes() == sorted(KEYS)
    assert not shop.index_payload("label")
    shop._row_sets._sets.clear()
    check(shop)
    shop.delete([f"i{n}" for n in range(0, 600, 7)])
    shop.add([NewItem("new", np.eye(4, dtype=np.float32)[0], payload(1))])
    for n in range(1, 40, 7):
        shop.update_payload(f"i{n}", {"label": "label 1", "price": 20, "mixed": 1})
    check(shop)
    assert shop.verify() == []
    with open_collection(tmp_path / "shop", read_only=True) as reader:
        assert reader.payload_indexes() == sorted(KEYS)
        check(reader)
        with pytest.raises(ReadOnly):
            reader.index_payload("n")
    assert shop.drop_payload_index("label")
    assert not shop.drop_payload_index("label")
    shop._row_sets._sets.clear()
    check(shop)


def test_an_index_is_used_where_it_leaves_little(shop):
    rare = parse_filter({"must": [{"key": "price", "range": {"gte": 17, "lt": 20}}]})
    broad = parse_filter({"must": [{"key": "price", "range": {"gte": 17}}]})
    both = Filter(must=(broad, Match("label", ("label 3",))))
    with shop._catalog.reading() as db:
        assert indexes.narrowed(db, rare) is None
    shop.index_payload("price")
    shop.index_payload("label")
    with shop._catalog.reading() as db:
        candidates = indexes.narrowed(db, rare)
        plan = db.execute(f"EXPLAIN QUERY PLAN {candidates.sql}", candidates.parameters).fetchall()
        assert all("INDEX payload" in step[3] for step in plan if "items" in step[3])
        assert indexes.narrowed(db, broad) is None
        assert "label" in indexes.narrowed(db, both).sql
        assert len(matching_rows(db, rare)) == 3
        assert indexes.narrowed(db, Filter(should=(rare,))) is None


def test_paths_that_cannot_be_indexed_are_refused(shop):
    for key in ("shops[].city", "a..b", "", "a\\b"):
        with pytest.raises(UsageError, match="payload index"):
            shop.index_payload(key)
    assert shop.payload_indexes() == []


def test_the_command_makes_lists_and_drops_them(shop, tmp_path):
    app = typer.Typer()
    app.command()(payload_index)
    shop.close()

    def run(*arguments):
        result = CliRunner().invoke(app, [str(tmp_path / "shop"), *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    assert "none" in run()
    assert run("label", "price").splitlines() == ["label", "price"]
    assert json.loads(run("--json")) == {"payload_indexes": ["label", "price"]}
    assert run("label", "--drop").splitlines() == ["price"]
