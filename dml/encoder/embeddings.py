"""Whole tables of pictures to vectors on disk, in steps that a kill cannot undo.

::

    OUT/
      manifest.json     format and version, fingerprint of the encoder, dim, where the pictures are, counts,
      complete vectors.npy       (N, D) float32 of unit length             format "npy"
      items.csv         id, path, label, payload of every row     format "npy"
      items.parquet     the same columns and the vector           format "parquet"
      bad_images.csv    path, reason: what was skipped
      parts/            vectors so far and a journal; gone when complete
"""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from dml.data.ids import id_problem, item_ids, relative_path, table_root
from dml.data.reading import check_share
from dml.data.table import ImageTable, Record
from dml.encoder.encoder import BATCH_SIZE, Encoder
from dml.errors import DataError, ModelMismatch, UsageError
from dml.imaging import BadImage
from dml.storage import flush_to_disk, storage_errors, write_aside

FORMAT = "dml-embeddings"
FORMAT_VERSION = 1
COLUMNS = ("id", "path", "label", "payload")
PART_ROWS = 2048
"""Pictures between two marks in the journal: at most this much work is repeated after a kill."""

Format = Literal["npy", "parquet"]


class EmbeddedItem(NamedTuple):
    """One row of an embeddings folder."""

    id: str
    path: str  # relative to the root
    label: str | None
    payload: Mapping[str, Any]  # further columns, and what is known of label, split, role and box


@dataclass(frozen=True)
class Embeddings:
    """An embeddings folder, opened."""

    folder: Path
    manifest: Mapping[str, Any]
    items: tuple[EmbeddedItem, ...]
    vectors: NDArray[np.float32]  # (N, D)
    bad: tuple[BadImage, ...]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """Of the encoder that made the vectors."""
        return self.manifest["fingerprint"]

    @property
    def root(self) -> Path:
        """The folder that the paths are relative to."""
        return Path(self.manifest["root"])


def embed_table(
    encoder: Encoder,
    table: ImageTable,
    out: Path,
    *,
    format: Format = "npy",
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    resume: bool = True,
    max_bad_share: float = 0.05,
    part_rows: int = PART_ROWS,
    on_progress: Callable[[int], object] = lambda done: None,
) -> Embeddings:
    """Embed every picture of a table into `out`; called again after a kill it goes on where it was.

    Args:
        encoder: what makes the vectors.
        table: what to embed; boxes are cut out.
        out: the folder; a finished one of the same encoder and pictures is returned as it is.
        format: "npy" or "parquet".
        batch_size: pictures the encoder takes at once.
        workers: threads that decode, and on a CPU embed; None: as many as there are cores.
        resume: go on with what is in `out`; otherwise it starts anew.
        max_bad_share: fail when more than this share of the pictures cannot be read.
        part_rows: pictures between two marks in the journal.
        on_progress: called with the number of pictures done so far, bad ones included.

    Raises:
        ModelMismatch: `out` was begun with another encoder.
        UsageError: `out` was begun with other pictures, or holds something else.
        TooManyBadImages: more than `max_bad_share`; what was done stays, and is not repeated.
        StorageError: the disk is full or refuses.
    """
    if format not in get_args(Format):
        raise UsageError(f'Unknown format "{format}". Known: {", ".join(get_args(Format))}.')
    out = Path(out)
    manifest = describe(encoder, table, format)
    if not resume:
        clear(out)
    if prepare(out, manifest):
        return open_embeddings(out)
    journal = Journal(out / "parts", len(table.records))
    names = item_names(table)
    on_progress(journal.done)
    require_few(journal, max_bad_share)
    while journal.done < len(table.records):
        start = journal.done
        rows = table.records[start : start + part_rows]
        ids = [id for id, _ in names[start : start + part_rows]]
        vectors, bad = embed_part(
            encoder, rows, ids, batch_size, workers, lambda n, s=start: on_progress(s + n)
        )
        journal.add(len(rows), vectors, bad)
        on_progress(journal.done)
        require_few(journal, max_bad_share)
    finish(out, table, names, journal, manifest)
    return open_embeddings(out)


def describe(encoder: Encoder, table: ImageTable, format: Format) -> dict[str, Any]:
    """The manifest before the first picture: whatever must be the same to go on."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "complete": False,
        "stored_as": format,
        "fingerprint": encoder.fingerprint,
        "profile": str(encoder.profile),
        "dim": encoder.dim,
        "metric": "cosine",
        "encoder": str(encoder.path.resolve()),
        "source": table.name,
        "root": str(table_root(table)),
        "pictures": len(table.records),
        "listing": digest_of_records(table.records),
    }


def digest_of_records(records: Sequence[Record]) -> str:
    """sha256 over which pictures in which order: paths, labels, boxes, sizes and times of change."""
    digest = hashlib.sha256()
    for record in records:
        try:
            state = record.path.stat()
            changed = (state.st_size, state.st_mtime_ns)
        except OSError:
            changed = None  # listed as bad when its turn comes
        line = (str(record.path), record.label, record.box, dict(record.payload), changed)
        digest.update(json.dumps(line, default=str).encode())
    return digest.hexdigest()


def clear(out: Path) -> None:
    """Remove an earlier result, and nothing else."""
    if read_state(out) is None:
        return
    with storage_errors(out):
        shutil.rmtree(out / "parts", ignore_errors=True)
        for name in ("vectors.npy", "items.csv", "items.parquet", "bad_images.csv", "manifest.json"):
            (out / name).unlink(missing_ok=True)


def read_state(out: Path) -> dict[str, Any] | None:
    """The manifest of an embeddings folder, or None where there is none."""
    try:
        tree = json.loads((out / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) and tree.get("format") == FORMAT else None


def prepare(out: Path, manifest: Mapping[str, Any]) -> bool:
    """Begin a folder, or check that the one that is there may be gone on with. True when it is complete
    already.
    """
    state = read_state(out)
    if state is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"{out} exists and holds no embeddings; it is left alone. Give another --out.")
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
        write_json(out / "manifest.json", manifest)
        return False
    if state["format_version"] > FORMAT_VERSION:
        raise UsageError(
            f"{out} has format {state['format_version']}, newer than {FORMAT_VERSION}. Upgrade dml."
        )
    if state["fingerprint"] != manifest["fingerprint"]:
        raise ModelMismatch(
            f"{out} holds vectors of the encoder {state['fingerprint'][:12]}…, and this one is "
            f"{manifest['fingerprint'][:12]}…. Vectors of two encoders cannot be mixed: give another --out, "
            f"or start anew with --no-resume."
        )
    if state.get("profile", manifest["profile"]) != manifest["profile"]:
        raise ModelMismatch(
            f"{out} was begun with the profile {state['profile']}, not {manifest['profile']}. Go on with "
            f"--profile {state['profile']}, give another --out, or start anew with --no-resume."
        )
    if state["listing"] != manifest["listing"]:
        raise UsageError(
            f"The pictures have changed since {out} was begun ({state['pictures']:,} then, "
            f"{manifest['pictures']:,} now, or other files). Give another --out, or begin with --no-resume."
        )
    if state["complete"] and state["stored_as"] != manifest["stored_as"]:
        raise UsageError(
            f'{out} is complete and stored as "{state["stored_as"]}". For "{manifest["stored_as"]}" give '
            f"another --out, or start anew with --no-resume."
        )
    return bool(state["complete"])


class Journal:
    """Parts of a job that are safely on disk: `NNNNNNNN.npy` by the number of their first picture, and one
    line each.

    A part counts once its line is in the journal, and the line is written after the vectors are on disk; a
    line cut short by a kill is ignored, and its part is made again.
    """

    def __init__(self, folder: Path, total: int) -> None:
        self.folder, self.path, self.total = folder, folder / "journal.jsonl", total
        self.lines: list[dict[str, Any]] = []
        with storage_errors(folder):
            folder.mkdir(exist_ok=True)
            text = self.path.read_bytes() if self.path.exists() else b""
            whole = 0
            for raw in text.splitlines(keepends=True):
                line = complete_line(raw)
                if line is None or line["start"] != self.done or line["stop"] > total:
                    break
                self.lines.append(line)
                whole += len(raw)
            if whole < len(text):
                os.truncate(self.path, whole)

    @property
    def done(self) -> int:
        """Pictures that need no more work."""
        return self.lines[-1]["stop"] if self.lines else 0

    @property
    def bad(self) -> list[tuple[int, BadImage]]:
        """Position in the table, and what is wrong."""
        return [(row, BadImage(path, reason)) for line in self.lines for row, path, reason in line["bad"]]

    def add(self, rows: int, vectors: NDArray[np.float32], bad: Sequence[tuple[int, BadImage]]) -> None:
        """Record the next `rows` pictures. `bad` counts from the first of them."""
        start = self.done
        write_aside(self.part(start), lambda aside: save_array(aside, vectors))
        listed = [(start + row, one.path, one.reason) for row, one in bad]
        line = {"start": start, "stop": start + rows, "bad": listed}
        with storage_errors(self.path), self.path.open("ab") as stream:
            stream.write(json.dumps(line).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        flush_to_disk(self.folder)
        self.lines.append(line)

    def part(self, start: int) -> Path:
        return self.folder / f"{start:08d}.npy"

    def parts(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Positions in the table and vectors, part after part."""
        for line in self.lines:
            bad = [row for row, _, _ in line["bad"]]
            kept = np.setdiff1d(np.arange(line["start"], line["stop"]), bad)
            yield kept, np.load(self.part(line["start"]), allow_pickle=False)


def complete_line(raw: bytes) -> dict[str, Any] | None:
    """A line of the journal, or None for one that a kill cut short."""
    if not raw.endswith(b"\n"):
        return None
    try:
        return json.loads(raw)
    except ValueError:
        return None


def embed_part(
    encoder: Encoder,
    rows: Sequence[Record],
    ids: Sequence[str],
    batch_size: int,
    workers: int | None,
    on_progress: Callable[[int], object],
) -> tuple[NDArray[np.float32], list[tuple[int, BadImage]]]:
    """Vectors of the usable rows in order, and the others with their positions: unreadable, or no id."""
    problems = [id_problem(id) for id in ids]
    nameless = [
        (row, BadImage(repr(str(rows[row].path)), problem)) for row, problem in enumerate(problems) if problem
    ]
    named = np.array([row for row, problem in enumerate(problems) if problem is None], np.int64)
    listed: list[BadImage] = []
    vectors, kept = [np.empty((0, encoder.dim), np.float32)], [np.empty(0, np.int64)]
    chosen = [rows[row] for row in named]
    for batch in encoder.embed_stream(chosen, batch_size=batch_size, workers=workers, bad=listed):
        vectors.append(batch.vectors)
        kept.append(named[batch.indices])
        on_progress(int(kept[-1][-1]) + 1)
    missing = np.setdiff1d(named, np.concatenate(kept))
    unread = [(int(row), one) for row, one in zip(missing, listed, strict=True)]
    return np.concatenate(vectors), sorted([*nameless, *unread], key=lambda entry: entry[0])


def require_few(journal: Journal, share: float) -> None:
    """Raise TooManyBadImages as soon as more than this share of all pictures is bad."""
    check_share([one for _, one in journal.bad], journal.total, share, option="--max-bad-share")


def finish(
    out: Path,
    table: ImageTable,
    names: Sequence[tuple[str, str]],
    journal: Journal,
    manifest: Mapping[str, Any],
) -> None:
    """Join the parts, and only then say that the folder is complete."""
    bad = [one for _, one in journal.bad]
    count = len(table.records) - len(bad)
    write_aside(out / "bad_images.csv", lambda aside: write_rows(aside, ("path", "reason"), bad_rows(bad)))
    if manifest["stored_as"] == "npy":
        write_aside(out / "vectors.npy", lambda aside: join_arrays(aside, journal, (count, manifest["dim"])))
        kept = (row for rows, _ in journal.parts() for row in rows)
        cells = (as_cells(item_of(table, names, row)) for row in kept)
        write_aside(out / "items.csv", lambda aside: write_rows(aside, COLUMNS, cells))
    else:
        write_aside(
            out / "items.parquet", lambda aside: write_parquet(aside, table, names, journal, manifest)
        )
    write_json(out / "manifest.json", {**manifest, "complete": True, "vectors": count, "bad": len(bad)})
    shutil.rmtree(journal.folder, ignore_errors=True)


def item_names(table: ImageTable) -> list[tuple[str, str]]:
    """(id, path) of every record, both relative to `table_root`."""
    root = table_root(table)
    paths = (relative_path(record.path, root) for record in table.records)
    return list(zip(item_ids(table.records, root), paths, strict=True))


def item_of(table: ImageTable, names: Sequence[tuple[str, str]], row: int) -> EmbeddedItem:
    record = table.records[row]
    box = None if record.box is None else list(record.box)
    known = {"label": record.label, "split": record.split, "role": record.role, "box": box}
    payload = {**record.payload, **{key: value for key, value in known.items() if value is not None}}
    return EmbeddedItem(*names[row], record.label, payload)


def as_cells(item: EmbeddedItem) -> tuple[str, str, str | None, str | None]:
    payload = {key: value for key, value in item.payload.items() if key != "label"}  # it has its own column
    return item.id, item.path, item.label, json.dumps(payload, default=str) if payload else None


def bad_rows(bad: Sequence[BadImage]) -> Iterator[tuple[str, str]]:
    return ((one.path, one.reason) for one in bad)


def write_rows(path: Path, header: Sequence[str], rows: Iterator[tuple[str | None, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)


def save_array(path: Path, array: NDArray) -> None:
    with path.open("wb") as stream:  # np.save would add .npy to the name
        np.save(stream, array, allow_pickle=False)


def join_arrays(path: Path, journal: Journal, shape: tuple[int, int]) -> None:
    """One .npy of all parts, one part in memory at a time."""
    if 0 in shape:  # an empty file cannot be mapped
        save_array(path, np.empty(shape, np.float32))
        return
    joined = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    start = 0
    for _, vectors in journal.parts():
        joined[start : start + len(vectors)] = vectors
        start += len(vectors)
    joined.flush()


def write_parquet(
    path: Path,
    table: ImageTable,
    names: Sequence[tuple[str, str]],
    journal: Journal,
    manifest: Mapping[str, Any],
) -> None:
    """Columns id, path, label, payload (JSON) and vector; one row group per part."""
    import pyarrow as pa
    from pyarrow import parquet

    vector = pa.list_(pa.float32(), manifest["dim"])
    text = [pa.field(name, pa.string()) for name in COLUMNS]
    schema = pa.schema([*text, pa.field("vector", vector)], {"fingerprint": manifest["fingerprint"]})
    with parquet.ParquetWriter(path, schema) as writer:
        for rows, vectors in journal.parts():
            cells = [as_cells(item_of(table, names, row)) for row in rows]
            columns = [pa.array(column, pa.string()) for column in zip(*cells, strict=True)] or [[]] * len(
                COLUMNS
            )
            flat = pa.array(vectors.ravel(), pa.float32())
            writer.write_table(
                pa.table([*columns, pa.FixedSizeListArray.from_arrays(flat, type=vector)], schema=schema)
            )


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def is_embeddings(folder: Path) -> bool:
    """Whether the folder was made by `dml embed`."""
    return read_state(folder) is not None


def open_embeddings(folder: str | Path) -> Embeddings:
    """Open what `dml embed` has made; vectors of the npy format are mapped, not read.

    Raises:
        DataError: not an embeddings folder, not complete yet, or its parts do not fit together.
    """
    folder = Path(folder)
    state = read_state(folder)
    if state is None:
        raise DataError(
            f"{folder} holds no embeddings. Make some with `dml embed ENCODER PATH --out {folder}`."
        )
    if state["format_version"] > FORMAT_VERSION:
        raise DataError(
            f"{folder} has format {state['format_version']}, newer than {FORMAT_VERSION}. Upgrade dml."
        )
    if not state["complete"]:
        raise DataError(f"{folder} is not complete: go on with the same `dml embed` command.")
    try:
        items, vectors = (read_npy if state["stored_as"] == "npy" else read_parquet)(folder)
        with (folder / "bad_images.csv").open(encoding="utf-8", newline="") as stream:
            bad = tuple(BadImage(row["path"], row["reason"]) for row in csv.DictReader(stream))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{folder} is damaged: {error}. Start anew with `dml embed … --no-resume`."
        ) from error
    if len(items) != len(vectors) or vectors.shape[1:] != (state["dim"],):
        raise DataError(
            f"{folder} is damaged: {len(items):,} items and vectors of shape {vectors.shape}, not "
            f"{state['vectors']:,} x {state['dim']}. Start anew with `dml embed … --no-resume`."
        )
    return Embeddings(folder, state, items, vectors, bad)


def read_npy(folder: Path) -> tuple[tuple[EmbeddedItem, ...], NDArray[np.float32]]:
    with (folder / "items.csv").open(encoding="utf-8", newline="") as stream:
        items = tuple(as_item(row) for row in csv.DictReader(stream))
    return items, np.load(folder / "vectors.npy", mmap_mode="r" if items else None, allow_pickle=False)


def read_parquet(folder: Path) -> tuple[tuple[EmbeddedItem, ...], NDArray[np.float32]]:
    from pyarrow import parquet

    table = parquet.read_table(folder / "items.parquet")
    items = tuple(as_item(row) for row in table.select(list(COLUMNS)).to_pylist())
    column = table["vector"].combine_chunks()
    return items, column.flatten().to_numpy().reshape(len(items), column.type.list_size)


def as_item(row: Mapping[str, str | None]) -> EmbeddedItem:
    label = row["label"] or None
    known = {} if label is None else {"label": label}
    payload = json.loads(row["payload"]) if row["payload"] else {}
    return EmbeddedItem(str(row["id"]), str(row["path"]), label, {**payload, **known})
