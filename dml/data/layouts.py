"""Folders of pictures: CLASS/…, SPLIT/CLASS/…, or no classes at all."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath

from dml.data.table import MANIFEST_SUFFIXES, SPLIT_NAMES, ImageTable, Record, Role, count_text
from dml.errors import DataError
from dml.imaging import IMAGE_SUFFIXES

_IGNORED_FOLDERS = {"__MACOSX", "@eaDir"}
_IGNORED_FILES = {"Thumbs.db", "desktop.ini"}


def read_folder(root: Path) -> ImageTable:
    """Recognise the layout of a folder and list its pictures.

    - SPLIT/CLASS/…/picture: every folder with pictures is named train, validation (val), test, query or
      gallery.
    - CLASS/…/picture: otherwise; the class is the first folder below the root, however deep the picture lies.
    - unlabelled: pictures only directly in the root (or directly in the split folders).

    A folder that holds nothing but one further folder with folders is stepped through (an unpacked archive).
    Hidden files and folders are left out, links are followed, and files that are no pictures by their name
    are counted in the notes.

    Raises:
        DataError: no pictures, or split folders beside other ones.
    """
    found, others = _list_pictures(root)
    if not found:
        raise DataError(_nothing_in(root, others))
    notes = [_left_out(others)] if others else []
    step = _wrapper(found)
    if step.parts:
        notes.append(
            f"everything lies in the subfolder {step}; its subfolders are taken as classes or splits"
        )
    inner = [(path, path.relative_to(step)) for path in found]
    if _has_splits(root / step, [short for _, short in inner]):
        records = [_in_split(root, path, short) for path, short in inner]
        layout = "SPLIT/CLASS folders"
        if all(r.label is None for r in records):
            layout = "SPLIT folders, unlabelled"
    else:
        records = [
            Record(root / path, short.parts[0] if len(short.parts) > 1 else None) for path, short in inner
        ]
        layout = "CLASS folders" if any(r.label is not None for r in records) else "unlabelled"
    loose = sum(r.label is None for r in records)
    if loose and loose < len(records):
        notes.append(f"{count_text(loose, 0)}: outside any class folder")
    return ImageTable(root.resolve().name, root, layout, tuple(records), tuple(notes))


def _in_split(root: Path, path: PurePath, short: PurePath) -> Record:
    split, role = split_and_role(SPLIT_NAMES[short.parts[0].lower()])
    return Record(root / path, short.parts[1] if len(short.parts) > 2 else None, split, role=role)


def split_and_role(name: str) -> tuple[str, Role | None]:
    """ "query" and "gallery" are roles inside the test split; every other split has none."""
    if name == "query":
        return "test", "query"
    if name == "gallery":
        return "test", "gallery"
    return name, None


def _list_pictures(root: Path) -> tuple[list[PurePath], Counter[str]]:
    """Pictures below the root as relative paths in sorted order, and the endings of all other files."""
    pictures, others = [], Counter()
    for folder, names in _walk(root):
        for name in names:
            if name.startswith(".") or name in _IGNORED_FILES:
                continue
            suffix = os.path.splitext(name)[1].lower()
            if suffix in IMAGE_SUFFIXES:
                pictures.append(PurePath(os.path.relpath(os.path.join(folder, name), root)))
            else:
                others[suffix or "(none)"] += 1
    pictures.sort(key=lambda path: path.parts)
    return pictures, others


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Every folder with its files, following links but entering no folder twice."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be read: {error.strerror}. Check its permissions."
        ) from error

    entered = set()
    for folder, below, names in os.walk(root, followlinks=True, onerror=refuse):
        itself = os.path.realpath(folder)
        if itself in entered:
            below.clear()
            continue
        entered.add(itself)
        below[:] = sorted(name for name in below if not name.startswith(".") and name not in _IGNORED_FOLDERS)
        yield folder, names


def _wrapper(found: list[PurePath]) -> PurePath:
    """The chain of lone folders above the layout, e.g. "photos" when all is in photos/train/… and
    photos/query/…"""
    step = PurePath()
    while True:
        depth = len(step.parts)
        heads = {path.parts[depth] for path in found}
        deep_enough = all(len(path.parts) > depth + 2 for path in found)
        if len(heads) != 1 or not deep_enough or next(iter(heads)).lower() in SPLIT_NAMES:
            return step
        step = step / heads.pop()


def _has_splits(root: Path, found: list[PurePath]) -> bool:
    """Whether the top folders are splits. A class may be called "train": then it holds pictures, not
    folders."""
    top = {path.parts[0] for path in found if len(path.parts) > 1}
    splits = {name for name in top if name.lower() in SPLIT_NAMES}
    if splits and splits == top:
        return True
    nested = {path.parts[0] for path in found if path.parts[0] in splits and len(path.parts) > 2}
    if nested:
        strange = sorted(top - splits)
        raise DataError(
            f"{root} holds split folders ({', '.join(sorted(nested))}) beside other ones ({_some(strange)}), "
            f"so its layout is unclear. Use only {', '.join(SPLIT_NAMES)} beside each other, or only "
            "classes, or a manifest."
        )
    return False


def _nothing_in(root: Path, others: Counter[str]) -> str:
    manifests = sorted(p.name for p in root.iterdir() if p.suffix.lower() in MANIFEST_SUFFIXES)
    hint = f" It holds {_some(manifests)}: if that is a manifest, give its path." if manifests else ""
    holds = f"it holds {_left_out(others)}" if others else "it is empty"
    return (
        f"{root} has no pictures: {holds}.{hint} Expected are picture files (.jpg, .png, .webp and the "
        f"like), best in one folder per class: CLASS/picture.jpg"
    )


def _left_out(others: Counter[str]) -> str:
    kinds = ", ".join(f"{suffix} {count:,}" for suffix, count in others.most_common(5))
    total = others.total()
    noun = "file that is no picture by its name" if total == 1 else "files that are no pictures by their name"
    return f"{total:,} {noun} ({kinds})"


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
