"""What /metrics tells an operator, over a real server: does it answer the question, does it stay small?"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import ColourEncoder, colour_collection, jpeg, running

from dml.collection import create_collection
from dml.collection.base import Figures, NewItem
from dml.collection.local import LocalCollection
from dml.errors import Unreachable
from dml.index.tune import Promise
from dml.stages import Clock, spent, stage, within
from service import watching
from service.app import create_app
from service.engine import Engine, Query, Search
from service.problems import CATALOGUE
from service.settings import Settings

DOCUMENT = Path(__file__).parent.parent / "docs" / "service.md"
ROUTE = "/v1/collections/{collection}/search/image"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@contextmanager
def served(engine: Engine, settings: Settings | None = None) -> Iterator[httpx.Client]:
    with running(create_app(engine, settings)) as address, httpx.Client(base_url=address, timeout=60) as http:
        yield http
    engine.close()


@pytest.fixture
def http(tmp_path: Path) -> Iterator[httpx.Client]:
    with served(Engine({"colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()])) as client:
        yield client


def scrape(http: httpx.Client) -> Samples:
    """(name, labels) -> value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found[(name, tuple(sorted(labels.items())))]


def search(http: httpx.Client, name: str = "colours") -> httpx.Response:
    return http.post(f"/v1/collections/{name}/search/image", files={"file": jpeg("red")})


def until(http: httpx.Client, name: str, wanted: float, **labels: str) -> Samples:
    """Scrape until a sample has this value; what is counted when an answer has ended may come after it."""
    end = time.monotonic() + 30
    while (found := scrape(http)).get((name, tuple(sorted(labels.items())))) != wanted:
        assert time.monotonic() < end, (name, labels, wanted)
        time.sleep(0.02)
    return found


# Documented


def documented() -> dict[str, set[str]]:
    """Name -> labels, from the table of the document."""
    section = DOCUMENT.read_text(encoding="utf-8").partition("\n## Metrics\n")[2].partition("\n| stage |")[0]
    rows = re.findall(r"^\| `([a-z_]+)(?:\{([a-z,]+)\})?` \|", section, re.MULTILINE)
    return {name: set(labels.split(",")) - {""} for name, labels in rows}


def test_the_document_names_what_is_exposed_with_its_labels(tmp_path):
    engine = Engine({"colours": promised(tmp_path / "colours")}, [ColourEncoder()])
    with served(engine) as http:
        assert search(http).status_code == 200
        families = list(text_string_to_metric_families(http.get("/metrics").text))
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in families
    }
    assert all(family.documentation for family in families)
    if not Path("/proc/self/stat").exists():  # elsewhere nobody tells of the process
        exposed |= {name: labels for name, labels in documented().items() if name.startswith("process_")}
    assert exposed == documented()


def test_every_metric_of_ours_begins_alike_and_ends_in_its_unit(http):
    names = {name for name in documented() if not name.startswith("process_")}
    assert all(name.startswith("dml_") for name in names)
    for name in names:
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent)(_|$)", name), (
            "base units: seconds, bytes, shares"
        )


# Requests


def test_stages_are_parts_of_the_request_and_those_of_the_header(http):
    answer = search(http)
    named = re.findall(r"(\w+);dur=", answer.headers["server-timing"])
    assert named == ["receive", "queue", "decode", "inference", "search", "payload"]
    found = until(http, "dml_request_seconds_count", 1, method="POST", route=ROUTE, status="200")
    parts = {
        dict(labels)["stage"]: part
        for (name, labels), part in found.items()
        if name == "dml_stage_seconds_sum"
    }
    assert sorted(parts) == sorted(named)
    whole = value(found, "dml_request_seconds_sum", method="POST", route=ROUTE, status="200")
    assert 0 < sum(parts.values()) < whole
    assert value(found, "dml_embed_batch_size_count") == 1
    assert value(found, "dml_received_bytes_total") == int(answer.request.headers["content-length"])
    assert value(found, "dml_sent_bytes_total") >= len(answer.content)


def test_writes_have_a_stage_of_their_own(http):
    answer = http.put("/v1/collections/colours/items/new", files={"file": jpeg("red")})
    assert re.findall(r"(\w+);dur=", answer.headers["server-timing"])[-1] == "write"
    assert http.delete("/v1/collections/colours/items/new").headers["server-timing"].count("write;dur=") == 1


def test_problems_are_there_before_the_first_one(http):
    found = scrape(http)
    assert {dict(labels)["type"] for name, labels in found if name == "dml_problems_total"} == set(CATALOGUE)
    search(http, "nowhere")
    until(http, "dml_problems_total", 1, type="unknown-collection")


class Slow(ColourEncoder):
    """Embeds when it is told to."""

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), threading.Semaphore(0)

    def embed_arrays(self, arrays: np.ndarray) -> np.ndarray:
        self.asked.release()
        assert self.go.wait(60)
        return super().embed_arrays(arrays)


def test_the_queue_is_seen_while_it_is_full_and_who_is_turned_away(tmp_path):
    encoder = Slow()
    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=0)}, [encoder])
    with served(engine, Settings(workers=1, queue=1)) as http, ThreadPoolExecutor(2) as clients:
        try:
            first = clients.submit(search, http)
            assert encoder.asked.acquire(timeout=30)
            second = clients.submit(search, http)
            until(http, "dml_requests_waiting", 1)  # a scrape is no snapshot: the next sees what came with it
            found = until(http, "dml_requests_in_flight", 3)  # these two, and the scrape
            assert value(found, "dml_requests_pending") == 2
            assert (value(found, "dml_threads"), value(found, "dml_queue_limit")) == (1, 1)
            assert search(http).status_code == 503
            until(http, "dml_problems_total", 1, type="queue-full")
        finally:
            encoder.go.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
        found = until(http, "dml_requests_pending", 0)
        assert value(found, "dml_requests_waiting") == 0


# What clients cannot do to it


def test_clients_make_no_series(http):
    paths = (
        "/v1/collections/colours/items/{}",
        "/v1/collections/{}",
        "/{}",
        "/v1/jobs/{}",
        "/problems/{}",
    )
    for path in paths:
        http.get(path.format("first"))
    http.request("PROPFIND", "/v1")
    search(http)
    before = set(scrape(http))
    for number in range(20):
        for path in paths:
            http.get(path.format(f"made-up-{number}"), headers={"X-Request-Id": f"id-{number}"})
    for method in ("MKCOL", "LOCK", "REPORT", "SEARCH"):
        http.request(method, "/v1")
    grown = set(scrape(http)) - before
    assert all(dict(labels).get("route") == "/metrics" for _, labels in grown), grown
    assert "made-up" not in http.get("/metrics").text
    assert 'method="other"' in http.get("/metrics").text


def test_of_very_many_collections_the_first_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "MOST_LISTED", 3)
    names = [f"c{number}" for number in range(5)]
    with served(Engine({name: colour_collection(tmp_path / name, pictures=0) for name in names})) as http:
        found = scrape(http)
    assert value(found, "dml_collections") == 5
    assert [dict(labels)["collection"] for name, labels in found if name == "dml_collection_items"] == [
        "c0",
        "c1",
        "c2",
    ]


def test_those_named_at_the_start_come_before_those_that_clients_make(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "MOST_LISTED", 2)
    for name in ("zebras", "horses"):
        colour_collection(tmp_path / name, pictures=1).close()
    (tmp_path / "made").mkdir()
    engine = Engine.open([tmp_path / "zebras", tmp_path / "horses"], data=tmp_path / "made")
    engine.create("aardvarks", model="by hand", dim=4, index={"kind": "flat", "options": {}, "promise": None})
    assert watching.listed(engine) == ["horses", "zebras"]
    engine.close()


# Collections


def promised(path: Path, *, items: int = 200) -> LocalCollection:
    """A collection with an index that was chosen for a promise, and measured."""
    collection = create_collection(path, dim=48, fingerprint=ColourEncoder.fingerprint, index="flat")
    rows = np.random.default_rng(0).normal(size=(items, 48)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    collection.add([NewItem(f"i{number}", row, {}) for number, row in enumerate(rows)])
    collection.build_index(promise=Promise(0.9))
    return collection


def test_a_collection_tells_its_size_its_index_and_its_promise(tmp_path):
    began = time.time()
    collection = promised(tmp_path / "shoes")
    with served(Engine({"shoes": collection}, [ColourEncoder()])) as http:
        found, info = scrape(http), http.get("/v1/collections/shoes").json()

        def figure(name: str) -> float:
            return value(found, f"dml_collection_{name}", collection="shoes")

        assert (figure("items"), figure("pending_items"), figure("tombstones")) == (200, 0, 0)
        assert (figure("recall_promised"), figure("promise_kept"), figure("up")) == (0.9, 1, 1)
        assert figure("recall_measured") == info["measured_recall"] >= 0.9
        assert figure("generation") == info["generation"]
        assert figure("bytes") == pytest.approx(info["bytes_on_disk"], rel=0.2), "SQLite's log comes and goes"
        assert began - 5 <= figure("index_written_timestamp_seconds") <= time.time() + 5
        model = ColourEncoder.fingerprint[:12]
        kind = info["index"]["kind"]
        assert value(found, "dml_collection_info", collection="shoes", index=kind, model=model) == 1

        http.put("/v1/collections/shoes/items/new", json={"vector": [1.0] * 48})
        assert http.delete("/v1/collections/shoes/items/i0").status_code == 204
        found = until(http, "dml_collection_tombstones", 1, collection="shoes")
        assert (figure("items"), figure("pending_items")) == (200, 1)
        assert figure("generation") == info["generation"] + 2


def test_what_is_not_known_is_not_told(http):
    names = {name for name, _ in scrape(http)}
    assert "dml_collection_items" in names
    for name in ("recall_promised", "recall_measured", "promise_kept"):
        assert f"dml_collection_{name}" not in names, "no promise was made, and nothing measured"


def test_a_broken_promise_is_told(tmp_path):
    collection = promised(tmp_path / "shoes")
    manifest = collection.manifest
    broken = {**manifest.built, "promise": {**manifest.built["promise"], "holds": False}}
    with collection._present.turn():
        collection._present.save_manifest(manifest.with_(built=broken))
    with served(Engine({"shoes": collection})) as http:
        assert value(scrape(http), "dml_collection_promise_kept", collection="shoes") == 0


def test_a_collection_that_does_not_answer_takes_no_other_figure_with_it(tmp_path):
    broken = colour_collection(tmp_path / "broken", pictures=1)
    engine = Engine({"broken": broken, "colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()])
    with served(engine) as http:
        assert value(scrape(http), "dml_collection_up", collection="broken") == 1
        broken.close()
        found = until(http, "dml_collection_up", 0, collection="broken")
        assert value(found, "dml_collection_up", collection="colours") == 1
        assert value(found, "dml_collection_items", collection="broken") == 4, "as it was when it answered"


class Remote(LocalCollection):
    """Far away: its figures come late, and then not at all."""

    come = threading.Event()

    def figures(self) -> Figures:
        assert self.come.wait(60)
        raise Unreachable("the server does not answer")


def test_a_scrape_does_not_wait_for_a_collection_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "PATIENCE_SECONDS", 0.1)
    colour_collection(tmp_path / "far", pictures=1).close()
    collections = {
        "a-near": colour_collection(tmp_path / "a-near"),
        "far": Remote(tmp_path / "far"),
        "near": colour_collection(tmp_path / "near"),
    }
    with served(Engine(collections)) as http:
        try:
            found = until(http, "dml_collection_items", 20, collection="a-near")
            assert ("dml_collection_up", (("collection", "near"),)) not in found, "its turn has not come"
        finally:
            Remote.come.set()
        until(http, "dml_collection_items", 20, collection="near")
        until(http, "dml_collection_up", 0, collection="far")


def test_jobs_are_counted_by_state(tmp_path):
    with served(Engine({"colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()])) as http:
        assert value(scrape(http), "dml_jobs", kind="rebuild", state="failed") == 0
        assert http.post("/v1/collections/colours/rebuild", json={"kind": "flat"}).status_code == 202
        until(http, "dml_jobs", 1, kind="rebuild", state="succeeded")


def test_before_the_collections_are_loaded_it_answers_all_the_same(tmp_path):
    loaded = threading.Event()
    engine = Engine({"colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()])

    def load() -> Engine:
        assert loaded.wait(60)
        return engine

    with running(create_app(load)) as address, httpx.Client(base_url=address) as http:
        try:
            assert value(scrape(http), "dml_ready") == 0
        finally:
            loaded.set()
        until(http, "dml_ready", 1)
        assert any(name == "dml_encoder_info" for name, _ in scrape(http))


# Several processes

WORKER = """
import sys
from pathlib import Path
from service import metrics
from service.watching import View
metrics.share(Path(sys.argv[1]))
mine = metrics.Metrics(threads=2, queue=4, view=View)
for _ in range(int(sys.argv[2])):
    mine.count_request("GET", "/v1", "200", seconds=0.01, stages={"queue": 0.001})
mine.problems.labels("queue-full").inc()
mine.set_pending(3)
for line in sys.stdin:
    text = mine.render().decode()
    print(len(text.splitlines()))
    print(text, end="", flush=True)
"""


class Worker:
    """A process that counts together with others."""

    def __init__(self, folder: Path, requests: int) -> None:
        command = [sys.executable, "-c", WORKER, str(folder), str(requests)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def scrape(self) -> Samples:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        lines = [self.process.stdout.readline() for _ in range(int(self.process.stdout.readline()))]
        families = text_string_to_metric_families("".join(lines))
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def test_several_processes_count_together(tmp_path):
    workers = [Worker(tmp_path, 3), Worker(tmp_path, 4)]
    try:
        single = workers[1].scrape()
        found = workers[0].scrape()
        single = workers[1].scrape()
        for seen in (found, single):
            assert value(seen, "dml_request_seconds_count", method="GET", route="/v1", status="200") == 7
            assert value(seen, "dml_stage_seconds_count", route="/v1", stage="queue") == 7
            assert value(seen, "dml_problems_total", type="queue-full") == 2
            assert value(seen, "dml_requests_pending") == 6
            assert value(seen, "dml_threads") == 4
            assert value(seen, "dml_ready") == 0
        if Path("/proc/self/stat").exists():
            own = Path(f"/proc/{workers[0].process.pid}/statm").read_text().split()[1]
            page = os.sysconf("SC_PAGE_SIZE")
            assert value(found, "process_resident_memory_bytes") > 1.5 * int(own) * page, "of both"
        workers[1].end()
        left = workers[0].scrape()
        assert value(left, "dml_request_seconds_count", method="GET", route="/v1", status="200") == 7
        assert value(left, "dml_requests_pending") == 3, "what a dead process had running runs no more"
    finally:
        for worker in workers:
            worker.end()


# The clock


def test_each_second_counts_once():
    """A stage inside another one is not part of it, whoever says so, and when."""
    clock = Clock(keep=2)
    with clock.running():
        with stage("search"):
            with stage("payload"):
                spent("queue", 3.0)
            spent("inference", 5.0)
        spent("search", 2.0)
        within("search", "payload", 0.5)
        within("search", "payload", 100.0)
    assert (clock.seconds["queue"], clock.seconds["inference"]) == (3.0, 5.0)
    assert clock.seconds["search"] == 0.0
    assert 2.0 <= clock.seconds["payload"] < 7.0, "all of the 2 s that were moved, and what the blocks took"
    assert (len(clock.intervals), clock.left_out) == (2, 5)
    before = dict(clock.seconds)
    with stage("search"):
        spent("queue", 1.0)
    assert clock.seconds == before, "no clock runs any more"


def test_the_stages_of_a_search_are_no_longer_than_it(tmp_path):
    engine = Engine({"colours": colour_collection(tmp_path / "colours")}, [ColourEncoder()])
    search_of = Search(Query(vector=[1.0] * 48))
    clock = Clock()
    began = time.perf_counter()
    with clock.running():
        engine.search("colours", search_of)
    taken = time.perf_counter() - began
    engine.close()
    assert {"search", "payload"} <= set(clock.seconds)
    assert 0 < sum(clock.seconds.values()) <= taken
