"""The search engine behind the service. It has never heard of HTTP, and works in a notebook just as well.

>>> engine = Engine.open([Path("shoes.collection")])                                          # doctest: +SKIP
>>> answer = engine.search("shoes", Search(Query(image=Path("mine.jpg").read_bytes())))       # doctest: +SKIP
>>> [(hit.id, hit.score) for hit in answer.hits]                                              # doctest: +SKIP
"""

import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from dml.collection.base import Collection, CollectionInfo, FilterLike, Hit, Item, NewItem, Payload
from dml.collection.examples import query_vector, unit
from dml.errors import (
    ImageNotKept,
    InvalidImage,
    NotAvailable,
    ReadOnly,
    UnknownCollection,
    UnknownItem,
    UnsupportedImage,
    UsageError,
)
from dml.imaging import probe
from service.batching import Batcher, Budget
from service.pictures import media_type
from service.settings import Settings

Vector = NDArray[np.float32]
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

    stage: Callable[[str, float], None] = field(default=lambda stage, seconds: None)
    batch: Callable[[int], None] = field(default=lambda size: None)


class Engine:
    """Collections by name, and the encoders that fit them by fingerprint. Safe to use from several threads.

    Args:
        collections: name -> collection.
        encoders: the encoders for pictures; a collection whose encoder is not among them answers searches by
            id and by vector only.
        settings: limits.
    """

    def __init__(
        self,
        collections: Mapping[str, Collection],
        encoders: Iterable[ImageEncoder] = (),
        *,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings()
        self.observers = Observers()
        self.decoding = Budget(self.settings.max_pixels_in_flight)
        self._collections = dict(collections)
        self._sizes: dict[str, int] = {}
        self._encoders = {encoder.fingerprint: encoder for encoder in encoders}
        self._batchers = {
            fingerprint: Batcher(
                encoder.embed_arrays,
                max_batch=self.settings.max_batch,
                observe=lambda size: self.observers.batch(size),
            )
            for fingerprint, encoder in self._encoders.items()
        }

    @classmethod
    def open(
        cls, paths: Sequence[Path], *, runtime: str = "auto", settings: Settings | None = None
    ) -> "Engine":
        """Open collection folders, each with the encoder that it carries, and embed once to warm up.

        Raises:
            CollectionError, EncoderError: a folder that is not a collection, or does not fit its encoder.
            UsageError: two collections of one name.
        """
        from dml.collection import open_collection
        from dml.collection.encoding import check_profile, load_encoder_of
        from dml.collection.place import recover
        from dml.encoder import Encoder

        settings = settings or Settings()
        collections: dict[str, Collection] = {}
        encoders: dict[str, Encoder] = {}
        try:
            for path in paths:
                recover(
                    path
                )  # a collection that a killed build left half replaced, before its encoder is read
                folder = path / "encoder"
                encoder = load_encoder_of(path, runtime=runtime) if folder.is_dir() else None
                collection = open_collection(
                    path, read_only=settings.read_only, fingerprint=encoder.fingerprint if encoder else None
                )
                if collection.name in collections:
                    collection.close()
                    raise UsageError(
                        f'Two collections are called "{collection.name}", the second in {path}. '
                        f"Call one by another name (`dml index rename`), or serve them on two ports."
                    )
                collections[collection.name] = collection
                if encoder is not None:
                    # One encoder serves all collections of its fingerprint.
                    check_profile(collection, encoders.setdefault(encoder.fingerprint, encoder))
        except BaseException:
            for collection in collections.values():
                collection.close()
            raise
        engine = cls(collections, encoders.values(), settings=settings)
        try:
            engine.warm_up()
        except BaseException:
            engine.close()
            raise
        return engine

    def warm_up(self) -> None:
        """Run every encoder and every index once, so that the first request is as quick as the next."""
        from PIL import Image as pillow

        for fingerprint, encoder in self._encoders.items():
            blank = encoder.preprocess(pillow.new("RGB", (64, 64), (127, 127, 127)))
            self._batchers[fingerprint](blank[None])
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

    def collection(self, name: str) -> Collection:
        """The collection of this name. Raises UnknownCollection, naming those there are."""
        if name not in self._collections:
            raise UnknownCollection(
                f'There is no collection "{name}" here. There is: {", ".join(self.names()) or "none"}.'
            )
        return self._collections[name]

    def info(self, name: str) -> CollectionInfo:
        return self.collection(name).info()

    def count(self, name: str, filter: FilterLike | None = None) -> int:
        """How many items pass a filter. Raises UnknownCollection, FilterInvalid."""
        return self.collection(name).count(filter)

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
        return fingerprint, self._batchers[fingerprint](np.stack(arrays))

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
            width, height = probe(image, max_pixels=most)
            with self.decoding.take(width * height):
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
        if collection.fingerprint not in self._encoders:
            raise NotAvailable(
                f'The collection "{collection.name}" was served without its encoder '
                f"({collection.fingerprint[:12]}), so it takes ids and vectors, but no pictures."
            )
        started = time.perf_counter()
        vector = self.embed([image], model=collection.fingerprint)[1][0]
        self.observers.stage("embed", time.perf_counter() - started)
        return vector

    # Search

    def search(self, name: str, search: Search) -> Answer:
        """The items nearest to the query, best first. Items named in the query are never among them.

        Raises:
            UnknownCollection, UnknownItem, InvalidImage, VectorError, DimensionMismatch, NotAvailable
            FilterInvalid, CursorInvalid, CursorExpired, UsageError
        """
        collection = self.collection(name)
        started = time.perf_counter()
        vector = self._query_vector(collection, search.query)
        embedded = time.perf_counter()
        named = [*([search.query.id] if search.query.id is not None else []), *search.query.positive]
        exclude = list(dict.fromkeys([*named, *search.query.negative]))
        [result] = collection.search(
            vector[None],
            limit=search.limit,
            offset=search.offset,
            exact=search.exact,
            effort=search.effort,
            score_threshold=search.score_threshold,
            exclude=exclude,
            with_vector=search.with_vector,
            filter=search.filter,
            group_by=search.group_by,
            group_size=search.group_size,
            cursor=search.cursor,
        )
        ended = time.perf_counter()
        self.observers.stage("search", ended - embedded)
        return Answer(
            query_id=uuid.uuid4().hex,
            collection=name,
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

    def _query_vector(self, collection: Collection, query: Query) -> Vector:
        base = query.vector if query.image is None else self._embed_for(collection, query.image)
        named = [] if query.id is None else [query.id]
        return query_vector(
            collection, base=base, positive=[*named, *query.positive], negative=query.negative
        )

    # Items

    def get(self, name: str, id: str, *, with_vector: bool = False) -> Item:
        return self.collection(name).get([id], with_vector=with_vector)[0]

    def put(
        self,
        name: str,
        id: str,
        *,
        image: bytes | None = None,
        vector: Sequence[float] | Vector | None = None,
        payload: Payload | None = None,
    ) -> Written:
        """Add an item, or replace the one of this id; a picture is stored with it.

        Raises:
            UsageError: neither a picture nor a vector, or both.
            ReadOnly, UnknownCollection, InvalidImage, VectorError, NotAvailable, StorageError
        """
        collection = self._writable(name)
        if (image is None) == (vector is None):
            raise UsageError(f'The item "{id}" needs either a picture or a vector, and not both.')
        if image is not None:
            row = self._embed_for(collection, image)
        else:
            row = unit(vector, dim=collection.dim, where="the vector")  # type: ignore[arg-type]
        [created] = collection.add([NewItem(id, row, dict(payload or {}), image=image)])
        return Written(id, created, collection.get([id])[0].sequence)

    def update_payload(self, name: str, id: str, changes: Payload) -> Item:
        """Merge into the payload of an item; a value of None removes its key.

        Raises:
            PayloadTooLarge: merged, it would outgrow `settings.max_payload_bytes`.
            ReadOnly, UnknownCollection, UnknownItem, StorageError
        """
        return self._writable(name).update_payload(id, changes, max_bytes=self.settings.max_payload_bytes)

    def delete(self, name: str, id: str) -> None:
        """Forget an item. Raises UnknownItem when it is not there."""
        if not self._writable(name).delete([id]):
            raise UnknownItem(f'There is no item "{id}" in the collection "{name}".')

    def delete_many(self, name: str, ids: Sequence[str]) -> int:
        """Forget these items; how many were there."""
        return self._writable(name).delete(ids)

    def delete_matching(self, name: str, filter: FilterLike) -> int:
        """Forget the items that pass a filter; how many there were. Raises FilterInvalid for an empty one."""
        return self._writable(name).delete_matching(filter)

    def scroll(
        self,
        name: str,
        *,
        after: str | None = None,
        limit: int = 100,
        with_vector: bool = False,
        filter: FilterLike | None = None,
    ) -> tuple[list[Item], str | None]:
        return self.collection(name).scroll(after=after, limit=limit, with_vector=with_vector, filter=filter)

    def picture(self, name: str, id: str) -> bytes:
        """The picture as it was given. Raises UnknownItem, ImageNotKept."""
        return self.collection(name).picture(id)

    def thumbnail(self, name: str, id: str) -> bytes:
        """A small upright JPEG without metadata. Raises as `picture`."""
        digest = self.picture_digest(name, id)
        if digest not in self._sizes:
            if len(self._sizes) >= SIZES_KEPT:
                self._sizes.clear()
            width, height = probe(self.picture(name, id))
            self._sizes[digest] = width * height
        with self.decoding.take(self._sizes[digest]):
            return self.collection(name).thumbnail(id, self.settings.thumbnail_pixels)

    def picture_digest(self, name: str, id: str) -> str:
        """The sha256 of the picture of an item, without reading it. Raises UnknownItem, ImageNotKept."""
        item = self.get(name, id)
        if item.picture is None:
            raise ImageNotKept(f'The item "{id}" of "{name}" has no picture: it was added as a vector.')
        return item.picture.sha256

    def _writable(self, name: str) -> Collection:
        collection = self.collection(name)
        if self.settings.read_only:
            raise ReadOnly(
                f'The collection "{name}" is served read-only. Start the service without --read-only.'
            )
        return collection
