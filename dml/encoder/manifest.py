"""What an encoder folder says about itself, and how it is checked.

::

    ENCODER/
      manifest.json        format and version, fingerprint, dim, metric, preprocessing, model, classes, files
      with
                           their checksums, decoder, measured agreement of the runtimes, provenance
      model.safetensors    the weights
      model.onnx           the same model for ONNX Runtime; absent where it was not asked for
      model.int8.onnx      the same in 8-bit integers; made by `dml encoder quantize`

The fingerprint is the identity of the vectors: two encoders with the same one make the same vectors. It is
    the sha256
over weights, architecture, preprocessing, dimension and metric, and does not change when the model is
exported again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.encoder.preprocess import Preprocess
from dml.errors import EncoderError

FORMAT = "dml-encoder"
FORMAT_VERSION = 1
METRIC = "cosine"
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
ONNX = "model.onnx"
INT8 = "model.int8.onnx"
REQUIRED: Mapping[str, type] = {
    "fingerprint": str,
    "weights_digest": str,
    "dim": int,
    "metric": str,
    "preprocess": dict,
    "model": dict,
    "image_size": int,
    "classes": list,
    "files": dict,
}

REPAIR = (
    "Copy the whole folder again, restore a backup (of a collection: `dml index restore`), or make the "
    "encoder anew with `dml encoder export RUN`."
)


@dataclass(frozen=True)
class Manifest:
    """manifest.json, checked."""

    folder: Path
    tree: Mapping[str, Any]
    preprocess: Preprocess

    @property
    def fingerprint(self) -> str:
        return self.tree["fingerprint"]

    @property
    def dim(self) -> int:
        return self.tree["dim"]

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> {"sha256", "bytes"} of every file of the folder but the manifest."""
        return self.tree["files"]


def find_encoder(path: str | Path) -> Path:
    """The encoder folder that `path` names: the folder itself, or the `encoder/` of a run or a collection.

    Raises:
        EncoderError: no such folder, a run that has not made its encoder yet, or no encoder in it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise EncoderError(f"There is no encoder {path} (looked in {Path.cwd()}). Check the path.")
    if path.is_file():
        if path.name in (MANIFEST, WEIGHTS, ONNX):
            return find_encoder(path.parent)
        raise EncoderError(f"{path} is a file; give the encoder's folder, or the run that made it.")
    if is_encoder(path):
        return path
    inner = path / "encoder"
    if inner.is_dir():
        return inner
    if (path / "recipe.toml").exists():
        raise EncoderError(
            f"The run {path} has no encoder yet: training writes it when it ends. Let it finish, or go on "
            f"with the same `dml train` command."
        )
    if (path / MANIFEST).exists() or (path / WEIGHTS).exists():
        return path  # something of an encoder: reading it says what is wrong
    raise EncoderError(
        f"{path} is not an encoder: it holds neither {MANIFEST} nor encoder/. Give a run of `dml train`, "
        f"or make an encoder with `dml encoder create`."
    )


def is_encoder(folder: Path) -> bool:
    """Whether the folder's own manifest is an encoder's (collections have a manifest.json as well)."""
    try:
        return json.loads((folder / MANIFEST).read_text("utf-8")).get("format") == FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def read_manifest(folder: Path) -> Manifest:
    """Read and check manifest.json; the files that it lists are checked by `verify_file`.

    Raises:
        EncoderError: missing or damaged, of a newer format, or contents that do not give its fingerprint.
    """
    path = folder / MANIFEST
    try:
        tree = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise EncoderError(f"{path} cannot be read: {error.strerror}. {REPAIR}") from None
    except ValueError as error:
        raise EncoderError(f"{path} is damaged: {error}. {REPAIR}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise EncoderError(f'{path} is not the manifest of an encoder (no "format": "{FORMAT}"). {REPAIR}')
    version = tree.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise EncoderError(f"{path} is damaged: format_version is {version!r}. {REPAIR}")
    if version > FORMAT_VERSION:
        raise EncoderError(
            f"{path} has format {version}, and this version of dml reads up to {FORMAT_VERSION}. "
            f"Upgrade dml: pip install --upgrade dml"
        )
    wrong = [key for key, kind in REQUIRED.items() if not isinstance(tree.get(key), kind)]
    if wrong:
        raise EncoderError(f"{path} is damaged: {', '.join(wrong)} missing or of a wrong kind. {REPAIR}")
    if tree["metric"] != METRIC:
        raise EncoderError(f'{path} has the metric "{tree["metric"]}"; this version knows "{METRIC}" only.')
    preprocess = Preprocess.from_json(tree["preprocess"])
    if fingerprint_of(tree) != tree["fingerprint"]:
        raise EncoderError(
            f"{path} was changed after it was written: its contents do not give the fingerprint "
            f"{tree['fingerprint'][:12]}…. {REPAIR}"
        )
    return Manifest(folder, tree, preprocess)


def fingerprint_of(tree: Mapping[str, Any]) -> str:
    """sha256 (hex) over what decides the vectors: weights, architecture, preprocessing, dimension, metric."""
    # How it was trained does not change what it computes; everything else about the model does.
    model = {
        k: v for k, v in tree["model"].items() if k not in ("pretrained", "weights", "freeze_batch_norm")
    }
    parts = {
        "weights": tree["weights_digest"],
        "architecture": {**model, "image_size": tree["image_size"]},
        "preprocess": tree["preprocess"],
        "dim": tree["dim"],
        "metric": tree["metric"],
    }
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def digest_of_weights(weights: Iterable[tuple[str, NDArray]]) -> str:
    """sha256 (hex) over names, types, shapes and values, whatever their order and their file's layout."""
    digest = hashlib.sha256()
    for name, array in sorted(weights, key=lambda pair: pair[0]):
        digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of a file."""
    with path.open("rb") as stream:
        return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest(), "bytes": path.stat().st_size}


def verify_file(manifest: Manifest, name: str) -> Path:
    """The path of a file of the encoder, once its checksum was found right.

    Raises:
        EncoderError: not a part of this encoder, missing, or changed.
    """
    path = manifest.folder / name
    expected = manifest.files.get(name)
    if not isinstance(expected, Mapping):
        raise EncoderError(f"The encoder {manifest.folder} has no {name}. {REPAIR}")
    try:
        found = describe_file(path)
    except OSError as error:
        raise EncoderError(f"{path} cannot be read: {error.strerror}. {REPAIR}") from None
    if found != dict(expected):
        raise EncoderError(
            f"{path} is damaged: its checksum is {found['sha256'][:12]}… ({found['bytes']:,} bytes), the "
            f"manifest says {str(expected.get('sha256'))[:12]}… ({expected.get('bytes')} bytes). {REPAIR}"
        )
    return path
