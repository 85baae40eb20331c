"""Requests as OpenTelemetry traces: a span for each request, and in it one for each stage.

The extra `tracing` brings what is needed. Exporter, address, sampling and names are those of the standard
OTEL_ variables; a trace that a caller began (W3C `traceparent`) is gone on with.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from dml import __version__
from dml.errors import MissingExtra, UsageError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from service.middleware import Exchange

MOST_INTERVALS = 128
"""Stages of a request that are shown one by one; a batch of a thousand pictures has thousands."""
SERVICE = "dml"


class Tracing:
    """Makes the spans of requests.

    Args:
        provider: where they go. It is not made the global one, so nobody else traces by it.
    """

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE, __version__)

    @classmethod
    def from_environment(cls) -> "Tracing":
        """As the OTEL_ variables say: OTLP over HTTP to localhost:4318 when they say nothing.

        Raises:
            MissingExtra: OpenTelemetry, or the exporter that is asked for, is not installed.
            UsageError: an exporter that is not known.
        """
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError:
            raise MissingExtra("--tracing needs the OpenTelemetry SDK, which", "tracing") from None
        found = Resource.create({"service.version": __version__})
        if "OTEL_SERVICE_NAME" not in os.environ and "service.name" not in os.environ.get(
            "OTEL_RESOURCE_ATTRIBUTES", ""
        ):
            found = found.merge(Resource({"service.name": SERVICE}))
        provider = TracerProvider(resource=found, shutdown_on_exit=False)
        for exporter in exporters():
            provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    @contextmanager
    def spanning(self, exchange: "Exchange") -> Iterator[None]:
        """The block answers the request; it goes on with the trace of its `traceparent`, if it has one."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, use_span

        scope = exchange.scope
        span = self._tracer.start_span(
            scope["method"], context=extract(dict(exchange.headers)), kind=SpanKind.SERVER
        )
        exchange.trace_id = f"{span.get_span_context().trace_id:032x}"
        try:
            with use_span(span, record_exception=False, set_status_on_exception=False):
                yield
        finally:
            self._describe(span, exchange)
            span.end()

    def _describe(self, span: "Span", exchange: "Exchange") -> None:
        """What is known of a request when it is over: its attributes, and a span for each stage."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        if not span.is_recording():
            return
        told, clock, status = exchange.told(), exchange.clock, exchange.status
        span.update_name(f"{told['method']} {told['route']}")
        attributes = {
            "http.request.method": told["method"],
            "http.route": told["route"],
            "http.response.status_code": status,
            "url.path": told["path"],
            "url.scheme": exchange.scope.get("scheme", "http"),
            "client.address": told["client"],
            "error.type": told.get("problem"),
            "dml.request_id": told["request_id"],
            "dml.collection": told.get("collection"),
            "dml.stages_left_out": clock.left_out or None,
        }
        span.set_attributes({name: value for name, value in attributes.items() if value is not None})
        if status is not None and status >= 500:
            span.set_status(StatusCode.ERROR, told.get("problem"))
        within = set_span_in_context(span)
        for interval in list(clock.intervals):
            part = self._tracer.start_span(interval.stage, context=within, start_time=interval.begun)
            part.end(interval.ended)

    def close(self) -> None:
        """Send what has not been sent."""
        self._provider.shutdown()


def exporters() -> "Iterable[SpanExporter]":
    """Those that OTEL_TRACES_EXPORTER names. Raises MissingExtra, UsageError."""
    names = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    made = []
    for name in (part.strip() for part in names.split(",")):
        if name == "none":
            continue
        wanted = f"otlp_proto_{otlp_protocol()}" if name == "otlp" else name
        known = {point.name: point for point in entry_points(group="opentelemetry_traces_exporter")}
        if wanted in known:
            made.append(known[wanted].load()())
        elif wanted == "otlp_proto_http":
            raise MissingExtra("--tracing needs the OTLP exporter, which", "tracing")
        else:
            raise UsageError(
                f'OTEL_TRACES_EXPORTER asks for the exporter "{name}" ({wanted}), which is not installed. '
                f"Installed: {', '.join(sorted(known)) or 'none'}; or none."
            )
    return made


def otlp_protocol() -> str:
    """ "http" or "grpc". Raises UsageError."""
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        given = os.environ.get(variable)
        if given in ("http/protobuf", "grpc"):
            return given.partition("/")[0]
        if given:
            raise UsageError(f'{variable} is "http/protobuf" or "grpc", got "{given}"')
    return "http"
