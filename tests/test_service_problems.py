"""Everything a request can do wrong: a problem document each time, the right status, and nothing lost."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import ColourEncoder, colour_collection, encoded, jpeg, paint, running

from dml import errors
from dml.collection.base import PayloadTooLarge
from service import schemas
from service.app import create_app
from service.engine import Engine
from service.problems import CATALOGUE, KIND_OF, problem_of
from service.settings import Settings

PLACE = "/v1/collections/colours"
LIMIT = 512 * 1024


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service that takes bodies of 512 KB and pictures of a million pixels."""
    collection = colour_collection(tmp_path_factory.mktemp("collections") / "colours")
    settings = Settings(max_body_bytes=LIMIT, max_pixels=1_000_000, max_payload_bytes=1000, max_ids=3)
    engine = Engine({"colours": collection}, [ColourEncoder()], settings=settings)
    with running(create_app(engine)) as found:
        yield found
    engine.close()


@pytest.fixture
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=20) as client:
        yield client
        assert client.post(f"{PLACE}/count", json={}).json()["count"] == 20, (
            "the request changed the collection"
        )


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-content-type-options"] == "nosniff"
    body = response.json()
    schemas.ProblemAnswer.model_validate(body)
    assert (body["type"], body["status"]) == (f"/problems/{kind}", status)
    assert body["request_id"] == response.headers["x-request-id"]
    assert kind in CATALOGUE
    return body


def upload(http: httpx.Client, data: bytes, name: str = "picture.jpg") -> httpx.Response:
    return http.post(f"{PLACE}/search/image", files={"file": (name, data, "image/jpeg")})


# Pictures


def test_a_text_file_named_jpg_is_not_a_picture(http):
    assert_problem(upload(http, b"Dear colleague, this is a letter.\n" * 20), 415, "unsupported-media")


@pytest.mark.parametrize(
    "data", [b"%PDF-1.7 ...", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"PK\x03\x04" + b"0" * 99]
)
def test_files_of_other_kinds_are_named(http, data):
    assert_problem(upload(http, data), 415, "unsupported-media")


def test_an_empty_upload_says_so(http):
    assert "empty" in assert_problem(upload(http, b""), 422, "invalid-image")["detail"]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_cut_jpeg_is_an_invalid_picture(http, share):
    whole = jpeg("red")
    assert_problem(upload(http, whole[: max(4, int(share * len(whole)))]), 422, "invalid-image")


def make_unusual() -> dict[str, bytes]:
    """Pictures that are fine, but not 8-bit RGB."""
    picture = paint("green", 2)
    deep = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    frames = [paint("green", 2), paint("red", 1)]
    return {
        "cmyk": encoded(picture.convert("CMYK"), "JPEG"),
        "palette": encoded(picture.convert("P"), "PNG"),
        "alpha": encoded(picture.convert("RGBA"), "PNG"),
        "deep": encoded(deep, "PNG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "webp": encoded(picture, "WEBP"),
    }


@pytest.mark.parametrize("kind", ["cmyk", "palette", "alpha", "deep", "animated", "webp"])
def test_unusual_pictures_are_searched_with(http, kind):
    answer = upload(http, make_unusual()[kind])
    assert answer.status_code == 200, answer.text
    if kind != "deep":
        assert answer.json()["hits"][0]["id"] == "green/2"


def test_a_picture_on_its_side_is_turned_before_it_is_compared(http):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned = paint("blue", 1).transpose(Image.Transpose.ROTATE_90)
    hit = upload(http, encoded(turned, "JPEG", quality=95, exif=exif)).json()["hits"][0]
    assert hit["id"] == "blue/1"
    assert hit["score"] > 0.999


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels that packs to almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = zlib.compress(b"\0" * (side // 8 + 1) * side, 9)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_refused_unopened(http):
    data = bomb(40_000)
    assert len(data) < LIMIT
    started = time.monotonic()
    assert_problem(upload(http, data), 413, "decompression-bomb")
    assert time.monotonic() - started < 10, "opening it takes longer, and 1.6 GB"


# Bodies


def test_a_declared_upload_of_fifty_megabytes_is_refused_before_it_is_sent(address):
    """The answer comes although not one byte of the body has been sent."""
    host, port = httpx.URL(address).host, httpx.URL(address).port
    with socket.create_connection((host, port), timeout=10) as wire:
        head = f"POST {PLACE}/search/image HTTP/1.1\r\nHost: {host}\r\n"
        head += f"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: {50 * 1024 * 1024}\r\n\r\n"
        wire.sendall(head.encode())
        answer = wire.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 413")
    assert "image-too-large" in answer


def test_an_undeclared_upload_is_cut_off_at_the_limit(address):
    """Chunked: the service answers after its limit, long before the fifty megabytes are there."""
    host, port = httpx.URL(address).host, httpx.URL(address).port
    sent, answer = 0, b""
    with socket.create_connection((host, port), timeout=10) as wire:
        head = f"POST {PLACE}/search/image HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n"
        head += "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        wire.sendall(head.encode())
        part = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
        wire.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        wire.settimeout(0.05)
        piece = b"\xff" * 65536
        while sent < 50 * 1024 * 1024 and not answer:
            wire.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            sent += len(piece)
            if sent > 2 * LIMIT:
                wire.settimeout(10)  # nothing more is needed for its answer but its time
            try:
                answer = wire.recv(65536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 413"), answer[:200]
    assert sent < 4 * LIMIT


def test_a_large_upload_through_an_ordinary_client_is_told_the_limit(http):
    body = assert_problem(upload(http, b"\xff\xd8\xff" + b"0" * (50 * 1024 * 1024)), 413, "image-too-large")
    assert body["limit"] == LIMIT
    huge = http.post(f"{PLACE}/search", json={"query": {"id": "x" * LIMIT}})
    assert_problem(huge, 413, "body-too-large")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1,2", b'{"query": {"id": "\xff"}}', b'{"query": "\\ud800"}', b"[" * 100_000]
)
def test_what_is_not_json_is_malformed(http, body):
    response = http.post(f"{PLACE}/search", content=body, headers={"Content-Type": "application/json"})
    assert_problem(response, 400, "malformed")


def test_a_body_of_another_type_is_told_the_right_one(http):
    plain = http.post(f"{PLACE}/search", content=b"{}", headers={"Content-Type": "text/plain"})
    assert assert_problem(plain, 415, "unsupported-media")["allowed"] == ["application/json"]
    form = http.post(f"{PLACE}/search/image", json={})
    assert assert_problem(form, 415, "unsupported-media")["allowed"] == ["multipart/form-data"]
    none = http.put(f"{PLACE}/items/x")
    assert_problem(none, 415, "unsupported-media")


def test_broken_multipart_is_malformed(http):
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = http.post(f"{PLACE}/search/image", content=b"--y\r\nnonsense", headers=headers)
    assert response.status_code in (400, 422)
    no_boundary = http.post(
        f"{PLACE}/search/image", content=b"x", headers={"Content-Type": "multipart/form-data"}
    )
    assert_problem(no_boundary, 400, "malformed")


def wrong_fields() -> list[tuple[dict, str]]:
    """(body of a search, pointer at what is wrong with it)."""
    by_id = {"query": {"id": "red/0"}}
    return [
        ({}, "/query"),
        ({"query": {}}, "/query"),
        ({"query": {"id": "a", "vector": [1.0]}}, "/query"),
        ({"query": {"negative": ["red/0"]}}, "/query"),
        ({"query": {"id": 5}}, "/query/id"),
        ({"query": {"id": ""}}, "/query/id"),
        ({"query": {"image": "no base64!"}}, "/query/image"),
        ({"query": {"vector": [1, "2"]}}, "/query/vector/1"),
        ({"query": {"vector": [True]}}, "/query/vector/0"),
        ({"query": {"vector": []}}, "/query/vector"),
        ({"query": {"positive": "red/0"}}, "/query/positive"),
        ({"query": {"id": "red/0", "extra": 1}}, "/query/extra"),
        (by_id | {"limit": 0}, "/limit"),
        (by_id | {"limit": 1001}, "/limit"),
        (by_id | {"limit": "5"}, "/limit"),
        (by_id | {"limit": 2.5}, "/limit"),
        (by_id | {"offset": -1}, "/offset"),
        (by_id | {"limit": 1000, "offset": 9_001}, "/offset"),
        (by_id | {"score_threshold": 2}, "/score_threshold"),
        (by_id | {"with_payload": "yes"}, "/with_payload"),
        (by_id | {"params": {"effort": 0}}, "/params/effort"),
        (by_id | {"params": {"speed": 1}}, "/params/speed"),
        (by_id | {"limt": 5}, "/limt"),
        (by_id | {"a/b~c": 5}, "/a~1b~0c"),
    ]


@pytest.mark.parametrize(("body", "pointer"), wrong_fields(), ids=lambda value: str(value)[:60])
def test_a_wrong_field_is_pointed_at(http, body, pointer):
    problem = assert_problem(http.post(f"{PLACE}/search", json=body), 422, "invalid-request")
    assert pointer in [error["pointer"] for error in problem["errors"]]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(http, number):
    vector = "[" + "0.5," * 47 + number + "]"
    text = f'{{"query": {{"vector": {vector}}}}}'
    response = http.post(f"{PLACE}/search", content=text, headers={"Content-Type": "application/json"})
    assert_problem(response, 422, "invalid-request")
    put = http.put(
        f"{PLACE}/items/x",
        content=text.replace('"query": {', "")[:-1],
        headers={"Content-Type": "application/json"},
    )
    assert_problem(put, 422, "invalid-request")


def test_a_vector_of_another_dimension_is_refused(http):
    problem = assert_problem(
        http.post(f"{PLACE}/search", json={"query": {"vector": [0.5] * 47}}), 422, "dimension-mismatch"
    )
    assert (problem["expected"], problem["given"]) == (48, 47)
    assert_problem(http.put(f"{PLACE}/items/x", json={"vector": [0.5] * 49}), 422, "dimension-mismatch")


def test_a_vector_without_direction_is_refused(http):
    assert_problem(http.post(f"{PLACE}/search", json={"query": {"vector": [0] * 48}}), 422, "vector-invalid")
    opposite = {"query": {"vector": [1e-320] + [0] * 47}}
    assert http.post(f"{PLACE}/search", json=opposite).status_code in (200, 422)


def test_what_this_version_does_not_have_is_named(http):
    response = http.post(f"{PLACE}/search", json={"query": {"id": "red/0"}, "match_rate": 0.01})
    assert assert_problem(response, 422, "not-available")["missing"] == "match_rate"


def test_text_and_addresses_as_queries_are_refused(http):
    text = http.post(f"{PLACE}/search", json={"query": {"text": "a red shoe"}})
    assert assert_problem(text, 422, "not-available")["missing"] == "query/text"
    url = http.post(f"{PLACE}/search", json={"query": {"image_url": "http://169.254.169.254/"}})
    assert_problem(url, 403, "url-fetch-disabled")


def test_fields_of_a_form_are_checked_like_those_of_json(http):
    def post(**form) -> httpx.Response:
        return http.post(f"{PLACE}/search/image", **form)

    picture = jpeg("red")
    pointers = {
        "/file": post(data={"params": "{}"}, files={"other": b"x"}),
        "/params/limit": post(files={"file": picture}, data={"params": '{"limit": 0}'}),
        "/params/query/id": post(files={"file": picture}, data={"params": '{"query": {"id": "red/0"}}'}),
        "/surprise": post(files={"file": picture}, data={"surprise": "1"}),
        "/params": post(files={"file": picture, "params": b"{}"}),
    }
    for pointer, response in pointers.items():
        problem = assert_problem(response, 422, "invalid-request")
        known = [error["pointer"] for error in problem["errors"]]
        assert pointer in known or pointer == "/file", (pointer, known)
    assert_problem(post(files={"file": picture}, data={"params": "{"}), 400, "malformed")
    assert_problem(post(files=[("file", picture), ("file", picture)]), 422, "invalid-request")


@pytest.mark.parametrize(
    "payload", ['{"vector": NaN}', "[1]", '"text"', '{}, "vector": [1]', '{"a": "\\ud800"}', "{"]
)
def test_a_payload_that_is_no_json_object_is_refused(http, payload):
    response = http.put(f"{PLACE}/items/x", files={"file": jpeg("red")}, data={"payload": payload})
    assert response.status_code in (400, 422), response.text
    assert response.headers["content-type"] == "application/problem+json"


def test_a_payload_has_a_limit(http):
    response = http.patch(f"{PLACE}/items/red%2F0", json={"payload": {"text": "x" * 2000}})
    assert assert_problem(response, 413, "body-too-large")["limit"] == 1000


def test_changes_cannot_add_up_to_more_than_a_payload_may_have(http):
    """Each change is small; the sum is not."""
    place = f"{PLACE}/items/red%2F0"
    before = http.get(place).json()["payload"]
    for key in ("a", "b", "c"):
        response = http.patch(place, json={"payload": {key: "x" * 400}})
        if response.status_code != 200:
            break
    problem = assert_problem(response, 413, "body-too-large")
    assert problem["limit"] == 1000
    assert problem["errors"][0]["pointer"] == "/payload"
    stored = http.get(place).json()["payload"]
    assert set(stored) == {*before, "a", "b"}, "what was refused must not be stored"
    assert http.patch(place, json={"payload": {"a": None, "b": None}}).json()["payload"] == before


def test_a_payload_that_is_too_large_already_may_shrink(tmp_path):
    collection = colour_collection(tmp_path / "colours", pictures=1)
    collection.update_payload("red/0", {"old": "x" * 3000, "more": "x" * 300})
    engine = Engine({"colours": collection}, settings=Settings(max_payload_bytes=1000))
    assert "more" not in engine.update_payload("colours", "red/0", {"more": None}).payload
    with pytest.raises(PayloadTooLarge, match="at most 1,000"):
        engine.update_payload("colours", "red/0", {"more": "x"})
    engine.close()


def test_an_item_is_either_a_picture_or_a_vector(http):
    for body in ({}, {"payload": {}}, {"vector": [1.0] * 48, "image": "AAAA"}):
        assert_problem(http.put(f"{PLACE}/items/x", json=body), 422, "invalid-request")


def test_delete_takes_ids_or_a_filter(http):
    place = f"{PLACE}/items/delete"
    assert_problem(http.post(place, json={}), 422, "invalid-request")
    assert_problem(http.post(place, json={"ids": ["a", "b", "c", "d"]}), 422, "invalid-request")
    for everything in ({}, {"must": []}):
        body = assert_problem(http.post(place, json={"filter": everything}), 422, "filter-invalid")
        assert "every item" in body["detail"]


# Addresses


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/v1/nope",
        "/v1/collections/colours/nope",
        "/web/..%2Frun.py",
        "/web/page.py",
        "/%2e%2e/etc/passwd",
    ],
)
def test_an_unknown_address_is_not_found(http, path):
    assert_problem(http.get(path), 404, "not-found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1", ["GET"]),
        ("POST", f"{PLACE}/items/red%2F0", ["DELETE", "GET", "PATCH", "PUT"]),
        ("PUT", f"{PLACE}/search", ["POST"]),
        ("PATCH", "/", ["GET", "HEAD"]),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(http, method, path, allowed):
    response = http.request(method, path)
    assert assert_problem(response, 405, "method-not-allowed")["allowed"] == allowed
    assert response.headers["allow"] == ", ".join(allowed)


def test_bytes_in_the_path_that_are_not_utf8_are_malformed(http):
    assert_problem(http.get(f"{PLACE}/items/%ff%fe"), 400, "malformed")


def test_an_unknown_collection_is_named_with_those_there_are(http):
    for response in (
        http.get("/v1/collections/shoes"),
        http.post("/v1/collections/shoes/search", json={"query": {"id": "a"}}),
        http.post("/v1/collections/shoes/search/image", files={"file": jpeg("red")}),
        http.put("/v1/collections/shoes/items/a", files={"file": jpeg("red")}),
        http.get("/v1/collections/%2e%2e%2fcolours"),
    ):
        assert "colours" in assert_problem(response, 404, "unknown-collection")["detail"]


def test_an_unknown_item_is_named(http):
    for response in (
        http.get(f"{PLACE}/items/nobody"),
        http.get(f"{PLACE}/items/nobody/image"),
        http.get(f"{PLACE}/items/nobody/similar"),
        http.patch(f"{PLACE}/items/nobody", json={"payload": {}}),
        http.post(f"{PLACE}/search", json={"query": {"positive": ["red/0", "nobody"]}}),
    ):
        assert "nobody" in assert_problem(response, 404, "unknown-item")["detail"]


@pytest.mark.parametrize("cursor", ["x", "!!!", base64.urlsafe_b64encode(b"2:abc").decode(), "é"])
def test_an_invented_cursor_is_refused(http, cursor):
    assert_problem(http.get(f"{PLACE}/items", params={"cursor": cursor}), 422, "cursor-invalid")


@pytest.mark.parametrize("params", [{"limit": 0}, {"limit": 1001}, {"limit": "x"}, {"size": "huge"}])
def test_wrong_query_parameters_are_pointed_at(http, params):
    path = f"{PLACE}/items/red%2F0/image" if "size" in params else f"{PLACE}/items"
    problem = assert_problem(http.get(path, params=params), 422, "invalid-request")
    assert problem["errors"][0]["in"] == "query"
    assert problem["errors"][0]["pointer"] == "/" + next(iter(params))


# The service's own state


def test_every_error_of_ours_becomes_a_problem_of_the_catalogue():
    def below(cls: type) -> Iterator[type]:
        yield cls
        for child in cls.__subclasses__():
            yield from below(child)

    assert set(KIND_OF.values()) <= set(CATALOGUE)
    for cls in below(errors.DmlError):
        if cls.__init__ is errors.DmlError.__init__ or cls.__init__ is Exception.__init__:
            problem = problem_of(cls("what went wrong"))
            assert problem.slug in CATALOGUE
            assert (problem.slug == "internal-error") == ("what went wrong" not in problem.detail) or cls in (
                errors.StorageError,
                errors.Unreachable,
            )  # whose messages name files and addresses


def test_a_failure_of_the_service_says_nothing_of_its_inside(tmp_path):
    class Failing(ColourEncoder):
        def embed_arrays(self, arrays: np.ndarray) -> np.ndarray:
            raise RuntimeError("secret path /srv/models/key.pem")

    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=1)}, [Failing()])
    with running(create_app(engine)) as address:
        response = httpx.post(f"{address}{PLACE}/search/image", files={"file": jpeg("red")})
        body = assert_problem(response, 500, "internal-error")
        assert "secret" not in json.dumps(body)
        assert httpx.get(f"{address}/livez").status_code == 200
        count = httpx.get(f"{address}/metrics").text
        assert 'dml_problems_total{type="internal-error"} 1.0' in count
    engine.close()


def test_a_full_disk_is_told_without_names_of_files():
    problem = problem_of(errors.StorageError("/srv/collections/a/images: no space left on device"))
    assert (problem.slug, problem.status_code) == ("storage", 507)
    assert "/srv" not in problem.detail


def test_a_read_only_service_refuses_every_write_and_answers_searches(tmp_path):
    collection = colour_collection(tmp_path / "colours", pictures=1)
    engine = Engine({"colours": collection}, [ColourEncoder()], settings=Settings(read_only=True))
    with running(create_app(engine)) as address, httpx.Client(base_url=address) as http:
        for response in (
            http.put(f"{PLACE}/items/a", files={"file": jpeg("red")}),
            http.patch(f"{PLACE}/items/red%2F0", json={"payload": {}}),
            http.delete(f"{PLACE}/items/red%2F0"),
            http.post(f"{PLACE}/items/delete", json={"ids": ["red/0"]}),
        ):
            assert_problem(response, 403, "read-only")
        assert http.get(f"{PLACE}/items/red%2F0/similar").json()["total"] == 3
        assert http.get(PLACE).json()["read_only"] is True
    engine.close()


def test_without_its_encoder_a_collection_takes_ids_and_vectors_only(tmp_path):
    engine = Engine({"colours": colour_collection(tmp_path / "colours", pictures=1)})
    with running(create_app(engine)) as address, httpx.Client(base_url=address) as http:
        assert_problem(http.post(f"{PLACE}/search/image", files={"file": jpeg("red")}), 422, "not-available")
        assert http.get(f"{PLACE}/items/red%2F0/similar").status_code == 200
        assert http.get(PLACE).json()["accepts"] == ["id", "vector"]
    engine.close()


class Gate(ColourEncoder):
    """Embeds only when it is let."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()

    def embed_arrays(self, arrays: np.ndarray) -> np.ndarray:
        self.entered.set()
        assert self.open.wait(20)
        return super().embed_arrays(arrays)


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def in_background(task: Callable[[], httpx.Response]) -> tuple[threading.Thread, list[httpx.Response]]:
    results: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: results.append(task()))
    thread.start()
    return thread, results


def test_a_full_queue_is_told_at_once_and_the_waiting_are_answered(tmp_path, gate):
    collection = colour_collection(tmp_path / "colours", pictures=1, encoder=ColourEncoder())
    engine = Engine({"colours": collection}, [gate], settings=Settings(workers=1, queue=1))
    with running(create_app(engine)) as address:

        def ask() -> httpx.Response:
            return httpx.post(f"{address}{PLACE}/search/image", files={"file": jpeg("red")}, timeout=20)

        waiting = [in_background(ask) for _ in range(2)]
        assert gate.entered.wait(10)
        wait_for_metric(address, "dml_requests_pending 2.0")  # or the next one would take the second place
        refused = ask()
        assert_problem(refused, 503, "queue-full")
        assert int(refused.headers["retry-after"]) >= 1
        assert httpx.get(f"{address}/livez", timeout=2).status_code == 200, "the event loop must stay free"
        gate.open.set()
        for thread, results in waiting:
            thread.join(20)
            assert results[0].status_code == 200
        assert ask().status_code == 200
    engine.close()


def wait_for_metric(address: str, line: str) -> None:
    """Until /metrics shows this line; it has to answer however busy the service is."""
    end = time.monotonic() + 10
    while True:
        scraped = httpx.get(f"{address}/metrics", timeout=5)
        assert scraped.status_code == 200, "an overload must be seen"
        if line in scraped.text.splitlines():
            return
        assert time.monotonic() < end, scraped.text
        time.sleep(0.01)


def test_an_answer_that_takes_too_long_is_given_up(tmp_path, gate):
    collection = colour_collection(tmp_path / "colours", pictures=1)
    engine = Engine({"colours": collection}, [gate], settings=Settings(deadline_seconds=0.2))
    with running(create_app(engine)) as address:
        response = httpx.post(f"{address}{PLACE}/search/image", files={"file": jpeg("red")}, timeout=20)
        assert_problem(response, 504, "deadline")
        gate.open.set()
    engine.close()


def test_until_the_collections_are_loaded_the_service_is_alive_and_not_ready(tmp_path):
    go = threading.Event()

    def load() -> Engine:
        assert go.wait(20)
        return Engine({"colours": colour_collection(tmp_path / "colours", pictures=1)}, [ColourEncoder()])

    with running(create_app(load)) as address:
        assert httpx.get(f"{address}/livez").status_code == 200
        response = httpx.get(f"{address}/readyz")
        assert_problem(response, 503, "not-ready")
        assert response.headers["retry-after"] == "1"
        assert_problem(httpx.get(f"{address}/v1/collections"), 503, "not-ready")
        assert httpx.get(f"{address}/").status_code == 200
        assert "dml_collection_items" in httpx.get(f"{address}/metrics").text
        go.set()
        end = time.monotonic() + 10
        while httpx.get(f"{address}/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert httpx.get(f"{address}/v1/collections").status_code == 200


def test_a_loader_that_fails_is_reported(tmp_path):
    failures: list[BaseException] = []

    def load() -> Engine:
        raise errors.DamagedFile("the catalogue is damaged")

    with running(create_app(load, on_failure=failures.append)) as address:
        end = time.monotonic() + 10
        while not failures and time.monotonic() < end:
            time.sleep(0.01)
        assert_problem(httpx.get(f"{address}/readyz"), 503, "not-ready")
    assert isinstance(failures[0], errors.DamagedFile)


def test_pictures_in_a_body_of_the_right_size_are_read_whole(http):
    """A picture just below the limit is not cut by the guard."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (330, 330, 3), dtype=np.uint8))
    out = io.BytesIO()
    noise.save(out, "PNG")
    assert LIMIT * 0.55 < out.tell() < LIMIT
    assert upload(http, out.getvalue()).status_code == 200
