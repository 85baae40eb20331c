"""Vectors in, nearest ids out. Importing this loads no engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dml.errors import ConfigError
from dml.index.base import Hits, Ids, VectorIndex, Vectors
from dml.registry import resolve

KINDS: Mapping[str, str] = {
    "flat": "dml.index.flat:FlatIndex",
    "faiss_flat": "dml.index.faiss_index:FaissFlatIndex",
    "hnsw": "dml.index.faiss_index:FaissHnswIndex",
    "ivf": "dml.index.faiss_index:FaissIvfIndex",
}
"""Name -> class. A class takes (dim, *, device="auto", **options) and has `load(path, *, device)`."""

DESCRIPTIONS: Mapping[str, str] = {
    "flat": "exact, numpy only; the reference that the others are tested against",
    "faiss_flat": "exact, faiss on CPU or GPU",
    "hnsw": "approximate, a neighbour graph; the usual choice from tens of thousands of vectors on (CPU)",
    "ivf": "approximate, vectors grouped into cells; quick to build, CPU or GPU",
}

HNSW_FROM = 50_000
"""From this many vectors on, "auto" means hnsw; below, exact search is quick enough and never wrong."""

__all__ = [
    "DESCRIPTIONS",
    "KINDS",
    "Hits",
    "Ids",
    "VectorIndex",
    "Vectors",
    "choose_kind",
    "load_index",
    "make_index",
]


def make_index(kind: str, dim: int, *, device: str = "auto", **options: Any) -> VectorIndex:
    """An empty index.

    Args:
        kind: a key of `KINDS`, or "package.module:Class".
        dim: length of the vectors.
        device: "auto" (a GPU when faiss has one and the kind runs there), "cpu", or "cuda:N".
        options: of the kind; hnsw: links, build_effort, effort; ivf: cells, effort.

    Raises:
        ConfigError: an unknown kind, option or device.
        MissingExtra: faiss is needed and not installed.
    """
    factory = resolve("index kind", kind, KINDS)
    try:
        return factory(dim, device=device, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        option = str(error).rpartition("argument")[2].split(".")[0].strip().strip("'")
        raise ConfigError(f'The index kind "{kind}" has no option "{option}". Given: {options}.') from None


def load_index(path: Path, *, device: str = "auto") -> VectorIndex:
    """Read an index that `save` wrote, whatever its kind.

    Raises:
        DamagedFile: a checksum that does not fit, a file cut short, a newer format.
        MissingExtra: the index is faiss's, and faiss is not installed.
    """
    from dml.index.file import read_header

    kind = read_header(path).kind
    return resolve("index kind", kind, KINDS).load(path, device=device)  # type: ignore[attr-defined]


def choose_kind(count: int) -> str:
    """What "auto" means for this many vectors: faiss_flat, from `HNSW_FROM` on hnsw; flat without faiss."""
    from dml.index.faiss_index import faiss_is_installed

    if not faiss_is_installed():
        return "flat"
    return "hnsw" if count >= HNSW_FROM else "faiss_flat"
