"""Manifests: one row per picture, in CSV or parquet.

Columns: `path` (needed; relative to the manifest's folder, or absolute), `label`, `split` (train, validation
or val, test, query, gallery), `box` (left, top, right, bottom in pixels of the upright picture), `query` and
`gallery` (true or false; also spelled is_query, is_gallery). Every other column becomes payload.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dml.data.layouts import split_and_role
from dml.data.table import SPLIT_NAMES, Box, ImageTable, Record, Role
from dml.errors import DataError
from dml.storage import written_aside

_ALIASES = {"is_query": "query", "is_gallery": "gallery"}
_OWN = ("path", "label", "split", "box", "query", "gallery")
_TRUE, _FALSE = {"true", "1", "yes"}, {"false", "0", "no", ""}
_SHOWN = 10
"""How many bad rows a message lists."""

Row = dict[str, Any]


class _BadCell(Exception):
    """What is wrong with a row; the reader adds where."""


def read_manifest(path: Path) -> ImageTable:
    """Read a manifest; pictures themselves are not opened.

    Raises:
        DataError: an unreadable file, no `path` column, rows that cannot be used (all counted, the first ones
            listed with their line), or a wrong root (not one of the first files exists).
    """
    rows = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    if not rows:
        raise DataError(f"{path} has a header but no rows; add one row per picture")
    records, problems = [], []
    for line, row in rows:
        try:
            records.append(_record(row, path.parent))
        except _BadCell as problem:
            problems.append(
                f"line {line}: {problem}" if path.suffix.lower() != ".parquet" else f"row {line}: {problem}"
            )
    problems += _without_split(records)
    if problems:
        more = f"\n  … and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
        shown = "\n  ".join(problems[:_SHOWN])
        raise DataError(
            f"{path} has {len(problems):,} rows that cannot be used:\n  {shown}{more}\nCorrect these rows."
        )
    check_some_exist(path, records)
    extra = [name for name in rows[0][1] if name not in _OWN]
    notes = (f"further columns kept as payload: {', '.join(extra)}",) if extra else ()
    layout = f"{path.suffix.lower().lstrip('.')} manifest"
    return ImageTable(path.stem, path.parent, layout, tuple(records), notes)


def _record(row: Row, folder: Path) -> Record:
    name = _text(row.get("path"))
    if not name:
        raise _BadCell("the path is empty")
    split, role = _split(row)
    payload = {key: value for key, value in row.items() if key not in _OWN and value is not None}
    return Record(folder / name, _text(row.get("label")), split, _box(row.get("box")), role, payload)


def _split(row: Row) -> tuple[str | None, Role | None]:
    given = _text(row.get("split"))
    split, role = None, None
    if given is not None:
        if given.lower() not in SPLIT_NAMES:
            guess = get_close_matches(given.lower(), SPLIT_NAMES, n=1)
            hint = f'; did you mean "{guess[0]}"?' if guess else ""
            raise _BadCell(f'unknown split "{given}" (known: {", ".join(SPLIT_NAMES)}){hint}')
        split, role = split_and_role(SPLIT_NAMES[given.lower()])
    query, gallery = (_flag(row.get(name), name) for name in ("query", "gallery"))
    if not (query or gallery):
        return split, role
    if split == "train" or role is not None:
        raise _BadCell(f'the split "{given}" and a query or gallery flag exclude each other')
    return split or "test", None if query and gallery else ("query" if query else "gallery")


def _flag(value: Any, name: str) -> bool:
    text = str("" if value is None else value).strip().lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise _BadCell(f'{name} must be true or false, got "{value}"')


def _box(value: Any) -> Box | None:
    """Four whole numbers, as a list or as text: "10 20 110 220", "10,20,110,220", "[10, 20, 110, 220]"."""
    if value is None or value == "":
        return None
    parts = (
        value.strip("[]() ").replace(",", " ").replace(";", " ").split() if isinstance(value, str) else value
    )
    try:
        left, top, right, bottom = (round(float(part)) for part in parts)
    except (TypeError, ValueError, OverflowError):
        raise _BadCell(f'box must be "left top right bottom" in pixels, got "{value}"') from None
    if left >= right or top >= bottom:
        raise _BadCell(
            f"box {left} {top} {right} {bottom} is empty: left must be below right, and top below bottom"
        )
    return left, top, right, bottom


def _text(value: Any) -> str | None:
    """A cell as text; numbers that pandas made floats (3.0, because of gaps) become whole again."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _without_split(records: Sequence[Record]) -> list[str]:
    missing = [r for r in records if r.split is None]
    if not missing or len(missing) == len(records):
        return []
    return [f"{r.path.name}: no split, while other rows have one" for r in missing]


def check_some_exist(path: Path, records: Sequence[Record], tries: int = 20) -> None:
    """A single missing file is a bad picture like any other; when all are missing, the folder is wrong."""
    first = records[:tries]
    if not any(r.path.exists() for r in first):
        raise DataError(
            f"None of the first {len(first)} files of {path} exists, for instance {first[0].path}. Paths "
            f"count from the folder that the list lies in: move it, or write absolute paths."
        )


def _read_csv(path: Path) -> list[tuple[int, Row]]:
    """(line number, row) of a comma-, semicolon- or tab-separated file."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            delimiter = _delimiter(stream.readline())
            stream.seek(0)
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = _header(next(reader, []), path)
            lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a well-formed table: {error}") from error
    uneven = [line for line, cells in lines if len(cells) != len(header)]
    if uneven:
        raise DataError(
            f"{path} has {len(header)} columns, but {len(uneven):,} lines have more or fewer cells, the "
            f"first one is line {uneven[0]}. Put cells that hold the separator in quotes."
        )
    columns = {
        name: [cells[i] for _, cells in lines] if name in _OWN else _typed([cells[i] for _, cells in lines])
        for i, name in enumerate(header)
    }
    return [
        (line, {name: column[i] for name, column in columns.items()}) for i, (line, _) in enumerate(lines)
    ]


def _delimiter(header: str) -> str:
    return max(",;\t", key=header.count)


def _header(names: Sequence[str], path: Path) -> list[str]:
    header = [name.strip() for name in names]
    header = [_ALIASES.get(name.lower(), name.lower() if name.lower() in _OWN else name) for name in header]
    if "path" not in header:
        guess = get_close_matches("path", header, n=1) or [
            n for n in header if "file" in n.lower() or "image" in n.lower()
        ]
        hint = f' Rename "{guess[0]}" to "path"?' if guess else ""
        raise DataError(
            f'{path} has no column "path"; its columns are {", ".join(header) or "(none)"}.{hint}'
        )
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path} has two columns of the same name: {', '.join(twice)}; rename one")
    return header


def _typed(cells: Sequence[str]) -> list[Any]:
    """Text to numbers or flags where the whole column allows it; empty cells become None."""
    filled = [cell for cell in cells if cell.strip()]
    for read in (_whole, _number, _switch):
        try:
            for cell in filled:
                read(cell)
        except ValueError:
            continue
        return [read(cell) if cell.strip() else None for cell in cells]
    return [cell if cell.strip() else None for cell in cells]


def _whole(cell: str) -> int:
    if str(int(cell)) != cell.strip():  # "007" is a code, not a number
        raise ValueError
    return int(cell)


def _number(cell: str) -> float:
    value = float(cell)
    if not math.isfinite(value) or (
        len(cell.strip()) > 1 and cell.strip()[0] == "0" and cell.strip()[1].isdigit()
    ):
        raise ValueError
    return value


def _switch(cell: str) -> bool:
    if cell.strip().lower() not in ("true", "false"):
        raise ValueError
    return cell.strip().lower() == "true"


def _read_parquet(path: Path) -> list[tuple[int, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a parquet file that can be read: {str(error).splitlines()[0]}"
        ) from error
    table = table.rename_columns(_header(table.column_names, path))
    plain = [{name: _plain(value) for name, value in row.items()} for row in table.to_pylist()]
    return list(enumerate(plain))


def _plain(value: Any) -> Any:
    """What JSON can hold: dates become ISO text, NaN nothing, bytes text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def write_rows(rows: Sequence[Row], path: Path) -> Path:
    """Write rows with the same keys as a manifest, completely or not at all; the ending decides the format.

    Raises:
        DataError: another ending, or a file name that is not UTF-8.
        StorageError: the disk is full or refuses.
    """
    if path.suffix.lower() not in (".csv", ".tsv", ".parquet"):
        raise DataError(f"{path}: a manifest ends in .csv, .tsv or .parquet")
    try:
        with written_aside(path) as aside:
            if path.suffix.lower() == ".parquet":
                _write_parquet(rows, aside)
            else:
                _write_csv(rows, aside, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{path}: the name {error.object!r} is not UTF-8, so no manifest can hold it; rename it"
        ) from error
    return path


def _write_csv(rows: Sequence[Row], path: Path, *, delimiter: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})


def _cell(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return " ".join(map(str, value))
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def _write_parquet(rows: Sequence[Row], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.Table.from_pylist(list(rows)), path)
