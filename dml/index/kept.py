"""Vectors as an index keeps them: whole, or in fewer bits. What is kept is what scores are computed with.

| precision | bytes per vector | scores differ from those of the whole vectors by about |
|---|---|---|
| float32 | 4 · D | 0 |
| float16 | 2 · D | 0.00001 |
| bfloat16 | 2 · D | 0.0001 |
| int12 | 1.5 · D + 4 | 0.0001 |
| int8 | D + 4 | 0.001 |

Everything here answers `kept[slots]` and `kept[start:stop]` with float32 rows, as an array would.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dml.errors import ConfigError
from dml.index.base import Vectors
from dml.index.file import Header, Sink, array_section, read_array

Slots = NDArray[np.int64] | slice

LEVELS = 15
"""Steps of the finer half of int12: four bits."""


PAIRS: NDArray[np.complex64] = (
    np.stack([np.arange(256) & LEVELS, np.arange(256) >> 4], axis=1).astype(np.float32)
    - np.float32(LEVELS / 2)
).view(np.complex64)[:, 0]
"""The two numbers that a byte of the finer half stands for, as one item: one look-up for both."""


class Kept(Protocol):
    """Rows that can be read back as float32; equal vectors read back as equal rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, slots: Any, /) -> Any: ...


def check_precision(kind: str, precision: str, known: tuple[str, ...]) -> None:
    """Refuse a precision that a kind does not have. Raises ConfigError."""
    if precision not in known:
        raise ConfigError(
            f'The index kind "{kind}" keeps vectors as {", ".join(known)}; got precision "{precision}".'
        )


class Column:
    """An array that grows at its end by doubling; what was there stays where it is for those who read it."""

    def __init__(self, width: int, dtype: Any) -> None:
        self._buffer = np.empty((0, width), dtype)
        self._used = 0

    def __len__(self) -> int:
        return self._used

    @property
    def rows(self) -> NDArray[Any]:
        return self._buffer[: self._used]

    @rows.setter
    def rows(self, rows: NDArray[Any]) -> None:
        self._buffer, self._used = rows, len(rows)

    def reserve(self, count: int) -> None:
        """Room for so many rows altogether, without copying at every append."""
        if count > len(self._buffer):
            larger = np.empty((count, self._buffer.shape[1]), self._buffer.dtype)
            larger[: self._used] = self.rows
            self._buffer = larger

    def append(self, rows: NDArray[Any]) -> None:
        wanted = self._used + len(rows)
        if wanted > len(self._buffer):
            self.reserve(max(64, 2 * self._used, wanted))
        self._buffer[self._used : wanted] = rows
        self._used = wanted


class KeptVectors:
    """An index's own copy of its vectors, at a precision that is the same function of each vector alone."""

    PRECISIONS = ("float32", "float16", "bfloat16", "int8")

    def __init__(self, dim: int, precision: str) -> None:
        self.precision = precision
        dtype = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}
        self._codes = Column(dim, dtype[precision])
        self._scales = Column(1, np.float32) if precision == "int8" else None

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def nbytes(self) -> int:
        scales = 0 if self._scales is None else self._scales.rows.nbytes
        return self._codes.rows.nbytes + scales

    def __getitem__(self, slots: Slots) -> Vectors:
        codes = self._codes.rows[slots]
        if self.precision == "float32":
            return codes
        if self.precision == "bfloat16":
            return from_bfloat16(codes)
        rows = codes.astype(np.float32)
        if self._scales is not None:
            rows *= self._scales.rows[slots]
        return rows

    def reserve(self, count: int) -> None:
        self._codes.reserve(count)
        if self._scales is not None:
            self._scales.reserve(count)

    def append(self, rows: Vectors) -> None:
        if self.precision == "bfloat16":
            self._codes.append(to_bfloat16(rows))
        elif self._scales is not None:
            scales = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
            self._scales.append(scales)
            self._codes.append(np.rint(rows / scales).astype(np.int8))
        else:
            self._codes.append(rows.astype(self._codes.rows.dtype, copy=False))

    def sections(self) -> Mapping[str, Callable[[Sink], None]]:
        """For `write_index_file`."""
        found = {"kept": array_section(self._codes.rows)}
        if self._scales is not None:
            found["kept scales"] = array_section(self._scales.rows)
        return found

    def read(self, path: Path, header: Header) -> None:
        """What `sections` wrote. Raises DamagedFile."""
        codes = self._codes.rows
        self._codes.rows = read_array(path, header, "kept", codes.dtype, (header.count, codes.shape[1]))
        if self._scales is not None:
            self._scales.rows = read_array(path, header, "kept scales", np.float32, (header.count, 1))


class EngineCodes:
    """The vectors in a faiss scalar quantizer, read where they are: no copy besides the engine's own.

    Args:
        storage: a faiss IndexScalarQuantizer; it stays the owner of the memory.
        precision: float16, bfloat16, or int8 (trained: a range for every dimension).
    """

    def __init__(self, faiss: Any, storage: Any, precision: str) -> None:
        self.precision = precision
        self._count, dim = storage.ntotal, storage.d
        codes = (
            faiss.rev_swig_ptr(storage.codes.data(), self._count * storage.code_size)
            if self._count
            else np.empty(0, np.uint8)
        )
        width = storage.code_size // dim
        self._codes: NDArray[Any] = codes.view({1: np.uint8, 2: np.uint16}[width]).reshape(-1, dim)
        if precision == "int8":
            lowest, span = faiss.vector_to_array(storage.sq.trained).reshape(2, dim)
            self._step = span / np.float32(255)
            self._offset = lowest + np.float32(0.5) * self._step
        elif precision == "float16":
            self._codes = self._codes.view(np.float16)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, slots: Slots) -> Vectors:
        codes = self._codes[slots]
        if self.precision == "bfloat16":
            return from_bfloat16(codes)
        rows = codes.astype(np.float32)
        if self.precision == "int8":
            rows *= self._step
            rows += self._offset
        return rows


class FineVectors:
    """Coarse rows of an engine, and for each what they miss, in four bits per number (with int8: int12).

    The missing part is kept in units of its largest number, so that a vector which lies outside the range
    that the engine learned from a sample is kept less exactly, and never wrongly.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self._codes = Column((dim + 1) // 2, np.uint8)
        self._scales = Column(1, np.float32)

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def nbytes(self) -> int:
        return self._codes.rows.nbytes + self._scales.rows.nbytes

    def append(self, missing: Vectors) -> None:
        """(N, D): whole vectors less their coarse rows."""
        scales = np.abs(missing).max(axis=1, keepdims=True) / np.float32(LEVELS / 2)
        steps = np.rint(missing / np.maximum(scales, np.finfo(np.float32).tiny) + np.float32(LEVELS / 2))
        codes = np.zeros((len(missing), 2 * ((self.dim + 1) // 2)), np.uint8)
        codes[:, : self.dim] = np.clip(steps, 0, LEVELS)
        self._codes.append(codes[:, 0::2] | (codes[:, 1::2] << 4))
        self._scales.append(scales)

    def added_to(self, coarse: Vectors, slots: Slots) -> Vectors:
        """The coarse rows made finer, in place."""
        steps = PAIRS[self._codes.rows[slots]].view(np.float32)[:, : self.dim]
        steps *= self._scales.rows[slots]
        coarse += steps
        return coarse

    def sections(self) -> Mapping[str, Callable[[Sink], None]]:
        """For `write_index_file`."""
        return {
            "fine": array_section(self._codes.rows),
            "fine scales": array_section(self._scales.rows),
        }

    def read(self, path: Path, header: Header) -> None:
        """What `sections` wrote. Raises DamagedFile."""
        width = self._codes.rows.shape[1]
        self._codes.rows = read_array(path, header, "fine", np.uint8, (header.count, width))
        self._scales.rows = read_array(path, header, "fine scales", np.float32, (header.count, 1))


class FinerRows:
    """Coarse rows and their fine part, read together."""

    def __init__(self, coarse: Kept, fine: FineVectors) -> None:
        self._coarse, self._fine = coarse, fine

    def __len__(self) -> int:
        return len(self._fine)

    def __getitem__(self, slots: Slots) -> Vectors:
        return self._fine.added_to(self._coarse[slots], slots)


class Reconstructed:
    """Whole vectors that an engine keeps in an order of its own, read through its directory."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __len__(self) -> int:
        return self._engine.ntotal

    def __getitem__(self, slots: Slots) -> Vectors:
        if isinstance(slots, slice):
            slots = np.arange(*slots.indices(len(self)))
        return self._engine.reconstruct_batch(np.ascontiguousarray(slots, np.int64))


def to_bfloat16(rows: Vectors) -> NDArray[np.uint16]:
    """The upper half of each float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(rows, np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def from_bfloat16(codes: NDArray[np.uint16]) -> Vectors:
    """float32 with the same value."""
    return (codes.astype(np.uint32) << 16).view(np.float32)
