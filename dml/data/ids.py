"""What a picture is called: one rule for embeddings and collections, so that both ways give the same ids."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from dml.data.table import ImageTable, Record

LONGEST_ID = 512  # characters


def table_root(table: ImageTable) -> Path:
    """The folder that ids and paths of a table are relative to, absolute; see `common_root`."""
    return common_root(table.root, (record.path for record in table.records))


def common_root(root: Path, paths: Iterable[Path]) -> Path:
    """`root` when all paths lie below it, or else the deepest folder that holds them all; absolute.

    Links are not followed: what lies below a folder through a link stays below it.
    """
    root = absolute(root)
    folders = {absolute(path.parent) for path in paths}
    if all(folder.is_relative_to(root) for folder in folders):
        return root
    return Path(os.path.commonpath(list(map(str, folders))))


def item_ids(records: Sequence[Record], root: Path) -> list[str]:
    """POSIX paths relative to the root; rows of the same picture differ by their box or a number.

    Args:
        root: a folder that all records lie below, as `table_root` finds it.
    """
    ids, seen = [], set()
    for record in records:
        path = relative_path(record.path, root)
        id, number = path, 2
        if id in seen and record.box is not None:
            id = f"{path}#{','.join(map(str, record.box))}"
        while id in seen:
            id, number = f"{path}#{number}", number + 1
        seen.add(id)
        ids.append(id)
    return ids


def id_problem(id: str) -> str | None:
    """Why a text cannot be an id: empty, too long, control characters, bytes that are no UTF-8; or None."""
    if not id or len(id) > LONGEST_ID:
        return f"an item's id must be text of 1 to {LONGEST_ID} characters, got {id!r:.80}"
    if any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in id):
        return f"an item's id must not hold control characters or bytes that are no UTF-8, got {id!r:.80}"
    return None


def relative_path(path: Path, root: Path) -> str:
    """The POSIX path of a picture below the root."""
    return absolute(path).relative_to(root).as_posix()


def absolute(path: Path) -> Path:
    """Absolute and without "..", links as they are."""
    return Path(os.path.abspath(path))
