"""Run an encoder with ONNX Runtime: no torch needed."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.errors import EncoderError

FATAL_ONLY = 4  # ONNX Runtime's log level: its warnings about the machine are no news to a user
TELEMETRY_VARIABLE = "ORT_DISABLE_TELEMETRY"


class OnnxRuntime:
    """The exported model, (N, 3, S, S) float32 → (N, D) float32. Safe to call from several threads.

    Args:
        path: model.onnx.
        device: "cpu", or "cuda" / "cuda:N" where the GPU build of ONNX Runtime is installed.
        threads: threads of one call on a CPU; None: one per core.

    Raises:
        EncoderError: ONNX Runtime is not installed, has no such device, or cannot read the file.
    """

    name = "onnx"
    precision = "f32"

    def __init__(self, path: Path, *, device: str = "cpu", threads: int | None = None) -> None:
        self.path = path
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = FATAL_ONLY
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        # Idle threads would otherwise spin on a core that decoding, faiss and the web server need.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers(ort, device))
        except Exception as error:  # the binding raises a dozen classes of its own, none of them public
            raise EncoderError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from error
        self.device = device
        self.input = self.session.get_inputs()[0].name

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(self.session.run(None, {self.input: pixels})[0], dtype=np.float32)

    def concurrent(self, calls: int) -> "OnnxRuntime | None":
        """The same model for `calls` calls at a time, each on one core; None where that gains nothing."""
        # A session has one number of threads for all calls, so this is a second session of the same file.
        return OnnxRuntime(self.path, threads=1) if self.device == "cpu" else None


def import_onnxruntime() -> Any:
    """The package, or an EncoderError that says how to get it.

    Its newer wheels for Linux note each session in `~/.cache/Microsoft` under an id of the machine, to be
    sent to their maker. What is embedded here is nobody else's business, so that is switched off before the
    library is loaded, unless the user has set the variable.
    """
    os.environ.setdefault(TELEMETRY_VARIABLE, "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise EncoderError(
            f"ONNX Runtime cannot be imported ({error}). It is a part of dml: pip install onnxruntime; or "
            f"run the encoder with torch (--runtime torch)."
        ) from None
    return onnxruntime


def providers(ort: Any, device: str) -> list[Any]:
    """ONNX Runtime's name for a device; never another device than the one asked for."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        found = ", ".join(ort.get_available_providers())
        raise EncoderError(
            f'The ONNX Runtime installed here cannot use "{device}" (it has {found}). '
            f"Install onnxruntime-gpu, use --runtime torch, or --device cpu."
        )
    return [("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)})]
