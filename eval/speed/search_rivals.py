"""Engines that the search table races, each called as its own documents say; and how a built one is kept.

autofaiss wants an older numpy than everybody else: it chooses and builds in an environment of its own, and
what it leaves is a faiss index, which is searched here with the parameters that it chose. Milvus's embedded
engine is asked through its client, as there is no other way.
"""

import json
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import numpy as np

from dml.errors import DmlError
from dml.index import load_index
from dml.index.base import Ids, VectorIndex, Vectors
from dml.index.faiss_index import import_faiss, numpy_search

K = 10
EFFORTS = (8, 4096)
MILVUS_ROWS = 200_000
"""Filling the embedded engine takes a second for a few thousand rows."""


class LeftOut(DmlError):
    """A contender that cannot take part, and why."""


class Engine(Protocol):
    """One contender, built over the rows. Effort 0: it has none."""

    efforts: tuple[int, int]

    @property
    def nbytes(self) -> int: ...

    def search(self, queries: Vectors, effort: int) -> Ids: ...

    def save(self, path: Path) -> bool:
        """Write it to a file that `LOADERS` can read; False: it cannot be kept."""
        ...


@dataclass
class Ours:
    """One of our kinds, called as a collection calls it."""

    index: VectorIndex
    efforts: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.index.nbytes

    def search(self, queries: Vectors, effort: int) -> Ids:
        return self.index.search(queries, K, effort=effort or None).ids

    def save(self, path: Path) -> bool:
        self.index.save(path)
        return True


@dataclass
class Faiss:
    """A bare faiss index: int64 positions, no ids, no removal, faiss's own scores."""

    engine: Any
    nbytes: int
    efforts: tuple[int, int]

    def search(self, queries: Vectors, effort: int) -> Ids:
        chosen = import_faiss().SearchParametersHNSW(efSearch=effort) if effort else None
        return numpy_search(self.engine)(queries, K, params=chosen)[1]

    def save(self, path: Path) -> bool:
        import_faiss().write_index(self.engine, str(path))
        return True


@dataclass
class Hnswlib:
    engine: Any
    nbytes: int
    efforts: tuple[int, int] = EFFORTS

    def search(self, queries: Vectors, effort: int) -> Ids:
        self.engine.set_ef(max(effort, K))
        return self.engine.knn_query(queries, K)[0].astype(np.int64)

    def save(self, path: Path) -> bool:
        self.engine.save_index(str(path))
        return True


@dataclass
class Usearch:
    engine: Any
    nbytes: int
    threads: int
    efforts: tuple[int, int] = EFFORTS

    def search(self, queries: Vectors, effort: int) -> Ids:
        self.engine.expansion_search = max(effort, K)
        found = self.engine.search(queries, K, threads=self.threads)
        return np.asarray(found.keys, np.int64).reshape(len(queries), -1)

    def save(self, path: Path) -> bool:
        self.engine.save(str(path))
        return True


@dataclass
class Milvus:
    client: Any
    nbytes: int
    folder: Any
    efforts: tuple[int, int] = EFFORTS

    def search(self, queries: Vectors, effort: int) -> Ids:
        wanted = {"params": {"ef": max(effort, K)}}
        answers = self.client.search("rows", [*queries], limit=K, search_params=wanted)
        found = np.full((len(queries), K), -1, np.int64)
        for row, hits in zip(found, answers, strict=True):
            row[: len(hits)] = [hit["id"] for hit in hits]
        return found

    def save(self, path: Path) -> bool:
        return False


Build = Callable[[Vectors], Engine]


def faiss_flat(rows: Vectors) -> Engine:
    engine = import_faiss().IndexFlatIP(rows.shape[1])
    engine.add(rows)
    return Faiss(engine, rows.nbytes, (0, 0))


def faiss_hnsw(rows: Vectors, *, links: int = 32) -> Engine:
    faiss = import_faiss()
    engine = faiss.IndexHNSWFlat(rows.shape[1], links, faiss.METRIC_INNER_PRODUCT)
    engine.hnsw.efConstruction = 100
    engine.add(rows)
    graph: Any = engine.hnsw
    nbytes = rows.nbytes + 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
    return Faiss(engine, nbytes, EFFORTS)


def hnswlib_index(rows: Vectors, *, threads: int, links: int = 16) -> Engine:
    import hnswlib

    engine = hnswlib.Index("ip", rows.shape[1])
    engine.init_index(len(rows), M=links, ef_construction=100)
    engine.set_num_threads(threads)
    engine.add_items(rows)
    per_row = rows.shape[1] * 4 + (2 * links + 1) * 4 + 8  # vector, links of the lowest level, label
    return Hnswlib(engine, len(rows) * per_row)


def usearch_index(rows: Vectors, *, threads: int, dtype: str) -> Engine:
    from usearch.index import Index

    engine = Index(ndim=rows.shape[1], metric="ip", dtype=dtype, connectivity=16, expansion_add=100)
    engine.add(np.arange(len(rows)), rows, threads=threads)
    return Usearch(engine, int(engine.memory_usage), threads)


def autofaiss_index(rows: Vectors, *, python: Path | None, threads: int) -> Engine:
    """What autofaiss chooses with its own settings. Raises LeftOut."""
    if python is None:
        raise LeftOut("no environment with autofaiss was named (--autofaiss PYTHON)")
    script = Path(__file__).with_name("autofaiss_choice.py")
    with TemporaryDirectory() as folder:
        given, made = Path(folder) / "rows.npy", Path(folder) / "made.index"
        np.save(given, rows)
        command = [str(python), str(script), str(given), str(made), str(threads)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise LeftOut(f"{python} cannot be run: {error.strerror or error}") from None
        if done.returncode:
            raise LeftOut((done.stderr.strip().splitlines() or ["it failed without a word"])[-1])
        return Faiss(import_faiss().read_index(str(made)), made.stat().st_size, (0, 0))


def milvus_lite(rows: Vectors) -> Engine:
    """Milvus's embedded engine, with a graph as hnswlib's. Raises LeftOut, ImportError."""
    if len(rows) > MILVUS_ROWS:
        raise LeftOut(f"filling it with more than {MILVUS_ROWS:,} rows takes too long")
    import milvus_lite as _  # noqa: F401  the client alone cannot open a file
    from pymilvus import DataType, MilvusClient

    folder = TemporaryDirectory()
    path = Path(folder.name) / "milvus.db"
    client: Any = MilvusClient(str(path))
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=rows.shape[1])
    graph = client.prepare_index_params()
    settings = {"M": 16, "efConstruction": 100}
    graph.add_index("vector", index_type="HNSW", metric_type="IP", params=settings)
    client.create_collection("rows", schema=schema, index_params=graph)
    for start in range(0, len(rows), 5_000):
        part = enumerate(rows[start : start + 5_000], start)
        client.insert("rows", [{"id": n, "vector": row} for n, row in part])
    client.flush("rows")
    client.load_collection("rows")
    client.search("rows", [rows[0]], limit=K)
    taken = sum(file.stat().st_size for file in Path(folder.name).rglob("*") if file.is_file())
    return Milvus(client, taken, folder)


# What was built before


def our_saved(path: Path, about: Mapping[str, Any]) -> Engine:
    return Ours(load_index(path, device="cpu"), tuple(about["efforts"]))


def faiss_saved(path: Path, about: Mapping[str, Any]) -> Engine:
    return Faiss(import_faiss().read_index(str(path)), about["nbytes"], tuple(about["efforts"]))


def hnswlib_saved(path: Path, about: Mapping[str, Any]) -> Engine:
    import hnswlib

    engine = hnswlib.Index("ip", about["dim"])
    engine.load_index(str(path))
    engine.set_num_threads(about["threads"])
    return Hnswlib(engine, about["nbytes"])


def usearch_saved(path: Path, about: Mapping[str, Any]) -> Engine:
    from usearch.index import Index

    engine: Any = Index.restore(str(path))
    return Usearch(engine, about["nbytes"], about["threads"])


LOADERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Engine]] = {
    "Ours": our_saved,
    "Faiss": faiss_saved,
    "Hnswlib": hnswlib_saved,
    "Usearch": usearch_saved,
}


def keep(engine: Engine, path: Path, about: Mapping[str, Any]) -> None:
    """Save an engine with what `kept` has to know; the note comes last, so half a file is never taken."""
    note = path.with_suffix(".json")
    note.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if engine.save(path):
        facts = {"class": type(engine).__name__, "nbytes": engine.nbytes, "efforts": engine.efforts}
        note.write_text(json.dumps({**about, **facts}))


def kept(path: Path, about: Mapping[str, Any]) -> tuple[Engine, float] | None:
    """An engine that was kept for the same rows and threads, and the seconds that building it took."""
    try:
        found = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return None
    if any(found.get(name) != value for name, value in about.items()):
        return None
    return LOADERS[found["class"]](path, found), found["seconds"]
