"""Who may do what: keys, scopes, rates, other origins' pages, and the headers that every answer has."""

import io
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import structlog
from fastapi.routing import APIRoute
from serving import ColourEncoder, colour_collection, jpeg, running
from starlette.routing import Route

from dml.client import Client, Problem
from dml.errors import ConfigError
from service import run
from service.app import create_app
from service.auth import NEEDED, PUBLIC, network_of
from service.engine import Engine
from service.keys import Keys, Scope
from service.limits import Rate
from service.middleware import SAFE_HEADERS
from service.problems import CATALOGUE
from service.routes import ROUTERS
from service.settings import Settings

PLACE = "/v1/collections/colours"
SHOP = "https://shop.example.org"


@dataclass
class Guarded:
    """A running service, its keys, and the text of one key for each scope."""

    address: str
    keys: Keys
    texts: dict[Scope, str]

    def ask(self, path: str, scope: Scope | None = None, method: str = "GET", **request) -> httpx.Response:
        headers = dict(request.pop("headers", {}))
        if scope is not None:
            headers["Authorization"] = f"Bearer {self.texts[scope]}"
        return httpx.request(method, self.address + path, headers=headers, timeout=20, **request)


@contextmanager
def guarded(folder: Path, settings: Settings | None = None, *, scopes: tuple[Scope, ...] = tuple(Scope)):
    """A service with a key for each of the scopes."""
    keys = Keys(folder / "state")
    texts = {scope: keys.add(str(scope), scope=scope)[0] for scope in scopes}
    engine = Engine({"colours": colour_collection(folder / "colours", pictures=2)}, [ColourEncoder()])
    with running(create_app(engine, settings or Settings(), keys=keys)) as address:
        yield Guarded(address, keys, texts)
    engine.close()
    keys.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with guarded(tmp_path_factory.mktemp("guarded")) as found:
        yield found


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["type"] == f"/problems/{kind}"
    assert kind in CATALOGUE
    return body


# The table


def routes() -> set[tuple[str, str]]:
    """(method, template) of everything that the app answers."""
    app = create_app(Engine({}))
    listed = [route for router in ROUTERS for route in router.routes]
    listed += [route for route in app.routes if isinstance(route, Route)]
    assert all(isinstance(route, (APIRoute, Route)) for route in listed), "a kind of route that is not walked"
    included = [route for route in app.routes if not isinstance(route, Route)]
    assert len(included) in (0, len(ROUTERS)), "something is mounted beside the routers"
    return {(method, route.path) for route in listed for method in route.methods or ()}


def test_every_route_has_its_scope_in_the_table_and_the_table_nothing_else():
    assert routes() == set(NEEDED), "a new route needs a line in service.auth.NEEDED"


def test_whatever_changes_a_collection_needs_more_than_a_search_key():
    asking = {"search", "search/image", "search/batch", "count", "embeddings", "feedback"}
    for (method, path), needed in NEEDED.items():
        if method in ("PUT", "PATCH", "DELETE"):
            assert needed is not None, path
            assert needed >= Scope.WRITE, path
        if method == "POST":
            asks = any(path.endswith(f"/{name}") for name in asking)
            assert (needed == Scope.SEARCH) == asks, path
        if path.startswith("/v1"):
            assert needed is not PUBLIC, path


def concrete(path: str) -> str:
    values = {
        "{collection}": "colours",
        "{id:path}": "red%2F0",
        "{name}": "page.js",
        "{slug}": "unauthorized",
        "{alias}": "shop",
        "{job}": "0" * 32,
    }
    return re.sub(r"\{[^}]+\}", lambda found: values[found[0]], path)


@pytest.mark.parametrize(("method", "path"), sorted(NEEDED), ids=" ".join)
def test_a_route_answers_keys_of_its_scope_and_above_only(service, method, path):
    needed = NEEDED[method, path]
    place = concrete(path)
    if needed is PUBLIC:
        assert service.ask(place, method=method).status_code == 200
        wrong = service.ask(place, method=method, headers={"api-key": "dml_wrong"})
        assert wrong.status_code == 200, "what needs no key does not look at one"
        return
    refused = service.ask(place, method=method)
    assert_problem(refused, 401, "unauthorized")
    assert refused.headers["www-authenticate"] == 'Bearer realm="dml"'
    for scope in Scope:
        if scope < needed:
            response = service.ask(place, scope, method)
            assert str(needed) in assert_problem(response, 403, "forbidden")["detail"]
            assert f'scope="{needed}"' in response.headers["www-authenticate"]
    if method == "GET":
        for scope in (scope for scope in Scope if scope >= needed):
            status = service.ask(place, scope, method).status_code
            assert status == (404 if "{alias}" in path or "{job}" in path else 200)  # there are none
    elif path == "/v1/admin/reload":  # let in; there is no folder to look into
        assert service.ask(place, needed, method).status_code == 422
    elif method != "DELETE":  # let in, and told that the body is missing
        assert service.ask(place, needed, method).status_code in (400, 415)
    assert service.ask(f"{PLACE}/items/red%2F0", Scope.SEARCH).status_code == 200


def test_a_route_that_is_not_in_the_table_needs_an_admin_key(tmp_path, monkeypatch):
    monkeypatch.delitem(NEEDED, ("GET", "/v1/models"))  # type: ignore[arg-type]
    with guarded(tmp_path) as service:
        assert_problem(service.ask("/v1/models", Scope.WRITE), 403, "forbidden")
        assert service.ask("/v1/models", Scope.ADMIN).status_code == 200


def test_the_openapi_document_tells_the_scope_of_each_operation(service):
    document = service.ask("/openapi.json").json()
    assert set(document["components"]["securitySchemes"]) == {"bearer", "api-key"}
    assert document["paths"]["/v1/collections/{collection}/items/{id}"]["delete"]["x-scope"] == "write"
    assert document["paths"]["/v1/collections"]["get"]["x-scope"] == "search"
    assert "security" not in document["paths"]["/livez"]["get"]


# Bringing a key


def test_a_key_may_come_in_either_header(service):
    text = service.texts[Scope.SEARCH]
    for headers in (
        {"Authorization": f"Bearer {text}"},
        {"authorization": f"bearer   {text}"},
        {"api-key": text},
        {"Authorization": f"Bearer {text}", "api-key": text},
        {"Authorization": "Basic dXNlcjpwYXNz", "api-key": text},
    ):
        assert service.ask("/v1/collections", headers=headers).status_code == 200, headers


def test_two_keys_that_differ_are_malformed(service):
    one, other = service.texts[Scope.SEARCH], service.texts[Scope.WRITE]
    headers = {"Authorization": f"Bearer {one}", "api-key": other}
    assert_problem(service.ask("/v1/collections", headers=headers), 400, "malformed")
    twice = [("api-key", one), ("api-key", other)]
    response = httpx.get(f"{service.address}/v1/collections", headers=twice)
    assert_problem(response, 400, "malformed")


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer dml_000000000000_" + "a" * 52},
        {"api-key": ""},
        {"api-key": "' OR 1=1 --"},
        {"api-key": b"\xff\xfe"},
        {"api-key": "dml_" + "x" * 5000},
    ],
    ids=lambda headers: str(headers)[:40],
)
def test_what_is_no_key_of_the_service_is_unauthorized(tmp_path, headers):
    with guarded(tmp_path) as service:
        assert_problem(service.ask("/v1/collections", headers=headers), 401, "unauthorized")


def test_a_key_in_the_address_is_not_a_key(service):
    text = service.texts[Scope.ADMIN]
    for query in (f"?api-key={text}", f"?api_key={text}", f"?access_token={text}"):
        assert_problem(service.ask(f"/v1/collections{query}"), 401, "unauthorized")


def test_bodies_of_strangers_are_not_read(service):
    """401 comes before a byte of what would be a large upload has been sent."""
    host, port = httpx.URL(service.address).host, httpx.URL(service.address).port
    with socket.create_connection((host, port), timeout=10) as wire:
        head = f"PUT {PLACE}/items/x HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        wire.sendall(f"{head}Content-Length: 10000000\r\n\r\n".encode())
        assert wire.recv(65536).startswith(b"HTTP/1.1 401")


def test_the_typed_client_brings_its_key(service):
    with Client(service.address, service.texts[Scope.SEARCH]) as client:
        assert [collection.name for collection in client.collections()] == ["colours"]
        with pytest.raises(Problem, match="scope write") as refused:
            client.delete_item("colours", "red/0")
        assert (refused.value.status, refused.value.type) == (403, "forbidden")
    with Client(service.address) as client, pytest.raises(Problem, match="Bearer KEY"):
        client.collections()


def test_the_root_tells_what_a_key_may_do(service):
    told = {scope: service.ask("/v1", scope).json() for scope in Scope}
    assert {scope: (root["key"], root["scope"]) for scope, root in told.items()} == {
        scope: (str(scope), str(scope)) for scope in Scope
    }
    with Client(service.address, service.texts[Scope.WRITE]) as client:
        assert (client.about().scope, client.about().key, client.about().read_only) == (
            "write",
            "write",
            False,
        )


# Revoking, expiring, vanishing


def test_a_key_that_is_revoked_elsewhere_is_refused_at_the_next_request(tmp_path):
    with guarded(tmp_path) as service:
        assert service.ask("/v1/collections", Scope.SEARCH).status_code == 200
        command = [sys.executable, "-m", "dml", "keys", "revoke", "search"]
        subprocess.run([*command, "--state", str(tmp_path / "state")], check=True, capture_output=True)
        refused = service.ask("/v1/collections", Scope.SEARCH)
        assert_problem(refused, 401, "unauthorized")
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]
        assert service.ask("/v1/collections", Scope.WRITE).status_code == 200


def test_a_service_without_keys_is_open_until_the_first_and_never_again(tmp_path):
    with guarded(tmp_path, scopes=()) as service:
        assert service.ask("/v1/collections").status_code == 200
        ignored = service.ask("/v1/collections", headers={"api-key": "any"})
        assert ignored.status_code == 200, "a client may bring its key to a service that asks for none"
        service.keys.add("first", scope=Scope.SEARCH)
        assert_problem(service.ask("/v1/collections"), 401, "unauthorized")
        service.keys.revoke("first")
        assert_problem(service.ask("/v1/collections"), 401, "unauthorized")


def test_a_state_that_vanishes_or_breaks_does_not_open_the_service(tmp_path):
    with guarded(tmp_path) as service:
        for file in (tmp_path / "state").iterdir():
            file.unlink()
        assert_problem(service.ask("/v1/collections"), 401, "unauthorized")
        assert_problem(service.ask("/v1/collections", Scope.SEARCH), 401, "unauthorized")
        (tmp_path / "state" / "service.sqlite").write_bytes(b"no database " * 1000)
        for scope in (None, Scope.SEARCH):
            broken = service.ask("/v1/collections", scope)
            assert broken.status_code in (401, 500, 507)
            assert str(tmp_path) not in broken.text
        assert service.ask("/livez").status_code == 200


# Secrets


def test_keys_are_in_no_log_line_and_no_answer(tmp_path):
    out = io.StringIO()
    run.configure_logs(Settings(log_format="json"), out)
    try:
        with guarded(tmp_path) as service:
            text = service.texts[Scope.SEARCH]
            unknown = text[:-4] + "aaaa"
            answers = [
                service.ask("/v1/collections", Scope.SEARCH),
                service.ask(f"{PLACE}/items/red%2F0", Scope.SEARCH, "DELETE"),
                service.ask("/v1/collections", headers={"api-key": unknown}),
                service.ask(
                    "/v1/collections", headers={"Authorization": f"Bearer {text}", "api-key": unknown}
                ),
                service.ask(f"/v1/collections?api-key={text}"),
                service.ask("/v1/collections?limit=x", Scope.SEARCH),
            ]
    finally:
        structlog.reset_defaults()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line.get("key") for line in lines] == ["search", "search", None, None, None, "search"]
    assert [line.get("key_id") for line in lines] == [text[4:16]] * 3 + [None, None, text[4:16]]
    for shown in (out.getvalue(), *(answer.text + str(answer.headers) for answer in answers)):
        assert text[17:] not in shown
        assert unknown[17:] not in shown


# Rates


def test_a_key_has_its_own_rate_and_is_told_what_is_left(tmp_path):
    with guarded(tmp_path) as service:
        service.texts[Scope.SEARCH] = service.keys.add("slow", scope=Scope.SEARCH, rate=Rate(3, 3600))[0]
        for remaining in (2, 1, 0):
            answer = service.ask("/v1/collections", Scope.SEARCH)
            assert answer.status_code == 200
            assert answer.headers["ratelimit-policy"] == '"key";q=3;w=3600'
            assert re.fullmatch(rf'"key";r={remaining};t=\d+', answer.headers["ratelimit"])
        refused = service.ask("/v1/collections", Scope.SEARCH)
        assert assert_problem(refused, 429, "rate-limited")["limit"] == 3
        assert 3500 < int(refused.headers["retry-after"]) <= 3600
        assert refused.headers["ratelimit"].startswith('"key";r=0;')
        other = service.ask("/v1/collections", Scope.WRITE)
        assert other.status_code == 200
        assert "ratelimit" not in other.headers
        assert service.ask("/livez", Scope.SEARCH).status_code == 200, "probes are not counted"


def test_an_address_without_a_key_has_a_rate_where_the_operator_set_one(tmp_path):
    with guarded(tmp_path, Settings(rate=Rate(2, 3600)), scopes=()) as service:
        for _ in range(2):
            assert service.ask("/v1/collections").status_code == 200
        assert_problem(service.ask("/v1/collections"), 429, "rate-limited")
        text, _ = service.keys.add("shop", scope=Scope.SEARCH)
        assert service.ask("/v1/collections", headers={"api-key": text}).status_code == 200
        assert_problem(service.ask("/v1/collections"), 429, "rate-limited")


def test_wrong_keys_are_limited_by_address_and_lock_nobody_out(tmp_path):
    with guarded(tmp_path, Settings(failure_rate=Rate(3, 3600))) as service:
        wrong = {"api-key": "dml_000000000000_" + "a" * 52}
        for _ in range(3):
            assert_problem(service.ask("/v1/collections", headers=wrong), 401, "unauthorized")
        refused = service.ask("/v1/collections", headers=wrong)
        assert_problem(refused, 429, "rate-limited")
        assert int(refused.headers["retry-after"]) > 3000
        assert service.ask("/v1/collections", Scope.SEARCH).status_code == 200
        assert_problem(service.ask("/v1/collections"), 401, "unauthorized")


def test_a_client_with_a_network_of_its_own_counts_as_one():
    assert network_of("192.0.2.7") == "192.0.2.7"
    assert network_of("2001:db8:1:2:3:4:5:6") == network_of("2001:db8:1:2::9")
    assert network_of("2001:db8:1:2::1") != network_of("2001:db8:1:3::1")
    assert network_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert network_of("fe80::1%eth0") == network_of("fe80::2")
    assert network_of("unknown") == "unknown"


def test_metrics_need_a_key_where_there_are_keys_unless_they_are_opened(tmp_path):
    with guarded(tmp_path / "a") as service:
        assert_problem(service.ask("/metrics"), 401, "unauthorized")
        assert service.ask("/metrics", Scope.SEARCH).status_code == 200
    with guarded(tmp_path / "b", Settings(open_metrics=True)) as service:
        assert service.ask("/metrics").status_code == 200
        assert_problem(service.ask("/v1/collections"), 401, "unauthorized")


# Pages of other origins


def test_other_origins_get_no_permission_unless_they_are_named(tmp_path):
    preflight = {"Origin": SHOP, "Access-Control-Request-Method": "PUT"}
    with guarded(tmp_path / "a") as service:
        answers = [
            service.ask("/v1/collections", Scope.SEARCH, headers={"Origin": SHOP}),
            service.ask("/v1/collections", method="OPTIONS", headers=preflight),
        ]
        for answer in answers:
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert_problem(answers[1], 405, "method-not-allowed")
    with guarded(tmp_path / "b", Settings(cors_origins=(SHOP,))) as service:
        asked = service.ask(f"{PLACE}/items/x", method="OPTIONS", headers=preflight)
        assert (asked.status_code, asked.content) == (204, b"")
        assert asked.headers["access-control-allow-origin"] == SHOP
        assert "PUT" in asked.headers["access-control-allow-methods"]
        assert {"Authorization", "api-key"} <= set(asked.headers["access-control-allow-headers"].split(", "))
        for answer in (
            service.ask("/v1/collections", Scope.SEARCH, headers={"Origin": SHOP}),
            service.ask("/v1/collections", headers={"Origin": SHOP}),  # 401, and the page may read why
            service.ask(f"{PLACE}/search", Scope.SEARCH, "POST", headers={"Origin": SHOP}, json={"limit": 0}),
        ):
            assert answer.headers["access-control-allow-origin"] == SHOP
            assert "RateLimit" in answer.headers["access-control-expose-headers"]
            assert "Origin" in answer.headers["vary"]
            assert "access-control-allow-credentials" not in answer.headers
        stranger = service.ask("/v1/collections", Scope.SEARCH, headers={"Origin": f"{SHOP}.evil.example"})
        assert "access-control-allow-origin" not in stranger.headers
        assert "Origin" in stranger.headers["vary"], "or a cache would give one origin's answer to another"


def uploads(service: Guarded, headers: dict[str, str]) -> httpx.Response:
    """What a form of any page can send without asking first."""
    return service.ask(f"{PLACE}/search/image", method="POST", headers=headers, files={"file": jpeg("red")})


def test_what_another_page_has_the_browser_send_is_refused(tmp_path):
    with guarded(tmp_path, Settings(cors_origins=(SHOP,)), scopes=()) as service:
        own = service.address
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"},
            {"Origin": "http://127.0.0.1:1", "Sec-Fetch-Site": "same-site"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Origin": "http://["},
        ):
            assert_problem(uploads(service, headers), 403, "cross-origin")
        for headers in (
            {},
            {"Origin": own},
            {"Origin": own, "Sec-Fetch-Site": "same-origin"},
            {"Origin": "https://photos.example", "Sec-Fetch-Site": "same-origin"},  # a proxy renamed the host
            {"Sec-Fetch-Site": "none"},
            {"Origin": SHOP, "Sec-Fetch-Site": "cross-site"},
        ):
            assert uploads(service, headers).status_code == 200, headers


@pytest.mark.parametrize(
    "origin", ["*", "null", "shop.example.org", "https://a/b", "ftp://a", "https://", ""]
)
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(ConfigError, match="origin"):
        Settings(cors_origins=(origin,))


# Headers


def test_every_answer_is_sent_with_the_safe_headers(service):
    for path in (
        "/",
        "/web/page.js",
        "/favicon.svg",
        "/openapi.json",
        "/v1",
        "/nope",
        "/livez",
        "/problems/deadline",
    ):
        answer = service.ask(path)
        for name, value in SAFE_HEADERS.items():
            if name != "Content-Security-Policy":
                assert answer.headers[name] == value, (path, name)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        for needed in ("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"):
            assert needed in policy, (path, needed)
        assert "unsafe" not in policy
