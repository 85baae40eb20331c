"""Writing so that a kill, a power cut or a full disk leaves the old state or the new one, never half of it.

What is written lies beside its place under a hidden name, `.NAME.PID-NUMBER.aside`, until it is complete and
flushed to the disk; then it is renamed.
"""

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, EINVAL, EISDIR, ENOSPC, ENOTSUP
from pathlib import Path
from typing import BinaryIO

from dml.errors import StorageError

ASIDE = ".aside"
"""Suffix of what is half-written."""
REPLACED = ".old"
"""Suffix of a folder that is being replaced."""

UNCHANGED = "What was there before is unchanged."
IN_PLACE = "What is new is in place, but may be lost if the power fails now."
ADVICE = "Make room (or fix the permissions) and try again."

# torch says nothing of a disk: its zip writer finds that fewer bytes arrived than it sent.
TORCH_WRITER = re.compile(
    r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed|open file failed with strerror"
    r"|basic_ios::clear: iostream error|Parent directory .* does not exist"
)
SAFETENSORS_WRITER = re.compile(r"I/O error|IoError|os error \d+")
ERROR_NUMBER = re.compile(r"(?:os error |\[Errno |code: )(\d+)")

_numbers = itertools.count()
_being_written: set[Path] = set()


@contextmanager
def storage_errors(path: Path, *, intact: str = "") -> Iterator[None]:
    """Turn whatever a full or refusing disk raises in the block into a StorageError about `path`.

    Errors about anything else pass through as they are.

    Args:
        path: what the block writes, as the user knows it.
        intact: a sentence on what the failure left whole.

    Raises:
        StorageError: names the path, the reason and what is intact.
    """
    try:
        yield
    except Exception as error:
        reason = storage_reason(error)
        if reason is None:
            raise
        parts = (f"{path} could not be written: {reason}.", intact, ADVICE)
        raise StorageError(" ".join(filter(None, parts))) from error


def storage_reason(error: BaseException) -> str | None:
    """Why the disk refused, in a few words; None for an error that is about something else.

    Recognised are OSError (but not a broken connection), what `shutil` collects while it copies, and the
    errors of the file writers of torch and safetensors, neither of which has to be imported for it.
    """
    if isinstance(error, ConnectionError):  # a closed pipe: whoever read our output has gone
        return None
    if isinstance(error, shutil.Error):
        return _reason_of_copies(error)
    if isinstance(error, OSError):
        if error.errno is None:  # numpy counts what was written, and asks no further
            return f"the disk is full or refuses ({error})"
        return _in_words(error.errno, error.strerror or str(error))
    text = str(error)
    if isinstance(error, RuntimeError) and TORCH_WRITER.search(text):
        first = text.splitlines()[0].rpartition("] . ")[2]
        known = _system_error_behind(error)
        return storage_reason(known) if known else f"the disk is full or refuses (torch: {first})"
    kind = type(error)
    if kind.__name__ == "SafetensorError" and kind.__module__.startswith("safetensors"):
        return _in_words(_number_in(text), text) if SAFETENSORS_WRITER.search(text) else None
    return None


def _in_words(number: int | None, otherwise: str) -> str:
    if number is None:
        return otherwise
    said = os.strerror(number)
    return f"the disk is full ({said})" if number in (ENOSPC, EDQUOT) else said


def _number_in(text: str) -> int | None:
    found = ERROR_NUMBER.search(text)
    return int(found[1]) if found else None


def _system_error_behind(error: BaseException) -> OSError | None:
    """The OSError in whose wake another error was raised."""
    behind = error.__cause__ or error.__context__
    while behind is not None and not isinstance(behind, OSError):
        behind = behind.__cause__ or behind.__context__
    return behind


def _reason_of_copies(error: shutil.Error) -> str:
    """One reason from shutil's list of (from, to, why): the first, and how many more there are."""
    failures = error.args[0] if error.args else str(error)
    if not isinstance(failures, list) or not failures:
        return str(failures)
    _, target, why = failures[0]
    more = f" (and {len(failures) - 1:,} more)" if len(failures) > 1 else ""
    return f"{_in_words(_number_in(str(why)), str(why))}, at {target}{more}"


@contextmanager
def written_aside(path: Path, *, tidy: bool = True) -> Iterator[Path]:
    """The name of a file to write; it takes the place of `path` in one step when the block ends well.

    When it does not, for whatever reason, `path` is as it was and nothing lies beside it. Missing folders
    are made. A link is followed; a device or a pipe (/dev/stdout) is written directly.

    Args:
        tidy: also remove what killed processes left half-written beside `path`; it lists the folder, so
            whoever writes many files into one folder does that once by other means.

    Raises:
        StorageError: the disk is full or refuses.
    """
    target = path.resolve() if path.is_symlink() else path
    with storage_errors(path, intact=UNCHANGED):
        if target.exists() and not target.is_file():
            if target.is_dir():
                raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if tidy:
            for leftover in _left_by_killed(target, ASIDE):
                leftover.unlink(missing_ok=True)
        with _name_beside(target, ASIDE) as aside:
            try:
                yield aside
                flush_to_disk(aside)
                aside.replace(target)
            finally:
                with suppress(OSError):
                    aside.unlink(missing_ok=True)
    with storage_errors(path, intact=IN_PLACE):
        flush_to_disk(target.parent)


@contextmanager
def opened_aside(path: Path, *, tidy: bool = True) -> Iterator[BinaryIO]:
    """As `written_aside`, with the file open for writing bytes."""
    with written_aside(path, tidy=tidy) as aside, aside.open("wb") as file:
        yield file


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, flush it, and put it into place; see `written_aside`.

    Raises:
        StorageError: the disk is full or refuses; what was there before stays.
    """
    with written_aside(path) as aside:
        write(aside)


@contextmanager
def written_aside_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill; it takes the place of `path`, file or folder, when the block ends well.

    When it does not, for whatever reason, `path` is as it was and nothing lies beside it. Between the two
    renames of a replacement `path` is missing for a moment; should the process be killed just there, the next
    call puts the old folder back before it begins.

    Raises:
        StorageError: the disk is full or refuses.
    """
    with storage_errors(path, intact=UNCHANGED):
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in _left_by_killed(path, REPLACED):
            if path.exists():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.rename(path)
        for leftover in _left_by_killed(path, ASIDE):
            shutil.rmtree(leftover, ignore_errors=True)
        with _name_beside(path, ASIDE) as aside, _name_beside(path, REPLACED) as old:
            try:
                aside.mkdir()
                yield aside
                for inside in [*aside.rglob("*"), aside]:
                    flush_to_disk(inside)
                if path.exists():
                    path.rename(old)
                aside.rename(path)
            finally:
                if old.exists() and not path.exists():
                    old.rename(path)
                shutil.rmtree(aside, ignore_errors=True)
                shutil.rmtree(old, ignore_errors=True)
    with storage_errors(path, intact=IN_PLACE):
        flush_to_disk(path.parent)


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Make `folder` for the block. Where the block fails and has put nothing there, it goes again, and so do
    those above it that were made for it.

    Raises:
        OSError: it cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # the first that is not empty ends it
            for one in missing:
                one.rmdir()
        raise


def flush_to_disk(path: Path) -> None:
    """fsync a file, or the entries of a folder, so that a rename in it survives a power cut."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (folder and error.errno in (EINVAL, ENOTSUP)):  # some network mounts know no such thing
            raise
    finally:
        os.close(handle)


@contextmanager
def _name_beside(path: Path, suffix: str) -> Iterator[Path]:
    """A hidden name that no other thread or process of this machine uses."""
    name = path.with_name(f".{path.name}.{os.getpid()}-{next(_numbers)}{suffix}")
    _being_written.add(name)
    try:
        yield name
    finally:
        _being_written.discard(name)


def _left_by_killed(path: Path, suffix: str) -> Iterator[Path]:
    """What processes that are gone left beside `path`."""
    start = f".{path.name}."
    for entry in list(path.parent.iterdir()):
        if not (entry.name.startswith(start) and entry.name.endswith(suffix)) or entry in _being_written:
            continue
        process, _, number = entry.name[len(start) : -len(suffix)].partition("-")
        if process.isdecimal() and number.isdecimal() and not _is_running(int(process)):
            yield entry


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # not ours, as it is not being written: an earlier process had our number
    if os.name != "posix":
        return True  # a signal 0 would end it there
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
