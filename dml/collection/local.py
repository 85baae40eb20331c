"""A collection in a folder: catalogue, pictures, and an index that is derived from the catalogue.

::

    manifest.json            what it is: dimension, encoder's fingerprint, roots, what the index was built as
    catalog.sqlite           the truth: ids, payloads, vectors, change sequence
    snapshots/<seq>.index    the index as of change <seq>; checksummed, may be deleted at any time
    images/  thumbnails/     see pictures.py
    encoder/                 the encoder that made the vectors, when it came along
    writer.lock              held by the one process that writes
"""

import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dml.collection import catalog as sql
from dml.collection.base import CollectionInfo, Hit, Item, NewItem, Payload, Picture, SearchResult
from dml.collection.catalog import Catalog, Change
from dml.collection.generation import Generation, Snapshot
from dml.collection.lock import LOCK, WriterLock
from dml.collection.manifest import FILE as MANIFEST
from dml.collection.manifest import Manifest, read_manifest, write_manifest
from dml.collection.measure import HeldOut, hold_out, measure_recall, training_sample
from dml.collection.pictures import Pictures, make_folder
from dml.data.ids import id_problem
from dml.errors import (
    CollectionError,
    ConfigError,
    DamagedFile,
    DimensionMismatch,
    ImageNotKept,
    MissingExtra,
    ModelMismatch,
    ReadOnly,
    StorageError,
    UnknownItem,
    UsageError,
    VectorError,
)
from dml.index import KINDS, check_options, choose_kind, load_index, make_index
from dml.index.base import VectorIndex, Vectors, check_vectors
from dml.index.file import FORMAT, MAGIC, PREFIX, check_index_file, read_header
from dml.registry import resolve, unknown
from dml.storage import ASIDE

log = logging.getLogger(__name__)

CATALOG = "catalog.sqlite"
SNAPSHOTS = "snapshots"
KEPT_SNAPSHOTS = 2
PATIENCE = 20
"""How often a search tries to meet a moment between two writes before it asks the writers to wait."""
REBUILD_SHARE = 0.1
REBUILD_ROWS = 1_000
"""A build is worth it when more changes are pending than both of these say."""
ADOPT_SHARE = 0.1
ADOPT_ROWS = 10_000
"""A reader takes up a writer's new snapshot when its own delta holds more rows than both of these say."""


def create_local(
    path: Path,
    *,
    dim: int,
    fingerprint: str,
    name: str | None,
    index: str,
    options: Mapping[str, Any],
    roots: Mapping[str, str | Path],
    encoder_info: Mapping[str, Any],
    device: str,
) -> "LocalCollection":
    """See `dml.collection.create_collection`."""
    if dim < 1:
        raise ConfigError(f"a collection needs vectors of at least 1 number, got dim {dim}")
    check_kind(index)
    check_options(index, options)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CollectionError(f"{path} is not an empty folder; give a new one, or open what is there.")
    manifest = Manifest(
        name=name or path.resolve().name,
        dim=dim,
        fingerprint=fingerprint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        index={"kind": index, "options": dict(options)},
        roots={key: str(Path(root).absolute()) for key, root in roots.items()},
        encoder=dict(encoder_info),
    )
    new = not path.exists()
    try:
        make_folder(path)
        make_folder(path / SNAPSHOTS)
        Catalog.create(path / CATALOG, dim=dim).close()
        write_manifest(path, manifest)  # last: a folder with a manifest is a whole collection
    except StorageError:
        for child in [path] if new else path.iterdir():
            shutil.rmtree(child, ignore_errors=True) if child.is_dir() else child.unlink()
        raise
    return LocalCollection(path, device=device)


def check_kind(kind: str) -> None:
    """Refuse an index kind that cannot be one. Raises ConfigError."""
    if kind != "auto" and kind not in KINDS and ":" not in kind:
        raise ConfigError(unknown("index kind", kind, {"auto": "", **KINDS}))


class LocalCollection:
    """See `dml.collection.base.Collection`, and `dml.collection.open_collection` for the arguments.

    Safe to use from several threads. A search sees one generation from start to end: it holds on to an
    immutable state and reads items in a transaction of the same moment. Writers swap the next state in.
    """

    def __init__(
        self, path: Path, *, read_only: bool = False, fingerprint: str | None = None, device: str = "auto"
    ) -> None:
        self.path, self.read_only, self.device = Path(path), read_only, device
        self.manifest = read_manifest(self.path)
        self.check_fingerprint(fingerprint)
        self._lock = threading.RLock()  # writing, and for a reader: catching up
        self._building = threading.Lock()
        self._closed = False
        self._unread: list[Path] = []
        """Snapshots that may be sound, and that this process cannot read: nobody replaces them unasked."""
        self._writer_lock = None if read_only else WriterLock(self.path / LOCK)
        try:
            if not read_only:
                sql.migrate(self.path / CATALOG)
            self._catalog = Catalog(self.path / CATALOG, dim=self.dim, read_only=read_only)
            try:
                self._pictures = self._open_pictures()
                self._state = self._open_state()
            except BaseException:
                self._catalog.close()
                raise
        except BaseException:
            if self._writer_lock is not None:
                self._writer_lock.release()
            raise

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
    def wants_rebuild(self) -> bool:
        """Whether so much has changed since the index was built that searches become noticeably slower."""
        state = self._state
        return state.pending > max(REBUILD_ROWS, REBUILD_SHARE * len(state))

    @property
    def encoder_path(self) -> Path | None:
        """The encoder's folder inside the collection, when it came along."""
        folder = self.path / "encoder"
        return folder if (folder / "manifest.json").is_file() else None

    def capabilities(self) -> frozenset[str]:
        return frozenset({"exact", "verify", "pictures", "count"})

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
        """Let go of the files and the lock. Everything acknowledged is already on the disk."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
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
        payloads = [self._check_item(item) for item in batch]
        vectors = self._check_rows([item.vector for item in batch])
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

    def set_root(self, name: str, folder: str | Path) -> None:
        """Say where the referenced pictures of the root `name` are now. Raises ReadOnly, StorageError."""
        with self._write():
            roots = {**self.manifest.roots, name: str(Path(folder).absolute())}
            self._save_manifest(self.manifest.with_(roots=roots))
            self._pictures = self._open_pictures()

    @contextmanager
    def _write(self) -> Iterator[Generation]:
        """The one writer's turn, with the state to start from."""
        if self.read_only:
            raise ReadOnly(f'The collection "{self.name}" was opened read-only.')
        with self._lock:
            self._check_open()
            yield self._state

    def _check_open(self) -> None:
        if self._closed:
            raise CollectionError(f'The collection "{self.name}" has been closed.')

    def _check_item(self, item: NewItem) -> str:
        """The payload as JSON, after checking everything but the vector."""
        check_id(item.id)
        if item.image is not None and item.file is not None:
            raise UsageError(
                f'Item "{item.id}" has both image and file; give the bytes or the path, not both.'
            )
        return encode_payload(item.payload, item.id)

    def _check_rows(self, vectors: list[NDArray[np.float32]]) -> Vectors:
        """(N, D) float32. Names the first vector that is not fit."""
        if not vectors:
            return np.empty((0, self.dim), np.float32)
        for position, vector in enumerate(vectors):
            if np.ndim(vector) != 1:
                raise VectorError(
                    f"vector {position} to add is an array of shape {np.shape(vector)}, not a row"
                )
            if len(vector) != self.dim:
                raise DimensionMismatch(self.dim, len(vector), f"vector {position} to add")
        return check_vectors(np.stack(vectors), self.dim, "the vectors to add")

    def _take_picture(self, item: NewItem) -> Picture | None:
        if item.image is not None:
            return self._pictures.store(item.image)
        return None if item.file is None else self._pictures.refer(item.file)

    def _discard_unused(self, sha256s: list[str]) -> None:
        """After a write that failed: pictures that it stored and nobody else uses."""
        try:
            with self._catalog.reading() as db:
                unused = sql.without_items(db, sha256s)
        except (StorageError, DamagedFile):
            return  # the next sweep finds them
        self._pictures.discard(unused)

    def _save_manifest(self, manifest: Manifest) -> None:
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

    def scroll(
        self, *, after: str | None = None, limit: int = 100, with_vector: bool = False
    ) -> tuple[list[Item], str | None]:
        if limit < 1:
            raise UsageError(f"limit must be at least 1, got {limit}")
        with self._moment() as (db, _):
            found = sql.items_from(db, after, limit + 1)
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
    ) -> list[SearchResult]:
        if limit < 1 or offset < 0 or (effort is not None and effort < 1):
            raise UsageError(
                f"limit and effort must be at least 1 and offset at least 0, "
                f"got limit={limit}, offset={offset}, effort={effort}"
            )
        queries = check_vectors(vectors, self.dim, "the query")
        hidden = set(exclude)
        with self._moment() as (db, state):
            wanted = min(offset + limit + len(hidden), max(1, len(state)))
            found = state.search(queries, wanted, effort=effort, exact=exact)
            rows = np.unique(found.ids[found.ids >= 0])
            items = sql.items_by_row(db, rows.tolist())
            stored = sql.vectors_of(db, rows.tolist()) if with_vector else {}
        results = []
        for ids, scores in zip(found.ids.tolist(), found.scores.tolist(), strict=True):
            hits: list[Hit] = []
            for row, score in zip(ids, scores, strict=True):
                if row < 0 or (score_threshold is not None and score < score_threshold):
                    break
                item = items[row]
                if item.id not in hidden:
                    shown = replace(item, vector=stored[row]) if with_vector else item
                    hits.append(Hit(item.id, min(1.0, max(-1.0, score)), len(hits) + 1, shown))
            results.append(
                SearchResult(hits[offset : offset + limit], state.sequence, state.approximate and not exact)
            )
        return results

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
    ) -> dict[str, Any]:
        """Build the main index anew from the catalogue, save it, and search it from now on.

        Searches and writes go on meanwhile; what is written during the build is in the delta afterwards.

        Args:
            kind: "auto" or a key of `dml.index.KINDS`; None: as the manifest says. Kept in the manifest.
            options: of that kind; None: as the manifest says when the kind stays the same.
            measure: measure recall@10 with held-out queries against exact search, and keep the figure.
            seed: chooses the held-out queries.

        Returns:
            What is kept in the manifest as "built".

        Raises:
            ConfigError, MissingExtra: a kind or options that cannot be had.
            StorageError: no room for the snapshot; the collection goes on with the index that it had.
            ReadOnly: opened for reading.
        """
        with self._write():
            asked = self.manifest.index
        if kind is not None:
            check_kind(kind)
        same: Mapping[str, Any] = asked["options"] if kind in (None, asked["kind"]) else {}
        wanted = {"kind": kind or asked["kind"], "options": dict(same if options is None else options)}
        check_options(wanted["kind"], wanted["options"])
        with self._building:
            base, built = self._build(wanted, measure=measure, seed=seed)
            with self._write(), self._catalog.reading() as db:
                self._state = self._replayed(db, Generation.of(base, self.dim))
                self._save_manifest(self.manifest.with_(index=wanted, built=built))
            self._clean_up()
        return built

    def _build(
        self, wanted: Mapping[str, Any], *, measure: bool, seed: int
    ) -> tuple[Snapshot, dict[str, Any]]:
        started = time.monotonic()
        with self._catalog.reading() as db:
            sequence, count, last = sql.read_state(db)[0], sql.count_items(db), sql.last_row(db)
            kind = wanted["kind"] if wanted["kind"] != "auto" else choose_kind(count)
            index = make_index(kind, self.dim, device=self.device, **wanted["options"])
            held = hold_out(db, count, seed=seed) if measure and not index.exact else np.empty(0, np.int64)
            kept = fill(index, db, count=count, held=held, dim=self.dim)
        measured = measure_recall(index, kept.vectors) if measure else None
        index.add(kept.rows, kept.vectors)
        built = {
            **index.describe(),
            "sequence": sequence,
            "count": count,
            "seconds": round(time.monotonic() - started, 3),
            "measured": measured,
        }
        note = {"sequence": sequence, "last_row": last, "fingerprint": self.fingerprint, "measured": measured}
        index.save(self._snapshot_path(sequence), note=note)
        log.info("built %s over %d items in %.1f s", kind, count, built["seconds"])
        return Snapshot(index, sequence, last, measured), built

    def _snapshot_path(self, sequence: int) -> Path:
        return self.path / SNAPSHOTS / f"{sequence:012d}.index"

    def _snapshots(self) -> list[Path]:
        """Newest first."""
        return sorted((self.path / SNAPSHOTS).glob("*.index"), reverse=True)

    def _clean_up(self) -> None:
        """Drop old snapshots, the log of removals that only they needed, and unused pictures."""
        with self._write():
            snapshots = self._snapshots()
            for path in snapshots[KEPT_SNAPSHOTS:]:
                path.unlink(missing_ok=True)
            for leftover in (self.path / SNAPSHOTS).glob(f".*{ASIDE}"):
                leftover.unlink(missing_ok=True)
            if len(snapshots) >= KEPT_SNAPSHOTS:
                self._catalog.forget_removed(int(snapshots[KEPT_SNAPSHOTS - 1].stem))
            with self._catalog.reading() as db:
                used = sql.stored_pictures(db)
            self._pictures.sweep(used)

    # Opening and following

    def _open_pictures(self) -> Pictures:
        roots = {name: Path(root) for name, root in self.manifest.roots.items()}
        return Pictures(self.path, roots, read_only=self.read_only)

    def _open_state(self) -> Generation:
        """The newest whole snapshot, brought up to date from the catalogue."""
        with self._catalog.reading() as db:
            base = self._load_snapshot(db)
            if base is None and sql.count_items(db) and self.manifest.built:
                return self._rebuilt(db)
            return self._replayed(db, Generation.of(base or self._nothing(), self.dim))

    def _nothing(self) -> Snapshot:
        """An empty index as of before the first change: everything is in the delta."""
        return Snapshot(make_index("flat", self.dim), 0, 0)

    def _load_snapshot(self, db: Any) -> Snapshot | None:
        """The newest snapshot that is whole and fits the catalogue; None when there is none.

        Only what has shown to be damaged is deleted: its length or a checksum is wrong, in a format that is
        known. What a newer dml wrote, or what cannot be read just now, is passed over and stays.
        """
        sequence, horizon = sql.read_state(db)
        self._unread = []
        for path in self._snapshots():
            try:
                header = read_header(path)
                note, origin = header.note, (header.note.get("fingerprint"), header.dim)
                if origin != (self.fingerprint, self.dim) or not horizon <= note["sequence"] <= sequence:
                    log.warning("%s does not belong to this state of the catalogue; passed over", path)
                    continue
                check_kind_of(path, header.kind)
                index = load_index(path, device=self.device)
                return Snapshot(index, note["sequence"], note["last_row"], note.get("measured"))
            except (DamagedFile, OSError, KeyError) as error:
                log.warning("%s; passed over, nothing is lost: the catalogue has everything", error)
                if not is_damage(path, error):
                    self._unread.append(path)
                elif not self.read_only:
                    path.unlink(missing_ok=True)
            except MissingExtra as error:
                log.warning("%s Until then this collection is searched exactly, with numpy.", error)
                return None
        return None

    def _rebuilt(self, db: Any) -> Generation:
        """No snapshot can be used, though there was one: make it again, or search exactly meanwhile."""
        if self._unread:
            log.warning(
                "%s is searched exactly until its index can be read (by the dml that wrote it), or "
                "`dml index rebuild` has made a new one.",
                self.path,
            )
        elif not self.read_only:
            log.warning("the index of %s is built again from the catalogue", self.path)
            try:
                base, built = self._build(self.manifest.index, measure=False, seed=0)
                self._save_manifest(self.manifest.with_(built={**built, "measured": None}))
                return Generation.of(base, self.dim)
            except (StorageError, MissingExtra) as error:
                log.warning("%s The collection is searched exactly until the index can be built.", error)
        index = make_index("flat", self.dim)
        fill(index, db, count=sql.count_items(db), held=np.empty(0, np.int64), dim=self.dim)
        return Generation.of(Snapshot(index, sql.read_state(db)[0], sql.last_row(db)), self.dim)

    def _replayed(self, db: Any, state: Generation) -> Generation:
        """The state after all changes that the catalogue holds."""
        sequence = sql.read_state(db)[0]
        last = int(state.delta.rows.ids.max()) if len(state.delta.rows) else state.base.last_row
        removed = sql.removed_after(db, state.sequence)
        none = np.empty(0, np.int64)
        state = state.changed(
            sequence, rows=none, vectors=np.empty((0, self.dim), np.float32), removed=removed
        )
        for rows, vectors in sql.rows_after(db, last, dim=self.dim):
            state = state.changed(sequence, rows=rows, vectors=vectors, removed=none)
        return state

    def _catch_up(self, db: Any) -> Generation:
        """A reader's way to the moment of this transaction; keeps the newest state that it has seen."""
        with self._lock:
            state, (sequence, horizon) = self._state, sql.read_state(db)
            if state.sequence < sequence:
                outgrown = len(state.delta) > max(ADOPT_ROWS, ADOPT_SHARE * len(state.main))
                if state.sequence < horizon or outgrown:
                    self.manifest = read_manifest(self.path)
                    self._pictures = self._open_pictures()
                    base = self._load_snapshot(db)
                    if base is not None and base.sequence > state.base.sequence:
                        state = Generation.of(base, self.dim)
                    elif state.sequence < horizon:
                        state = self._rebuilt(db)
                self._state = self._replayed(db, state)
            return self._state

    # Checking

    def verify(self) -> list[str]:
        """Read everything and compare it with its checksums: catalogue, snapshots, pictures, encoder.

        Returns:
            One sentence per problem; an empty list when all is well.
        """
        problems = self._catalog.check()
        for path in self._snapshots():
            try:
                check_index_file(path)
            except DamagedFile as error:
                problems.append(str(error))
        try:
            with self._catalog.reading() as db:
                pictures = list(sql.all_pictures(db))
                count = sql.count_items(db)
        except (DamagedFile, StorageError) as error:
            return [*problems, str(error)]
        checked: dict[tuple[str, str | None, str | None], str | None] = {}
        for id, picture in pictures:
            key = (picture.sha256, picture.root, picture.path)
            if key not in checked:
                checked[key] = self._pictures.damaged(picture, id)
                if checked[key]:
                    problems.append(str(checked[key]))
        if count != len(self):
            problems.append(f"the index holds {len(self)} items and the catalogue {count}")
        return [*problems, *self._check_encoder()]

    def _check_encoder(self) -> list[str]:
        folder = self.encoder_path
        if folder is None:
            return []
        try:
            found = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("fingerprint")
        except (OSError, ValueError, AttributeError) as error:
            return [f"{folder / 'manifest.json'} cannot be read: {error}"]
        if found != self.fingerprint:
            return [f"the encoder in {folder} is {found}, and the collection was made by {self.fingerprint}"]
        return []


def fill(index: VectorIndex, db: Any, *, count: int, held: NDArray[np.int64], dim: int) -> HeldOut:
    """Add all rows of the catalogue to an index but the held-out ones, and return those."""
    none = np.empty((0, dim), np.float32)
    index.prepare(training_sample(db, without=held, dim=dim) if index.learns else none, count)
    rows, vectors = [np.empty(0, np.int64)], [np.empty((0, dim), np.float32)]
    for block_rows, block_vectors in sql.rows_after(db, 0, dim=dim, block=16_384):
        out = np.isin(block_rows, held)
        rows.append(block_rows[out])
        vectors.append(block_vectors[out])
        index.add(block_rows[~out], block_vectors[~out])
    return HeldOut(np.concatenate(rows), np.concatenate(vectors))


def check_kind_of(path: Path, kind: str) -> None:
    """Refuse a snapshot of an index kind that cannot be had here. Raises DamagedFile."""
    try:
        resolve("index kind", kind, KINDS)
    except ConfigError as error:
        raise DamagedFile(f"{path} cannot be read here: {error}") from error


def is_damage(path: Path, error: Exception) -> bool:
    """Whether a snapshot has shown to be broken for good: by its length or a checksum, in a known format."""
    if not isinstance(error, DamagedFile) or isinstance(error.__cause__, OSError | ConfigError):
        return False
    try:
        with open(path, "rb") as file:
            prefix = file.read(PREFIX.size)
            if len(prefix) < PREFIX.size or not prefix.startswith(MAGIC):
                return True
            _, offset, length, digest = PREFIX.unpack(prefix)
            file.seek(offset)
            encoded = file.read(length)
    except (FileNotFoundError, OverflowError, MemoryError):  # a length that no file has
        return True
    except OSError:
        return False
    return hashlib.sha256(encoded).digest() != digest or json.loads(encoded).get("format", 0) <= FORMAT


def bytes_below(folder: Path) -> int:
    """What the files of a folder take; files that come and go meanwhile may count or not."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def check_id(id: str) -> None:
    """Refuse what cannot be an id: not text, empty, too long, control characters. Raises UsageError."""
    problem = id_problem(id) if isinstance(id, str) else f"an item's id must be text, got {id!r:.80}"
    if problem is not None:
        raise UsageError(problem)


def check_unicode(id: str) -> None:
    """Refuse bytes that are no UTF-8, as a shell may pass them. Raises UsageError."""
    try:
        id.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"an item's id is Unicode text, got {id!r:.80}, which is not (bytes that are no UTF-8?)"
        ) from None


def encode_payload(payload: Payload, id: str) -> str:
    """The payload as JSON text. Raises UsageError for what JSON cannot say."""
    try:
        return json.dumps(dict(payload), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UsageError(f'The payload of item "{id}" cannot be written as JSON: {error}') from None
