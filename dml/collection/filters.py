"""Filters on payloads: a tree of conditions that is data, so that every backend can compile it its own way.

::

    {"must":     [{"key": "label", "match": {"value": "boot"}},
                  {"key": "sizes", "match": {"any": [42, 43]}},
                  {"key": "price", "range": {"gte": 20, "lt": 80}}],
     "should":   [{"key": "made", "range": {"gte": "2024-01-01"}}, {"exists": {"key": "shop.city"}}],
     "must_not": [{"has_id": ["boots/7.jpg"]}, {"key": "colour", "match": {"except": ["red", "blue"]}}]}

The shape is Qdrant's. An item passes when it meets all of `must`, at least one of `should` (if there are any)
and none of `must_not`; a filter may stand wherever a condition may.

A key is a path: `shop.city`, `shops[].city` (any entry of a list), `shops[0].city`, `"a.b".c` (a key with a
dot in it). What it leads to are values; a list at the end of the path stands for its entries. A condition
holds when **one** of the values meets it, so it never holds where there is none. Types matter: `true`, 1 and
"1" are three different values, 1 and 1.0 are the same.

`matches` says in Python what a filter means; `filters_sql` says the same to SQLite. Integers beyond 64 bits
are compared as floats.
"""

import json
import math
import operator as operators
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NoReturn

from dml.errors import FilterInvalid

Scalar = str | int | float | bool
Bound = int | float | str
"""An end of a range: a number, or a date or time in ISO 8601."""

MAX_DEPTH = 16
"""Filters inside filters."""
MAX_CONDITIONS = 256
MAX_VALUES = 10_000
"""Values of one condition."""
MAX_KEY = 512
MAX_TEXT = 16_384
"""Characters of a key, and of a value."""
MAX_STEPS = 16
MAX_EACH = 4
"""Steps of a path, and `[]` among them: each multiplies the work."""

INT64 = 2**63
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d{1,6})?)?(Z|[+-]\d\d:?\d\d)?)?", re.ASCII)
STEP = re.compile(r'\.?(?:"(?P<quoted>[^"]*)"|(?P<plain>[^.\[\]"]+))|\[(?P<index>\d{0,9})\]', re.ASCII)


@dataclass(frozen=True)
class Match:
    """One of the values at `key` is one of these."""

    key: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Except:
    """One of the values at `key` (a text, number or truth value) is none of these."""

    key: str
    values: tuple[Scalar, ...]


@dataclass(frozen=True)
class Range:
    """One of the values at `key` lies within all bounds: a number between numbers, or a text that is a date
    or time in ISO 8601 between such; without a zone it is in UTC."""

    key: str
    gt: Bound | None = None
    gte: Bound | None = None
    lt: Bound | None = None
    lte: Bound | None = None

    def bounds(self) -> list[tuple[str, Bound]]:
        """(SQL's and Python's operator, bound) of those that are set."""
        ends = ((">", self.gt), (">=", self.gte), ("<", self.lt), ("<=", self.lte))
        return [(operator, bound) for operator, bound in ends if bound is not None]


@dataclass(frozen=True)
class Exists:
    """There is a value at `key` that is not null. An empty list holds none."""

    key: str


@dataclass(frozen=True)
class IsNull:
    """One of the values at `key` is null. A key that is not there has no value."""

    key: str


@dataclass(frozen=True)
class HasId:
    """The item's id is one of these."""

    ids: tuple[str, ...]


@dataclass(frozen=True)
class Filter:
    """All of `must`, at least one of `should` if there are any, none of `must_not`.

    Filters are equal as Python's values are, where True == 1; `canonical` tells all of them apart.
    """

    must: "tuple[Condition, ...]" = ()
    should: "tuple[Condition, ...]" = ()
    must_not: "tuple[Condition, ...]" = ()

    def __bool__(self) -> bool:
        """Whether anything is asked for. An empty filter, or one of empty filters, lets everything pass."""
        of_all = any(asks(condition) for condition in self.must)
        of_some = bool(self.should) and all(asks(condition) for condition in self.should)
        return of_all or of_some or bool(self.must_not)


Condition = Match | Except | Range | Exists | IsNull | HasId | Filter


def asks(condition: Condition) -> bool:
    """Whether it asks for anything: only an empty filter does not."""
    return not isinstance(condition, Filter) or bool(condition)


EVERYTHING = Filter()
"""The filter that lets every item pass."""


# Reading


def parse_filter(given: Any) -> Filter:
    """A filter from what JSON holds, or the filter that is given; None: everything passes.

    Raises:
        FilterInvalid: with the JSON Pointer of what is wrong.
    """
    if given is None:
        return EVERYTHING
    if isinstance(given, Filter):
        return given
    return _Reader().filter(given, "", depth=1)


class _Reader:
    """Counts the conditions while it reads."""

    def __init__(self) -> None:
        self.conditions = 0

    def filter(self, given: Any, at: str, *, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            refuse(at, f"filters may be nested {MAX_DEPTH} deep at most")
        members(given, at, "a filter", ("must", "should", "must_not"))
        clauses: dict[str, tuple[Condition, ...]] = {}
        for name, clause in given.items():
            entries = [(f"{at}/{name}", clause)] if isinstance(clause, Mapping) else None
            if entries is None:
                check_list(clause, f"{at}/{name}", "conditions")
                entries = [(f"{at}/{name}/{number}", entry) for number, entry in enumerate(clause)]
            clauses[name] = tuple(self.condition(entry, place, depth=depth) for place, entry in entries)
        return Filter(**clauses)

    def condition(self, given: Any, at: str, *, depth: int) -> Condition:
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            refuse(at, f"a filter may have {MAX_CONDITIONS} conditions at most")
        if not isinstance(given, Mapping):
            refuse(at, f"a condition is an object, got {shown(given)}")
        if given.keys() <= {"must", "should", "must_not"}:
            return self.filter(given, at, depth=depth + 1)
        if "key" in given:
            return keyed(given, at)
        if len(given) != 1 or next(iter(given)) not in READ:
            unknown = next((name for name in given if name not in READ), next(iter(given)))
            refuse(at, f'"{unknown}" makes no condition here; {KNOWN}')
        [(name, inner)] = given.items()
        return READ[name](inner, f"{at}/{name}")


def keyed(given: Mapping[str, Any], at: str) -> Condition:
    """{"key": …, "match" or "range": …}."""
    members(given, at, "a condition with a key", ("key", "match", "range"))
    key = read_key(given["key"], f"{at}/key")
    if ("match" in given) == ("range" in given):
        refuse(at, 'a condition with a key has exactly one of "match" and "range"')
    if "match" in given:
        return read_match(key, given["match"], f"{at}/match")
    return read_range(key, given["range"], f"{at}/range")


def read_match(key: str, given: Any, at: str) -> Condition:
    members(given, at, '"match"', ("value", "any", "except"))
    if len(given) != 1:
        refuse(at, '"match" has exactly one of "value", "any" and "except"')
    [(how, values)] = given.items()
    if how == "value":
        return Match(key, (read_scalar(values, f"{at}/value"),))
    check_list(values, f"{at}/{how}", "values")
    read = tuple(read_scalar(value, f"{at}/{how}/{number}") for number, value in enumerate(values))
    return Match(key, read) if how == "any" else Except(key, read)


def read_range(key: str, given: Any, at: str) -> Range:
    members(given, at, '"range"', ("gt", "gte", "lt", "lte"))
    ends: dict[str, Bound] = {}
    for name, bound in given.items():
        if bound is None:
            continue  # as Qdrant's clients write an end that is open
        place = f"{at}/{name}"
        if isinstance(bound, str):
            if time_of(bound) is None:
                refuse(
                    place,
                    f"a bound is a number, or a date or time as 2024-05-31 or 2024-05-31T12:00:00Z; "
                    f'got the text "{bound:.40}"',
                )
        elif isinstance(bound, bool) or not isinstance(bound, int | float):
            refuse(place, f"a bound is a number, a date or a time, got {shown(bound)}")
        ends[name] = read_scalar(bound, place)
    if not ends:
        refuse(at, 'a range has at least one of "gt", "gte", "lt" and "lte"')
    if len({isinstance(bound, str) for bound in ends.values()}) > 1:
        refuse(at, "a range has numbers or times, not both")
    return Range(key, **ends)


def read_key(given: Any, at: str) -> str:
    if not isinstance(given, str):
        refuse(at, f"a key is text, got {shown(given)}")
    try:
        steps_of(given)
    except FilterInvalid as error:
        refuse(at, error.detail)
    return given


def read_scalar(given: Any, at: str) -> Scalar:
    """A value to compare with: text, a number or a truth value."""
    if isinstance(given, str):
        return read_text(given, at)
    if isinstance(given, bool):
        return given
    if isinstance(given, int | float):
        if not math.isfinite(as_number(given)):
            refuse(at, f"a number has to be finite and below 1.8e308, got {given!r:.30}")
        return given
    if given is None:
        refuse(at, 'null is no value to compare with; ask {"is_null": {"key": …}}')
    raise FilterInvalid(f"a value is a text, a number, true or false, got {shown(given)}", pointer=at)


def read_text(given: str, at: str) -> str:
    if len(given) > MAX_TEXT:
        refuse(at, f"a text may have {MAX_TEXT:,} characters at most, got {len(given):,}")
    if "\0" in given:
        refuse(at, "a text may not hold the character NUL")
    try:
        given.encode()
    except UnicodeEncodeError:
        refuse(at, "half a surrogate pair is no text")
    return given


def read_ids(given: Any, at: str) -> HasId:
    check_list(given, at, "ids")
    for number, id in enumerate(given):
        if not isinstance(id, str):
            refuse(f"{at}/{number}", f"an id is text, got {shown(id)}")
    return HasId(tuple(read_text(id, f"{at}/{number}") for number, id in enumerate(given)))


def read_only_key(given: Any, at: str) -> str:
    """The key in {"key": …}."""
    members(given, at, "this condition", ("key",))
    if "key" not in given:
        refuse(at, '"key" is missing')
    return read_key(given["key"], f"{at}/key")


READ: Mapping[str, Callable[[Any, str], Condition]] = MappingProxyType(
    {
        "exists": lambda given, at: Exists(read_only_key(given, at)),
        "is_empty": lambda given, at: Filter(must_not=(Exists(read_only_key(given, at)),)),
        "is_null": lambda given, at: IsNull(read_only_key(given, at)),
        "has_id": read_ids,
    }
)
"""Conditions without a "key" beside them: name -> reader. `is_empty` is Qdrant's word for "not exists"."""

KNOWN = (
    'known: {"key", "match"}, {"key", "range"}, {"exists"}, {"is_empty"}, {"is_null"}, {"has_id"}, and a '
    'filter of "must", "should", "must_not"'
)


def members(given: Any, at: str, what: str, known: Sequence[str]) -> None:
    """Refuse what is no object, or has members that are not known."""
    if not isinstance(given, Mapping):
        refuse(at, f"{what} is an object, got {shown(given)}")
    for name in given:
        if name not in known:
            refuse(at, f'{what} has no "{name!s:.40}"; it takes: {", ".join(known)}')


def check_list(given: Any, at: str, what: str) -> None:
    if not isinstance(given, list | tuple):
        refuse(at, f"a list of {what} belongs here, got {shown(given)}")
    if len(given) > MAX_VALUES:
        refuse(at, f"a list may have {MAX_VALUES:,} {what} at most, got {len(given):,}")


def shown(value: Any) -> str:
    """What was given, in JSON's words and not longer than a line."""
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return f"{value!r:.40}"


def refuse(at: str, detail: str) -> NoReturn:
    raise FilterInvalid(detail, pointer=at)


# Paths


@lru_cache(maxsize=1024)
def steps_of(key: str) -> tuple[str | int | None, ...]:
    """The steps of a path: a member's name, an index, or None for "[]", every entry.

    Raises:
        FilterInvalid: for what is no path.
    """
    if not key or len(key) > MAX_KEY:
        raise FilterInvalid(f"a key has 1 to {MAX_KEY} characters, got {len(key)}")
    steps: list[str | int | None] = []
    place = 0
    while place < len(key):
        found = STEP.match(key, place)
        dotted = key[place] == "."
        if found is None or (key[place] != "[" and dotted != bool(steps)):
            raise FilterInvalid(
                f'"{key:.60}" is no path, from character {place + 1} on; write it as a.b, a[].b, a[0] or '
                f'"with.dots".b'
            )
        index, quoted = found["index"], found["quoted"]
        if index is not None:
            steps.append(int(index) if index else None)
        else:
            steps.append(found["plain"] if quoted is None else quoted)
        place = found.end()
    if any(isinstance(step, str) and not plain_name(step) for step in steps):
        raise FilterInvalid(
            f'"{key!r:.60}": names with quotation marks, backslashes or controls cannot be asked for'
        )
    if len(steps) > MAX_STEPS or steps.count(None) > MAX_EACH:
        raise FilterInvalid(
            f'"{key:.60}" has more than {MAX_STEPS} steps, or more than {MAX_EACH} of them "[]"'
        )
    return tuple(steps)


def plain_name(name: str) -> bool:
    """Whether SQLite compares it byte by byte: what JSON would escape it may not find."""
    return json.dumps(name, ensure_ascii=False) == f'"{name}"' and not any(
        "\ud800" <= c <= "\udfff" for c in name
    )


def values_at(payload: Any, steps: Sequence[str | int | None]) -> Iterator[Any]:
    """The values that a path leads to; a list at its end stands for its entries."""
    if not steps:
        if isinstance(payload, list):
            yield from payload
        else:
            yield payload
        return
    step, rest = steps[0], steps[1:]
    if isinstance(step, str):
        if isinstance(payload, Mapping) and step in payload:
            yield from values_at(payload[step], rest)
    elif isinstance(payload, list):
        for entry in payload if step is None else payload[step : step + 1]:
            yield from values_at(entry, rest)


# Meaning


def matches(condition: Condition, payload: Mapping[str, Any], id: str) -> bool:
    """Whether an item passes: the reference that every backend agrees with."""
    if isinstance(condition, Filter):
        return (
            all(matches(entry, payload, id) for entry in condition.must)
            and (not condition.should or any(matches(entry, payload, id) for entry in condition.should))
            and not any(matches(entry, payload, id) for entry in condition.must_not)
        )
    if isinstance(condition, HasId):
        return id in condition.ids
    return any(holds(condition, value) for value in values_at(payload, steps_of(condition.key)))


def holds(condition: Match | Except | Range | Exists | IsNull, value: Any) -> bool:
    """Whether one value meets a condition."""
    match condition:
        case Exists():
            return value is not None
        case IsNull():
            return value is None
        case Range():
            return within(condition, value)
    if not isinstance(value, Scalar):
        return False
    among = any(same(value, wanted) for wanted in condition.values)
    return among if isinstance(condition, Match) else not among


def same(value: Scalar, wanted: Scalar) -> bool:
    """Equal, and of one type: a truth value is no number."""
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, str) or isinstance(wanted, str):
        return isinstance(value, str) and isinstance(wanted, str) and value == wanted
    return as_number(value) == as_number(wanted)


def within(condition: Range, value: Any) -> bool:
    """Whether a value lies within all bounds; what cannot be compared with them does not."""
    bounds = condition.bounds()
    if any(isinstance(bound, str) for _, bound in bounds):
        value = time_of(value)
        bounds = [(operator, time_of(bound)) for operator, bound in bounds]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    number = as_number(value)
    return all(
        isinstance(bound, int | float) and COMPARE[operator](number, as_number(bound))
        for operator, bound in bounds
    )


COMPARE: Mapping[str, Callable[[Any, Any], bool]] = MappingProxyType(
    {">": operators.gt, ">=": operators.ge, "<": operators.lt, "<=": operators.le}
)


def as_number(value: int | float) -> int | float:
    """The number as SQLite holds it: an integer beyond 64 bits is a float there."""
    if isinstance(value, int) and not -INT64 <= value < INT64:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return value


def time_of(text: Any) -> int | None:
    """Microseconds since 1970 (UTC) of a date or time in ISO 8601; None for anything else."""
    if not isinstance(text, str) or not TIME.fullmatch(text):
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:  # the 31st of February
        return None
    since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


# Writing


def to_json(condition: Condition) -> dict[str, Any]:
    """The tree as JSON; `parse_filter` reads it back."""
    match condition:
        case Filter():
            clauses = {"must": condition.must, "should": condition.should, "must_not": condition.must_not}
            return {name: [to_json(entry) for entry in clause] for name, clause in clauses.items() if clause}
        case Match() | Except():
            how = "any" if isinstance(condition, Match) else "except"
            return {"key": condition.key, "match": {how: list(condition.values)}}
        case Range():
            ends = {"gt": condition.gt, "gte": condition.gte, "lt": condition.lt, "lte": condition.lte}
            return {"key": condition.key, "range": {n: end for n, end in ends.items() if end is not None}}
        case Exists():
            return {"exists": {"key": condition.key}}
        case IsNull():
            return {"is_null": {"key": condition.key}}
        case HasId():
            return {"has_id": list(condition.ids)}


def canonical(condition: Condition) -> str:
    """One text per tree: two filters of the same text mean the same."""
    return json.dumps(to_json(condition), ensure_ascii=False, sort_keys=True, separators=(",", ":"))


# Shorthand


WHERE = re.compile(r"\s*(?P<key>.+?)\s*(?P<sign>!=|<=|>=|=|<|>)\s*(?P<value>.*?)\s*", re.DOTALL)
RANGES: Mapping[str, str] = MappingProxyType({"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"})


def parse_where(texts: Sequence[str]) -> Filter:
    """A filter from conditions as people type them, all of which must hold: "label=boot", "price<20".

    = and != compare with a text; 42 and true are taken for the number or truth value too, since a table's
    columns may hold either. <, <=, > and >= take a number, a date or a time.

    Raises:
        FilterInvalid: naming the text.
    """
    must: list[dict[str, Any]] = []
    must_not: list[dict[str, Any]] = []
    for text in texts:
        found = WHERE.fullmatch(text)
        if found is None:
            refuse("", f'"{text:.60}" is no condition; write it as KEY=VALUE, with one of = != < <= > >=')
        key, sign, value = found["key"], found["sign"], found["value"]
        typed = typed_value(value)
        if sign in RANGES:
            condition = {"key": key, "range": {RANGES[sign]: typed}}
        else:
            condition = {"key": key, "match": {"any": [value] if typed is value else [value, typed]}}
        (must_not if sign == "!=" else must).append(condition)
    try:
        return parse_filter({"must": must, "must_not": must_not})
    except FilterInvalid as error:
        raise FilterInvalid(f"{error.detail} (in {' and '.join(texts):.80})") from None


def typed_value(text: str) -> Scalar:
    """The number or truth value that a text writes, as JSON would, or the text itself."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) and math.isfinite(as_number(value)) else text
