"""Where items come from: pictures of a folder or manifest, or embeddings that are finished."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dml.collection.base import Item, NewItem
from dml.collection.encoding import admit, describe_encoder
from dml.collection.importing import COMMIT_EVERY, Importer, Progress, Report, Settings, Wish
from dml.collection.local import LocalCollection
from dml.collection.notes import FileNote, FileNotes
from dml.data.ids import absolute, common_root, item_ids, relative_path, table_root
from dml.errors import DataError, EncoderError, ImageNotKept, MissingExtra, ModelMismatch
from dml.imaging import IMAGE_SUFFIXES, BadImage

if TYPE_CHECKING:
    from dml.data.table import ImageTable, Record
    from dml.encoder import Encoder
    from dml.encoder.embeddings import EmbeddedItem

log = logging.getLogger(__name__)

MAIN_ROOT = "files"
"""Name of the folder that a collection was built from, among its roots."""


class Supply:
    """Items to import, with what is known about them as a whole."""

    dim: int
    fingerprint: str
    root: Path | None = None
    encoder_folder: Path | None = None
    encoder_info: Mapping[str, Any] = {}
    task: Mapping[str, Any] | None = None
    """What must be the same for an interrupted build to go on; None: it is quicker to begin anew."""

    def pour(self, collection: LocalCollection, progress: Progress | None, *, resume: bool = False) -> Report:
        """Add everything, a durable batch at a time.

        Args:
            resume: the collection was begun with the same supply: keep what is there and still right.
        """
        raise NotImplementedError


def open_supply(source: Path, encoder: "Encoder | None", settings: Settings) -> Supply:
    """Embeddings where the folder holds some, else pictures. Raises DataError, ModelMismatch."""
    from dml.encoder.embeddings import is_embeddings

    if is_embeddings(source):
        return EmbeddingsSupply(source, encoder, settings)
    if encoder is None:
        raise DataError(
            f"{source} holds no embeddings, so an encoder is needed: give --encoder RUN "
            f"(`dml encoder create` makes one without training)."
        )
    return PictureSupply(source, encoder, settings)


class PictureSupply(Supply):
    """Pictures of a folder or manifest, embedded on the way."""

    def __init__(self, source: Path, encoder: "Encoder", settings: Settings) -> None:
        self.encoder, self.settings = encoder, settings
        self.table = open_pictures(source)
        self.root = table_root(self.table)
        self.dim, self.fingerprint = encoder.dim, encoder.fingerprint
        self.encoder_folder, self.encoder_info = encoder.path, describe_encoder(encoder)
        self.task = {
            "source": str(absolute(source)),
            "fingerprint": encoder.fingerprint,
            "profile": str(encoder.profile),
            "store": settings.store,
            "duplicates": settings.duplicates,
        }

    def pour(self, collection: LocalCollection, progress: Progress | None, *, resume: bool = False) -> Report:
        assert self.root is not None
        report = Report(collection.path, source=self.table.describe())
        admit(collection, self.encoder)
        place = settle_root(collection, self.root, store=self.settings.store)
        wishes = wishes_of(self.table, place)
        total = len(wishes)
        if resume:
            wishes = without_finished(collection, wishes, place)
            report.resumed = len(collection)
        importer = Importer(
            collection,
            self.encoder,
            self.settings,
            report,
            root=(place.name, place.folder),
            progress=progress,
            done=total - len(wishes),
        )
        importer.run(wishes)
        if not report.added + report.replaced + report.resumed + report.skipped:
            raise DataError(f"None of the {total} pictures of {self.table.name} can be read.")
        return report


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
            made_with = self.embeddings.manifest.get("profile")
            self.encoder_folder = encoder.path
            self.encoder_info = {
                **describe_encoder(encoder),
                "profiles": [] if made_with is None else [made_with],
            }
        self.files = [absolute(self.embeddings.root / item.path) for item in self.embeddings.items]
        self.above = common_root(self.embeddings.root, self.files)
        self.root = self.above if self.above.is_dir() else None

    def pour(self, collection: LocalCollection, progress: Progress | None, *, resume: bool = False) -> Report:
        total = len(self.embeddings)
        report = Report(collection.path, source=f"{total:,} embeddings of {self.dim} numbers")
        if not total:
            raise DataError("There are no embeddings to import.")
        place = None
        if self.root is not None:
            place = settle_root(collection, self.root, store=self.settings.store)
        prefix = "" if place is None else place.prefix

        def items() -> Iterator[NewItem]:
            for done, (item, file, vector) in enumerate(
                zip(self.embeddings.items, self.files, self.embeddings.vectors, strict=True), start=1
            ):
                picture = self._picture(file, place)
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

    def _picture(self, file: Path, place: "Place | None") -> dict[str, Any]:
        """The picture of an item, where it still lies below the root; else the item has a vector only."""
        if self.root is None or place is None or not file.is_file():
            return {}
        if self.settings.store:
            return {"image": file.read_bytes()}
        return {"file": place.source / file.relative_to(self.root)}


def encoder_at(path: Path, fingerprint: str) -> "Encoder | None":
    """The encoder in a folder, if it is there, sound, and the one of this fingerprint."""
    from dml.encoder import Encoder

    try:
        encoder = Encoder.load(path)
    except (EncoderError, MissingExtra):
        return None
    return encoder if encoder.fingerprint == fingerprint else None


# Which picture becomes which item


class Place(NamedTuple):
    """Where pictures lie, as a collection sees it."""

    name: str  # of the root
    folder: Path  # of the root, absolute
    prefix: str  # what ids below the source start with
    source: Path  # the folder that the pictures were found in, absolute: the root, or one below it
    roots: Mapping[str, str] = {}  # all of them: one may lie below another


def open_pictures(source: Path) -> "ImageTable":
    """A folder, a manifest, or one picture as a table."""
    from dml.data.table import ImageTable, Record, open_table

    if source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES:
        return ImageTable(source.name, source.parent, "one picture", (Record(source, None),), ())
    return open_table(source)


def known_place(collection: LocalCollection, source: Path) -> Place | None:
    """Where a folder lies below the deepest root that holds it; None for a folder elsewhere.

    Ids below the root that a collection was built from are paths; below a later one they begin with its name.
    Links are followed where no root holds the folder as it is written: it has one id by whatever way.
    """
    roots = [(name, Path(folder)) for name, folder in collection.manifest.roots.items()]
    inside = [(source, name, folder) for name, folder in roots if source.is_relative_to(folder)]
    if not inside:
        found = source.resolve()
        real = [(name, folder, folder.resolve()) for name, folder in roots]
        inside = [
            (folder / found.relative_to(at), name, folder)
            for name, folder, at in real
            if found.is_relative_to(at)
        ]
    if not inside:
        return None
    source, name, folder = max(inside, key=lambda entry: len(entry[2].parts))
    below = source.relative_to(folder).as_posix()
    prefix = ("" if name == MAIN_ROOT else f"{name}/") + ("" if below == "." else f"{below}/")
    return Place(name, folder, prefix, source, collection.manifest.roots)


def settle_root(collection: LocalCollection, root: Path, *, store: bool) -> Place:
    """Make sure that pictures below `root` can be referred to.

    Below a root that the collection knows, ids go on being relative to that root, so that the same file has
    the same id however it is named. A folder elsewhere gets its own name as a prefix, or one with a number
    where items begin with that already.
    """
    place = known_place(collection, root)
    if place is not None:
        return place
    known = collection.manifest.roots
    if not known and (store or not len(collection)):
        collection.set_root(MAIN_ROOT, root)
        return Place(MAIN_ROOT, root, "", root, collection.manifest.roots)
    plain = name = root.name or "root"
    number = 2
    while name in known or is_begun(collection, name):
        name, number = f"{plain}-{number}", number + 1
    collection.set_root(name, root)
    return Place(name, root, f"{name}/", root, collection.manifest.roots)


def is_begun(collection: LocalCollection, name: str) -> bool:
    """Whether ids of other pictures begin with NAME/, or will when the folder there is read."""
    main = collection.manifest.roots.get(MAIN_ROOT)
    if main is not None and (Path(main) / name).exists():
        return True
    items, _ = collection.scroll(after=f"{name}/", limit=1)
    return bool(items) and items[0].id.startswith(f"{name}/")


def wishes_of(table: "ImageTable", place: Place) -> list[Wish]:
    """What the pictures of a table are to be called in a collection, and what is known about them."""
    table = rebased(table, place.source)
    if place.source != place.folder:
        table = labelled_by_root(table, place.folder)
    ids = item_ids(table.records, place.source)
    return [
        Wish(place.prefix + id, record, payload_of(record))
        for id, record in zip(ids, table.records, strict=True)
    ]


def rebased(table: "ImageTable", root: Path) -> "ImageTable":
    """The same pictures by the way to them that leads over `root`."""
    given = table_root(table)
    if given == root:
        return table

    def moved(record: "Record") -> "Record":
        return replace(record, path=root / absolute(record.path).relative_to(given))

    return replace(table, root=root, records=tuple(map(moved, table.records)))


def labelled_by_root(table: "ImageTable", root: Path) -> "ImageTable":
    """Pictures of a folder below a root, labelled as the layout of the root says: CLASS/… begins there.

    A manifest says itself what its pictures are.
    """
    from dml.data.table import Record, open_table

    if any(record.payload or record.box for record in table.records) or table.layout.endswith("manifest"):
        return table
    try:
        whole = open_table(root)
    except DataError as error:
        log.warning("the layout of %s cannot be read, so labels are those of %s: %s", root, table.root, error)
        return table
    by_path = {absolute(record.path): record for record in whole.records}

    def as_there(record: Record) -> Record:
        found = by_path.get(absolute(record.path))
        return record if found is None else replace(found, path=record.path)

    return replace(table, records=tuple(map(as_there, table.records)))


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


def file_of(wish: Wish, place: Place) -> str:
    """Its path below the root, as notes and the catalogue write it."""
    return relative_path(wish.record.path, place.folder)


def is_finished(item: Item, path: Path, note: FileNote | None) -> bool:
    """Whether the picture of an item is still what lies at `path`, by size and time of the file alone."""
    if note is None or not note.mtime_ns or item.picture is None or item.picture.sha256 != note.sha256:
        return False
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_size, found.st_mtime_ns) == (note.size, note.mtime_ns)


def all_items(collection: LocalCollection, *, page: int = 10_000) -> Iterator[Item]:
    """Every item, in the order of ids."""
    after: str | None = None
    while True:
        items, after = collection.scroll(after=after, limit=page)
        yield from items
        if after is None:
            return


def without_finished(collection: LocalCollection, wishes: list[Wish], place: Place) -> list[Wish]:
    """What an interrupted import has still to do; items that are not wished for any more are deleted.

    Files that have not been touched since they were read are not read again.
    """
    there = {item.id: item for item in all_items(collection)}
    gone = there.keys() - {wish.id for wish in wishes}
    collection.delete(sorted(gone))
    notes = FileNotes(collection.path).load(place.name)
    left = []
    for wish in wishes:
        item = there.get(wish.id)
        if item is None or not is_finished(item, wish.record.path, notes.get(file_of(wish, place))):
            left.append(wish)
    return left


# Embeddings


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
