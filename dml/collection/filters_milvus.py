"""Filters as expressions of Milvus, and what is written beside every payload so that they say the same.

Milvus's own comparisons of JSON differ from version to version: whether `true` equals 1, whether a list is
searched for 2 or 2.0, what `not` makes of a missing key. So each item has, beside its payload,

- `facts`, an array of texts: `label="boot"`, `sizes=42`, `shop.city?`, … one for every path and value, and
- `numbers`, an object: the smallest and the largest number, and moment, at every path.

An expression asks only whether a text is among the facts, which every version answers alike (and can index),
and compares numbers with numbers. What cannot be said exactly, such as two bounds on a list of numbers, is
enclosed between an expression that lets too much pass and one that lets too little; the difference, mostly
nothing, is decided by `filters.matches` on the payload.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dml.collection.filters import (
    INT64,
    MAX_EACH,
    MAX_STEPS,
    Condition,
    Except,
    Exists,
    Filter,
    HasId,
    IsNull,
    Match,
    Range,
    Scalar,
    as_number,
    plain_name,
    steps_of,
    time_of,
)
from dml.data.ids import id_problem
from dml.errors import UsageError

MOST_FACTS = 4096
"""Entries of an array in Milvus, at most."""
LONGEST_FACT = 256
"""Bytes; a longer one is kept as its hash."""
EXACT_FLOATS = 2**53
"""Beyond, not every integer is a float."""

EVERY = 'id != ""'
NONE = 'id == ""'
"""Expressions that every item meets, and that none does: no id is empty."""

Steps = tuple[str | None, ...]
"""A path without indices: names, and None for "[]"."""

PLAIN = re.compile(r"[\w-]+")
READABLE = re.compile(r"[A-Za-z0-9_.-]+")
SCALAR, COMPOUND, SEVERAL, NUMBER, MOMENT = "?", "{", "+", "#", "@"
"""What a fact says after the path: a text, number or truth value is there; an object or list; two or more
different scalars; a number; a moment. `path=value` says which scalar, `path=null` that there is a null."""


@dataclass(frozen=True)
class Facts:
    """What is written beside a payload."""

    facts: list[str]
    numbers: dict[str, int | float]


@dataclass(frozen=True)
class Bounds:
    """Two expressions that enclose a filter: who meets `under` passes, who does not meet `over` does not."""

    over: str
    under: str

    @property
    def exact(self) -> bool:
        return self.over == self.under

    @property
    def between(self) -> str:
        """Those of whom only the payload tells."""
        return all_of([self.over, denied(self.under)])


# Writing


def facts_of(payload: Mapping[str, Any], id: str) -> Facts:
    """The facts of a payload. Raises UsageError for more than Milvus takes."""
    facts: dict[str, None] = {}
    numbers: dict[str, int | float] = {}
    scalars: dict[Steps, set[str]] = {}
    for steps, value in places(payload):
        path = text_of(steps)
        if value is None:
            facts[fact(path, "=null")] = None
        elif not isinstance(value, Scalar):
            facts[fact(path, COMPOUND)] = None
        else:
            name = value_name(value)
            scalars.setdefault(steps, set()).add(name)
            facts[fact(path, SCALAR)] = facts[fact(path, name)] = None
            if len(scalars[steps]) > 1:
                facts[fact(path, SEVERAL)] = None
            for sign, number in numbers_in(value):
                facts[fact(path, sign)] = None
                low, high = number_names(path, sign)
                numbers[low] = min(number, numbers.get(low, number))
                numbers[high] = max(number, numbers.get(high, number))
    if len(facts) > MOST_FACTS:
        raise UsageError(
            f'The payload of item "{id}" says {len(facts):,} things that could be asked for, and Milvus '
            f"keeps {MOST_FACTS:,} at most. Shorten its lists."
        )
    return Facts(list(facts), numbers)


def places(payload: Mapping[str, Any]) -> Iterator[tuple[Steps, Any]]:
    """Every path without indices, and every value that it leads to; see `filters.values_at`."""
    for name, value in payload.items():
        if plain_name(name):  # others cannot be asked for
            yield from _places((name,), value)


def _places(steps: Steps, value: Any) -> Iterator[tuple[Steps, Any]]:
    if isinstance(value, list | tuple):
        yield from ((steps, entry) for entry in value)
    else:
        yield steps, value
    if len(steps) >= MAX_STEPS:
        return
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if plain_name(name):
                yield from _places((*steps, name), inner)
    elif isinstance(value, list | tuple) and steps.count(None) < MAX_EACH:
        for entry in value:
            yield from _places((*steps, None), entry)


def text_of(steps: Iterable[str | None]) -> str:
    """One text per path: shops[].city, "a.b".c."""
    text = ""
    for step in steps:
        if step is None:
            text += "[]"
        else:
            name = step if PLAIN.fullmatch(step) else f'"{step}"'
            text += f".{name}" if text else name
    return text


def fact(path: str, rest: str) -> str:
    """A fact as it is kept: as it reads, or hashed where it is long."""
    text = path + rest
    encoded = text.encode()
    return text if len(encoded) <= LONGEST_FACT else "#" + hashlib.sha256(encoded).hexdigest()


def value_name(value: Scalar) -> str:
    """`="boot"`, `=true`, `=42`: one text per value; 1 and 1.0 are the same."""
    if isinstance(value, str | bool):
        return "=" + json.dumps(value, ensure_ascii=False)
    number = as_number(value)
    if isinstance(number, float) and number.is_integer() and -INT64 <= number < INT64:
        number = int(number)
    return f"={number!r}"


def numbers_in(value: Scalar) -> list[tuple[str, int | float]]:
    """The value as a number or as a moment, in microseconds since 1970."""
    if isinstance(value, bool):
        return []
    if isinstance(value, str):
        moment = time_of(value)
        return [] if moment is None else [(MOMENT, moment)]
    return [(NUMBER, float(as_number(value)))]


def number_names(path: str, sign: str) -> tuple[str, str]:
    """Keys of the smallest and the largest in `numbers`; letters that no version takes for syntax."""
    name = path if READABLE.fullmatch(path) else hashlib.sha256(path.encode()).hexdigest()[:32]
    kind = "number" if sign == NUMBER else "time"
    return f"min {kind} {name}", f"max {kind} {name}"


# Asking


def bounds_of(condition: Condition) -> Bounds:
    """The expressions that enclose a filter or a condition."""
    match condition:
        case Filter():
            return of_filter(condition)
        case HasId():
            ids = [id for id in dict.fromkeys(condition.ids) if id_problem(id) is None]
            return alike(f"id in {listed(ids)}" if ids else NONE)
        case Range():
            found = of_range(*place(condition.key), condition)
        case Match():
            path = place(condition.key)[0]
            found = alike(among(path, map(value_name, condition.values)))
        case Except():
            found = of_except(place(condition.key)[0], condition.values)
        case Exists():
            found = alike(among(place(condition.key)[0], (SCALAR, COMPOUND)))
        case IsNull():
            found = alike(among(place(condition.key)[0], ("=null",)))
    # An entry of a list by its number: all entries are asked, and the payload tells which one it was.
    return Bounds(found.over, NONE) if place(condition.key)[1] else found


def of_filter(filter: Filter) -> Bounds:
    """All of must, one of should, none of must_not."""
    parts = [bounds_of(entry) for entry in filter.must]
    if filter.should:
        choice = [bounds_of(entry) for entry in filter.should]
        parts.append(Bounds(one_of([b.over for b in choice]), one_of([b.under for b in choice])))
    for entry in filter.must_not:
        inner = bounds_of(entry)
        parts.append(Bounds(denied(inner.under), denied(inner.over)))
    return Bounds(all_of([b.over for b in parts]), all_of([b.under for b in parts]))


def of_except(path: str, values: Sequence[Scalar]) -> Bounds:
    """A scalar is there, and one of those there is none of `values`."""
    there, several = among(path, (SCALAR,)), among(path, (SEVERAL,))
    names = list(dict.fromkeys(map(value_name, values)))
    other = denied(among(path, names))
    over = all_of([there, one_of([several, other])])
    # Of two different values one is another than the one that is named.
    return Bounds(over, over if len(names) < 2 else all_of([there, other]))


def of_range(path: str, _indexed: bool, condition: Range) -> Bounds:
    """Within all bounds: of one number at a path exactly, of several as far as the ends tell."""
    bounds, sign = [], NUMBER
    for operator, bound in condition.bounds():
        if isinstance(bound, str):
            sign = MOMENT
            bounds.append((operator, time_of(bound)))
        else:
            bounds.append((operator, bound))
    there = among(path, (sign,))
    if sign == NUMBER and any(abs(bound) > EXACT_FLOATS for _, bound in bounds):
        return Bounds(there, NONE)
    low, high = number_names(path, sign)
    above = [(operator, bound) for operator, bound in bounds if operator[0] == ">"]
    below = [(operator, bound) for operator, bound in bounds if operator[0] == "<"]

    def meets(name: str, ends: Sequence[tuple[str, Any]]) -> list[str]:
        return [f'numbers["{name}"] {operator} {number(bound, sign)}' for operator, bound in ends]

    over = all_of([there, *meets(high, above), *meets(low, below)])
    if not (above and below):
        return alike(over)
    inside = one_of([all_of(meets(low, bounds)), all_of(meets(high, bounds))])
    return Bounds(over, all_of([there, inside]))


def place(key: str) -> tuple[str, bool]:
    """The path as facts name it, and whether it has indices, which are widened to every entry."""
    steps = steps_of(key)
    indexed = any(isinstance(step, int) for step in steps)
    return text_of(None if isinstance(step, int) else step for step in steps), indexed


# Text of expressions


def among(path: str, rests: Iterable[str]) -> str:
    """One of these facts is there."""
    facts = [fact(path, rest) for rest in dict.fromkeys(rests)]
    return f"array_contains_any(facts, {listed(facts)})" if facts else NONE


def number(value: int | float, sign: str) -> str:
    """Numbers are compared as floats, moments as integers."""
    return repr(float(value)) if sign == NUMBER else str(value)


def quoted(text: str) -> str:
    """A text in an expression; nothing in it can end it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    for character, name in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        escaped = escaped.replace(character, name)
    return f'"{escaped}"'


def listed(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(quoted, texts))}]"


def alike(expression: str) -> Bounds:
    return Bounds(expression, expression)


def denied(expression: str) -> str:
    """Not so. The brackets matter: some versions read `not id in […]` as `(not id) in […]`."""
    return f"(not ({expression}))"


def all_of(expressions: Sequence[str]) -> str:
    return f"({' and '.join(expressions)})" if expressions else EVERY


def one_of(expressions: Sequence[str]) -> str:
    return f"({' or '.join(expressions)})" if expressions else NONE
