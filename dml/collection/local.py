"""A collection in a folder: catalogue, pictures, and an index that is derived from the catalogue.

::

    manifest.json            what it is: dimension, encoder's fingerprint, roots, what the index was built as
    catalog.sqlite           the truth: ids, payloads, vectors, change sequence
    snapshots/<seq>.index    the index as of change <seq>; checksummed, may be deleted at any time
    images/  thumbnails/     see pictures.py
    encoder/                 the encoder that made the vectors, when it came along
    writer.lock              held by the one process that writes
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.collection import catalog as sql
from dml.collection.base import (
    CollectionInfo,
    Figures,
    FilterLike,
    Item,
    NewItem,
    Payload,
    Picture,
    SearchResult,
)
from dml.collection.catalog import KnownPicture
from dml.collection.cursors import Walks
from dml.collection.derive import Stop, never
from dml.collection.filters import parse_filter
from dml.collection.generation import Generation
from dml.collection.grouping import answer
from dml.collection.items import check_item, check_rows, check_unicode, encode_payload
from dml.collection.keeping import check
from dml.collection.known_items import KnownItems
from dml.collection.manifest import Manifest
from dml.collection.merging import MergeMode, check_mode
from dml.collection.payload_indexes import declared
from dml.collection.pictures import Pictures
from dml.collection.present import Present
from dml.collection.query import Query, Searcher, read_query
from dml.collection.row_sets import RowSets, items_in_order, matching_ids, with_vectors
from dml.collection.upkeep import Upkeep
from dml.data.ids import absolute
from dml.errors import (
    DamagedFile,
    FilterInvalid,
    ImageNotKept,
    StorageError,
    UnknownItem,
    UsageError,
)
from dml.index.base import Vectors, check_vectors
from dml.index.tune import Promise

CAPABILITIES = frozenset(
    {"exact", "verify", "pictures", "count", "filter", "group_by", "generation_cursor", "payload_index"}
)


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
        self.path = Path(path)
        self._present = Present(self.path, read_only=read_only, fingerprint=fingerprint, device=device)
        self._catalog = self._present.catalog
        self._row_sets, self._known = RowSets(), KnownItems()
        self._remembers, self._memory_lock = self._present.state.file, threading.Lock()
        self._walks = Walks(
            self._present.hold, self._row_sets, known=self._known, file=self._present.state.file
        )
        self._upkeep = Upkeep(self._present, merge=merge)

    # What it is

    @property
    def read_only(self) -> bool:
        return self._present.read_only

    @property
    def manifest(self) -> Manifest:
        return self._present.manifest

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
        return self._present.state.sequence

    @property
    def wants_merge(self) -> bool:
        """Whether so many changes are pending that searches become noticeably slower.

        Never while there is an index that this process cannot read: nobody replaces that unasked.
        """
        return self._upkeep.wants_merge

    @property
    def encoder_path(self) -> Path | None:
        """The encoder's folder inside the collection, when it came along."""
        folder = self.path / "encoder"
        return folder if (folder / "manifest.json").is_file() else None

    def capabilities(self) -> frozenset[str]:
        return CAPABILITIES

    def check_fingerprint(self, fingerprint: str | None) -> None:
        """Refuse vectors of another encoder. None: the caller does not say. Raises ModelMismatch."""
        self._present.check_fingerprint(fingerprint)

    def __len__(self) -> int:
        with self._present.moment() as (_, state):
            return len(state)

    def info(self) -> CollectionInfo:
        return self._present.info()

    def figures(self) -> Figures:
        return self._present.figures()

    def close(self) -> None:
        """Let go of the files and the lock. Everything acknowledged is already on the disk.

        A merge that is under way is given up; the next opening goes on with what is pending.
        """
        self._upkeep.close()
        self._present.close(before=self._walks.close)

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
        with self._write():
            return self._present.put(batch, vectors, payloads)

    def delete(self, ids: Sequence[str]) -> int:
        """Forget these ids; durable on return. How many were there.

        Raises:
            UsageError: text that no id can be, for it is not Unicode; before anything is forgotten.
            StorageError, ReadOnly
        """
        for id in ids:
            check_unicode(id)
        with self._write():
            return self._present.remove(ids)

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
            self._present.state = replace(state, sequence=sequence)
            return item

    def rename(self, name: str) -> None:
        """Call it by another name; its folder stays. Raises UsageError, ReadOnly, StorageError."""
        if not name.strip():
            raise UsageError("a collection needs a name")
        with self._present.turn():
            self._present.save_manifest(self.manifest.with_(name=name))

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
            roots = {**self.manifest.roots, name: str(absolute(Path(folder)))}
            self._present.save_manifest(self.manifest.with_(roots=roots))

    def set_encoder_info(self, info: Mapping[str, Any]) -> None:
        """Say anew what is known about the encoder. Raises ReadOnly, StorageError."""
        with self._write():
            self._present.save_manifest(self.manifest.with_(encoder=dict(info)))

    @contextmanager
    def _write(self) -> Iterator[Generation]:
        """The one writer's turn, with the state to start from; afterwards a merge may be due."""
        self._walks.sweep()
        with self._present.turn() as state:
            yield state
        self._present.changed()

    # Reading

    def get(self, ids: Sequence[str], *, with_vector: bool = False) -> list[Item]:
        with self._present.moment() as (db, _):
            found = sql.items_by_id(db, ids)
            missing = [id for id in ids if id not in found]
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise UnknownItem(f'There is no item "{missing[0]}"{more} in the collection "{self.name}".')
            return with_vectors(db, [found[id] for id in ids], with_vector)

    def find(self, ids: Sequence[str]) -> dict[str, Item]:
        """id -> item, for those of these ids that are there."""
        with self._present.moment() as (db, _):
            return {id: item for id, (_, item) in sql.items_by_id(db, ids).items()}

    def count(self, filter: FilterLike | None = None) -> int:
        asked = parse_filter(filter)
        with self._present.moment() as (db, state):
            return len(self._memory(state)[0].rows(db, asked)) if asked else len(state)

    def known_pictures(self) -> Iterator[KnownPicture]:
        """Every item with a picture, in the order in which they were written: which bytes have a vector."""
        with self._present.moment() as (db, _):
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
        with self._present.moment() as (db, _):
            found = items_in_order(db, asked, after=after, limit=limit + 1)
            items = with_vectors(db, found[:limit], with_vector)
            return items, items[-1].id if len(found) > limit else None

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
        return self._answer(queries, query)

    def _answer(self, queries: Vectors, query: Query) -> list[SearchResult]:
        """One result per query (Q, D), all of one generation.

        Where the index and the items that are known by now say everything, the catalogue is not asked: a
        transaction takes as long as a search. A reader has to ask it for changes of the writer all the same.
        """
        rankings, searcher = None, partial(self._searcher, query=query)
        before = None if self.read_only or query.asks_catalog else self._present.open_state()
        if before is not None:
            at_hand = searcher(None, before)
            rankings = at_hand.ranked(queries, query.offset + query.limit)
            results = at_hand.remembered(rankings)
            if results is not None:
                return results
        with self._present.moment() as (db, state):
            if before is None or rankings is None or before.sequence != state.sequence:
                return answer(searcher(db, state), queries)
            return searcher(db, before).pages(rankings)

    def _searcher(self, db: Any, state: Generation, *, query: Query) -> Searcher:
        row_sets, known = self._memory(state)
        return Searcher(db, state, query, row_sets=row_sets, known=known)

    def _memory(self, state: Generation) -> tuple[RowSets, KnownItems]:
        """What is remembered of filters and items; nothing of a catalogue whose place another one took."""
        with self._memory_lock:
            if state.file != self._remembers:
                self._remembers, self._row_sets, self._known = state.file, RowSets(), KnownItems()
            return self._row_sets, self._known

    @property
    def _pictures(self) -> Pictures:
        return self._present.pictures

    def picture(self, id: str) -> bytes:
        picture = self._picture_of(id)
        return self._shown(lambda pictures: pictures.read(picture, id))

    def thumbnail(self, id: str, size: int = 256) -> bytes:
        picture = self._picture_of(id)
        return self._shown(lambda pictures: pictures.thumbnail(picture, id, size))

    def _shown(self, read: Callable[[Pictures], bytes]) -> bytes:
        """What is read where the roots are; a reader looks once more where the writer says they are now."""
        try:
            return read(self._pictures)
        except ImageNotKept:
            if not self._present.follow_manifest():
                raise
        return read(self._pictures)

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
        return self._upkeep.build_index(
            kind, options=options, measure=measure, seed=seed, promise=promise, say=say, stop=stop
        )

    def merge(self) -> dict[str, Any]:
        """Fold the pending changes into the main index now, and return when it is done.

        Rows are added to a copy of the index; where that would make a poor one (see
        `merging.why_build_anew`), it is built anew. Searches and writes go on meanwhile. With merge="auto"
        this happens by itself when it is due.

        Returns:
            What is kept in the manifest as "built".

        Raises: as `build_index`; the collection goes on with the index that it had.
        """
        return self._upkeep.merge()

    def settle(self) -> None:
        """Wait until no merge is due or under way, or until it has failed and is to be tried again later."""
        self._upkeep.settle()

    # Checking

    def verify(self) -> list[str]:
        """Read everything and compare it with its checksums: catalogue, snapshots, pictures, encoder.

        Returns:
            One sentence per problem; an empty list when all is well.
        """
        problems = check(
            self.path,
            catalog=self._catalog,
            snapshots=self._present.snapshots,
            pictures=self._pictures,
            fingerprint=self.fingerprint,
        )
        with suppress(DamagedFile, StorageError), self._present.moment() as (db, state):
            count = sql.count_items(db)
            if count != len(state):
                problems.append(f"the index holds {len(state)} items and the catalogue {count}")
        return problems
