"""Many real vectors from not so many pictures: random cuts of them, through a trained encoder.

The first rows are one cut of every picture, then comes a second one of each, and so on: the beginning of the
file is made of as many pictures as the whole. Queries are cuts of pictures of which no cut is among the rows,
and whose bytes do not occur twice.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dml.data.reading import read, read_ahead
from dml.data.table import Record, open_table
from dml.encoder import Encoder, Preprocess
from dml.errors import DataError, StorageError
from eval.speed import race

QUERIES = 2_000
"""Vectors to search with; at most a tenth of the pictures."""

AREA = (0.25, 1.0)
"""A cut covers between these shares of its picture."""

SHAPE = (3 / 4, 4 / 3)
"""And is so many times as wide as high."""

CHUNK = 256
"""Cuts embedded at once."""


def queries_beside(vectors: Path) -> Path:
    """Where the queries of a file of vectors are: FILE.npy, FILE.queries.npy."""
    return vectors.with_suffix(".queries.npy")


def make_embeddings(
    *,
    data: str,
    encoder: Path,
    rows: int,
    out: Path,
    threads: int | None,
    say: Callable[[str], None],
    seed: int = 0,
) -> dict[str, Any]:
    """Write `rows` vectors to `out` and queries beside it.

    Args:
        data: folder or manifest of pictures.
        encoder: a trained encoder or run.
        out: FILE.npy, float32 (rows, D) of unit length; FILE.queries.npy gets the queries.
        threads: of the encoder, and as many that read pictures; None: their own choice.

    Raises:
        DataError, EncoderError: nothing there that can be read.
        StorageError: the files cannot be written.
    """
    model = Encoder.load(encoder, device="cpu", threads=threads)
    indexed, asked = apart(open_table(data).records, seed=seed)
    say(f"{len(indexed):,} pictures to index, {len(asked):,} other ones to ask for")
    out = out if out.suffix == ".npy" else out.with_name(out.name + ".npy")
    started = time.perf_counter()
    embed = partial(embed_cuts, model, threads=threads or 2, seed=seed, say=say)
    embed(asked, len(asked), queries_beside(out))
    embed(indexed, rows, out)
    seconds = time.perf_counter() - started
    return {
        "machine": race.machine(),
        "repeats": 1,
        "vectors": str(out),
        "rows": rows,
        "dim": model.dim,
        "queries": len(asked),
        "pictures": len(indexed),
        "encoder": model.fingerprint,
        "seconds": seconds,
    }


def apart(records: Sequence[Record], *, seed: int) -> tuple[list[Record], list[Record]]:
    """Pictures to index, in a random order, and pictures to ask for; none of the latter is there twice.

    Raises:
        DataError: fewer than a hundred pictures.
    """
    if len(records) < 100:
        raise DataError(f"there are {len(records)} pictures; wanted are at least 100")
    order = np.random.default_rng(seed).permutation(len(records))
    wanted = min(QUERIES, len(records) // 10)
    digests = [hashlib.sha256(record.path.read_bytes()).digest() for record in records]
    times = Counter(digests)
    single = [int(n) for n in order if times[digests[n]] == 1][:wanted]
    held = set(single)
    return [records[n] for n in order if n not in held], [records[n] for n in single]


def embed_cuts(
    encoder: Encoder,
    records: Sequence[Record],
    rows: int,
    out: Path,
    *,
    threads: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """One cut of every record, then a second one of each, and so on, until there are so many rows."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = np.lib.format.open_memmap(out, mode="w+", dtype=np.float32, shape=(rows, encoder.dim))
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error.strerror or error}") from error
    step = max(1, CHUNK * len(records) // max(rows, len(records)))  # pictures read at once, each only once
    chunks = [range(first, min(first + step, len(records))) for first in range(0, len(records), step)]
    cut = partial(cuts, records, rows=rows, preprocess=encoder.preprocess, seed=seed)
    told, done = time.perf_counter(), 0
    for places, pixels in read_ahead(cut, chunks, workers=threads, ahead=2 * threads):
        if len(places):
            inputs = encoder.preprocess.normalise(pixels)
            found[places] = encoder.embed_arrays(inputs, batch_size=CHUNK)
        done += len(places)
        if time.perf_counter() - told > 30:
            told = time.perf_counter()
            say(f"{done:,} of {rows:,}")
    found.flush()


def cuts(
    records: Sequence[Record], chunk: range, *, rows: int, preprocess: Preprocess, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Rows (N,) of some of the records, and their cuts (N, S, S, 3): a matter of row and seed alone."""
    places, found = [], []
    for number in chunk:
        own = range(number, rows, len(records))
        if len(own):
            picture = read(records[number])
            places += own
            parts = (random_cut(picture, np.random.default_rng((seed, row))) for row in own)
            found += [preprocess.pixels(part) for part in parts]
    size = preprocess.size
    return np.array(places, np.int64), np.array(found, np.uint8).reshape(-1, size, size, 3)


def random_cut(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A part of a picture, mirrored or not."""
    share, shape = rng.uniform(*AREA), np.exp(rng.uniform(*np.log(SHAPE)))
    side = np.sqrt(share * picture.width * picture.height)
    width = int(np.clip(round(side * np.sqrt(shape)), 1, picture.width))
    height = int(np.clip(round(side / np.sqrt(shape)), 1, picture.height))
    left = int(rng.integers(picture.width - width + 1))
    top = int(rng.integers(picture.height - height + 1))
    part = picture.crop((left, top, left + width, top + height))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


def print_embeddings(result: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            race.heading(result["machine"], result["repeats"]),
            f"{result['rows']:,} x {result['dim']} vectors of {result['pictures']:,} pictures, and "
            f"{result['queries']:,} queries of as many other ones, in {result['seconds']:,.0f} s: "
            f"{result['vectors']}",
        ]
    )
