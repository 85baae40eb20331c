"""What there is to see of collections and jobs, looked up for a scrape, which never waits long for it.

A collection that a database server keeps may take long to answer, or may not answer at all, and files of a
collection may be many. So looking goes on in threads of its own; a scrape takes what is known by then.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dml.collection.base import Figures
from dml.collection.present import bytes_below
from dml.errors import DmlError, UnknownCollection
from service.engine import Engine

log = logging.getLogger(__name__)

MOST_LISTED = 100
"""Collections that are told apart: those named at the start first, then those in the order of their names."""
PATIENCE_SECONDS = 2.0
"""A scrape waits so long; Prometheus gives up after 10 s, and would have nothing then."""
BYTES_SECONDS = 300.0
"""Files are counted no more often: there is one for each picture."""

JobCounts = Mapping[tuple[str, str], int]
"""(kind, state) -> jobs."""


@dataclass(frozen=True)
class Seen:
    """A collection, as it was when it last answered."""

    model: str = ""
    """Fingerprint of its encoder."""
    figures: Figures | None = None
    bytes: int | None = None
    up: bool = False
    """Whether it answered when it was last asked."""


@dataclass(frozen=True)
class View:
    """What there is now."""

    ready: bool = False
    collections: int = 0
    listed: Mapping[str, Seen] = field(default_factory=dict)
    jobs: JobCounts = field(default_factory=dict)
    encoders: tuple[tuple[str, str, str, str], ...] = ()
    """(fingerprint, decoder, runtime, precision)"""


class Watch:
    """Looks at collections and jobs.

    Args:
        engine: None while it is loading.
        jobs: places -> how many jobs there are, by kind and state.
    """

    def __init__(
        self, engine: Callable[[], Engine | None], jobs: Callable[[Iterable[str]], JobCounts]
    ) -> None:
        self._engine, self._jobs = engine, jobs
        self._seen: dict[str, Seen] = {}
        self._sizes: dict[str, tuple[float, int]] = {}  # name -> when counted (time.monotonic), bytes
        self._asking: str | None = None
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="dml-watch")
        self._asked: Future[None] | None = None
        self._sized: Future[None] | None = None

    def view(self) -> View:
        """What is known now; what does not answer within `PATIENCE_SECONDS` is as it was."""
        engine = self._engine()
        if engine is None:
            return View()
        names = listed(engine)
        with self._lock:
            self._asked = self._begin(self._asked, self._ask, engine, names)
            self._sized = self._begin(self._sized, self._size, engine, names)
            asked, looking = self._asked, [f for f in (self._asked, self._sized) if f is not None]
        wait(looking, PATIENCE_SECONDS)
        late = self._asking if asked is not None and not asked.done() else None
        seen, sizes = self._seen, self._sizes
        return View(
            ready=True,
            collections=len(engine.names()),
            listed={
                name: replace(
                    seen[name], bytes=sizes.get(name, (0, None))[1], up=seen[name].up and name != late
                )
                for name in names
                if name in seen
            },
            jobs=self._count_jobs(engine),
            encoders=tuple(about(encoder) for encoder in engine.encoders()[:MOST_LISTED]),
        )

    def close(self) -> None:
        """Look no more."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _begin(
        self, last: Future[None] | None, look: Callable[..., None], engine: Engine, names: list[str]
    ) -> Future[None] | None:
        """Look again, if the last look is over."""
        if last is not None and not last.done():
            return last
        try:
            return self._threads.submit(look, engine, names)
        except RuntimeError:  # the service is closing
            return None

    def _ask(self, engine: Engine, names: list[str]) -> None:
        """Ask each collection for its figures."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}
        for name in names:
            self._asking, before = name, self._seen.get(name)
            try:
                with engine.using(name) as collection:
                    found = Seen(collection.fingerprint, figures=collection.figures(), up=True)
            except UnknownCollection:
                continue  # deleted this moment
            except Exception as error:  # whatever it is: the other figures are needed all the more
                if before is None or before.up:
                    log.warning('the figures of the collection "%s" cannot be read: %r', name, error)
                found = replace(before or Seen(), up=False)
            self._seen = {**self._seen, name: found}  # replaced: scrapes read it meanwhile
        self._asking = None

    def _size(self, engine: Engine, names: list[str]) -> None:
        """Count the bytes of collections whose turn it is."""
        self._sizes = {name: found for name, found in self._sizes.items() if name in names}
        for name in names:
            now = time.monotonic()
            if now - self._sizes.get(name, (-math.inf, 0))[0] < BYTES_SECONDS:
                continue
            with suppress(DmlError, OSError), engine.using(name):
                place = Path(engine.place(name))
                if place.is_dir():
                    self._sizes = {**self._sizes, name: (now, bytes_below(place))}

    def _count_jobs(self, engine: Engine) -> JobCounts:
        try:
            return self._jobs(engine.places())
        except DmlError as error:
            log.warning("jobs cannot be counted: %s", error)
            return {}


def listed(engine: Engine) -> list[str]:
    """The collections that are told apart, at most `MOST_LISTED`: clients can make more."""
    own = None if engine.folder is None else engine.folder.path.resolve()
    names = {name: place for place, name in engine.places().items()}
    made = {name for name, place in names.items() if own is not None and Path(place).parent == own}
    return sorted(names, key=lambda name: (name in made, name))[:MOST_LISTED]


def about(encoder: Any) -> tuple[str, str, str, str]:
    """An encoder in labels; one that is no folder of ours does not say how it computes."""
    profile = getattr(encoder, "profile", None)
    parts = [str(getattr(profile, name, "unknown")) for name in ("decoder", "runtime", "precision")]
    return encoder.fingerprint, parts[0], parts[1], parts[2]
