"""What the kinds that faiss searches share, and the exact one: inner products, on the CPU or on GPUs.

faiss numbers its vectors 0, 1, 2, …; which id lives in which of these slots is kept here, so that all kinds
have string-free int64 ids, removal (a dead slot that selectors skip; faiss's HNSW cannot delete) and views.
Scores and the order of ties do not come from faiss: it proposes candidates, `ranking.rank` decides.
"""

import logging
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from dml.errors import ConfigError, DamagedFile, MissingExtra
from dml.index.base import Hits, Ids, Vectors, check_ids, check_search, check_vectors, no_hits
from dml.index.file import Header, Sink, array_section, check_index_file, read_array, write_index_file
from dml.index.flat import search_exactly
from dml.index.gpu import GPU_K_LIMIT, GpuCopy, choose_device
from dml.index.kept import EngineCodes, Kept, check_precision
from dml.index.ranking import SPARE, rank
from dml.index.rows import Rows
from dml.startup import is_prepared

log = logging.getLogger(__name__)

FEW_ALLOWED = 4096
"""Up to this many allowed ids are compared one by one: quicker than a selector in a graph, and exact."""

WIDEN_LIMIT = 4096
"""An approximate search stops looking for equal scores beyond this many candidates."""

HALF_ERROR = 1e-3
"""How far the product of two unit vectors may be from the true one where a GPU rounds both to float16: each
number by at most 2**-11 of itself, so the sum by at most twice that."""

MANY_QUERIES = 16
"""From this many on a matrix product pays; faiss makes one when its threshold lies below."""

READ_BLOCK = 1 << 20
GPU_BLOCK = 65_536  # rows decoded at once on their way to a GPU
BLAS_FROM = 20
"""Queries from which faiss shall compare by one matrix product: what faiss itself took for long."""

SCALAR_TYPES: Mapping[str, str] = {"float16": "QT_fp16", "bfloat16": "QT_bf16", "int8": "QT_8bit"}
"""How faiss calls a precision."""


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
        raise MissingExtra("faiss (needed by all index kinds but flat and matrix)", "cpu") from None
    tune_faiss()
    return faiss


@cache
def tune_faiss() -> None:
    """In a process of our own commands, once: let faiss compare many queries by BLAS.

    Some builds put the threshold so high (128,000 queries) that learning cells and assigning vectors to them
    takes many times as long. A process that merely uses the library keeps what it has.
    """
    if is_prepared():
        import faiss

        faiss.cvar.distance_compute_blas_threshold = BLAS_FROM


def numpy_search(engine: Any) -> Any:
    """The engine's search on numpy arrays, with search parameters.

    `faiss.contrib.torch_utils`, which pytorch-metric-learning loads, replaces every index's `search` by one
    that takes tensors too, and no parameters; it leaves the original beside it under this name.
    """
    return getattr(engine, "search_numpy", engine.search)


class FaissIndex:
    """What the kinds share. Each says how its engine is made, and what effort means to it."""

    kind: ClassVar[str]
    learns: bool = False
    on_gpu: bool = False
    rough: bool = False
    """Whether the engine compares codes that say less than the vectors as they are kept."""

    def __init__(self, dim: int, *, device: str, effort: int, precision: str = "float32") -> None:
        if dim < 1:
            raise ConfigError(f"an index needs vectors of at least 1 number, got dim {dim}")
        if effort < 1:
            raise ConfigError(f'the effort of the index kind "{self.kind}" must be at least 1, got {effort}')
        self.faiss = import_faiss()
        self.dim, self.effort, self.precision = dim, effort, precision
        self.device = choose_device(device, self.kind, on_gpu=self.on_gpu, faiss=self.faiss)
        self.rows = Rows()
        self._engine: Any = None  # the CPU index; made at the first add or by prepare()
        self._gpu: GpuCopy | None = None
        self._kept: Vectors | Kept | None = None  # where the engine's vectors are read; None: look again

    # What a kind decides

    @property
    def exact(self) -> bool:
        """Whether every search returns the true neighbours."""
        return False

    def settings(self) -> dict[str, Any]:
        """The keyword arguments that make this index again."""
        return {"effort": self.effort}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the vectors, what is built of them, and their ids take."""
        engine = 0 if self._engine is None else self._engine_bytes()
        return engine + self.rows.ids.nbytes + self.rows.alive.nbytes

    def _engine_bytes(self) -> int:
        raise NotImplementedError

    def _make_engine(self, sample: Vectors, count: int) -> Any:
        raise NotImplementedError

    def _parameters(self, fetch: int, effort: int, selector: Any) -> Any:
        raise NotImplementedError

    def _feed(self, rows: Vectors) -> None:
        """Give the engine new rows, at the end."""
        if self._engine is None:
            self._engine = self._make_engine(rows, len(rows))
        self._engine.add(rows)

    def _fetch(self, k: int, effort: int) -> int:
        """How many candidates to ask the engine for at first."""
        return k + SPARE

    def _raised(self, effort: int, share: float) -> int:
        """The effort for a search that may return only this share of the vectors."""
        return math.ceil(effort / share)  # most of what it meets will not be allowed

    def _vectors(self) -> Vectors | Kept:
        """(slots, D) as they are kept, read where they are."""
        if self._kept is None:
            self._kept = self._find_vectors()
        return self._kept

    def _find_vectors(self) -> Vectors | Kept:
        flat = self._flat_storage()
        if self.precision != "float32":
            return EngineCodes(self.faiss, flat, self.precision)
        return self.faiss.rev_swig_ptr(flat.get_xb(), flat.ntotal * self.dim).reshape(flat.ntotal, self.dim)

    def _flat_storage(self) -> Any:
        """The part of the engine that can be searched exactly, slot by slot."""
        return self._engine

    def _more_sections(self) -> Mapping[str, Callable[[Sink], None]]:
        """What belongs into the file besides ids and engine."""
        return {}

    def _read_more(self, path: Path, header: Header) -> None:
        """Read what `_more_sections` wrote."""

    # The protocol

    def __len__(self) -> int:
        return self.rows.live

    def describe(self) -> dict[str, Any]:
        about = {"kind": self.kind, "exact": self.exact, "device": self.device}
        return {**about, "precision": self.precision, **self.settings()}

    def prepare(self, sample: Vectors, count: int) -> None:
        if self._engine is None and len(sample):
            self._engine = self._make_engine(check_vectors(sample, self.dim, "the sample"), count)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        rows = check_vectors(vectors, self.dim, "the vectors to add")
        names = check_ids(ids, len(rows))
        if not len(rows):
            return
        self.rows.append(names)
        self._feed(rows)
        self._gpu = self._kept = None

    def set_effort(self, effort: int) -> None:
        """The effort of searches that name none, from now on; before the index is searched by others."""
        self.effort = effort

    def remove(self, ids: Ids) -> int:
        return self.rows.kill(ids)

    def without(self, ids: Ids) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.rows = self.rows.view()
        twin.rows.kill(ids)
        return twin

    def vectors_of(self, ids: Ids) -> Vectors:
        """(N, D) the vectors of these ids as they are kept: what scores are computed with.

        Raises:
            KeyError: an id that is not here.
        """
        slots = self.rows.slots_of(ids)
        return np.array(self._vectors()[slots]) if len(slots) else np.empty((0, self.dim), np.float32)

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
            slots = self.rows.living_slots(allowed)
        count = self.rows.live if slots is None else len(slots)
        if not count or not len(queries):
            return no_hits(len(queries), k)
        if slots is not None and (count <= FEW_ALLOWED or self.device != "cpu"):
            return self._compare(queries, k, slots)
        if self._compares_all(len(queries), exact):
            return self._compare(queries, k, slots)
        return self._search(queries, k, slots=slots, count=count, effort=effort or self.effort, exact=exact)

    def _compares_all(self, queries: int, exact: bool) -> bool:
        """Whether to answer by comparing every vector here, without the engine."""
        return self._engine is None or (exact and self.rough)

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
            effort = self._raised(effort, count / len(self.rows))
        hits, pending = None, None  # None: all
        fetch = min(self._fetch(k, effort), count)
        while pending is None or len(pending):
            some = queries if pending is None else queries[pending]
            found = self._candidates(some, fetch, effort=effort, slots=slots, exact=exact)
            if found is None:
                break
            rough, names = found
            ranked = rank(
                some,
                names,
                rough_floor=None if self.rough else self._floor(rough, whole=fetch >= count),
                k=k,
                ids=self.rows.ids,
                vectors_at=self._vectors().__getitem__,
            )
            last = names[:, min(k, count) - 1]  # faiss puts missing ones last
            settled = fetch >= count or ranked.settled.all()
            if hits is None and k <= count and settled and last.min() >= 0:
                return Hits(ranked.ids, ranked.scores)
            done, whole = ranked.settled | (fetch >= count), last >= 0
            if hits is None or pending is None:
                hits, pending = no_hits(len(queries), k), np.arange(len(queries))
            width = ranked.ids.shape[1]
            hits.ids[pending, :width], hits.scores[pending, :width] = ranked.ids, ranked.scores
            if not whole.all():
                self._fill(hits, queries, pending[~whole], slots=slots)
            pending = pending[~done & whole]
            if fetch >= WIDEN_LIMIT and not (exact or self.exact):
                return hits
            fetch = min(4 * fetch, count)
        if hits is None or pending is None:
            return self._compare(queries, k, slots)
        if len(pending):
            self._fill(hits, queries, pending, slots=slots)
        return hits

    def _floor(self, rough: Vectors, *, whole: bool) -> NDArray[np.float32]:
        """(Q,) what no row that was not proposed scores higher than."""
        if whole:
            return np.full(len(rough), -np.inf, np.float32)
        return rough[:, -1]

    def _fill(
        self, hits: Hits, queries: Vectors, which: NDArray[np.int64], *, slots: NDArray[np.int64] | None
    ) -> None:
        """Answer these queries by comparing all that may be returned."""
        found = self._compare(queries[which], hits.ids.shape[1], slots)
        hits.ids[which], hits.scores[which] = found.ids, found.scores

    def _compare(self, queries: Vectors, k: int, slots: NDArray[np.int64] | None) -> Hits:
        if slots is None and self.rows.live < len(self.rows):
            slots = self.rows.living()
        return search_exactly(queries, self._vectors(), self.rows.ids, k=k, slots=slots)

    def _candidates(
        self, queries: Vectors, fetch: int, *, effort: int, slots: NDArray[np.int64] | None, exact: bool
    ) -> tuple[Vectors, NDArray[np.int64]] | None:
        """(Q, fetch) engine scores, best first, and slots; None where the engine cannot fetch as many."""
        if self.device != "cpu":
            return self._gpu_candidates(queries, fetch, effort=effort, exact=exact)
        selector, keep = self._selector(slots)
        if exact:
            effort = max(effort, len(self.rows))
        engine = self._engine
        if exact and not self.exact and self._has_flat_storage():
            engine = self._flat_storage()
            parameters = self.faiss.SearchParameters(sel=selector) if selector is not None else None
        else:
            parameters = self._parameters(fetch, effort, selector)
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

    def _gpu_bytes(self) -> int:
        """What the index takes on a GPU."""
        return len(self.rows) * (4 * self.dim + 8)

    def _gpu_copy(self) -> GpuCopy:
        return GpuCopy(self.faiss, self._engine, self.device, needed=self._gpu_bytes())

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
            self._gpu = self._gpu_copy()
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
            **self._more_sections(),
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
            first_format="precision" not in self.settings(),
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
            index._check_engine(path, header)
        index._read_more(path, header)
        return index

    def _check_engine(self, path: Path, header: Header) -> None:
        """Refuse an engine that does not hold what the ids name. Raises DamagedFile."""
        if self._engine.ntotal != header.count or self._engine.d != header.dim:
            raise DamagedFile(
                f"{path} contradicts itself: {header.count} ids of dim {header.dim}, but "
                f"{self._engine.ntotal} vectors of dim {self._engine.d}"
            )

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


class FaissFlatIndex(FaissIndex):
    """Every vector is compared, by faiss. Exact for whole vectors; `effort` changes nothing.

    Memory: 4 · D bytes per vector, 2 · D as float16 or bfloat16, D as int8.

    Args:
        precision: float32, float16, bfloat16 or int8: how vectors are kept. In fewer bits the neighbours are
            the true ones of the vectors as kept, which are nearly those of the whole vectors.
    """

    kind = "faiss_flat"
    on_gpu = True

    def __init__(self, dim: int, *, device: str = "auto", precision: str = "float32") -> None:
        check_precision(self.kind, precision, ("float32", *SCALAR_TYPES))
        self.learns = precision == "int8"
        self.on_gpu = precision in ("float32", "float16")
        super().__init__(dim, device=device, effort=1, precision=precision)

    @property
    def exact(self) -> bool:
        return self.precision == "float32"

    def settings(self) -> dict[str, Any]:
        return {} if self.precision == "float32" else {"precision": self.precision}

    def _engine_bytes(self) -> int:
        return self._engine.ntotal * self._engine.code_size

    def _compares_all(self, queries: int, exact: bool) -> bool:
        if self._engine is None or self.device != "cpu":
            return self._engine is None
        if self.precision != "float32":
            return False
        # numpy's product of one vector, and of many where faiss would compare pair by pair, is quicker.
        threshold = self.faiss.cvar.distance_compute_blas_threshold
        return queries == 1 or MANY_QUERIES <= queries < threshold

    def _floor(self, rough: Vectors, *, whole: bool) -> NDArray[np.float32]:
        floor = super()._floor(rough, whole=whole)
        return floor + np.float32(HALF_ERROR) if self.device != "cpu" and self._half() else floor

    def _half(self) -> bool:
        return self.precision == "float16"

    def _gpu_bytes(self) -> int:
        return len(self.rows) * self.dim * (2 if self._half() else 4)

    def _gpu_copy(self) -> GpuCopy:
        if not self._half():
            return super()._gpu_copy()
        # faiss has no GPU form of its scalar quantizer; a flat index there can keep float16.
        empty = self.faiss.IndexFlatIP(self.dim)
        copy = GpuCopy(self.faiss, empty, self.device, needed=self._gpu_bytes(), half=True)
        for start in range(0, len(self.rows), GPU_BLOCK):
            copy.add(self._vectors()[start : start + GPU_BLOCK])
        return copy

    def _make_engine(self, sample: Vectors, count: int) -> Any:
        return scalar_storage(self.faiss, self.dim, self.precision, sample)

    def _parameters(self, fetch: int, effort: int, selector: Any) -> Any:
        return None if selector is None else self.faiss.SearchParameters(sel=selector)


def scalar_storage(faiss: Any, dim: int, precision: str, sample: Vectors) -> Any:
    """An empty faiss index that compares all vectors, kept at this precision."""
    if precision == "float32":
        return faiss.IndexFlatIP(dim)
    scalar = getattr(faiss.ScalarQuantizer, SCALAR_TYPES[precision])
    storage = faiss.IndexScalarQuantizer(dim, scalar, faiss.METRIC_INNER_PRODUCT)
    storage.train(sample)
    return storage
