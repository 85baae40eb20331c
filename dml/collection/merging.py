"""When pending changes are folded into the main index, how, and by whom: a thread that nobody waits for."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dml.collection.derive import Stopped
from dml.collection.generation import Generation
from dml.errors import DmlError, UsageError
from dml.index import choose_kind

log = logging.getLogger(__name__)

MergeMode = Literal["auto", "manual"]
"""auto: a writer merges in the background when it is due. manual: only when `merge` is called."""

DUE_ROWS = 1_000
DUE_ROOT = 20
"""A merge is due when more changes are pending than `DUE_ROWS` and `DUE_ROOT` · √(items).

Every search compares with the d pending rows one by one, and a merge of N items is paid once per d changes:
the sum of d and N / d is smallest at a d that grows as √N. 20 · √N is 2,000 of 10,000 items and 20,000 of
1,000,000.
"""

DEAD_SHARE = 0.2
"""Beyond this share of removed rows an index is built anew: they take memory, and searches step over them."""
GROWN = 2
"""An index that learned from its vectors is built anew when there are so many times more of them."""

FIRST_PAUSE = 30.0
LONGEST_PAUSE = 3600.0
"""Seconds between a merge that failed and the next try; doubled with every failure."""


def check_mode(mode: str) -> None:
    """Raises UsageError."""
    if mode not in ("auto", "manual"):
        raise UsageError(f'merge is "auto" or "manual", got {mode!r}')


def is_due(state: Generation) -> bool:
    """Whether so many changes are pending that searches become noticeably slower."""
    return state.pending > max(DUE_ROWS, DUE_ROOT * math.sqrt(len(state)))


def why_build_anew(state: Generation, wanted: Mapping[str, Any], saved: Path) -> str | None:
    """Why a merge has to build the index anew; None: adding to a copy of it will do.

    Args:
        wanted: {"kind", "options"} of the manifest.
        saved: where the snapshot of the main index is.
    """
    base, count = state.base, len(state)
    kind = wanted["kind"] if wanted["kind"] != "auto" else choose_kind(count)
    if not len(base.index) or not saved.is_file():
        return "there is no saved index to add to"
    if base.index.kind != kind:
        return f"{count} items are to be searched with {kind}, and were with {base.index.kind}"
    dead = base.dead + len(base.index) - len(state.main)
    if dead > DEAD_SHARE * count:
        return f"{dead} of its rows are removed"
    if base.index.learns and count > GROWN * max(1, base.built_over):
        return f"it learned from {base.built_over} vectors, and there are {count}"
    return None


class Background:
    """Work that is done in a thread of its own whenever it is due, and tried again after a failure.

    Args:
        name: of the thread.
        due: whether there is something to do; it must not wait for anything.
        work: does it; is given a function that says whether to stop, and may raise `Stopped` then.
    """

    def __init__(
        self,
        name: str,
        *,
        due: Callable[[], bool],
        work: Callable[[Callable[[], bool]], object],
    ) -> None:
        self.name, self._due, self._work = name, due, work
        self._lock = threading.Lock()
        self._closing = False
        self._pauses = 0
        self._thread: threading.Thread | None = None
        self._timer: threading.Timer | None = None
        self._failures = 0
        self._not_before = 0.0

    def wake(self) -> None:
        """Start when something is due and nothing runs; returns at once."""
        with self._lock:
            if self._thread is None and self._wanted():
                self._thread = threading.Thread(target=self._run, name=self.name)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter is on its way out
                    self._thread = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop, and do not start: the block does better what would be done."""
        with self._lock:
            self._pauses += 1
        try:
            self.wait()
            yield
        finally:
            with self._lock:
                self._pauses -= 1
            self.wake()

    def close(self) -> None:
        """Ask the work to stop, and wait until it has."""
        with self._lock:
            self._closing, timer = True, self._timer
        if timer is not None:
            timer.cancel()
        self.wait()

    def wait(self) -> None:
        """Until nothing runs any more: it was asked to stop, or nothing is due."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _stops(self) -> bool:
        return self._closing or self._pauses > 0

    def _wanted(self) -> bool:
        return not self._stops() and time.monotonic() >= self._not_before and self._due()

    def _run(self) -> None:
        while self._goes_on():
            try:
                self._work(self._stops)
                self._failures = 0
            except Stopped:
                pass
            except DmlError as error:
                self._try_later(str(error))
            except Exception as error:
                log.exception("%s failed", self.name)
                self._try_later(repr(error))

    def _goes_on(self) -> bool:
        with self._lock:
            if not self._wanted():
                self._thread = None
                return False
            return True

    def _try_later(self, why: str) -> None:
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._failures)
        self._failures += 1
        log.warning("%s failed, and is tried again in %.0f s; nothing has changed. %s", self.name, pause, why)
        with self._lock:
            self._not_before = time.monotonic() + pause
            if not self._closing:
                self._timer = threading.Timer(pause, self.wake)
                self._timer.daemon = True
                self._timer.start()
