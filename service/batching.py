"""Three small machines that keep the service upright under load: a bounded pool, a budget, a micro-batcher.

The pool keeps blocking work off the event loop, and refuses more than it can hold instead of growing. The
budget lets large work in only as far as the memory for it goes. The batcher lets requests that wait for an
encoder at the same moment share one call of it; alone, a request never waits for company.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dml.errors import DmlError
from dml.stages import spent, stage

T = TypeVar("T")
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


class Done(NamedTuple):
    """The result of one row, and when the call that made it ran (time.monotonic)."""

    row: NDArray[Any]
    begun: float
    ended: float


class Batcher:
    """Joins rows from several threads into one call of `function`.

    One thread of its own takes a row, then all others that are waiting (up to `max_batch`), and calls the
    function once. While it works the next ones gather, so batches grow with the load and a lone row is never
    delayed.

    Args:
        function: (N, …) rows -> (N, …) rows, in the same order.
        max_batch: most rows of one call.
        observe: called with the size of every batch.
    """

    def __init__(
        self,
        function: Callable[[NDArray[Any]], NDArray[Any]],
        *,
        max_batch: int = 16,
        observe: Callable[[int], None] = lambda size: None,
    ) -> None:
        self._function, self._max_batch, self._observe = function, max_batch, observe
        self._waiting: queue.SimpleQueue[tuple[NDArray[Any], Future[Done]] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="dml-batcher", daemon=True)
        self._thread.start()

    def __call__(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The function's result for these rows (N, …); blocks until it is there."""
        futures: list[Future[Done]] = [Future() for _ in rows]
        asked = time.monotonic()
        with self._closing:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            for row, future in zip(rows, futures, strict=True):
                self._waiting.put((row, future))
        done = [future.result() for future in futures]
        if done:
            spent("queue", done[0].begun - asked)
            spent("inference", done[-1].ended - done[0].begun)
        return np.stack([each.row for each in done])

    def close(self) -> None:
        """Finish what waits, then stop."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = [first], False
            while len(batch) < self._max_batch and not self._waiting.empty():
                entry = self._waiting.get()
                if entry is None:
                    last = True
                    break
                batch.append(entry)
            self._answer(batch)
            if last:
                return

    def _answer(self, batch: list[tuple[NDArray[Any], Future[Done]]]) -> None:
        begun = time.monotonic()
        try:
            results = self._function(np.stack([row for row, _ in batch]))
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        ended = time.monotonic()
        self._observe(len(batch))
        for (_, future), result in zip(batch, results, strict=True):
            future.set_result(Done(result, begun, ended))
