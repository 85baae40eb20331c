"""Where the time of a request goes: a clock that knows the stages of work, wherever they happen.

Code says what it is doing, and knows nobody who listens; whoever wants to know starts a clock. Without one,
saying it costs next to nothing.

>>> clock = Clock()
>>> with clock.running():
...     with stage("search"):
...         with stage("payload"):
...             pass
>>> sorted(clock.seconds)
['payload', 'search']
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, NamedTuple, get_args

Stage = Literal["receive", "fetch", "queue", "decode", "inference", "search", "payload", "write"]
"""receive: the body arrives. fetch: a picture comes from an address. queue: waiting for a thread, for a turn
to decode, for the encoder. decode: bytes to the numbers that the encoder takes. inference: the encoder.
search: the index. payload: what the catalogue keeps of the hits. write: an item into the catalogue, onto the
disk."""
STAGES: tuple[Stage, ...] = get_args(Stage)


class Interval(NamedTuple):
    """One stretch of a stage, in nanoseconds since 1970."""

    stage: Stage
    begun: int
    ended: int


class Clock:
    """The seconds of each stage of one piece of work, each counted once: a stage within another one is not
    part of that.

    Args:
        keep: intervals that are kept one by one, as a trace shows them; later ones only count.

    Attributes:
        seconds: stage -> seconds.
        intervals: the first `keep`.
        left_out: how many more there were.
    """

    def __init__(self, *, keep: int = 0) -> None:
        self.seconds: dict[Stage, float] = {}
        self.intervals: list[Interval] = []
        self.left_out = 0
        self._keep = keep
        self._within = 0.0  # seconds of the stages inside the present one

    @contextmanager
    def running(self) -> Iterator["Clock"]:
        """While the block lasts, stages of this context (a task, a thread that was given it) count here."""
        token = _clock.set(self)
        try:
            yield self
        finally:
            _clock.reset(token)

    def add(self, stage: Stage, whole: float, own: float) -> None:
        """An interval that ends now, of `whole` seconds, `own` of which count for it."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + own
        if len(self.intervals) < self._keep:
            ended = time.time_ns()
            self.intervals.append(Interval(stage, ended - round(1e9 * whole), ended))
        elif self._keep:
            self.left_out += 1


_clock: ContextVar[Clock | None] = ContextVar("dml_stages", default=None)


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """The block is this stage of the work, except for the stages inside it."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    outer, clock._within = clock._within, 0.0
    started = time.perf_counter()
    try:
        yield
    finally:
        whole = time.perf_counter() - started
        clock.add(name, whole, max(0.0, whole - clock._within))
        clock._within = outer + whole


def spent(name: Stage, seconds: float) -> None:
    """So many seconds, until now, were this stage: for what another thread did for this one."""
    clock = _clock.get()
    if clock is not None:
        seconds = max(0.0, seconds)
        clock.add(name, seconds, seconds)
        clock._within += seconds


def within(outer: Stage, inner: Stage, seconds: float) -> None:
    """So many of the seconds that `spent` has counted as one stage were another one inside it."""
    clock = _clock.get()
    if clock is not None:
        seconds = min(seconds, clock.seconds.get(outer, 0.0))
        clock.seconds[outer] = clock.seconds.get(outer, 0.0) - seconds
        clock.add(inner, seconds, seconds)
