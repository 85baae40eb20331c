"""Vectors in, nearest ids out. Importing this loads no engine."""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from dml.errors import ConfigError
from dml.index.base import Hits, Ids, VectorIndex, Vectors
from dml.registry import parameter_names, resolve

KINDS: Mapping[str, str] = {
    "flat": "dml.index.flat:FlatIndex",
    "faiss_flat": "dml.index.faiss_index:FaissFlatIndex",
    "hnsw": "dml.index.faiss_graph:FaissHnswIndex",
    "ivf": "dml.index.faiss_cells:FaissIvfIndex",
    "pq": "dml.index.faiss_cells:FaissPqIndex",
    "rabitq": "dml.index.faiss_cells:FaissRabitqIndex",
    "matrix": "dml.index.matrix:MatrixIndex",
}
"""Name -> class. A class takes (dim, *, device="auto", **options) and has `load(path, *, device)`."""

DESCRIPTIONS: Mapping[str, str] = {
    "flat": "exact, numpy only; the reference that the others are tested against",
    "faiss_flat": "exact, faiss on CPU or GPU",
    "hnsw": "approximate, a neighbour graph; the usual choice from tens of thousands of vectors on (CPU)",
    "ivf": "approximate, vectors grouped into cells, whole or as codes; quick to build, CPU or GPU",
    "pq": "approximate, every vector compared as a short code; small, quick to build (CPU)",
    "rabitq": "approximate, every vector compared by its signs; the quickest to build (CPU)",
    "matrix": "as good as exact, on bfloat16 matrix units (CPU; torch or OpenVINO); for many queries at once",
}

LARGEST_OPTION = 2**31 - 1
"""faiss counts in C's int."""

HNSW_FROM = 50_000
"""From this many vectors on, "auto" means hnsw; below, exact search is quick enough and never wrong."""

__all__ = [
    "DESCRIPTIONS",
    "KINDS",
    "Hits",
    "Ids",
    "VectorIndex",
    "Vectors",
    "check_options",
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
        ConfigError: an unknown kind, option or device, or a value that an option does not take.
        MissingExtra: faiss is needed and not installed.
    """
    check_options(kind, options)
    return resolve("index kind", kind, KINDS)(dim, device=device, **options)


def check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Refuse options that an index of this kind does not take, without making one.

    Args:
        kind: a key of `KINDS`, "package.module:Class", or "auto", which has no options: what it will choose
            is not known yet.

    Raises:
        ConfigError: naming the option, what was given, and what the kind takes.
    """
    if not options:
        return
    if kind == "auto":
        raise ConfigError(
            f'Options ({", ".join(options)}) belong to a kind of index, and "auto" chooses one by the count '
            f"of items. Name the kind, for instance hnsw."
        )
    factory = resolve("index kind", kind, KINDS)
    known, open_ended = parameter_names(factory)
    known = [name for name in known if name not in ("dim", "device")]
    defaults = {name: found.default for name, found in signature(factory).parameters.items()}
    for name, value in options.items():
        if name in ("dim", "device") or (name not in known and not open_ended):
            raise ConfigError(
                f'The index kind "{kind}" has no option "{name}" (given: {name} = {value!r}). '
                f"It takes: {', '.join(known) or 'none'}."
            )
        if type(defaults.get(name)) is int and not (type(value) is int and abs(value) <= LARGEST_OPTION):
            raise ConfigError(
                f'The option "{name}" of the index kind "{kind}" takes a whole number up to '
                f"{LARGEST_OPTION:,}, as {name} = {defaults[name]}; got {value!r}."
            )


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
