"""Engines that multiply bfloat16 matrices on the processor and choose the highest scores: torch, OpenVINO.

Both round each factor and each score to bfloat16 and add up in float32; what they find differs at most in
candidates that rounding makes equal.
"""

import os
import threading
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dml.errors import ConfigError, MissingExtra
from dml.index.base import Vectors
from dml.index.flat import GROUP

BLOCK_ROWS = 1 << 16
"""Vectors multiplied at once: their scores for a few dozen queries stay in the cache."""
MINUS_INFINITY = 0xFF80
"""In bfloat16."""


class Products(Protocol):
    """Many inner products in bfloat16, and the highest of them."""

    name: str
    in_hardware: bool
    """Whether this processor multiplies bfloat16 itself, as far as the engine can tell."""

    def best(
        self, queries: Vectors, codes: NDArray[np.uint16], fetch: int, hidden: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The highest scores of each query and the rows that have them, in any order: (Q, F) each.

        Args:
            queries: (Q, D) unit rows.
            codes: (N, D) bfloat16 numbers, as their bits.
            fetch: F = min(fetch, N) for each query.
            hidden: (N,) rows that score -inf; None: none.
        """
        ...


def products(dim: int, engine: str = "auto") -> Products:
    """For rows of `dim` numbers: by "torch" or "openvino"; "auto" is the first of them that is installed, as
    torch is the faster one.

    Raises MissingExtra, ConfigError.
    """
    if engine not in ("auto", "torch", "openvino"):
        raise ConfigError(f'The engine of the index kind matrix is auto, torch or openvino, got "{engine}"')
    if engine == "torch" or (engine == "auto" and find_spec("torch") is not None):
        return TorchProducts()
    return OpenVinoProducts(dim)


class TorchProducts:
    name = "torch"

    def __init__(self) -> None:
        try:
            import torch
        except ImportError as error:
            if error.name not in (None, "torch"):
                raise
            raise MissingExtra("torch", "train") from None
        self.torch: Any = torch
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        self.in_hardware = any(getattr(torch.cpu, name, lambda: False)() for name in checks)

    def best(
        self, queries: Vectors, codes: NDArray[np.uint16], fetch: int, hidden: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        torch = self.torch
        wanted = torch.from_numpy(queries).bfloat16()
        whole = torch.from_numpy(codes.view(np.int16)).view(torch.bfloat16)
        scores, names = [], []
        with torch.inference_mode():
            for start in range(0, len(whole), BLOCK_ROWS):
                part = wanted @ whole[start : start + BLOCK_ROWS].T
                if hidden is not None:
                    part[:, torch.from_numpy(hidden[start : start + BLOCK_ROWS])] = -torch.inf
                best, where = highest_columns(torch, part, fetch)
                scores.append(best)
                names.append(where + start)
            joined = torch.cat(scores, dim=1)
            best, where = joined.topk(min(fetch, joined.shape[1]), dim=1, sorted=False)
            slots = torch.cat(names, dim=1).gather(1, where)
        return best.float().numpy(), slots.numpy()


class OpenVinoProducts:
    name = "openvino"

    def __init__(self, dim: int) -> None:
        try:
            import openvino
        except ImportError:
            raise MissingExtra("OpenVINO (the index kind matrix needs it, or torch)", "openvino") from None
        self._openvino: Any = openvino
        core = openvino.Core()
        self.in_hardware = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._model = self._compiled(core, dim)
        self._own = threading.local()  # a request holds the buffers of one call

    def best(
        self, queries: Vectors, codes: NDArray[np.uint16], fetch: int, hidden: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self._model.create_infer_request()
        found = []
        for start in range(0, len(codes), BLOCK_ROWS):
            part = codes[start : start + BLOCK_ROWS]
            offsets = np.zeros((1, len(part)), np.uint16)
            if hidden is not None:
                offsets[0, hidden[start : start + BLOCK_ROWS]] = MINUS_INFINITY
            count = np.array(min(fetch, len(part)))
            given = [np.ascontiguousarray(queries), self._bfloat16(part), self._bfloat16(offsets), count]
            request.infer(given, share_inputs=True)
            # Copies: the next call writes into the same buffers.
            best = np.array(request.get_output_tensor(0).data)
            found.append((best, request.get_output_tensor(1).data.astype(np.int64) + start))
        scores = np.concatenate([best for best, _ in found], axis=1)
        slots = np.concatenate([where for _, where in found], axis=1)
        if scores.shape[1] > fetch:
            chosen = np.argpartition(scores, scores.shape[1] - fetch, axis=1)[:, -fetch:]
            scores, slots = (np.take_along_axis(each, chosen, axis=1) for each in (scores, slots))
        return scores, slots

    def _bfloat16(self, bits: NDArray[np.uint16]) -> Any:
        """The same memory as a tensor of bfloat16 numbers."""
        ov = self._openvino
        return ov.Tensor(np.ascontiguousarray(bits), ov.Shape(list(bits.shape)), ov.Type.bf16)

    def _compiled(self, core: Any, dim: int) -> Any:
        """(Q, D) queries, (N, D) rows, (1, N) offsets, k → the k highest of queries · rowsᵀ + offsets."""
        import openvino.opset13 as op

        ov = self._openvino
        queries, rows = op.parameter([-1, dim], ov.Type.f32), op.parameter([-1, dim], ov.Type.bf16)
        offsets, count = op.parameter([1, -1], ov.Type.bf16), op.parameter([], ov.Type.i64)
        scores = op.matmul(op.convert(queries, ov.Type.bf16), rows, False, True)
        best = op.topk(op.add(scores, offsets), count, 1, "max", "none")
        # With many ties float32 scores cost nothing more, and numpy knows no bfloat16.
        outputs = [op.convert(best.output(0), ov.Type.f32), best.output(1)]
        results = [op.result(output) for output in outputs]
        model = ov.Model(results, [queries, rows, offsets, count], "products")
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16", "NUM_STREAMS": 1}
        settings["ENABLE_CPU_PINNING"] = False
        threads = os.environ.get("OMP_NUM_THREADS", "")
        if threads.isdecimal() and int(threads):
            settings["INFERENCE_NUM_THREADS"] = int(threads)
        return core.compile_model(model, "CPU", settings)


def highest_columns(torch: Any, scores: Any, count: int) -> tuple[Any, Any]:
    """The `count` highest scores of each row and their columns; by way of groups, as `flat.highest`."""
    columns = scores.shape[1]
    groups = columns // GROUP
    if groups < 2 * count:
        return scores.topk(min(count, columns), dim=1, sorted=False)
    even = groups * GROUP
    maxima = scores[:, :even].view(len(scores), GROUP, groups).amax(dim=1)
    chosen = maxima.topk(count, dim=1, sorted=False).indices
    members = (chosen[:, :, None] + torch.arange(0, even, groups)).view(len(scores), -1)
    rest = torch.arange(even, columns).expand(len(scores), -1)
    members = torch.cat([members, rest], dim=1)
    best, where = scores.gather(1, members).topk(count, dim=1, sorted=False)
    return best, members.gather(1, where)
