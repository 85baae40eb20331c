"""A collection in a folder: catalogue, pictures, and an index that is derived from the catalogue.

::

    manifest.json            what it is: dimension, encoder's fingerprint, roots, what the index was built as
    catalog.sqlite           the truth: ids, payloads, vectors, change sequence
    snapshots/<seq>.index    the index as of change <seq>; checksummed, may be deleted at any time
    images/  thumbnails/     see pictures.py
    encoder/                 the encoder that made the vectors, when it came along
    writer.lock              held by the one process that writes
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.collection import catalog as sql
from dml.collection.base import (
    CollectionInfo,
    FilterLike,
    Item,
    NewItem,
    Payload,
    Picture,
    SearchResult,
)
from dml.collection.catalog import Catalog, Change, KnownPicture
from dml.collection.cursors import Walks
from dml.collection.derive import Built, Stop, Stopped, build_snapshot, check_kind, extend_snapshot, never
from dml.collection.filters import parse_filter
from dml.collection.following import from_catalog, from_nothing, replayed
from dml.collection.generation import Generation
from dml.collection.grouping import answer
from dml.collection.items import check_item, check_rows, check_unicode, encode_payload
from dml.collection.keeping import check
from dml.collection.lock import LOCK, WriterLock
from dml.collection.manifest import FILE as MANIFEST
from dml.collection.manifest import FORMAT, Manifest, read_manifest, write_manifest
from dml.collection.merging import Background, MergeMode, check_mode, is_due, why_build_anew
from dml.collection.payload_indexes import declared
from dml.collection.pictures import Pictures
from dml.collection.promised import build_promised, with_promise
from dml.collection.query import Searcher, read_query
from dml.collection.row_sets import RowSets, items_in_order, matching_ids
from dml.collection.snapshots import Snapshots
from dml.errors import (
    CollectionError,
    ConfigError,
    DamagedFile,
    FilterInvalid,
    ImageNotKept,
    MissingExtra,
    ModelMismatch,
    ReadOnly,
    StorageError,
    UnknownItem,
    UsageError,
)
from dml.index import check_options
from dml.index.base import check_vectors
from dml.index.tune import Promise

log = logging.getLogger(__name__)

PATIENCE = 20
"""How often a search tries to meet a moment between two writes before it asks the writers to wait."""


class LocalCollection:
    """See `dml.collection.base.Collection`, and `dml.collection.open_collection` for the arguments.

    Safe to use from several threads. A search sees one generation from start to end: it holds on to an
    immutable state and reads items in a transaction of the same moment. Writers swap the next state in.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool = False,
        fingerprint: str | None = None,
        device: str = "auto",
        merge: MergeMode = "auto",
    ) -> None:
        check_mode(merge)
        self.path, self.read_only, self.device = Path(path), read_only, device
        self.manifest = read_manifest(self.path)
        self.check_fingerprint(fingerprint)
        self._lock = threading.RLock()  # writing, and for a reader: catching up
        self._building = threading.Lock()
        self._background = (
            Background("following the writer", due=self._newer_index, work=self._adopt)
            if read_only
            else Background("merging", due=lambda: merge == "auto" and self.wants_merge, work=self._merge_due)
        )
        self._closed = False
        self._row_sets = RowSets()
        self._walks = Walks(self._hold, self._row_sets)
        self._snapshots = Snapshots(
            self.path, fingerprint=self.fingerprint, dim=self.dim, device=device, read_only=read_only
        )
        self._writer_lock = None if read_only else WriterLock(self.path / LOCK)
        try:
            if not read_only:
                sql.migrate(self.path / sql.FILE)
            self._catalog = Catalog(self.path / sql.FILE, dim=self.dim, read_only=read_only)
            try:
                self._remember_manifest()
                self._pictures = self._open_pictures()
                self._state = self._open_state()
            except BaseException:
                self._catalog.close()
                raise
        except BaseException:
            if self._writer_lock is not None:
                self._writer_lock.release()
            raise
        self._background.wake()

    # What it is

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def dim(self) -> int:
        return self.manifest.dim

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def generation(self) -> int:
        """The change that the next search will see."""
        return self._state.sequence

    @property
    def wants_merge(self) -> bool:
        """Whether so many changes are pending that searches become noticeably slower.

        Never while there is an index that this process cannot read: nobody replaces that unasked.
        """
        return is_due(self._state) and not self._snapshots.unread

    @property
    def encoder_path(self) -> Path | None:
        """The encoder's folder inside the collection, when it came along."""
        folder = self.path / "encoder"
        return folder if (folder / "manifest.json").is_file() else None

    def capabilities(self) -> frozenset[str]:
        return frozenset(
            {
                "exact",
                "verify",
                "pictures",
                "count",
                "filter",
                "group_by",
                "generation_cursor",
                "payload_index",
            }
        )

    def check_fingerprint(self, fingerprint: str | None) -> None:
        """Refuse vectors of another encoder. None: the caller does not say. Raises ModelMismatch."""
        if fingerprint is not None and fingerprint != self.fingerprint:
            raise ModelMismatch(
                f"The collection in {self.path} was made by the encoder {self.fingerprint[:12]}, and this "
                f"encoder is {fingerprint[:12]}: their vectors cannot be compared. Use the collection's own "
                f"encoder ({self.path / 'encoder'}), or build a collection with this one."
            )

    def __len__(self) -> int:
        with self._moment() as (_, state):
            return len(state)

    def info(self) -> CollectionInfo:
        with self._moment() as (_, state):
            return CollectionInfo(
                name=self.name,
                count=len(state),
                dim=self.dim,
                metric=self.manifest.metric,
                fingerprint=self.fingerprint,
                index=state.main.describe(),
                measured_recall=(state.base.measured or {}).get("recall_at_10"),
                generation=state.sequence,
                pending=state.pending,
                bytes_on_disk=bytes_below(self.path),
                manifest=json.loads((self.path / MANIFEST).read_text(encoding="utf-8")),
            )

    def close(self) -> None:
        """Let go of the files and the lock. Everything acknowledged is already on the disk.

        A merge that is under way is given up; the next opening goes on with what is pending.
        """
        self._background.close()
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._walks.close()
            self._catalog.close()
            if self._writer_lock is not None:
                self._writer_lock.release()

    def __enter__(self) -> "LocalCollection":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Writing

    def add(self, items: Iterable[NewItem], *, fingerprint: str | None = None) -> list[bool]:
        """Add or replace, all or nothing; durable on return. True where the id was new.

        Args:
            fingerprint: of the encoder that made the vectors; refused when it is not the collection's.

        Raises:
            VectorError, DimensionMismatch, UsageError, ModelMismatch: before anything is written.
            ImageNotKept, CollectionError: a `file` that cannot be read, or lies outside the roots.
            StorageError: the disk is full or refuses; nothing of the batch is there then.
            ReadOnly: opened for reading.
        """
        self.check_fingerprint(fingerprint)
        batch = list(items)
        payloads = [check_item(item) for item in batch]
        vectors = check_rows([item.vector for item in batch], self.dim)
        if not batch:
            return []
        with self._write() as state:
            stored: list[str] = []
            try:
                changes = []
                for item, vector, payload in zip(batch, vectors, payloads, strict=True):
                    picture = self._take_picture(item)
                    if picture is not None and picture.kind == "stored":
                        stored.append(picture.sha256)
                    changes.append(Change(item.id, vector, payload, picture))
                written = self._catalog.put(changes)
            except BaseException:
                self._discard_unused(stored)
                raise
            self._state = state.changed(
                written.sequence, rows=written.rows, vectors=written.vectors, removed=written.removed
            )
            self._pictures.discard(written.orphans)
            return written.created

    def delete(self, ids: Sequence[str]) -> int:
        """Forget these ids; durable on return. How many were there.

        Raises:
            UsageError: text that no id can be, for it is not Unicode; before anything is forgotten.
            StorageError, ReadOnly
        """
        for id in ids:
            check_unicode(id)
        with self._write() as state:
            written = self._catalog.remove(ids)
            self._state = state.changed(
                written.sequence, rows=written.rows, vectors=written.vectors, removed=written.removed
            )
            self._pictures.discard(written.orphans)
            return len(written.removed)

    def delete_matching(self, filter: FilterLike) -> int:
        """Forget the items that pass a filter; durable on return. How many there were.

        Raises:
            FilterInvalid: also for a filter that lets everything pass.
            StorageError, ReadOnly
        """
        asked = parse_filter(filter)
        if not asked:
            raise FilterInvalid("an empty filter would delete every item; give at least one condition")
        with self._write():
            with self._catalog.reading() as db:
                ids = matching_ids(db, asked)
            return self.delete(ids)

    def update_payload(self, id: str, changes: Payload, *, max_bytes: int | None = None) -> Item:
        """Merge into the payload; None removes a key.

        Raises:
            UnknownItem, StorageError, ReadOnly
            PayloadTooLarge: the merged payload would have more than `max_bytes` as JSON.
        """
        encode_payload(changes, id)
        with self._write() as state:
            sequence, item = self._catalog.merge_payload(id, changes, max_bytes=max_bytes)
            if item is None:
                raise UnknownItem(f'There is no item "{id}" in the collection "{self.name}".')
            self._state = replace(state, sequence=sequence)
            return item

    def rename(self, name: str) -> None:
        """Call it by another name; its folder stays. Raises UsageError, ReadOnly, StorageError."""
        if not name.strip():
            raise UsageError("a collection needs a name")
        with self._turn():
            self._save_manifest(self.manifest.with_(name=name))

    def index_payload(self, key: str) -> bool:
        """Index the payloads at a path, so that filters on it need not read all; False: they are already.

        For match conditions and ranges of numbers that few items meet, in `must`. Worth it from some 100,000
        items on; costs a little with every write. Filters mean the same with and without.

        Raises:
            UsageError: no path, or one through all entries of a list ("[]").
            StorageError, ReadOnly
        """
        with self._write():
            return self._catalog.index_payload(key)

    def drop_payload_index(self, key: str) -> bool:
        """Forget such an index; False: there is none. Raises StorageError, ReadOnly."""
        with self._write():
            return self._catalog.drop_payload_index(key)

    def payload_indexes(self) -> list[str]:
        """The paths that are indexed."""
        with self._catalog.reading() as db:
            return declared(db)

    def set_root(self, name: str, folder: str | Path) -> None:
        """Say where the referenced pictures of the root `name` are now. Raises ReadOnly, StorageError."""
        with self._write():
            roots = {**self.manifest.roots, name: str(Path(folder).absolute())}
            self._save_manifest(self.manifest.with_(roots=roots))
            self._pictures = self._open_pictures()

    def set_encoder_info(self, info: Mapping[str, Any]) -> None:
        """Say anew what is known about the encoder. Raises ReadOnly, StorageError."""
        with self._write():
            self._save_manifest(self.manifest.with_(encoder=dict(info)))

    @contextmanager
    def _write(self) -> Iterator[Generation]:
        """The one writer's turn, with the state to start from; afterwards a merge may be due."""
        self._walks.sweep()
        with self._turn() as state:
            yield state
        self._background.wake()

    @contextmanager
    def _turn(self) -> Iterator[Generation]:
        if self.read_only:
            raise ReadOnly(f'The collection "{self.name}" was opened read-only.')
        with self._lock:
            self._check_open()
            yield self._state

    def _check_open(self) -> None:
        if self._closed:
            raise CollectionError(f'The collection "{self.name}" has been closed.')

    def _take_picture(self, item: NewItem) -> Picture | None:
        if item.image is not None:
            return self._pictures.store(item.image)
        return None if item.file is None else self._pictures.refer(item.file, item.sha256)

    def _discard_unused(self, sha256s: list[str]) -> None:
        """After a write that failed: pictures that it stored and nobody else uses."""
        try:
            with self._catalog.reading() as db:
                unused = sql.without_items(db, sha256s)
        except (StorageError, DamagedFile):
            return  # the next sweep finds them
        self._pictures.discard(unused)

    def _remember_manifest(self) -> None:
        """See to it that the catalogue knows the manifest, and that the manifest has a checksum."""
        if self.read_only:
            return
        with self._catalog.reading() as db:
            known = sql.read_fact(db, MANIFEST)
        if known is None or self.manifest.format < FORMAT:
            self._save_manifest(replace(self.manifest, format=FORMAT))

    def _save_manifest(self, manifest: Manifest) -> None:
        self._catalog.remember(MANIFEST, asdict(manifest))
        write_manifest(self.path, manifest)
        self.manifest = manifest

    # Reading

    @contextmanager
    def _moment(self) -> Iterator[tuple[Any, Generation]]:
        """A read transaction and the state of the same change."""
        for _ in range(PATIENCE):
            with self._catalog.reading() as db:
                sequence = sql.read_state(db)[0]
                state = self._state
                if self.read_only and state.sequence < sequence:
                    state = self._catch_up(db)
                if state.sequence == sequence:
                    yield db, state
                    return
            time.sleep(0.0005)  # a writer has committed and is about to swap
        with self._lock, self._catalog.reading() as db:
            yield db, self._catch_up(db) if self.read_only else self._state

    def get(self, ids: Sequence[str], *, with_vector: bool = False) -> list[Item]:
        with self._moment() as (db, _):
            found = sql.items_by_id(db, ids)
            missing = [id for id in ids if id not in found]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise UnknownItem(f'There is no item "{missing[0]}"{more} in the collection "{self.name}".')
            return self._with_vectors(db, [found[id] for id in ids], with_vector)

    def find(self, ids: Sequence[str]) -> dict[str, Item]:
        """id -> item, for those of these ids that are there."""
        with self._moment() as (db, _):
            return {id: item for id, (_, item) in sql.items_by_id(db, ids).items()}

    def count(self, filter: FilterLike | None = None) -> int:
        asked = parse_filter(filter)
        with self._moment() as (db, state):
            return len(self._row_sets.rows(db, asked)) if asked else len(state)

    def known_pictures(self) -> Iterator[KnownPicture]:
        """Every item with a picture, in the order in which they were written: which bytes have a vector."""
        with self._moment() as (db, _):
            yield from sql.known_pictures(db)

    def scroll(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        with_vector: bool = False,
        filter: FilterLike | None = None,
    ) -> tuple[list[Item], str | None]:
        if limit < 1:
            raise UsageError(f"limit must be at least 1, got {limit}")
        asked = parse_filter(filter)
        with self._moment() as (db, _):
            found = items_in_order(db, asked, after=after, limit=limit + 1)
            items = self._with_vectors(db, found[:limit], with_vector)
            return items, items[-1].id if len(found) > limit else None

    def _with_vectors(self, db: Any, found: list[tuple[int, Item]], wanted: bool) -> list[Item]:
        if not wanted:
            return [item for _, item in found]
        vectors = sql.vectors_of(db, [row for row, _ in found])
        return [replace(item, vector=vectors[row]) for row, item in found]

    def search(
        self,
        vectors: NDArray[np.float32],
        *,
        limit: int = 10,
        offset: int = 0,
        exact: bool = False,
        effort: int | None = None,
        score_threshold: float | None = None,
        exclude: Sequence[str] = (),
        with_vector: bool = False,
        filter: FilterLike | None = None,
        group_by: str | None = None,
        group_size: int = 1,
        cursor: str | None = None,
    ) -> list[SearchResult]:
        queries = check_vectors(vectors, self.dim, "the query")
        query = read_query(
            limit=limit,
            offset=offset,
            exact=exact,
            effort=effort,
            score_threshold=score_threshold,
            exclude=exclude,
            with_vector=with_vector,
            filter=filter,
            group_by=group_by,
            group_size=group_size,
        )
        if cursor is not None:
            return [self._walks.page(queries, query, cursor)]
        with self._moment() as (db, state):
            return answer(Searcher(db, state, self._row_sets, query), queries)

    def _hold(self, stack: ExitStack) -> tuple[Any, Generation]:
        """A read transaction of the present state, open until the stack is closed."""
        with self._lock:  # nobody writes between the transaction's beginning and the state
            db = stack.enter_context(self._catalog.reading())
            sql.read_state(db)
            return db, self._catch_up(db) if self.read_only else self._state

    def picture(self, id: str) -> bytes:
        return self._pictures.read(self._picture_of(id), id)

    def thumbnail(self, id: str, size: int = 256) -> bytes:
        return self._pictures.thumbnail(self._picture_of(id), id, size)

    def _picture_of(self, id: str) -> Picture:
        picture = self.get([id])[0].picture
        if picture is None:
            raise ImageNotKept(f'Item "{id}" of the collection "{self.name}" has a vector only, no picture.')
        return picture

    # The index

    def build_index(
        self,
        kind: str | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        measure: bool = True,
        seed: int = 0,
        promise: Promise | None = None,
        say: Callable[[str], None] = lambda line: None,
        stop: Stop = never,
    ) -> dict[str, Any]:
        """Build the main index anew from the catalogue, save it, and search it from now on.

        Searches and writes go on meanwhile; what is written during the build is in the delta afterwards.

        Args:
            kind: "auto" or a key of `dml.index.KINDS`; None: as the manifest says. Kept in the manifest.
            options: of that kind; None: as the manifest says when the kind stays the same.
            measure: measure recall@10 with held-out queries against exact search, and keep the figure.
            seed: chooses the held-out queries.
            promise: choose the cheapest kind that keeps it, see `promised.build_promised`; None, with no kind
                either: the promise of the manifest, if there is one. It is kept, and looked at after merges.
            say: is told what is being tried for a promise.
            stop: asked between blocks of rows whether to give up; the collection goes on as it is then.

        Returns:
            What is kept in the manifest as "built".

        Raises:
            ConfigError, MissingExtra: a kind or options that cannot be had, or a promise that none keeps.
            StorageError: no room for the snapshot; the collection goes on with the index that it had.
            ReadOnly: opened for reading.
            Stopped: `stop` said so.
        """
        with self._turn():
            asked = self.manifest.index
        if kind is not None:
            check_kind(kind)
        same: Mapping[str, Any] = asked["options"] if kind in (None, asked["kind"]) else {}
        wanted = {"kind": kind or asked["kind"], "options": dict(same if options is None else options)}
        check_options(wanted["kind"], wanted["options"])
        if promise is not None and kind is not None:
            raise ConfigError(f'A promise chooses the kind of index itself; "{kind}" was given too.')
        if promise is None and kind is None and options is None and asked.get("promise"):
            promise = Promise(**asked["promise"])
        with self._background.paused(), self._building:
            if promise is None:
                built = build_snapshot(
                    self._catalog, wanted, device=self.device, measure=measure, seed=seed, stop=stop
                )
            else:
                built = build_promised(
                    self._catalog, promise, device=self.device, seed=seed, stop=stop, say=say
                )
            about = self._install(built, wanted)
        self._sweep()
        return about

    def merge(self) -> dict[str, Any]:
        """Fold the pending changes into the main index now, and return when it is done.

        Rows are added to a copy of the index; where that would make a poor one (see
        `merging.why_build_anew`), it is built anew. Searches and writes go on meanwhile. With merge="auto"
        this happens by itself when it is due.

        Returns:
            What is kept in the manifest as "built".

        Raises: as `build_index`; the collection goes on with the index that it had.
        """
        with self._turn():
            pass
        with self._background.paused(), self._building:
            if not self._state.pending and self.manifest.built:
                return dict(self.manifest.built)
            return self._merge(never)

    def settle(self) -> None:
        """Wait until no merge is due or under way, or until it has failed and is to be tried again later."""
        self._background.wake()
        self._background.wait()

    def _merge_due(self, stop: Stop) -> None:
        with self._building:
            if self.wants_merge:
                self._merge(stop)

    def _merge(self, stop: Stop) -> dict[str, Any]:
        state, wanted = self._state, self.manifest.index
        saved = self._snapshots.path(state.base.sequence)
        anew = why_build_anew(state, wanted, saved)
        options: dict[str, Any] = {"device": self.device, "measure": True, "seed": 0, "stop": stop}
        if anew is None:
            built = extend_snapshot(self._catalog, state.base, saved, **options)
        else:
            log.info("%s: the merge builds the index anew: %s", self.name, anew)
            built = build_snapshot(self._catalog, wanted, **options)
        return self._install(built, wanted)

    def _install(self, built: Built, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Save a new main index and search it from now on; writers wait only for the last changes.

        Returns:
            What is kept in the manifest as "built".
        """
        wanted = built.wanted or wanted
        about = with_promise(built.about, wanted, built.snapshot.index, before=self.manifest.built)
        self._snapshots.save(built.snapshot)
        with self._catalog.reading() as db:
            state = replayed(db, Generation.of(built.snapshot, self.dim))
        with self._turn():
            with self._catalog.reading() as db:
                state = replayed(db, state)
            self._save_manifest(self.manifest.with_(index=wanted, built=about))
            self._state = state
            oldest = self._snapshots.drop_old()
            if oldest is not None:
                with suppress(StorageError):  # the new index is in place; the next one forgets more
                    self._catalog.forget_removed(oldest)
        return about

    def _sweep(self) -> None:
        """Delete pictures that no item uses, and half-written ones: of writes that were cut short."""
        with self._catalog.reading() as db:
            used = sql.stored_pictures(db)
        unused, halves = self._pictures.stored() - used, self._pictures.half_written()
        with self._turn():  # nobody stores a picture now: what is still unused stays so
            self._discard_unused(sorted(unused))
            for half in halves:
                half.unlink(missing_ok=True)

    # Opening and following

    def _open_pictures(self) -> Pictures:
        roots = {name: Path(root) for name, root in self.manifest.roots.items()}
        return Pictures(self.path, roots, read_only=self.read_only)

    def _open_state(self) -> Generation:
        """The newest whole snapshot, brought up to date from the catalogue."""
        with self._catalog.reading() as db:
            base = self._snapshots.load(db)
            if base is not None:
                return replayed(db, Generation.of(base, self.dim))
            if sql.count_items(db) and self.manifest.built:
                return self._rebuilt(db)
            return from_nothing(db, self.dim)

    def _rebuilt(self, db: Any) -> Generation:
        """No snapshot can be used, though there was one: make it again, or search exactly meanwhile."""
        if self._snapshots.unread:
            log.warning(
                "%s is searched exactly until its index can be read (by the dml that wrote it), or "
                "`dml index rebuild` has made a new one.",
                self.path,
            )
        elif not self.read_only:
            log.warning("the index of %s is built again from the catalogue", self.path)
            try:
                built = build_snapshot(
                    self._catalog, self.manifest.index, device=self.device, measure=False, seed=0
                )
                self._snapshots.save(built.snapshot)
                self._save_manifest(self.manifest.with_(built=built.about))
                return Generation.of(built.snapshot, self.dim)
            except (StorageError, MissingExtra) as error:
                log.warning("%s The collection is searched exactly until the index can be built.", error)
        return from_catalog(db, self.dim)

    def _catch_up(self, db: Any) -> Generation:
        """A reader's way to the moment of this transaction; keeps the newest state that it has seen."""
        with self._lock:
            state, (sequence, horizon) = self._state, sql.read_state(db)
            if state.sequence < sequence:
                if state.sequence < horizon:  # removals that the state has not seen are forgotten by now
                    self._reread_manifest()
                    base = self._snapshots.load(db, newer_than=state.base.sequence)
                    state = Generation.of(base, self.dim) if base is not None else self._rebuilt(db)
                self._state = replayed(db, state)
        self._background.wake()
        return self._state

    def _newer_index(self) -> bool:
        """Whether a reader's own delta has grown, and the writer has merged it meanwhile."""
        return is_due(self._state) and self._snapshots.newest() > self._state.base.sequence

    def _adopt(self, stop: Stop) -> None:
        """Take up the index that the writer has made; searches go on in the old one until it is loaded."""
        with self._catalog.reading() as db:
            base = self._snapshots.load(db, newer_than=self._state.base.sequence)
            if stop():
                raise Stopped
            if base is None:
                raise DamagedFile(f"no index in {self._snapshots.folder} could be read")
            state = replayed(db, Generation.of(base, self.dim))
        with self._lock, self._catalog.reading() as db:
            if state.base.sequence > self._state.base.sequence:
                self._reread_manifest()
                self._state = replayed(db, state)

    def _reread_manifest(self) -> None:
        self.manifest = read_manifest(self.path)
        self._pictures = self._open_pictures()

    # Checking

    def verify(self) -> list[str]:
        """Read everything and compare it with its checksums: catalogue, snapshots, pictures, encoder.

        Returns:
            One sentence per problem; an empty list when all is well.
        """
        problems = check(
            self.path,
            catalog=self._catalog,
            snapshots=self._snapshots,
            pictures=self._pictures,
            fingerprint=self.fingerprint,
        )
        with suppress(DamagedFile, StorageError), self._moment() as (db, state):
            count = sql.count_items(db)
            if count != len(state):
                problems.append(f"the index holds {len(state)} items and the catalogue {count}")
        return problems


def bytes_below(folder: Path) -> int:
    """What the files of a folder take; files that come and go meanwhile may count or not."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
