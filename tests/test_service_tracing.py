"""Traces of requests: into memory, and over the wire to a receiver of OTLP."""

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from serving import ColourEncoder, colour_collection, jpeg, running

pytest.importorskip("opentelemetry.sdk.trace", reason="the extra tracing is not installed")
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from test_service_logs import Failing, logged

from dml.errors import MissingExtra, UsageError
from service.app import create_app
from service.engine import Engine
from service.settings import Settings
from service.tracing import Tracing

PLACE = "/v1/collections/colours"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
STAGES = ["receive", "queue", "decode", "inference", "search", "payload"]


@contextmanager
def traced(folder: Path, tracing: Tracing, encoder: ColourEncoder | None = None) -> Iterator[httpx.Client]:
    engine = Engine({"colours": colour_collection(folder / "colours")}, [encoder or ColourEncoder()])
    with running(create_app(engine, tracing=tracing)) as address, httpx.Client(base_url=address) as http:
        yield http
    tracing.close()
    engine.close()


@pytest.fixture
def memory() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def into(memory: InMemorySpanExporter) -> Tracing:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return Tracing(provider)


def roots(memory: InMemorySpanExporter) -> list[ReadableSpan]:
    return [span for span in memory.get_finished_spans() if span.kind is SpanKind.SERVER]


def test_a_request_is_a_span_with_one_for_each_stage(tmp_path, memory):
    with traced(tmp_path, into(memory)) as http:
        answer = http.post(f"{PLACE}/search/image", files={"file": jpeg("red")})
        assert answer.status_code == 200
    [root] = roots(memory)
    route = "/v1/collections/{collection}/search/image"
    assert root.name == f"POST {route}"
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": route,
        "http.response.status_code": 200,
        "url.path": f"{PLACE}/search/image",
        "url.scheme": "http",
        "client.address": "127.0.0.1",
        "dml.request_id": answer.headers["x-request-id"],
        "dml.collection": "colours",
    }
    parts = [span for span in memory.get_finished_spans() if span is not root]
    assert {span.name for span in parts} == set(STAGES)
    for span in parts:
        assert span.parent is not None
        assert root.context is not None
        assert span.parent.span_id == root.context.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time


def test_the_trace_of_a_caller_is_gone_on_with_and_named_in_the_log(tmp_path, memory):
    with logged(Settings(log_format="json")) as log, traced(tmp_path, into(memory)) as http:
        http.get(PLACE, headers=CALLER)
        http.get(PLACE)
    first, second = roots(memory)
    assert first.context is not None
    assert second.context is not None
    assert f"{first.context.trace_id:032x}" == TRACE
    assert first.parent is not None
    assert f"{first.parent.span_id:016x}" == PARENT
    assert second.parent is None
    assert [entry["trace_id"] for entry in log.entries("request")] == [
        TRACE,
        f"{second.context.trace_id:032x}",
    ]


def test_a_caller_that_does_not_trace_is_not_traced(tmp_path, memory):
    with traced(tmp_path, into(memory)) as http:
        assert http.get(PLACE, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}).status_code == 200
        assert http.get(PLACE, headers={"traceparent": "nonsense"}).status_code == 200
    assert len(memory.get_finished_spans()) == 2, "the second one: its request and its queue"


def test_failures_are_marked_and_refusals_are_not(tmp_path, memory):
    with traced(tmp_path, into(memory), Failing()) as http:
        assert http.get("/v1/collections/nowhere").status_code == 404
        assert http.post(f"{PLACE}/search/image", files={"file": jpeg("red")}).status_code == 500
    refused, failed = roots(memory)
    assert (refused.status.status_code, refused.attributes["error.type"]) == (
        StatusCode.UNSET,
        "unknown-collection",
    )  # type: ignore[index]
    assert (failed.status.status_code, failed.attributes["error.type"]) == (
        StatusCode.ERROR,
        "internal-error",
    )  # type: ignore[index]
    assert not failed.events, "no text of an error leaves the service this way"


def test_probes_are_not_traced(tmp_path, memory):
    with traced(tmp_path, into(memory)) as http:
        for path in ("/livez", "/readyz", "/metrics"):
            assert http.get(path).status_code == 200
    assert not memory.get_finished_spans()


def test_a_large_batch_shows_the_first_stages_and_how_many_more_there_were(tmp_path, memory):
    vector = {"query": {"vector": [1.0] * 48}}
    with traced(tmp_path, into(memory)) as http:
        items = [{"id": f"n{n}", "image": IMAGE} for n in range(140)]
        assert http.post(f"{PLACE}/items", json={"items": items}).status_code == 200
        assert http.post(f"{PLACE}/search/batch", json={"searches": [vector] * 3}).status_code == 200
    batch, searches = roots(memory)
    parts = [span for span in memory.get_finished_spans() if span.parent is not None]
    of_batch = [span for span in parts if span.parent.span_id == batch.context.span_id]  # type: ignore[union-attr]
    assert len(of_batch) == 128
    assert batch.attributes["dml.stages_left_out"] > 0  # type: ignore[index,operator]
    assert "dml.stages_left_out" not in searches.attributes  # type: ignore[operator]


IMAGE = base64.b64encode(jpeg("red")).decode()


# The standard variables


class Receiver(ThreadingHTTPServer):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.taken: list[ExportTraceServiceRequest] = []


class Taking(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == "/v1/traces"
        self.server.taken.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_EXPORTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("given", "name"), [(None, "dml"), ("shop-search", "shop-search")])
def test_spans_arrive_where_the_variables_say(tmp_path, receiver, monkeypatch, given, name):
    if given:
        monkeypatch.setenv("OTEL_SERVICE_NAME", given)
    with traced(tmp_path, Tracing.from_environment()) as http:
        assert http.get(PLACE, headers=CALLER).status_code == 200
    [sent] = [resource for request in receiver.taken for resource in request.resource_spans]
    attributes = {entry.key: entry.value.string_value for entry in sent.resource.attributes}
    assert attributes["service.name"] == name
    spans = [span for scope in sent.scope_spans for span in scope.spans]
    assert {span.name for span in spans} == {"GET /v1/collections/{collection}", "queue"}
    assert {span.trace_id.hex() for span in spans} == {TRACE}


def test_exporters_that_are_not_there_are_told_of(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "pigeon")
    with pytest.raises(UsageError, match=r'"pigeon".*Installed: .*otlp_proto_http'):
        Tracing.from_environment()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    Tracing.from_environment().close()
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke")
    with pytest.raises(UsageError, match=r"OTEL_EXPORTER_OTLP_PROTOCOL.*smoke"):
        Tracing.from_environment()


def test_without_the_extra_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingExtra, match=r"dml\[tracing\]"):
        Tracing.from_environment()


def test_a_service_that_is_not_asked_for_traces_does_not_load_the_sdk(tmp_path):
    script = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import httpx
from serving import ColourEncoder, colour_collection, running
from service.app import create_app
from service.engine import Engine
engine = Engine({{"colours": colour_collection(Path({str(tmp_path / "colours")!r}))}}, [ColourEncoder()])
with running(create_app(engine)) as address:
    assert httpx.get(address + "{PLACE}").status_code == 200
engine.close()
print(json.dumps([name for name in sys.modules if name.startswith("opentelemetry.sdk")]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
