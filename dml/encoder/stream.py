"""Files to vectors as fast as the machine goes: reading, decoding, embedding and the caller's work overlap.

Threads, not processes: Pillow, ONNX Runtime and OpenVINO do their work outside Python's lock, so threads use
all cores, and neither pixels nor weights have to be copied between processes. On a CPU each call of the model
runs on one core, several calls at a time, in the same threads that decode: no core waits for another at the
end of a layer, and decoding and embedding never compete for more threads than there are cores.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dml.data.table import Record
from dml.errors import InvalidImage
from dml.imaging import DEFAULT_MAX_PIXELS, BadImage, crop_box, decode, read_file

Vectors = NDArray[np.float32]

LARGEST_CALL = 16
"""Pictures in one call of a model that runs several calls at a time: more would not be faster on one core,
and every call holds the model's intermediate results."""


class ReadFile(NamedTuple):
    """A file as it was when it was read."""

    index: int  # position in the sources
    sha256: str
    size: int  # bytes
    mtime_ns: int


class EmbeddedBatch(NamedTuple):
    """Some rows of a stream, in the order of its sources."""

    indices: NDArray[np.int64]  # (B,) positions in the sources
    vectors: Vectors  # (B, D)
    files: tuple[ReadFile, ...] = ()  # of the rows
    passed: tuple[ReadFile, ...] = ()  # read, and not embedded, for the caller did not want them
    decode_seconds: float = 0.0  # summed over the threads that read and decoded
    embed_seconds: float = 0.0


class Steps(NamedTuple):
    """What is done with pictures; called from several threads."""

    decode: Callable[[bytes, str], Image.Image]  # bytes and their name -> upright RGB, perhaps smaller
    pixels: Callable[[Image.Image], NDArray[np.uint8]]
    embed: Callable[[NDArray[np.uint8]], Vectors]  # (N, S, S, 3) -> (N, D)
    concurrent: bool  # whether `embed` is called several times at once, on one core each
    size: int  # pictures in a call
    max_pixels: int = DEFAULT_MAX_PIXELS  # of a picture


class _Prepared(NamedTuple):
    file: ReadFile
    pixels: NDArray[np.uint8]
    seconds: float


@dataclass
class _Batch:
    """What is gathered for the next call."""

    files: list[ReadFile] = field(default_factory=list)
    pixels: list[NDArray[np.uint8]] = field(default_factory=list)
    passed: list[ReadFile] = field(default_factory=list)
    seconds: float = 0.0


def processors() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def embed_ahead(
    sources: Sequence[Record | Path],
    steps: Steps,
    *,
    workers: int,
    bad: list[BadImage],
    wanted: Callable[[ReadFile], bool] | None = None,
) -> Iterator[EmbeddedBatch]:
    """Embed files batch after batch, in order; while the caller works on one, the next ones are made.

    Args:
        sources: files, or records of a table (whose boxes are cut out).
        workers: threads that decode, and embed where calls are concurrent.
        bad: pictures that cannot be read are appended here, in order, and left out.
        wanted: asked for every readable picture, in order and in the caller's thread, before it is embedded.
    """
    ahead = 2 * steps.size + 2 * workers
    calls = workers + 1 if steps.concurrent else 3
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="decode"))
        caller = pool
        if not steps.concurrent:  # one call after another, beside the threads that decode
            caller = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="embed"))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        stack.callback(caller.shutdown, wait=False, cancel_futures=True)
        rest = iter(range(len(sources)))
        reading = deque(pool.submit(_read, sources[i], i, steps) for i in islice(rest, ahead))
        embedding: deque[Future[EmbeddedBatch]] = deque()
        batch = _Batch()
        while reading:
            result = reading.popleft().result()
            reading.extend(pool.submit(_read, sources[i], i, steps) for i in islice(rest, 1))
            if isinstance(result, BadImage):
                bad.append(result)
                continue
            _gather(batch, result, wanted)
            if len(batch.files) == steps.size:
                embedding.append(caller.submit(_embed, batch, steps))
                batch = _Batch()
            while embedding and (len(embedding) >= calls or embedding[0].done()):
                yield embedding.popleft().result()
        if batch.files or batch.passed:
            embedding.append(caller.submit(_embed, batch, steps))
        while embedding:
            yield embedding.popleft().result()


def _read(source: Record | Path, index: int, steps: Steps) -> "_Prepared | BadImage":
    """Bytes, their sha256, and the square of pixels. A box counts in the full picture: no decoder but the
    reference may make that smaller."""
    started = time.perf_counter()
    record = source if isinstance(source, Record) else Record(source, None)
    path = record.path
    try:
        changed = _time_of_change(path)  # before reading: a change meanwhile is noticed the next time
        data = read_file(path)
        if record.box is None:
            picture = steps.decode(data, str(path))
        else:
            whole = decode(data, name=str(path), max_pixels=steps.max_pixels)
            picture = crop_box(whole, record.box, str(path))
        pixels = steps.pixels(picture)
    except InvalidImage as error:
        return BadImage(str(path), str(error))
    digest = hashlib.sha256(data).hexdigest()
    file = ReadFile(index, digest, len(data), changed)
    return _Prepared(file, pixels, time.perf_counter() - started)


def _time_of_change(path: Path) -> int:
    """Nanoseconds; 0 where the system does not say, and reading will tell why."""
    try:
        return path.stat().st_mtime_ns
    except (OSError, ValueError):
        return 0


def _gather(batch: _Batch, one: _Prepared, wanted: Callable[[ReadFile], bool] | None) -> None:
    batch.seconds += one.seconds
    if wanted is not None and not wanted(one.file):
        batch.passed.append(one.file)
        return
    batch.files.append(one.file)
    batch.pixels.append(one.pixels)


def _embed(batch: _Batch, steps: Steps) -> EmbeddedBatch:
    started = time.perf_counter()
    vectors = steps.embed(np.stack(batch.pixels)) if batch.pixels else None
    indices = np.array([file.index for file in batch.files], np.int64)
    return EmbeddedBatch(
        indices,
        np.empty((0, 0), np.float32) if vectors is None else vectors,
        tuple(batch.files),
        tuple(batch.passed),
        batch.seconds,
        time.perf_counter() - started,
    )
