"""A connection of the server, with limits that the server has none for: on heads, on waiting, on numbers.

uvicorn reads a head of any length for any time, and waits for ever for a client that takes nothing of its
answer. Here a client that is too long, too slow or one too many is told so by a problem, where it can be
told, and disconnected. The limits of bodies are those of `service.middleware.BodyGuard`.

It stands on uvicorn's protocol for the parser httptools (llhttp), which checks the syntax strictly.
"""

import uuid
from asyncio import TimerHandle, Transport
from collections.abc import Callable
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.problems import CATALOGUE, Problem, respond
from service.settings import Settings


class TooLarge(Exception):
    """The head has more bytes than allowed. The parser hands this on as an error of its own."""


class Connection(HttpToolsProtocol):
    """One connection; the event loop and the parser call its methods. `limited` gives it settings."""

    settings: Settings
    count: Callable[[str], None]
    """Told the type of each problem that is answered here."""
    _head_bytes = 0
    """In the head that is being read."""
    _idle_bytes = 0
    """Received since the last byte of a body, or the end of a request: what nobody else counts."""
    _in_head = False
    _too_large = False
    _patience: TimerHandle | None = None
    """Ends a head, or a rest that is read only to be forgotten, that takes too long."""
    _stall: TimerHandle | None = None
    _unsent = 0
    """Bytes, when the stall timer was set."""

    # Calls of the event loop

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        most = self.settings.max_connections
        if len(self.connections) > most:
            self._refuse("too-many-connections", f"{most:,} connections are open, as many as may be.")
        else:
            self._wait_for(self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        self._stall = cancelled(self._stall)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return  # refused, and what was on its way still comes
        self._idle_bytes += len(data)
        super().data_received(data)
        if self._idle_bytes > self.settings.max_header_bytes and not self.transport.is_closing():
            self._refuse_large()  # a line without an end; or trailers and extensions of chunks

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_for_stall()

    def resume_writing(self) -> None:
        self._stall = cancelled(self._stall)
        super().resume_writing()

    # Calls of the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        if self._patience is None:
            self._wait_for(self._head_is_late)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._wait_no_more()
        self._in_head = False
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._wait_no_more()
        self._idle_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        # With requests in the pipeline, the newest cycle is not the one that was answered.
        rest_to_come = not self.pipeline and self.cycle is not None and self.cycle.more_body
        super().on_response_complete()
        if rest_to_come and not self.transport.is_closing():
            self._wait_for(self.transport.close)  # refused half-way: the rest is read, but not for ever

    def send_400_response(self, msg: str) -> None:
        if self._too_large:
            self._refuse_large()
        else:
            self._refuse("malformed", "The bytes sent are not an HTTP request.")

    # Limits

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self.settings.max_header_bytes:
            self._too_large = True
            raise TooLarge

    def _wait_for(self, give_up: Callable[[], None]) -> None:
        self._patience = self.loop.call_later(self.settings.header_seconds, give_up)

    def _wait_no_more(self) -> None:
        self._patience = cancelled(self._patience)

    def _head_is_late(self) -> None:
        self._patience = None
        if self._in_head:
            seconds = self.settings.header_seconds
            self._refuse("too-slow", f"The head of the request did not arrive within {seconds:g} s.")
        else:
            self.transport.close()  # nothing was asked, so there is nothing to answer

    def _watch_for_stall(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self.settings.stall_seconds, self._look_for_stall)

    def _look_for_stall(self) -> None:
        self._stall = None
        if self.transport.get_write_buffer_size() < self._unsent:
            self._watch_for_stall()
        else:
            self.transport.abort()  # closing would wait until all of it was taken

    def _refuse_large(self) -> None:
        limit = self.settings.max_header_bytes
        detail = f"The head of a request may have {limit:,} bytes here; this one has more."
        self._refuse("headers-too-large", detail, limit=limit)

    def _refuse(self, slug: str, detail: str, **extras: Any) -> None:
        """Disconnect; with a problem as the answer, unless another answer is under way."""
        self._wait_no_more()
        request_id = uuid.uuid4().hex
        client = self.client[0] if self.client else None
        structlog.get_logger("service").info("refused", problem=slug, request_id=request_id, client=client)
        self.count(slug)
        if self.cycle is None or self.cycle.response_complete:
            answer = respond(Problem(slug, detail, **extras), instance="", request_id=request_id)
            answer.headers["Connection"] = "close"
            answer.headers["X-Request-Id"] = request_id
            answer.headers["X-Content-Type-Options"] = "nosniff"
            lines = [name + b": " + value + b"\r\n" for name, value in answer.raw_headers]
            status_line = STATUS_LINE[CATALOGUE[slug].status]
            self.transport.write(b"".join([status_line, *lines, b"\r\n", bytes(answer.body)]))
        self.transport.close()


def limited(settings: Settings, count: Callable[[str], None] = lambda slug: None) -> type[Connection]:
    """The class of connections with these limits, for `uvicorn.Config(http=…)`."""
    return type("LimitedConnection", (Connection,), {"settings": settings, "count": staticmethod(count)})


def cancelled(timer: TimerHandle | None) -> None:
    """Cancel a timer, if there is one; gives what is left of it: None."""
    if timer is not None:
        timer.cancel()
