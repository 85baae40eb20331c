"""Pictures behind addresses, opened for clients: from the hosts of `service.reach`, and from no others.

A name is resolved once, by us, and that address is the one connected to: no second answer of a name server
can lead elsewhere. Every picture has a connection of its own, so none is used for what another host was asked
for. Redirections are not followed. No credentials, cookies or proxies of this process go along; what comes is
bytes for the picture decoder, within the size of one upload for all pictures of a request, and of the answer
itself clients are told the status alone.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import httpcore
import httpx

from dml import __version__
from service.batching import QueueFull
from service.problems import Problem, invalid
from service.reach import DEFAULT_PORTS, AllowedHost, may_connect
from service.settings import Settings

POINTER = "query.image_url"
MOST_OPEN = 16
"""Addresses open at the same moment."""
MOST_ASKED = 64
"""Addresses open and waiting for a turn, of all requests; more are answered 503."""
CONNECT_SECONDS = 2.0
"""A name may lead to several addresses. One that does not answer by then makes way for the next."""
NAME_THREADS = 8
"""Threads that wait for name servers: of their own, so that a slow one holds up nothing else."""
SHOWN = 200  # characters of an address that are repeated in an answer


class RefusedAddress(httpcore.ConnectError):
    """A name led to an address that may not be connected to."""


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connections to hosts on the list: each name is resolved here, once, and what it leads to is checked.

    Args:
        allowed: the list.
        names: threads that resolve names.
    """

    def __init__(self, allowed: Sequence[AllowedHost], names: ThreadPoolExecutor) -> None:
        self._exact = [entry for entry in allowed if not entry.below]
        self._names = names
        self._plain = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        resolve = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._names, resolve)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label that is empty or too long
            raise httpcore.ConnectError(str(error)) from None
        public_only = not any(
            entry.takes(scheme, host, port) for entry in self._exact for scheme in DEFAULT_PORTS
        )
        known = [ipaddress.ip_address(entry[4][0]) for entry in found]
        good = [one for one in dict.fromkeys(known) if may_connect(one, public_only=public_only)]
        last: Exception = RefusedAddress(host)
        for place, address in enumerate(good):
            patience = timeout if place == len(good) - 1 else CONNECT_SECONDS
            try:
                return await self._plain.connect_tcp(
                    str(address), port, patience, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise last

    async def sleep(self, seconds: float) -> None:
        await self._plain.sleep(seconds)


class Room:
    """The bytes that the pictures of one request may have together."""

    def __init__(self, most: int) -> None:
        self.most = self.left = most

    def take(self, count: int) -> None:
        """Raises Problem when that is more than is left."""
        self.left -= count
        if self.left < 0:
            raise self.too_large("more")

    def too_large(self, given: str) -> Problem:
        return Problem(
            "image-too-large",
            f"{POINTER}: the pictures of a request may have {self.most:,} bytes here; this has {given}.",
            limit=self.most,
        )


class Fetcher:
    """Opens the addresses of pictures.

    Args:
        settings: `fetch_hosts`, `fetch_seconds`, `max_body_bytes`.
    """

    def __init__(self, settings: Settings) -> None:
        self._allowed = [AllowedHost.parse(host) for host in settings.fetch_hosts]
        self._seconds, self._most = settings.fetch_seconds, settings.max_body_bytes
        self._names = ThreadPoolExecutor(NAME_THREADS, thread_name_prefix="dml-names")
        self._network = CheckedNetwork(self._allowed, self._names)
        self._trusted = httpcore.default_ssl_context()
        self._turns = asyncio.Semaphore(MOST_OPEN)
        self._asked = 0

    async def fetch(self, urls: Sequence[str]) -> list[bytes | Problem]:
        """What the addresses of one request answer with, side by side; or why nothing came.

        The problems are "url-fetch-disabled" where the host is not on the list, "invalid-request" for what is
        no address of http or https, "image-too-large", and "fetch-failed" where nothing came in time.

        Raises:
            QueueFull: too many addresses are asked for already.
        """
        if self._asked + len(urls) > MOST_ASKED:
            raise QueueFull(f"{self._asked} addresses are already being opened; try again in a moment")
        self._asked += len(urls)
        try:
            room = Room(self._most)
            return await asyncio.gather(*(self._fetched(url, room) for url in urls))
        finally:
            self._asked -= len(urls)

    async def _fetched(self, url: str, room: Room) -> bytes | Problem:
        try:
            target = self._checked(url)
            async with asyncio.timeout(self._seconds), self._turns:
                return await self._read(target, room)
        except Problem as problem:
            return problem
        except TimeoutError:
            return failed(f"it did not come whole within {self._seconds:g} s")
        except RefusedAddress:
            return failed("its host leads to an address that this service does not connect to")
        except (httpcore.ConnectError, httpcore.ConnectTimeout):
            return failed("its host could not be reached")
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            return failed("the connection broke, or what came was no HTTP answer")

    def _checked(self, url: str) -> httpcore.URL:
        """The address in parts. Raises Problem."""
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError):
            parsed = httpx.URL()
        host = parsed.raw_host.decode("ascii").lower().removesuffix(".")
        if parsed.scheme not in DEFAULT_PORTS or not host or "%" in host or parsed.userinfo:
            detail = f'must be an address of http or https without credentials, got "{url[:SHOWN]}"'
            raise invalid("/query/image_url", detail)
        port = parsed.port or DEFAULT_PORTS[parsed.scheme]
        if not any(entry.takes(parsed.scheme, host, port) for entry in self._allowed):
            raise Problem(
                "url-fetch-disabled",
                f'{POINTER}: pictures are not fetched from "{host[:SHOWN]}", port {port}; the operator adds '
                f"hosts with --fetch-host. Or send the picture itself.",
            )
        return httpcore.URL(scheme=parsed.scheme, host=host, port=port, target=parsed.raw_path)

    async def _read(self, target: httpcore.URL, room: Room) -> bytes:
        """Raises Problem, and httpcore's errors."""
        headers = [
            ("Host", host_of(target)),
            ("User-Agent", f"dml/{__version__}"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),  # a body that unpacks has no size before it is unpacked
            ("Connection", "close"),
        ]
        connection = httpcore.AsyncHTTPConnection(
            target.origin, ssl_context=self._trusted, network_backend=self._network
        )
        async with connection, connection.stream("GET", target, headers=headers) as answer:
            if not 200 <= answer.status < 300:
                also = "; redirections are not followed" if 300 <= answer.status < 400 else ""
                raise failed(f"its host answered {answer.status}{also}")
            declared = {name.lower(): value for name, value in answer.headers}.get(b"content-length", b"")
            if declared.isdigit() and int(declared[:20]) > room.left:
                raise room.too_large(f"{int(declared[:20]):,} bytes")
            parts = []
            async for part in answer.aiter_stream():
                room.take(len(part))
                parts.append(part)
            return b"".join(parts)

    def close(self) -> None:
        """Let go of the threads; who waits for a name server is not waited for."""
        self._names.shutdown(wait=False, cancel_futures=True)


def failed(why: str) -> Problem:
    return Problem("fetch-failed", f"{POINTER}: no picture came from this address: {why}.")


def host_of(target: httpcore.URL) -> str:
    """The Host header for an address."""
    host = target.host.decode("ascii")
    host = f"[{host}]" if ":" in host else host
    standard = DEFAULT_PORTS[target.scheme.decode("ascii")]
    return host if target.port == standard else f"{host}:{target.port}"
