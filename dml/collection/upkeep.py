"""The main index of a collection is kept in shape: built, merged with what is pending, taken up."""

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from dml.collection import catalog as sql
from dml.collection.derive import Built, Stop, Stopped, build_snapshot, check_kind, extend_snapshot, never
from dml.collection.following import replayed
from dml.collection.generation import Generation
from dml.collection.merging import Background, MergeMode, is_due, why_build_anew
from dml.collection.present import Present
from dml.collection.promised import build_promised, with_promise
from dml.errors import ConfigError, DamagedFile, StorageError
from dml.index import check_options
from dml.index.tune import Promise

log = logging.getLogger(__name__)

MEASURE_SECONDS = 10.0
"""A merge measures the recall with as many queries as can be compared with everything in so long."""

SWEEP_SECONDS = 1.0
"""So long a merge looks for pictures that nobody uses: a large collection is swept by several, one after the
other."""


class Upkeep:
    """Makes the main index of a collection, by request and in the background, and has it searched.

    Searches and writes go on meanwhile: they wait only for the moment at which the new index takes over.

    Args:
        present: the collection as it is; its `changed` wakes the background from now on.
        merge: whether a writer merges by itself. A reader takes up what the writer has merged.
    """

    def __init__(self, present: Present, *, merge: MergeMode) -> None:
        self._present = present
        self._building = threading.Lock()
        self._background = (
            Background("following the writer", due=self._newer_index, work=self._adopt)
            if present.read_only
            else Background("merging", due=lambda: merge == "auto" and self.wants_merge, work=self._merge_due)
        )
        present.changed = self._background.wake
        self._background.wake()

    def close(self) -> None:
        """Give up what is under way."""
        self._background.close()

    @property
    def wants_merge(self) -> bool:
        """Whether so many changes are pending that searches become noticeably slower.

        Never while there is an index that this process cannot read: nobody replaces that unasked.
        """
        return is_due(self._present.state) and not self._present.snapshots.unread

    # By request

    def build_index(
        self,
        kind: str | None,
        *,
        options: Mapping[str, Any] | None,
        measure: bool,
        seed: int,
        promise: Promise | None,
        say: Callable[[str], None],
        stop: Stop,
    ) -> dict[str, Any]:
        """See `LocalCollection.build_index`."""
        with self._present.turn():
            wanted, promise = wished(self._present.manifest.index, kind, options, promise)
        catalog, device = self._present.catalog, self._present.device
        with self._background.paused(), self._building:
            if promise is None:
                built = build_snapshot(catalog, wanted, device=device, measure=measure, seed=seed, stop=stop)
            else:
                built = build_promised(catalog, promise, device=device, seed=seed, stop=stop, say=say)
            about = self._install(built, wanted)
        self._sweep()
        return about

    def merge(self) -> dict[str, Any]:
        """See `LocalCollection.merge`."""
        with self._present.turn():
            pass
        with self._background.paused(), self._building:
            if not self._present.state.pending and self._present.manifest.built:
                return dict(self._present.manifest.built)
            about = self._merge(never)
        self._sweep_some(never)
        return about

    def settle(self) -> None:
        """See `LocalCollection.settle`."""
        self._background.wake()
        self._background.wait()

    # In the background

    def _merge_due(self, stop: Stop) -> None:
        with self._building:
            if not self.wants_merge:
                return
            self._merge(stop)
        self._sweep_some(stop)

    def _newer_index(self) -> bool:
        """Whether a reader's own delta has grown, and the writer has merged it meanwhile."""
        state = self._present.state
        return is_due(state) and self._present.snapshots.newest() > state.base.sequence

    def _adopt(self, stop: Stop) -> None:
        """Take up the index that the writer has made; searches go on in the old one until it is loaded."""
        snapshots = self._present.snapshots
        with self._present.catalog.reading() as db:
            base = self._present.load(db, newer_than=self._present.state.base.sequence)
            if stop():
                raise Stopped
            if base is None and (snapshots.overtaken or not self._newer_index()):
                return  # tried again at once if still due; or a search has taken it up meanwhile
            if base is None:
                raise DamagedFile(f"no index in {snapshots.folder} could be read")
            state = replayed(db, Generation.of(base, self._present.manifest.dim))
        self._present.take_up(state)

    # What both do

    def _merge(self, stop: Stop) -> dict[str, Any]:
        state, wanted = self._present.state, self._present.manifest.index
        catalog, saved = self._present.catalog, self._present.snapshots.path(state.base.sequence)
        anew = why_build_anew(state, wanted, saved)
        options: dict[str, Any] = {"device": self._present.device, "measure": True, "seed": 0, "stop": stop}
        options["seconds"] = MEASURE_SECONDS
        if anew is None:
            built = extend_snapshot(catalog, state.base, saved, **options)
        else:
            log.info("%s: the merge builds the index anew: %s", self._present.manifest.name, anew)
            built = self._chosen(wanted, stop) or build_snapshot(catalog, wanted, **options)
        return self._install(built, wanted)

    def _chosen(self, wanted: Mapping[str, Any], stop: Stop) -> Built | None:
        """The index for a promise that has none yet; None: there is no such promise, or nothing keeps it."""
        if not wanted.get("promise") or wanted["kind"] != "auto":
            return None
        promise, device = Promise(**wanted["promise"]), self._present.device
        try:
            return build_promised(self._present.catalog, promise, device=device, seed=0, stop=stop)
        except ConfigError as error:
            log.warning("%s: no index keeps its promise: %s", self._present.manifest.name, error)
            return None

    def _install(self, built: Built, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Save a new main index and search it from now on; writers wait only for the last changes.

        Returns:
            What is kept in the manifest as "built".
        """
        present, wanted = self._present, built.wanted or wanted
        about = with_promise(built.about, wanted, built.snapshot.index, before=present.manifest.built)
        present.snapshots.save(built.snapshot)
        with present.catalog.reading() as db:
            state = replayed(db, Generation.of(built.snapshot, present.manifest.dim))
        with present.turn():
            with present.catalog.reading() as db:
                state = replayed(db, state)
            present.save_manifest(present.manifest.with_(index=wanted, built=about))
            present.state = state
            oldest = present.snapshots.drop_old()
            if oldest is not None:
                with suppress(StorageError):  # the new index is in place; the next one forgets more
                    present.catalog.forget_removed(oldest)
        return about

    def _sweep_some(self, stop: Stop) -> None:
        """After a merge, which has succeeded whatever becomes of this."""
        with suppress(StorageError, DamagedFile, OSError):
            self._sweep(seconds=SWEEP_SECONDS, stop=stop)

    def _sweep(self, *, seconds: float = math.inf, stop: Stop = never) -> None:
        """Delete pictures that no item uses, and half-written ones: of writes that were cut short.

        Folder by folder in a random order, until the time is over: what is left is found another time.
        """
        present, until = self._present, time.monotonic() + seconds
        folders = present.pictures.folders()
        random.shuffle(folders)
        for folder in folders:
            if time.monotonic() > until or stop():
                return
            with present.catalog.reading() as db:
                unused = sql.without_items(db, sorted(present.pictures.stored(folder)))
            halves = present.pictures.half_written(folder)
            if unused or halves:
                with present.turn():  # nobody stores a picture now: what is still unused stays so
                    present.discard_unused(unused)
                    for half in halves:
                        with suppress(OSError):
                            half.unlink(missing_ok=True)


def wished(
    asked: Mapping[str, Any], kind: str | None, options: Mapping[str, Any] | None, promise: Promise | None
) -> tuple[dict[str, Any], Promise | None]:
    """{"kind", "options"} or the promise that an index is to be built by.

    Args:
        asked: the manifest's "index", for what is not given.

    Raises:
        ConfigError: a kind or options that cannot be had, or a kind beside a promise.
    """
    if kind is not None:
        check_kind(kind)
    same: Mapping[str, Any] = asked["options"] if kind in (None, asked["kind"]) else {}
    wanted = {"kind": kind or asked["kind"], "options": dict(same if options is None else options)}
    check_options(wanted["kind"], wanted["options"])
    if promise is not None and kind is not None:
        raise ConfigError(f'A promise chooses the kind of index itself; "{kind}" was given too.')
    if promise is None and kind is None and options is None and asked.get("promise"):
        promise = Promise(**asked["promise"])
    return wanted, promise
