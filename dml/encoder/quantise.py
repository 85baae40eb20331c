"""An encoder in 8-bit integers: model.int8.onnx beside the others, calibrated on real pictures.

Weights are rounded per channel and activations to the range that they have on the calibration pictures; sums
stay in 32 bits, and the head in floating point: it costs nothing, and rounding it would cost neighbours. On
CPUs with 8-bit instructions (AVX-512 VNNI, AMX) this is several times as fast as float32. How near the
vectors are is measured as for any profile: `dml encoder check … --profile fused/openvino-int8 --data …`.
"""

import json
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.data.table import open_table
from dml.encoder.encoder import Encoder
from dml.encoder.manifest import INT8, MANIFEST, ONNX, describe_file, find_encoder, read_manifest, verify_file
from dml.errors import DataError, EncoderError, MissingExtra
from dml.imaging import BadImage
from dml.storage import write_aside

PICTURES = 256
BATCH = 8


def quantise_encoder(path: str | Path, data: str | Path, *, pictures: int = PICTURES) -> Path:
    """Write model.int8.onnx into an encoder's folder; the fingerprint stays.

    Args:
        path: ENCODER, RUN or COLLECTION.
        data: a folder or manifest of pictures like those that will be embedded.
        pictures: how many of them, taken evenly.

    Raises:
        EncoderError: it has one already (collections may have been made with that), or no model.onnx.
        MissingExtra: the onnx package is not installed.
        DataError: no picture that can be read. StorageError: the disk is full or refuses.
    """
    folder = find_encoder(path)
    manifest = read_manifest(folder)
    if INT8 in manifest.files:
        raise EncoderError(
            f"{folder} has {INT8} already, and vectors may have been made with it. To calibrate anew, make a "
            f"copy without it: dml encoder export {folder} --out NEW."
        )
    model = verify_file(manifest, ONNX)
    try:
        import onnx
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process
    except ImportError:
        raise MissingExtra("The onnx package, which writes models,", "train") from None
    reader: Any = Calibration(folder, data, pictures)
    with tempfile.TemporaryDirectory() as scratch:
        made, folded = Path(scratch) / INT8, Path(scratch) / ONNX
        # Batch normalisation goes into the convolutions first, or their outputs would be rounded twice.
        quant_pre_process(model, folded, skip_symbolic_shape=True)
        heads = [n.name for n in onnx.load(folded).graph.node if n.op_type in ("Gemm", "MatMul")][-1:]
        quantize_static(
            folded,
            made,
            reader,
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=heads,
        )
        write_aside(folder / INT8, lambda aside: aside.write_bytes(made.read_bytes()))
    (folder / INT8).chmod((folder / MANIFEST).stat().st_mode)
    note(folder, {"data": str(data), "pictures": pictures})
    return folder / INT8


def note(folder: Path, calibration: dict[str, Any]) -> None:
    """Put the new file into the manifest, last: until then nobody uses it."""
    tree = dict(read_manifest(folder).tree)
    tree["files"] = {**tree["files"], INT8: describe_file(folder / INT8)}
    tree["calibration"] = {**calibration, "made": datetime.now(UTC).isoformat(timespec="seconds")}
    text = json.dumps(tree, indent=2, ensure_ascii=False) + "\n"
    write_aside(folder / MANIFEST, lambda aside: aside.write_text(text, encoding="utf-8"))


class Calibration:
    """Prepared pictures, a few at a time, as ONNX Runtime's quantisation asks for them."""

    def __init__(self, folder: Path, data: str | Path, pictures: int) -> None:
        encoder = Encoder.load(folder, device="cpu")
        records = open_table(data).records
        chosen = np.linspace(0, len(records) - 1, min(pictures, len(records))).astype(int)
        self._batches = batches(encoder, [records[i].path for i in chosen])
        self._first = next(self._batches, None)
        if self._first is None:
            raise DataError(f"None of the pictures of {data} can be read, so nothing can be calibrated.")

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        found, self._first = self._first, None
        found = next(self._batches, None) if found is None else found
        return None if found is None else {"pixels": found}


def batches(encoder: Encoder, files: list[Path]) -> Iterator[NDArray[np.float32]]:
    """Model input (N, 3, S, S) of files; those that cannot be read are left out."""
    from dml.data.reading import batches_of

    for _, pixels in batches_of(files, encoder.preprocess, batch_size=BATCH, bad=list[BadImage]()):
        yield pixels
