"""Filters as conditions of SQLite on the table `items`, whose column `payload` holds JSON text.

Whatever a filter says, keys and values included, is bound as a parameter: the text of a condition depends on
its shape only.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

from dml.collection.filters import (
    INT64,
    Condition,
    Except,
    Exists,
    Filter,
    HasId,
    IsNull,
    Match,
    Range,
    Scalar,
    steps_of,
    time_of,
)

Arms = Mapping[str, str]
"""JSON type -> condition on a value of it, written as {v}."""


def to_sql(filter: Filter) -> tuple[str, dict[str, Any]]:
    """(condition, parameters) for `SELECT … FROM items WHERE …`; the parameters are called :f0, :f1, …

    The connection has to know `dml_time`: see `register`. A condition is 0 or 1, never NULL.
    """
    compiler = _Compiler()
    return compiler.condition(filter), compiler.parameters


def register(db: sqlite3.Connection) -> None:
    """Teach a connection `dml_time(text)`: microseconds since 1970, or NULL for what is no date or time."""
    db.create_function("dml_time", 1, time_of, deterministic=True)


class _Compiler:
    def __init__(self) -> None:
        self.parameters: dict[str, Any] = {}
        self.tables = 0

    def bind(self, value: Any) -> str:
        name = f"f{len(self.parameters)}"
        self.parameters[name] = value
        return f":{name}"

    def table(self) -> str:
        self.tables += 1
        return f"j{self.tables}"

    def condition(self, condition: Condition) -> str:
        match condition:
            case Filter():
                return self.filter(condition)
            case HasId():
                return f"items.id IN {self.listed(condition.ids)}"
            case Match():
                return self.at(condition.key, self.among(condition.values))
            case Except():
                return self.at(condition.key, self.not_among(condition.values))
            case Range():
                return self.at(condition.key, self.within(condition))
            case Exists():
                types = ("text", "integer", "real", "true", "false", "object", "array")
                return self.at(condition.key, dict.fromkeys(types, "1"))
            case IsNull():
                return self.at(condition.key, {"null": "1"})

    def filter(self, filter: Filter) -> str:
        clauses = [self.condition(entry) for entry in filter.must]
        if filter.should:
            clauses.append(f"({' OR '.join(self.condition(entry) for entry in filter.should)})")
        clauses += [f"NOT {self.condition(entry)}" for entry in filter.must_not]
        return f"({' AND '.join(clauses)})" if clauses else "(1)"

    # Values

    def number(self, value: float) -> str:
        """A number; a float goes as JSON, so that SQLite reads it as it reads the payload's: what it makes of
        the same digits in a text may differ in the last bit."""
        if isinstance(value, int) and -INT64 <= value < INT64:
            return self.bind(value)
        return f"json_extract({self.bind(json.dumps(value))}, '$')"

    def listed(self, values: Sequence[Scalar]) -> str:
        return f"(SELECT value FROM json_each({self.bind(json.dumps(values, ensure_ascii=False))}))"

    def among(self, values: Sequence[Scalar]) -> Arms:
        texts, numbers, flags = by_type(values)
        arms = {"true" if flag else "false": "1" for flag in flags}
        if texts:
            equal = f"= {self.bind(texts[0])}" if len(texts) == 1 else f"IN {self.listed(texts)}"
            arms["text"] = f"{{v}} {equal}"
        if numbers:
            equal = f"= {self.number(numbers[0])}" if len(numbers) == 1 else f"IN {self.listed(numbers)}"
            arms["integer"] = arms["real"] = f"{{v}} {equal}"
        return arms

    def not_among(self, values: Sequence[Scalar]) -> Arms:
        texts, numbers, flags = by_type(values)
        arms = {"true" if flag else "false": "1" for flag in (True, False) if flag not in flags}
        arms["text"] = f"{{v}} NOT IN {self.listed(texts)}"
        arms["integer"] = arms["real"] = f"{{v}} NOT IN {self.listed(numbers)}"
        return arms

    def within(self, condition: Range) -> Arms:
        bounds = condition.bounds()
        if any(isinstance(bound, str) for _, bound in bounds):
            tests = [f"dml_time({{v}}) {operator} {self.bind(time_of(bound))}" for operator, bound in bounds]
            return {"text": f"ifnull({' AND '.join(tests)}, 0)"}
        tests = [f"{{v}} {op} {self.number(bound)}" for op, bound in bounds if not isinstance(bound, str)]
        return dict.fromkeys(("integer", "real"), " AND ".join(tests))

    # Places

    def at(self, key: str, arms: Arms) -> str:
        """One of the values at a path meets the arm of its type."""
        parts = parts_of(key)
        place, tables = self.bind(parts[0]), []
        for part in parts[1:]:
            table = self.table()
            tables.append(f"json_each(items.payload, {place}) AS {table}")
            # Entries of a list are numbered; members of an object are not meant, and NULL leads nowhere.
            place = (
                f"CASE typeof({table}.key) WHEN 'integer' "
                f"THEN {place} || '[' || {table}.key || ']' || {self.bind(part)} END"
            )
        held = self.value_at(place, arms)
        return f"EXISTS (SELECT 1 FROM {', '.join(tables)} WHERE {held})" if tables else held

    def value_at(self, place: str, arms: Arms) -> str:
        """The value at one place, or an entry of the list there, meets the arm of its type."""
        leaf = self.table()
        entries = (
            f"EXISTS (SELECT 1 FROM json_each(items.payload, {place}) AS {leaf} "
            f"WHERE {case(f'{leaf}.type', arms, f'{leaf}.atom')})"
        )
        itself = {kind: arm for kind, arm in arms.items() if kind != "array"}
        return case(
            f"json_type(items.payload, {place})",
            {"array": entries, **itself},
            f"json_extract(items.payload, {place})",
        )


def case(kind: str, arms: Arms, value: str) -> str:
    """0 or 1 by the type of a value; also for no value, whose type is NULL."""
    if not arms:
        return "0"
    whens = " ".join(f"WHEN '{name}' THEN {arm.replace('{v}', value)}" for name, arm in arms.items())
    return f"CASE {kind} {whens} ELSE 0 END"


def parts_of(key: str) -> list[str]:
    """The path in SQLite's words, cut at each "[]": ['$."shops"', '."city"'] for shops[].city."""
    parts = ["$"]
    for step in steps_of(key):
        if step is None:
            parts.append("")
        else:
            parts[-1] += f"[{step}]" if isinstance(step, int) else f'."{step}"'
    return parts


def by_type(values: Sequence[Scalar]) -> tuple[list[str], list[int | float], set[bool]]:
    """Texts, numbers and truth values apart."""
    texts = [value for value in values if isinstance(value, str)]
    flags = {value for value in values if isinstance(value, bool)}
    numbers = [value for value in values if not isinstance(value, str | bool)]
    return texts, numbers, flags
