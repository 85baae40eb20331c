"""Writes that may be sent twice: `Idempotency-Key`, and the answer that the first one was given.

A client that got no answer cannot know whether its write was done. When it sends the write again with the
same key, it gets the answer that was stored, and nothing is written a second time.

::

    same key, same request      the stored answer, with Idempotency-Replayed: true
    same key, other request     422 idempotency-conflict
    … while the first one runs  409 conflict: wait for it

Stored are answers of success, for 24 hours; what failed has written nothing and may be tried again. Keys are
those of one API key (without keys: of everybody), and of one service.
"""

import asyncio
import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from dml.errors import DmlError
from service.memory import IdempotencyConflict
from service.problems import Problem
from service.state import Drawer, Section, StateFile

log = logging.getLogger(__name__)

SECTION = Section(
    "repeats",
    (
        """
        CREATE TABLE repeats (
            service TEXT NOT NULL,
            caller TEXT NOT NULL,
            key TEXT NOT NULL,
            digest BLOB NOT NULL,
            status INTEGER NOT NULL,
            headers TEXT NOT NULL,
            body BLOB NOT NULL,
            at REAL NOT NULL,
            PRIMARY KEY (service, caller, key)
        ) WITHOUT ROWID;
        CREATE INDEX repeats_at ON repeats (at)
        """,
    ),
)
KEPT_SECONDS = 24 * 3600
BOUNDARY = re.compile(r'boundary="?([^";,]+)', re.IGNORECASE)
KEPT_HEADERS = ("content-type", "cache-control", "location", "etag")
REPLAYED = "Idempotency-Replayed"


class UnderWay(DmlError):
    """The first request of this key has not been answered yet."""


@dataclass(frozen=True)
class Stored:
    """An answer as it was sent."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Claim:
    """A request that holds its key until it is answered."""

    caller: str
    key: str
    digest: bytes


class Repeats:
    """The answers that are kept in a state folder.

    Args:
        state: the state file that is shared, or the state folder.
    """

    def __init__(self, state: StateFile | Path) -> None:
        self._drawer = Drawer(state, SECTION)
        self._lock = threading.Lock()
        self._under_way: dict[tuple[str, str], bytes] = {}
        self.service = ""
        """Which collections are served: another service with the same state has keys of its own."""

    def claim(self, claim: Claim) -> Stored | None:
        """The answer that the request was given before; None: it is the first, and holds its key now.

        Raises:
            IdempotencyConflict, UnderWay
        """
        with self._lock:
            held = self._under_way.get((claim.caller, claim.key))
            if held is not None:
                raise self._taken(held, claim)
            self._under_way[claim.caller, claim.key] = claim.digest
        try:
            found = self._find(claim)
        except BaseException:
            self.release(claim)
            raise
        if found is not None:
            self.release(claim)
        return found

    @staticmethod
    def _taken(held: bytes, claim: Claim) -> DmlError:
        if held != claim.digest:
            return conflicting(claim)
        return UnderWay("The first request with this Idempotency-Key has not been answered yet. Wait for it.")

    def _find(self, claim: Claim) -> Stored | None:
        state = self._drawer.if_there()
        if state is None:
            return None
        with state.reading() as db:
            row = db.execute(
                "SELECT digest, status, headers, body FROM repeats "
                "WHERE service = ? AND caller = ? AND key = ? AND at >= ?",
                (self.service, claim.caller, claim.key, time.time() - KEPT_SECONDS),
            ).fetchone()
        if row is None:
            return None
        digest, status, headers, body = row
        if digest != claim.digest:
            raise conflicting(claim)
        pairs = (line.partition(": ") for line in headers.splitlines())
        return Stored(status, {name: value for name, _, value in pairs}, body)

    def keep(self, claim: Claim, answer: Stored) -> None:
        """Store the answer of a request that holds its key."""
        now = time.time()
        headers = "\n".join(f"{name}: {value}" for name, value in answer.headers.items())
        held = (self.service, claim.caller, claim.key, claim.digest)
        with self._drawer.made().writing() as db:
            db.execute("DELETE FROM repeats WHERE at < ?", (now - KEPT_SECONDS,))
            db.execute(
                "REPLACE INTO repeats VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (*held, answer.status, headers, answer.body, now),
            )

    def release(self, claim: Claim) -> None:
        with self._lock:
            self._under_way.pop((claim.caller, claim.key), None)

    def close(self) -> None:
        self._drawer.close()


def conflicting(claim: Claim) -> IdempotencyConflict:
    return IdempotencyConflict(
        f'The Idempotency-Key "{claim.key}" was used for another request within the last 24 hours. Use a '
        f"new key for each write, and the same one only to send the same write again."
    )


class Replay(Exception):
    """The request was answered before; carries that answer."""

    def __init__(self, answer: Stored) -> None:
        super().__init__("answered before")
        self.answer = answer


async def _once(
    request: Request,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=255,
            pattern=r"^[\x21-\x7e]+$",
            description="Of your choice, new for each write: sent again with it, the write is answered as "
            "before and not done twice. For 24 hours",
        ),
    ] = None,
) -> None:
    """Claims the key of a write, after the request was let in. Raises Replay, Problem."""
    if key is None:
        return
    claim = Claim(request.scope["state"]["key"] or "", key, await digest_of(request))
    try:
        found = await asyncio.to_thread(request.app.state.memory.repeats.claim, claim)
    except UnderWay as error:
        raise Problem("conflict", str(error), headers={"Retry-After": "1"}) from None
    if found is not None:
        raise Replay(found)
    request.scope["state"]["claim"] = claim


ONCE = [Depends(_once)]
"""The `dependencies` of a route that writes; its router's `route_class` is `OnceRoute`."""


async def digest_of(request: Request) -> bytes:
    """SHA-256 of what the request says. The boundary of a multipart body is made up anew by each client."""
    body = await request.body()
    kind = request.headers.get("content-type", "")
    found = BOUNDARY.search(kind) if kind.startswith("multipart/") else None
    conditions = [request.headers.get(name, "") for name in ("if-match", "if-none-match")]
    head = [request.method, request.url.path, request.url.query, kind.partition(";")[0], *conditions]

    def digest() -> bytes:
        plain = body.replace(found[1].encode(), b"boundary") if found else body
        return hashlib.sha256("\n".join(head).encode() + b"\n\n" + plain).digest()

    return digest() if len(body) < 256 * 1024 else await asyncio.to_thread(digest)


def keep_or_log(repeats: Repeats, claim: Claim, answer: Stored) -> None:
    """The write is done: that its answer cannot be stored must not turn it into a failure."""
    try:
        repeats.keep(claim, answer)
    except DmlError as error:
        log.warning("the answer to %s cannot be stored: %s", claim.key, error)


class OnceRoute(APIRoute):
    """A route that answers a repeated write (see `ONCE`) as it did before."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        inner = super().get_route_handler()

        async def handler(request: Request) -> Response:
            repeats: Repeats = request.app.state.memory.repeats
            try:
                response = await inner(request)
                claim: Claim | None = request.scope["state"].get("claim")
                if claim is not None and response.status_code < 300:
                    headers = {n: response.headers[n] for n in KEPT_HEADERS if n in response.headers}
                    answer = Stored(response.status_code, headers, bytes(response.body))
                    await asyncio.to_thread(keep_or_log, repeats, claim, answer)
                return response
            except Replay as replay:
                answer = replay.answer
                return Response(answer.body, answer.status, {**answer.headers, REPLAYED: "true"})
            finally:
                claim = request.scope["state"].pop("claim", None)
                if claim is not None:
                    repeats.release(claim)

        return handler
