"""What a client can do to the server on the wire: too much, too slowly, too often, or in broken ways."""

import ast
import io
import json
import random
import re
import socket
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from PIL import Image
from serving import ColourEncoder, colour_collection, encoded, jpeg, paint, running

from service.app import create_app
from service.engine import Engine
from service.limits import Rate
from service.run import server_config
from service.settings import Settings

ROOT = Path(__file__).parent.parent
PLACE = "/v1/collections/colours"
LIMITS = Settings(
    max_body_bytes=256 * 1024,
    max_header_bytes=8 * 1024,
    header_seconds=0.5,
    body_seconds=0.5,
    stall_seconds=0.5,
    max_connections=20,
)
PROMPT = "GET /livez HTTP/1.1\r\nHost: a\r\n"
FORM = "multipart/form-data; boundary=b"


@contextmanager
def limited(folder: Path, settings: Settings) -> Iterator[str]:
    """The server as `dml serve` configures it."""
    engine = Engine({"colours": colour_collection(folder / "colours", pictures=2)}, [ColourEncoder()])
    app = create_app(engine, settings)
    with running(app, server_config(app, settings)) as address:
        yield address
    engine.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with limited(tmp_path_factory.mktemp("limited"), LIMITS) as found:
        yield found


@pytest.fixture(autouse=True)
def still_alive(address: str) -> Iterator[None]:
    yield
    assert httpx.get(f"{address}/livez", timeout=10).status_code == 200


@contextmanager
def wire(address: str) -> Iterator[socket.socket]:
    url = httpx.URL(address)
    with socket.create_connection((url.host, url.port), timeout=15) as opened:
        yield opened


def everything(opened: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    received = b""
    while True:
        try:
            piece = opened.recv(65536)
        except ConnectionResetError:  # closed with something of ours unread
            return received
        if not piece:
            return received
        received += piece


def answer_to(address: str, sent: bytes) -> bytes:
    with wire(address) as opened:
        opened.sendall(sent)
        return everything(opened)


def assert_problem(answer: bytes, status: int, kind: str) -> dict:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert b"application/problem+json" in head
    assert b"x-request-id" in head.lower()
    found = json.loads(body)
    assert found["type"] == f"/problems/{kind}"
    return found


# Heads


@pytest.mark.parametrize(
    "head",
    [
        PROMPT + f"X-Long: {'x' * 9000}\r\n\r\n",
        PROMPT + "".join(f"X-{n}: {'y' * 80}\r\n" for n in range(200)) + "\r\n",
        f"GET /{'a' * 9000} HTTP/1.1\r\nHost: a\r\n\r\n",
        f"GET /v1/collections?cursor={'a' * 9000} HTTP/1.1\r\nHost: a\r\n\r\n",
        PROMPT + "X-Endless: " + "x" * 300_000,
        "G" * 300_000,
    ],
    ids=["one long line", "many lines", "long path", "long query", "line without end", "method without end"],
)
def test_a_head_that_is_too_large_is_refused(address, head):
    answer = answer_to(address, head.encode())
    if not answer.startswith(b"HTTP/1.1 400"):  # the parser stops at what cannot be a method
        assert assert_problem(answer, 431, "headers-too-large")["limit"] == 8 * 1024


def test_a_head_just_below_the_limit_is_read(address):
    answer = answer_to(address, (PROMPT + f"X-Long: {'x' * 7900}\r\nConnection: close\r\n\r\n").encode())
    assert answer.startswith(b"HTTP/1.1 200")


def test_a_head_that_comes_drop_by_drop_is_not_waited_for(address):
    with wire(address) as opened:
        opened.settimeout(0.05)
        received = b""
        for character in PROMPT + "X-Slow: " + "x" * 1000:
            try:
                opened.sendall(character.encode())
                received += opened.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if received:
                break
    assert_problem(received, 408, "too-slow")


def test_refused_connections_are_counted(address):
    line = 'dml_problems_total{type="headers-too-large"}'
    answer_to(address, (PROMPT + "X: " + "x" * 300_000).encode())
    counted = re.search(rf"^{re.escape(line)} (\d+)", httpx.get(f"{address}/metrics").text, re.MULTILINE)
    assert counted is not None
    assert int(counted[1]) >= 1


def test_a_connection_that_says_nothing_is_closed(address):
    with wire(address) as opened:
        assert everything(opened) == b""


def test_a_second_request_gets_its_own_time(address):
    """The clock of a head starts with its first byte, not with the connection."""
    with wire(address) as opened:
        for _ in range(6):
            time.sleep(0.1)
            opened.sendall((PROMPT + "\r\n").encode())
            assert opened.recv(65536).startswith(b"HTTP/1.1 200")
        opened.sendall(PROMPT.encode())
        assert_problem(everything(opened), 408, "too-slow")


def test_requests_in_one_piece_are_answered_in_order(address):
    count = 60
    last = PROMPT.replace("livez", "nope") + "Connection: close\r\n\r\n"
    answer = answer_to(address, ((PROMPT + "\r\n") * count + last).encode())
    assert answer.count(b"HTTP/1.1 200") == count
    assert answer.count(b"HTTP/1.1 404") == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"GET /li vez HTTP/1.1\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nX-Request-Id: a\rb\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: a\r\nX-\x00: b\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost : a\r\n\r\n",
        b"POST /v1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /v1 HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\nhello",
        b"POST /v1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
    ],
    ids=repr,
)
def test_what_is_not_http_is_malformed_and_never_half_understood(address, sent):
    answer = answer_to(address, sent)
    assert answer.count(b"HTTP/1.1 ") <= 1
    if answer:  # nothing, when an answer was under way as the bytes turned out to be broken
        status = int(answer[9:12])
        assert 400 <= status < 500, answer[:200]
        assert b"problem+json" in answer


# Bodies


def slowly(address: str, head: str, body: bytes, pause: float = 0.1) -> bytes:
    with wire(address) as opened:
        opened.sendall(head.encode())
        opened.settimeout(pause)
        received = b""
        for position in range(0, len(body), 50):
            try:
                opened.sendall(body[position : position + 50])
                received += opened.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if received:
                opened.settimeout(15)
                return received + everything(opened)
    return received


def test_a_body_that_does_not_arrive_in_time_is_told_and_the_connection_closed(address):
    picture = jpeg("red")
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n' + picture * 5
    head = f"POST {PLACE}/search/image HTTP/1.1\r\nHost: a\r\nContent-Type: {FORM}\r\n"
    for framing in (f"Content-Length: {len(part) + 10}", f"Content-Length: {250 * 1024}"):
        answer = slowly(address, f"{head}{framing}\r\n\r\n", part)
        assert_problem(answer, 408, "too-slow")
        assert b"connection: close" in answer.lower()
    silent = answer_to(address, f"{head}Content-Length: 1000\r\n\r\n".encode())
    assert_problem(silent, 408, "too-slow")


def send_for(opened: socket.socket, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        opened.sendall(b"x" * 1000)
        time.sleep(0.05)


def test_the_rest_of_a_refused_body_is_not_taken_for_ever(address):
    """The answer 413 is there at once; what still comes is read, but only for a while."""
    head = f"POST {PLACE}/search/image HTTP/1.1\r\nHost: a\r\nContent-Type: {FORM}\r\n"
    with wire(address) as opened:
        opened.sendall(f"{head}Content-Length: {10**9}\r\n\r\n".encode())
        assert opened.recv(65536).startswith(b"HTTP/1.1 413")
        with pytest.raises(OSError, match=r"[Rr]eset|[Pp]ipe"):
            send_for(opened, seconds=15)


def chunked(head: str) -> bytes:
    return f"POST {PLACE}/search HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n{head}\r\n".encode()


@pytest.mark.parametrize("rest", ["trailers", "one trailer", "extension"])
def test_what_surrounds_the_chunks_of_a_body_is_limited_too(address, rest):
    """Nobody else counts trailers and extensions, and the parser would keep the first."""
    sent = chunked("Content-Type: application/json\r\n") + b"2\r\n{}\r\n"
    sent += {
        "trailers": b"0\r\n" + b"X-Trailer: y\r\n" * 40_000,
        "one trailer": b"0\r\nX-Trailer: " + b"y" * 600_000,
        "extension": b"2;" + b"e" * 600_000,
    }[rest]
    with wire(address) as opened:
        try:
            opened.sendall(sent)
            opened.sendall(b"more")
        except OSError:
            return  # closed while we were sending
        answer = everything(opened)
    assert not answer.startswith(b"HTTP/1.1 5")


def test_a_body_in_many_small_chunks_is_read(address):
    body = json.dumps({"query": {"id": "red/0"}, "limit": 1}).encode()
    pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    answer = answer_to(address, chunked("Content-Type: application/json\r\nConnection: close\r\n") + pieces)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]


# Forms


def form(parts: list[tuple[str, bytes]]) -> bytes:
    return b"".join(b"--b\r\n%s\r\n\r\n%s\r\n" % (head.encode(), data) for head, data in parts) + b"--b--\r\n"


def field(name: str, filename: str | None = None) -> str:
    file = "" if filename is None else f'; filename="{filename}"'
    return f'Content-Disposition: form-data; name="{name}"{file}'


FORMS = {
    "many fields": form([(field(f"f{n}"), b"x") for n in range(3000)]),
    "many files": form([(field("file", "a.jpg"), b"x") for _ in range(2000)]),
    "many headers of a part": form([(field("file", "a") + "\r\nX-A: b" * 5000, b"x")]),
    "one long header of a part": form([(field("file", "a" * 200_000), b"x")]),
    "a long name": form([(field("n" * 100_000), b"x")]),
    "a large text": form([(field("params"), b"[" * 200_000)]),
    "no name": form([("Content-Disposition: form-data", b"x")]),
    "no head": form([("", b"x")]),
    "not closed": form([(field("file", "a.jpg"), jpeg("red"))])[:-8],
    "only the boundary": b"--b--\r\n",
    "nothing": b"",
    "traversal in the name of the file": form([(field("file", "../../../etc/passwd"), b"x")]),
}


# The framework leaves the file of a part without an end to the garbage collector, which closes it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", FORMS)
def test_a_form_that_is_too_much_or_broken_is_refused(address, kind):
    for path in (f"{PLACE}/search/image", "/v1/embeddings"):
        response = httpx.post(address + path, content=FORMS[kind], headers={"Content-Type": FORM}, timeout=20)
        assert 400 <= response.status_code < 500, response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert len(response.content) < 20_000, "an answer must not repeat what was sent"


@pytest.mark.parametrize(
    "content_type",
    ["multipart/form-data", "multipart/form-data; boundary=", f"multipart/form-data; boundary={'b' * 300}",
     "multipart/form-data; boundary=\xff", "multipart/mixed; boundary=b", "text/html", "application/json",
     "application/x-www-form-urlencoded", "image/jpeg", ";;;", "a" * 1000],
)  # fmt: skip
def test_a_form_by_another_name_is_no_form(address, content_type):
    body = form([(field("file", "a.jpg"), jpeg("red"))])
    headers = {"Content-Type": content_type.encode("latin-1")}
    response = httpx.post(f"{address}{PLACE}/search/image", content=body, headers=headers)
    assert response.status_code in (400, 415), response.text


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/json-patch", "text/html; charset=json", "multipart/form-data", ""],
)
def test_json_by_another_name_is_not_json(address, content_type):
    body = json.dumps({"ids": ["red/0"]}).encode()
    headers = {"Content-Type": content_type}
    response = httpx.post(f"{address}{PLACE}/items/delete", content=body, headers=headers)
    assert response.status_code == 415
    assert httpx.get(f"{address}{PLACE}/items/red%2F0").status_code == 200


def test_json_is_utf8_whatever_its_type_says(address):
    body = json.dumps({"query": {"id": "red/0"}}).encode("utf-16")
    headers = {"Content-Type": "application/json; charset=utf-16"}
    response = httpx.post(f"{address}{PLACE}/search", content=body, headers=headers)
    assert response.status_code == 400


# JSON


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("depth", [10, 100, 150, 190, 250, 1000, 30_000])
def test_deep_json_is_read_or_refused_and_comes_back_as_it_was(address, depth):
    text = nested(depth)
    place = f"{address}{PLACE}/items/deep"
    put = httpx.put(place, files={"file": jpeg("red")}, data={"payload": text})
    assert put.status_code in (200, 201, 400, 413, 422), put.text
    if put.status_code < 300:
        assert httpx.get(place).json()["payload"] == json.loads(text)
        httpx.delete(place)
    for body in (f'{{"query": {{"id": "red/0"}}, "filter": {text}}}', f'{{"query": {text}}}'):
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{address}{PLACE}/search", content=body, headers=headers)
        assert 400 <= answer.status_code < 500, answer.text
    if depth < 1000:
        answer = httpx.get(f"{address}{PLACE}/items", params={"filter": text})
        assert 400 <= answer.status_code < 500, answer.text


NUMBERS = [
    "1" * 5000,
    "-" + "9" * 4299,
    "1e400",
    "1E-999999",
    "0." + "3" * 5000,
    "9" * 19,
    str(2**63),
    "1e308",
]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda text: f"{text[:6]}… of {len(text)}")
def test_huge_numbers_are_kept_or_refused(address, number):
    place = f"{address}{PLACE}/items/number"
    put = httpx.put(place, files={"file": jpeg("red")}, data={"payload": f'{{"n": {number}}}'})
    assert put.status_code in (201, 400, 422), put.text
    if put.status_code == 201:
        assert httpx.get(place).status_code == 200
        filtered = {"query": {"id": "red/0"}, "filter": {"must": [{"key": "n", "range": {"gte": 1}}]}}
        assert httpx.post(f"{address}{PLACE}/search", json=filtered).status_code < 500
        httpx.delete(place)
    headers = {"Content-Type": "application/json"}
    body = f'{{"query": {{"id": "red/0"}}, "limit": {number}}}'
    assert httpx.post(f"{address}{PLACE}/search", content=body, headers=headers).status_code in (400, 422)


# Answers


def wait_until_answered(address: str) -> None:
    """Until a connection is let in."""
    end = time.monotonic() + 15
    while True:
        try:
            if httpx.get(f"{address}/livez").status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, "the place was not given back"
        time.sleep(0.05)


def test_a_client_that_takes_nothing_of_its_answer_is_disconnected(tmp_path):
    """A picture larger than all buffers on the way; without the limit, its bytes would be kept for ever."""
    noise = random.Random(1).randbytes(3 * 2600 * 2000)
    large = encoded(Image.frombytes("RGB", (2600, 2000), noise), "BMP")
    ask = f"GET {PLACE}/items/large/image HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
    with limited(tmp_path, Settings(stall_seconds=0.5, max_connections=1)) as address:
        assert httpx.put(f"{address}{PLACE}/items/large", files={"file": large}).status_code == 201
        wait_until_answered(address)
        with wire(address) as opened:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            opened.sendall(ask)
            assert opened.recv(1000).startswith(b"HTTP/1.1 200")
            wait_until_answered(address)  # the only place there is
        with wire(address) as opened:  # slow, but steady
            opened.sendall(ask)
            received = 0
            while piece := len(opened.recv(1024 * 1024)):
                received += piece
                time.sleep(0.02)
        assert received > len(large)


def test_one_connection_too_many_is_told(tmp_path):
    with limited(tmp_path, Settings(max_connections=3)) as address:
        url = httpx.URL(address)
        opened = [socket.create_connection((url.host, url.port), timeout=15) for _ in range(4)]
        assert_problem(everything(opened[3]), 503, "too-many-connections")
        for connection in opened:
            connection.close()
        wait_until_answered(address)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere 127.0.0.2 is no address of this machine")
def test_only_a_proxy_is_believed_about_where_a_request_came_from(tmp_path):
    """Requests from 127.0.0.1 come from a proxy of this machine, those from 127.0.0.2 from somebody."""

    def ask(address: str, forwarded: str, source: str) -> int:
        transport = httpx.HTTPTransport(local_address=source)
        with httpx.Client(transport=transport) as client:
            return client.get(f"{address}/v1", headers={"X-Forwarded-For": forwarded}).status_code

    with limited(tmp_path, Settings(rate=Rate(1, 3600))) as address:
        assert [ask(address, f"192.0.2.{n}", "127.0.0.1") for n in (1, 2, 1)] == [200, 200, 429]
        assert ask(address, "198.51.100.9, 192.0.2.2", "127.0.0.1") == 429, (
            "the last hop is what a proxy adds"
        )
        assert [ask(address, f"192.0.2.{n}", "127.0.0.2") for n in (7, 8)] == [200, 429]


# What lands in headers


@pytest.mark.parametrize(
    "given", ["a\\r\\nX-Evil: 1", "a%0d%0aX-Evil:1", "ü", "x" * 129, "<script>", "a b", ""]
)
def test_a_request_id_that_could_be_more_than_one_is_replaced(address, given):
    response = httpx.get(f"{address}/livez", headers={"X-Request-Id": given.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


@pytest.mark.parametrize(
    "segment", ["a%0D%0AX-Evil:%201", "a%0AX-Evil:1", "%E5%98%8A%E5%98%8DX-Evil:1", "a%00b"]
)
def test_line_breaks_in_ids_and_names_reach_no_header(address, segment):
    for path in (
        f"{PLACE}/items/{segment}",
        f"{PLACE}/items/{segment}/image?size=thumb",
        f"/v1/collections/{segment}",
        f"/v1/collections/{segment}/items/x/similar?cursor={segment}",
        f"/{segment}",
        f"/problems/{segment}",
    ):
        for method in ("GET", "DELETE", "OPTIONS"):
            response = httpx.request(method, address + path)
            assert 400 <= response.status_code < 500
            assert "x-evil" not in response.headers
            assert "\n" not in "".join(response.headers.values())


# Pictures that are something else as well


def polyglots() -> dict[str, bytes]:
    """Real pictures that a browser or an unpacker would also take for something else."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("index.html", "<script>alert(1)</script>")
    page = b"<html><script>alert(1)</script></html>"
    picture = jpeg("red")
    comment = b"\xff\xfe" + (len(page) + 2).to_bytes(2, "big") + page
    gif = encoded(paint("red"), "GIF")
    return {
        "zip": picture + archive.getvalue(),
        "html behind": picture + page,
        "html in a comment": picture[:2] + comment + picture[2:],
        "script in a gif": gif[:6] + gif[6:] + b"/*<svg onload=alert(1)>*/",
        "html in a bmp": encoded(paint("red"), "BMP") + page,
        "html in a tiff": encoded(paint("red"), "TIFF") + page,
    }


@pytest.mark.parametrize("kind", polyglots())
def test_a_picture_that_is_also_something_else_comes_back_as_a_picture_only(address, kind):
    place = f"{address}{PLACE}/items/poly.html"
    data = polyglots()[kind]
    assert httpx.put(place, files={"file": ("poly.html", data, "text/html")}).status_code == 201
    try:
        full = httpx.get(f"{place}/image")
        assert full.content == data
        assert full.headers["content-type"].startswith("image/")
        assert full.headers["x-content-type-options"] == "nosniff"
        assert "sandbox" in full.headers["content-security-policy"]
        assert ("content-disposition" in full.headers) == (kind == "html in a tiff")
        thumb = httpx.get(f"{place}/image", params={"size": "thumb"})
        assert thumb.headers["content-type"] == "image/jpeg"
        assert b"<script" not in thumb.content
        assert b"PK\x03\x04" not in thumb.content
    finally:
        httpx.delete(place)


def test_thumbnails_carry_nothing_of_what_the_camera_wrote(address):
    exif = Image.Exif()
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)  # GPS latitude
    data = encoded(
        paint("red"), "JPEG", exif=exif, comment=b"SecretComment", icc_profile=b"SecretProfile" * 20
    )
    place = f"{address}{PLACE}/items/tagged"
    assert httpx.put(place, files={"file": data}).status_code == 201
    thumb = httpx.get(f"{place}/image", params={"size": "thumb"}).content
    assert b"Secret" in data
    assert b"Secret" not in thumb
    assert b"Exif" not in thumb
    httpx.delete(place)


# What is never read, and never asked


SOURCES = [path for part in ("dml", "service") for path in sorted((ROOT / part).rglob("*.py"))]
CODE_IN_DATA = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
ASKING = {"httpcore", "httpx", "requests", "aiohttp", "urllib3", "urllib.request", "http.client", "ftplib"}


def imported(tree: ast.AST) -> set[str]:
    """Modules that are imported anywhere in a source, and what they lie in."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) if node.module}
    return names | {name.partition(".")[0] for name in names}


def test_nothing_that_could_carry_code_is_ever_read_or_written():
    """No pickle: arrays without it, weights by what reads tensors only."""
    wanted = {("np", "load"): ("allow_pickle", False), ("np", "save"): ("allow_pickle", False)}
    wanted[("torch", "load")] = ("weights_only", True)
    seen = 0
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not imported(tree) & CODE_IN_DATA, path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            target = call.func
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                rule = wanted.get((target.value.id, target.attr))
                if rule is not None:
                    given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
                    assert given.get(rule[0]) is rule[1], f"{path}:{call.lineno}"
                    seen += 1
    assert seen >= 4, "the rule has found what it is about"


def test_one_module_only_can_open_addresses():
    for path in (ROOT / "service").rglob("*.py"):
        if path.name == "fetching.py":
            continue
        assert not imported(ast.parse(path.read_text(encoding="utf-8"))) & ASKING, path


def test_an_address_as_a_query_is_not_opened(address):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.3)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/x.jpg"
        refused = httpx.post(f"{address}{PLACE}/search", json={"query": {"image_url": url}})
        assert refused.status_code == 403
        assert refused.json()["type"] == "/problems/url-fetch-disabled"
        with pytest.raises(TimeoutError):
            listening.accept()


# Paths


TRAVERSALS = [
    "../../etc/passwd", "..\\..\\windows", "/etc/passwd", "file:///etc/passwd", "....//....//etc", ".", "..",
    "~/.ssh/id_rsa", "C:\\x", "a/../../../b", "%2e%2e%2f", "catalog.sqlite", "images/../catalog.sqlite",
]  # fmt: skip


def test_ids_and_names_are_never_paths(tmp_path):
    outside = tmp_path / "outside"
    with limited(outside, LIMITS) as address:
        files = {path.relative_to(outside).parts[:2] for path in outside.rglob("*")}
        for name in TRAVERSALS:
            segment = quote(name, safe="").replace(".", "%2E")
            place = f"{address}{PLACE}/items/{segment}"
            picture = jpeg("red", TRAVERSALS.index(name))
            assert httpx.put(place, files={"file": ("../../x.jpg", picture)}).status_code == 201
            assert httpx.get(f"{place}/image").content == picture
            assert httpx.get(f"{place}/image", params={"size": "thumb"}).status_code == 200
            for path in ("/v1/collections/{}", "/v1/collections/{}/items/red%2F0", "/web/{}"):
                assert httpx.get(address + path.format(segment)).status_code == 404
        found = {path.relative_to(outside).parts[:2] for path in outside.rglob("*")}
        assert found - files <= {("colours", "thumbnails")}, "a file outside of where pictures lie"
        assert [path.name for path in tmp_path.iterdir()] == ["outside"]


SQL = [
    "'; DROP TABLE items; --", "' OR '1'='1", '" OR ""="', "1; DELETE FROM items", "x' UNION SELECT 1--",
    "$.a') --", "[0]", 'a"b', "\\", "%", "_", "*", "?", ":a", "json('x')", "\x00", "é' --",
]  # fmt: skip


@pytest.mark.parametrize("text", SQL, ids=ascii)
def test_sql_in_ids_filters_and_cursors_is_only_text(address, text):
    count = httpx.post(f"{address}{PLACE}/count", json={}).json()["count"]
    leaves = [
        {"key": text, "match": {"value": "x"}},
        {"key": "label", "match": {"value": text}},
        {"key": "label", "match": {"any": [text, "nothing"]}},
        {"key": text, "range": {"gte": 1}},
    ]
    for leaf in leaves:
        for clause in ("must", "should", "must_not"):
            body = {"query": {"id": "red/0"}, "filter": {clause: [leaf]}}
            found = httpx.post(f"{address}{PLACE}/search", json=body)
            assert found.status_code in (200, 422), found.text
            if clause == "must" and found.status_code == 200:
                assert found.json()["hits"] == []
    by_id = {"query": {"id": "red/0"}}
    for body in (
        {"query": {"id": text}},
        {"query": {"positive": [text]}},
        by_id | {"group_by": text},
        by_id | {"cursor": text},
    ):
        assert httpx.post(f"{address}{PLACE}/search", json=body).status_code in (200, 404, 422)
    assert httpx.get(f"{address}{PLACE}/items", params={"cursor": text, "filter": text}).status_code in (
        400,
        422,
    )
    assert httpx.post(f"{address}{PLACE}/items/delete", json={"ids": [text]}).json() == {"deleted": 0}
    assert httpx.post(f"{address}{PLACE}/count", json={}).json()["count"] == count
