"""What a filter means: read with pointers, the same in Python and in SQLite, never a text in the SQL."""

import json
import sqlite3

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dml.collection.filters import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_VALUES,
    Exists,
    Filter,
    HasId,
    IsNull,
    Match,
    Range,
    canonical,
    matches,
    parse_filter,
    parse_where,
    steps_of,
    time_of,
    to_json,
)
from dml.collection.filters_sql import register, to_sql
from dml.errors import FilterInvalid


class Table:
    """Rows of a catalogue in SQLite, and what a filter selects among them."""

    def __init__(self, payloads):
        self.payloads = {f"i{n}": payload for n, payload in enumerate(payloads)}
        self.db = sqlite3.connect(":memory:")
        register(self.db)
        self.db.execute("CREATE TABLE items (id TEXT NOT NULL UNIQUE, payload TEXT NOT NULL)")
        rows = ((id, json.dumps(p, ensure_ascii=False)) for id, p in self.payloads.items())
        self.db.executemany("INSERT INTO items VALUES (?, ?)", rows)

    def __del__(self):
        self.db.close()

    def by_sql(self, filter):
        where, parameters = to_sql(filter)
        return {id for (id,) in self.db.execute(f"SELECT id FROM items WHERE {where}", parameters)}

    def by_definition(self, filter):
        return {id for id, payload in self.payloads.items() if matches(filter, payload, id)}

    def select(self, tree):
        """Ids' numbers, after checking that both agree and that the tree survives JSON."""
        filter = parse_filter(tree)
        found = self.by_sql(filter)
        assert found == self.by_definition(filter)
        assert found == self.by_sql(parse_filter(json.loads(canonical(filter))))
        return sorted(int(id[1:]) for id in found)


def must(*conditions):
    return {"must": list(conditions)}


def value(key, wanted):
    return must({"key": key, "match": {"value": wanted}})


# Meaning, case by case


def test_must_should_and_must_not_combine():
    table = Table([{"a": n % 2, "b": n % 3} for n in range(6)])
    assert table.select({}) == [0, 1, 2, 3, 4, 5]
    assert table.select({"must": [], "should": []}) == [0, 1, 2, 3, 4, 5]
    odd, third = {"key": "a", "match": {"value": 1}}, {"key": "b", "match": {"value": 0}}
    assert table.select({"must": [odd, third]}) == [3]
    assert table.select({"should": [odd, third]}) == [0, 1, 3, 5]
    assert table.select({"must_not": [odd, third]}) == [2, 4]
    assert table.select({"must": [odd], "must_not": [third]}) == [1, 5]
    assert table.select({"must": odd}) == [1, 3, 5]  # one condition needs no list
    assert table.select({"must_not": [{"must": [odd], "should": [third]}]}) == [0, 1, 2, 4, 5]
    assert table.select({"must": [{"must": []}]}) == [0, 1, 2, 3, 4, 5]
    assert table.select({"should": [{"must": []}, odd]}) == [0, 1, 2, 3, 4, 5]


def test_types_matter():
    payloads = [
        {"v": v} for v in (1, 1.0, True, "1", "true", None, 0, False, "", 0.0, [1], ["1"], {"v": 1}, -0.0)
    ]
    table = Table([*payloads, {}])
    assert table.select(value("v", 1)) == [0, 1, 10]
    assert table.select(value("v", 1.0)) == [0, 1, 10]
    assert table.select(value("v", True)) == [2]
    assert table.select(value("v", "1")) == [3, 11]
    assert table.select(value("v", False)) == [7]
    assert table.select(value("v", 0)) == [6, 9, 13]
    assert table.select(value("v", "")) == [8]
    assert table.select(must({"key": "v", "match": {"any": [1, "true", False]}})) == [0, 1, 4, 7, 10]
    assert table.select(must({"key": "v", "match": {"any": []}})) == []
    assert table.select(must({"key": "v", "match": {"except": []}})) == [
        0,
        1,
        2,
        3,
        4,
        6,
        7,
        8,
        9,
        10,
        11,
        13,
    ]
    assert table.select(must({"key": "v", "match": {"except": [1, "1", 0, ""]}})) == [2, 4, 7]
    assert table.select(must({"is_null": {"key": "v"}})) == [5]
    assert table.select(must({"exists": {"key": "v"}})) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13]
    assert table.select(must({"is_empty": {"key": "v"}})) == [5, 14]


def test_a_list_stands_for_its_entries():
    table = Table(
        [
            {"v": ["a", "b"]},
            {"v": []},
            {"v": [None]},
            {"v": [["a"]]},
            {"v": [{"w": "a"}]},
            {"v": "a"},
            {"v": {"w": ["a"]}},
        ]
    )
    assert table.select(value("v", "a")) == [0, 5]
    assert table.select(must({"key": "v", "match": {"except": ["a"]}})) == [0]  # "b" is none of them
    assert table.select({"must_not": [{"key": "v", "match": {"value": "a"}}]}) == [1, 2, 3, 4, 6]
    assert table.select(must({"exists": {"key": "v"}})) == [0, 3, 4, 5, 6]
    assert table.select(must({"is_null": {"key": "v"}})) == [2]
    assert table.select(value("v[]", "a")) == [0, 3]
    assert table.select(value("v[0]", "a")) == [0, 3]
    assert table.select(value("v[1]", "b")) == [0]
    assert table.select(value("v[].w", "a")) == [4]
    assert table.select(value("v.w", "a")) == [6]


def test_paths_lead_through_members_lists_and_quoted_names():
    shop = {"city": "Ulm", "open": [{"day": 1, "hours": [9, 17]}, {"day": 2, "hours": [10, 12]}]}
    table = Table(
        [
            {"shops": [shop, {"city": "Bonn"}]},
            {"shops": {"city": "Ulm", "0": "Ulm"}},
            {"a.b": {"c": 1}, "": 5, "ключ ☃": "да", "$": 1, "#": 2, "a b": 3, "'; DROP TABLE items; --": 4},
            {"0": [[[7, 8]]], "shops": "Ulm"},
        ]
    )
    assert table.select(value("shops[].city", "Bonn")) == [0]
    assert table.select(value("shops[0].city", "Ulm")) == [0]
    assert table.select(value("shops[1].city", "Ulm")) == []
    assert table.select(value("shops.city", "Ulm")) == [1]
    assert table.select(value('shops."0"', "Ulm")) == [1]
    assert table.select(value("shops.0", "Ulm")) == [1]
    assert table.select(value("shops[].open[].hours", 12)) == [0]
    assert table.select(value("shops[].open[].hours[0]", 9)) == [0]
    assert table.select(value("shops[].open[].day", 3)) == []
    assert table.select(value('"a.b".c', 1)) == [2]
    for key, number in (('""', 5), ("$", 1), ("#", 2), ("a b", 3), ("'; DROP TABLE items; --", 4)):
        assert table.select(value(key, number)) == [2]
    assert table.select(value("ключ ☃", "да")) == [2]
    assert table.select(value("0[0][][1]", 8)) == [3]
    assert table.select(value("0[][][]", 7)) == [3]


def test_ranges_hold_numbers_between_numbers():
    table = Table(
        [{"p": p} for p in (1, 2.5, 10, "5", True, None, [0, 7], 2**53 + 1, -1e-3, 2**70, -(2**70))]
    )
    assert table.select(must({"key": "p", "range": {"gt": 1}})) == [1, 2, 6, 7, 9]
    assert table.select(must({"key": "p", "range": {"gte": 1, "lt": 10}})) == [0, 1, 6]
    assert table.select(must({"key": "p", "range": {"gte": 2**53 + 1, "lte": 2**53 + 1}})) == [7]
    assert table.select(must({"key": "p", "range": {"gt": 2.0**53, "lt": 1e17}})) == [7]
    assert table.select(must({"key": "p", "range": {"lt": 0}})) == [8, 10]
    assert table.select(must({"key": "p", "range": {"gte": 2**70}})) == [9]
    assert table.select(value("p", 2**70)) == [9]
    assert table.select(must({"key": "p", "range": {"gt": 3, "lt": 5}})) == []  # 0 and 7 are two values
    assert table.select(must({"key": "p", "range": {"gt": 1, "gte": None, "lt": 3, "lte": None}})) == [1]


def test_ranges_hold_moments_between_moments():
    made = (
        "2024-05-31", "2024-05-31T12:00:00Z", "2024-05-31T12:00:00+02:00", "2024-05-31 12:00:00.250001",
        "2024-06-01", "2024-02-31", "2024", 1717113600, None, ["x", "2024-05-31T23:59"],
        "0001-01-01T00:00+23:59",
    )  # fmt: skip
    table = Table([{"made": m} for m in made])
    assert table.select(must({"key": "made", "range": {"gte": "2024-05-31", "lt": "2024-06-01"}})) == [
        0,
        1,
        2,
        3,
        9,
    ]
    assert table.select(
        must({"key": "made", "range": {"gt": "2024-05-31T12:00:00Z", "lt": "2024-06-01"}})
    ) == [3, 9]
    assert table.select(must({"key": "made", "range": {"lte": "2024-05-31T10:00Z"}})) == [0, 2, 10]
    later = must(
        {"key": "made", "range": {"gt": "2024-05-31 12:00:00.25", "lt": "2024-05-31 12:00:00.250002"}}
    )
    assert table.select(later) == [3]
    assert table.select({"must_not": [{"key": "made", "range": {"gt": "1970-01-01"}}]}) == [5, 6, 7, 8, 10]


def test_ids_can_be_asked_for():
    table = Table([{}] * 4)
    assert table.select(must({"has_id": ["i1", "i3", "nobody"]})) == [1, 3]
    assert table.select(must({"has_id": []})) == []
    assert table.select({"must_not": [{"has_id": ["i1"]}]}) == [0, 2, 3]


HOSTILE = [
    "' OR 1=1 --",
    '" OR ""="',
    "x'); DROP TABLE items; --",
    "%",
    "_",
    "?",
    ":f0",
    "{v}",
    "$.a",
    "*",
    "NULL",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_of_a_filter_stands_in_the_sql(text):
    table = Table([{"a": text}, {"a": "innocent"}, {text: 1} if '"' not in text else {"b": 1}])
    assert table.select(value("a", text)) == [0]
    assert table.select(must({"key": "a", "match": {"any": [text, "other"]}})) == [0]
    assert table.select(must({"key": "a", "match": {"except": [text]}})) == [1]
    assert table.select(must({"has_id": [text]})) == []
    shape = to_sql(parse_filter(value("a", "plain")))[0]
    assert to_sql(parse_filter(value("a", text)))[0] == shape
    if '"' not in text and "." not in text:
        assert table.select(value(text, 1)) == [2]
        assert to_sql(parse_filter(value(text, "plain")))[0] == shape


# Python and SQLite agree

KEYS = ["a", "b", "ü", "a.b", "0", "", "a b"]
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from(
        [0.5, 1.0, -0.0, 2.5, 1e16, 2**53, 2**53 + 1, 2.0**53, 2**63, 2**63 - 1, -(2**63), 10**25, 1e25]
    ),
    st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
    st.integers(-(2**80), 2**80),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["1", "1.0", "true", "null", "", "a", "ü", "2024-05-31", "2024-05-31T10:00:00Z", "'", '"', "\\", "\n"]
    ),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4),
)
SCALARS = st.one_of(st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    st.one_of(st.none(), SCALARS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=8,
)
PAYLOADS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)
NAMES = st.sampled_from(["a", "b", "ü", '"a.b"', "0", '""', "a b"])
PATHS = st.builds(
    lambda first, rest: first + "".join(rest),
    NAMES,
    st.lists(st.one_of(st.sampled_from(["[]", "[0]", "[1]"]), NAMES.map(".".__add__)), max_size=3),
)
TIMES = st.one_of(
    st.sampled_from(["2024-05-31", "2024-05-31T10:00:00Z"]), st.datetimes().map(lambda t: t.isoformat())
)


def ranges(ends):
    names = st.sampled_from(["gt", "gte", "lt", "lte"])
    return st.dictionaries(names, ends, min_size=1, max_size=2)


CONDITIONS = st.one_of(
    st.builds(lambda k, v: {"key": k, "match": {"value": v}}, PATHS, SCALARS),
    st.builds(
        lambda k, how, v: {"key": k, "match": {how: v}},
        PATHS, st.sampled_from(["any", "except"]), st.lists(SCALARS, max_size=3),
    ),
    st.builds(lambda k, r: {"key": k, "range": r}, PATHS, st.one_of(ranges(NUMBERS), ranges(TIMES))),
    st.builds(lambda name, k: {name: {"key": k}}, st.sampled_from(["exists", "is_null", "is_empty"]), PATHS),
    st.builds(lambda ids: {"has_id": ids}, st.lists(st.sampled_from(["i0", "i1", "nobody"]), max_size=2)),
)  # fmt: skip
TREES = st.recursive(
    st.dictionaries(st.sampled_from(["must", "should", "must_not"]), st.lists(CONDITIONS, max_size=3)),
    lambda inner: st.dictionaries(
        st.sampled_from(["must", "should", "must_not"]), st.lists(st.one_of(CONDITIONS, inner), max_size=3)
    ),
    max_leaves=4,
)


def test_python_and_sqlite_agree_on_random_payloads_and_trees(scale):
    @settings(max_examples=150 * scale, deadline=None)
    @given(st.lists(PAYLOADS, min_size=1, max_size=4), st.lists(TREES, min_size=1, max_size=4))
    def agree(payloads, trees):
        table = Table(payloads)
        for tree in trees:
            table.select(tree)

    agree()


def test_every_value_of_a_payload_is_found_by_itself(scale):
    @settings(max_examples=100 * scale, deadline=None)
    @given(st.lists(SCALARS, min_size=1, max_size=5))
    @example([4.6698086128793073e-296])
    @example([10**300, -(10**30), 2**63, -(2**63), 0.1])
    def found(values):
        table = Table([{"v": v} for v in values])
        for number, wanted in enumerate(values):
            assert number in table.select(value("v", wanted))
            assert number not in table.select({"must_not": [{"key": "v", "match": {"any": [wanted]}}]})

    found()


# Reading

WRONG = [
    ([], "", "an object, got a list"),
    ("x", "", "an object, got 'x'"),
    ({"most": []}, "", 'no "most"; it takes: must, should, must_not'),
    ({"must": "x"}, "/must", "a list of conditions"),
    ({"must": [1]}, "/must/0", "a condition is an object, got 1"),
    ({"should": [{"key": "a"}]}, "/should/0", "exactly one of"),
    ({"must": [{"key": "a", "match": {"value": 1}, "range": {"gt": 1}}]}, "/must/0", "exactly one of"),
    ({"must": [{"match": {"value": 1}}]}, "/must/0", '"match" makes no condition here'),
    ({"must": [{"key": "a", "geo_radius": {}}]}, "/must/0", 'no "geo_radius"'),
    ({"must": [{"key": 5, "match": {"value": 1}}]}, "/must/0/key", "a key is text, got 5"),
    ({"must": [{"key": "", "match": {"value": 1}}]}, "/must/0/key", "1 to 512 characters"),
    ({"must": [{"key": "a..b", "match": {"value": 1}}]}, "/must/0/key", "from character 2 on"),
    ({"must": [{"key": "a[x]", "match": {"value": 1}}]}, "/must/0/key", "no path"),
    ({"must": [{"key": '"a', "match": {"value": 1}}]}, "/must/0/key", "no path"),
    ({"must": [{"key": "a\\b", "match": {"value": 1}}]}, "/must/0/key", "backslashes"),
    ({"must": [{"key": "a\nb", "match": {"value": 1}}]}, "/must/0/key", "controls"),
    ({"must": [{"key": "a[][][][][]", "match": {"value": 1}}]}, "/must/0/key", "more than"),
    ({"must": [{"key": "a", "match": 1}]}, "/must/0/match", "an object, got 1"),
    ({"must": [{"key": "a", "match": {"text": "x"}}]}, "/must/0/match", 'no "text"; it takes: value, any'),
    ({"must": [{"key": "a", "match": {}}]}, "/must/0/match", "exactly one of"),
    ({"must": [{"key": "a", "match": {"value": None}}]}, "/must/0/match/value", "is_null"),
    ({"must": [{"key": "a", "match": {"value": [1]}}]}, "/must/0/match/value", "got a list"),
    ({"must": [{"key": "a", "match": {"value": float("nan")}}]}, "/must/0/match/value", "finite"),
    ({"must": [{"key": "a", "match": {"value": 10**400}}]}, "/must/0/match/value", "finite"),
    ({"must": [{"key": "a", "match": {"value": "a\0b"}}]}, "/must/0/match/value", "NUL"),
    ({"must": [{"key": "a", "match": {"value": "\ud800"}}]}, "/must/0/match/value", "surrogate"),
    ({"must": [{"key": "a", "match": {"value": "x" * 20_000}}]}, "/must/0/match/value", "16,384"),
    ({"must": [{"key": "a", "match": {"any": [1, {}]}}]}, "/must/0/match/any/1", "got an object"),
    ({"must": [{"key": "a", "match": {"any": [1] * (MAX_VALUES + 1)}}]}, "/must/0/match/any", "10,000"),
    ({"must": [{"key": "a", "range": {}}]}, "/must/0/range", "at least one"),
    ({"must": [{"key": "a", "range": {"from": 1}}]}, "/must/0/range", 'no "from"'),
    ({"must": [{"key": "a", "range": {"gt": True}}]}, "/must/0/range/gt", "got true"),
    ({"must": [{"key": "a", "range": {"gt": "soon"}}]}, "/must/0/range/gt", "got the text"),
    ({"must": [{"key": "a", "range": {"gt": "2024-02-31"}}]}, "/must/0/range/gt", "got the text"),
    ({"must": [{"key": "a", "range": {"gt": 1, "lt": "2024-01-01"}}]}, "/must/0/range", "not both"),
    ({"must": [{"exists": "a"}]}, "/must/0/exists", "an object"),
    ({"must": [{"exists": {}}]}, "/must/0/exists", '"key" is missing'),
    ({"must": [{"is_null": {"key": "a", "x": 1}}]}, "/must/0/is_null", 'no "x"'),
    ({"must_not": [{"has_id": "a"}]}, "/must_not/0/has_id", "a list of ids"),
    ({"must_not": [{"has_id": ["a", 5]}]}, "/must_not/0/has_id/1", "an id is text, got 5"),
    ({"must": [{"should": [{"is_null": {"key": []}}]}]}, "/must/0/should/0/is_null/key", "got a list"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "pointer", "detail"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named_with_its_place(tree, pointer, detail):
    with pytest.raises(FilterInvalid) as caught:
        parse_filter(tree)
    assert caught.value.pointer == pointer
    assert detail in caught.value.detail
    assert str(caught.value) == f"filter{pointer}: {caught.value.detail}"
    assert len(str(caught.value)) < 300


def test_trees_have_bounds():
    tree = {"must": [{"exists": {"key": "a"}}]}
    for _ in range(MAX_DEPTH - 1):
        tree = {"must": [tree]}
    table = Table([{"a": 1}, {}])
    assert table.select(tree) == [0]
    with pytest.raises(FilterInvalid, match="nested 16 deep"):
        parse_filter({"must": [tree]})
    wide = [{"key": f"a{n}", "match": {"any": [1, "x"]}} for n in range(MAX_CONDITIONS)]
    for clause in ("must", "should", "must_not"):
        table.select({clause: wide})  # SQLite's own limits are not reached
    with pytest.raises(FilterInvalid, match="256 conditions"):
        parse_filter({"should": [*wide, wide[0]]})
    everything = [f"i{n}" for n in range(MAX_VALUES)]
    assert table.select(must({"has_id": everything})) == [0, 1]


def test_a_tree_is_data():
    tree = {
        "must": [{"key": "a", "match": {"any": [1, "x"]}}, {"key": "b", "range": {"gt": 1, "lte": 2.5}}],
        "should": [{"exists": {"key": "c"}}, {"is_null": {"key": "d[].e"}}],
        "must_not": [{"has_id": ["x"]}, {"should": [{"key": "a", "match": {"except": [True]}}]}],
    }
    filter = parse_filter(tree)
    assert filter.must[0] == Match("a", (1, "x"))
    assert filter.must[1] == Range("b", gt=1, lte=2.5)
    assert filter.should == (Exists("c"), IsNull("d[].e"))
    assert filter.must_not[0] == HasId(("x",))
    assert to_json(filter) == tree
    assert parse_filter(filter) is filter
    assert canonical(filter) == canonical(parse_filter(json.loads(json.dumps(tree))))
    assert canonical(Filter(must=(Match("a", (True,)),))) != canonical(Filter(must=(Match("a", (1,)),)))
    empty = [{}, {"must": []}, {"must": [{}]}, {"should": [{"must": [{}]}, {"has_id": []}]}]
    assert not any(parse_filter(tree) for tree in empty)
    some = [{"must_not": [{}]}, {"must": [{}, {"has_id": []}]}, {"should": [{"must_not": [{}]}]}]
    assert all(parse_filter(tree) for tree in some)
    assert steps_of('a[].b[3]."c.d"') == ("a", None, "b", 3, "c.d")


# Shorthand


def test_conditions_as_people_type_them():
    table = Table(
        [
            {"label": "boot", "price": 10, "size": "42", "sold": True, "made": "2024-03-01"},
            {"label": "shoe", "price": 25.5, "size": 42, "sold": "true", "made": "2024-07-01"},
            {"label": "a=b", "price": "10"},
        ]
    )

    def where(*texts):
        return table.select(to_json(parse_where(texts)))

    assert where("label=boot") == [0]
    assert where("label = a=b") == [2]
    assert where("label!=boot") == [1, 2]
    assert where("price<20") == [0]
    assert where("price >= 10", "price<=25.5") == [0, 1]
    assert where("size=42") == [0, 1]  # a column of a table may hold either
    assert where("sold=true") == [0, 1]
    assert where("made>2024-05-01") == [1]
    assert where("label=") == []
    assert where() == [0, 1, 2]


@pytest.mark.parametrize("text", ["label", "=x", "price<cheap", "a..b=1", "price<"])
def test_a_condition_that_cannot_be_read_is_named(text):
    with pytest.raises(FilterInvalid) as caught:
        parse_where([text])
    assert text in str(caught.value)


def test_moments_are_counted_in_utc():
    assert time_of("1970-01-01") == 0
    assert time_of("1970-01-01T00:00:01.5Z") == 1_500_000
    assert time_of("1970-01-01T01:00+01:00") == 0
    assert time_of("1969-12-31T23:59:59") == -1_000_000
    for text in ("1970", "1970-01", "19700101", "1970-01-01T", "1970-13-01", "today", "", 5, None):
        assert time_of(text) is None
