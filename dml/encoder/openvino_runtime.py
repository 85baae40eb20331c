"""Run an encoder with OpenVINO: on CPUs with bfloat16 instructions, twice as fast as in float32 and more."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.errors import EncoderError, MissingExtra


class OpenVinoRuntime:
    """The exported model, (N, 3, S, S) float32 → (N, D) float32. Safe to call from several threads.

    Args:
        path: model.onnx, or model.int8.onnx for "int8".
        threads: cores that one call uses; None: all.
        precision: "f32"; "bf16": convolutions and products in bfloat16; "int8": what the model says, and the
            rest in bfloat16 where the CPU has it.
        calls: calls at a time, each with its share of the threads.

    Raises:
        MissingExtra: OpenVINO is not installed.
        EncoderError: it cannot read the file, or this CPU has no instructions for the precision.
    """

    name = "openvino"
    device = "cpu"

    def __init__(
        self, path: Path, *, threads: int | None = None, precision: str = "f32", calls: int = 1
    ) -> None:
        self.path, self.threads, self.precision = path, threads, precision
        openvino = import_openvino()
        core = openvino.Core()
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bf16" and "BF16" not in able:
            raise EncoderError(
                f"This CPU has no bfloat16 instructions (OpenVINO finds {', '.join(able)}), so the precision "
                f"bf16 would be slower than float32 here. Use openvino-f32 or onnx-f32."
            )
        rest = "bf16" if "BF16" in able else "f32"
        settings: dict[str, Any] = {
            # Said also for float32: left alone, OpenVINO takes bfloat16 where the CPU has it.
            "INFERENCE_PRECISION_HINT": precision if precision != "int8" else rest,
            "NUM_STREAMS": calls,
            # Pinned threads would fight with others over the first cores, whatever else is idle.
            "ENABLE_CPU_PINNING": False,
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            self.model = core.compile_model(core.read_model(path), "CPU", settings)
        except Exception as error:  # the binding raises RuntimeError for whatever it does not like
            first = (str(error).strip().splitlines() or [""])[-1]
            raise EncoderError(f"OpenVINO {openvino.__version__} cannot load {path}: {first}") from error
        self._own = threading.local()  # a request holds the buffers of one call

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        request = getattr(self._own, "request", None)
        if request is None:
            request = self._own.request = self.model.create_infer_request()
        found = request.infer({0: np.ascontiguousarray(pixels, np.float32)}, share_inputs=True)
        vectors = np.array(found[0], dtype=np.float32)  # a copy: the next call writes into the same buffer
        if self.precision == "f32":
            return vectors
        # The length of a rounded vector is not 1 to float32's last digit.
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def concurrent(self, calls: int) -> "OpenVinoRuntime":
        """The same model for `calls` calls at a time, each on one core."""
        return OpenVinoRuntime(self.path, threads=calls, precision=self.precision, calls=calls)


def import_openvino() -> Any:
    """The package, or a MissingExtra that says how to get it."""
    try:
        import openvino
    except ImportError:
        raise MissingExtra("OpenVINO", "openvino") from None
    return openvino
