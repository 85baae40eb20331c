"""Work that takes longer than a request may: begun by one, looked at by others, cancelled, remembered.

::

    queued ──▶ running ──▶ succeeded
       │          ├──────▶ failed       with the problem; "interrupted" when the service ended under it
       └──────────┴──────▶ cancelled

A job is written down before its request is answered. One that was queued or running when its process died is
found by the next writer of the same collection, and then shown as failed, with what to do: only one process
writes to a collection, so whoever opens it for writing knows that no other one works on it.

What became of a job is kept in memory where it cannot be written down at that moment (the disk is full,
another process holds the file): it is shown and counts all the same, and is written as soon as it can be.
"""

import json
import logging
import math
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dml.collection.derive import Stopped
from dml.errors import DmlError
from service.batching import QueueFull
from service.memory import Conflict, UnknownJob
from service.problems import Problem, body_of, problem_of
from service.state import Drawer, Section, StateFile

log = logging.getLogger(__name__)

SECTION = Section(
    "jobs",
    (
        """
        CREATE TABLE jobs (
            id TEXT PRIMARY KEY,
            kind TEXT NOT NULL,
            collection TEXT NOT NULL,
            place TEXT NOT NULL,
            single TEXT,
            state TEXT NOT NULL,
            progress REAL,
            message TEXT NOT NULL,
            created REAL NOT NULL,
            started REAL,
            ended REAL,
            result TEXT,
            problem TEXT
        );
        CREATE UNIQUE INDEX jobs_single ON jobs (single) WHERE state IN ('queued', 'running');
        CREATE INDEX jobs_place ON jobs (place, created)
        """,
    ),
)
COLUMNS = "id, kind, collection, state, progress, message, created, started, ended, result, problem"
KINDS = ("rebuild", "upsert", "duplicates")
STATES = ("queued", "running", "succeeded", "failed", "cancelled")
KEPT_SECONDS = 30 * 24 * 3600
"""Jobs that ended longer ago are forgotten."""
TOLD_SECONDS = 0.5
"""Progress is written down no more often: each time waits for the disk."""


@dataclass(frozen=True)
class Job:
    """A piece of work, as it stands.

    Attributes:
        kind: "rebuild", "upsert", "duplicates".
        collection: its name when the job began.
        state: "queued", "running", "succeeded", "failed" or "cancelled".
        progress: the share that is done, 0 to 1; None: not known.
        message: what is being done; of a job that has ended, what it came to, or how far it was when it was
            given up or failed. "" when there is nothing to say.
        created, started, ended: seconds since 1970; None: not yet.
        result: what it came to, when it succeeded.
        problem: why it failed: a problem document.
    """

    id: str
    kind: str
    collection: str
    state: str
    progress: float | None
    message: str
    created: float
    started: float | None = None
    ended: float | None = None
    result: Mapping[str, Any] | None = None
    problem: Mapping[str, Any] | None = None

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")


@dataclass
class Control:
    """What the work of a job is given: how to say how far it is, and whether to stop."""

    progress: float | None = None
    message: str = ""
    outcome: str = ""
    """What it came to, in words: the work sets it, and it is the message of a job that succeeded."""
    _started: float | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _closing: bool = False
    _told: Callable[[], None] = field(default=lambda: None)

    def stops(self) -> bool:
        """Whether the work is to be given up: then raise `Stopped`."""
        return self._stop.is_set()

    def tell(self, progress: float | None = None, message: str = "") -> None:
        """Say how far it is. Raises Stopped when the work is to be given up."""
        self.progress, self.message = progress, message or self.message
        if self.stops():
            raise Stopped
        self._told()


Work = Callable[[Control], Mapping[str, Any]]
"""Does the job; what it returns (JSON) is the result. May raise `Stopped` when it was told to."""


@dataclass(frozen=True)
class End:
    """What became of a job, by the columns of its row."""

    state: str
    progress: float | None
    message: str
    started: float | None
    ended: float
    result: str | None
    problem: str | None

    def write(self, db: sqlite3.Connection, id: str) -> None:
        """Put it in the row of the job, unless that has an end already."""
        db.execute(
            "UPDATE jobs SET state = ?, progress = ?, message = ?, started = ?, ended = ?, result = ?, "
            "problem = ? WHERE id = ? AND state IN ('queued', 'running')",
            (*vars(self).values(), id),
        )


class Jobs:
    """The jobs in a state folder, and the threads that do those of this process.

    Args:
        state: the state file that is shared, or the state folder.
        workers: jobs that run at a time.
        most: jobs of this process that may be queued or running.

    Raises:
        StorageError, DamagedFile, UsageError: by every method, when the state cannot be used.
    """

    def __init__(self, state: StateFile | Path, *, workers: int = 2, most: int = 8) -> None:
        self._drawer, self._most = Drawer(state, SECTION), most
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="dml-job")
        self._lock = threading.Lock()
        self._live: dict[str, Control] = {}
        self._unwritten: dict[str, End] = {}
        self._writing_late = False

    def begin(
        self, kind: str, work: Work, *, collection: str, place: str, alone: bool = False, request_id: str = ""
    ) -> Job:
        """Write a job down and have it done.

        Args:
            place: the folder of the collection.
            alone: no other job of this kind may be queued or running for the collection.
            request_id: of the request that asked for it; stands in its problem.

        Raises:
            Conflict: there is one, and `alone` is asked for; names it.
            QueueFull: as many as may be are queued or running.
        """
        id, now = uuid.uuid4().hex, time.time()
        control = Control()
        with self._lock:
            if len(self._live) >= self._most:
                raise QueueFull(f"{len(self._live)} jobs are already running or waiting; try again later")
            self._live[id] = control
        single = f"{kind} {place}" if alone else None
        row = (id, kind, collection, place, single, "queued", "", now)
        try:
            with self._writing() as db:
                db.execute("DELETE FROM jobs WHERE ended < ?", (now - KEPT_SECONDS,))
                if single is not None:
                    self._check_alone(db, single)
                db.execute(
                    "INSERT INTO jobs (id, kind, collection, place, single, state, message, created) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    row,
                )
            self._executor.submit(self._run, id, kind, work, control, request_id)
        except BaseException:
            self._forget(id)
            raise
        return Job(id, kind, collection, "queued", None, "", now)

    def _check_alone(self, db: sqlite3.Connection, single: str) -> None:
        found = db.execute(
            "SELECT id, kind FROM jobs WHERE single = ? AND state IN ('queued', 'running')", (single,)
        ).fetchone()
        if found is not None:
            raise Conflict(
                f"The collection has a {found[1]} job that has not ended: /v1/jobs/{found[0]}. Wait for it, "
                f"or cancel it."
            )

    def get(self, id: str) -> Job:
        """The job as it stands. Raises UnknownJob."""
        for job in self._found("WHERE id = ?", id):
            return job
        raise UnknownJob(f'There is no job "{id}". Jobs are forgotten 30 days after they ended.')

    def newest(self, places: Iterable[str], *, limit: int = 100) -> list[Job]:
        """The newest jobs of these collections, newest first."""
        return self._found(
            "WHERE place IN (SELECT value FROM json_each(?)) ORDER BY created DESC, rowid DESC LIMIT ?",
            json.dumps(list(places)),
            limit,
        )

    def count(self, places: Iterable[str]) -> dict[tuple[str, str], int]:
        """(kind, state) -> how many jobs of these collections there are; 0 where there are none."""
        counts = {(kind, state): 0 for kind in KINDS for state in STATES}
        state = self._drawer.if_there()
        if state is not None:
            unwritten = dict(self._unwritten)
            self._write_late()
            with state.reading() as db:
                rows = db.execute(
                    "SELECT kind, state, CASE WHEN state IN ('queued', 'running') "
                    "AND id IN (SELECT value FROM json_each(?)) THEN id END AS late, COUNT(*) FROM jobs "
                    "WHERE place IN (SELECT value FROM json_each(?)) GROUP BY kind, state, late",
                    (json.dumps(list(unwritten)), json.dumps(list(places))),
                ).fetchall()
            for kind, found, late, count in rows:
                is_now = found if late is None else unwritten[late].state
                counts[kind, is_now] = counts.get((kind, is_now), 0) + count
        return counts

    def unfinished(self, place: str) -> list[Job]:
        """Jobs of a collection that are queued or running."""
        found = self._found(
            "WHERE place = ? AND state IN ('queued', 'running') ORDER BY created DESC, rowid DESC", place
        )
        return [job for job in found if not job.over]

    def _found(self, which: str, *values: Any) -> list[Job]:
        """Jobs as they stand, by the end of a query."""
        state = self._drawer.if_there()
        if state is None:
            return []
        unwritten = dict(self._unwritten)  # before the rows, so that none is missed that is written meanwhile
        self._write_late()
        with state.reading() as db:
            rows = db.execute(f"SELECT {COLUMNS} FROM jobs {which}", values).fetchall()
        return [self._as_it_stands(row, unwritten.get(row[0])) for row in rows]

    def _as_it_stands(self, row: tuple, end: End | None) -> Job:
        job, control = job_of(row), self._live.get(row[0])
        if job.over:
            return job
        if end is not None:
            shown = (end.state, end.progress, end.message)
            return job_of((*row[:3], *shown, job.created, end.started, end.ended, end.result, end.problem))
        if control is None:
            return job
        job = replace(job, progress=control.progress, message=control.message)
        return job if control._started is None else replace(job, state="running", started=control._started)

    def cancel(self, id: str) -> Job:
        """Ask a job to stop; one that has ended stays as it is. Raises UnknownJob."""
        job, control = self.get(id), self._live.get(id)
        if job.over or control is None:
            return job
        control._stop.set()  # before the row: the work looks at this after it has changed the row itself
        if control._started is None:
            self._update(
                id, "state = 'cancelled', message = ?, ended = ?", control.message, time.time(), only="queued"
            )
        return self.get(id)

    def mark_interrupted(self, places: Iterable[str]) -> int:
        """Show as failed what had not ended when its process did; how many there were.

        Args:
            places: collections that this process has just opened for writing: no other one works on them.
        """
        state = self._drawer.if_there()
        if state is None:
            return 0
        places = json.dumps(list(places))
        open_jobs = (
            "state IN ('queued', 'running') AND place IN (SELECT value FROM json_each(?)) "
            "AND id NOT IN (SELECT value FROM json_each(?))"
        )
        with self._writing() as db:
            live = json.dumps(list(self._live))
            rows = db.execute(f"SELECT id, kind FROM jobs WHERE {open_jobs}", (places, live)).fetchall()
            for id, kind in rows:
                db.execute(
                    "UPDATE jobs SET state = 'failed', ended = ?, problem = ? WHERE id = ?",
                    (time.time(), json.dumps(interruption(id, kind)), id),
                )
        return len(rows)

    def close(self) -> None:
        """Give up what runs, and wait until it has; it is shown as interrupted."""
        with self._lock:
            live = list(self._live.items())
        for _, control in live:
            control._closing = True
            control._stop.set()
        self._executor.shutdown(wait=True)
        if self._unwritten:
            self._write_unwritten()
        self._drawer.close()

    def _run(self, id: str, kind: str, work: Work, control: Control, request_id: str) -> None:
        control._told = self._writer(id, control)
        try:
            if control.stops():
                raise Stopped
            control._started = time.time()
            self._update(id, "state = 'running', started = ?", control._started, only="queued")
            if control.stops():  # it may be shown as cancelled already
                raise Stopped
            result = work(control)
            control.message = control.outcome  # "reading checksums" is over
            self._end(id, "succeeded", result=result)
        except Stopped:
            if control._closing:
                self._end(id, "failed", problem=interruption(id, kind, request_id))
            else:
                self._end(id, "cancelled")
        except Exception as error:
            problem = problem_of(error)
            if problem.slug == "internal-error":
                log.exception("job %s failed", id)
            place = f"/v1/jobs/{id}"
            self._end(id, "failed", problem=body_of(problem, instance=place, request_id=request_id))
        finally:
            self._forget(id)

    def _writer(self, id: str, control: Control) -> Callable[[], None]:
        """Writes the progress down, when it was not just done."""
        last = time.monotonic()

        def write() -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= TOLD_SECONDS:
                last = now
                self._update(id, "progress = ?, message = ?", control.progress, control.message)

        return write

    def _end(
        self,
        id: str,
        state: str,
        *,
        result: Mapping[str, Any] | None = None,
        problem: Mapping[str, Any] | None = None,
    ) -> None:
        """Write down what became of a job that is done here, or remember that it has to be."""
        control = self._live[id]
        end = End(
            state,
            1.0 if state == "succeeded" else control.progress,
            control.message,
            control._started,
            time.time(),
            None if result is None else json.dumps(plain(result)),
            None if problem is None else json.dumps(problem),
        )
        self._unwritten[id] = end
        self._write_unwritten()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """As `State.writing`; what could not be written before is written with it, first."""
        with self._drawer.made().writing() as db:
            late = dict(self._unwritten)
            for id, end in late.items():
                end.write(db, id)
            yield db
        for id in late:
            self._unwritten.pop(id, None)

    def _write_unwritten(self) -> None:
        try:
            with self._writing():
                pass
        except DmlError as error:  # the work itself is done or not, whatever can be written of it
            log.warning("what became of jobs %s cannot be written yet: %s", ", ".join(self._unwritten), error)

    def _write_late(self) -> None:
        """Write in the background what could not be written before: whoever reads does not wait for it."""

        def write() -> None:
            try:
                self._write_unwritten()
            finally:
                self._writing_late = False

        with self._lock:
            if self._writing_late or set(self._unwritten) <= set(self._live):
                return
            self._writing_late = True
        try:
            self._executor.submit(write)
        except RuntimeError:  # closing, which writes it
            self._writing_late = False

    def _update(self, id: str, changes: str, *values: Any, only: str | None = None) -> None:
        """Change a job that has not ended; `only`: one of this state."""
        states = "('queued', 'running')" if only is None else f"('{only}')"
        try:
            with self._writing() as db:
                db.execute(f"UPDATE jobs SET {changes} WHERE id = ? AND state IN {states}", (*values, id))
        except DmlError as error:
            log.warning("the state of job %s cannot be written: %s", id, error)

    def _forget(self, id: str) -> None:
        with self._lock:
            self._live.pop(id, None)


def plain(value: Any) -> Any:
    """The value as JSON can carry it: null for NaN and infinity, which a figure without material may be."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def interruption(id: str, kind: str, request_id: str = "") -> dict[str, Any]:
    """The problem of a job whose process ended before it did."""
    remedy = {
        "rebuild": "The collection is searched with the index it had. Ask for the rebuild again.",
        "upsert": "What was written before stays, in batches in the order sent. Send the items again: "
        "those that are there are replaced by the same.",
    }.get(kind, "Ask for it again.")
    problem = Problem("interrupted", f"The service ended while the job was not done. {remedy}")
    return body_of(problem, instance=f"/v1/jobs/{id}", request_id=request_id)


def job_of(row: tuple) -> Job:
    *plain, result, problem = row
    return Job(
        *plain,
        result=None if result is None else json.loads(result),
        problem=None if problem is None else json.loads(problem),
    )
