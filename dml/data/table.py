"""From a folder or a manifest to a table of pictures: which file, which class, which split.

What was recognised is said, never guessed silently: `ImageTable.describe()` names the layout and everything
left out. No picture is opened here; `dml.data.check` does that.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from dml.errors import ConfigError, DataError
from dml.registry import resolve, unknown

Box = tuple[int, int, int, int]
Role = Literal["query", "gallery"]

SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "test": "test",
    "query": "query",
    "gallery": "gallery",
}
"""Folder or cell -> split. "query" and "gallery" are the two halves of a test split."""

MANIFEST_SUFFIXES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Record:
    """One picture (or one box of a picture) and what is known about it."""

    path: Path
    label: str | None
    split: str | None = None
    """ "train", "validation" or "test"; None: to be decided by `dml.data.split.divide`."""
    box: Box | None = None
    """Left, top, right, bottom in pixels of the upright picture; None: all of it."""
    role: Role | None = None
    """In a test split: a query, a member of the gallery, or (None) both."""
    payload: Mapping[str, Any] = field(default_factory=dict)
    """Further columns of a manifest, kept for the collection."""


@dataclass(frozen=True)
class ImageTable:
    """Everything that a source holds, in a fixed order."""

    name: str
    root: Path
    layout: str
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()
    """What a reader should know: what was left out, what was assumed."""

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Labels that occur, sorted."""
        return tuple(sorted({r.label for r in self.records if r.label is not None}))

    @cached_property
    def splits(self) -> Mapping[str, tuple[Record, ...]]:
        """Split (or "query", "gallery", or "" where the source has none) -> its records, in table order."""
        parts: dict[str, list[Record]] = {}
        for record in self.records:
            parts.setdefault(record.role or record.split or "", []).append(record)
        return {name: tuple(rows) for name, rows in parts.items()}

    def describe(self) -> str:
        """What was recognised, in a few lines for a terminal."""
        lines = [f"{self.name}: {self.layout}, {count_text(len(self.records), len(self.classes))}"]
        if set(self.splits) != {""}:
            for split, rows in self.splits.items():
                found = {r.label for r in rows if r.label is not None}
                lines.append(f"  {split or '(no split)'}: {count_text(len(rows), len(found))}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def open_table(source: str | Path) -> ImageTable:
    """Read what `source` names.

    Args:
        source: a folder (CLASS/…, SPLIT/CLASS/…, or pictures without labels), a manifest (.csv, .tsv,
            .parquet), or
            "name:path" with a name of `dml.data.DATASETS` or an import path ("cub:/data/CUB_200_2011",
            "my_package.data:load:/data/mine"): a function from a folder to an ImageTable.

    Raises:
        DataError: nothing there, no pictures in it, or rows of a manifest that cannot be used (all are
            listed).
        ConfigError: a data set of an unknown name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        from dml.data.layouts import read_folder

        return read_folder(path)
    if path.is_file():
        if path.suffix.lower() not in MANIFEST_SUFFIXES:
            raise DataError(
                f"{path} is neither a folder nor a manifest ({', '.join(MANIFEST_SUFFIXES)}); give a folder "
                f"of pictures"
            )
        from dml.data.manifest import read_manifest

        return read_manifest(path)
    return _named(str(source), path)


def _named(source: str, path: Path) -> ImageTable:
    from dml.data import DATASETS

    name, colon, root = source.rpartition(":")
    if not colon:
        if source in DATASETS:
            raise DataError(
                f'The data set "{source}" is not bundled: say where it is, as "{source}:FOLDER". '
                f"`dml data download {source}` tells where it comes from."
            )
        raise DataError(f"There is no folder or manifest {path} (looked in {Path.cwd()}). Check the path.")
    if name not in DATASETS and not _is_import_path(name):
        reason = unknown("data set", name, DATASETS)
        raise ConfigError(f"There is no folder or manifest {path}, and as NAME:FOLDER: {reason}")
    load: Callable[[Path], ImageTable] = resolve("data set", name, DATASETS)
    return load(Path(root).expanduser())


def _is_import_path(name: str) -> bool:
    module, _, attribute = name.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def counted(records: Iterable[Record]) -> Counter[str]:
    """Label -> how many records have it (records without a label do not count)."""
    return Counter(r.label for r in records if r.label is not None)


def count_text(images: int, classes: int) -> str:
    """ "1 image of 1 class", "1,200 images of 20 classes", "3 images, no labels"."""
    shown = f"{images:,} image" + ("" if images == 1 else "s")
    return (
        f"{shown} of {classes:,} class" + ("" if classes == 1 else "es") if classes else f"{shown}, no labels"
    )
