"""Vectors in cells, and vectors as short codes: IVF, product quantisation, RaBitQ.

Codes propose: what they find is compared again with the vectors as the index keeps them (`precision`).
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.errors import ConfigError
from dml.index.base import Vectors
from dml.index.faiss_index import FaissIndex
from dml.index.file import Header, Sink
from dml.index.gpu import GPU_K_LIMIT
from dml.index.kept import Kept, KeptVectors, Reconstructed, check_precision
from dml.index.ranking import SPARE

CODES = ("none", "int8", "pq", "pq8", "rabitq")
"""What lies in a cell: whole vectors, a byte per number, pieces of 4 bits, pieces of 8 bits, signs."""

LEARN_FROM = 1_000
"""Codes are learned from so many vectors at least; fewer are compared one by one."""

FAST_SCAN_BLOCK = 32
"""Vectors that faiss's fast scan compares at once; its lists are filled up to whole blocks."""

GPU_PIECES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Bytes of a pq8 code that faiss's GPU kernels know, and that need no further option."""


class Scan(NamedTuple):
    """What a search looks through: so many cells, for so many candidates."""

    cells: int
    candidates: int


class FaissIvfIndex(FaissIndex):
    """Vectors in cells around centroids; a search looks into the nearest cells. Approximate.

    Memory per vector: 4 · D + 16 bytes with codes "none". Otherwise the code (int8: D, pq: pieces / 2, pq8:
    pieces, rabitq: bits · D / 8 + 8), 8 bytes, and the vector at its precision.

    Args:
        cells: how many; 0: from the number of vectors at the first add, see `cells_for`.
        effort: cells looked into per query (nprobe) when the search names none; 0: a tenth of the cells, at
            least 16. With codes, an effort beyond the number of cells compares more candidates instead.
        codes: none, int8, pq (4 bits a piece, compared in registers), pq8 (8 bits a piece; also on a GPU), or
            rabitq (signs after a random rotation).
        pieces: of pq and pq8; 0: D / 2, and about D / 4, see `pieces_for`.
        bits: of rabitq, per number, 1 to 8.
        refine: with codes: candidates compared again, per result (at least ten results are reckoned).
        precision: with codes: float32, float16, bfloat16 or int8, how the vectors themselves are kept.

    Cells and codes are learned from the sample of `prepare`, or from the first add; codes wait for
    `LEARN_FROM` vectors. A collection that grows far beyond that deserves a new build.
    """

    kind = "ivf"
    learns = True
    on_gpu = True

    def __init__(
        self,
        dim: int,
        *,
        device: str = "auto",
        cells: int = 0,
        effort: int = 0,
        codes: str = "none",
        pieces: int = 0,
        bits: int = 1,
        refine: int = 8,
        precision: str = "float32",
    ) -> None:
        if cells < 0 or effort < 0:
            raise ConfigError(f"{self.kind} needs cells >= 0 and effort >= 0, got {cells} and {effort}")
        if codes not in CODES:
            raise ConfigError(f'{self.kind} has the codes {", ".join(CODES)}; got "{codes}"')
        if pieces < 0 or pieces > dim or refine < 1 or not 1 <= bits <= 8:
            raise ConfigError(
                f"{self.kind} needs 0 <= pieces <= {dim} (the dimension), refine >= 1 and bits from 1 to 8, "
                f"got {pieces}, {refine} and {bits}"
            )
        known = ("float32",) if codes == "none" else KeptVectors.PRECISIONS
        check_precision(f'{self.kind}" with codes "{codes}', precision, known)
        self.on_gpu = codes in ("none", "pq8")
        super().__init__(dim, device=device, effort=effort or 16, precision=precision)
        self.cells, self._effort_given = cells, effort > 0
        self.codes, self.pieces, self.bits, self.refine = codes, pieces, bits, refine
        self.rough = codes != "none"
        self._own = KeptVectors(dim, precision) if self.rough else None

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {"cells": self.cells, "effort": self.effort}
        if self.codes != "none":
            found |= {"codes": self.codes, "refine": self.refine, "precision": self.precision}
        if self.codes in ("pq", "pq8"):
            found["pieces"] = self.pieces
        return {**found, "bits": self.bits} if self.codes == "rabitq" else found

    def _engine_bytes(self) -> int:
        cells = self._cells_engine()
        lists = cells.invlists
        sizes = [lists.list_size(one) for one in range(cells.nlist)]
        block = FAST_SCAN_BLOCK if self.codes in ("pq", "rabitq") else 1
        held = sum(-(-size // block) * block for size in sizes)
        codes = held * int(cells.code_size) + 8 * sum(sizes) + 4 * cells.nlist * cells.d
        return codes + (8 * len(self.rows) if self._own is None else self._own.nbytes)

    @property
    def nbytes(self) -> int:
        waiting = 0 if self._own is None or self._engine is not None else self._own.nbytes
        return super().nbytes + waiting

    def _make_engine(self, sample: Vectors, count: int) -> Any:
        self.cells = min(self.cells or cells_for(count), len(sample))
        if not self._effort_given:
            self.effort = min(max(16, self.cells // 10), self.cells)
        engine = self._empty_engine(self._width())
        cells = engine if self.codes != "rabitq" else self.faiss.downcast_index(engine.index)
        cells.cp.spherical = True  # centroids of unit vectors, compared by inner product
        cells.cp.min_points_per_centroid = (
            1  # cells_for keeps enough; a user's own number is the user's choice
        )
        engine.train(self._widened(sample))
        if self.codes == "none":
            engine.make_direct_map()
        return engine

    def _width(self) -> int:
        """Numbers per vector in the engine: whole pieces, filled up with zeros."""
        if self.codes in ("pq", "pq8"):
            self.pieces = self.pieces or pieces_for(self.codes, self.dim)
            return -(-self.dim // self.pieces) * self.pieces
        return -(-self.dim // 8) * 8 if self.codes == "rabitq" else self.dim

    def _widened(self, rows: Vectors) -> Vectors:
        gap = self._width() - self.dim
        return np.pad(rows, ((0, 0), (0, gap))) if gap else rows

    def _empty_engine(self, width: int) -> Any:
        faiss, product = self.faiss, self.faiss.METRIC_INNER_PRODUCT
        quantizer = faiss.IndexFlatIP(width)
        if self.codes == "none":
            engine = faiss.IndexIVFFlat(quantizer, width, self.cells, product)
        elif self.codes == "int8":
            scalar = faiss.ScalarQuantizer.QT_8bit
            engine = faiss.IndexIVFScalarQuantizer(quantizer, width, self.cells, scalar, product, True)
        elif self.codes == "pq":
            engine = faiss.IndexIVFPQFastScan(
                quantizer, width, self.cells, self.pieces, 4, product, FAST_SCAN_BLOCK
            )
        elif self.codes == "pq8":
            engine = faiss.IndexIVFPQ(quantizer, width, self.cells, self.pieces, 8, product)
        else:
            engine = faiss.IndexIVFRaBitQFastScan(
                quantizer, width, self.cells, product, FAST_SCAN_BLOCK, True, self.bits
            )
        engine.own_fields = True
        quantizer.this.disown()
        return self._rotated(engine, width) if self.codes == "rabitq" else engine

    def _rotated(self, engine: Any, width: int) -> Any:
        """The engine behind a random rotation: signs say most when no dimension matters more than others."""
        rotation = self.faiss.RandomRotationMatrix(width, width)
        rotation.init(width)  # the seed: the same for the same width
        whole = self.faiss.IndexPreTransform(rotation, engine)
        whole.own_fields = True
        rotation.this.disown()
        engine.this.disown()
        return whole

    def _cells_engine(self) -> Any:
        """The part of the engine that has the cells."""
        return self._engine if self.codes != "rabitq" else self.faiss.downcast_index(self._engine.index)

    def _feed(self, rows: Vectors) -> None:
        if self._own is None:
            return super()._feed(rows)
        self._own.append(rows)
        if self._engine is None:
            if len(self._own) < LEARN_FROM:
                return None
            rows = self._own[:]  # all that waited
            self._engine = self._make_engine(rows, len(rows))
        engine: Any = self._engine
        engine.add(self._widened(rows))
        return None

    def prepare(self, sample: Vectors, count: int) -> None:
        if self._own is not None:
            self._own.reserve(count)
            if len(sample) < LEARN_FROM:
                return
        super().prepare(sample, count)

    def _find_vectors(self) -> Vectors | Kept:
        return Reconstructed(self._engine) if self._own is None else self._own

    def _scan(self, k: int, effort: int) -> Scan:
        """What an effort means: cells first, and when all are looked into, more candidates."""
        cells = min(effort, self.cells)
        beyond = max(1.0, effort / self.cells)
        return Scan(cells, max(k + SPARE, math.ceil(self.refine * max(k, LEAST_RESULTS) * beyond)))

    def _fetch(self, k: int, effort: int) -> int:
        return self._scan(k, effort).candidates if self.rough else k + SPARE

    def _parameters(self, fetch: int, effort: int, selector: Any) -> Any:
        cells = min(effort, self.cells if self.device == "cpu" else min(self.cells, GPU_K_LIMIT))
        chosen = {} if selector is None else {"sel": selector}
        if self.device != "cpu" or self.codes != "rabitq":
            return self.faiss.SearchParametersIVF(nprobe=cells, **chosen)
        inner = self.faiss.SearchParametersIVF(nprobe=cells, **chosen)
        return self.faiss.SearchParametersPreTransform(index_params=inner)

    def _candidates(
        self, queries: Vectors, fetch: int, *, effort: int, slots: NDArray[np.int64] | None, exact: bool
    ) -> tuple[Vectors, NDArray[np.int64]] | None:
        return super()._candidates(self._widened(queries), fetch, effort=effort, slots=slots, exact=exact)

    def _has_flat_storage(self) -> bool:
        return False  # looking into all cells is exact

    def _cells(self) -> int:
        return self.cells

    def _gpu_bytes(self) -> int:
        code = self.pieces if self.codes == "pq8" else 4 * self.dim
        return len(self.rows) * (code + 8) + 4 * self.cells * self.dim

    def _more_sections(self) -> Mapping[str, Callable[[Sink], None]]:
        return {} if self._own is None else self._own.sections()

    def _read_more(self, path: Path, header: Header) -> None:
        if self._own is not None:
            self._own.read(path, header)


LEAST_RESULTS = 10
"""A search for fewer results looks as hard as one for so many."""


class OneCell(FaissIvfIndex):
    """Codes without cells: those of all vectors that may be returned are compared, then the best truly."""

    def _raised(self, effort: int, share: float) -> int:
        return effort  # a filter leaves as many to choose from as are looked at


class FaissPqIndex(OneCell):
    """Every vector is compared by its code: pieces of a few numbers, 4 bits each, in registers. Approximate.

    Quick to build and small: pieces / 2 + 8 bytes per vector, and the vector at its precision. The time of a
    search grows with the number of vectors; from some 100,000 on, `ivf` with codes = "pq" looks at a part.

    Args:
        pieces: 0: D / 2, so that a piece is two numbers.
        effort: candidates compared again, per result (at least ten results are reckoned).
        precision: float32, float16, bfloat16 or int8, how the vectors themselves are kept.

    Source: André, Kermarrec and Le Scouarnec, "Quicker ADC: Unlocking the Hidden Potential of Product
    Quantization With SIMD", arXiv:1812.09162.
    """

    kind = "pq"

    def __init__(
        self,
        dim: int,
        *,
        device: str = "auto",
        pieces: int = 0,
        effort: int = 16,
        precision: str = "float16",
    ) -> None:
        super().__init__(
            dim,
            device=device,
            cells=1,
            effort=effort,
            codes="pq",
            pieces=pieces,
            refine=1,
            precision=precision,
        )

    def settings(self) -> dict[str, Any]:
        return {"pieces": self.pieces, "effort": self.effort, "precision": self.precision}


class FaissRabitqIndex(OneCell):
    """Every vector is compared by its signs after a random rotation, with bounds on the error. Approximate.

    Learns next to nothing, so it is the quickest to build: bits · D / 8 + 16 bytes per vector, and the vector
    at its precision.

    Args:
        bits: per number, 1 to 8.
        effort: candidates compared again, per result (at least ten results are reckoned).
        precision: float32, float16, bfloat16 or int8, how the vectors themselves are kept.

    Source: Gao and Long, "RaBitQ: Quantizing High-Dimensional Vectors with a Theoretical Error Bound for
    Approximate Nearest Neighbor Search", arXiv:2405.12497.
    """

    kind = "rabitq"

    def __init__(
        self, dim: int, *, device: str = "auto", bits: int = 1, effort: int = 64, precision: str = "float16"
    ) -> None:
        super().__init__(
            dim,
            device=device,
            cells=1,
            effort=effort,
            codes="rabitq",
            bits=bits,
            refine=1,
            precision=precision,
        )

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "effort": self.effort, "precision": self.precision}


def pieces_for(codes: str, dim: int) -> int:
    """Two numbers a piece for pq; for pq8 four or more, as many pieces as faiss's GPU kernels can have."""
    if codes == "pq":
        return max(1, dim // 2)
    return max([pieces for pieces in GPU_PIECES if pieces <= dim // 4], default=1)


def cells_for(count: int) -> int:
    """4 · √N cells, but at least 39 vectors in each on average: faiss's own bounds for sound centroids."""
    return max(1, min(round(4 * math.sqrt(count)), count // 39))
