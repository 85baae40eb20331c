"""What wraps every request: its id, path, guards of host, sender and body, headers, log line and count."""

import asyncio
import re
import time
import traceback
import uuid
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dml.stages import STAGES, Clock, stage
from service.hosts import check_host
from service.metrics import Metrics
from service.origins import check_sender, is_preflight, sharing_headers
from service.problems import Problem, problem_of, respond
from service.settings import Settings
from service.tracing import MOST_INTERVALS, Tracing

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": NOTHING,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), display-capture=(), geolocation=(), microphone=()",
}
"""On every answer; the page sets a policy of its own."""
QUIET = ("/livez", "/readyz", "/healthz", "/metrics")
"""Machines ask for these every few seconds: their lines have the level "debug", and they have no trace."""


class Envelope:
    """Our outermost layer. Whatever happens inside, the answer leaves with an id, and errors as problems."""

    def __init__(
        self, app: ASGIApp, *, settings: Settings, metrics: Metrics, tracing: Tracing | None = None
    ) -> None:
        self.app, self.settings, self.metrics, self.tracing = app, settings, metrics, tracing
        self.log = structlog.get_logger("service")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        tracing = self.tracing if scope["path"] not in QUIET else None
        exchange = Exchange(scope, send, self.settings, keep_intervals=tracing is not None)
        span: AbstractContextManager[Any] = nullcontext() if tracing is None else tracing.spanning(exchange)
        with self.metrics.in_flight.track_inprogress(), exchange.clock.running(), span:
            try:
                await self._answer(exchange, receive)
            finally:
                exchange.seconds = time.perf_counter() - exchange.started
                self._account(exchange)

    async def _answer(self, exchange: "Exchange", receive: Receive) -> None:
        scope, headers = exchange.scope, exchange.headers
        try:
            scope["path"] = single_segments(scope)
            check_host(headers.getlist("host"), self.settings.allow_hosts)
            if exchange.preflight:
                await Response(status_code=204)(scope, receive, exchange.send)
                return
            check_sender(scope["method"], headers, self.settings.cors_origins)
            guard = exchange.guard = BodyGuard(
                receive,
                headers,
                limit=self.settings.max_body_bytes,
                seconds=self.settings.body_seconds,
            )
            await self.app(scope, guard, exchange.send)
        except ClientDisconnect:
            pass  # gone before its body was whole: nobody is left to be answered, and nothing failed
        except Exception as error:
            problem = problem_of(error)
            exchange.state["problem"] = problem.slug
            if problem.status_code >= 500:
                # Plain: a traceback with the values of variables would write users' pictures to the log.
                trace = "".join(traceback.format_exception(error))
                self.log.error("request failed", **exchange.told(), exception=trace)
            if exchange.status is not None:
                raise  # the answer has begun; all that is left is to cut it off
            answer = respond(problem, instance=scope["path"], request_id=exchange.request_id)
            await answer(scope, receive, exchange.send)

    def _account(self, exchange: "Exchange") -> None:
        """Count the request and write its line."""
        route, status = exchange.route, exchange.status
        stages = dict(exchange.clock.seconds)  # a thread that nobody waits for any longer may still add
        code = "aborted" if status is None else str(status)
        self.metrics.count_request(
            exchange.scope["method"], route, code, seconds=exchange.seconds, stages=stages
        )
        received = 0 if exchange.guard is None else exchange.guard.seen
        self.metrics.received.inc(received)
        self.metrics.sent.inc(exchange.sent)
        if exchange.state["problem"] is not None:
            self.metrics.problems.labels(exchange.state["problem"]).inc()
        level = "debug" if route in QUIET else "warning" if (status or 0) >= 500 else "info"
        getattr(self.log, level)(
            "request",
            **exchange.told(),
            status=status,
            **({"aborted": True} if status is None else {}),
            ms=round(1000 * exchange.seconds, 1),
            **{f"{name}_ms": round(1000 * stages[name], 1) for name in STAGES if name in stages},
            received=received,
            sent=exchange.sent,
        )


class Exchange:
    """A request and its answer, as far as they have come.

    Attributes:
        state: what routes add to: the name of the key, the type of the problem, further headers.
        guard: what the body comes through; None until it is looked at.
        status: of the answer; None until it begins.
        sent: bytes of the answer, without its head.
        seconds: from begin to end, once it is over.
    """

    def __init__(self, scope: Scope, send: Send, settings: Settings, *, keep_intervals: bool) -> None:
        self.started = time.perf_counter()
        self.scope, self._send, self._origins = scope, send, settings.cors_origins
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        self.request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.state: dict[str, Any] = scope.setdefault("state", {})
        self.state.update(request_id=self.request_id, problem=None, key=None, key_id=None, headers={})
        self.preflight = is_preflight(scope["method"], self.headers, self._origins)
        self.clock = Clock(keep=MOST_INTERVALS if keep_intervals else 0)
        self.guard: BodyGuard | None = None
        self.status: int | None = None
        self.sent = 0
        self.seconds = 0.0
        self.trace_id: str | None = None

    @property
    def route(self) -> str:
        """The template of the path; no path that a client makes up."""
        return getattr(self.scope.get("route"), "path", "unmatched")

    @property
    def collection(self) -> str | None:
        """The collection or alias that the address names."""
        name = self.scope.get("path_params", {}).get("collection")
        return None if name is None else str(name)

    async def send(self, message: Message) -> None:
        """Send, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            outgoing = MutableHeaders(raw=message.setdefault("headers", []))
            shared = sharing_headers(self.headers, self._origins, preflight=self.preflight)
            seconds = self.clock.seconds
            timing = ", ".join(f"{n};dur={1000 * seconds[n]:.2f}" for n in STAGES if n in seconds)
            if timing:
                outgoing["Server-Timing"] = timing
            for name, value in {**shared, **self.state["headers"], "X-Request-Id": self.request_id}.items():
                outgoing[name] = value
            for name, value in SAFE_HEADERS.items():
                outgoing.setdefault(name, value)
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        await self._send(message)

    def told(self) -> dict[str, Any]:
        """What every line about it says."""
        client = self.scope.get("client")
        found = {name: self.state[name] for name in ("key", "key_id", "problem")}
        found |= {"collection": self.collection, "trace_id": self.trace_id}
        return {
            "request_id": self.request_id,
            "method": self.scope["method"],
            "route": self.route,
            "path": escape(self.scope["path"], but="%"),
            "client": client[0] if client else None,
            **{name: value for name, value in found.items() if value},
        }


class BodyGuard:
    """A `receive` that stops a body that is longer than allowed, declared or not, or that takes too long.

    Args:
        limit: bytes of the body.
        seconds: until the whole body has to be there.

    Attributes:
        seen: bytes that have come.

    Raises:
        Problem: "image-too-large" for uploads, "body-too-large" for the rest; before a byte is read when the
            length was declared. "too-slow".
    """

    def __init__(self, receive: Receive, headers: Headers, *, limit: int, seconds: float) -> None:
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self.seen, self._whole = 0, False
        self._end: float | None = None
        self._upload = headers.get("content-type", "").startswith(("multipart/", "image/"))
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > limit:
            raise self._problem(f"{int(declared[:20]):,} bytes")

    async def __call__(self) -> Message:
        if self._whole:  # what follows is only the news that the client has gone
            return await self._receive()
        if self._end is None:
            self._end = asyncio.get_running_loop().time() + self._seconds
        try:
            with stage("receive"):
                async with asyncio.timeout_at(self._end):
                    message = await self._receive()
        except TimeoutError:
            raise Problem(
                "too-slow",
                f"The body did not arrive within {self._seconds:g} s; {self.seen:,} bytes of it came.",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self.seen += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self.seen > self._limit:
                raise self._problem("more")
        return message

    def _problem(self, given: str) -> Problem:
        return Problem(
            "image-too-large" if self._upload else "body-too-large",
            f"A request may have {self._limit:,} bytes here; this one has {given}.",
            limit=self._limit,
        )


def single_segments(scope: Scope) -> str:
    """The path, decoded, but with "%", "/" and what does not print still written as %25, %2F, %1B.

    An id with a slash then stays one segment of the path, so that "shoes%2Fimage" is an item and never the
    picture of the item "shoes". `service.routes.parts.decoded` undoes it. The path goes to the log as
    well, where an escape sequence would steer the operator's terminal, and a line break begin another line.

    Raises:
        Problem: "malformed", for bytes that are not UTF-8.
    """
    raw: bytes | None = scope.get("raw_path")
    if raw is None:  # a server that keeps no raw path; a slash of an id cannot be told apart then
        return escape(scope["path"])
    if b"%" not in raw:
        return escape(scope["path"])
    try:
        segments = [unquote_to_bytes(part).decode("utf-8") for part in raw.partition(b"?")[0].split(b"/")]
    except UnicodeDecodeError:
        raise Problem("malformed", "The path holds bytes that are not UTF-8.") from None
    return "/".join(escape(segment).replace("/", "%2F") for segment in segments)


def escape(text: str, *, but: str = "") -> str:
    """Percent signs and all that does not print (controls, line breaks, marks of direction) as %XX.

    Args:
        but: characters that stay as they are.
    """
    if text.isprintable() and "%" not in text:
        return text
    kept = [c in but or (c.isprintable() and c != "%") for c in text]
    return "".join(
        c if keep else quote(c, safe="", errors="replace") for c, keep in zip(text, kept, strict=True)
    )
