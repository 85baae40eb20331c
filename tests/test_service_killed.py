"""The service is killed while clients write to it, and made to work for long: nothing that it acknowledged is
lost, and its memory stays flat.

`make test` has a few kills and a short soak, the longer tiers many kills and ten minutes. By hand:
`DML_TEST_KILLS=30 DML_TEST_SOAK_SECONDS=600 pytest -s tests/test_service_killed.py`.
"""

import io
import json
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from PIL import Image
from test_service_engine import make_collection
from test_service_run import serving

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX"),
    pytest.mark.timeout(3600),  # of the longest tier, and by hand
]

CLIENTS = 4
NAMES = 12
"""Items that each client writes again and again; nobody else writes these."""


QUIET = ("--log-level", "warning")
"""Nobody reads the log while the service runs: a pipe that is full would hold it up."""


@pytest.fixture
def shop(tmp_path: Path, tiny_encoder: Path, tiny_folder: Path) -> Path:
    path = tmp_path / "shapes"
    make_collection(path, tiny_encoder, tiny_folder)
    return path


@pytest.fixture
def pictures(tiny_folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(tiny_folder.rglob("*.jpg"))]


@dataclass
class Writer:
    """A client that knows what its items have to be: what was acknowledged, or what was under way."""

    name: str
    rng: random.Random
    pictures: list[bytes]
    known: dict[str, int | None] = field(
        default_factory=dict
    )  # id -> number of its last write; None: deleted
    under_way: dict[str, int | None] = field(default_factory=dict)
    acknowledged: int = 0
    wrong: list[str] = field(default_factory=list)

    def work(self, address: str, stop: threading.Event) -> None:
        """Write until the service is gone, or until told to stop."""
        with httpx.Client(base_url=f"{address}/v1/collections/shapes", timeout=30) as client:
            while not stop.is_set():
                id = f"{self.name}-{self.rng.randrange(NAMES)}"
                number = self.rng.randrange(10**9)
                delete = self.known.get(id) is not None and self.rng.random() < 0.25
                self.under_way = {id: None if delete else number}
                try:
                    answer = client.delete(f"/items/{id}") if delete else self.put(client, id, number)
                except httpx.TransportError:
                    return
                if answer.status_code not in (200, 201, 204):
                    self.wrong.append(f"{answer.status_code} {answer.text}")
                    return
                self.known.update(self.under_way)
                self.under_way = {}
                self.acknowledged += 1

    def put(self, client: httpx.Client, id: str, number: int) -> httpx.Response:
        picture, payload = self.pictures[number % len(self.pictures)], f'{{"number": {number}}}'
        return client.put(f"/items/{id}", files={"file": picture}, data={"payload": payload})

    def check(self, client: httpx.Client) -> None:
        """Every item is as acknowledged, or as the last write would have made it; that is known then."""
        for id in {**self.known, **self.under_way}:
            found = client.get(f"/items/{id}")
            number = found.json()["payload"]["number"] if found.status_code == 200 else None
            possible = {self.known.get(id)} | ({self.under_way[id]} if id in self.under_way else set())
            assert number in possible, f"{id} is {number}, and only {possible} was written"
            if number is not None:
                image = client.get(f"/items/{id}/image", params={"size": "full"})
                assert image.content == self.pictures[number % len(self.pictures)], id
            self.known[id] = number
        self.under_way = {}


def test_nothing_acknowledged_is_lost_when_the_service_is_killed_under_load(shop, pictures, scale):
    """kill -9 at random moments, while clients put and delete pictures; then the service is started again."""
    kills = int(os.environ.get("DML_TEST_KILLS", 0)) or min(1 + scale, 60)
    writers = [Writer(f"c{n}", random.Random(n), pictures) for n in range(CLIENTS)]
    for seed in range(kills + 1):
        with serving(str(shop), *QUIET) as (process, address):
            with httpx.Client(base_url=f"{address}/v1/collections/shapes", timeout=30) as client:
                for writer in writers:
                    writer.check(client)
                there = sum(number is not None for writer in writers for number in writer.known.values())
                assert client.post("/count", json={}).json()["count"] == there + len(pictures)
                hits = client.post("/search/image", files={"file": pictures[5]}).json()["hits"]
                assert hits[0]["score"] > 0.9999
            if seed == kills:
                break
            stop = threading.Event()
            threads = [threading.Thread(target=w.work, args=(address, stop)) for w in writers]
            for thread in threads:
                thread.start()
            before = sum(writer.acknowledged for writer in writers)
            end = time.monotonic() + 30
            while sum(w.acknowledged for w in writers) < before + CLIENTS and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(random.Random(seed).uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            process.wait(20)
            stop.set()
            for thread in threads:
                thread.join(40)
            acknowledged = sum(writer.acknowledged for writer in writers)
            print(f"seed {seed}: killed after {acknowledged - before} acknowledged writes", flush=True)
        assert not [text for writer in writers for text in writer.wrong]
    total = sum(writer.acknowledged for writer in writers)
    print(f"{kills} kills, {total} acknowledged writes, none lost")
    assert total >= CLIENTS * kills


def test_a_service_that_is_told_to_stop_answers_all_that_it_took(shop, pictures):
    """SIGTERM in the middle of many uploads: what the service has done was told to whoever asked for it."""
    answered, wrong = [], []

    def upload(number: int, address: str) -> None:
        with httpx.Client(timeout=60) as client:
            for turn in range(200):
                try:
                    found = client.put(
                        f"{address}/v1/collections/shapes/items/t{number}-{turn}",
                        files={"file": pictures[number]},
                    )
                except httpx.TransportError:
                    return  # the connection was closed between two requests, or there is no service any more
                (answered if found.status_code == 201 else wrong).append(f"t{number}-{turn}")

    log: list[str] = []
    with serving(str(shop)) as (process, address):
        reader = threading.Thread(target=lambda: log.extend(process.stderr))  # a full pipe stops the service
        reader.start()
        threads = [threading.Thread(target=upload, args=(n, address)) for n in range(8)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 30
        while len(answered) < 16 and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        process.wait(60)
        reader.join(60)
    assert process.returncode == 0, log
    assert wrong == []
    lines = [json.loads(line) for line in log if line.startswith("{")]
    told = [line["status"] for line in lines if line["event"] == "request"]
    assert told == [201] * len(answered)
    with (
        serving(str(shop)) as (_, address),
        httpx.Client(base_url=f"{address}/v1/collections/shapes") as client,
    ):
        for id in answered:
            assert client.get(f"/items/{id}").status_code == 200, id


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
def test_memory_stays_flat_under_searches_and_writes(shop, pictures, scale):
    """Searches with pictures of many sizes, writes and deletions of the same items, thumbnails, errors."""
    seconds = float(os.environ.get("DML_TEST_SOAK_SECONDS", 0)) or min(5.0 + 3 * scale, 600.0)
    with serving(str(shop), *QUIET) as (process, address):
        stop = threading.Event()
        clients = [Soaking(number, pictures) for number in range(CLIENTS)]
        threads = [threading.Thread(target=c.work, args=(address, stop)) for c in clients]
        for thread in threads:
            thread.start()
        sizes: list[int] = []
        end, step = time.monotonic() + seconds, seconds / 40
        while time.monotonic() < end and all(thread.is_alive() for thread in threads):
            time.sleep(step)
            sizes.append(resident(process.pid))
        stop.set()
        for thread in threads:
            thread.join(60)
        files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    assert not [text for client in clients for text in client.wrong]
    quarter = len(sizes) // 4
    early, late = max(sizes[quarter : 2 * quarter]), max(sizes[-quarter:])
    asked = sum(client.asked for client in clients)
    print(
        f"{asked} requests in {seconds:g} s: {[round(s / 2**20) for s in sizes]} MB resident, {files} files"
    )
    assert asked > CLIENTS
    assert late < early + max(0.1 * early, 32 * 2**20), [round(size / 2**20, 1) for size in sizes]
    assert files < 200


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@dataclass
class Soaking:
    """A client that does everything, over and over, on few items of its own."""

    number: int
    pictures: list[bytes]
    asked: int = 0
    wrong: list[str] = field(default_factory=list)

    def work(self, address: str, stop: threading.Event) -> None:
        rng = random.Random(self.number)
        with httpx.Client(base_url=f"{address}/v1/collections/shapes", timeout=60) as client:
            while not stop.is_set():
                id = f"s{self.number}-{rng.randrange(20)}"
                kind = rng.choices(
                    ["search", "put", "delete", "thumbnail", "bad", "filter"], [8, 3, 1, 2, 1, 2]
                )[0]
                found, fine = self.ask(client, kind, id, rng)
                self.asked += 1
                if found.status_code not in fine:
                    self.wrong.append(f"{kind}: {found.status_code} {found.text[:300]}")
                    return

    def ask(
        self, client: httpx.Client, kind: str, id: str, rng: random.Random
    ) -> tuple[httpx.Response, tuple[int, ...]]:
        """The answer, and the statuses that are right."""
        if kind == "search":
            return client.post("/search/image", files={"file": self.picture(rng)}), (200,)
        if kind == "put":
            return client.put(f"/items/{id}", files={"file": self.picture(rng)}), (200, 201)
        if kind == "delete":
            return client.delete(f"/items/{id}"), (204, 404)
        if kind == "thumbnail":
            return client.get(f"/items/{id}/image", params={"size": "thumb"}), (200, 404)
        if kind == "bad":
            cut = rng.choice(self.pictures)[: rng.randrange(1, 400)]
            return client.post("/search/image", files={"file": cut}), (415, 422)
        wanted = {"must": [{"key": "label", "match": {"value": f"class_{rng.randrange(6)}"}}]}
        query = {"query": {"id": f"class_{rng.randrange(6)}/0.jpg"}, "filter": wanted}
        return client.post("/search", json=query), (200,)

    def picture(self, rng: random.Random) -> bytes:
        """One of twelve sizes up to two million pixels."""
        picture = Image.open(io.BytesIO(rng.choice(self.pictures)))
        side = 64 * rng.choice((1, 1, 2, 3, 5, 8, 12, 20))
        out = io.BytesIO()
        picture.resize((side, side)).save(out, "JPEG", quality=80)
        return out.getvalue()
