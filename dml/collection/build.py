"""From a folder, a manifest or finished embeddings to a collection: embed, add, index, put into place."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dml.collection import create_collection, is_collection, open_collection
from dml.collection.base import NewItem
from dml.collection.derive import check_kind
from dml.collection.items import check_id
from dml.collection.local import LocalCollection
from dml.collection.lock import LOCK, WriterLock
from dml.collection.manifest import read_manifest
from dml.collection.place import building, clear, put_into_place, recover, turn
from dml.data.ids import absolute, common_root, item_ids, relative_path, table_root
from dml.data.reading import check_share
from dml.errors import (
    CollectionError,
    DataError,
    EncoderError,
    ImageNotKept,
    MissingExtra,
    ModelMismatch,
    UsageError,
)
from dml.imaging import IMAGE_SUFFIXES, BadImage
from dml.index import check_options
from dml.storage import flush_to_disk, storage_errors

if TYPE_CHECKING:
    from dml.data.table import ImageTable, Record
    from dml.encoder import Encoder
    from dml.encoder.embeddings import EmbeddedItem

log = logging.getLogger(__name__)

COMMIT_EVERY = 512  # items
MAIN_ROOT = "files"
"""Name of the folder that a collection was built from, among its roots."""

Progress = Callable[[int, int, int], None]
"""Told (done, all, bad) pictures after each batch."""


@dataclass
class Report:
    """What an import did."""

    path: Path
    added: int = 0
    replaced: int = 0
    bad: list[BadImage] = field(default_factory=list)
    without_picture: int = 0  # items that have a vector only, for their picture is not there any more
    seconds: float = 0.0
    index: Mapping[str, Any] = field(
        default_factory=dict
    )  # what `build_index` says; {} when it was not asked for
    source: str = ""  # what was recognised, for people

    @property
    def images_per_second(self) -> float:
        return (self.added + self.replaced) / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Settings:
    """How pictures become items."""

    store: bool = False
    """Keep the bytes of the pictures in the collection; else they are referred to where they lie."""
    batch_size: int = 64
    workers: int = 2
    """Threads that decode pictures."""
    max_bad_share: float = 0.05
    """More unreadable pictures than this share of all make the import fail."""


def build_collection(
    source: str | Path,
    out: str | Path,
    *,
    encoder: "Encoder | None" = None,
    name: str | None = None,
    kind: str = "auto",
    options: Mapping[str, Any] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    measure: bool = True,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Make a collection of a folder, a manifest, or a folder of embeddings made by `dml embed`.

    A new collection is made beside `out` and renamed when it is complete: until then, and after any failure
    or Ctrl-C, `out` is as it was. If `out` already is a collection of the same encoder, the items are added
    to it (each batch is durable by itself) and its index is built anew.

    Args:
        encoder: for pictures; embeddings need none, but take along the one that is given.
        name: of a new collection; defaults to the name of `out`.
        kind, options, device: of the index, see `dml.index.make_index`; "auto" chooses by the count.
        overwrite: replace the collection that is there.
        measure: measure the recall of the index, see `LocalCollection.build_index`.

    Raises:
        DataError: nothing to import. TooManyBadImages: more than `settings.max_bad_share`.
        CollectionError: `out` holds something else, or another collection and `overwrite` is not set.
        ModelMismatch: the embeddings were made by another encoder.
        StorageError: the disk is full or refuses.
    """
    source, out, settings = Path(source), Path(out).absolute(), settings or Settings()
    check_kind(kind)
    check_options(kind, options or {})
    recover(out)
    started = time.monotonic()
    supply = open_supply(source, encoder, settings)
    if goes_into(out, supply.fingerprint, overwrite=overwrite):
        with open_collection(
            out, fingerprint=supply.fingerprint, device=device, merge="manual"
        ) as collection:
            report = supply.pour(collection, progress)
            report.index = collection.build_index(
                None if kind == "auto" else kind, options=options, measure=measure
            )
    else:
        report = build_aside(
            supply,
            out,
            create={"name": name or out.name, "index": kind, "options": options, "device": device},
            overwrite=overwrite,
            measure=measure,
            progress=progress,
        )
    report.path, report.seconds = out, time.monotonic() - started
    return report


def add_to_collection(
    collection: LocalCollection,
    source: str | Path,
    *,
    encoder: "Encoder | None" = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """Add a folder, a manifest, one picture or embeddings to a collection. Raises as `build_collection`."""
    started = time.monotonic()
    supply = open_supply(Path(source), encoder, settings or Settings())
    report = supply.pour(collection, progress)
    report.path, report.seconds = collection.path, time.monotonic() - started
    return report


def goes_into(out: Path, fingerprint: str, *, overwrite: bool) -> bool:
    """True: add to the collection at `out`. False: make a new one. Raises CollectionError for neither."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not is_collection(out):
        raise CollectionError(
            f"{out} exists and is not a collection; give another --out. Nothing was changed."
        )
    if overwrite:
        return False
    there = read_manifest(out).fingerprint
    if there == fingerprint:
        return True
    raise CollectionError(
        f"{out} holds a collection of another encoder ({there[:12]}, not {fingerprint[:12]}). "
        f"Give another --out, or --overwrite to replace it."
    )


def build_aside(
    supply: "Supply",
    out: Path,
    *,
    create: Mapping[str, Any],
    overwrite: bool,
    measure: bool,
    progress: Progress | None,
) -> Report:
    """Make a collection beside `out` and rename it when it is complete.

    Raises:
        CollectionLocked: another build into `out` runs, or somebody writes to what is to be replaced.
    """
    with storage_errors(out):
        collection = begin(supply, out, create=create)
        finished = False
        try:
            if supply.encoder_folder is not None:
                copy_folder(supply.encoder_folder, collection.path / "encoder")
            report = supply.pour(collection, progress)
            report.index = collection.build_index(measure=measure)
            finished = True
        finally:
            # Its lock is let go of in our turn only: nobody takes the folder for a leftover before it has its
            # name, and what is cleared here is ours.
            with turn(out.parent):
                collection.close()
                try:
                    if finished:
                        put_into_place(out, overwrite=overwrite)
                finally:
                    with suppress(OSError):
                        clear(out)
    return report


def begin(supply: "Supply", out: Path, *, create: Mapping[str, Any]) -> LocalCollection:
    """An empty collection beside `out`, after clearing what a killed build left there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with turn(out.parent):
        clear(out)
        if (out / LOCK).exists():
            WriterLock(out / LOCK).release()  # rather now than after everything has been embedded
        return create_collection(
            building(out),
            dim=supply.dim,
            fingerprint=supply.fingerprint,
            roots={MAIN_ROOT: supply.root} if supply.root is not None else {},
            encoder_info=supply.encoder_info,
            merge="manual",
            **create,
        )


def copy_folder(source: Path, target: Path) -> None:
    """Copy an encoder's files and flush them."""
    shutil.copytree(source, target)
    for path in [*target.rglob("*"), target]:
        flush_to_disk(path)


# Where items come from


class Supply:
    """Items to import, with what is known about them as a whole."""

    dim: int
    fingerprint: str
    root: Path | None = None
    encoder_folder: Path | None = None
    encoder_info: Mapping[str, Any] = {}

    def pour(self, collection: LocalCollection, progress: Progress | None) -> Report:
        """Add everything, a durable batch at a time."""
        raise NotImplementedError


def open_supply(source: Path, encoder: "Encoder | None", settings: Settings) -> Supply:
    """Embeddings where the folder holds some, else pictures. Raises DataError, ModelMismatch."""
    from dml.encoder.embeddings import is_embeddings

    if is_embeddings(source):
        return EmbeddingsSupply(source, encoder, settings)
    if encoder is None:
        raise DataError(f"{source} holds no embeddings, so an encoder is needed: give --encoder RUN.")
    return PictureSupply(source, encoder, settings)


def describe_encoder(encoder: "Encoder") -> dict[str, Any]:
    """What the collection's manifest says about its encoder."""
    wanted = ("model", "image_size", "decoder", "created", "provenance", "agreement")
    known = {key: encoder.manifest[key] for key in wanted if key in encoder.manifest}
    return {"path": str(encoder.path), "runtime": encoder.runtime, "device": encoder.device, **known}


class PictureSupply(Supply):
    """Pictures of a folder or manifest, embedded on the way."""

    def __init__(self, source: Path, encoder: "Encoder", settings: Settings) -> None:
        self.encoder, self.settings = encoder, settings
        self.table = open_pictures(source)
        self.records = list(self.table.records)
        self.root = table_root(self.table)
        self.dim, self.fingerprint = encoder.dim, encoder.fingerprint
        self.encoder_folder, self.encoder_info = encoder.path, describe_encoder(encoder)

    def pour(self, collection: LocalCollection, progress: Progress | None) -> Report:
        report = Report(collection.path, source=self.table.describe())
        assert self.root is not None
        prefix = settle_root(collection, self.root, store=self.settings.store)
        ids = item_ids(self.records, self.root)
        total = len(self.records)

        def items() -> Iterator[NewItem]:
            stream = self.encoder.embed_stream(
                self.records,
                batch_size=self.settings.batch_size,
                workers=self.settings.workers,
                bad=report.bad,
            )
            for batch in stream:
                for position, vector in zip(batch.indices.tolist(), batch.vectors, strict=True):
                    record = self.records[position]
                    try:
                        check_id(prefix + ids[position])
                        image = record.path.read_bytes() if self.settings.store else None
                    except OSError as error:  # it was readable a moment ago
                        report.bad.append(BadImage(str(record.path), str(error.strerror or error)))
                        continue
                    except UsageError as error:
                        report.bad.append(BadImage(repr(str(record.path)), str(error)))
                        continue
                    yield NewItem(
                        prefix + ids[position],
                        vector,
                        payload_of(record),
                        image=image,
                        file=None if self.settings.store else record.path,
                    )
                self._require_few(report.bad)
                if progress is not None and len(batch.indices):
                    progress(int(batch.indices[-1]) + 1, total, len(report.bad))

        add_in_batches(collection, items(), report, self.fingerprint)
        self._require_few(report.bad)
        if not report.added + report.replaced:
            raise DataError(f"None of the {total} pictures of {self.table.name} can be read.")
        return report

    def _require_few(self, bad: Sequence[BadImage]) -> None:
        check_share(bad, len(self.records), self.settings.max_bad_share, option="--max-bad-share")


class EmbeddingsSupply(Supply):
    """Vectors and ids that `dml embed` wrote."""

    def __init__(self, source: Path, encoder: "Encoder | None", settings: Settings) -> None:
        from dml.encoder.embeddings import open_embeddings

        self.embeddings, self.settings = open_embeddings(source), settings
        self.dim, self.fingerprint = self.embeddings.vectors.shape[1], self.embeddings.fingerprint
        if encoder is None:
            encoder = encoder_at(Path(self.embeddings.manifest["encoder"]), self.fingerprint)
        if encoder is None:
            log.warning(
                "the encoder of %s is not there, so pictures cannot be searched; give --encoder", source
            )
        elif encoder.fingerprint != self.fingerprint:
            raise ModelMismatch(
                f"The embeddings in {source} were made by the encoder {self.fingerprint[:12]}, not by "
                f"{encoder.fingerprint[:12]}. Embed again, or give the encoder that made them."
            )
        else:
            self.encoder_folder, self.encoder_info = encoder.path, describe_encoder(encoder)
        self.files = [absolute(self.embeddings.root / item.path) for item in self.embeddings.items]
        self.above = common_root(self.embeddings.root, self.files)
        self.root = self.above if self.above.is_dir() else None

    def pour(self, collection: LocalCollection, progress: Progress | None) -> Report:
        total = len(self.embeddings)
        report = Report(collection.path, source=f"{total:,} embeddings of {self.dim} numbers")
        if not total:
            raise DataError("There are no embeddings to import.")
        prefix = "" if self.root is None else settle_root(collection, self.root, store=self.settings.store)

        def items() -> Iterator[NewItem]:
            for done, (item, file, vector) in enumerate(
                zip(self.embeddings.items, self.files, self.embeddings.vectors, strict=True), start=1
            ):
                picture = self._picture(file)
                report.without_picture += not picture
                yield NewItem(prefix + self._id(item), vector, item.payload, **picture)
                if progress is not None and (done % COMMIT_EVERY == 0 or done == total):
                    progress(done, total, 0)

        add_in_batches(collection, items(), report, self.fingerprint)
        if report.without_picture:
            log.warning(
                "%d of %d items have a vector only: their pictures are not below %s any more",
                report.without_picture,
                total,
                self.embeddings.root,
            )
        return report

    def _id(self, item: "EmbeddedItem") -> str:
        """As the embeddings say; absolute paths, which `dml embed` wrote once, become relative."""
        path = Path(item.id)
        return relative_path(path, self.above) if path.is_relative_to(self.above) else item.id

    def _picture(self, file: Path) -> dict[str, Any]:
        """The picture of an item, where it still lies below the root; else the item has a vector only."""
        if self.root is None or not file.is_file():
            return {}
        return {"image": file.read_bytes()} if self.settings.store else {"file": file}


def encoder_at(path: Path, fingerprint: str) -> "Encoder | None":
    """The encoder in a folder, if it is there, sound, and the one of this fingerprint."""
    from dml.encoder import Encoder

    try:
        encoder = Encoder.load(path)
    except (EncoderError, MissingExtra):
        return None
    return encoder if encoder.fingerprint == fingerprint else None


def open_pictures(source: Path) -> "ImageTable":
    """A folder, a manifest, or one picture as a table."""
    from dml.data.table import ImageTable, Record, open_table

    if source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES:
        return ImageTable(source.name, source.parent, "one picture", (Record(source, None),), ())
    return open_table(source)


def settle_root(collection: LocalCollection, root: Path, *, store: bool) -> str:
    """Make sure that pictures below `root` can be referred to; what their ids start with.

    Below a root that the collection knows, ids go on being relative to that root, so that the same file has
    the same id however it is named. A folder elsewhere gets its own name as a prefix.
    """
    known = {name: Path(path) for name, path in collection.manifest.roots.items()}
    for path in known.values():
        if root == path:
            return ""
        if root.is_relative_to(path):
            return root.relative_to(path).as_posix() + "/"
    if not known and (store or not len(collection)):
        collection.set_root(MAIN_ROOT, root)
        return ""
    name, number = root.name or "root", 2
    while name in known:
        name, number = f"{root.name}-{number}", number + 1
    collection.set_root(name, root)
    return f"{name}/"


def payload_of(record: "Record") -> dict[str, Any]:
    """What is known about a picture: its manifest's columns, label, split, role and box."""
    known = {"label": record.label, "split": record.split, "role": record.role}
    box = {} if record.box is None else {"box": list(record.box)}
    columns = {key: plain(value) for key, value in record.payload.items()}
    return {k: v for k, v in {**columns, **known, **box}.items() if v is not None}


def plain(value: Any) -> Any:
    """A cell of a manifest as JSON can hold it: no NaN or infinity (None), and dates and the like as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value)


def keep_what_is_known(collection: LocalCollection, batch: list[NewItem]) -> None:
    """Items that are replaced keep what their payload said, where the source says nothing (a label)."""
    there = collection.find([item.id for item in batch])
    for position, item in enumerate(batch):
        if item.id in there:
            batch[position] = replace(item, payload={**there[item.id].payload, **item.payload})


def add_in_batches(
    collection: LocalCollection, items: Iterable[NewItem], report: Report, fingerprint: str
) -> None:
    """Add items, `COMMIT_EVERY` at a time, counting into the report."""
    batch: list[NewItem] = []

    def count(created: list[bool]) -> None:
        report.added += sum(created)
        report.replaced += len(created) - sum(created)

    def commit() -> None:
        keep_what_is_known(collection, batch)
        try:
            count(collection.add(batch, fingerprint=fingerprint))
        except ImageNotKept:  # a file went away between embedding and adding: find out which
            for item in batch:
                try:
                    count(collection.add([item], fingerprint=fingerprint))
                except ImageNotKept as error:
                    report.bad.append(BadImage(str(item.file), str(error)))
        batch.clear()

    for item in items:
        batch.append(item)
        if len(batch) >= COMMIT_EVERY:
            commit()
    if batch:
        commit()
