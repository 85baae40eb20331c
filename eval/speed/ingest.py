"""From files to vectors: ours by profile, against the loop of a careful user, on the same cores.

The usual loop: a DataLoader whose worker processes decode with Pillow and resize with torchvision's v2
transforms, and ONNX Runtime in float32 with one thread per core in the main process; the number of its
workers is tried out first, and the best one races. The naive loop, for context: one picture after another
through torch in float32. Everybody gets the same cores, the same files in the same order and the same
weights, and must make the same vectors (`LEAST_COSINE` at the 1st percentile). All time counts, that of
starting workers as well.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.encoder import Encoder, Preprocess
from dml.encoder.profiles import Profile
from dml.errors import EncoderError, MissingExtra, UsageError
from eval.speed import race

PROFILES = (
    "pillow/onnx-f32",
    "fused/onnx-f32",
    "fused/openvino-f32",
    "fused/openvino-bf16",
    "fused/openvino-int8",
)
USUAL = "usual loop"
NAIVE = "naive loop"
LEAST_COSINE = 0.999
BATCH = 64
NAIVE_PICTURES = 64
DRAWN_SIDE = 400  # pixels

Say = Callable[[str], object]
Vectors = NDArray[np.float32]


class Run(NamedTuple):
    """One contender's turn."""

    vectors: Vectors
    seconds: float
    cpu_seconds: float  # of this process and its workers
    spent: Mapping[str, float]  # thread-seconds in decoding and embedding, where the contender tells


def speed_of_ingest(
    *,
    data: str | None,
    encoder: Path | None,
    pictures: int,
    repeats: int,
    threads: int | None,
    trunk: str,
    size: int,
    profiles: Sequence[str] = PROFILES,
    say: Say,
) -> dict[str, Any]:
    """Race every profile that runs here and the loops.

    Args:
        data: folder or manifest of photos; None: photos are drawn.
        encoder: whose weights; None: an untrained `trunk` for pictures of `size` px, which costs the same and
            makes vectors that all lie close together, so that cosines say little.
        pictures: how many, taken evenly.
        threads: cores for everybody; None: all that this process has.

    Raises:
        Disagreement: a contender makes other vectors.
    """
    cores = limit_cores(threads)
    with tempfile.TemporaryDirectory() as folder:
        source = encoder or untrained(Path(folder) / "encoder", trunk, size)
        files = photos(data, pictures, Path(folder) / "photos", say=say)
        if encoder is None:
            calibrate(source, files, say=say)
        contenders = of_profiles(source, files, profiles, cores, say=say)
        workers, tried = best_workers(source, files[: max(2 * BATCH, len(files) // 8)], cores, say=say)
        contenders[USUAL] = lambda: usual(source, files, workers=workers, threads=cores)
        runs = {name: [] for name in contenders}
        for repeat in range(repeats):
            names = list(contenders)
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                runs[name].append(contenders[name]())
                say(f"{name}: {len(files) / runs[name][-1].seconds:.1f} images/s")
        naive_run = naive(source, files[:NAIVE_PICTURES])
        reference = Encoder.load(source, device="cpu")
        machine, trunk = race.machine(), str(reference.manifest["model"].get("trunk"))
        rows = table(runs, len(files))
    check_vectors({name: found[0].vectors for name, found in runs.items()})
    rows.append(row_of(NAIVE, [naive_run], min(NAIVE_PICTURES, len(files)), None))
    return {
        "machine": {**machine, "threads": str(cores)},
        "repeats": repeats,
        "pictures": len(files),
        "data": data or f"drawn photos of {DRAWN_SIDE} px",
        "trunk": trunk,
        "trained": encoder is not None,
        "size": reference.preprocess.size,
        "usual workers": workers,
        "usual workers tried": tried,
        "rows": with_ratios(rows),
    }


def limit_cores(threads: int | None) -> int:
    """Keep this process and its workers on so many cores; how many there are then."""
    if not hasattr(os, "sched_setaffinity"):
        return threads or os.cpu_count() or 1
    mine = sorted(os.sched_getaffinity(0))
    if threads:
        os.sched_setaffinity(0, mine[:threads])
    return len(os.sched_getaffinity(0))


def untrained(folder: Path, trunk: str, size: int) -> Path:
    """An encoder with random weights: as fast as with any."""
    from dml.config import ModelConfig
    from dml.encoder import create_encoder

    return create_encoder(ModelConfig(trunk=trunk), folder, image_size=size).path


def calibrate(source: Path, files: Sequence[Path], *, say: Say) -> None:
    """Let the untrained encoder have all profiles; a trained one has those that its owner has made."""
    from dml.encoder.quantise import quantise_encoder

    try:
        quantise_encoder(source, files[0].parent, pictures=64)
    except MissingExtra as error:
        say(str(error))


def photos(data: str | None, count: int, folder: Path, *, say: Say) -> list[Path]:
    """Files to embed. Raises DataError."""
    from dml.data.demo import draw_demo
    from dml.data.table import open_table

    if data is None:
        say(f"drawing {count} photos")
        draw_demo(folder, classes=18, images_per_class=max(2, -(-count // 18)), size=DRAWN_SIDE)
        data = str(folder)
    files = [record.path for record in open_table(data).records]
    chosen = np.linspace(0, len(files) - 1, min(count, len(files))).astype(int)
    return [files[i] for i in chosen]


# Ours


def of_profiles(
    source: Path, files: Sequence[Path], profiles: Sequence[str], cores: int, *, say: Say
) -> dict[str, Callable[[], Run]]:
    """Those profiles that can run here, each opened once and warmed up."""
    contenders: dict[str, Callable[[], Run]] = {}
    for name in profiles:
        try:
            encoder = Encoder.load(source, device="cpu", profile=Profile.parse(name))
        except (EncoderError, MissingExtra) as error:
            say(f"{name} cannot run here: {error}")
            continue
        contenders[f"dml {name}"] = lambda encoder=encoder: ours(encoder, files, cores)
        ours(encoder, files[:BATCH], cores)
    return contenders


def ours(encoder: Encoder, files: Sequence[Path], cores: int) -> Run:
    clock, cpu = time.perf_counter(), cpu_seconds()
    batches = list(encoder.embed_stream(files, batch_size=BATCH, workers=cores))
    return Run(
        np.concatenate([batch.vectors for batch in batches]),
        time.perf_counter() - clock,
        cpu_seconds() - cpu,
        {
            "decode": sum(batch.decode_seconds for batch in batches),
            "embed": sum(batch.embed_seconds for batch in batches),
        },
    )


def cpu_seconds() -> float:
    """Of this process and of the workers that it has waited for."""
    return sum(os.times()[:4])


# Theirs


def usual_transform(preprocess: Preprocess) -> Any:
    """The same preprocessing as torchvision spells it."""
    import torch
    from torchvision.transforms import InterpolationMode, v2

    if preprocess.fit == "pad":
        raise UsageError('The usual loop has no "pad"; race an encoder that crops or squashes.')
    size, kind = preprocess.size, InterpolationMode(preprocess.interpolation)
    if preprocess.fit == "crop":
        shape: Any = round(size * preprocess.margin)
    else:
        shape = (round(size * preprocess.margin),) * 2
    return v2.Compose(
        [
            v2.Resize(shape, interpolation=kind, antialias=True),
            v2.CenterCrop(size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(preprocess.mean), list(preprocess.std)),
        ]
    )


class PhotoSet:
    """A map-style data set, as a DataLoader's workers read it."""

    def __init__(self, files: Sequence[Path], preprocess: Preprocess) -> None:
        self.files, self.transform = files, usual_transform(preprocess)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image, ImageOps

        with Image.open(self.files[index]) as picture:
            return self.transform(ImageOps.exif_transpose(picture).convert("RGB"))


def usual(source: Path, files: Sequence[Path], *, workers: int, threads: int) -> Run:
    """DataLoader with worker processes, ONNX Runtime in the main process."""
    import onnxruntime
    from torch.utils.data import DataLoader

    encoder = Encoder.load(source, device="cpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(encoder.path / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    clock, cpu = time.perf_counter(), cpu_seconds()
    loader: Any = DataLoader(PhotoSet(files, encoder.preprocess), batch_size=BATCH, num_workers=workers)  # type: ignore[arg-type]
    parts = [np.asarray(session.run(None, {name: batch.numpy()})[0]) for batch in loader]
    del loader
    return Run(np.concatenate(parts), time.perf_counter() - clock, cpu_seconds() - cpu, {})


def best_workers(
    source: Path, files: Sequence[Path], cores: int, *, say: Say
) -> tuple[int, dict[str, float]]:
    """The number of workers with which the usual loop is fastest, and images/s of each that was tried."""
    tried = {}
    for workers in sorted({1, max(1, cores // 2), cores}):
        usual(source, files[:BATCH], workers=workers, threads=cores)
        tried[workers] = len(files) / usual(source, files, workers=workers, threads=cores).seconds
        say(f"{USUAL} with {workers} workers: {tried[workers]:.1f} images/s")
    return max(tried, key=lambda n: tried[n]), {str(n): rate for n, rate in tried.items()}


def naive(source: Path, files: Sequence[Path]) -> Run:
    """One picture after another through torch."""
    from PIL import Image

    encoder = Encoder.load(source, runtime="torch", device="cpu")
    transform = usual_transform(encoder.preprocess)
    clock, cpu = time.perf_counter(), cpu_seconds()
    parts = [encoder.embed_arrays(transform(Image.open(file).convert("RGB")).numpy()[None]) for file in files]
    return Run(np.concatenate(parts), time.perf_counter() - clock, cpu_seconds() - cpu, {})


# What came out


def check_vectors(found: Mapping[str, Vectors]) -> None:
    """Refuse a table in which a contender makes other vectors than the usual loop. Raises Disagreement."""
    for name, vectors in found.items():
        if vectors.shape != found[USUAL].shape:
            raise race.Disagreement(f'"{name}" made {len(vectors)} vectors of {len(found[USUAL])}')
        cosine = percentile_of_cosines(vectors, found[USUAL])
        if not cosine >= LEAST_COSINE:
            raise race.Disagreement(
                f'"{name}" makes other vectors than the usual loop: cosine {cosine:.5f} at the 1st '
                f"percentile, at least {LEAST_COSINE} is needed"
            )


def percentile_of_cosines(one: Vectors, other: Vectors) -> float:
    """The 1st percentile of the cosine between both vectors of a picture."""
    return float(np.percentile(np.einsum("nd,nd->n", one.astype(np.float64), other), 1))


def table(runs: Mapping[str, Sequence[Run]], pictures: int) -> list[dict[str, Any]]:
    reference = runs[USUAL][0].vectors
    return [row_of(name, found, pictures, reference) for name, found in runs.items()]


def row_of(name: str, runs: Sequence[Run], pictures: int, reference: Vectors | None) -> dict[str, Any]:
    """Medians of a contender's turns."""
    seconds = [run.seconds for run in runs]
    median = float(np.median(seconds))
    spent = runs[0].spent
    total = sum(spent.values())
    return {
        "name": name,
        "seconds": median,
        "images/s": pictures / median,
        "spread": (max(seconds) - min(seconds)) / median,
        "cpu ms": 1e3 * float(np.median([run.cpu_seconds for run in runs])) / pictures,
        "embed": spent["embed"] / total if total else None,
        "cosine p1": None if reference is None else percentile_of_cosines(runs[0].vectors, reference),
    }


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Images/s in multiples of the usual loop's."""
    usual_rate = next(row["images/s"] for row in rows if row["name"] == USUAL)
    return [{**row, "x usual": row["images/s"] / usual_rate} for row in rows]


def print_ingest(result: Mapping[str, Any]) -> str:
    """The table as text."""
    columns = {
        "images/s": race.ratio,
        "x usual": race.ratio,
        "spread": race.share,
        "cpu ms": race.milliseconds,
        "embed": race.share,
        "cosine p1": lambda value: f"{value:.5f}",
    }
    weights = "trained" if result["trained"] else "random weights"
    return "\n".join(
        [
            race.heading(result["machine"], result["repeats"]),
            f"\n{result['pictures']:,} pictures ({result['data']}) through {result['trunk']} at "
            f"{result['size']} px, {weights}; the usual loop has {result['usual workers']} workers",
            *race.lines_of(result["rows"], columns),
            "cpu ms: processor time of a picture. embed: share of the encoder in the work of ours.\n"
            "cosine p1: 1st percentile of the cosine with the usual loop's vectors.",
        ]
    )
