"""Queries by the address of a picture: from allowed hosts only, and nothing but a picture comes of it."""

import asyncio
import http.server
import ipaddress
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from serving import ColourEncoder, colour_collection, jpeg, running

from dml.client import Client, Problem
from dml.errors import ConfigError
from service.app import create_app
from service.engine import Engine
from service.fetching import CheckedNetwork, RefusedAddress
from service.reach import AllowedHost, may_connect
from service.settings import Settings

SEARCH = "/v1/collections/colours/search"
LIMIT = 100_000
SECONDS = 2.0


class Pictures(http.server.BaseHTTPRequestHandler):
    """A host of pictures, good ones and others; it notes what it was asked."""

    protocol_version = "HTTP/1.1"
    asked: list[tuple[str, dict[str, str]]]
    elsewhere: str
    both: threading.Barrier

    def do_GET(self) -> None:
        self.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        path = self.path.partition("?")[0]
        if path == "/red.jpg":
            self.reply(200, jpeg("red", 3))
        elif path == "/large.jpg":
            self.reply(200, jpeg("red", 3) + bytes(LIMIT // 5))
        elif path == "/moved.jpg":
            self.reply(302, b"", Location=self.elsewhere)
        elif path == "/text.jpg":
            self.reply(200, b"root:x:0:0:root:/root:/bin/bash")
        elif path == "/declared.jpg":
            self.reply(200, b"", length=LIMIT + 1)
        elif path == "/endless.jpg":
            self.endless()
        elif path == "/slow.jpg":
            time.sleep(2 * SECONDS)
            self.reply(200, jpeg("red"))
        elif path == "/together.jpg":
            with suppress(threading.BrokenBarrierError):
                self.both.wait(SECONDS)
                self.reply(200, jpeg("red", 3))
        elif path == "/broken.jpg":
            self.wfile.write(b"not HTTP at all\r\n\r\n")
            self.close_connection = True
        else:
            self.reply(404, b"the secrets of the host")

    def reply(self, status: int, body: bytes, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        with suppress(OSError):  # who asked has given up
            self.wfile.write(body)

    def endless(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"2000\r\n" + bytes(0x2000) + b"\r\n")
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128  # or a batch of connections waits for the second try of some


@contextmanager
def hosting(context: ssl.SSLContext | None = None, *, elsewhere: str = "") -> Iterator[tuple[int, list]]:
    """A host of pictures on loopback: its port, and what it was asked."""
    asked: list[tuple[str, dict[str, str]]] = []
    told = {"asked": asked, "elsewhere": elsewhere, "both": threading.Barrier(2)}
    handler = type("Handler", (Pictures,), told)
    server = Server(("127.0.0.1", 0), handler)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1], asked
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def serving(folder: Path, *hosts: str) -> Iterator[httpx.Client]:
    settings = Settings(fetch_hosts=hosts, fetch_seconds=SECONDS, max_body_bytes=LIMIT)
    with (
        closing(Engine({"colours": colour_collection(folder / "colours")}, [ColourEncoder()])) as engine,
        running(create_app(engine, settings)) as address,
        httpx.Client(base_url=address) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def other() -> Iterator[tuple[int, list]]:
    """A host on loopback that is not on the list."""
    with hosting() as found:
        yield found


@pytest.fixture(scope="module")
def host(other: tuple[int, list]) -> Iterator[tuple[int, list]]:
    with hosting(elsewhere=f"http://127.0.0.1:{other[0]}/red.jpg") as found:
        yield found


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, host: tuple[int, list]) -> Iterator[httpx.Client]:
    port = host[0]
    hosts = (f"127.0.0.1:{port}", f"localhost:{port}", "*.pattern.example.org")
    with serving(tmp_path_factory.mktemp("fetching"), *hosts) as found:
        yield found


def by_address(client: httpx.Client, url: str) -> httpx.Response:
    return client.post(SEARCH, json={"query": {"image_url": url}, "limit": 3})


def assert_problem(response: httpx.Response, status: int, slug: str) -> dict:
    assert response.status_code == status, response.text
    assert response.json()["type"] == f"/problems/{slug}"
    return response.json()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_picture_at_an_allowed_address_finds_what_it_shows(client, host, name):
    found = by_address(client, f"http://{name}:{host[0]}/red.jpg?size=large&x=%20y")
    assert found.status_code == 200, found.text
    uploaded = client.post(f"{SEARCH}/image", files={"file": jpeg("red", 3)}, data={"params": '{"limit": 3}'})
    assert [(hit["id"], hit["score"]) for hit in found.json()["hits"]] == [
        (hit["id"], hit["score"]) for hit in uploaded.json()["hits"]
    ]
    assert "fetch;dur=" in found.headers["server-timing"]
    assert "fetch" not in uploaded.headers["server-timing"]


def test_the_host_is_told_nothing_but_what_is_wanted(client, host):
    asked = host[1]
    asked.clear()
    secret = {"Authorization": "Bearer secret", "Cookie": "a=b", "X-Request-Id": "mine"}
    body = {"query": {"image_url": f"http://localhost:{host[0]}/red.jpg#part"}}
    assert client.post(SEARCH, json=body, headers=secret).status_code == 200
    [(path, headers)] = asked
    assert path == "/red.jpg"
    assert set(headers) == {"host", "user-agent", "accept", "accept-encoding", "connection"}
    assert headers["host"] == f"localhost:{host[0]}"


@pytest.mark.parametrize(
    "url",
    [
        "http://{allowed}@{other}/red.jpg", "http://{other}/red.jpg", "http://127.1/red.jpg",
        "http://169.254.169.254/latest/meta-data", "http://[::ffff:127.0.0.1]:{port}/red.jpg",
        "http://{allowed}.evil.example/red.jpg", "http://0.0.0.0:{port}/red.jpg", "http://2130706433:{port}/",
        "http://localhost/red.jpg", "https://localhost/red.jpg", "http://localhost:99999/red.jpg", "http://localhost\u3002evil.example/",
        "http://[2606:2800:220:1::1%.pattern.example.org]/", "http://[::ffff:10.0.0.7%25.pattern.example.org]/",
        "http://inner.pattern.example.org:9000/",
    ],
)  # fmt: skip
def test_other_hosts_and_ports_are_not_asked(client, host, other, url):
    asked = len(other[1])
    url = url.format(allowed=f"localhost:{host[0]}", other=f"127.0.0.1:{other[0]}", port=host[0])
    refused = by_address(client, url)
    assert refused.status_code in (403, 422), refused.text
    assert refused.json()["type"] in ("/problems/url-fetch-disabled", "/problems/invalid-request")
    assert len(other[1]) == asked


@pytest.mark.parametrize(
    "url",
    ["", "red.jpg", "file:///etc/passwd", "ftp://localhost/x", "gopher://localhost/", "http://", "data:,x",
     "http://user:secret@localhost/x", "http://localhost:x/", "http://local host/", "//localhost/red.jpg",
     "http://localhost/\r\nX-Evil: 1", "http://[::1/", "javascript:alert(1)"],
)  # fmt: skip
def test_what_is_no_address_of_http_is_said(client, url):
    refused = by_address(client, url)
    problem = assert_problem(refused, 422, "invalid-request")
    assert problem["errors"][0]["pointer"] == "/query/image_url"


def test_redirections_are_not_followed(client, host, other):
    asked = len(other[1])
    problem = assert_problem(by_address(client, f"http://localhost:{host[0]}/moved.jpg"), 422, "fetch-failed")
    assert "redirections are not followed" in problem["detail"]
    assert len(other[1]) == asked


@pytest.mark.parametrize(
    ("path", "status", "slug", "said"),
    [
        ("text.jpg", 415, "unsupported-media", ""),
        ("missing.jpg", 422, "fetch-failed", "404"),
        ("declared.jpg", 413, "image-too-large", f"{LIMIT + 1:,} bytes"),
        ("endless.jpg", 413, "image-too-large", "more"),
        ("slow.jpg", 422, "fetch-failed", "within 2 s"),
        ("broken.jpg", 422, "fetch-failed", "no HTTP answer"),
    ],
)
def test_what_comes_is_a_picture_or_a_problem(client, host, path, status, slug, said):
    problem = assert_problem(by_address(client, f"http://localhost:{host[0]}/{path}"), status, slug)
    assert said in problem["detail"]
    assert "secrets" not in str(problem)
    assert "root" not in str(problem)


@pytest.mark.parametrize("name", ["a.", "x" * 64, "xn--a"])
def test_a_name_that_cannot_be_looked_up_is_said_and_spoils_no_batch(client, host, name):
    bad = f"http://{name}.pattern.example.org/x.jpg"
    body = [{"query": {"image_url": url}} for url in (bad, f"http://localhost:{host[0]}/red.jpg")]
    answered = client.post(f"{SEARCH}/batch", json={"searches": body})
    assert answered.status_code == 200, answered.text
    wrong, right = answered.json()["results"]
    assert wrong["type"] in ("/problems/fetch-failed", "/problems/invalid-request")
    assert right["hits"][0]["id"] == "red/3"


def test_what_would_be_refused_anyway_is_not_fetched(client, host):
    asked = host[1]
    asked.clear()
    query = {"query": {"image_url": f"http://localhost:{host[0]}/red.jpg"}}
    assert_problem(client.post(SEARCH, json={**query, "match_rate": 0.1}), 422, "not-available")
    body = {"searches": [{**query, "match_rate": 0.1}, {**query, "limit": 900, "offset": 9900}]}
    results = client.post(f"{SEARCH}/batch", json=body).json()["results"]
    assert [one["status"] for one in results] == [422, 422]
    assert not asked


def test_the_pictures_of_a_request_have_the_bytes_of_one_upload_together(client, host):
    asked = host[1]
    asked.clear()
    url = f"http://localhost:{host[0]}/large.jpg"
    body = {"searches": [{"query": {"image_url": url}, "limit": 1}] * 8}
    results = client.post(f"{SEARCH}/batch", json=body).json()["results"]
    assert len(asked) == 8, results
    assert sum("hits" in one for one in results) <= 4
    assert sum(one.get("type") == "/problems/image-too-large" for one in results) >= 4
    assert by_address(client, url).status_code == 200, "another request has room of its own"


def test_nobody_there_is_said(tmp_path, monkeypatch):
    known = socket.getaddrinfo

    def resolve(host: str, *arguments: object, **options: object) -> object:
        if host.endswith(".invalid"):  # what a name server says of it, and not after how many seconds
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with serving(tmp_path, f"127.0.0.1:{port}", "no-such-host.invalid") as client:
        for address in (f"http://127.0.0.1:{port}/x.jpg", "http://no-such-host.invalid/x.jpg"):
            problem = assert_problem(by_address(client, address), 422, "fetch-failed")
            assert "could not be reached" in problem["detail"]


def test_a_batch_fetches_side_by_side_and_says_which_did_not_come(client, host):
    urls = ["together.jpg", "slow.jpg", "together.jpg", "missing.jpg"]
    body = [{"query": {"image_url": f"http://localhost:{host[0]}/{path}"}, "limit": 1} for path in urls]
    answered = client.post(f"{SEARCH}/batch", json={"searches": [*body, {"query": {"id": "gold/1"}}]})
    assert answered.status_code == 200, answered.text
    one, slow, other, missing, gold = answered.json()["results"]
    assert slow["type"] == missing["type"] == "/problems/fetch-failed"
    assert one["hits"][0]["id"] == other["hits"][0]["id"] == "red/3", "either waits for the other"
    assert gold["hits"][0]["label"] == "gold"


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with hosting(context) as (port, asked), serving(tmp_path, f"localhost:{port}") as client:
        assert_problem(by_address(client, f"https://localhost:{port}/red.jpg"), 422, "fetch-failed")
        assert not asked


@pytest.mark.parametrize(
    ("text", "takes", "refuses"),
    [
        ("Photos.Example.org", "https://photos.example.org:443", "https://photos.example.org:8443"),
        ("photos.example.org", "http://photos.example.org:80", "http://photos.example.org:443"),
        ("photos.example.org:8443", "https://photos.example.org:8443", "https://photos.example.org:443"),
        ("*.example.org", "https://a.b.example.org:443", "https://example.org:443"),
        ("*.example.org", "https://a.example.org:443", "https://aexample.org:443"),
        ("10.0.0.7:9000", "http://10.0.0.7:9000", "http://10.0.0.70:9000"),
        ("[fd00::7]:9000", "http://fd00::7:9000", "http://fd00::8:9000"),
        ("fd00::7", "https://fd00::7:443", "https://fd00::8:443"),
    ],
)
def test_what_an_entry_of_the_list_takes(text, takes, refuses):
    entry = AllowedHost.parse(text)
    for address, expected in ((takes, True), (refuses, False)):
        scheme, _, rest = address.partition("://")
        host, _, port = rest.rpartition(":")
        assert entry.takes(scheme, host, int(port)) is expected, address


@pytest.mark.parametrize(
    "text",
    ["", "*", "*.", "*.org", "*.10.0.0.7", "https://a.org", "a.org/path", "a.org:", "a.org:0", "a.org:70000",
     "a.*.org", "a.org:x", "[fd00::7", "user@a.org", "a org"],
)  # fmt: skip
def test_an_entry_that_means_nothing_is_refused(text):
    with pytest.raises(ConfigError, match="A host to fetch pictures from is"):
        Settings(fetch_hosts=(text,))


@pytest.mark.parametrize(
    ("address", "exact", "pattern"),
    [
        ("93.184.216.34", True, True), ("2606:2800:220:1::1", True, True),
        ("10.0.0.7", True, False), ("127.0.0.1", True, False), ("::1", True, False), ("fd00::7", True, False),
        ("100.64.0.1", True, False), ("2002:a00:7::", True, False), ("64:ff9b::a00:7", True, False),
        ("2002:5db8:d822::1", True, False), ("64:ff9b::5db8:d822", True, True), ("192.0.0.9", True, False),
        ("::ffff:93.184.216.34", True, True), ("64:ff9b:1::a00:7", True, False), ("fec0::1", True, False),
        ("::127.0.0.1", True, False), ("::ffff:0:127.0.0.1", True, False), ("192.0.0.192", False, False),
        ("64:ff9b::a9fe:a9fe", False, False), ("2002:a9fe:a9fe::1", False, False),
        ("168.63.129.16", False, False), ("::ffff:168.63.129.16", False, False),
        ("fd00:ec2::254", False, False),
        ("::ffff:10.0.0.7", True, False), ("169.254.169.254", False, False), ("fe80::1", False, False),
        ("::ffff:169.254.169.254", False, False), ("0.0.0.0", False, False), ("::", False, False),
        ("224.0.0.1", False, False), ("ff02::1", False, False),
    ],
)  # fmt: skip
def test_where_a_name_may_lead(address, exact, pattern):
    where = ipaddress.ip_address(address)
    assert may_connect(where, public_only=False) is exact
    assert may_connect(where, public_only=True) is pattern


def test_a_name_is_resolved_once_and_what_it_leads_to_is_checked(monkeypatch, host):
    """A name of a pattern that leads inwards is not connected to; one that was named is, at that address."""
    resolved = []

    def lead(name, port, *args, **kwargs):
        resolved.append(name)
        known = {"inner.example.org": ["127.0.0.1"], "link.named.org": ["169.254.169.254", "127.0.0.1"]}
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in known[name]]

    monkeypatch.setattr(socket, "getaddrinfo", lead)
    entries = ("*.example.org", f"link.named.org:{host[0]}", "inner.example.org:9")
    threads = ThreadPoolExecutor(1)
    network = CheckedNetwork([AllowedHost.parse(entry) for entry in entries], threads)

    async def connect(name: str) -> tuple:
        stream = await network.connect_tcp(name, host[0], timeout=2)
        peer = stream.get_extra_info("server_addr")
        await stream.aclose()
        return peer

    with pytest.raises(RefusedAddress):
        asyncio.run(connect("inner.example.org"))
    assert resolved == ["inner.example.org"]
    assert asyncio.run(connect("link.named.org"))[0] == "127.0.0.1"
    assert resolved == ["inner.example.org", "link.named.org"]
    threads.shutdown()


def test_the_client_asks_by_address_too(client, host):
    url = f"http://localhost:{host[0]}/red.jpg"
    with Client(str(client.base_url)) as asking:
        assert asking.search("colours", image_url=url, limit=1).hits[0].id == "red/3"
        with pytest.raises(Problem, match="one of"):
            asking.search("colours", image_url=url, id="red/3")


def test_many_at_once_stay_bounded_and_those_that_hang_take_no_turn_for_good(client, host):
    urls = [f"http://localhost:{host[0]}/slow.jpg" for _ in range(32)]
    body = {"searches": [{"query": {"image_url": url}} for url in urls]}

    def ask() -> None:
        answers.append(client.post(f"{SEARCH}/batch", json=body).status_code)

    for _ in range(3):
        answers: list[int] = []
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers) == [200, 200, 503]
        assert by_address(client, f"http://localhost:{host[0]}/red.jpg").status_code == 200
