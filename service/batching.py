"""Three small machines that keep the service upright under load: a bounded pool, a budget, a micro-batcher.

The pool keeps blocking work off the event loop, and refuses more than it can hold instead of growing. The
budget lets large work in only as far as the memory for it goes. The batcher lets requests that wait at the
same moment for an encoder, or for an index, share its calls; alone, a request never waits for company.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from dml.errors import DmlError
from dml.stages import Stage, spent, stage

T = TypeVar("T")
Q = TypeVar("Q")
R = TypeVar("R")
_answer_by: ContextVar[float | None] = ContextVar("answer_by", default=None)
"""When (time.monotonic) nobody waits any longer for what this thread does."""


class QueueFull(DmlError):
    """Every thread is busy and as many requests wait as may wait."""


class DeadlineExceeded(DmlError):
    """The answer took longer than a request may take."""


class WorkerPool:
    """Runs blocking calls in threads, and takes `workers` + `waiting` of them at a time.

    Args:
        workers: threads.
        waiting: calls that may wait for a thread.
        deadline_seconds: how long one caller waits, queue included.
    """

    def __init__(self, workers: int, waiting: int, *, deadline_seconds: float = 30.0) -> None:
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="dml-service")
        self._capacity = workers + waiting
        self._deadline = deadline_seconds
        self._lock = threading.Lock()
        self._taken = 0
        self.observe: Callable[[int], None] = lambda taken: None
        """Told whenever `taken` changes."""

    @property
    def taken(self) -> int:
        """Calls that run or wait now."""
        return self._taken

    async def run(self, task: Callable[[], T]) -> T:
        """The result of `task()`, computed in a thread.

        Raises:
            QueueFull: at once, when the pool is full.
            DeadlineExceeded: when it takes too long. A call that still waits is dropped; one that runs cannot
                be stopped and keeps its thread until it ends.
        """
        with self._lock:
            if self._taken >= self._capacity:
                raise QueueFull(
                    f"{self._taken} requests are already running or waiting; try again in a moment"
                )
            self._taken += 1
            self.observe(self._taken)
        asked = time.monotonic()
        context = copy_context()  # what times the request goes along
        context.run(_answer_by.set, asked + self._deadline)

        def timed() -> T:
            spent("queue", time.monotonic() - asked)
            return task()

        try:
            future = self._executor.submit(context.run, timed)
        except BaseException:
            self._release(None)
            raise
        future.add_done_callback(self._release)
        try:
            async with asyncio.timeout(self._deadline) as limit:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not limit.expired():
                raise  # the task's own
            raise DeadlineExceeded(f"no answer within {self._deadline:g} seconds") from None

    def _release(self, _: Future[Any] | None) -> None:
        with self._lock:
            self._taken -= 1
            self.observe(self._taken)

    def close(self) -> None:
        """Finish what runs and forget what waits."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class Budget:
    """So much of something, handed out to threads in the order in which they ask.

    Args:
        whole: how much there is.
    """

    def __init__(self, whole: int) -> None:
        self._whole, self._taken = whole, 0
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def taken(self) -> int:
        """What is handed out now."""
        return self._taken

    @contextmanager
    def take(self, amount: int) -> Iterator[None]:
        """Have `amount` for as long as the block lasts; waits for it. More than there is counts as all of it.

        Raises:
            DeadlineExceeded: the call of the pool that this is part of has run out of time.
        """
        amount = min(amount, self._whole)
        place = object()
        with self._changed:
            self._line.append(place)
            try:
                # In order: a large one would wait for ever if small ones could always slip past it.
                with stage("queue"):
                    mine = self._changed.wait_for(
                        lambda: self._line[0] is place and self._taken + amount <= self._whole, remaining()
                    )
                if not mine:
                    raise DeadlineExceeded("too much is being decoded; the picture did not get its turn")
                self._taken += amount
            finally:
                self._line.remove(place)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken -= amount
                self._changed.notify_all()


def remaining() -> float | None:
    """Seconds until nobody waits any longer for what this thread does; None outside a pool."""
    answer_by = _answer_by.get()
    return None if answer_by is None else max(0.0, answer_by - time.monotonic())


class _Ticket:
    """One caller of a batcher: what it got, what it is to run, and how it is woken."""

    __slots__ = ("answer_by", "batch", "begun", "ended", "idle", "left", "results", "wake")

    def __init__(self, count: int) -> None:
        self.results: list[Any] = [None] * count
        self.left = count
        self.begun, self.ended = float("inf"), 0.0
        """When the first call for it began, and the last one ended (time.monotonic)."""
        self.answer_by = _answer_by.get()
        self.batch: list[_Row] = []
        """Rows that were handed to the caller, with a lane to run them in."""
        self.idle = False
        """Whether the caller waits to be woken, which happens once."""
        self.wake = threading.Lock()
        self.wake.acquire()

    def rouse(self) -> None:
        """Wake the caller: it was handed rows, or has all its results. Under the batcher's lock."""
        self.idle = False
        self.wake.release()


class _Row(NamedTuple):
    """One row of a ticket, and its place there."""

    value: Any
    ticket: _Ticket
    place: int


def check_time() -> None:
    """Raises DeadlineExceeded when nobody waits any longer for what this thread does."""
    if remaining() == 0.0:
        raise DeadlineExceeded("the time of the request is over; what was left of its work was dropped")


@dataclass(frozen=True)
class _Failure:
    """What stands in a place instead of a result."""

    error: BaseException


class Batcher(Generic[Q, R]):
    """Joins what several threads ask for at the same moment into few calls of a function.

    There are so many lanes, each for one call at a time. Who comes while a lane is free makes the call at
    once, in its own thread: alone, nobody waits for company. Who comes while all are taken waits; a lane that
    ends is handed on, with a fair share of all that waits by then. So batches grow with the load.

    Where a call of several rows is much quicker than as many calls, as on a GPU, `max_wait` lets it wait for
    rows that are announced (`coming`), and for no others.

    Args:
        function: rows -> one result for each, in the same order; called from several threads.
        max_batch: most rows of one call.
        lanes: calls at a time; may be changed at any moment.
        max_wait: seconds that a call may wait for rows that are announced.
        stage: what the calls are, to whoever times the callers; waiting is "queue".
        observe: called with the size of every batch.
    """

    def __init__(
        self,
        function: Callable[[list[Q]], Sequence[R]],
        *,
        max_batch: int = 16,
        lanes: int = 1,
        max_wait: float = 0.0,
        stage: Stage = "inference",
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._function, self._max_batch, self._observe = function, max_batch, observe
        self.lanes, self._max_wait = lanes, max_wait
        self._stage: Stage = stage
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[_Row] = deque()
        self._busy = self._coming = 0
        self._closed = False

    @property
    def busy(self) -> int:
        """Calls that run now."""
        return self._busy

    @property
    def announced(self) -> int:
        """Rows on their way, see `coming`."""
        return self._coming

    @property
    def waiting(self) -> int:
        """Rows that wait for a lane."""
        return len(self._waiting)

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Announce a row that is on its way, for as long as the block lasts."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify_all()

    def __call__(self, rows: Sequence[Q]) -> list[R]:
        """The function's results for these rows; blocks until they are there.

        Raises:
            DeadlineExceeded: the call of the pool that this is part of has run out of time. Rows that no call
                has taken by then are dropped.
        """
        if not len(rows):
            return []
        ticket, asked = _Ticket(len(rows)), time.monotonic()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._waiting.extend(_Row(value, ticket, place) for place, value in enumerate(rows))
            if self._busy < self.lanes:
                ticket.batch = self._take()
                self._busy += bool(ticket.batch)
            ticket.idle = waits = not ticket.batch and ticket.left > 0
            self._changed.notify_all()
        while waits or ticket.batch:
            if waits and not ticket.wake.acquire(timeout=patience(ticket.answer_by)):
                self._give_up(ticket)
            waits = self._run(ticket) if ticket.batch else False
        if ticket.ended:
            spent("queue", ticket.begun - asked)
            spent(self._stage, ticket.ended - ticket.begun)
        for result in ticket.results:
            if isinstance(result, _Failure):
                raise result.error
        return ticket.results

    def close(self) -> None:
        """Take nothing more, and return when all that was taken is answered."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._busy)

    def _take(self) -> list[_Row]:
        """The next rows that somebody still waits for: a fair share of them; nothing when there are none."""
        now, batch = time.monotonic(), []
        share = min(self._max_batch, -(-len(self._waiting) // self.lanes))
        while self._waiting and len(batch) < share:
            row = self._waiting.popleft()
            if row.ticket.answer_by is not None and row.ticket.answer_by <= now:
                self._settle(row, _Failure(DeadlineExceeded("nobody waits for the answer any longer")))
            else:
                batch.append(row)
        return batch

    def _run(self, leader: _Ticket) -> bool:
        """Call the function for what the leader was handed, and hand the lane on; whether the leader has to
        wait then for results that others make."""
        batch, leader.batch = leader.batch, []
        if self._max_wait and len(batch) < self._max_batch:
            batch += self._company(self._max_batch - len(batch))
        begun = time.monotonic()
        try:  # in a context of its own: what is done for several callers is not the leader's time
            results: Sequence[Any] = Context().run(self._function, [row.value for row in batch])
            if len(results) != len(batch):
                raise ValueError(f"{len(results)} results for {len(batch)} rows")
            self._observe(len(batch))
        except BaseException as error:
            results = [_Failure(error)] * len(batch)
        ended = time.monotonic()
        with self._changed:
            for row, result in zip(batch, results, strict=True):
                row.ticket.begun, row.ticket.ended = min(begun, row.ticket.begun), ended
                self._settle(row, result)
            following = self._take()
            if following:
                # Whoever waits for one of these rows makes the call; who has its answer can go.
                heir = next((row.ticket for row in following if row.ticket.idle), leader)
                heir.batch = following
                if heir is not leader:
                    heir.rouse()
            else:
                self._busy -= 1
                self._changed.notify_all()
            leader.idle = not leader.batch and leader.left > 0
            return leader.idle

    def _company(self, room: int) -> list[_Row]:
        """Rows that come while there are some announced, for so long as a call may wait."""
        found: list[_Row] = []
        end = time.monotonic() + self._max_wait
        with self._changed:
            while True:
                while self._waiting and len(found) < room:
                    found.append(self._waiting.popleft())
                left = end - time.monotonic()
                if len(found) >= room or not self._coming or left <= 0:
                    return found
                self._changed.wait(left)

    @staticmethod
    def _settle(row: _Row, result: Any) -> None:
        """Note a result; the last one of a ticket wakes its caller, unless that is at work itself."""
        ticket = row.ticket
        ticket.results[row.place] = result
        ticket.left -= 1
        if not ticket.left and ticket.idle:
            ticket.rouse()

    def _give_up(self, ticket: _Ticket) -> None:
        """Take back the rows of a caller that has run out of time. Raises DeadlineExceeded, unless it was
        woken this moment."""
        with self._changed:
            if not ticket.idle:
                ticket.wake.acquire()
                return
            ticket.idle = False
            self._waiting = deque(row for row in self._waiting if row.ticket is not ticket)
        raise DeadlineExceeded("the answer took longer than a request may take")


def patience(answer_by: float | None) -> float:
    """How long to wait for a lock: -1, for ever, without a deadline."""
    return -1 if answer_by is None else max(0.0, answer_by - time.monotonic())
