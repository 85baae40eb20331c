"""The kinds that faiss searches: flat, HNSW and IVF over inner products, on the CPU or (flat, IVF) on a GPU.

faiss numbers its vectors 0, 1, 2, …; which id lives in which of these slots is kept here, so that all kinds
have string-free int64 ids, removal (a dead slot that selectors skip; faiss's HNSW cannot delete) and views.
Scores and the order of ties do not come from faiss: it proposes candidates, `ranking.rank` decides.
"""

import logging
import math
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from dml.errors import ConfigError, DamagedFile, MissingExtra
from dml.index.base import Hits, Ids, Vectors, check_ids, check_search, check_vectors, no_hits
from dml.index.file import Sink, array_section, check_index_file, read_array, write_index_file
from dml.index.flat import search_exactly
from dml.index.ranking import SPARE, rank
from dml.index.rows import Rows

log = logging.getLogger(__name__)

GPU_K_LIMIT = 2048
"""faiss's GPU kernels select at most this many neighbours, and look into at most this many cells."""

FEW_ALLOWED = 4096
"""Up to this many allowed ids are compared one by one: quicker than a selector in a graph, and exact."""

WIDEN_LIMIT = 4096
"""An approximate search stops looking for equal scores beyond this many candidates."""

READ_BLOCK = 1 << 20


def faiss_is_installed() -> bool:
    """Whether `import faiss` would find something; does not import it."""
    return find_spec("faiss") is not None


def import_faiss() -> Any:
    """The faiss module. Raises MissingExtra naming the extras that bring it."""
    try:
        import faiss
    except ImportError as error:
        if error.name not in (None, "faiss"):
            raise
        raise MissingExtra("faiss (needed by the index kinds faiss_flat, hnsw and ivf)", "cpu") from None
    return faiss


def numpy_search(engine: Any) -> Any:
    """The engine's search on numpy arrays, with search parameters.

    `faiss.contrib.torch_utils`, which pytorch-metric-learning loads, replaces every index's `search` by one
    that takes tensors too, and no parameters; it leaves the original beside it under this name.
    """
    return getattr(engine, "search_numpy", engine.search)


def gpu_count() -> int:
    """GPUs that the installed faiss can use; 0 for faiss-cpu."""
    faiss = import_faiss()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def choose_device(device: str, kind: str, *, on_gpu: bool) -> str:
    """Decide "cpu" or "cuda:N" from what was asked for and what is there; say so in the log.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N".
        on_gpu: whether this kind has a GPU form.

    Raises:
        ConfigError: not a device, a kind without GPU form, a number beyond the GPUs that are there.
        MissingExtra: a GPU asked for, and faiss built without one.
    """
    if device == "cpu":
        return device
    if device == "auto":
        chosen = "cuda:0" if on_gpu and gpu_count() else "cpu"
        log.info("index %s: device auto means %s", kind, chosen)
        return chosen
    name, _, number = device.partition(":")
    if name != "cuda" or not (number or "0").isdigit():
        raise ConfigError(f'Unknown device "{device}". Known: auto, cpu, cuda:N.')
    if not on_gpu:
        raise ConfigError(
            f'The index kind "{kind}" has no GPU form. Use device = "cpu", or another kind (ivf).'
        )
    if not hasattr(import_faiss(), "StandardGpuResources"):
        raise MissingExtra(f'faiss with GPU support (asked for by device = "{device}")', "gpu")
    if int(number or 0) >= gpu_count():
        raise ConfigError(f'There is no "{device}": faiss sees {gpu_count()} GPUs.')
    return f"cuda:{int(number or 0)}"


class FaissIndex:
    """What the kinds share. Each says how its engine is made, and what effort means to it."""

    kind: ClassVar[str]
    exact: ClassVar[bool]
    learns: ClassVar[bool] = False
    on_gpu: ClassVar[bool]

    def __init__(self, dim: int, *, device: str, effort: int) -> None:
        if dim < 1:
            raise ConfigError(f"an index needs vectors of at least 1 number, got dim {dim}")
        if effort < 1:
            raise ConfigError(f'the effort of the index kind "{self.kind}" must be at least 1, got {effort}')
        self.faiss = import_faiss()
        self.dim, self.effort = dim, effort
        self.device = choose_device(device, self.kind, on_gpu=self.on_gpu)
        self.rows = Rows()
        self._engine: Any = None  # the CPU index; made at the first add or by prepare()
        self._gpu: GpuCopy | None = None

    # What a kind decides

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that make this index again."""
        return {"effort": self.effort}

    def _make_engine(self, sample: Vectors, count: int) -> Any:
        raise NotImplementedError

    def _parameters(self, fetch: int, effort: int, selector: Any) -> Any:
        raise NotImplementedError

    def _vectors_at(self, slots: NDArray[np.int64]) -> Vectors:
        return self._all_vectors()[slots]

    def _all_vectors(self) -> Vectors:
        """(slots, D) where faiss keeps them; no copy."""
        flat = self._flat_storage()
        return self.faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * self.dim).reshape(flat.ntotal, self.dim)

    def _flat_storage(self) -> Any:
        return self._engine

    # The protocol

    def __len__(self) -> int:
        return self.rows.live

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "exact": self.exact, "device": self.device, **self.settings()}

    def prepare(self, sample: Vectors, count: int) -> None:
        if self._engine is None and len(sample):
            self._engine = self._make_engine(check_vectors(sample, self.dim, "the sample"), count)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        rows = check_vectors(vectors, self.dim, "the vectors to add")
        names = check_ids(ids, len(rows))
        if not len(rows):
            return
        self.rows.append(names)
        self.prepare(rows, len(rows))
        self._engine.add(rows)
        self._gpu = None

    def remove(self, ids: Ids) -> int:
        return self.rows.kill(ids)

    def without(self, ids: Ids) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.rows = self.rows.view()
        twin.rows.kill(ids)
        return twin

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        effort: int | None = None,
        allowed: Ids | None = None,
        exact: bool = False,
    ) -> Hits:
        check_search(k, effort)
        queries = check_vectors(queries, self.dim, "the query")
        slots = None
        if allowed is not None:
            slots = self.rows.find(np.unique(np.asarray(allowed, np.int64)))
            slots = slots[slots >= 0]
        count = self.rows.live if slots is None else len(slots)
        if not count or not len(queries):
            return no_hits(len(queries), k)
        if slots is not None and (count <= FEW_ALLOWED or self.device != "cpu"):
            return self._compare(queries, k, slots)
        return self._search(queries, k, slots=slots, count=count, effort=effort or self.effort, exact=exact)

    def _search(
        self,
        queries: Vectors,
        k: int,
        *,
        slots: NDArray[np.int64] | None,
        count: int,
        effort: int,
        exact: bool,
    ) -> Hits:
        """Ask the engine for candidates until the order of the first k is decided; compare what is not."""
        if slots is not None and not exact:
            effort = math.ceil(effort * len(self.rows) / count)  # most of what it meets will not be allowed
        hits = no_hits(len(queries), k)
        pending = np.arange(len(queries))
        fetch = min(k + SPARE, count)
        while len(pending):
            found = self._candidates(queries[pending], fetch, effort=effort, slots=slots, exact=exact)
            if found is None:
                break
            rough, names = found
            floor = np.where(fetch >= count, -np.inf, rough[:, -1]).astype(np.float32)
            ranked = rank(
                queries[pending],
                names,
                rough_floor=floor,
                k=k,
                ids=self.rows.ids,
                vectors_at=self._vectors_at,
            )
            width = ranked.ids.shape[1]
            hits.ids[pending, :width], hits.scores[pending, :width] = ranked.ids, ranked.scores
            short = (names >= 0).sum(axis=1) < min(k, count)
            if short.any():
                self._fill(hits, queries, pending[short], slots=slots)
            pending = pending[~ranked.settled & ~short]
            if fetch >= count or (fetch >= WIDEN_LIMIT and not (exact or self.exact)):
                return hits
            fetch = min(4 * fetch, count)
        if len(pending):
            self._fill(hits, queries, pending, slots=slots)
        return hits

    def _fill(
        self, hits: Hits, queries: Vectors, which: NDArray[np.int64], *, slots: NDArray[np.int64] | None
    ) -> None:
        """Answer these queries by comparing all that may be returned."""
        found = self._compare(
            queries[which], hits.ids.shape[1], self.rows.living() if slots is None else slots
        )
        hits.ids[which], hits.scores[which] = found.ids, found.scores

    def _compare(self, queries: Vectors, k: int, slots: NDArray[np.int64]) -> Hits:
        vectors = self._vectors_at(slots)
        return search_exactly(queries, vectors, self.rows.ids[slots], k=k)

    def _candidates(
        self, queries: Vectors, fetch: int, *, effort: int, slots: NDArray[np.int64] | None, exact: bool
    ) -> tuple[Vectors, NDArray[np.int64]] | None:
        """(Q, fetch) engine scores, best first, and slots; None where the engine cannot fetch as many."""
        if self.device != "cpu":
            return self._gpu_candidates(queries, fetch, effort=effort, exact=exact)
        selector, keep = self._selector(slots)
        if exact:
            effort = max(effort, len(self.rows))
        parameters = self._parameters(fetch, effort, selector)
        engine = (
            self._flat_storage() if exact and not self.exact and self._has_flat_storage() else self._engine
        )
        if engine is not self._engine:
            parameters = self.faiss.SearchParameters(sel=selector) if selector is not None else None
        found = numpy_search(engine)(queries, fetch, params=parameters)
        del keep  # the bitmap that the selector points into had to live until here
        return found

    def _has_flat_storage(self) -> bool:
        return True

    def _cells(self) -> int:
        return 1

    def _selector(self, slots: NDArray[np.int64] | None) -> tuple[Any, NDArray[np.uint8] | None]:
        """faiss's selector of the slots that may be returned, with the memory that it points into."""
        if slots is not None:
            mask = np.zeros(len(self.rows), bool)
            mask[slots] = True
            bits = np.packbits(mask, bitorder="little")
        elif self.rows.live < len(self.rows):
            bits = self.rows.bits()
        else:
            return None, None
        return self.faiss.IDSelectorBitmap(len(bits), self.faiss.swig_ptr(bits)), bits

    def _gpu_candidates(
        self, queries: Vectors, fetch: int, *, effort: int, exact: bool
    ) -> tuple[Vectors, NDArray[np.int64]] | None:
        """As on the CPU, but dead slots are fetched too and then hidden: GPU indexes take no selector."""
        dead = len(self.rows) - self.rows.live
        if fetch + dead > GPU_K_LIMIT or (exact and self._cells() > GPU_K_LIMIT):
            log.info(
                "index %s: %d neighbours exceed the GPU's %d; compared on the CPU",
                self.kind,
                fetch,
                GPU_K_LIMIT,
            )
            return None
        if self._gpu is None:
            self._gpu = GpuCopy(self.faiss, self._engine, self.device)
        effort = max(effort, len(self.rows)) if exact else effort
        rough, slots = self._gpu.search(queries, fetch + dead, self._parameters(fetch + dead, effort, None))
        if dead:
            hidden = (slots < 0) | ~self.rows.alive[slots]
            rough, slots = np.where(hidden, -np.inf, rough), np.where(hidden, -1, slots)
            order = np.argsort(-rough, axis=1, kind="stable")[:, :fetch]
            rough, slots = np.take_along_axis(rough, order, axis=1), np.take_along_axis(slots, order, axis=1)
        return rough.astype(np.float32), slots

    def save(self, path: Path, *, note: Mapping[str, Any] | None = None) -> None:
        sections = {
            "ids": array_section(self.rows.ids),
            "alive": array_section(np.packbits(self.rows.alive, bitorder="little")),
        }
        if self._engine is not None:
            sections["engine"] = self._write_engine
        write_index_file(
            path,
            kind=self.kind,
            dim=self.dim,
            count=len(self.rows),
            settings=self.settings(),
            note=note or {},
            sections=sections,
        )

    def _write_engine(self, sink: Sink) -> None:
        trouble: list[BaseException] = []

        def take(data: bytes) -> None:
            # An exception here would have to pass through C++: it is kept, and raised when faiss is
            # done.
            if not trouble:
                try:
                    sink.write(data)
                except BaseException as error:
                    trouble.append(error)

        self.faiss.write_index(self._engine, self.faiss.PyCallbackIOWriter(take, READ_BLOCK))
        if trouble:
            raise trouble[0]

    @classmethod
    def load(cls, path: Path, *, device: str = "auto") -> Self:
        """Read what `save` wrote. Raises DamagedFile, MissingExtra."""
        header = check_index_file(path)
        index = cls(header.dim, device=device, **header.settings)
        bits = read_array(path, header, "alive", np.uint8, ((header.count + 7) // 8,))
        alive = np.unpackbits(bits, count=header.count, bitorder="little").astype(bool)
        index.rows = Rows(read_array(path, header, "ids", np.int64, (header.count,)), alive)
        if "engine" in header.sections:
            offset, length, _ = header.sections["engine"]
            with open(path, "rb") as file:
                file.seek(offset)
                index._engine = index._read_engine(file, length)
            if index._engine.ntotal != header.count or index._engine.d != header.dim:
                raise DamagedFile(
                    f"{path} contradicts itself: {header.count} ids of dim {header.dim}, but "
                    f"{index._engine.ntotal} vectors of dim {index._engine.d}"
                )
        return index

    def _read_engine(self, file: BinaryIO, length: int) -> Any:
        left = length

        def give(size: int) -> bytes:
            nonlocal left
            data = file.read(min(size, left))
            left -= len(data)
            return data

        try:
            return self.faiss.read_index(self.faiss.PyCallbackIOReader(give, READ_BLOCK))
        except RuntimeError as error:  # the bytes are what was written: another version of faiss wrote them
            reason = str(error).strip().splitlines()[-1]
            raise DamagedFile(
                f"faiss {self.faiss.__version__} cannot read the saved index: {reason}"
            ) from error


class GpuCopy:
    """A copy of an index on one GPU. faiss's GPU resources serve one thread at a time: searches queue up."""

    def __init__(self, faiss: Any, engine: Any, device: str) -> None:
        self.number = int(device.partition(":")[2])
        self.resources = faiss.StandardGpuResources()
        self.engine = faiss.index_cpu_to_gpu(self.resources, self.number, engine)
        self.lock = threading.Lock()

    def search(self, queries: Vectors, k: int, parameters: Any) -> tuple[Vectors, NDArray[np.int64]]:
        with self.lock:
            return numpy_search(self.engine)(queries, k, params=parameters)


class FaissFlatIndex(FaissIndex):
    """Every vector is compared, by faiss. Exact; 4 · D bytes per vector; `effort` changes nothing."""

    kind = "faiss_flat"
    exact = True
    on_gpu = True

    def __init__(self, dim: int, *, device: str = "auto") -> None:
        super().__init__(dim, device=device, effort=1)

    def settings(self) -> dict[str, Any]:
        return {}

    def _make_engine(self, sample: Vectors, count: int) -> Any:
        return self.faiss.IndexFlatIP(self.dim)

    def _parameters(self, fetch: int, effort: int, selector: Any) -> Any:
        return None if selector is None else self.faiss.SearchParameters(sel=selector)


class FaissHnswIndex(FaissIndex):
    """A graph of neighbours, walked towards the query. Approximate, CPU only.

    Memory: 4 · D + 8 · links bytes per vector.

    Args:
        links: neighbours kept per vector (twice that on the lowest level). More: better recall, memory, build
            time.
        build_effort: candidates examined per vector while building (efConstruction).
        effort: candidates examined per query (efSearch) when the search names none.

    Source: Malkov and Yashunin, "Efficient and robust approximate nearest neighbor search using Hierarchical
    Navigable Small World graphs", arXiv:1603.09320.
    """

    kind = "hnsw"
    exact = False
    on_gpu = False

    def __init__(
        self, dim: int, *, device: str = "auto", links: int = 32, build_effort: int = 100, effort: int = 128
    ) -> None:
        if links < 2 or build_effort < 1:
            raise ConfigError(f"hnsw needs links >= 2 and build_effort >= 1, got {links} and {build_effort}")
        super().__init__(dim, device=device, effort=effort)
        self.links, self.build_effort = links, build_effort

    def settings(self) -> dict[str, Any]:
        return {"links": self.links, "build_effort": self.build_effort, "effort": self.effort}

    def _make_engine(self, sample: Vectors, count: int) -> Any:
        engine = self.faiss.IndexHNSWFlat(self.dim, self.links, self.faiss.METRIC_INNER_PRODUCT)
        engine.hnsw.efConstruction = self.build_effort
        return engine

    def _parameters(self, fetch: int, effort: int, selector: Any) -> Any:
        effort = min(max(effort, fetch), len(self.rows))
        if selector is None:
            return self.faiss.SearchParametersHNSW(efSearch=effort)
        return self.faiss.SearchParametersHNSW(efSearch=effort, sel=selector)

    def _flat_storage(self) -> Any:
        return self.faiss.downcast_index(self._engine.storage)


class FaissIvfIndex(FaissIndex):
    """Vectors in cells around centroids; a search looks into the nearest cells. Approximate.

    Memory: 4 · D + 16 bytes per vector.

    Args:
        cells: how many; 0: from the number of vectors at the first add, see `cells_for`.
        effort: cells looked into per query (nprobe) when the search names none; 0: a tenth of the cells, at
            least 16.

    The cells are learned from the sample of `prepare`, or from the first add. A collection that grows far
    beyond that deserves a new build.
    """

    kind = "ivf"
    exact = False
    learns = True
    on_gpu = True

    def __init__(self, dim: int, *, device: str = "auto", cells: int = 0, effort: int = 0) -> None:
        if cells < 0 or effort < 0:
            raise ConfigError(f"ivf needs cells >= 0 and effort >= 0, got {cells} and {effort}")
        super().__init__(dim, device=device, effort=effort or 16)
        self.cells, self._effort_given = cells, effort > 0

    def settings(self) -> dict[str, Any]:
        return {"cells": self.cells, "effort": self.effort}

    def _make_engine(self, sample: Vectors, count: int) -> Any:
        self.cells = min(self.cells or cells_for(count), len(sample))
        if not self._effort_given:
            self.effort = min(max(16, self.cells // 10), self.cells)
        engine = self.faiss.IndexIVFFlat(
            self.faiss.IndexFlatIP(self.dim), self.dim, self.cells, self.faiss.METRIC_INNER_PRODUCT
        )
        engine.cp.spherical = True  # centroids of unit vectors, compared by inner product
        engine.cp.min_points_per_centroid = (
            1  # cells_for keeps enough; a user's own number is the user's choice
        )
        engine.train(sample)
        engine.make_direct_map()
        return engine

    def _parameters(self, fetch: int, effort: int, selector: Any) -> Any:
        cells = min(effort, self.cells if self.device == "cpu" else min(self.cells, GPU_K_LIMIT))
        if selector is None:
            return self.faiss.SearchParametersIVF(nprobe=cells)
        return self.faiss.SearchParametersIVF(nprobe=cells, sel=selector)

    def _has_flat_storage(self) -> bool:
        return False  # looking into all cells is exact

    def _cells(self) -> int:
        return self.cells

    def _vectors_at(self, slots: NDArray[np.int64]) -> Vectors:
        return self._engine.reconstruct_batch(np.ascontiguousarray(slots, np.int64))


def cells_for(count: int) -> int:
    """4 · √N cells, but at least 39 vectors in each on average: faiss's own bounds for sound centroids."""
    return max(1, min(round(4 * math.sqrt(count)), count // 39))
