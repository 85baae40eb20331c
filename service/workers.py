"""Several processes that answer at one address: one listens and looks after them, none of them writes.

A collection has one writer, and it is not here: workers read, and follow what `dml index` or another service
writes. A worker that dies is replaced; when the one that looks after them dies, they end as well.
"""

import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import structlog

from dml.errors import ServiceError, UsageError
from service.settings import Settings

PATIENCE = 30.0
"""Seconds that workers have to end, their own grace included; then they are killed."""

LEAST_LIFE = 5.0
"""Seconds: a worker that dies sooner is replaced only after so long, or it would be over and over."""

Job = Callable[[socket.socket, Callable[[str], None]], None]
"""What a worker does until SIGTERM: answer on a socket, and say when it is ready. It is pickled on its way
to a new process."""


def check_workers(count: int, settings: Settings) -> None:
    """Refuse several processes where one of them would have to write. Raises UsageError."""
    if count > 1 and not settings.read_only:
        raise UsageError(
            f"--workers {count} needs --read-only: a collection is written by one process, and the others "
            f"would answer every write with 503. One process already uses all cores: it decodes, embeds and "
            f"searches in threads. Leave --workers out, or serve read-only and write with another process."
        )
    if count > 1 and sys.platform == "win32":
        raise UsageError(
            "--workers above 1 needs a system where processes can share a socket; this is Windows."
        )


@dataclass
class Worker:
    """A process, and the line to it: it sends what it has to say, and ends when the line is cut."""

    process: Any
    line: Connection
    started: float
    said: str | None = None  # "ready: …" or "failed: …"


class Workers:
    """Starts workers and sees to it that there are as many as wanted.

    Args:
        count: how many.
        job: what each does.
        listening: the socket that all of them accept connections from.
    """

    def __init__(self, count: int, job: Job, listening: socket.socket) -> None:
        self._count, self._job, self._listening = count, job, listening
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[Worker] = []
        self._ending = False
        self._log = structlog.get_logger("service")

    def run(self, announce: Callable[[str], None]) -> None:
        """Until SIGTERM or SIGINT; requests in flight are answered first.

        Args:
            announce: told one line when all workers are ready.

        Raises:
            ServiceError: a worker could not start, with its reason.
        """
        before = {name: signal.signal(name, self._end) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            with tempfile.TemporaryDirectory(prefix="dml-metrics-") as metrics:
                self._metrics = Path(metrics)
                try:
                    self._workers = [self._start() for _ in range(self._count)]
                    announce(self._all_ready())
                    while not self._ending:
                        wait([worker.process.sentinel for worker in self._workers], timeout=0.5)
                        self._replace_dead()
                finally:
                    self._stop()
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _end(self, *_: object) -> None:
        self._ending = True

    def _start(self) -> Worker:
        ours, theirs = self._context.Pipe()
        arguments = (self._job, self._listening, theirs, self._metrics)
        process = self._context.Process(target=work, args=arguments, name="dml-worker")
        process.start()
        theirs.close()
        return Worker(process, ours, time.monotonic())

    def _all_ready(self) -> str:
        """The line of the first one, when all are ready. Raises ServiceError."""
        while not self._ending:
            for worker in self._workers:
                if worker.said is None and worker.line.poll(0.05):
                    worker.said = heard(worker)
            for worker in self._workers:
                if worker.said is not None and worker.said.startswith("failed: "):
                    raise ServiceError(worker.said.removeprefix("failed: "))
            if all(worker.said is not None for worker in self._workers):
                break
        return (self._workers[0].said or "").removeprefix("ready: ")

    def _replace_dead(self) -> None:
        for place, worker in enumerate(self._workers):
            if not self._ending and not worker.process.is_alive():
                code, lived = worker.process.exitcode, time.monotonic() - worker.started
                self._log.error("a worker died and is replaced", process=worker.process.pid, code=code)
                worker.line.close()
                if lived < LEAST_LIFE:
                    time.sleep(LEAST_LIFE - lived)
                self._workers[place] = self._start()

    def _stop(self) -> None:
        """Let all of them answer what they have, then see them gone."""
        self._listening.close()  # nobody accepts what would come from now on
        for worker in self._workers:
            if worker.process.is_alive():
                os.kill(worker.process.pid, signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        for worker in self._workers:
            worker.process.join(max(0.0, end - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.line.close()


def heard(worker: Worker) -> str:
    """What a worker says; its death is a failure."""
    try:
        return worker.line.recv()
    except (EOFError, OSError):
        worker.process.join(5)
        return f"failed: A worker ended with code {worker.process.exitcode} before it was ready."


def work(job: Job, listening: socket.socket, line: Connection, metrics: Path) -> None:
    """The life of a worker."""
    from dml.startup import prepare_process, prepare_service

    prepare_process()
    prepare_service()
    from service.metrics import share

    share(metrics)
    threading.Thread(target=end_with_parent, args=(line,), name="dml-parent", daemon=True).start()
    try:
        job(listening, lambda text: line.send(f"ready: {text}"))
    except Exception as error:
        line.send(f"failed: {error}")
        sys.exit(1)


def end_with_parent(line: Connection) -> None:
    """Wait until the line is cut, which nobody does but a parent that is gone."""
    try:
        line.recv()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


def share_of(settings: Settings, count: int) -> dict[str, Any]:
    """The settings that a worker among so many has instead: its part of the threads and of the memory."""
    return {
        "workers": max(2, -(-settings.workers // count)),
        "max_pixels_in_flight": max(settings.max_pixels, settings.max_pixels_in_flight // count),
        "processes": count,
    }
