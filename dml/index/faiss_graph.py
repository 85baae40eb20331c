"""A graph of neighbours, walked towards the query: HNSW.

faiss's other graph, NSG, is not offered: making it does not end when many vectors are equal (faiss 1.15), and
pictures come in equal copies.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dml.errors import ConfigError
from dml.index.base import Vectors
from dml.index.faiss_index import FaissIndex, scalar_storage
from dml.index.file import Header, Sink
from dml.index.kept import EngineCodes, FinerRows, FineVectors, Kept, check_precision
from dml.index.ranking import SPARE

MOST_EFFORTS = 64
"""So many are remembered as faiss's objects."""


class FaissHnswIndex(FaissIndex):
    """A graph of neighbours in layers. Approximate, CPU only.

    Memory: 4 · D + 8 · links bytes per vector; 2 · D, 1.5 · D or D instead of 4 · D in fewer bits. Walking a
    graph waits for memory: fewer bits are also quicker.

    Args:
        links: neighbours kept per vector (twice that on the lowest level). More: better recall, memory, build
            time.
        build_effort: candidates examined per vector while building (efConstruction).
        effort: candidates examined per query (efSearch) when the search names none.
        precision: float32, float16, bfloat16, int12 or int8: how vectors are kept. With int12 the graph is
            walked over int8, and what is found is compared at 12 bits.

    Source: Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical
    Navigable Small World graphs", arXiv:1603.09320.
    """

    kind = "hnsw"

    def __init__(
        self,
        dim: int,
        *,
        device: str = "auto",
        links: int = 32,
        build_effort: int = 100,
        effort: int = 128,
        precision: str = "float32",
    ) -> None:
        if links < 2 or build_effort < 1:
            raise ConfigError(f"hnsw needs links >= 2 and build_effort >= 1, got {links} and {build_effort}")
        check_precision(self.kind, precision, ("float32", "float16", "bfloat16", "int12", "int8"))
        self.learns = precision in ("int12", "int8")
        super().__init__(dim, device=device, effort=effort, precision=precision)
        self.links, self.build_effort = links, build_effort
        self.rough = precision == "int12"
        self._fine = FineVectors(dim) if self.rough else None
        self._known_parameters: dict[int, Any] = {}  # effort -> faiss's object, which takes long to make

    def settings(self) -> dict[str, Any]:
        known = {"links": self.links, "build_effort": self.build_effort, "effort": self.effort}
        return known if self.precision == "float32" else {**known, "precision": self.precision}

    def _engine_bytes(self) -> int:
        graph, storage = self._engine.hnsw, self._flat_storage()
        links = 4 * graph.neighbors.size() + 8 * graph.offsets.size() + 4 * graph.levels.size()
        fine = 0 if self._fine is None else self._fine.nbytes
        return links + storage.ntotal * storage.code_size + fine

    def _make_engine(self, sample: Vectors, count: int) -> Any:
        if self.precision == "float32":
            engine = self.faiss.IndexHNSWFlat(self.dim, self.links, self.faiss.METRIC_INNER_PRODUCT)
        else:
            coarse = "int8" if self.rough else self.precision
            storage = scalar_storage(self.faiss, self.dim, coarse, sample)
            engine = self.faiss.IndexHNSW(storage, self.links)
            engine.own_fields = True
            storage.this.disown()
            engine.is_trained = True
        engine.hnsw.efConstruction = self.build_effort
        return engine

    def _feed(self, rows: Vectors) -> None:
        super()._feed(rows)
        if self._fine is not None:
            coarse = EngineCodes(self.faiss, self._flat_storage(), "int8")
            self._fine.append(rows - coarse[len(coarse) - len(rows) :])

    def _find_vectors(self) -> Vectors | Kept:
        if self._fine is None:
            return super()._find_vectors()
        return FinerRows(EngineCodes(self.faiss, self._flat_storage(), "int8"), self._fine)

    def _fetch(self, k: int, effort: int) -> int:
        return 2 * k + SPARE if self.rough else k + SPARE

    def _parameters(self, fetch: int, effort: int, selector: Any) -> Any:
        effort = min(max(effort, fetch), len(self.rows))
        if selector is not None:
            return self.faiss.SearchParametersHNSW(efSearch=effort, sel=selector)
        known = self._known_parameters.get(effort)
        if known is None:
            if len(self._known_parameters) >= MOST_EFFORTS:
                self._known_parameters.clear()
            known = self._known_parameters[effort] = self.faiss.SearchParametersHNSW(efSearch=effort)
        return known

    def _flat_storage(self) -> Any:
        return self.faiss.downcast_index(self._engine.storage)

    def _more_sections(self) -> Mapping[str, Callable[[Sink], None]]:
        return {} if self._fine is None else self._fine.sections()

    def _read_more(self, path: Path, header: Header) -> None:
        if self._fine is not None and header.count:
            self._fine.read(path, header)
