"""Pictures into a collection: what is new is embedded, bytes that have a vector already are not.

While one batch is written, the next ones are decoded and embedded. Every `COMMIT_EVERY` items are durable by
themselves, so that whoever is interrupted loses little.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dml.collection.base import NewItem
from dml.collection.items import check_id
from dml.collection.local import LocalCollection
from dml.collection.notes import FileNote, FileNotes
from dml.data.ids import relative_path
from dml.data.reading import check_share
from dml.errors import UsageError
from dml.imaging import DEFAULT_MAX_PIXELS, BadImage

if TYPE_CHECKING:
    from dml.data.table import Record
    from dml.encoder import Encoder
    from dml.encoder.stream import EmbeddedBatch, ReadFile

COMMIT_EVERY = 512  # items
COMMIT_SECONDS = 10.0
"""Sooner when embedding is slow: an interruption costs little work whatever the model."""

Progress = Callable[[int, int, int], None]
"""Told (done, all, bad) pictures after each batch."""

Duplicates = Literal["keep", "skip"]


@dataclass(frozen=True)
class Settings:
    """How pictures become items."""

    store: bool = False
    """Keep the bytes of the pictures in the collection; else they are referred to where they lie."""
    batch_size: int = 64
    """Pictures in one call of the encoder, at most; less where several calls run side by side on a CPU."""
    workers: int | None = None
    """Threads that decode, and on a CPU embed; None: as many as there are cores."""
    max_bad_share: float = 0.05
    """More unreadable pictures than this share of all make the import fail."""
    duplicates: Duplicates = "keep"
    """Files of equal bytes under several ids: keep every item (embedded once), or skip all but the first."""
    max_pixels: int = DEFAULT_MAX_PIXELS
    """A picture of more counts as unreadable: a small file can unpack to gigabytes."""


class Duplicate(NamedTuple):
    """An item whose bytes are those of another."""

    id: str
    of: str


@dataclass
class Spent:
    """Where the time of an import went, in seconds summed over threads: they overlap."""

    decode: float = 0.0  # reading, hashing, decoding, resizing
    embed: float = 0.0
    write: float = 0.0  # into the catalogue

    def shares(self) -> dict[str, float]:
        """Of all work; {} when there was none."""
        parts = {"decode": self.decode, "embed": self.embed, "write": self.write}
        total = sum(parts.values())
        return {name: seconds / total for name, seconds in parts.items()} if total else {}


@dataclass
class Report:
    """What an import did."""

    path: Path
    added: int = 0
    replaced: int = 0
    resumed: int = 0  # items that an interrupted build had left, and that stayed
    bad: list[BadImage] = field(default_factory=list)
    duplicates: list[Duplicate] = field(default_factory=list)
    skipped: int = 0  # duplicates that were left out
    without_picture: int = 0  # items that have a vector only, for their picture is not there any more
    seconds: float = 0.0
    spent: Spent = field(default_factory=Spent)
    index: Mapping[str, Any] = field(default_factory=dict)
    """What `build_index` says; {} when it was not asked for."""
    source: str = ""  # what was recognised, for people

    @property
    def images_per_second(self) -> float:
        return (self.added + self.replaced) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Wish:
    """A picture that is to be an item."""

    id: str
    record: "Record"
    payload: Mapping[str, Any]

    @property
    def box(self) -> str | None:
        """As the catalogue writes it."""
        return None if self.record.box is None else box_of({"box": list(self.record.box)})


class _Row(NamedTuple):
    """A picture on its way into the collection."""

    wish: Wish
    file: "ReadFile"
    vector: NDArray[np.float32] | None  # None: that of the item `of`, which has the same bytes
    of: str = ""


class Importer:
    """Puts pictures below one root into a collection.

    Args:
        root: name and folder of the root.
        progress: told after each batch.
        done: pictures that need no work any more, for the progress.
    """

    def __init__(
        self,
        collection: LocalCollection,
        encoder: "Encoder",
        settings: Settings,
        report: Report,
        *,
        root: tuple[str, Path],
        progress: Progress | None = None,
        done: int = 0,
    ) -> None:
        self.collection, self.encoder, self.settings, self.report = collection, encoder, settings, report
        self.root_name, self.root = root
        self.progress, self.done = progress, done
        self.notes = FileNotes(collection.path)
        self._first: dict[tuple[str, str | None], str] = {}
        """(sha256, box) -> the first item with that vector."""

    def run(self, wishes: Sequence[Wish]) -> None:
        """Embed and add, batch by batch.

        Raises:
            TooManyBadImages: more than the settings allow; what was written stays.
            StorageError: the disk is full or refuses.
        """
        if not wishes:
            return
        for known in self.collection.known_pictures():
            self._first.setdefault((known.sha256, known.box), known.id)
        total = self.done + len(wishes)
        wishes = [wish for wish in wishes if self._has_an_id(wish)]

        def is_new(file: "ReadFile") -> bool:
            key = (file.sha256, wishes[file.index].box)
            if key in self._first:
                return False
            self._first[key] = wishes[file.index].id
            return True

        stream = self.encoder.embed_stream(
            [wish.record for wish in wishes],
            batch_size=self.settings.batch_size,
            workers=self.settings.workers,
            bad=self.report.bad,
            wanted=is_new,
            max_pixels=self.settings.max_pixels,
        )
        rows: list[_Row] = []
        committed = time.monotonic()
        for batch in stream:
            self.report.spent.decode += batch.decode_seconds
            self.report.spent.embed += batch.embed_seconds
            rows += self._rows(batch, wishes)
            if len(rows) >= COMMIT_EVERY or time.monotonic() - committed > COMMIT_SECONDS:
                self._commit(rows)
                rows, committed = [], time.monotonic()
            self._require_few(total)
            if self.progress is not None:
                last = max(file.index for file in (*batch.files, *batch.passed))
                self.progress(self.done + last + 1, total, len(self.report.bad))
        self._commit(rows)
        self._require_few(total)

    def _has_an_id(self, wish: Wish) -> bool:
        try:
            check_id(wish.id)
        except UsageError as error:
            self.report.bad.append(BadImage(repr(str(wish.record.path)), str(error)))
            return False
        return True

    def _require_few(self, total: int) -> None:
        check_share(self.report.bad, total, self.settings.max_bad_share, option="--max-bad-share")

    def _rows(self, batch: "EmbeddedBatch", wishes: Sequence[Wish]) -> list[_Row]:
        """What is to be written, in the order of the wishes; duplicates are noted."""
        rows = [
            _Row(wishes[file.index], file, vector)
            for file, vector in zip(batch.files, batch.vectors, strict=True)
        ]
        for file in batch.passed:
            wish = wishes[file.index]
            first = self._first[file.sha256, wish.box]
            if first != wish.id:
                self.report.duplicates.append(Duplicate(wish.id, first))
                if self.settings.duplicates == "skip":
                    self.report.skipped += 1
                    continue
            rows.append(_Row(wish, file, None, first))
        return sorted(rows, key=lambda row: row.file.index)

    def _commit(self, rows: Sequence[_Row]) -> None:
        """Write items and then notes on their files: a note without its item says nothing wrong."""
        started = time.perf_counter()
        items: list[NewItem] = []
        notes: dict[str, FileNote] = {}
        there = self.collection.find([row.wish.id for row in rows])
        for row, vector in zip(rows, self._vectors(rows), strict=True):
            image = self._bytes(row) if self.settings.store else None
            if vector is None or (self.settings.store and image is None):
                continue  # it is among the bad ones by now
            file = row.wish.record.path
            notes[relative_path(file, self.root)] = FileNote(
                row.file.size, row.file.mtime_ns, row.file.sha256
            )
            # Items that are replaced keep what their payload said, where the source says nothing.
            known = there[row.wish.id].payload if row.wish.id in there else {}
            item = NewItem(row.wish.id, vector, {**known, **row.wish.payload}, image=image)
            referred = replace(item, file=file, sha256=row.file.sha256)
            items.append(item if self.settings.store else referred)
        created = self.collection.add(items, fingerprint=self.encoder.fingerprint)
        self.report.added += sum(created)
        self.report.replaced += len(created) - sum(created)
        self.notes.save(self.root_name, notes)
        self.report.spent.write += time.perf_counter() - started

    def _vectors(self, rows: Sequence[_Row]) -> list[NDArray[np.float32] | None]:
        """A vector for every row; None for a picture that cannot be read any more."""
        beside = {(row.file.sha256, row.wish.box): row.vector for row in rows if row.vector is not None}
        elsewhere = [row.of for row in rows if (row.file.sha256, row.wish.box) not in beside]
        stored = {}
        for item in self.collection.get(list(self.collection.find(elsewhere)), with_vector=True):
            if item.picture is not None:
                stored[item.picture.sha256, box_of(item.payload)] = item.vector
        vectors = []
        for row in rows:
            key = (row.file.sha256, row.wish.box)
            vector = beside[key] if key in beside else stored.get(key)
            vectors.append(self._embedded(row) if vector is None else vector)
        return vectors

    def _embedded(self, row: _Row) -> NDArray[np.float32] | None:
        """The item with the same bytes has others by now, or none: embed these after all."""
        found = self.encoder.embed_files([row.wish.record], workers=1, max_pixels=self.settings.max_pixels)
        self.report.bad += found.bad
        return found.vectors[0] if len(found.vectors) else None

    def _bytes(self, row: _Row) -> bytes | None:
        """The bytes that were embedded; None, and a bad picture, when the file has changed since."""
        path = row.wish.record.path
        try:
            data = path.read_bytes()
        except OSError as error:  # it was readable a moment ago
            self.report.bad.append(BadImage(str(path), f"{path} cannot be read: {error.strerror or error}"))
            return None
        if hashlib.sha256(data).hexdigest() != row.file.sha256:
            self.report.bad.append(BadImage(str(path), f"{path} was changed while it was being embedded"))
            return None
        return data


def box_of(payload: Mapping[str, Any]) -> str | None:
    """The box of an item's payload, as the catalogue writes it."""
    box = payload.get("box")
    return json.dumps(box, separators=(",", ":")) if isinstance(box, list) else None
