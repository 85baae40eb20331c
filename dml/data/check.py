"""Looking a data set over before training: every bad file, tiny class, exact duplicate and split leak."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dml.data.manifest import write_rows
from dml.data.reading import read, read_ahead
from dml.data.split import Splits, file_hashes, relative
from dml.data.table import Box, ImageTable, Record, counted
from dml.errors import DataError, InvalidImage
from dml.imaging import BadImage


@dataclass(frozen=True)
class Duplicates:
    """Files of equal content (sha256)."""

    paths: tuple[str, ...]
    labels: tuple[str, ...]
    """More than one: the same picture under different classes."""
    splits: tuple[str, ...]
    """More than one: the same picture on both sides of a split."""


@dataclass(frozen=True)
class Leak:
    """Something that two splits share although the data's own splits are meant to be apart."""

    kind: str
    """ "classes" or "images"."""
    splits: tuple[str, str]
    names: tuple[str, ...]

    def describe(self, most: int = 5) -> str:
        """One line."""
        more = " …" if len(self.names) > most else ""
        shared = f"{len(self.names):,} {self.kind}: {', '.join(self.names[:most])}{more}"
        return f"{' & '.join(self.splits)} share {shared}"


@dataclass(frozen=True)
class CheckReport:
    """What was found. Paths count from the root of the table."""

    name: str
    description: str
    images: int
    bad: tuple[BadImage, ...]
    tiny_classes: Mapping[str, int]
    """Training or undivided classes with one readable image: they show nothing of what belongs together."""
    duplicates: tuple[Duplicates, ...]
    leaks: tuple[Leak, ...]

    @property
    def ok(self) -> bool:
        """Nothing was found."""
        return not (self.bad or self.tiny_classes or self.duplicates or self.leaks)

    @property
    def mislabelled(self) -> tuple[Duplicates, ...]:
        """Duplicates under different classes: at least one label of each is wrong."""
        return tuple(d for d in self.duplicates if len(d.labels) > 1)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `--json`."""
        return {**asdict(self), "ok": self.ok}

    def describe(self, *, most: int = 20) -> str:
        """All findings for a terminal, at most `most` lines of each kind."""
        lines = [self.description]
        lines += _block("images that cannot be read", [b.reason for b in self.bad], most)
        tiny = [f"{label} ({count})" for label, count in self.tiny_classes.items()]
        lines += _block("classes with fewer than two readable images", tiny, most)
        lines += _block("groups of identical files", [_explain(d) for d in self.duplicates], most)
        lines += _block("leaks between splits", [leak.describe() for leak in self.leaks], most)
        return "\n".join([*lines, "nothing wrong found" if self.ok else "see above: something to mend"])


def check_table(
    table: ImageTable, *, workers: int = 2, progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Decode every picture and compare the contents of files.

    Splits that share classes are a leak when the data's splits look open-set: some test classes are not
    trained on, but others are. When all of them are, the data is closed-set, and only shared pictures are
    leaks.

    Args:
        workers: threads that read.
        progress: called with (done, all).
    """
    bad: list[BadImage] = []
    good: list[Record] = []
    results = read_ahead(_problem, table.records, workers=workers, ahead=64)
    for done, (record, reason) in enumerate(zip(table.records, results, strict=True), 1):
        if reason is None:
            good.append(record)
        else:
            bad.append(BadImage(relative(record.path, table.root), reason))
        if progress is not None:
            progress(done, len(table))
    learned = [r for r in table.records if r.split in (None, "train")]
    sizes = counted(r for r in good if r.split in (None, "train"))
    tiny = {label: sizes[label] for label in sorted(counted(learned)) if sizes[label] < 2}
    duplicates = _duplicates(table, good)
    leaks = [*_class_leaks(table), *_image_leaks(duplicates)]
    return CheckReport(table.name, table.describe(), len(table), tuple(bad), tiny, duplicates, tuple(leaks))


def _problem(record: Record) -> str | None:
    try:
        read(record)
    except InvalidImage as error:
        return str(error)
    return None


def _duplicates(table: ImageTable, records: Sequence[Record]) -> tuple[Duplicates, ...]:
    hashes = file_hashes(r.path for r in records)
    groups: dict[tuple[str, Box | None], list[Record]] = defaultdict(list)
    for record in records:
        if record.path in hashes:
            groups[hashes[record.path], record.box].append(record)
    found = []
    for rows in groups.values():
        if len(rows) < 2:
            continue
        paths = sorted(relative(r.path, table.root) for r in rows)
        labels = sorted({r.label for r in rows if r.label is not None})
        splits = sorted({r.role or r.split for r in rows if r.split is not None})
        found.append(Duplicates(tuple(paths), tuple(labels), tuple(s for s in splits if s)))
    return tuple(sorted(found, key=lambda d: d.paths))


def _class_leaks(table: ImageTable) -> list[Leak]:
    parts = {name: set(counted(rows)) for name, rows in table.splits.items() if name}
    trained = parts.pop("train", set())
    leaks = []
    for name, classes in parts.items():
        shared = trained & classes
        if shared and shared != classes:
            leaks.append(Leak("classes", ("train", name), tuple(sorted(shared))))
    return leaks


def _image_leaks(duplicates: Sequence[Duplicates]) -> list[Leak]:
    shared: dict[tuple[str, str], list[str]] = defaultdict(list)
    for group in duplicates:
        for i, left in enumerate(group.splits):
            for right in group.splits[i + 1 :]:
                shared[left, right].append(group.paths[0])
    return [Leak("images", pair, tuple(names)) for pair, names in sorted(shared.items())]


def _explain(group: Duplicates) -> str:
    labels = f", under different classes: {', '.join(group.labels)}" if len(group.labels) > 1 else ""
    splits = f", in different splits: {', '.join(group.splits)}" if len(group.splits) > 1 else ""
    return " = ".join(group.paths) + labels + splits


def _block(title: str, entries: Sequence[str], most: int) -> list[str]:
    if not entries:
        return []
    more = [f"  … and {len(entries) - most:,} more"] if len(entries) > most else []
    return [f"{title} ({len(entries):,}):", *(f"  {entry}" for entry in entries[:most]), *more]


def write_manifest(splits: Splits, path: Path) -> Path:
    """Write splits as a manifest: path, label, split and, where there are any, box and payload columns.

    Paths are relative to the manifest's folder where the pictures lie below it, otherwise absolute. Reading
    it back and dividing gives the same splits. Pictures that are gallery and training images at once (a query
    split searched in the training images) are written as training images.

    Raises:
        DataError: an ending other than .csv, .tsv or .parquet.
    """
    base = path.parent.resolve()
    parts = {
        "train": splits.train,
        "validation": splits.validation,
        "test": splits.test,
        "query": splits.query,
    }
    trained = {(r.path, r.box) for r in splits.train}
    parts["gallery"] = tuple(r for r in splits.gallery if (r.path, r.box) not in trained)
    both = {(r.path, r.box) for r in parts["query"]} & {(r.path, r.box) for r in parts["gallery"]}
    if both:
        raise DataError(
            f"{len(both):,} images are query and gallery at once beside others that are only one; "
            f"a manifest with one split column cannot say that"
        )
    rows = [(split, record) for split, records in parts.items() for record in records]
    boxes = any(record.box for _, record in rows)
    extra = sorted({key for _, record in rows for key in record.payload})
    table = []
    for split, record in rows:
        row: dict[str, Any] = {
            "path": relative(record.path.resolve(), base),
            "label": record.label,
            "split": split,
        }
        if boxes:
            row["box"] = list(record.box) if record.box else None
        table.append(row | {key: record.payload.get(key) for key in extra})
    return write_rows(table, path)
