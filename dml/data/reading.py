"""Pictures to arrays, in order, in the background, skipping and listing what cannot be read. No torch
here."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dml.data.table import Record
from dml.errors import InvalidImage, TooManyBadImages
from dml.imaging import DEFAULT_MAX_PIXELS, BadImage, crop_box, decode

T = TypeVar("T")
R = TypeVar("R")

Preprocess = Callable[[Image.Image], NDArray[np.float32]]
"""An upright RGB picture to float32 (3, H, W)."""


def read(record: Record, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """The picture of a record, upright RGB, cut to its box.

    Raises:
        InvalidImage: not there, not a picture, damaged, too large, or a box outside of it.
    """
    picture = decode(record.path, max_pixels=max_pixels)
    return crop_box(picture, record.box, str(record.path))


def batches_of(
    records: Sequence[Record | Path],
    preprocess: Preprocess,
    *,
    batch_size: int = 64,
    workers: int = 2,
    bad: list[BadImage] | None = None,
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (indices (B,) into `records`, array (B, 3, H, W)) in order, reading ahead in threads.

    Pillow decodes and resizes outside Python's lock, so threads are enough and nothing has to be pickled.

    Args:
        records: what to read; plain paths mean the whole picture.
        preprocess: the encoder's own preprocessing.
        batch_size: pictures in a batch; batches are filled up past bad pictures, so only the last may be
            smaller.
        workers: threads that read.
        bad: pictures that cannot be read are appended here, in order, and left out of the batches.
    """
    sink = [] if bad is None else bad

    def load(index: int) -> NDArray[np.float32] | BadImage:
        entry = records[index]
        record = entry if isinstance(entry, Record) else Record(entry, None)
        try:
            return preprocess(read(record, max_pixels=max_pixels))
        except InvalidImage as error:
            return BadImage(str(record.path), str(error))

    indices: list[int] = []
    arrays: list[NDArray[np.float32]] = []
    for index, result in enumerate(
        read_ahead(load, range(len(records)), workers=workers, ahead=2 * batch_size)
    ):
        if isinstance(result, BadImage):
            sink.append(result)
            continue
        indices.append(index)
        arrays.append(result)
        if len(indices) == batch_size:
            yield np.array(indices, dtype=np.int64), np.stack(arrays)
            indices, arrays = [], []
    if indices:
        yield np.array(indices, dtype=np.int64), np.stack(arrays)


def read_ahead(function: Callable[[T], R], items: Sequence[T], *, workers: int, ahead: int) -> Iterator[R]:
    """function(item) for every item, in order, with at most `ahead` results waiting."""
    with ThreadPoolExecutor(max_workers=max(1, workers), thread_name_prefix="read") as pool:
        rest = iter(items)
        waiting: deque[Future[R]] = deque(pool.submit(function, item) for item in islice(rest, max(1, ahead)))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in islice(rest, 1))
                yield result
        finally:
            for future in waiting:
                future.cancel()


def check_share(
    bad: Sequence[BadImage], total: int, limit: float, *, option: str = "data.max_bad_share"
) -> None:
    """Fail when more than the share `limit` of `total` pictures is bad.

    Args:
        option: what the user knows the limit as.

    Raises:
        TooManyBadImages: with the counts and the first reasons.
    """
    if len(bad) > limit * total + 1e-9:  # 0.29 * 100 is below 29
        shown = "\n  ".join(b.reason for b in bad[:5])
        more = f"\n  … and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        raise TooManyBadImages(
            f"{len(bad):,} of {total:,} images cannot be read, more than the {limit:.1%} that "
            f"{option} allows:\n  {shown}{more}\n`dml data check` lists them all. Mend or remove "
            "them, or raise the limit."
        )
