"""`dml serve` as a process of its own: starting, refusing, stopping, and what it does not load."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import structlog
from PIL import Image
from serving import colour_collection, running
from test_service_engine import make_collection

from dml.collection.base import NewItem
from dml.errors import ServiceError, UsageError
from service import run
from service.app import create_app
from service.engine import Engine, unit
from service.keys import Keys, Scope
from service.settings import Settings

DML = [sys.executable, "-c", "from dml.cli.main import main; main()"]


@pytest.fixture
def collection(tmp_path: Path, tiny_encoder: Path, tiny_folder: Path) -> Path:
    path = tmp_path / "shapes"
    make_collection(path, tiny_encoder, tiny_folder)
    return path


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`dml serve …` on a free port; gives the process and its address once it says that it is ready."""
    command = [*DML, "serve", *arguments, "--port", "0", "--log-format", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"at (http://\S+?)/ ", line)
        if found is None:
            process.kill()
            raise AssertionError(f"no address in {line!r}\n{process.communicate()[1]}")
        yield process, found[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def dml(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*DML, *arguments], capture_output=True, text=True, timeout=60)


def test_serve_answers_a_search_and_stops_on_sigterm(collection, tiny_folder):
    with serving(str(collection)) as (process, address):
        picture = (tiny_folder / "class_1" / "2.jpg").read_bytes()
        place = f"{address}/v1/collections/shapes"
        assert httpx.get(f"{address}/readyz").status_code == 200
        hits = httpx.post(f"{place}/search/image", files={"file": picture}).json()["hits"]
        assert (hits[0]["id"], hits[0]["label"]) == ("class_1/2.jpg", "class_1")
        assert httpx.put(f"{place}/items/kept", files={"file": picture}).status_code == 201
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert (lines[0]["event"], lines[-1]["event"]) == ("starting", "stopped")
    assert [list(line["collections"]) for line in lines if line["event"] == "ready"] == [["shapes"]]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 201]
    assert all(line["request_id"] for line in requests)
    with serving(str(collection)) as (_, address):
        assert httpx.get(f"{address}/v1/collections/shapes/items/kept").status_code == 200


def test_a_request_in_flight_is_answered_before_the_service_stops(collection, tiny_folder):
    """The body arrives slowly; SIGTERM comes in the middle of it."""
    picture = (tiny_folder / "class_0" / "0.jpg").read_bytes()
    sending = threading.Event()

    def slowly() -> Iterator[bytes]:
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
        yield head
        for start in range(0, len(picture), 400):
            yield picture[start : start + 400]
            sending.set()
            time.sleep(0.05)
        yield b"\r\n--b--\r\n"

    with serving(str(collection)) as (process, address):
        answers: list[httpx.Response] = []
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        url = f"{address}/v1/collections/shapes/search/image"
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(url, content=slowly(), headers=headers, timeout=20))
        )
        thread.start()
        assert sending.wait(10)
        process.send_signal(signal.SIGTERM)
        thread.join(20)
        process.communicate(timeout=20)
    assert answers[0].status_code == 200
    assert answers[0].json()["hits"][0]["id"] == "class_0/0.jpg"


def test_serving_loads_no_torch(collection, tiny_folder):
    """A whole life of the service in one process: open, embed, search, put, answer over HTTP."""
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import httpx
from serving import running
from service.app import create_app
from service.engine import Engine, unit
from service.keys import Keys, Scope
from dml.cli.serve import serve
engine = Engine.open([Path({str(collection)!r})])
with running(create_app(engine)) as address:
    picture = Path({str(tiny_folder / "class_0" / "0.jpg")!r}).read_bytes()
    place = address + "/v1/collections/shapes"
    assert httpx.post(place + "/search/image", files={{"file": picture}}).status_code == 200
    assert httpx.put(place + "/items/a", files={{"file": picture}}).status_code == 201
    assert httpx.get(place + "/items/a/image?size=thumb").status_code == 200
    assert httpx.get(address + "/openapi.json").status_code == 200
engine.close()
heavy = [name for name in ("torch", "torchvision", "timm", "sklearn", "matplotlib") if name in sys.modules]
print(heavy)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory from /proc")
def test_many_large_uploads_take_no_more_memory_than_is_let_in(tmp_path):
    """Sixteen threads, pictures of nine million pixels, of which two fit at a time: 12 bytes for a pixel."""
    script = f"""
import re, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from serving import ColourEncoder, encoded
from PIL import Image
from service.engine import Engine, unit
from service.keys import Keys, Scope
from service.run import give_back_large_blocks
from service.settings import Settings

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

give_back_large_blocks()
engine = Engine({{}}, [ColourEncoder()], settings=Settings(max_pixels_in_flight=20_000_000))
upload = Path({str(tmp_path / "large.png")!r}).read_bytes()
before = peak()
with ThreadPoolExecutor(16) as pool:
    list(pool.map(lambda _: engine.embed([upload]), range(16)))
print((peak() - before) / 20_000_000)
engine.close()
"""
    Image.new("LA", (3000, 3000), (90, 200)).save(tmp_path / "large.png")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 2 < float(done.stdout) < 12, done.stdout


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_a_path_cannot_steer_the_terminal_that_shows_the_log(tmp_path, log_format):
    """C0 and C1 controls, a line of one's own, and text turned around."""
    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=1)})
    out = io.StringIO()
    run.configure_logs(Settings(log_format=log_format), out)
    try:
        with running(create_app(engine)) as address:
            for code in (
                "%1B%5B2J",
                "%9B2J",
                "%C2%9B2J",
                "%07",
                "%7F",
                "%0D%0Afake",
                "%E2%80%AE",
                "%E2%80%A8",
            ):
                httpx.get(f"{address}/v1/collections/colours/items/x{code}y")
    finally:
        structlog.reset_defaults()
        engine.close()
    lines = [line for line in out.getvalue().split("\n") if line]
    assert len(lines) == 8
    assert all(line.isprintable() for line in lines), lines
    assert "x%1B[2Jy" in out.getvalue()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_a_public_address_is_refused_unless_told_or_kept_by_keys(host, tmp_path):
    with pytest.raises(UsageError, match=r"dml keys add .* --insecure"):
        run.check_address(host, insecure=False, keys=Keys(tmp_path))
    run.check_address(host, insecure=True, keys=Keys(tmp_path))
    keys = Keys(tmp_path)
    keys.add("shop", scope=Scope.SEARCH)
    run.check_address(host, insecure=False, keys=keys)
    keys.close()


def test_a_collection_that_is_named_twice_is_named_so(tmp_path):
    (tmp_path / "shoes").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "shoes")
    run.check_paths([tmp_path / "shoes"])
    with pytest.raises(UsageError, match="shoes is named twice"):
        run.check_paths([tmp_path / "shoes", tmp_path / "shoes"])
    with pytest.raises(UsageError, match=r"link and .*shoes are one folder, which is named twice"):
        run.check_paths([tmp_path / "shoes", tmp_path / "link"])


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_permission(host, tmp_path):
    run.check_address(host, insecure=False, keys=Keys(tmp_path))


@pytest.mark.parametrize(
    ("host", "allowed", "names"),
    [
        ("127.0.0.1", (), {"127.0.0.1"}),
        ("[::1]", ("photos.lan",), {"::1", "photos.lan"}),
        ("127.8.8.8", (), {"127.8.8.8"}),
        ("0.0.0.0", (), set()),
        ("example.org", (), set()),
        ("0.0.0.0", ("photos.lan",), {"photos.lan"}),
        ("192.0.2.1", ("photos.lan",), {"photos.lan", "192.0.2.1"}),
    ],
)
def test_names_are_checked_on_loopback_and_where_some_are_given(host, allowed, names):
    assert set(run.hosts_of(host, allowed)) == names


def test_a_page_with_a_name_of_its_own_cannot_reach_a_service_on_loopback(tmp_path):
    colour_collection(tmp_path / "colours", pictures=1).close()
    with serving(str(tmp_path / "colours"), "--allow-host", "photos.lan", "--allow-host", "b") as (
        _,
        address,
    ):

        def ask(host: str, path: str = "/v1/collections") -> httpx.Response:
            return httpx.get(address + path, headers={"Host": host})

        port = httpx.URL(address).port
        for host in (f"127.0.0.1:{port}", "localhost", "[::1]:1", "LOCALHOST:99", "photos.lan:80", "b"):
            assert ask(host).status_code == 200, host
        for host in ("evil.example", f"127.0.0.1.evil.example:{port}", "localhost.evil.example", "", "[::2]"):
            refused = ask(host)
            assert refused.status_code == 421, host
            assert refused.json()["type"] == "/problems/misdirected-request"
        assert httpx.get(f"{address}/problems/misdirected-request").status_code == 200
        for path in ("/", "/livez", "/openapi.json", "/metrics"):
            assert ask("evil.example", path).status_code == 421
        assert (
            httpx.delete(
                f"{address}/v1/collections/colours/items/red%2F0", headers={"Host": "evil.example"}
            ).status_code
            == 421
        )
        assert httpx.get(f"{address}/v1/collections/colours/items/red%2F0").status_code == 200


def test_a_public_address_with_keys_is_served_to_their_holders(tmp_path):
    colour_collection(tmp_path / "colours", pictures=1).close()
    with Keys(tmp_path / "state") as keys:
        text, _ = keys.add("shop", scope=Scope.SEARCH)
    options = ["--host", "0.0.0.0", "--state", str(tmp_path / "state"), "--max-pixels", "1000"]
    with serving(str(tmp_path / "colours"), *options) as (_, address):
        place = f"{address}/v1/collections"
        assert httpx.get(place).status_code == 401
        assert httpx.get(place, headers={"api-key": text}).status_code == 200
        assert httpx.get(f"{address}/v1", headers={"api-key": text}).json()["limits"]["max_pixels"] == 1000
        assert "server" not in httpx.get(f"{address}/livez").headers
        with socket.create_connection((httpx.URL(address).host, httpx.URL(address).port), timeout=10) as wire:
            wire.sendall(b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n")
            assert wire.recv(1000).startswith(b"HTTP/1.1 431"), (
                "the limits of the wire are those of `dml serve`"
            )


def test_refusals_are_one_message_and_exit_codes(tmp_path):
    colour_collection(tmp_path / "colours", pictures=1).close()
    (tmp_path / "folder").mkdir()
    for arguments, code, text in (
        ([str(tmp_path / "colours"), "--host", "0.0.0.0"], 2, "--insecure"),
        ([str(tmp_path / "nowhere")], 1, "There is no collection folder"),
        ([str(tmp_path / "folder")], 1, "folder"),
        ([str(tmp_path / "colours"), "--runtime", "abacus"], 2, "abacus"),
        ([str(tmp_path / "colours"), "--runtime", "fused/abacus-f32"], 2, "abacus-f32"),
        ([str(tmp_path / "colours"), "--workers", "2"], 2, "--read-only"),
        ([str(tmp_path / "colours"), "--allow-host", "http://a.b/"], 2, "bare name"),
        ([str(tmp_path / "colours"), "--cors-origin", "*"], 2, "name each"),
        ([str(tmp_path / "colours"), "--rate", "many"], 2, "100/min"),
        ([str(tmp_path / "colours"), "--max-pixels", "0"], 2, "max-pixels"),
    ):
        done = dml("serve", *arguments, "--port", "0")
        assert done.returncode == code, done.stderr
        assert text in done.stderr
        assert "Traceback" not in done.stderr


def test_a_taken_port_is_told(tmp_path):
    with run.bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ServiceError, match=f"127.0.0.1:{port}.*--port"):
            run.bind("127.0.0.1", port)


def test_addresses_can_be_opened_in_a_browser():
    with run.bind("127.0.0.1", 0) as listening:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", run.address_of(listening))
    with run.bind("0.0.0.0", 0) as listening:
        assert run.address_of(listening).startswith("http://127.0.0.1:")


def test_help_of_serve_loads_no_server():
    script = (
        "import sys, dml.cli.serve; print([m for m in ('fastapi', 'numpy', 'torch') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]", done.stderr


# Several processes


def processes_of(log: str) -> list[int]:
    """Those that said that they are starting, in that order."""
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line["process"] for line in lines if line["event"] == "starting"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_several_workers_answer_follow_the_writer_and_are_replaced(tmp_path):
    """Two workers; one is killed. Another process writes, as `dml index add` would."""
    with (
        colour_collection(tmp_path / "colours") as writer,
        serving(
            str(tmp_path / "colours"),
            "--workers",
            "2",
            "--read-only",
            "--open-metrics",
            "--log-level",
            "info",
        ) as (process, address),
    ):
        place = f"{address}/v1/collections/colours"
        first = children(process.pid)
        assert len(first) == 2
        writer.add([NewItem("new", unit(range(1, 49), dim=48, where="a row"))])
        for _ in range(8):  # each on a connection of its own, so that both are asked
            assert httpx.post(f"{place}/count", json={}).json()["count"] == 21
        assert httpx.put(f"{place}/items/a", json={"vector": [1.0] * 48}).status_code == 403
        for one in first:  # after the second, only those that replaced them are left to answer
            os.kill(one, signal.SIGKILL)
            end = time.monotonic() + 60
            while (one in children(process.pid) or len(children(process.pid)) < 2) and time.monotonic() < end:
                time.sleep(0.05)
            assert httpx.post(f"{place}/count", json={}, timeout=60).json()["count"] == 21
        assert not set(first) & set(children(process.pid))
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert set(first) < set(processes_of(log))
    assert "a worker died and is replaced" in log
    assert all(not Path(f"/proc/{pid}").exists() for pid in processes_of(log))


def children(pid: int) -> list[int]:
    """The workers that a process has now; its other helpers are none of them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid and "spawn_main" in (stat.parent / "cmdline").read_text():
                found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_workers_end_when_the_one_that_looks_after_them_is_killed(tmp_path):
    colour_collection(tmp_path / "colours", pictures=1).close()
    with serving(str(tmp_path / "colours"), "--workers", "2", "--read-only") as (process, _):
        workers = children(process.pid)
        process.kill()
        end = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < end:
            time.sleep(0.05)
        assert len(workers) == 2
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_workers_that_cannot_start_say_why_once(tmp_path, tiny_encoder):
    colour_collection(tmp_path / "colours", pictures=1).close()
    shutil.copytree(tiny_encoder, tmp_path / "colours" / "encoder")
    done = dml("serve", str(tmp_path / "colours"), "--workers", "2", "--read-only", "--port", "0")
    assert done.returncode == 1
    assert "was made by the encoder" in done.stderr
    assert "Traceback" not in done.stderr
