"""Bring the whole stack up and treat it badly: what docs/deployment.md promises, tried.

    python docker/try.py PICTURES ENCODER NEW_ENCODER [--keep]

Needs docker with compose v2, the images (docker compose build), and httpx. It uses a compose project of its
own (dml-try) with ports of its own, and removes it with its volumes at the end. The variables of compose.yaml
(BASE, PROMETHEUS_IMAGE, …) are taken from the environment. Prints a line for each thing that held, and stops
at the first that did not.
"""

import argparse
import json
import os
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
COLLECTION = "tried"
PLACE = f"/v1/collections/{COLLECTION}"
PORT, PROMETHEUS_PORT = 18443, 19090
WRITES = 200


class Failed(Exception):
    """Something did not hold."""


def check(held: bool, told: str) -> None:
    if not held:
        raise Failed(told)
    print(f"ok   {told}", flush=True)


class Stack:
    """The compose project, and the ways to it.

    Args:
        pictures, encoder: what the first collection is built of.
    """

    def __init__(self, pictures: Path, encoder: Path) -> None:
        self.environment = os.environ | {
            "PICTURES": str(pictures.resolve()),
            "ENCODER": str(encoder.resolve()),
            "COLLECTION": COLLECTION,
            "PORT": str(PORT),
            "PROMETHEUS_PORT": str(PROMETHEUS_PORT),
            "SUBNET": "172.30.87.0/24",
        }
        self.key = ""
        self.trusted: ssl.SSLContext | bool = True

    def compose(self, *arguments: str) -> str:
        """What `docker compose …` prints. Raises Failed with its errors."""
        command = ["docker", "compose", "-p", "dml-try", "-f", str(HERE / "compose.yaml"), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def up(self) -> None:
        self.compose("up", "--detach", "--wait")

    def down(self) -> None:
        """Away with all of it, the volume of the backups too."""
        self.compose("--profile", "tools", "down", "--volumes")

    def dml(self, *arguments: str, volumes: tuple[str, ...] = ()) -> str:
        """`dml …` beside the service, in its volume."""
        mounts = [part for volume in volumes for part in ("--volume", volume)]
        return self.compose("run", "--rm", "--no-TTY", *mounts, "dml", *arguments)

    def trust(self) -> None:
        """Take the certificate that the proxy made for itself for a good one."""
        text = self.compose("exec", "--no-TTY", "proxy", "cat", "/certificates/certificate.pem")
        self.trusted = ssl.create_default_context(cadata=text)

    def client(self, *, key: bool = True) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if key and self.key else {}
        return httpx.Client(
            base_url=f"https://localhost:{PORT}", headers=headers, verify=self.trusted, timeout=30
        )

    def ask_prometheus(self, path: str, **params: str) -> Any:
        answer = httpx.get(f"http://localhost:{PROMETHEUS_PORT}/api/v1/{path}", params=params, timeout=10)
        return answer.json()["data"]


def wait_until(told: str, holds: Callable[[], bool], *, seconds: float) -> float:
    """Raises Failed when it does not come to hold in time; how long it took."""
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        try:
            if holds():
                return time.monotonic() - began
        except (httpx.HTTPError, KeyError, ValueError):
            pass
        time.sleep(0.5)
    raise Failed(f"not within {seconds:g} s: {told}")


def try_answers(stack: Stack, pictures: list[Path]) -> None:
    """A search with a real photo through TLS; keys; what is not given out."""
    with stack.client() as http:
        answer = http.post(f"{PLACE}/search/image", files={"file": pictures[0].read_bytes()})
        check(answer.status_code == 200, f"a photo is searched with through TLS: {len(answer.content)} bytes")
        best = answer.json()["hits"][0]
        check(best["score"] > 0.999, f"and finds itself: {best['id']}, {best['score']:.4f}")
        check(http.get("/metrics").status_code == 404, "the proxy gives out no metrics")
        origin = {"Origin": f"https://localhost:{PORT}"}
        asked = http.post(f"{PLACE}/search", json={"query": {"id": best["id"]}}, headers=origin)
        check(asked.status_code == 200, "the page's own requests are taken")
        asked = http.post(
            f"{PLACE}/search", json={"query": {"id": best["id"]}}, headers={"Origin": "https://x"}
        )
        check(asked.status_code == 403, "those of other pages are not")
    stack.key = json.loads(stack.dml("keys", "add", "try", "--scope", "admin", "--json"))["key"]
    with stack.client(key=False) as http:
        check(http.get("/v1/collections").status_code == 401, "once there is a key, it is asked for")


def try_kills(stack: Stack, pictures: list[Path]) -> None:
    """SIGKILL of every container; of the service while items are written."""
    acknowledged: list[str] = []
    gone = threading.Event()

    def write() -> None:
        with stack.client() as http:
            for number in range(WRITES):
                picture = pictures[number % len(pictures)].read_bytes()
                try:
                    answer = http.put(f"{PLACE}/items/new-{number}", files={"file": picture})
                except httpx.HTTPError:
                    break
                if answer.status_code != 201:
                    break
                acknowledged.append(f"new-{number}")
                time.sleep(0.04)  # within the proxy's rate
        gone.set()

    writer = threading.Thread(target=write)
    writer.start()
    wait_until("some writes", lambda: len(acknowledged) >= 20, seconds=60)
    stack.compose("kill", "--signal", "SIGKILL", "service")
    writer.join()
    check(
        gone.is_set() and len(acknowledged) < WRITES, f"killed after {len(acknowledged)} acknowledged writes"
    )
    with stack.client() as http:
        away = http.get("/v1/collections")
        shape = (away.status_code, away.headers.get("retry-after"), away.json()["type"])
        check(shape == (503, "5", "/problems/not-ready"), f"meanwhile the proxy says: {shape}")
    stack.up()
    check_kept(stack, acknowledged, "the service")

    before = stack.ask_prometheus("query", query=f'dml_collection_items{{collection="{COLLECTION}"}}[1h]')
    for name in ("proxy", "prometheus"):
        stack.compose("kill", "--signal", "SIGKILL", name)
        stack.up()
        check_kept(stack, acknowledged, name)
    oldest = before["result"][0]["values"][0]
    after = stack.ask_prometheus("query", query=f'dml_collection_items{{collection="{COLLECTION}"}}[1h]')
    check(after["result"][0]["values"][0] == oldest, "Prometheus has its samples from before it was killed")


def check_kept(stack: Stack, acknowledged: list[str], name: str) -> None:
    """All that was acknowledged is there, with the same certificate and key."""
    found: set[str] = set()
    with stack.client() as http:
        cursor: str | None = None
        while True:
            page = http.get(
                f"{PLACE}/items", params={"limit": 500} | ({"cursor": cursor} if cursor else {})
            ).json()
            found |= {item["id"] for item in page["items"]}
            cursor = page["next_cursor"]
            if cursor is None:
                break
    check(
        set(acknowledged) <= found,
        f"after SIGKILL of {name}: all {len(acknowledged)} items are there, the key and the certificate too",
    )


def try_limits(stack: Stack) -> None:
    """Too large, and too fast."""
    with stack.client() as http:
        answer = http.put(f"{PLACE}/items/large", files={"file": bytes(20_000_000)})
        check(
            (answer.status_code, answer.headers["content-type"]) == (413, "application/problem+json"),
            "20 MB: 413",
        )
        time.sleep(2)

        def ask(_: int) -> httpx.Response:
            return http.get("/v1")

        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(ask, range(600)))
        counts = Counter(answer.status_code for answer in answers)
        refused = [answer for answer in answers if answer.status_code == 429]
        check(set(counts) == {200, 429}, f"600 requests at once from one address: {dict(counts)}")
        check(refused[0].headers["retry-after"] == "1", "what came too fast is told when to come again")
        time.sleep(5)
        check(ask(0).status_code == 200, "5 s later it is answered again")


def try_alerts(stack: Stack) -> None:
    """Prometheus sees all, and says when the service is away."""
    targets = {t["labels"]["job"]: t["health"] for t in stack.ask_prometheus("targets")["activeTargets"]}
    check(targets == {"dml": "up", "proxy": "up", "prometheus": "up"}, f"Prometheus scrapes {targets}")
    rules = [rule for group in stack.ask_prometheus("rules")["groups"] for rule in group["rules"]]
    check(all(rule["health"] == "ok" for rule in rules), f"{len(rules)} alert rules are loaded and evaluate")

    board = json.loads((HERE / "grafana" / "dml.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    answers = [stack.ask_prometheus("query", query=filled(query))["result"] for query in queries]
    with_values = sum(bool(answer) for answer in answers)
    check(
        with_values >= len(queries) - 4,
        f"{with_values} of {len(queries)} queries of the dashboard have values",
    )

    def firing() -> bool:
        alerts = stack.ask_prometheus("alerts")["alerts"]
        return any(a["labels"]["alertname"] == "ServiceDown" and a["state"] == "firing" for a in alerts)

    check(not firing(), "ServiceDown is quiet")
    stack.compose("stop", "service")
    took = wait_until("ServiceDown fires", firing, seconds=180)
    check(True, f"ServiceDown fires {took:.0f} s after the service was stopped")
    stack.up()
    took = wait_until("ServiceDown ends", lambda: not firing(), seconds=120)
    check(True, f"and ends {took:.0f} s after it is up again")


def filled(query: str) -> str:
    """A query of the dashboard with everything chosen."""
    return query.replace("$instance", ".*").replace("$collection", ".*")


@contextmanager
def searching(stack: Stack, alias: str, picture: bytes) -> Iterator[list[tuple[int, str]]]:
    """Search without a pause while the block lasts; (status, collection that answered) of each."""
    seen: list[tuple[int, str]] = []
    stop = threading.Event()

    def search() -> None:
        with stack.client() as http:
            while not stop.is_set():
                answer = http.post(f"/v1/collections/{alias}/search/image", files={"file": picture})
                good = answer.status_code == 200
                seen.append((answer.status_code, answer.json()["collection"] if good else answer.text[:200]))
                time.sleep(0.1)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def try_new_encoder(stack: Stack, pictures: list[Path], encoder: Path) -> None:
    """Another encoder takes over by an alias, while customers search."""
    new = f"{COLLECTION}-2"
    with stack.client() as http:
        http.put("/v1/aliases/shop", json={"collection": COLLECTION}).raise_for_status()
        with searching(stack, "shop", pictures[0].read_bytes()) as seen:
            mount = f"{encoder.resolve()}:/encoder-2:ro"
            arguments = ("index", "build", "/pictures", "--encoder", "/encoder-2")
            stack.dml(*arguments, "--out", f"/data/collections/{new}", volumes=(mount,))
            http.put(f"/v1/collections/{new}", json={}).raise_for_status()
            http.put("/v1/aliases/shop", json={"collection": new}).raise_for_status()
            time.sleep(3)
        statuses = Counter(status for status, _ in seen)
        answered = Counter(name for _, name in seen)
        check(
            set(statuses) == {200}, f"{len(seen)} searches while another encoder took over: {dict(statuses)}"
        )
        check(set(answered) == {COLLECTION, new}, f"answered by {dict(answered)}")
        models = {item["fingerprint"][:12] for item in http.get("/v1/models").json()["items"]}
        check(len(models) == 2, f"without a restart: {sorted(models)}")


def try_backup(stack: Stack) -> None:
    """A backup while the service runs; an item that was deleted since comes back from it."""
    with stack.client() as http:
        count = http.get(PLACE).json()["count"]
        stack.dml("index", "backup", f"/data/collections/{COLLECTION}", f"/backups/{COLLECTION}")
        http.delete(f"{PLACE}/items/new-0").raise_for_status()
        restored = f"/data/collections/{COLLECTION}-restored"
        stack.dml("index", "restore", f"/backups/{COLLECTION}", restored)
        stack.dml("index", "rename", restored, f"{COLLECTION}-restored")
        stack.dml("index", "verify", restored)
        http.put(f"/v1/collections/{COLLECTION}-restored", json={}).raise_for_status()
        back = http.get(f"/v1/collections/{COLLECTION}-restored").json()["count"]
        check(back == count, f"the restored collection has the {count} items of the backup")
        check(
            http.get(f"/v1/collections/{COLLECTION}-restored/items/new-0").status_code == 200,
            "the deleted one too",
        )
        check(
            http.get(f"{PLACE}/items/new-0").status_code == 404, "which is still deleted where it was deleted"
        )


def report(stack: Stack) -> None:
    """Sizes of the images, memory of the containers."""
    for name in ("dml-serve", "dml-proxy"):
        size = subprocess.run(
            ["docker", "image", "inspect", name, "--format", "{{.Size}}"], capture_output=True, text=True
        )
        print(f"image {name}: {int(size.stdout) / 1e6:.0f} MB")
    ids = stack.compose("ps", "--quiet").split()
    shown = ["docker", "stats", "--no-stream", "--format", "{{.Name}}: {{.MemUsage}}", *ids]
    print(subprocess.run(shown, capture_output=True, text=True).stdout, end="")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path)
    parser.add_argument("encoder", type=Path)
    parser.add_argument("new_encoder", type=Path)
    parser.add_argument("--keep", action="store_true", help="leave it running")
    chosen = parser.parse_args()
    pictures = sorted(chosen.pictures.rglob("*.jpg"))[:50]
    stack = Stack(chosen.pictures, chosen.encoder)
    with tempfile.TemporaryDirectory() as runs:
        stack.environment.setdefault("RUNS", runs)
        try:
            stack.down()
            began = time.monotonic()
            stack.up()
            stack.trust()
            check(True, f"up and healthy after {time.monotonic() - began:.0f} s")
            try_answers(stack, pictures)
            try_kills(stack, pictures)
            try_limits(stack)
            try_new_encoder(stack, pictures, chosen.new_encoder)
            try_backup(stack)
            try_alerts(stack)
            report(stack)
        except Failed as error:
            print(f"FAILED {error}", file=sys.stderr)
            print(stack.compose("logs", "--tail", "30"), file=sys.stderr)
            return 1
        finally:
            if not chosen.keep:
                stack.down()
    print("all held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
