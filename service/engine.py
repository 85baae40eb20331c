"""The search engine behind the service. It has never heard of HTTP, and works in a notebook just as well.

>>> engine = Engine.open([Path("shoes.collection")])                                          # doctest: +SKIP
>>> answer = engine.search("shoes", Search(Query(image=Path("mine.jpg").read_bytes())))       # doctest: +SKIP
>>> [(hit.id, hit.score) for hit in answer.hits]                                              # doctest: +SKIP
"""

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from dml.collection.base import (
    Collection,
    CollectionInfo,
    FilterLike,
    Hit,
    Item,
    NewItem,
    Payload,
    SearchResult,
)
from dml.collection.encoding import admit
from dml.collection.examples import query_vector, unit
from dml.collection.local import LocalCollection
from dml.encoder import Encoder
from dml.errors import (
    DmlError,
    ImageNotKept,
    InvalidImage,
    NotAvailable,
    ReadOnly,
    UnknownCollection,
    UnknownItem,
    UnsupportedImage,
    UsageError,
    VectorError,
)
from dml.imaging import probe
from dml.stages import stage
from service.batching import Batcher, Budget, check_time
from service.folders import Folder
from service.memory import ConditionFailed, Conflict
from service.pictures import media_type
from service.settings import Settings
from service.sharing import PlainSearch, SharedSearches, encoder_batcher

Vector = NDArray[np.float32]
BATCH = 64
"""Items of a batch that are embedded and written together."""
SIZES_KEPT = 100_000
"""Pictures whose size is remembered, so that a cached thumbnail costs no second reading."""


class ImageEncoder(Protocol):
    """What the engine asks of an encoder; `dml.encoder.artifact.Encoder` is one."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def manifest(self) -> Mapping[str, Any]: ...

    def decode(self, source: bytes, *, max_pixels: int) -> Image:
        """The upright RGB picture that `preprocess` is given. Raises InvalidImage."""
        ...

    @property
    def preprocess(self) -> Callable[[Image], Vector]:
        """An upright RGB picture -> (3, S, S) float32."""
        ...

    def embed_arrays(self, arrays: Vector) -> Vector:
        """(N, 3, S, S) -> (N, D) of unit length."""
        ...


@dataclass(frozen=True)
class Query:
    """What is looked for: a picture, an item or a vector, examples of it, or both.

    With b the vector of `image`, `id` or `vector`, P = {b} ∪ vectors of `positive`, N those of `negative`::

        q = mean(P)                     without negatives
        q = 2 · mean(P) - mean(N)       with negatives

    scaled to length 1: a step from the negatives through the positives, as far again.
    """

    image: bytes | None = None
    id: str | None = None
    vector: Sequence[float] | Vector | None = None
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class Search:
    """One search: the query and how to answer it."""

    query: Query
    limit: int = 10
    offset: int = 0
    score_threshold: float | None = None
    """Leave out hits below this cosine similarity."""
    exact: bool = False
    effort: int | None = None
    with_vector: bool = False
    filter: FilterLike | None = None
    group_by: str | None = None
    """A path in the payload; `limit` and `offset` count groups then."""
    group_size: int = 1
    cursor: str | None = None
    """"*" starts a walk through all hits, `next_cursor` of an answer goes on with it."""


@dataclass(frozen=True)
class Answer:
    """What a search found."""

    query_id: str
    collection: str
    generation: int
    model: str
    """Fingerprint of the encoder whose vectors were compared."""
    hits: list[Hit]
    total: int
    """Items (or groups) that qualify, on this page or not; a lower bound unless `total_is_exact`."""
    total_is_exact: bool
    next_cursor: str | None
    approximate: bool
    embed_ms: float
    search_ms: float
    took_ms: float


@dataclass(frozen=True)
class Written:
    """An acknowledged write: it survives a crash from here on."""

    id: str
    created: bool
    generation: int


@dataclass(frozen=True)
class Condition:
    """What an item has to be for a write to be done (If-Match, If-None-Match)."""

    sequences: tuple[int, ...] = ()
    """It was last written by one of these changes."""
    there: bool | None = None
    """It is there, or is not; None: either."""

    def check(self, id: str, item: Item | None) -> None:
        """Raises ConditionFailed."""
        if self.there is False and item is not None:
            raise ConditionFailed(
                f'The item "{id}" is there already, written by change {item.sequence}; it was left as it is.'
            )
        if item is None and (self.there or self.sequences):
            raise ConditionFailed(f'The item "{id}" is not there (any more), so nothing was changed.')
        if item is not None and self.sequences and item.sequence not in self.sequences:
            raise ConditionFailed(
                f'The item "{id}" was changed meanwhile, by change {item.sequence}, so this change was not '
                f"made. Read the item again, then decide."
            )


@dataclass(frozen=True)
class Upsert:
    """One item of a batch: a picture or a vector, and what is known about it."""

    id: str
    image: bytes | None = None
    vector: Sequence[float] | Vector | None = None
    payload: Payload = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """An encoder that answers here."""

    fingerprint: str
    dim: int
    input_size: int | None
    manifest: Mapping[str, Any]
    collections: tuple[str, ...]


@dataclass
class Observers:
    """Whom the engine tells about its work; the service puts its metrics here."""

    batch: Callable[[int], None] = field(default=lambda size: None)


class Engine:
    """Collections by name, and the encoders that fit them by fingerprint. Safe to use from several threads.

    Args:
        collections: name -> collection.
        encoders: the encoders for pictures; a collection whose encoder is not among them answers searches by
            id and by vector only.
        settings: limits.
        folder: where collections may be made and deleted; None: nowhere.
    """

    def __init__(
        self,
        collections: Mapping[str, Collection],
        encoders: Iterable[ImageEncoder] = (),
        *,
        settings: Settings | None = None,
        folder: Folder | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.observers = Observers()
        self.decoding = Budget(self.settings.max_pixels_in_flight)
        self.folder = folder
        self.alias_of: Callable[[], Mapping[str, str]] = dict
        """alias -> collection; whoever keeps aliases puts its own here."""
        self._collections = dict(collections)  # never changed, but replaced: readers need no lock
        self._changing = threading.Lock()
        self._idle = threading.Condition()
        self._users: Counter[str] = Counter()
        self._turns: dict[str, threading.RLock] = {}
        self._sizes: dict[str, int] = {}
        self._admitted: WeakSet[Collection] = WeakSet()
        self._shared: dict[Collection, SharedSearches] = {}
        self._encoders = {encoder.fingerprint: encoder for encoder in encoders}
        self._batchers = {f: self._batcher(encoder) for f, encoder in self._encoders.items()}

    def _batcher(self, encoder: ImageEncoder) -> Batcher[Vector, Vector]:
        return encoder_batcher(encoder, self.settings, lambda size: self.observers.batch(size))

    @classmethod
    def open(
        cls,
        paths: Sequence[Path],
        *,
        runtime: str = "auto",
        settings: Settings | None = None,
        data: Path | None = None,
        encoders: Sequence[Path] = (),
    ) -> "Engine":
        """Open collection folders, each with the encoder that it carries, and embed once to warm up.

        Args:
            data: a folder: the collections in it are opened too, and others can be made there.
            encoders: encoder folders for collections that are to be made, besides those of collections.

        Raises:
            CollectionError, EncoderError: a folder that is not a collection, or does not fit its encoder.
            UsageError: two collections of one name.
        """
        from service.folders import open_all

        settings = settings or Settings()
        folder = None if data is None else Folder(data, runtime=runtime)
        found = [] if folder is None else folder.collections(tidy=not settings.read_only)
        named = {path.resolve() for path in paths}
        found = [path for path in found if path.resolve() not in named]
        collections, known = open_all([*paths, *found], encoders, runtime=runtime, settings=settings)
        engine = cls(collections, known.values(), settings=settings, folder=folder)
        try:
            engine.warm_up()
        except BaseException:
            engine.close()
            raise
        return engine

    def warm_up(self) -> None:
        """Run every encoder and every index once, so that the first request is as quick as the next."""
        for fingerprint, encoder in self._encoders.items():
            _embed_once(encoder, self._batchers[fingerprint])
        for collection in self._collections.values():
            collection.search(np.eye(1, collection.dim, dtype=np.float32), limit=1)

    def close(self) -> None:
        """Finish embedding what waits, and close every collection."""
        for batcher in self._batchers.values():
            batcher.close()
        for collection in self._collections.values():
            collection.close()

    # What there is

    def names(self) -> list[str]:
        """The collections, sorted."""
        return sorted(self._collections)

    def first(self) -> str | None:
        """The collection that is meant when nobody says which: the first that was named at the start."""
        return next(iter(self._collections), None)

    def resolve(self, name: str) -> str:
        """The collection that a name or alias stands for. Raises UnknownCollection, naming what there is."""
        if name in self._collections:
            return name
        meant = self.alias_of().get(name)
        if meant is not None and meant in self._collections:
            return meant
        raise UnknownCollection(
            f'There is no collection "{name}" here. There is: {", ".join(self.names()) or "none"}.'
        )

    def collection(self, name: str) -> Collection:
        """The collection of this name or alias. Raises UnknownCollection, naming those there are.

        It may be deleted and closed at any moment; `using` keeps it open.
        """
        return self._collections[self.resolve(name)]

    @contextmanager
    def using(self, name: str) -> Iterator[Collection]:
        """The collection, which nobody closes while the block lasts. Raises UnknownCollection."""
        with self._idle:
            name = self.resolve(name)
            collection = self._collections[name]
            self._users[name] += 1
        try:
            yield collection
        finally:
            with self._idle:
                self._users[name] -= 1
                self._idle.notify_all()

    def places(self) -> dict[str, str]:
        """folder -> name, of all collections; what is remembered of a collection is kept under its folder."""
        return {place_of(collection, name): name for name, collection in self._collections.items()}

    def place(self, name: str) -> str:
        """The folder of a collection. Raises UnknownCollection."""
        name = self.resolve(name)
        return place_of(self._collections[name], name)

    def info(self, name: str) -> CollectionInfo:
        with self.using(name) as collection:
            return collection.info()

    def count(self, name: str, filter: FilterLike | None = None) -> int:
        """How many items pass a filter. Raises UnknownCollection, FilterInvalid."""
        with self.using(name) as collection:
            return collection.count(filter)

    def models(self) -> list[Model]:
        """The encoders that answer here, with the collections that they serve."""
        return [
            Model(
                fingerprint=fingerprint,
                dim=encoder.dim,
                input_size=getattr(encoder.preprocess, "size", None),
                manifest=encoder.manifest,
                collections=tuple(n for n in self.names() if self._collections[n].fingerprint == fingerprint),
            )
            for fingerprint, encoder in sorted(self._encoders.items())
        ]

    def encoders(self) -> list[ImageEncoder]:
        """Those that answer here, by fingerprint."""
        return [encoder for _, encoder in sorted(self._encoders.items())]

    # Pictures to vectors

    def embed(self, images: Sequence[bytes], *, model: str | None = None) -> tuple[str, Vector]:
        """Vectors (N, D) of pictures, and the fingerprint of the encoder that made them.

        Args:
            images: the bytes of picture files.
            model: a fingerprint, or the beginning of one; may be left out where there is one encoder only.

        Raises:
            InvalidImage (and its kinds): naming the position of the picture.
            NotAvailable: no such encoder here, or several and none named.
        """
        fingerprint = self._choose(model)
        arrays = []
        for position, image in enumerate(images):
            try:
                arrays.append(self._prepare(fingerprint, image))
            except InvalidImage as error:
                if len(images) > 1:
                    error.args = (f"image {position}: {error}",)
                raise
        return fingerprint, np.stack(self._batchers[fingerprint](arrays))

    def _choose(self, model: str | None) -> str:
        fits = [f for f in self._encoders if model is None or (model and f.startswith(model))]
        if len(fits) == 1:
            return fits[0]
        known = ", ".join(f[:12] for f in sorted(self._encoders)) or "none"
        if model is None and fits:
            raise NotAvailable(f"There are several models here, name one of them: {known}.")
        raise NotAvailable(f'There is no single model "{model or ""}" here. There is: {known}.')

    def _prepare(self, fingerprint: str, image: bytes) -> Vector:
        if not image:
            raise InvalidImage("The picture is empty: 0 bytes. Send the bytes of a picture file.")
        most = self.settings.max_pixels
        try:
            with stage("decode"):
                width, height = probe(image, max_pixels=most)
            check_time()
            coming = self._batchers[fingerprint].coming()
            with stage("decode"), coming, self.decoding.take(width * height):
                encoder = self._encoders[fingerprint]
                return encoder.preprocess(encoder.decode(image, max_pixels=most))
        except InvalidImage as error:
            if type(error) is InvalidImage and media_type(image) is None:
                raise UnsupportedImage(
                    f"The {len(image)} bytes sent are not a picture of a known format. "
                    f"Send a JPEG, PNG, WebP, GIF, BMP or TIFF file."
                ) from error
            raise

    def _embed_for(self, collection: Collection, image: bytes) -> Vector:
        self._check_encoder(collection)
        return self.embed([image], model=collection.fingerprint)[1][0]

    def _check_encoder(self, collection: Collection) -> None:
        """Raises NotAvailable."""
        if collection.fingerprint not in self._encoders:
            raise NotAvailable(
                f'The collection "{collection.name}" was served without its encoder '
                f"({collection.fingerprint[:12]}), so it takes ids and vectors, but no pictures."
            )

    # Search

    def search(self, name: str, search: Search) -> Answer:
        """The items nearest to the query, best first. Items named in the query are never among them.

        Raises:
            UnknownCollection, UnknownItem, InvalidImage, VectorError, DimensionMismatch, NotAvailable
            FilterInvalid, CursorInvalid, CursorExpired, UsageError
        """
        with self.using(name) as collection:
            return self._search(collection, search)

    def _search(self, collection: Collection, search: Search) -> Answer:
        started = time.perf_counter()
        vector = self._query_vector(collection, search.query)
        embedded = time.perf_counter()
        named = [*([search.query.id] if search.query.id is not None else []), *search.query.positive]
        exclude = list(dict.fromkeys([*named, *search.query.negative]))
        result = self._found(collection, vector, search, exclude)
        ended = time.perf_counter()
        return Answer(
            query_id=uuid.uuid4().hex,
            collection=self._name_of(collection),
            generation=result.generation,
            model=collection.fingerprint,
            hits=result.hits,
            total=result.total,
            total_is_exact=result.total_is_exact,
            next_cursor=result.next_cursor,
            approximate=result.approximate,
            embed_ms=1000 * (embedded - started),
            search_ms=1000 * (ended - embedded),
            took_ms=1000 * (time.perf_counter() - started),
        )

    def _found(
        self, collection: Collection, vector: Vector, search: Search, exclude: Sequence[str]
    ) -> SearchResult:
        """The result of a search: in one call with others of this moment, where they can share one."""
        check_time()
        plain = PlainSearch(
            search.limit,
            search.offset,
            search.exact,
            search.effort,
            search.score_threshold,
            search.with_vector,
        )
        if not (exclude or search.filter or search.group_by or search.cursor):
            return self._sharing(collection)(vector, plain)
        with stage("search"):
            [result] = collection.search(
                vector[None],
                **plain._asdict(),
                exclude=exclude,
                filter=search.filter,
                group_by=search.group_by,
                group_size=search.group_size,
                cursor=search.cursor,
            )
        return result

    def _sharing(self, collection: Collection) -> SharedSearches:
        with self._idle:
            found = self._shared.get(collection)
            if found is None:
                found = self._shared[collection] = SharedSearches(collection)
            return found

    def _name_of(self, collection: Collection) -> str:
        """The name that it is served by."""
        return next((n for n, c in self._collections.items() if c is collection), collection.name)

    def _query_vector(self, collection: Collection, query: Query) -> Vector:
        base = query.vector if query.image is None else self._embed_for(collection, query.image)
        named = [] if query.id is None else [query.id]
        with stage("search"):
            return query_vector(
                collection, base=base, positive=[*named, *query.positive], negative=query.negative
            )

    # Items

    def get(self, name: str, id: str, *, with_vector: bool = False) -> Item:
        with self.using(name) as collection:
            return collection.get([id], with_vector=with_vector)[0]

    def put(
        self,
        name: str,
        id: str,
        *,
        image: bytes | None = None,
        vector: Sequence[float] | Vector | None = None,
        payload: Payload | None = None,
        condition: Condition | None = None,
    ) -> Written:
        """Add an item, or replace the one of this id; a picture is stored with it.

        Args:
            condition: what the item has to be before; looked at and written in one step.

        Raises:
            UsageError: neither a picture nor a vector, or both.
            ConditionFailed: nothing was written.
            ReadOnly, UnknownCollection, InvalidImage, VectorError, NotAvailable, StorageError
        """
        with self._writing(name) as (collection, turn):
            if (image is None) == (vector is None):
                raise UsageError(f'The item "{id}" needs either a picture or a vector, and not both.')
            row = self._row_of(collection, image, vector)
            with stage("write"), turn:
                check(collection, id, condition)
                [created] = collection.add([NewItem(id, row, dict(payload or {}), image=image)])
                return Written(id, created, collection.get([id])[0].sequence)

    def _row_of(self, collection: Collection, image: bytes | None, vector: Any) -> Vector:
        if image is not None:
            row = self._embed_for(collection, image)
            self._admit(collection)
            return row
        return unit(vector, dim=collection.dim, where="the vector")

    def put_many(
        self,
        name: str,
        items: Sequence[Upsert],
        *,
        done: Callable[[int], None] = lambda count: None,
    ) -> list[Written | DmlError]:
        """Add or replace many items, in batches that are each written whole; in the order given.

        Args:
            done: told after each batch how many items were dealt with; may raise, to stop.

        Returns:
            For each item what was written, or why it could not be: a picture or vector that is not usable.

        Raises:
            ReadOnly, UnknownCollection, NotAvailable, StorageError: items of earlier batches stay.
        """
        results: list[Written | DmlError] = []
        with self._writing(name) as (collection, turn):
            for start in range(0, len(items), BATCH):
                rows = self._rows_of(collection, items[start : start + BATCH])
                results += self._write_rows(collection, turn, items[start : start + BATCH], rows)
                done(len(results))
        return results

    def _rows_of(self, collection: Collection, items: Sequence[Upsert]) -> list[Vector | DmlError]:
        """The vector of each item, or what is wrong with it. Raises NotAvailable: a picture, no encoder."""
        rows: list[Vector | DmlError] = []
        arrays: list[Vector] = []
        places: list[int] = []
        for item in items:
            try:
                if item.image is None:
                    rows.append(unit(item.vector, dim=collection.dim, where="the vector"))  # type: ignore[arg-type]
                    continue
                self._check_encoder(collection)
                arrays.append(self._prepare(collection.fingerprint, item.image))
                places.append(len(rows))
                rows.append(arrays[-1])
            except (InvalidImage, VectorError) as error:
                rows.append(error)
        if arrays:
            self._admit(collection)
            for place, row in zip(places, self._batchers[collection.fingerprint](arrays), strict=True):
                rows[place] = row
        return rows

    def _admit(self, collection: Collection) -> None:
        """Note in a collection that it gets vectors of this profile, before the first of them is written."""
        encoder = self._encoders[collection.fingerprint]
        if collection not in self._admitted and isinstance(collection, LocalCollection):
            if isinstance(encoder, Encoder):
                admit(collection, encoder)
            self._admitted.add(collection)

    def _write_rows(
        self,
        collection: Collection,
        turn: threading.RLock,
        items: Sequence[Upsert],
        rows: Sequence[Vector | DmlError],
    ) -> list[Written | DmlError]:
        good = [(item, row) for item, row in zip(items, rows, strict=True) if not isinstance(row, DmlError)]
        new = [NewItem(item.id, row, dict(item.payload), image=item.image) for item, row in good]
        with stage("write"), turn:
            created = collection.add(new) if new else []
            written = collection.get([item.id for item in new]) if new else []
        answers = iter([Written(w.id, c, w.sequence) for w, c in zip(written, created, strict=True)])
        return [row if isinstance(row, DmlError) else next(answers) for row in rows]

    def update_payload(
        self, name: str, id: str, changes: Payload, *, condition: Condition | None = None
    ) -> Item:
        """Merge into the payload of an item; a value of None removes its key.

        Args:
            condition: what the item has to be before; looked at and written in one step.

        Raises:
            PayloadTooLarge: merged, it would outgrow `settings.max_payload_bytes`.
            ConditionFailed: nothing was written.
            ReadOnly, UnknownCollection, UnknownItem, StorageError
        """
        with self._writing(name) as (collection, turn), stage("write"), turn:
            check(collection, id, condition)
            return collection.update_payload(id, changes, max_bytes=self.settings.max_payload_bytes)

    def delete(self, name: str, id: str, *, condition: Condition | None = None) -> None:
        """Forget an item. Raises UnknownItem when it is not there, ConditionFailed."""
        with self._writing(name) as (collection, turn), stage("write"), turn:
            check(collection, id, condition)
            if not collection.delete([id]):
                raise UnknownItem(f'There is no item "{id}" in the collection "{name}".')

    def delete_many(self, name: str, ids: Sequence[str]) -> int:
        """Forget these items; how many were there."""
        with self._writing(name) as (collection, turn), stage("write"), turn:
            return collection.delete(ids)

    def delete_matching(self, name: str, filter: FilterLike) -> int:
        """Forget the items that pass a filter; how many there were. Raises FilterInvalid for an empty one."""
        with self._writing(name) as (collection, turn), stage("write"), turn:
            return collection.delete_matching(filter)

    def scroll(
        self,
        name: str,
        *,
        after: str | None = None,
        limit: int = 100,
        with_vector: bool = False,
        filter: FilterLike | None = None,
    ) -> tuple[list[Item], str | None]:
        with self.using(name) as collection:
            return collection.scroll(after=after, limit=limit, with_vector=with_vector, filter=filter)

    def picture(self, name: str, id: str) -> bytes:
        """The picture as it was given. Raises UnknownItem, ImageNotKept."""
        with self.using(name) as collection:
            return collection.picture(id)

    def thumbnail(self, name: str, id: str) -> bytes:
        """A small upright JPEG without metadata. Raises as `picture`."""
        digest = self.picture_digest(name, id)
        if digest not in self._sizes:
            if len(self._sizes) >= SIZES_KEPT:
                self._sizes.clear()
            width, height = probe(self.picture(name, id))
            self._sizes[digest] = width * height
        with self.decoding.take(self._sizes[digest]), self.using(name) as collection:
            return collection.thumbnail(id, self.settings.thumbnail_pixels)

    def picture_digest(self, name: str, id: str) -> str:
        """The sha256 of the picture of an item, without reading it. Raises UnknownItem, ImageNotKept."""
        item = self.get(name, id)
        if item.picture is None:
            raise ImageNotKept(f'The item "{id}" of "{name}" has no picture: it was added as a vector.')
        return item.picture.sha256

    def check_writable(self, name: str) -> None:
        """Raises ReadOnly, UnknownCollection."""
        self.resolve(name)
        if self.settings.read_only:
            raise ReadOnly(
                f'The collection "{name}" is served read-only. Start the service without --read-only.'
            )

    @contextmanager
    def settled(self) -> Iterator[None]:
        """No collection is made, opened or deleted while the block lasts; what is under way ends first."""
        with self._changing:
            yield

    @contextmanager
    def _writing(self, name: str) -> Iterator[tuple[Collection, threading.RLock]]:
        """The collection, and the turn in which items are looked at and written in one step."""
        self.check_writable(name)
        with self.using(name) as collection:
            yield collection, self._turns.setdefault(self._name_of(collection), threading.RLock())

    # Whole collections

    def create(self, name: str, *, model: str | None, dim: int | None, index: Mapping[str, Any]) -> bool:
        """An empty collection of this name; False: there is one with the same settings.

        Args:
            model: fingerprint of an encoder that answers here, or its beginning; None: the only one. With
                `dim`, any text that says what made the vectors.
            dim: for vectors that are made elsewhere: their length.
            index: {"kind", "options", "promise"}.

        Raises:
            Conflict: there is one with other settings, or an alias of this name.
            NotAvailable: the service has no folder for collections, or no such encoder.
            ReadOnly, ConfigError, StorageError
        """
        with self._changing:
            folder = self._own_folder(name)
            if dim is None and not self._encoders:
                raise NotAvailable(
                    f'"{name}" would be for pictures, and this service has no encoder for them. Give dim, '
                    f"for vectors that are made elsewhere, or start it with dml serve --encoder FOLDER."
                )
            if dim is None:
                fingerprint = self._choose(model)
                dim = int(self._encoders[fingerprint].dim)
            else:
                fingerprint = model or "unknown"
            if name in self._collections:
                folder.check_same(
                    self._collections[name].info(), dim=dim, fingerprint=fingerprint, index=index
                )
                return False
            if name in self.alias_of():
                raise Conflict(f'"{name}" is an alias. Delete it first, or choose another name.')
            made = folder.create(
                name, dim=dim, fingerprint=fingerprint, index=index, encoder=self._encoders.get(fingerprint)
            )
            self._collections = {**self._collections, name: made}
            return True

    def adopt(self, name: str) -> bool:
        """Serve a collection that was put into the folder of this service after its start; False: there is
        none, or it is served already. It and its encoder answer once before anybody else can ask them.

        Raises:
            Conflict: an alias of this name, or the collection has another.
            NotAvailable: the service has no folder for collections.
            CollectionError, EncoderError, StorageError
        """
        with self._changing:
            folder = self._folder()
            if name in self._collections or not folder.holds(name):
                return False
            if name in self.alias_of():
                raise Conflict(f'"{name}" is an alias. Delete it first, or choose another name.')
            found, encoders = folder.open(name, self._encoders, settings=self.settings)
            new = {f: self._batcher(e) for f, e in encoders.items() if f not in self._encoders}
            try:
                for fingerprint, batcher in new.items():
                    _embed_once(encoders[fingerprint], batcher)
                found.search(np.eye(1, found.dim, dtype=np.float32), limit=1)
            except BaseException:
                for batcher in new.values():
                    batcher.close()
                found.close()
                raise
            self._batchers = {**self._batchers, **new}
            self._encoders = encoders
            self._collections = {**self._collections, name: found}
            return True

    def reload(self) -> tuple[list[str], dict[str, DmlError]]:
        """Serve every collection that was put into the folder of this service after its start.

        Returns:
            The names of those that are new, and name -> what is wrong with one that cannot be served.

        Raises:
            NotAvailable, StorageError
        """
        opened: list[str] = []
        failed: dict[str, DmlError] = {}
        served = self.places()
        for path in self._folder().collections(tidy=False):
            if str(path.resolve()) in served:
                continue
            try:
                opened += [path.name] if self.adopt(path.name) else []
            except DmlError as error:
                failed[path.name] = error
        return opened, failed

    def remove(self, name: str, *, seconds: float = 10.0) -> str:
        """Delete a collection with all that is in it, when the requests that use it have ended; its place.

        Raises:
            Conflict: an alias leads to it, it is not in the folder of this service, or requests still use it
                after so many seconds.
            UnknownCollection, NotAvailable, ReadOnly, StorageError
        """
        with self._changing:
            folder = self._own_folder(name)
            if name not in self._collections:  # an alias is not what it stands for
                raise UnknownCollection(
                    f'There is no collection "{name}" here. There is: {", ".join(self.names()) or "none"}.'
                )
            aliases = sorted(alias for alias, meant in self.alias_of().items() if meant == name)
            if aliases:
                raise Conflict(
                    f'The alias "{aliases[0]}" leads to the collection "{name}". Switch or delete it first.'
                )
            collection, place = self._collections[name], self.place(name)
            folder.check_within(name, place)
            with self._idle:
                self._collections = {n: c for n, c in self._collections.items() if n != name}
                if not self._idle.wait_for(lambda: not self._users[name], timeout=seconds):
                    self._collections = {**self._collections, name: collection}
                    raise Conflict(f'Requests still use the collection "{name}". Try again in a moment.')
                del self._users[name]
                self._shared.pop(collection, None)
            collection.close()
            folder.remove(Path(place))
            return place

    def _own_folder(self, name: str) -> Folder:
        if self.settings.read_only:
            raise ReadOnly(f'"{name}" can be neither made nor deleted: this service is read-only.')
        return self._folder()

    def _folder(self) -> Folder:
        if self.folder is None:
            raise NotAvailable(
                "This service has no folder for collections, so it makes and deletes none. Start it with "
                "dml serve --data FOLDER."
            )
        return self.folder


def _embed_once(encoder: ImageEncoder, batcher: Batcher) -> None:
    from PIL import Image as pillow

    pillow.preinit()  # the usual formats, which it would load with the first picture: 0.15 s
    blank = encoder.preprocess(pillow.new("RGB", (64, 64), (127, 127, 127)))
    batcher([blank])


def check(collection: Collection, id: str, condition: Condition | None) -> None:
    """Compare an item with what it has to be. Raises ConditionFailed."""
    if condition is not None:
        try:
            found = collection.get([id])[0]
        except UnknownItem:
            found = None
        condition.check(id, found)


def place_of(collection: Collection, name: str) -> str:
    """Where a collection lies; what is kept in memory only goes by its name."""
    path = getattr(collection, "path", None)
    return f"memory:{name}" if path is None else str(Path(path).resolve())
