"""Putting a finished collection in its place: out is the old one or the new one, whenever the power goes.

A collection NAME is made in `.NAME.building`, whose writer's lock its maker holds. When it replaces another,
the two change names in one step where the system can do that; where it cannot, the old one is
`.NAME.replaced` between two renames, and whoever comes next puts it back. `.NAME.discarded` is on its way
out.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dml.collection.lock import LOCK, WriterLock, folder_lock
from dml.errors import CollectionError
from dml.storage import flush_to_disk

AT_FDCWD = -100
RENAME_EXCHANGE = 2  # linux/fs.h


def building(out: Path) -> Path:
    """Where a collection is made until it is complete."""
    return out.with_name(f".{out.name}.building")


def replaced(out: Path) -> Path:
    """Where the old collection is between two renames."""
    return out.with_name(f".{out.name}.replaced")


def discarded(out: Path) -> Path:
    """Where the old collection is while it is being deleted."""
    return out.with_name(f".{out.name}.discarded")


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """One at a time makes, renames or clears what lies beside a collection; others wait, for moments."""
    with folder_lock(folder):
        yield


def put_into_place(out: Path, *, overwrite: bool) -> None:
    """Rename what was built for `out`, whose `turn` it is. What was at `out` is `discarded` afterwards.

    Raises:
        CollectionError: something is at `out` by now, and is not to be replaced.
        CollectionLocked: somebody writes to what is to be replaced.
        OSError: `out` is then as it was, as after any other interruption.
    """
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if not out.exists():
        os.rename(building(out), out)
    elif overwrite and (out / LOCK).exists():
        lock = WriterLock(out / LOCK)
        try:
            replace(out)
        finally:
            lock.release()
    else:
        raise CollectionError(f"{out} has come to be while this collection was built; it is left as it is.")
    flush_to_disk(out.parent)


def replace(out: Path) -> None:
    """Change the finished collection for the one at `out`."""
    if exchange(building(out), out):
        os.rename(building(out), discarded(out))
        return
    try:
        os.rename(out, replaced(out))
        os.rename(building(out), out)
    except BaseException:
        restore(out)
        raise
    os.rename(replaced(out), discarded(out))


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step. False: this system or file system cannot, and nothing has happened."""
    if sys.platform != "linux":
        return False
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    if swap is None:
        return False
    return swap(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def restore(out: Path) -> None:
    """Put back a collection whose replacement was interrupted between two renames."""
    if replaced(out).is_dir() and not out.exists():
        os.rename(replaced(out), out)


def recover(path: Path) -> None:
    """As `restore`, for whoever is about to open or build `path`; where it may not, it does nothing."""
    path = Path(os.path.abspath(path))
    if path.name and not path.exists() and replaced(path).is_dir():
        with suppress(OSError), turn(path.parent):
            restore(path)


def clear(out: Path) -> None:
    """Delete what builds of `out` have left beside it. Raises CollectionLocked for one that still runs."""
    clear_beside(out)
    if (building(out) / LOCK).exists():
        WriterLock(building(out) / LOCK).release()
    if building(out).is_dir():
        shutil.rmtree(building(out))


def clear_beside(out: Path) -> None:
    """As `clear`, leaving an unfinished collection for the build that goes on with it."""
    restore(out)
    for leftover in (replaced(out), discarded(out)):
        if leftover.is_dir():
            shutil.rmtree(leftover)
