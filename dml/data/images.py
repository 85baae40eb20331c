"""Training pictures as batches of tensors.

Small sets are decoded once and kept as uint8 squares, and a whole batch is augmented at a time; large ones
are decoded by worker processes with torchvision's transforms. Either way batch n of a seed is the same in
every run, so that a resumed run goes on as if it had never stopped.
"""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dml.config import DataConfig
from dml.data.augment import Augmentation
from dml.data.batch import Batch
from dml.data.reading import batches_of, check_share, read, read_ahead
from dml.data.sampler import ClassBalancedSampler, Indices
from dml.data.table import Record
from dml.errors import DataError, InvalidImage
from dml.imaging import BadImage, probe

__all__ = ["ImageSource", "TrainingBatches", "batches_of", "training_batches"]

log = logging.getLogger(__name__)

MARGIN = 1.25
"""Stored squares are this much larger than what the network sees, so that random crops keep their
sharpness."""


SWEEP = 1
"""Sets the random numbers of a sweep over all pictures apart from those of training steps."""


class ImageSource:
    """The training pictures of a run, checked, labelled with numbers, and in memory where they fit.

    Attributes:
        records: those that can be read; all indices count in this tuple.
        labels: (N,) int64, positions of the labels in `classes`.
        bad: what was skipped, and why.
        pixels: (N, C, H, W) uint8 squares, or None when the pictures stay on disk.
        aspect: (N,) float32, width / height of each picture before it was squeezed into a square.

    Args:
        records: labelled records.
        classes: every label that may occur, in the order of their numbers.
        config: sizes, fit, limits.
        mean, std: per channel, in [0, 1]: what the network's input is normalised with.
        channels: 3, or 1 for grey.
        progress: called with (done, all) while pictures are read.

    Raises:
        TooManyBadImages: more than `config.max_bad_share` cannot be read.
        DataError: no records, or a label that is not among the classes.
    """

    def __init__(
        self,
        records: Sequence[Record],
        classes: Sequence[str],
        config: DataConfig,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int = 3,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
        if not records:
            raise DataError("there are no training images")
        self.config, self.channels = config, channels
        self.classes = tuple(classes)
        self.mean = torch.tensor(mean[:channels], dtype=torch.float32)[:, None, None]
        self.std = torch.tensor(std[:channels], dtype=torch.float32)[:, None, None]
        self.bad: list[BadImage] = []
        self.pixels: Tensor | None = None
        self.aspect = torch.ones(len(records))
        kept = self._read(list(records), progress)
        check_share(self.bad, len(records), config.max_bad_share)
        if not kept:
            raise DataError(f"none of the {len(records):,} training images can be read")
        self.records = tuple(records[i] for i in kept)
        self.labels = torch.from_numpy(_numbers(self.records, self.classes))

    def __len__(self) -> int:
        return len(self.records)

    @property
    def side(self) -> int:
        """Side of the stored squares in pixels."""
        return round(MARGIN * self.config.image_size)

    @property
    def border(self) -> tuple[int, ...]:
        """Colour of added borders (RGB): the mean, as in the encoder's preprocessing."""
        red, *others = (round(255 * min(max(float(v), 0.0), 1.0)) for v in self.mean.flatten())
        return (red, *(others or (red, red)))

    @property
    def fits_in_memory(self) -> bool:
        """Whether the pictures are, or would be, kept in memory."""
        return len(self.aspect) * self.channels * self.side**2 <= self.config.memory_gb * 1e9

    def normalize(self, pictures: Tensor) -> Tensor:
        """(…, C, H, W) in [0, 1] to the network's input."""
        return (pictures - self.mean.to(pictures.device)) / self.std.to(pictures.device)

    def _read(self, records: list[Record], progress: Callable[[int, int], None] | None) -> list[int]:
        """Decode everything, or check the headers of what stays on disk; return the positions of the good
        ones."""
        keep = self.fits_in_memory
        pixels = torch.empty(
            len(records) if keep else 0, self.channels, self.side, self.side, dtype=torch.uint8
        )
        kept: list[int] = []
        work = _Squares(self.side, self.channels, self.config.fit, self.border).read if keep else _header
        for index, result in enumerate(read_ahead(work, records, workers=self.config.workers, ahead=64)):
            if isinstance(result, BadImage):
                self.bad.append(result)
                log.warning("skipped: %s", result.reason)
            else:
                self.aspect[len(kept)] = 1.0 if self.config.fit != "crop" else result.aspect
                if keep:
                    pixels[len(kept)] = torch.from_numpy(result.pixels)
                kept.append(index)
            if progress is not None:
                progress(index + 1, len(records))
        self.aspect = self.aspect[: len(kept)].clone()
        if keep:
            self.pixels = pixels[: len(kept)]
        return kept


class _Square(NamedTuple):
    pixels: np.ndarray  # (C, side, side) uint8, or empty
    aspect: float


@dataclass(frozen=True)
class _Squares:
    """Reads a picture and squeezes it into a square."""

    side: int
    channels: int
    fit: str
    border: tuple[int, ...]

    def read(self, record: Record) -> _Square | BadImage:
        try:
            picture = read(record)
        except InvalidImage as error:
            return BadImage(str(record.path), str(error))
        aspect = picture.width / picture.height
        if self.fit == "pad":
            picture = ImageOps.pad(picture, (self.side, self.side), color=self.border)
        picture = picture.resize((self.side, self.side), Image.Resampling.BILINEAR, reducing_gap=3.0)
        return _Square(as_array(picture, self.channels), aspect)


def _header(record: Record) -> _Square | BadImage:
    try:
        width, height = probe(record.path)
    except InvalidImage as error:
        return BadImage(str(record.path), str(error))
    return _Square(np.empty(0, dtype=np.uint8), width / height)


def shrunk(picture: Image.Image, side: int) -> Image.Image:
    """The picture with its shorter side at most `side`: random crops of large photos stay cheap."""
    factor = side / min(picture.size)
    if factor >= 1:
        return picture
    size = (max(side, round(picture.width * factor)), max(side, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)


def as_array(picture: Image.Image, channels: int) -> np.ndarray:
    """(C, H, W) uint8 of an RGB picture."""
    if channels == 1:
        return np.asarray(picture.convert("L"))[None].copy()
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _numbers(records: Sequence[Record], classes: Sequence[str]) -> np.ndarray:
    number = {label: i for i, label in enumerate(classes)}
    strange = sorted({str(r.label) for r in records if r.label not in number})
    if strange:
        raise DataError(
            f"{len(strange):,} labels are not among the {len(classes):,} classes: {', '.join(strange[:5])}"
        )
    return np.array([number[r.label] for r in records if r.label is not None], dtype=np.int64)


class _Draw(NamedTuple):
    rows: Indices  # of the whole batch
    seed: int
    own: slice  # those of this process


class TrainingBatches:
    """Batches of a run: `for batch in batches.epoch(3, start=17)` goes on at step 17 of epoch 3.

    Where `parts` processes train together, number `part` gets its contiguous slice of every batch, with the
    augmentation that it would have in one process: side by side the slices are that process's batch.
    """

    def __init__(
        self,
        source: ImageSource,
        sampler: ClassBalancedSampler,
        augmentation: Augmentation,
        *,
        seed: int,
        device: torch.device | str = "cpu",
        part: int = 0,
        parts: int = 1,
    ) -> None:
        if not 0 <= part < parts or sampler.batch_size % parts:
            raise ValueError(
                f"a batch of {sampler.batch_size} cannot be cut into {parts} equal parts with a number {part}"
            )
        self.source, self.sampler, self.augmentation, self.seed = source, sampler, augmentation, seed
        self.part, self.parts = part, parts
        self.device = torch.device(device)
        self._pixels = None if source.pixels is None else source.pixels.to(self.device)

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.sampler)

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from step `start` on.

        Raises:
            TooManyBadImages: when pictures read on the way turn out to be damaged, beyond the limit.
        """
        size = self.sampler.batch_size // self.parts
        own = slice(self.part * size, (self.part + 1) * size)
        drawn = enumerate(self.sampler.epoch(number, start=start), start)
        yield from self._batches(_Draw(rows, _seed(self.seed, number, step), own) for step, rows in drawn)

    def sweep(self, number: int, *, size: int = 256) -> Iterator[Batch]:
        """Every picture once, in order and augmented as in training, for statistics of the set.

        Of several processes each gets every so manieth batch.

        Raises:
            TooManyBadImages: as `epoch`.
        """
        cuts = list(enumerate(torch.arange(len(self.source)).split(size)))
        # Seeds of their own, apart from those of the epoch's steps.
        yield from self._batches(
            _Draw(rows.numpy(), _seed(self.seed, number, step, SWEEP), slice(0, len(rows)))
            for step, rows in cuts[self.part :: self.parts]
        )

    def _batches(self, drawn: Iterable[_Draw]) -> Iterator[Batch]:
        if self._pixels is None:
            yield from self._from_disk(drawn)
            return
        for draw in drawn:
            yield self._from_memory(self._pixels, draw)

    def _from_memory(self, pixels: Tensor, draw: _Draw) -> Batch:
        rows = torch.from_numpy(draw.rows)
        own = rows[draw.own]
        there = own.to(self.device)
        pictures = self._augmented(pixels, rows, draw)
        return Batch(there, self.source.normalize(pictures), self.source.labels[own].to(self.device))

    def _augmented(self, pixels: Tensor, rows: Tensor, draw: _Draw) -> Tensor:
        """The own pictures of a batch, changed as they would be in the whole batch."""
        generator = torch.Generator().manual_seed(draw.seed)
        size, aspect = self.source.config.image_size, self.source.aspect[rows]
        change, own = self.augmentation.on_batch, rows[draw.own]
        if len(own) == len(rows):
            return change(pixels[rows.to(self.device)], aspect, size, generator)
        if "part" in inspect.signature(change).parameters:
            return change(pixels[own.to(self.device)], aspect, size, generator, part=draw.own)
        return change(pixels[rows.to(self.device)], aspect, size, generator)[draw.own]

    def _from_disk(self, drawn: Iterable[_Draw]) -> Iterator[Batch]:
        config = self.source.config
        plan = [
            [(int(row), _seed(draw.seed, place)) for place, row in enumerate(draw.rows)][draw.own]
            for draw in drawn
        ]
        transform = self.augmentation.on_picture(config.image_size, squash=config.fit == "squash")
        pictures = _OnDisk(self.source, transform)
        loader = DataLoader(
            pictures,
            batch_sampler=plan,
            num_workers=config.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
        )
        seen = {bad.path for bad in self.source.bad}
        for rows, inputs, bad in loader:
            fresh = [b for b in bad if b.path not in seen]
            seen.update(b.path for b in fresh)
            self.source.bad += fresh
            for b in fresh:
                log.warning("skipped: %s", b.reason)
            check_share(self.source.bad, len(self.source) + len(self.source.bad), config.max_bad_share)
            yield Batch(rows, self.source.normalize(inputs), self.source.labels[rows]).to(self.device)


def training_batches(
    source: ImageSource,
    sampler: ClassBalancedSampler,
    augmentation: Augmentation,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    part: int = 0,
    parts: int = 1,
) -> TrainingBatches:
    """Batches that depend on (seed, epoch, step) only.

    Args:
        device: where pictures kept in memory are held and augmented, and where batches end up.
        part, parts: the number of this process, and how many share every batch.
    """
    return TrainingBatches(source, sampler, augmentation, seed=seed, device=device, part=part, parts=parts)


class _Sample(NamedTuple):
    row: int
    picture: Tensor
    bad: list[BadImage]


class _OnDisk(Dataset):
    """Decodes and augments one picture at a time; runs in worker processes."""

    def __init__(self, source: ImageSource, transform: nn.Module) -> None:
        self.records, self.channels, self.border = source.records, source.channels, source.border
        self.fit, self.size = source.config.fit, source.config.image_size
        self.labels = source.labels.numpy()
        self.transform = transform

    def __getitem__(self, place: tuple[int, int]) -> _Sample:
        row, seed = place
        bad: list[BadImage] = []
        for candidate in self._candidates(row, seed):
            record = self.records[candidate]
            try:
                picture = read(record)
            except InvalidImage as error:
                bad.append(BadImage(str(record.path), str(error)))
                continue
            picture = shrunk(picture, 2 * self.size)
            if self.fit == "pad":
                longer = max(picture.size)
                picture = ImageOps.pad(picture, (longer, longer), color=self.border)
            pixels = torch.from_numpy(as_array(picture, self.channels))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return _Sample(candidate, self.transform(pixels), bad)
        raise DataError(f"no picture of the class of {self.records[row].path} can be read any more")

    def _candidates(self, row: int, seed: int) -> Iterator[int]:
        """The picture itself; should it be damaged, others of its class, so that the batch keeps its
        shape."""
        yield row
        others = np.flatnonzero(self.labels == self.labels[row])
        others = others[others != row]
        yield from (int(i) for i in np.random.default_rng(seed).permutation(others))


def _collate(samples: list[_Sample]) -> tuple[Tensor, Tensor, list[BadImage]]:
    rows = torch.tensor([s.row for s in samples], dtype=torch.int64)
    return rows, torch.stack([s.picture for s in samples]), [b for s in samples for b in s.bad]


def _seed(*parts: int) -> int:
    """One number from several: equal parts, equal number."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
