"""Pictures behind addresses, opened for clients: from the hosts of `service.reach`, and from no others.

A name is resolved once, by us, and that address is the one connected to: no second answer of a name server
can lead elsewhere. Redirections are not followed. No credentials, cookies or proxies of this process go
along; what comes is bytes for the picture decoder, with the same limits as an upload, and of the answer
itself clients are told the status alone.
"""

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import httpcore
import httpx

from dml import __version__
from service.batching import QueueFull
from service.problems import Problem, invalid
from service.reach import DEFAULT_PORTS, AllowedHost, may_connect
from service.settings import Settings

POINTER = "query.image_url"
MOST_AT_ONCE = 16
"""Addresses open at the same moment; as many again may wait for a turn."""
SHOWN = 200  # characters of an address that are repeated in an answer


class RefusedAddress(httpcore.ConnectError):
    """A name led to an address that may not be connected to."""


class CheckedNetwork(httpcore.AsyncNetworkBackend):
    """Connections to hosts on the list: each name is resolved here, once, and what it leads to is checked."""

    def __init__(self, allowed: Sequence[AllowedHost]) -> None:
        self._exact = {entry.name for entry in allowed if not entry.below}
        self._plain = cast(httpcore.AsyncNetworkBackend, httpcore.AnyIOBackend())

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from None
        known = [ipaddress.ip_address(entry[4][0]) for entry in found]
        public_only = host.lower() not in self._exact
        last: Exception = RefusedAddress(host)
        for address in dict.fromkeys(known):
            if may_connect(address, public_only=public_only):
                try:
                    return await self._plain.connect_tcp(
                        str(address), port, timeout, local_address, socket_options
                    )
                except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                    last = error
        raise last

    async def sleep(self, seconds: float) -> None:
        await self._plain.sleep(seconds)


class Fetcher:
    """Opens the addresses of pictures.

    Args:
        settings: `fetch_hosts`, `fetch_seconds`, `max_body_bytes`.
    """

    def __init__(self, settings: Settings) -> None:
        self._allowed = [AllowedHost.parse(host) for host in settings.fetch_hosts]
        self._seconds, self._most = settings.fetch_seconds, settings.max_body_bytes
        self._pool: httpcore.AsyncConnectionPool | None = None
        self._open = 0

    async def fetch(self, url: str) -> bytes:
        """The bytes that an address answers with.

        Raises:
            Problem: "url-fetch-disabled" where its host is not on the list, "invalid-request" for what is no
                address of http or https, "image-too-large", "fetch-failed" where nothing came in time.
            QueueFull: too many addresses are open.
        """
        target = self._checked(url)
        if self._open >= 2 * MOST_AT_ONCE:
            raise QueueFull(f"{self._open} addresses are already being opened; try again in a moment")
        self._open += 1
        try:
            async with asyncio.timeout(self._seconds):
                return await self._read(target)
        except TimeoutError:
            raise self._failed(f"it did not come whole within {self._seconds:g} s") from None
        except RefusedAddress:
            raise self._failed("its host leads to an address that this service does not connect to") from None
        except httpcore.ConnectError:
            raise self._failed("its host could not be reached") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
            raise self._failed("the connection broke, or what came was no HTTP answer") from None
        finally:
            self._open -= 1

    def _checked(self, url: str) -> httpcore.URL:
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError):
            parsed = httpx.URL()
        host = parsed.raw_host.decode("ascii").lower().removesuffix(".")
        if parsed.scheme not in DEFAULT_PORTS or not host or parsed.userinfo:
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

    async def _read(self, target: httpcore.URL) -> bytes:
        async with self._answered(target) as answer:
            if not 200 <= answer.status < 300:
                also = "; redirections are not followed" if 300 <= answer.status < 400 else ""
                raise self._failed(f"its host answered {answer.status}{also}")
            declared = {name.lower(): value for name, value in answer.headers}.get(b"content-length", b"")
            if declared.isdigit() and int(declared[:20]) > self._most:
                raise self._too_large(f"{int(declared[:20]):,} bytes")
            parts, size = [], 0
            async for part in answer.aiter_stream():
                size += len(part)
                if size > self._most:
                    raise self._too_large("more")
                parts.append(part)
            return b"".join(parts)

    @asynccontextmanager
    async def _answered(self, target: httpcore.URL) -> AsyncIterator[httpcore.Response]:
        if self._pool is None:
            self._pool = httpcore.AsyncConnectionPool(
                ssl_context=httpcore.default_ssl_context(),
                max_connections=MOST_AT_ONCE,
                keepalive_expiry=15,
                network_backend=CheckedNetwork(self._allowed),
            )
        headers = [
            ("Host", target_host(target)),
            ("User-Agent", f"dml/{__version__}"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),  # a body that unpacks has no size before it is unpacked
        ]
        async with self._pool.stream("GET", target, headers=headers) as answer:
            yield answer

    def _failed(self, why: str) -> Problem:
        return Problem("fetch-failed", f"{POINTER}: no picture came from this address: {why}.")

    def _too_large(self, given: str) -> Problem:
        return Problem(
            "image-too-large",
            f"{POINTER}: a picture may have {self._most:,} bytes here; this one has {given}.",
            limit=self._most,
        )

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.aclose()


def target_host(target: httpcore.URL) -> str:
    """The Host header for an address."""
    host = target.host.decode("ascii")
    host = f"[{host}]" if ":" in host else host
    standard = DEFAULT_PORTS[target.scheme.decode("ascii")]
    return host if target.port == standard else f"{host}:{target.port}"
