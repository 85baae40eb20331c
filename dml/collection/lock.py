"""Advisory locks, which the system drops when their holder dies: of a collection's writer, and of folders."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dml.errors import CollectionLocked, NotAvailable, StorageError

LOCK = "writer.lock"
"""The file in a collection's folder."""


class WriterLock:
    """Held from construction to `release`, or until the process ends in whatever way.

    Raises:
        CollectionLocked: somebody else holds it (another process, or this one twice).
        NotAvailable: this system has no flock.
        StorageError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:
            raise NotAvailable(
                "Writing to a collection needs flock, which this system does not have."
            ) from None
        while True:
            try:
                file = open(path, "a+b")  # noqa: SIM115 - kept open as long as it is held
            except OSError as error:
                raise StorageError(f"{path} could not be opened: {error.strerror or error}") from error
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = describe_holder(file)
                file.close()
                raise CollectionLocked(
                    f"The collection in {path.parent} is being written to by {holder}. "
                    f"Wait for it to end, or stop it. Reading goes on beside it: `dml search`, "
                    f"`dml index info`, and `dml serve` with --read-only."
                ) from None
            if is_file_at(file, path):
                break
            file.close()  # the folder was put in another's place before the lock was ours
        self._file: BinaryIO | None = file
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()  # drops the lock; the file stays, deleting it would race with the next holder
            self._file = None


def is_file_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is the one that the path names now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def describe_holder(file: BinaryIO) -> str:
    """Who wrote into the lock file."""
    try:
        file.seek(0)
        holder = json.loads(file.read())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextmanager
def folder_lock(folder: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """The lock of a folder itself; yields whether it is held.

    Args:
        shared: several may hold it at once, and nobody one that is not shared.
        wait: until it is free; otherwise it is not held when somebody else has it.

    A file system without locks on folders lets everyone hold it.

    Raises:
        OSError: the folder cannot be opened.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        held = True
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            held = False
        except OSError:
            pass
        yield held
    finally:
        os.close(handle)  # drops the lock
