"""`dml bench run`: workers side by side, and what they report."""

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from dml.errors import DmlError, UsageError
from eval.benchmark.plan import standing
from eval.benchmark.results import Place, read_row
from eval.benchmark.suite import Suite
from eval.benchmark.worker import Event, Order

Show = Callable[["Board"], None]
Say = Callable[[str], None]


@dataclass
class Board:
    """What is going on, for whoever shows it."""

    suite: Suite
    place: Place
    rows: tuple[str, ...]
    until: Literal["trials", "seeds"]
    jobs: int
    running: dict[int, Event] = field(default_factory=dict)  # worker -> its last event
    done: int = 0
    failures: list[str] = field(default_factory=list)
    counted: tuple[int, int] = (0, 0)
    spent: dict[str, list[float]] = field(default_factory=lambda: {"trial": [], "seed": []})

    def __post_init__(self) -> None:
        self.count()

    def count(self) -> None:
        """Look up in the result files how many (tuning runs, full runs) are to do at most."""
        trials = seeds = 0
        for row in self.rows:
            results = read_row(self.place, row)
            tuning = standing(self.suite, row, results, until="trials").most_left
            trials += tuning
            seeds += standing(self.suite, row, results, until=self.until).most_left - tuning
        self.counted = (trials, seeds)

    def left(self) -> tuple[int, int]:
        """(tuning runs, full runs) to do at most, when a run of this command last ended."""
        return self.counted

    def remaining_seconds(self) -> float | None:
        """At most so long, when what is left takes as long as what this command has done; None: unknown."""
        trials, seeds = self.left()
        share = self.suite.protocol.trial_share
        trial, seed = (_mean(self.spent[phase]) for phase in ("trial", "seed"))
        trial = trial if trial is not None else None if seed is None else seed * share
        seed = seed if seed is not None else None if trial is None else trial / share
        return None if trial is None or seed is None else (trials * trial + seeds * seed) / self.jobs


def _mean(values: Sequence[float]) -> float | None:
    recent = values[-50:]
    return sum(recent) / len(recent) if recent else None


def run_suite(order: Order, suite: Suite, *, jobs: int, say: Say, show: Show) -> Board:
    """Do every run that is left, with `jobs` processes side by side.

    Args:
        say: told a line for every run that ended.
        show: called whenever something has changed.

    Raises:
        DmlError: a worker could not begin (the data, the suite).
        KeyboardInterrupt: passed on after every worker has ended; nothing that was finished is lost.
    """
    if jobs < 1:
        raise UsageError(f"--jobs is at least 1, got {jobs}")
    board = Board(suite, Place(Path(order.results)), order.rows, order.until, jobs)
    with workers(order, jobs, threads=suite.protocol.threads) as processes:
        for number, event in events_of(processes):
            take(board, number, event, say)
            show(board)
    board.count()  # others may have worked on the same rows
    for process in processes:
        if process.returncode and not board.failures:
            raise DmlError(f"a worker ended with exit code {process.returncode}; its message is above")
    return board


def take(board: Board, number: int, event: Event, say: Say) -> None:
    """Note what a worker tells."""
    board.running[number] = event
    if event.kind == "done":
        board.done += 1
        board.count()
        board.spent["trial" if event.item.startswith("trial") else "seed"].append(event.seconds)
        note = f"  {event.text}" if event.text else ""
        say(f"{event.row} {event.item}: validation MAP@R {event.value:.4f}, {event.seconds:.0f} s{note}")
    elif event.kind == "failed":
        message = f"{event.row} {event.item}: {event.text}" if event.row else event.text
        if message not in board.failures:
            board.failures.append(message)
            say(f"error: {message}")


@contextmanager
def workers(order: Order, jobs: int, *, threads: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """So many worker processes; when the block ends, however it ends, none of them is left."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "eval.benchmark.worker", json.dumps(asdict(order))]
    processes: list[subprocess.Popen[bytes]] = []
    pipe = subprocess.PIPE
    try:
        for _ in range(jobs):
            # A session of its own: Ctrl-C reaches us alone, and we end the workers.
            started = subprocess.Popen(
                command, env=environment, stdin=pipe, stdout=pipe, start_new_session=True
            )
            processes.append(started)
        yield processes
    finally:
        for process in processes:
            process.terminate() if process.poll() is None else None
        for process in processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def events_of(processes: Sequence["subprocess.Popen[bytes]"]) -> Iterator[tuple[int, Event]]:
    """(worker, event) as they come, until every worker has ended."""
    with selectors.DefaultSelector() as waiting:
        buffers: dict[int, bytes] = {}
        for number, process in enumerate(processes):
            assert process.stdout is not None
            waiting.register(process.stdout, selectors.EVENT_READ, number)
            buffers[number] = b""
        while waiting.get_map():
            for key, _ in waiting.select():
                stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
                chunk = os.read(stream.fileno(), 65536)
                if not chunk:
                    waiting.unregister(stream)
                    processes[key.data].wait()
                *lines, buffers[key.data] = (buffers[key.data] + chunk).split(b"\n")
                for line in lines:
                    yield key.data, Event(**json.loads(line))
