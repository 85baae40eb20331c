"""What wraps every request: its id, path, guards of host, sender and body, headers, log line and count."""

import asyncio
import re
import time
import traceback
import uuid
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.hosts import check_host
from service.metrics import Metrics
from service.origins import check_sender, is_preflight, sharing_headers
from service.problems import Problem, problem_of, respond
from service.settings import Settings

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


class Envelope:
    """Our outermost layer. Whatever happens inside, the answer leaves with an id, and errors as problems."""

    def __init__(self, app: ASGIApp, *, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.log = structlog.get_logger("service")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, problem=None, key=None, key_id=None, headers={})
        origins = self.settings.cors_origins
        preflight = is_preflight(scope["method"], headers, origins)
        status: list[int] = []

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                outgoing = MutableHeaders(raw=message.setdefault("headers", []))
                shared = sharing_headers(headers, origins, preflight=preflight)
                for name, value in {**shared, **state["headers"], "X-Request-Id": request_id}.items():
                    outgoing[name] = value
                for name, value in SAFE_HEADERS.items():
                    outgoing.setdefault(name, value)
            await send(message)

        try:
            scope["path"] = single_segments(scope)
            check_host(headers.getlist("host"), self.settings.allow_hosts)
            if preflight:
                await Response(status_code=204)(scope, receive, send_marked)
                return
            check_sender(scope["method"], headers, origins)
            guard = BodyGuard(
                receive,
                headers,
                limit=self.settings.max_body_bytes,
                seconds=self.settings.body_seconds,
            )
            await self.app(scope, guard, send_marked)
        except ClientDisconnect:
            pass  # gone before its body was whole: nobody is left to be answered, and nothing failed
        except Exception as error:
            problem = problem_of(error)
            state["problem"] = problem.slug
            if problem.status_code >= 500:
                # Plain: a traceback with the values of variables would write users' pictures to the log.
                trace = "".join(traceback.format_exception(error))
                self.log.error("request failed", request_id=request_id, path=scope["path"], exception=trace)
            if status:
                raise  # the answer has begun; all that is left is to cut it off
            await respond(problem, instance=scope["path"], request_id=request_id)(scope, receive, send_marked)
        finally:
            self._account(scope, status, time.perf_counter() - started)

    def _account(self, scope: Scope, status: list[int], seconds: float) -> None:
        """Count the request and write its line."""
        state = scope["state"]
        route = getattr(scope.get("route"), "path", "unmatched")
        code = str(status[0]) if status else "aborted"
        self.metrics.requests.labels(scope["method"], route, code).observe(seconds)
        if state["problem"] is not None:
            self.metrics.problems.labels(state["problem"]).inc()
        quiet = route in ("/livez", "/readyz", "/healthz", "/metrics")
        client = scope.get("client")
        (self.log.debug if quiet else self.log.info)(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=code,
            ms=round(1000 * seconds, 1),
            request_id=state["request_id"],
            client=client[0] if client else None,
            **{name: state[name] for name in ("key", "key_id", "problem") if state[name]},
        )


class BodyGuard:
    """A `receive` that stops a body that is longer than allowed, declared or not, or that takes too long.

    Args:
        limit: bytes of the body.
        seconds: until the whole body has to be there.

    Raises:
        Problem: "image-too-large" for uploads, "body-too-large" for the rest; before a byte is read when the
            length was declared. "too-slow".
    """

    def __init__(self, receive: Receive, headers: Headers, *, limit: int, seconds: float) -> None:
        self._receive, self._limit, self._seconds = receive, limit, seconds
        self._seen, self._whole = 0, False
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
            async with asyncio.timeout_at(self._end):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                "too-slow",
                f"The body did not arrive within {self._seconds:g} s; {self._seen:,} bytes of it came.",
                headers={"Connection": "close"},
            ) from None
        if message["type"] == "http.request":
            self._seen += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._seen > self._limit:
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


def escape(text: str) -> str:
    """Percent signs and all that does not print (controls, line breaks, marks of direction) as %XX."""
    if text.isprintable() and "%" not in text:
        return text
    return "".join(c if c.isprintable() and c != "%" else quote(c, safe="", errors="replace") for c in text)
