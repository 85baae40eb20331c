"""What the log says, over a real server: all of a request, in one line that only the service can begin."""

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from serving import ColourEncoder, colour_collection, jpeg, running

from service import logs
from service.app import create_app
from service.engine import Engine
from service.keys import Keys, Scope
from service.run import server_config
from service.settings import Settings

PLACE = "/v1/collections/colours"
BEGIN = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z \[(debug|info|warning|error) *\] ")
"""Of a plain line."""


class Log(io.StringIO):
    """What was written."""

    def lines(self) -> list[str]:
        return [line for line in self.getvalue().split("\n") if line]

    def entries(self, event: str | None = None) -> list[dict]:
        found = [json.loads(line) for line in self.lines()]
        return [entry for entry in found if event in (None, entry["event"])]


@contextmanager
def logged(settings: Settings) -> Iterator[Log]:
    """The log of this process, as `dml serve` sets it up."""
    levels = {name: logging.getLogger(name).level for name in (*logs.OURS, "uvicorn", "uvicorn.error")}
    out = Log()
    logs.configure_logs(settings, out)
    try:
        yield out
    finally:
        structlog.reset_defaults()
        root = logging.getLogger()
        for handler in [handler for handler in root.handlers if isinstance(handler, logs.Bridge)]:
            root.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def served(folder: Path, settings: Settings, encoder: ColourEncoder | None = None) -> Iterator[httpx.Client]:
    """The service with the server's settings of `dml serve`, so also with what it thinks of proxies."""
    engine = Engine({"colours": colour_collection(folder / "colours")}, [encoder or ColourEncoder()])
    app = create_app(engine, settings)
    with running(app, server_config(app, settings)) as address, httpx.Client(base_url=address) as http:
        yield http
    engine.close()


class Failing(ColourEncoder):
    """Fails, and says what it was given: two lines, of which the second looks like one of the log."""

    text = "no\n2026-11-22T09:00:00Z [info     ] request status=200\r\x1b[2J\u2028"

    def embed_arrays(self, arrays: np.ndarray) -> np.ndarray:
        raise RuntimeError(self.text)


def test_a_request_is_one_line_that_tells_all_of_it(tmp_path):
    settings = Settings(log_format="json")
    with logged(settings) as log, served(tmp_path, settings) as http:
        answer = http.post(
            f"{PLACE}/search/image", files={"file": jpeg("red")}, headers={"X-Request-Id": "mine"}
        )
        http.get("/livez")
        http.get(f"{PLACE}/items/nowhere?secret=of-the-query")
    first, second = log.entries("request")
    assert list(first)[:3] == ["timestamp", "level", "event"]
    assert first.pop("timestamp").endswith("Z")
    stages = ["receive_ms", "queue_ms", "decode_ms", "inference_ms", "search_ms", "payload_ms"]
    assert sum(first.pop(name) for name in stages) <= first.pop("ms") + 0.05 * len(stages), "rounded to 0.1"
    assert first == {
        "level": "info",
        "event": "request",
        "request_id": "mine",
        "method": "POST",
        "route": "/v1/collections/{collection}/search/image",
        "path": f"{PLACE}/search/image",
        "client": "127.0.0.1",
        "collection": "colours",
        "status": 200,
        "received": int(answer.request.headers["content-length"]),
        "sent": len(answer.content),
    }
    assert (second["status"], second["problem"], second["collection"]) == (404, "unknown-item", "colours")
    assert "secret" not in log.getvalue()
    assert len(log.lines()) == 2, "a probe is no line"


def test_the_key_is_named_and_never_written(tmp_path):
    settings = Settings(log_format="json")
    engine = Engine({"colours": colour_collection(tmp_path / "colours")})
    with Keys(tmp_path / "state") as keys, logged(settings) as log:
        text, _ = keys.add("shop", scope=Scope.SEARCH)
        with running(create_app(engine, settings, keys=keys)) as address:
            assert httpx.get(f"{address}{PLACE}", headers={"api-key": text}).status_code == 200
    engine.close()
    [entry] = log.entries()
    assert entry["key"] == "shop"
    assert text not in log.getvalue()


def test_a_failure_is_told_with_its_cause_under_the_id_of_its_answer(tmp_path):
    settings = Settings(log_format="json")
    with logged(settings) as log, served(tmp_path, settings, Failing()) as http:
        answer = http.post(f"{PLACE}/search/image", files={"file": jpeg("red")})
    assert answer.status_code == 500
    cause, request = log.entries()
    assert (cause["event"], cause["level"]) == ("request failed", "error")
    assert (request["event"], request["level"], request["status"]) == ("request", "warning", 500)
    assert cause["request_id"] == request["request_id"] == answer.json()["request_id"]
    assert cause["problem"] == request["problem"] == "internal-error"
    assert "RuntimeError" in cause["exception"]


@pytest.mark.parametrize(
    ("level", "events"),
    [
        (
            "debug",
            {("request", "debug"), ("request", "info"), ("request", "warning"), ("request failed", "error")},
        ),
        ("info", {("request", "info"), ("request", "warning"), ("request failed", "error")}),
        ("warning", {("request", "warning"), ("request failed", "error")}),
        ("error", {("request failed", "error")}),
    ],
)
def test_lines_below_the_level_are_left_out(tmp_path, level, events):
    settings = Settings(log_format="json", log_level=level)
    with logged(settings) as log, served(tmp_path, settings, Failing()) as http:
        http.get("/livez")
        http.get(PLACE)
        http.post(f"{PLACE}/search/image", files={"file": jpeg("red")})
    ours = [entry for entry in log.entries() if "request" in entry["event"]]
    assert {(entry["event"], entry["level"]) for entry in ours} == events


@pytest.mark.parametrize("log_format", ["plain", "json"])
def test_nothing_that_clients_send_begins_a_line_or_steers_a_terminal(tmp_path, log_format):
    settings = Settings(log_format=log_format)
    forged = "2026-11-22T09:00:00Z%20[info%20%20%20%20%20]%20request%20status=200"
    with logged(settings) as log, served(tmp_path, settings, Failing()) as http:
        for path in (f"x%0A{forged}", f"%FF%0A{forged}", f"x%0D{forged}", "%1B[2J", "%C2%85y", "%E2%80%A8z"):
            http.get(f"/v1/collections/{path}")
            http.get(f"{PLACE}/items/{path}")
        for address in (b"\x85 forged", "\u2028forged".encode(), b'1.2.3.4" status="200'):
            http.get(PLACE, headers={b"X-Forwarded-For": address})
        http.get(PLACE, headers={"X-Request-Id": "a b"})
        http.post(f"{PLACE}/search/image", files={"file": jpeg("red")})
        logging.getLogger("uvicorn.error").warning("Invalid request\n%s", "\x1b[2Jforged")
        logging.getLogger("dml.collection").warning("%r\r\nforged", "x")
    lines = log.lines()
    assert all(line.isprintable() for line in lines), [line for line in lines if not line.isprintable()]
    begun = [line for line in lines if not line.startswith("    | ")]
    assert len(begun) == 12 + 3 + 1 + 2 + 2, (
        "one for each request, the cause of the failure, two of libraries"
    )
    for line in begun:
        assert BEGIN.match(line) if log_format == "plain" else json.loads(line)
    if log_format == "plain":
        assert any(line.startswith("    | 2026-11-22T09:00:00Z") for line in lines), (
            "of the traceback, and marked"
        )
        fields = [re.findall(r" (status)=", re.sub(r'"(?:[^"\\]|\\.)*"', "", line)) for line in begun]
        assert max(map(len, fields)) == 1, "a field within a path stands in quotes"


@given(st.text())
def test_a_plain_value_ends_where_it_is_seen_to_end(text):
    found = logs.shown(text)
    assert found.isprintable()
    assert re.fullmatch(r'[^ "=]+|"(?:[^"\\]|\\.)*"', found), found


def test_plain_values():
    shown = [logs.shown(value) for value in (200, 1.5, True, None, {"a": 1}, "a'b", "", "a\nb c", '"')]
    assert shown == ["200", "1.5", "True", "None", "\"{'a': 1}\"", "a'b", '""', '"a\\\\nb c"', '"\\""']


def test_setting_it_up_again_writes_each_line_once(tmp_path):
    with logged(Settings(log_format="json")) as first, logged(Settings(log_format="json")) as second:
        logging.getLogger("dml.collection").warning("once")
    assert not first.lines()
    [entry] = second.entries()
    assert (entry["event"], entry["logger"], entry["level"]) == ("once", "dml.collection", "warning")


def test_unknown_formats_and_levels_are_refused(tmp_path):
    for option, given_value in (("--log-format", "xml"), ("--log-level", "loud")):
        command = [sys.executable, "-m", "dml", "serve", str(tmp_path), option, given_value]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert f"{option} is one of" in done.stderr
