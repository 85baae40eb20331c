"""The encoder as a folder: written, checked, exported again, or made from a trunk without training.

torch is imported inside the functions that write; reading an encoder (`dml.encoder.encoder`) needs none.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import PIL
from numpy.typing import NDArray
from PIL import Image

from dml import __version__
from dml.checksums import seal
from dml.config import ModelConfig
from dml.encoder.encoder import Encoder, choose_runtime, open_runtime, upright
from dml.encoder.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    METRIC,
    ONNX,
    WEIGHTS,
    Manifest,
    describe_file,
    digest_of_weights,
    find_encoder,
    fingerprint_of,
    is_encoder,
    read_manifest,
    verify_file,
)
from dml.encoder.preprocess import Preprocess
from dml.encoder.profiles import PRECISIONS, ProfileAgreement, stored_agreements
from dml.errors import EncoderError, MissingExtra
from dml.storage import written_aside_folder

if TYPE_CHECKING:
    from torch import nn


def save_encoder(
    model: "nn.Module",
    preprocess: Preprocess,
    out: Path,
    *,
    provenance: Mapping[str, Any],
    model_config: ModelConfig,
    image_size: int,
    classes: Sequence[str] = (),
    onnx: bool = True,
    check_on: Sequence[Image.Image] = (),
) -> Encoder:
    """Write an encoder folder, completely or not at all, and return it opened from disk.

    A side branch of the model (attention "branch") is left out: it fed a loss only. The folder is written
    beside `out` and renamed when it is complete and both runtimes agree on it; an encoder that was at `out`
    is replaced.

    Args:
        model: an `Embedder`, on any device; it is not changed.
        preprocess: how pictures are prepared for it.
        provenance: JSON, how it came to be (recipe, data, figures); kept for people, not part of the
            fingerprint.
        model_config: what the model was built from.
        image_size: side of its pictures in pixels.
        classes: label map, class number -> label.
        onnx: also write model.onnx; without it the encoder needs torch.
        check_on: pictures for the agreement of the runtimes, besides the drawn ones.

    Raises:
        EncoderError: the weights do not fit `model_config`, the export fails or disagrees, or `out` holds
            other things.
        StorageError: the disk is full or refuses.
    """
    from dml.models.embedder import deployed_config

    config = deployed_config(model_config)
    weights = {
        name: array
        for name, array in arrays_of(model).items()
        if config.attention == "gate" or not name.startswith("attention.")
    }
    tree: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dim": config.dim,
        "metric": METRIC,
        "preprocess": preprocess.as_json(),
        "model": asdict(config),
        "image_size": image_size,
        "classes": [str(label) for label in classes],
        "weights_digest": digest_of_weights(weights.items()),
        "decoder": {"name": "Pillow", "version": PIL.__version__},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_with": installed_versions(),
        "provenance": dict(provenance),
    }
    return write_folder(weights, tree, Path(out), onnx=onnx, check_on=check_on)


def write_folder(
    weights: Mapping[str, NDArray],
    described: Mapping[str, Any],
    out: Path,
    *,
    onnx: bool,
    check_on: Sequence[Image.Image] = (),
) -> Encoder:
    """Write weights, ONNX and manifest beside `out`, check them, and put them in its place.

    Args:
        described: the manifest without what depends on the files: fingerprint, files, agreement.
    """
    # As it will be read: tuples become lists, and NaN (a figure that was never measured) becomes null.
    tree: dict[str, Any] = json.loads(json.dumps(dict(described)), parse_constant=lambda _: None)
    tree["fingerprint"] = fingerprint_of(tree)
    refuse_other_things(out)
    with written_aside_folder(out) as folder:
        from safetensors.numpy import save_file

        save_file(dict(weights), folder / WEIGHTS, metadata={"format": "pt"})
        tree["files"] = {WEIGHTS: describe_file(folder / WEIGHTS)}
        if onnx:
            tree["agreement"] = add_onnx(
                Manifest(folder, tree, Preprocess.from_json(tree["preprocess"])), check_on
            )
            for file in sorted(folder.glob(f"{ONNX}*")):
                tree["files"][file.name] = describe_file(file)
        (folder / MANIFEST).write_bytes(seal(tree))
        readable = (folder / MANIFEST).stat().st_mode
        (folder / WEIGHTS).chmod(readable)  # safetensors makes it private; a service runs as another user
    return Encoder.load(out, runtime="onnx" if onnx else "torch", device="cpu")


def arrays_of(model: "nn.Module") -> dict[str, NDArray]:
    """The state of a model as arrays, floating point as float32."""
    import torch

    return {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().contiguous().numpy()
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def add_onnx(manifest: Manifest, check_on: Sequence[Image.Image] = ()) -> dict[str, float | int]:
    """Export the weights that lie in the folder, run both runtimes on both files, and return how well they
    agree.
    """
    from dml.encoder.export import check_pictures, measure_agreement, require_agreement, write_onnx
    from dml.encoder.torch_runtime import TorchRuntime

    torch_side = TorchRuntime(manifest)
    write_onnx(torch_side.model, manifest.folder / ONNX, image_size=manifest.tree["image_size"])
    from dml.encoder.onnx_runtime import OnnxRuntime

    onnx_side = OnnxRuntime(manifest.folder / ONNX)
    pictures = [*check_pictures(), *(upright(picture) for picture in check_on)]
    agreement = measure_agreement(torch_side, onnx_side, manifest.preprocess, pictures)
    require_agreement(agreement)
    return agreement.as_json()


def installed_versions() -> dict[str, str]:
    """Versions of what made the encoder, for the day when a newer one computes something else."""
    found = {"dml": __version__, "python": platform.python_version()}
    for package in ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def refuse_other_things(out: Path) -> None:
    """Raises EncoderError when there is something at `out` that is no encoder: it would be replaced."""
    if out.exists() and not (out.is_dir() and (is_encoder(out) or not any(out.iterdir()))):
        raise EncoderError(f"{out} exists and is not an encoder; it is left alone. Give another folder.")


@dataclass(frozen=True)
class EncoderReport:
    """What `check_encoder` found."""

    folder: Path
    fingerprint: str
    dim: int
    image_size: int
    trunk: str
    files: Mapping[str, str]
    """File -> "ok" or what is wrong with it."""
    runtimes: Mapping[str, str]
    """Runtime -> "ok" or why it cannot be used here."""
    recorded: Mapping[str, float | int] | None
    """Agreement of the runtimes when it was made."""
    measured: Mapping[str, float | int] | None
    """Agreement measured now; None where only one of ONNX Runtime and torch works here."""
    profiles: tuple[ProfileAgreement, ...]
    """Pairs of profiles whose agreement is stored."""
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def check_encoder(path: str | Path) -> EncoderReport:
    """Check every file of an encoder, load it with each runtime that is installed, and compare their vectors.

    A runtime that is not installed is no problem, as long as another one works.

    Raises:
        EncoderError: no encoder there, or a manifest that cannot be read.
    """
    manifest = read_manifest(find_encoder(path))
    problems: list[str] = []
    files: dict[str, str] = {}
    for name in manifest.files:
        try:
            verify_file(manifest, name)
            files[name] = "ok"
        except EncoderError as error:
            files[name] = str(error)
            problems.append(str(error))
    if files.get(WEIGHTS) == "ok":
        problems += wrong_weights(manifest)
    runtimes, opened = {}, {}
    for name in PRECISIONS:
        try:
            choose_runtime(manifest, name, "cpu")
            opened[name] = open_runtime(manifest, name)
            runtimes[name] = "ok"
        except (EncoderError, MissingExtra) as error:
            runtimes[name] = str(error)
    if not opened:
        problems.append("No runtime can run this encoder here: " + "; ".join(runtimes.values()))
    measured = None
    if "torch" in opened and "onnx" in opened:
        from dml.encoder.export import check_pictures, measure_agreement, require_agreement

        agreement = measure_agreement(opened["torch"], opened["onnx"], manifest.preprocess, check_pictures())
        measured = agreement.as_json()
        try:
            require_agreement(agreement)
        except EncoderError as error:
            problems.append(str(error))
    return EncoderReport(
        folder=manifest.folder,
        fingerprint=manifest.fingerprint,
        dim=manifest.dim,
        image_size=manifest.tree["image_size"],
        trunk=str(manifest.tree["model"].get("trunk")),
        files=files,
        runtimes=runtimes,
        recorded=manifest.tree.get("agreement"),
        measured=measured,
        profiles=tuple(stored_agreements(manifest.tree)),
        problems=tuple(problems),
    )


def wrong_weights(manifest: Manifest) -> list[str]:
    """Whether the weights in the file are those of the fingerprint."""
    from safetensors.numpy import load_file

    if digest_of_weights(load_file(manifest.folder / WEIGHTS).items()) == manifest.tree["weights_digest"]:
        return []
    return [f"{manifest.folder / WEIGHTS} holds other weights than those of the fingerprint."]


def export_encoder(source: str | Path, out: Path | None = None, *, onnx: bool = True) -> Encoder:
    """Write an encoder again from its weights, exporting and checking it anew; the fingerprint stays.

    Args:
        source: ENCODER, RUN or COLLECTION.
        out: the new folder; None: in its own place.
        onnx: with model.onnx, or weights only.

    Raises:
        EncoderError, MissingExtra, StorageError: as `Encoder.load` and `save_encoder`.
    """
    manifest = read_manifest(find_encoder(source))
    from safetensors.numpy import load_file

    weights = load_file(verify_file(manifest, WEIGHTS))
    remade = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "made_with": installed_versions()}
    # Everything else is kept word for word, so that the fingerprint stays even where defaults have grown
    # since.
    anew = ("fingerprint", "files", "agreement", "calibration", "profiles")
    described = {k: v for k, v in manifest.tree.items() if k not in anew}
    return write_folder(
        weights, {**described, **remade}, manifest.folder if out is None else Path(out), onnx=onnx
    )


def create_encoder(
    config: ModelConfig,
    out: Path,
    *,
    image_size: int | None = None,
    fit: Literal["crop", "pad", "squash"] = "crop",
    dim: int | None = None,
    seed: int = 0,
    onnx: bool = True,
) -> Encoder:
    """Make an encoder without training, so that any folder of pictures becomes searchable.

    The vectors are the trunk's pooled features. With `dim` they are projected by a random orthonormal matrix,
    which keeps angles as well as a matrix can that knows no data; without it they stay as they are.

    Args:
        config: trunk, weights and pooling; its dim is not used.
        out: the encoder's folder.
        image_size: side in pixels; None: what the trunk's published weights were made for, else 64.
        dim: D, at most the trunk's channels where projection shall lose nothing; None: the trunk's channels.
        seed: of the projection and of fresh weights.

    Raises:
        ConfigError: an unknown trunk, or weights that cannot be had.
        EncoderError, StorageError: as `save_encoder`.
    """
    import torch

    from dml.models import build_model
    from dml.models.trunks import published_input

    published = published_input(config.trunk)
    size = image_size or published.size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(replace(config, attention="none"), image_size=size)
        model.head = torch.nn.Linear(model.channels, dim or model.channels)
        torch.nn.init.zeros_(model.head.bias)
        if dim is None:
            torch.nn.init.eye_(model.head.weight)
        else:
            torch.nn.init.orthogonal_(model.head.weight)
    mean, std = model.input_stats
    weights = "published" if config.pretrained else Path(config.weights).name if config.weights else "none"
    return save_encoder(
        model.eval(),
        Preprocess(size, fit, mean, std, published.interpolation, published.margin),
        out,
        provenance={"made_by": "dml encoder create", "trained": False, "weights": weights, "seed": seed},
        model_config=replace(config, dim=model.dim, attention="none"),
        image_size=size,
        onnx=onnx,
    )
