"""Writing so that a kill or a power cut leaves the old state or the new one, never half of either."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EDQUOT, ENOSPC
from pathlib import Path

from dml.errors import StorageError


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError about `target`."""
    try:
        yield
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise StorageError(
                f"The disk is full: {target} could not be written. Free some space and repeat."
            ) from error
        raise StorageError(f"{target} cannot be written: {error.strerror or error}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it, and rename it to `path`.

    Raises:
        StorageError: the disk is full or refuses.
    """
    aside = path.with_name(f".{path.name}.part")
    with storage_errors(path):
        try:
            write(aside)
            flush_to_disk(aside)
            aside.replace(path)
            flush_to_disk(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    if path.is_dir() and platform.system() == "Windows":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
