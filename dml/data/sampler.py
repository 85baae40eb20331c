"""Which images make a batch: P classes with K images each, repeatable from (seed, epoch, step) alone."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dml.errors import DataError

Indices = NDArray[np.int64]


class ClassBalancedSampler:
    """Batches of `classes_per_batch` different classes with `images_per_class` images each.

    Classes come in random rounds: in a round every class is drawn once (and the last batch of a round is
    filled with classes drawn earlier in it), so each is seen as often as any other, whatever its size. The
    images of a class come in random rounds too; a class with fewer than `images_per_class` images repeats
    them within the batch. Nothing is remembered between batches: batch number n of a seed is always the same,
    so a resumed run goes on as if it had never stopped.

    Where there are fewer classes than asked, all are used, with more images each, so that the batch keeps
    about its size; `note` says so.

    Args:
        labels: the class of every image, any integers.
        classes_per_batch: P, at least 2.
        images_per_class: K, at least 2.
        steps_per_epoch: batches in an epoch; 0: as many as it takes to show as many images as there are.
        seed: decides every draw.

    Raises:
        DataError: fewer than two classes.
        ValueError: P or K below 2.
    """

    def __init__(
        self,
        labels: Sequence[int] | Indices,
        *,
        classes_per_batch: int,
        images_per_class: int,
        steps_per_epoch: int = 0,
        seed: int = 0,
    ) -> None:
        if classes_per_batch < 2 or images_per_class < 2:
            raise ValueError(
                f"a batch needs at least 2 classes and 2 images of each, got {classes_per_batch} x "
                f"{images_per_class}"
            )
        rows = np.asarray(labels, dtype=np.int64)
        order = np.argsort(rows, kind="stable")
        found, starts = np.unique(rows[order], return_index=True)
        self.members = np.split(order.astype(np.int64), starts[1:])  # one array of image indices per class
        if len(found) < 2:
            raise DataError(
                f"a batch needs at least two classes to compare, and the training images have {len(found)}"
            )
        self.note = ""
        if len(found) < classes_per_batch:
            asked = f"{classes_per_batch} classes x {images_per_class} images"
            images_per_class = -(-classes_per_batch * images_per_class // len(found))
            classes_per_batch = len(found)
            self.note = (
                f"batches of {asked} were asked for, but there are {classes_per_batch} classes: "
                f"batches hold {classes_per_batch} classes x {images_per_class} images"
            )
        self.classes_per_batch, self.images_per_class, self.seed = classes_per_batch, images_per_class, seed
        self.steps_per_epoch = steps_per_epoch or -(-len(rows) // self.batch_size)
        self._round = -(-len(found) // classes_per_batch)  # batches in which every class is drawn once

    @property
    def batch_size(self) -> int:
        return self.classes_per_batch * self.images_per_class

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.steps_per_epoch

    def epoch(self, number: int, *, start: int = 0) -> Iterator[Indices]:
        """Batches `start`, `start` + 1, … of an epoch, each (P · K,) image indices, the images of a class
        together."""
        for step in range(start, self.steps_per_epoch):
            yield self.batch(number * self.steps_per_epoch + step)

    def batch(self, number: int) -> Indices:
        """Batch number `number` since the start of training, (P · K,)."""
        lap, place = divmod(number, self._round)
        order = self._draw(0, lap).permutation(len(self.members))
        drawn = order[place * self.classes_per_batch : (place + 1) * self.classes_per_batch]
        rows = [self._images(int(c), lap) for c in drawn]
        again = order[
            : self.classes_per_batch - len(drawn)
        ]  # the round's first classes: not in this batch yet
        rows += [self._extra_images(int(c), number) for c in again]
        return np.concatenate(rows)

    def _images(self, label: int, visit: int) -> Indices:
        """The K images of a class's visit; over ⌈n / K⌉ visits each of its n images is shown."""
        members, k = self.members[label], self.images_per_class
        visits = -(-len(members) // k)
        lap, place = divmod(visit, visits)
        order = members[self._draw(1, label, lap).permutation(len(members))]
        taken = order[place * k : (place + 1) * k]
        return np.concatenate(
            [taken, np.resize(order, k - len(taken))]
        )  # short: from the front, again and again

    def _extra_images(self, label: int, number: int) -> Indices:
        order = self.members[label][self._draw(2, label, number).permutation(len(self.members[label]))]
        return np.resize(order, self.images_per_class)

    def _draw(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *purpose])
