"""Work that outlives its request: begun, looked at, cancelled, and told as interrupted after a crash."""

import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving import ColourEncoder, colour_collection, jpeg, running
from test_service import assert_problem, b64
from test_service_run import dml, serving

from dml.client import Client, Problem
from dml.collection import create_collection
from dml.collection.base import NewItem
from dml.collection.derive import Stopped
from service import schemas
from service import state as state_module
from service.app import create_app
from service.engine import Engine
from service.jobs import Control, Jobs
from service.memory import Conflict, UnknownJob
from service.settings import Settings
from service.state import FILE

PLACE = "/v1/collections/colours"


@contextmanager
def served(folder: Path, settings: Settings | None = None) -> Iterator[httpx.Client]:
    """A service of the collection "colours" that keeps its state in the folder."""
    engine = Engine({"colours": colour_collection(folder / "colours")}, [ColourEncoder()], settings=settings)
    app = create_app(engine, state=folder / "state")
    with running(app) as address, httpx.Client(base_url=address, timeout=20) as http:
        yield http
    engine.close()


def ended(http: httpx.Client, response: httpx.Response) -> dict:
    """The job that a response has begun, when it is over."""
    assert response.status_code == 202, response.text
    place, end = response.headers["location"], time.monotonic() + 20
    while time.monotonic() < end:
        job = http.get(place).json()
        schemas.JobAnswer.model_validate(job)
        if job["ended"] is not None:
            return job
        time.sleep(0.02)
    raise AssertionError(f"the job has not ended: {job}")


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Jobs]:
    found = Jobs(tmp_path / "state")
    yield found
    found.close()


def until(holds, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.01)


def held(release: threading.Event):
    """Work that goes on until it is released or told to stop."""

    def work(control: Control) -> dict:
        while not release.wait(0.01):
            control.tell(0.5, "half")
        return {"ended": True}

    return work


# Through the API


def test_a_rebuild_is_a_job_that_changes_the_kind_of_index(tmp_path):
    with served(tmp_path) as http:
        job = ended(http, http.post(f"{PLACE}/rebuild", json={"kind": "hnsw"}))
        assert (job["kind"], job["state"], job["progress"]) == ("rebuild", "succeeded", 1.0)
        assert job["result"]["kind"] == "hnsw"
        assert job["message"].startswith("hnsw over 20 items")
        assert http.get(PLACE).json()["index"]["kind"] == "hnsw"
        listed = schemas.JobsAnswer.model_validate(http.get("/v1/jobs").json()).items
        assert [entry.id for entry in listed] == [job["id"]]


def test_a_rebuild_may_promise_a_recall(tmp_path):
    with served(tmp_path) as http:
        few = ended(http, http.post(f"{PLACE}/rebuild", json={"target_recall": 0.9}))
        assert few["state"] == "succeeded", few
        vectors = np.random.default_rng(0).normal(size=(600, 48)).tolist()
        items = [{"id": f"v{n}", "vector": vector} for n, vector in enumerate(vectors)]
        assert http.post(f"{PLACE}/items", json={"items": items}).json()["written"] == 600
        job = ended(http, http.post(f"{PLACE}/rebuild", json={"target_recall": 1.0}))
        assert job["state"] == "succeeded", job
        assert job["message"].endswith("the promise holds")
        assert http.get(PLACE).json()["index"]["exact"] is True
        both = http.post(f"{PLACE}/rebuild", json={"target_recall": 0.9, "kind": "hnsw"})
        assert "leave out kind" in assert_problem(both, 422, "invalid-request")["detail"]


@pytest.mark.parametrize(
    "wish", [{"kind": "os:system"}, {"kind": "nonsense"}, {"kind": "hnsw", "options": {"spin": 3}}]
)
def test_an_index_that_cannot_be_had_is_refused_at_once_and_nothing_is_imported(tmp_path, wish):
    with served(tmp_path) as http:
        assert_problem(http.post(f"{PLACE}/rebuild", json=wish), 422, "invalid-request")
        assert http.get("/v1/jobs").json() == {"items": []}


def test_a_job_that_fails_keeps_its_problem(tmp_path):
    with served(tmp_path) as http:
        response = http.post(
            f"{PLACE}/rebuild",
            json={"target_recall": 0.9, "memory_budget": 1},
            headers={"X-Request-Id": "r1"},
        )
        job = ended(http, response)
        assert job["state"] == "failed"
        problem = schemas.ProblemAnswer.model_validate(job["problem"])
        assert problem.instance == response.headers["location"]
        assert problem.request_id == "r1"
        with Client(str(http.base_url)) as client, pytest.raises(Problem) as failure:
            client.wait_for(client.job(job["id"]))
        assert failure.value.type == problem.type.rpartition("/")[2]


def test_duplicates_are_found_by_file_and_by_vector(tmp_path):
    with served(tmp_path) as http:
        copy = http.put(f"{PLACE}/items/copy", files={"file": jpeg("red", 1)})
        assert copy.status_code == 201
        job = ended(http, http.post(f"{PLACE}/duplicates", json={}))
        by_file = job["result"]
        assert job["message"] == "1 group found", "and no longer what it was doing"
        assert by_file["duplicates"] == [{"ids": ["copy", "red/1"], "score": None}]
        similar = {"level": "similar", "score_threshold": 0.9999}
        result = ended(http, http.post(f"{PLACE}/duplicates", json=similar))["result"]
        assert [pair["ids"] for pair in result["duplicates"]] == [["copy", "red/1"]]
        assert result["duplicates"][0]["score"] == pytest.approx(1.0, abs=1e-5)
        few = ended(
            http, http.post(f"{PLACE}/duplicates", json={**similar, "score_threshold": 0, "limit": 3})
        )
        assert len(few["result"]["duplicates"]) == 3
        assert few["result"]["listed_all"] is False
        edited = assert_problem(
            http.post(f"{PLACE}/duplicates", json={"level": "edited"}), 422, "not-available"
        )
        assert edited["missing"] == "level"


def test_a_batch_that_nobody_waits_for_tells_what_failed(tmp_path):
    items = [{"id": f"new/{n}", "image": b64(jpeg("gold", n))} for n in range(3)]
    items.append({"id": "bad", "image": b64(b"no picture")})
    with served(tmp_path) as http:
        response = http.post(f"{PLACE}/items", json={"items": items, "wait": False})
        job = ended(http, response)
        assert (job["result"]["written"], job["result"]["failed"]) == (3, 1)
        assert job["message"] == "3 of 4 written, 1 could not be"
        [failed] = job["result"]["results"]
        assert (failed["id"], failed["problem"]["status"]) == ("bad", 415)
        assert http.get(PLACE).json()["count"] == 23


def test_a_read_only_service_begins_nothing(tmp_path):
    with served(tmp_path, Settings(read_only=True)) as http:
        for path, body in (("rebuild", {}), ("duplicates", {}), ("items", {"items": [{"id": "a"}]})):
            assert_problem(http.post(f"{PLACE}/{path}", json=body), 403, "read-only")
        assert not (tmp_path / "state" / FILE).exists(), "nothing was to be remembered"


def test_unknown_jobs_are_told(tmp_path):
    with served(tmp_path) as http:
        assert_problem(http.get("/v1/jobs/nobody"), 404, "unknown-job")
        assert_problem(http.delete("/v1/jobs/nobody"), 404, "unknown-job")


# The machine


def test_one_job_of_a_kind_at_a_time_for_a_collection(jobs):
    release = threading.Event()
    first = jobs.begin("rebuild", held(release), collection="a", place="/a", alone=True)
    with pytest.raises(Conflict, match=first.id):
        jobs.begin("rebuild", held(release), collection="a", place="/a", alone=True)
    other = jobs.begin("rebuild", held(release), collection="b", place="/b", alone=True)
    release.set()
    until(lambda: jobs.get(first.id).over and jobs.get(other.id).over)
    again = jobs.begin("rebuild", held(release), collection="a", place="/a", alone=True)
    until(lambda: jobs.get(again.id).state == "succeeded")


def test_a_job_tells_how_far_it_is_and_can_be_cancelled(jobs):
    job = jobs.begin("upsert", held(threading.Event()), collection="a", place="/a")
    until(lambda: jobs.get(job.id).progress == 0.5)
    running_job = jobs.get(job.id)
    assert (running_job.state, running_job.message) == ("running", "half")
    jobs.cancel(job.id)
    until(lambda: jobs.get(job.id).over)
    assert (jobs.get(job.id).state, jobs.get(job.id).message) == ("cancelled", "half")
    assert jobs.cancel(job.id).state == "cancelled", "a second time changes nothing"


def test_a_job_that_waits_is_cancelled_without_being_begun(tmp_path):
    jobs, release, begun = Jobs(tmp_path / "state", workers=1), threading.Event(), []
    first = jobs.begin("upsert", held(release), collection="a", place="/a")
    second = jobs.begin("upsert", lambda control: begun.append(1) or {}, collection="a", place="/a")
    assert jobs.cancel(second.id).state == "cancelled"
    release.set()
    until(lambda: jobs.get(first.id).state == "succeeded")
    jobs.close()
    assert begun == []


def test_a_job_that_is_cancelled_as_it_begins_does_nothing(jobs, monkeypatch):
    """Between its look whether it is to stop and its being shown as running."""
    update, begun = jobs._update, []

    def cancelled_before(id: str, changes: str, *values, **which) -> None:
        if "started" in changes:
            jobs.cancel(id)
        update(id, changes, *values, **which)

    monkeypatch.setattr(jobs, "_update", cancelled_before)
    job = jobs.begin("upsert", lambda control: begun.append(1) or {}, collection="a", place="/a")
    until(lambda: jobs.get(job.id).over)
    assert (jobs.get(job.id).state, begun) == ("cancelled", [])


def test_a_job_that_was_cancelled_tells_how_far_it_came(jobs):
    at, go = threading.Event(), threading.Event()

    def work(control: Control) -> dict:
        control.tell(0.3, "64 of 192 items")
        at.set()
        go.wait()
        control.tell(0.6, "128 of 192 items")
        return {}

    job = jobs.begin("upsert", work, collection="a", place="/a")
    at.wait()
    jobs.cancel(job.id)
    go.set()
    until(lambda: jobs.get(job.id).over)
    found = jobs.get(job.id)
    assert (found.state, found.progress, found.message) == ("cancelled", 0.6, "128 of 192 items")


def test_a_job_that_has_not_ended_is_found_behind_many_that_have(jobs):
    release = threading.Event()
    first = jobs.begin("rebuild", held(release), collection="a", place="/a", alone=True)
    for _ in range(10):
        job = jobs.begin("upsert", lambda control: {}, collection="a", place="/a")
        until(lambda: jobs.get(job.id).over and job.id not in jobs._live)  # noqa: B023
    assert [job.id for job in jobs.unfinished("/a")] == [first.id]
    assert jobs.unfinished("/b") == []
    release.set()


def test_a_job_whose_end_cannot_be_written_has_ended_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "WAIT_SECONDS", 0.05)
    jobs, release = Jobs(tmp_path / "state"), threading.Event()
    job = jobs.begin("rebuild", held(release), collection="a", place="/a", alone=True)
    until(lambda: jobs.get(job.id).message == "half")
    other = sqlite3.connect(tmp_path / "state" / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    release.set()
    until(lambda: job.id not in jobs._live)
    found = jobs.get(job.id)
    assert (found.state, found.progress, found.result) == ("succeeded", 1.0, {"ended": True})
    assert found.started is not None
    assert found.ended is not None
    assert jobs.newest(["/a"]) == [found] == [jobs.cancel(job.id)]
    assert jobs.unfinished("/a") == []
    counts = jobs.count(["/a"])
    assert (counts["rebuild", "running"], counts["rebuild", "succeeded"]) == (0, 1)
    other.execute("ROLLBACK")
    other.close()
    again = jobs.begin("rebuild", lambda control: {}, collection="a", place="/a", alone=True)
    until(lambda: jobs.get(again.id).over)
    jobs.close()
    after = Jobs(tmp_path / "state")
    assert after.get(job.id) == found, "it was written with the next that was"
    after.close()


@pytest.mark.parametrize("way", ["read", "close"])
def test_an_end_is_written_late_when_jobs_are_looked_at_and_when_the_service_ends(tmp_path, monkeypatch, way):
    monkeypatch.setattr(state_module, "WAIT_SECONDS", 0.05)
    jobs, release = Jobs(tmp_path / "state"), threading.Event()
    job = jobs.begin("upsert", held(release), collection="a", place="/a")
    until(lambda: jobs.get(job.id).message == "half")
    other = sqlite3.connect(tmp_path / "state" / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    release.set()
    until(lambda: job.id not in jobs._live)
    other.execute("ROLLBACK")

    def written() -> str:
        return other.execute("SELECT state FROM jobs").fetchone()[0]

    assert written() == "running"
    if way == "read":
        until(lambda: jobs.get(job.id).state == written() == "succeeded")
    jobs.close()
    assert written() == "succeeded"
    other.close()


def test_a_job_whose_beginning_cannot_be_written_runs_until_it_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "WAIT_SECONDS", 0.05)
    jobs, release, ran = Jobs(tmp_path / "state", workers=1), threading.Event(), threading.Event()
    jobs.begin("upsert", lambda control: {"released": release.wait()}, collection="a", place="/a")

    def work(control: Control) -> dict:
        ran.set()
        while True:
            control.tell(0.5, "half")
            time.sleep(0.01)

    job = jobs.begin("rebuild", work, collection="a", place="/a", alone=True)
    other = sqlite3.connect(tmp_path / "state" / FILE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    release.set()
    ran.wait()
    other.execute("ROLLBACK")
    other.close()
    assert jobs.get(job.id).state == "running"
    jobs.cancel(job.id)
    until(lambda: jobs.get(job.id).over)
    assert jobs.get(job.id).state == "cancelled"
    assert jobs.get(job.id).started is not None
    jobs.close()


def test_a_rebuild_gives_up_when_it_is_told_to(tmp_path):
    """Not before it has built, but between its blocks; the collection goes on as it is."""
    with colour_collection(tmp_path / "colours") as collection:
        before = collection.info().index
        with pytest.raises(Stopped):
            collection.build_index("hnsw", stop=lambda: True)
        assert collection.info().index == before


def test_jobs_of_a_service_that_ends_are_interrupted_and_not_forgotten(tmp_path):
    jobs = Jobs(tmp_path / "state")
    job = jobs.begin("rebuild", held(threading.Event()), collection="a", place="/a", alone=True)
    until(lambda: jobs.get(job.id).state == "running")
    jobs.close()
    after = Jobs(tmp_path / "state")
    found = after.get(job.id)
    assert found.state == "failed"
    assert found.problem is not None
    assert found.problem["type"] == "/problems/interrupted"
    assert "Ask for the rebuild again" in found.problem["detail"]
    after.close()


def test_only_collections_that_were_opened_for_writing_are_searched_for_interrupted_jobs(tmp_path):
    jobs, release = Jobs(tmp_path / "state"), threading.Event()
    job = jobs.begin("rebuild", held(release), collection="a", place="/a", alone=True)
    neighbour = Jobs(tmp_path / "state")  # another service with the same state folder
    assert neighbour.mark_interrupted(["/b"]) == 0
    assert not neighbour.get(job.id).over
    assert jobs.mark_interrupted(["/a"]) == 0, "its own are alive"
    assert neighbour.newest(["/b"]) == []
    release.set()
    until(lambda: jobs.get(job.id).state == "succeeded")
    jobs.close()
    neighbour.close()


def test_a_state_without_jobs_has_none(tmp_path):
    jobs = Jobs(tmp_path / "state")
    assert jobs.newest(["/a"]) == []
    with pytest.raises(UnknownJob):
        jobs.get("nobody")
    jobs.close()
    assert not (tmp_path / "state").exists()


# A real process


BUSY = """
import sys, threading
from pathlib import Path
from service.jobs import Jobs

jobs = Jobs(Path(sys.argv[1]))
begun = threading.Event()

def work(control):
    begun.set()
    threading.Event().wait()

job = jobs.begin("rebuild", work, collection="vectors", place=sys.argv[2], alone=True)
begun.wait()
print(job.id, flush=True)
threading.Event().wait()
"""


def test_a_job_that_ran_when_its_process_was_killed_is_shown_as_interrupted(tmp_path):
    path, state = tmp_path / "vectors", tmp_path / "state"
    with create_collection(path, dim=4, fingerprint="f" * 64) as collection:
        collection.add([NewItem("a", np.eye(1, 4, dtype=np.float32)[0])])
    busy = subprocess.Popen(
        [sys.executable, "-c", BUSY, str(state), str(path.resolve())], stdout=subprocess.PIPE, text=True
    )
    assert busy.stdout is not None
    id = busy.stdout.readline().strip()
    busy.send_signal(signal.SIGKILL)
    busy.communicate()
    with serving(str(path), "--state", str(state)) as (_, address), Client(address) as client:
        job = client.job(id)
        assert (job.state, job.kind) == ("failed", "rebuild")
        assert job.problem is not None
        assert job.problem["type"] == "/problems/interrupted"
        assert httpx.get(address + job.problem["type"]).status_code == 200
        assert client.wait_for(client.rebuild("vectors")).state == "succeeded", "the next one is let in"


def test_what_is_remembered_survives_a_restart_of_the_process(tmp_path):
    data, state = tmp_path / "data", tmp_path / "state"
    arguments = ("--data", str(data), "--state", str(state))
    vector = [1.0, 2.0, 0.0, 0.0]
    with serving(*arguments) as (process, address), Client(address) as client:
        client.create_collection("v1", dim=4, model="made elsewhere")
        client.set_alias("shop", "v1")
        first = client.put_item("shop", "a", vector=vector, once="key-1")
        job = client.wait_for(client.rebuild("shop", kind="flat"))
        answer = client.search("shop", vector=[1, 2, 0, 0.5])
        client.send_feedback("shop", answer.query_id, "a", relevant=True)
        process.send_signal(signal.SIGKILL)  # all of it was acknowledged
        process.wait()
    with serving(*arguments) as (process, address), Client(address) as client:
        assert client.aliases() == {"shop": "v1"}
        assert client.put_item("shop", "a", vector=vector, once="key-1") == first
        assert client.get_item("shop", "a").sequence == first.generation, "it was not written again"
        assert client.job(job.id).result == job.result
        assert [(j.query_id, j.id, j.relevant) for j in client.feedback("shop")] == [
            (answer.query_id, "a", True)
        ]
        client.delete_alias("shop")
        client.delete_collection("v1")
        assert client.collections() == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    assert [child.name for child in data.iterdir()] == []


def test_an_empty_data_folder_may_be_served_and_nothing_at_all_may_not(tmp_path):
    refused = dml("serve", "--port", "0")
    assert refused.returncode == 2
    assert "--data" in re.sub(r"\s+", " ", refused.stderr)
