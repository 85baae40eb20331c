"""A collection as it is now: manifest, catalogue, pictures and the state that is searched, of one moment."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dml.collection import catalog as sql
from dml.collection.base import CollectionInfo, Figures, NewItem, Picture
from dml.collection.catalog import Catalog, Change, Written
from dml.collection.derive import build_snapshot
from dml.collection.following import from_catalog, from_nothing, replayed
from dml.collection.generation import Generation, Snapshot
from dml.collection.lock import LOCK, WriterLock
from dml.collection.manifest import FILE as MANIFEST
from dml.collection.manifest import FORMAT, Manifest, promise_of, read_manifest, write_manifest
from dml.collection.pictures import Pictures
from dml.collection.snapshots import Snapshots, which_file
from dml.errors import (
    CollectionError,
    DamagedFile,
    MissingExtra,
    ModelMismatch,
    ReadOnly,
    StorageError,
    UnknownCollection,
)
from dml.index.base import Vectors

log = logging.getLogger(__name__)

PATIENCE = 20
"""How often a search tries to meet a moment between two writes before it asks the writers to wait."""


class Present:
    """What writers change and searches see. Writers swap the next state in; a reader's own one follows.

    Args:
        path: of the collection's folder.
        fingerprint: of the encoder that the caller has; None: it does not say.
        device: where the index is loaded.

    Raises: as `dml.collection.open_collection`.
    """

    _manifest_file: tuple[int, ...] | None = None
    """Which manifest.json a reader has read last; see `which_file`."""

    def __init__(self, path: Path, *, read_only: bool, fingerprint: str | None, device: str) -> None:
        self.path, self.read_only, self.device = path, read_only, device
        self.manifest = read_manifest(path)
        self.check_fingerprint(fingerprint)
        self.changed: Callable[[], None] = lambda: None
        """Called when there may be more pending than before; it must not wait for anything."""
        self.lock = threading.RLock()
        """Held while writing, and by a reader while it catches up."""
        self._closed = False
        self._writer_lock = None if read_only else WriterLock(path / LOCK)
        try:
            if not read_only:
                self.manifest = read_manifest(path)  # another writer may have changed it before it let go
                self.check_fingerprint(fingerprint)
                sql.migrate(path / sql.FILE)
            own = self.manifest
            self.snapshots = Snapshots(
                path, fingerprint=own.fingerprint, dim=own.dim, device=device, read_only=read_only
            )
            self.catalog = Catalog(path / sql.FILE, dim=own.dim, read_only=read_only)
            try:
                self._remember_manifest()
                self.pictures = self._open_pictures()
                self.state = self._open_state()
            except BaseException:
                self.catalog.close()
                raise
        except BaseException:
            if self._writer_lock is not None:
                self._writer_lock.release()
            raise

    def close(self, before: Callable[[], None]) -> None:
        """Let go of the files and the lock, once; `before` is called first, while nobody writes."""
        with self.lock:
            if self._closed:
                return
            self._closed = True
            before()
            self.catalog.close()
            if self._writer_lock is not None:
                self._writer_lock.release()

    # What it is

    def check_fingerprint(self, fingerprint: str | None) -> None:
        """See `LocalCollection.check_fingerprint`."""
        own = self.manifest.fingerprint
        if fingerprint is not None and fingerprint != own:
            raise ModelMismatch(
                f"The collection in {self.path} was made by the encoder {own[:12]}, and this "
                f"encoder is {fingerprint[:12]}: their vectors cannot be compared. Use the collection's own "
                f"encoder ({self.path / 'encoder'}), or build a collection with this one."
            )

    def info(self) -> CollectionInfo:
        """What there is to say about it."""
        with self.moment() as (_, state):
            return CollectionInfo(
                name=self.manifest.name,
                count=len(state),
                dim=self.manifest.dim,
                metric=self.manifest.metric,
                fingerprint=self.manifest.fingerprint,
                index=state.main.describe(),
                measured_recall=(state.base.measured or {}).get("recall_at_10"),
                generation=state.sequence,
                pending=state.pending,
                bytes_on_disk=bytes_below(self.path),
                manifest=json.loads((self.path / MANIFEST).read_text(encoding="utf-8")),
            )

    def figures(self) -> Figures:
        """What changes about it. Reads no item and no file."""
        with self.moment() as (_, state):
            written = None
            with suppress(OSError):  # none yet, or the writer has just replaced it
                written = self.snapshots.path(state.base.sequence).stat().st_mtime
            recall, holds = promise_of(self.manifest)
            return Figures(
                count=len(state),
                pending=len(state.delta),
                tombstones=state.base.dead + len(state.base.index) - len(state.main),
                generation=state.sequence,
                index=str(state.main.describe().get("kind", "unknown")),
                measured_recall=(state.base.measured or {}).get("recall_at_10"),
                promised_recall=recall,
                promise_holds=holds,
                index_written=written,
            )

    def _remember_manifest(self) -> None:
        """See to it that the catalogue knows the manifest, and that the manifest has a checksum."""
        if self.read_only:
            return
        with self.catalog.reading() as db:
            known = sql.read_fact(db, MANIFEST)
        if known is None or self.manifest.format < FORMAT:
            self.save_manifest(replace(self.manifest, format=FORMAT))

    def save_manifest(self, manifest: Manifest) -> None:
        """In a writer's turn. Raises StorageError."""
        self.catalog.remember(MANIFEST, asdict(manifest))
        write_manifest(self.path, manifest)
        moved, self.manifest = manifest.roots != self.manifest.roots, manifest
        if moved:
            self.pictures = self._open_pictures()

    def _open_pictures(self) -> Pictures:
        roots = {name: Path(root) for name, root in self.manifest.roots.items()}
        return Pictures(self.path, roots, read_only=self.read_only)

    # Changing it, in a writer's turn

    def put(self, items: Sequence[NewItem], vectors: Vectors, payloads: Sequence[str]) -> list[bool]:
        """Add or replace these, all or nothing, with their pictures; True where the id was new.

        Raises: as `LocalCollection.add`.
        """
        stored: list[str] = []
        try:
            changes = []
            for item, vector, payload in zip(items, vectors, payloads, strict=True):
                picture = self._take_picture(item)
                if picture is not None and picture.kind == "stored":
                    stored.append(picture.sha256)
                changes.append(Change(item.id, vector, payload, picture))
            written = self.catalog.put(changes)
        except BaseException:
            self.discard_unused(stored)
            raise
        self._follow(written)
        return written.created

    def remove(self, ids: Sequence[str]) -> int:
        """Forget these ids; how many were there. Raises StorageError."""
        written = self.catalog.remove(ids)
        self._follow(written)
        return len(written.removed)

    def _follow(self, written: Written) -> None:
        """Have searches see what is in the catalogue by now."""
        self.state = self.state.changed(
            written.sequence, rows=written.rows, vectors=written.vectors, removed=written.removed
        )
        self.pictures.discard(written.orphans)

    def _take_picture(self, item: NewItem) -> Picture | None:
        if item.image is not None:
            return self.pictures.store(item.image)
        return None if item.file is None else self.pictures.refer(item.file, item.sha256)

    def discard_unused(self, sha256s: list[str]) -> None:
        """Delete those of these stored pictures that no item uses."""
        try:
            with self.catalog.reading() as db:
                unused = sql.without_items(db, sha256s)
        except (StorageError, DamagedFile):
            return  # the next sweep finds them
        self.pictures.discard(unused)

    # Whose turn it is, and what is read together

    @contextmanager
    def turn(self) -> Iterator[Generation]:
        """The one writer's turn, with the state to start from. Raises ReadOnly, CollectionError."""
        if self.read_only:
            raise ReadOnly(f'The collection "{self.manifest.name}" was opened read-only.')
        with self.lock:
            if self._closed:
                raise CollectionError(f'The collection "{self.manifest.name}" has been closed.')
            try:
                yield self.state
            except BaseException:
                self._follow_own()
                raise

    def _follow_own(self) -> None:
        """Have searches see a change that was committed before its writer was interrupted."""
        with suppress(StorageError, DamagedFile), self.catalog.reading() as db:
            if sql.read_state(db)[0] != self.state.sequence:
                self.state = replayed(db, self.state)

    def open_state(self) -> Generation:
        """What the writer's own process searches now, read without the catalogue. Raises CollectionError."""
        if self._closed:
            raise CollectionError(f"The collection in {self.path} has been closed.")
        return self.state

    @contextmanager
    def moment(self) -> Iterator[tuple[Any, Generation]]:
        """A read transaction and the state of the same change."""
        for _ in range(PATIENCE):
            with self.catalog.reading() as db:
                sequence = sql.read_state(db)[0]
                state, file = self.state, sql.file_of(db)
                if self.read_only and (state.sequence < sequence or state.file != file):
                    if not self.catalog.is_current(db):
                        continue  # the next transaction is in the file that took its place
                    state = self._catch_up(db)
                if state.sequence == sequence and state.file == file:
                    yield db, state
                    return
            time.sleep(0.0005)  # a writer has committed and is about to swap
        with self.lock, self.catalog.reading() as db:
            yield db, self._catch_up(db) if self.read_only else self.state

    def hold(self, stack: ExitStack) -> tuple[Any, Generation]:
        """A read transaction of the present state, open until the stack is closed."""
        with self.lock:  # nobody writes between the transaction's beginning and the state
            db = stack.enter_context(self.catalog.reading())
            sql.read_state(db)
            return db, self._catch_up(db) if self.read_only else self.state

    # Opening and following

    def _open_state(self, overtakings: int = 5) -> Generation:
        """The newest whole snapshot, brought up to date from the catalogue.

        Args:
            overtakings: so many times a reader looks again, because the writer replaced what it was to read.
        """
        with self.catalog.reading() as db:
            base = self.load(db)
            if base is not None:
                return replayed(db, Generation.of(base, self.manifest.dim))
        if self.snapshots.overtaken and overtakings:
            return self._open_state(overtakings - 1)
        with self.catalog.reading() as db:
            return self._without_snapshot(db)

    def _without_snapshot(self, db: Any) -> Generation:
        if sql.count_items(db) and self.manifest.built:
            return self._rebuilt(db)
        return from_nothing(db, self.manifest.dim)

    def load(self, db: Any, *, newer_than: int = -1) -> Snapshot | None:
        """See `Snapshots.load`; a snapshot of the catalogue that took this one's place is overtaken, too."""
        base = self.snapshots.load(db, newer_than=newer_than)
        if base is not None and not self.catalog.is_current(db):
            self.snapshots.overtaken = True
            return None
        return base

    def _rebuilt(self, db: Any) -> Generation:
        """No snapshot can be used, though there was one: make it again, or search exactly meanwhile."""
        dim = self.manifest.dim
        if self.snapshots.unread:
            log.warning(
                "%s is searched exactly until its index can be read (by the dml that wrote it), or "
                "`dml index rebuild` has made a new one.",
                self.path,
            )
        elif not self.read_only:
            log.warning("the index of %s is built again from the catalogue", self.path)
            try:
                built = build_snapshot(
                    self.catalog, self.manifest.index, device=self.device, measure=False, seed=0
                )
                self.snapshots.save(built.snapshot)
                self.save_manifest(self.manifest.with_(built=built.about))
                return Generation.of(built.snapshot, dim)
            except (StorageError, MissingExtra) as error:
                log.warning("%s The collection is searched exactly until the index can be built.", error)
        return from_catalog(db, dim)

    def _catch_up(self, db: Any) -> Generation:
        """A reader's way to the moment of this transaction; keeps the newest state that it has seen.

        Raises:
            CollectionError: another collection has taken the place of this one.
        """
        with self.lock:
            state, (sequence, horizon) = self.state, sql.read_state(db)
            if state.file != sql.file_of(db) and not self.catalog.is_current(db):
                return from_catalog(
                    db, self.manifest.dim
                )  # of a file that is gone: for this transaction only
            if state.file != sql.file_of(db):
                # Another catalogue: its numbers may be smaller, and its rows are other items.
                self.follow_manifest()
                base, dim = self.load(db), self.manifest.dim
                state = self._without_snapshot(db) if base is None else Generation.of(base, dim)
                self.state = state = replayed(db, state)
            elif state.sequence < sequence:
                self.follow_manifest()
                if state.sequence < horizon:  # removals that the state has not seen are forgotten by now
                    base, dim = self.load(db, newer_than=state.base.sequence), self.manifest.dim
                    state = self._rebuilt(db) if base is None else Generation.of(base, dim)
                self.state = state = replayed(db, state)
        self.changed()
        return state

    def take_up(self, state: Generation) -> None:
        """A reader's state in the writer's newer index, if it is newer than what is searched.

        Not if the writer has merged on meanwhile and forgotten removals that this state has not seen: they
        would come back. There is a newer index then, to be taken up instead. And not if the catalogue has
        been replaced: what is searched then is made anew.
        """
        with self.lock, self.catalog.reading() as db:
            horizon = sql.read_state(db)[1]
            if self.state.file != sql.file_of(db):
                self._catch_up(db)
            elif (
                state.file == self.state.file
                and state.base.sequence > self.state.base.sequence
                and state.sequence >= horizon
            ):
                self.follow_manifest()
                self.state = replayed(db, state)

    def follow_manifest(self) -> bool:
        """Have a reader know what the writer says of the collection: its name, its roots. Whether it is new.

        One that cannot be read just now changes nothing; `verify` tells what is wrong with it.

        Raises:
            CollectionError: another collection has taken the place of this one.
        """
        with self.lock:
            file = which_file(self.path / MANIFEST)
            if not self.read_only or file == self._manifest_file:
                return False
            try:
                manifest = read_manifest(self.path)
            except (UnknownCollection, DamagedFile):
                return False
            if (manifest.fingerprint, manifest.dim) != (self.manifest.fingerprint, self.manifest.dim):
                raise CollectionError(
                    f"Another collection has taken the place of the one in {self.path}: its vectors were "
                    f"made by another encoder. Open it anew."
                )
            self._manifest_file, self.manifest = file, manifest
            self.pictures = self._open_pictures()
            return True


def bytes_below(folder: Path) -> int:
    """What the files of a folder take; files that come and go meanwhile may count or not."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
