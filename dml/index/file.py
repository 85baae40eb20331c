"""The format of a saved index.

An index file::

    magic (8 bytes) · where the header starts, its length (2 × uint64) · sha256 of the header (32 bytes)
    section 0 · section 1 · …                 raw bytes, each with its length and sha256 in the header
    header                                    JSON: format, kind, dim, count, settings, note, sections
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from dml.errors import DamagedFile
from dml.storage import opened_aside

MAGIC = b"DMLINDEX"
FORMAT = 2
"""The newest that is read: 2 has vectors in fewer bits."""

FIRST_FORMAT = 1
"""Written for what it can say, so that older versions of dml read it."""
PREFIX = struct.Struct("<8sQQ32s")
BLOCK = 1 << 22  # bytes per read while checking


class Sink(Protocol):
    """Where the bytes of a section go."""

    def write(self, data: bytes | memoryview, /) -> Any: ...


@dataclass(frozen=True)
class Header:
    """What an index file says about itself."""

    kind: str
    dim: int
    count: int
    settings: Mapping[str, Any]  # of the kind
    note: Mapping[str, Any]  # of whoever saved it
    sections: Mapping[str, tuple[int, int, str]]  # name -> (offset, length, sha256)


class HashingSink:
    """Passes bytes on, and remembers their digest and length."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.length = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.length += len(view)
        return self.file.write(view)


def write_index_file(
    path: Path,
    *,
    kind: str,
    dim: int,
    count: int,
    settings: Mapping[str, Any],
    note: Mapping[str, Any],
    sections: Mapping[str, Callable[[Sink], None]],
    first_format: bool = True,
) -> None:
    """Write an index file aside, flush it, and put it into place.

    Args:
        sections: name -> what writes its bytes to a sink.
        first_format: whether the first format can say what is written; else it is the newest.

    Raises:
        StorageError: the disk is full or refuses; `path` is then as it was.
    """
    with opened_aside(path) as file:
        file.write(bytes(PREFIX.size))
        table: dict[str, tuple[int, int, str]] = {}
        for name, write in sections.items():
            sink = HashingSink(file)
            offset = file.tell()
            write(sink)
            table[name] = (offset, sink.length, sink.digest.hexdigest())
        header = {
            "format": FIRST_FORMAT if first_format else FORMAT,
            "kind": kind,
            "dim": dim,
            "count": count,
            "settings": dict(settings),
            "note": dict(note),
            "sections": table,
        }
        encoded = json.dumps(header).encode()
        offset = file.tell()
        file.write(encoded)
        file.seek(0)
        file.write(PREFIX.pack(MAGIC, offset, len(encoded), hashlib.sha256(encoded).digest()))


def read_header(path: Path) -> Header:
    """The header of an index file, checked; the sections are not.

    Raises:
        DamagedFile: no index file, cut short, changed, or of a newer format.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            prefix = file.read(PREFIX.size)
            if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
                raise DamagedFile(f"{path} is not an index file, or only its beginning was written")
            _, offset, length, digest = PREFIX.unpack(prefix)
            if offset + length > size:
                raise DamagedFile(f"{path} is cut short: {size} bytes, expected {offset + length}")
            file.seek(offset)
            encoded = file.read(length)
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(encoded).digest() != digest:
        raise DamagedFile(f"{path} is damaged: the checksum of its header does not fit")
    tree = json.loads(encoded)
    if tree["format"] > FORMAT:
        raise DamagedFile(
            f"{path} has format {tree['format']}, and this version reads up to {FORMAT}; "
            f"update dml to read it"
        )
    sections = {name: tuple(entry) for name, entry in tree["sections"].items()}
    return Header(tree["kind"], tree["dim"], tree["count"], tree["settings"], tree["note"], sections)  # type: ignore[arg-type]


def check_sections(path: Path, header: Header) -> None:
    """Compare every section with its checksum. Raises DamagedFile naming the first that does not fit."""
    try:
        with open(path, "rb") as file:
            for name, (offset, length, expected) in header.sections.items():
                digest = hashlib.sha256()
                file.seek(offset)
                left = length
                while left and (block := file.read(min(left, BLOCK))):
                    digest.update(block)
                    left -= len(block)
                if left or digest.hexdigest() != expected:
                    raise DamagedFile(f"{path} is damaged: the checksum of its {name} does not fit")
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror or error}") from error


def check_index_file(path: Path) -> Header:
    """Read the header and check everything. Raises DamagedFile."""
    header = read_header(path)
    check_sections(path, header)
    return header


def read_array(path: Path, header: Header, name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A section as an array."""
    offset, length, _ = header.sections[name]
    array = np.empty(shape, dtype)
    if array.nbytes != length:
        raise DamagedFile(f"{path} is damaged: {name} holds {length} bytes, expected {array.nbytes}")
    with open(path, "rb") as file:
        file.seek(offset)
        if length and file.readinto(memoryview(array.data).cast("B")) != length:
            raise DamagedFile(f"{path} is damaged: {name} is cut short")
    return array


def array_section(array: np.ndarray) -> Callable[[Sink], None]:
    """A section that holds an array's bytes."""

    def write(sink: Sink) -> None:
        if array.size:
            sink.write(memoryview(np.ascontiguousarray(array).data).cast("B"))

    return write
