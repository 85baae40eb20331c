"""The encoder as everyone uses it: pictures in, unit vectors out. No torch is loaded unless it is asked
for.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dml.data.table import Record
from dml.devices import shows_cuda
from dml.encoder.decoders import DECODERS
from dml.encoder.manifest import INT8, ONNX, WEIGHTS, Manifest, find_encoder, read_manifest, verify_file
from dml.encoder.preprocess import Preprocess
from dml.encoder.profiles import PRECISIONS, Profile
from dml.encoder.stream import LARGEST_CALL, EmbeddedBatch, ReadFile, Steps, embed_ahead, processors
from dml.errors import EncoderError, MissingExtra, UsageError
from dml.imaging import DEFAULT_MAX_PIXELS, BadImage, decode

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
Source = Image.Image | bytes | Path | str
BATCH_SIZE = 64


class Runtime(Protocol):
    """Pixels (N, 3, S, S) to vectors (N, D)."""

    name: str
    device: str
    precision: str

    def __call__(self, pixels: Vectors) -> Vectors: ...

    def concurrent(self, calls: int) -> "Runtime | None":
        """The same model for `calls` calls at a time from as many threads, each on one core; None where
        calls are best made one after another.
        """
        ...


class EmbeddedFiles(NamedTuple):
    """Vectors of the files that could be read, and the others by name."""

    kept: NDArray[np.int64]  # (N,) positions in the sources, ascending
    vectors: Vectors  # (N, D)
    bad: list[BadImage]


class Encoder:
    """Pictures in, unit vectors out. Make one with `Encoder.load`."""

    def __init__(
        self, manifest: Manifest, runtime: Runtime, *, decoder: str = "pillow", threads: int | None = None
    ) -> None:
        self._manifest, self._runtime, self._threads = manifest, runtime, threads
        self.profile = Profile(decoder, runtime.name, runtime.precision)
        """Who decodes, who computes, in which precision."""
        self._decode = DECODERS[decoder]
        self._streaming: dict[int, Runtime | None] = {}

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        runtime: Literal["auto", "torch", "onnx", "openvino"] | str = "auto",
        device: str = "auto",
        threads: int | None = None,
        profile: Profile | str | None = None,
    ) -> "Encoder":
        """Open an encoder folder, or the one in a run or a collection, and check its files.

        Args:
            path: ENCODER, RUN or COLLECTION.
            runtime: "onnx" (ONNX Runtime), "torch", "openvino", or "auto": torch on a CUDA device, ONNX
                Runtime on the CPU.
            device: "cpu", "cuda", "cuda:N", or "auto": CUDA where there is a device and torch, else the CPU.
            threads: threads of one call on the CPU; None: the runtime's own choice.
            profile: decoder, runtime and precision, as "fused/openvino-bf16"; None: Pillow, `runtime`, and
                float32.

        Raises:
            EncoderError: missing, damaged, changed or too new, or it cannot run on this device.
            MissingExtra: torch or OpenVINO is asked for, or needed, and is not installed.
            UsageError: an unknown runtime, device or profile, or a profile of another runtime.
        """
        manifest = read_manifest(find_encoder(path))
        wanted = Profile.parse(profile) if isinstance(profile, str) else profile
        if wanted is not None and runtime not in ("auto", wanted.runtime):
            raise UsageError(f'The profile {wanted} does not run on "{runtime}"; give one of the two.')
        name, device = choose_runtime(manifest, wanted.runtime if wanted else runtime, device)
        wanted = wanted or Profile("pillow", name, "f32")
        if threads is not None and threads < 1:
            raise UsageError(f"threads must be at least 1, got {threads}")
        logger.info("encoder %s: %s on %s", manifest.folder, wanted, device)
        opened = open_runtime(manifest, name, device=device, threads=threads, precision=wanted.precision)
        return cls(manifest, opened, decoder=wanted.decoder, threads=threads)

    @property
    def path(self) -> Path:
        """The encoder's folder."""
        return self._manifest.folder

    @property
    def manifest(self) -> Mapping[str, Any]:
        """manifest.json as it was read."""
        return self._manifest.tree

    @property
    def fingerprint(self) -> str:
        """sha256, 64 hexadecimal digits: equal for encoders that make equal vectors."""
        return self._manifest.fingerprint

    @property
    def dim(self) -> int:
        """D, length of a vector."""
        return self._manifest.dim

    @property
    def preprocess(self) -> Preprocess:
        return self._manifest.preprocess

    @property
    def classes(self) -> tuple[str, ...]:
        """The label map of its training: class number -> label; empty for an encoder that was not trained."""
        return tuple(self._manifest.tree["classes"])

    @property
    def runtime(self) -> str:
        """ "onnx", "openvino" or "torch"."""
        return self._runtime.name

    @property
    def device(self) -> str:
        return self._runtime.device

    def __repr__(self) -> str:
        what = f"{self.fingerprint[:12]}, dim={self.dim}, {self.profile} on {self.device}"
        return f"Encoder({str(self.path)!r}, {what})"

    def embed(self, images: Sequence[Source], *, batch_size: int = BATCH_SIZE) -> Vectors:
        """Vectors (N, D) of pictures: PIL images, encoded bytes or files, mixed as you like.

        Raises:
            InvalidImage: for the first one that cannot be read; `embed_files` skips and lists them instead.
        """
        if isinstance(images, Image.Image | bytes | Path | str):
            raise UsageError("embed takes a list of pictures; write embed([picture]) for one")
        parts = [
            self._run(
                np.stack([self.preprocess(self._upright(i)) for i in images[start : start + batch_size]])
            )
            for start in range(0, len(images), batch_size)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    def spread(self, calls: int) -> Callable[[Vectors], Vectors] | None:
        """`embed_arrays` for `calls` calls at a time, each on one core, from as many threads: under load no
        core waits for another then. None where calls are best made one after another, as on a GPU.
        """
        runtime = self._concurrent(calls)
        return None if runtime is None else lambda arrays: self.embed_arrays(arrays, runtime=runtime)

    def embed_arrays(
        self, arrays: Vectors, *, batch_size: int = BATCH_SIZE, runtime: Runtime | None = None
    ) -> Vectors:
        """Vectors (N, D) of prepared pixels (N, 3, S, S), as `preprocess` makes them.

        Args:
            runtime: another one of the same profile.

        Raises:
            UsageError: for another shape.
        """
        arrays = np.ascontiguousarray(arrays, dtype=np.float32)
        size = self.preprocess.size
        if arrays.ndim != 4 or arrays.shape[1:] != (3, size, size):
            raise UsageError(f"expected prepared pixels (N, 3, {size}, {size}), got {arrays.shape}")
        parts = [
            self._run(arrays[start : start + batch_size], runtime)
            for start in range(0, len(arrays), batch_size)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    def decode(self, source: bytes | Path, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
        """The upright RGB picture that `preprocess` is to be given, by the profile's decoder.

        Raises:
            InvalidImage: as `dml.imaging.decode`.
        """
        return self._decode(source, self.preprocess, max_pixels=max_pixels)

    def embed_stream(
        self,
        sources: Sequence[Record | Path],
        *,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
        bad: list[BadImage] | None = None,
        wanted: Callable[[ReadFile], bool] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> Iterator[EmbeddedBatch]:
        """Embed files batch after batch, in order; the next ones are made while the caller works on one.

        Args:
            sources: files, or records of a table (whose boxes are cut out).
            batch_size: pictures in a call, at most; where several calls run at a time on one core each, they
                are smaller.
            workers: threads that decode, and on a CPU embed; None: as many as there are cores.
            bad: pictures that cannot be read are appended here and left out.
            wanted: asked for every picture that can be read, before it is embedded; False passes it over.
            max_pixels: a picture with more counts as one that cannot be read, see `dml.imaging.decode`.
        """
        workers = workers or self._threads or processors()
        runtime = self._concurrent(workers)
        steps = Steps(
            decode=lambda data, name: self._decode(data, self.preprocess, max_pixels=max_pixels, name=name),
            pixels=self.preprocess.pixels,
            embed=lambda pixels: self._run(self.preprocess.normalise(pixels), runtime),
            concurrent=runtime is not None,
            size=batch_size if runtime is None else min(batch_size, LARGEST_CALL),
            max_pixels=max_pixels,
        )
        sink = [] if bad is None else bad
        return embed_ahead(sources, steps, workers=workers, bad=sink, wanted=wanted)

    def embed_files(
        self,
        paths: Sequence[Record | Path],
        *,
        batch_size: int = BATCH_SIZE,
        workers: int | None = None,
        on_bad: Callable[[BadImage], None] | None = None,
        max_pixels: int = DEFAULT_MAX_PIXELS,
    ) -> EmbeddedFiles:
        """Embed all files. One that cannot be read is skipped and listed, never fatal.

        Args:
            on_bad: called for every picture that is skipped.
            max_pixels: see `embed_stream`.
        """
        bad: list[BadImage] = []
        stream = self.embed_stream(
            paths, batch_size=batch_size, workers=workers, bad=bad, max_pixels=max_pixels
        )
        batches = list(stream)
        if on_bad is not None:
            for one in bad:
                on_bad(one)
        if not batches:
            return EmbeddedFiles(np.empty(0, np.int64), np.empty((0, self.dim), np.float32), bad)
        kept = np.concatenate([batch.indices for batch in batches])
        return EmbeddedFiles(kept, np.concatenate([batch.vectors for batch in batches]), bad)

    def _run(self, pixels: Vectors, runtime: Runtime | None = None) -> Vectors:
        return (runtime or self._runtime)(pixels)

    def _concurrent(self, calls: int) -> Runtime | None:
        """The runtime for so many calls at a time, opened when it is needed first."""
        if calls not in self._streaming:
            self._streaming[calls] = self._runtime.concurrent(calls)
        return self._streaming[calls]

    def _upright(self, image: Source) -> Image.Image:
        if isinstance(image, Image.Image):
            return upright(image)
        return self.decode(image if isinstance(image, bytes) else Path(image))


def upright(image: Source) -> Image.Image:
    """Any picture as upright RGB, through the one decoder: a PIL image gives what its file would have
    given.
    """
    if isinstance(image, bytes):
        return decode(image)
    if not isinstance(image, Image.Image):
        return decode(Path(image))
    turned = ImageOps.exif_transpose(image)
    if turned.mode == "RGB" and not turned.has_transparency_data:
        return turned
    buffer = BytesIO()
    turned.save(buffer, "TIFF" if turned.mode in ("CMYK", "YCbCr", "LAB", "F") else "PNG")
    return decode(buffer.getvalue())


def choose_runtime(manifest: Manifest, runtime: str, device: str) -> tuple[str, str]:
    """("onnx", "openvino" or "torch", "cpu" or "cuda[:N]"): decided before anything is loaded, and never
    changed afterwards.
    """
    if runtime != "auto" and runtime not in PRECISIONS:
        raise UsageError(f'Unknown runtime "{runtime}". Known: auto, {", ".join(PRECISIONS)}.')
    if device not in ("auto", "cpu") and device.partition(":")[0] != "cuda":
        raise UsageError(f'Unknown device "{device}". Known: auto, cpu, cuda, cuda:N.')
    has_onnx, has_torch = ONNX in manifest.files, find_spec("torch") is not None
    if device == "auto":
        device = "cuda" if runtime in ("auto", "torch") and has_torch and has_cuda() else "cpu"
    if device.startswith("cuda") and runtime in ("auto", "torch") and not (has_torch or shows_cuda()):
        raise UsageError(
            f'This machine shows no CUDA device, so "{device}" cannot be used. Leave --device out, or say '
            f"--device cpu."
        )
    if runtime == "auto":
        runtime = "onnx" if device == "cpu" and has_onnx else "torch"
    if runtime == "openvino" and device != "cpu":
        raise UsageError(f'OpenVINO runs on the CPU here, not on "{device}". Use --runtime torch for a GPU.')
    if runtime != "torch" and not has_onnx:
        raise EncoderError(
            f"The encoder {manifest.folder} has no {ONNX}. Make it with `dml encoder export "
            f"{manifest.folder}`, or use --runtime torch."
        )
    return runtime, device


def has_cuda() -> bool:
    """Whether torch can use a CUDA device; torch is imported only where the machine has one at all."""
    if not shows_cuda():
        return False
    import torch

    return torch.cuda.is_available()


def open_runtime(
    manifest: Manifest,
    name: str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    precision: str = "f32",
) -> Runtime:
    """Load a runtime on checked files.

    Raises:
        EncoderError, MissingExtra: as `Encoder.load`.
    """
    if name in ("onnx", "openvino"):
        for file in manifest.files:
            if file.startswith(ONNX):  # weights too large for one file lie beside it
                verify_file(manifest, file)
        if name == "openvino":
            from dml.encoder.openvino_runtime import OpenVinoRuntime

            model = manifest.folder / ONNX if precision != "int8" else calibrated(manifest)
            return OpenVinoRuntime(model, threads=threads, precision=precision)
        from dml.encoder.onnx_runtime import OnnxRuntime

        return OnnxRuntime(manifest.folder / ONNX, device=device, threads=threads)
    try:
        import torch  # noqa: F401
    except ImportError:
        raise MissingExtra("torch", "train") from None
    from dml.encoder.torch_runtime import TorchRuntime

    verify_file(manifest, WEIGHTS)
    return TorchRuntime(manifest, device=device, threads=threads, precision=precision)


def calibrated(manifest: Manifest) -> Path:
    """The checked model in 8-bit integers. Raises EncoderError."""
    if INT8 not in manifest.files:
        raise EncoderError(
            f"The encoder {manifest.folder} has no {INT8}. Make it with: dml encoder quantize "
            f"{manifest.folder} --data FOLDER."
        )
    return verify_file(manifest, INT8)
