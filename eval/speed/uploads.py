"""Clients that upload pictures, each the next one as soon as it was answered: a process of its own.

    echo '{"address": …, "path": …, "files": […], "clients": 8, "seconds": 5}' | python -m eval.speed.uploads

Bare sockets on one event loop, and bodies that were made before the clock starts: so the clients take next to
nothing of the processor that the servers are measured on. What was found is printed as one line of JSON.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BOUNDARY = "picture-by-picture"
PATIENCE = 120.0
"""Seconds until an answer is given up."""

REST = 0.05
"""Seconds that a client waits after an error before it goes on."""


@dataclass
class Found:
    """What all clients saw."""

    seconds: list[float] = field(default_factory=list)  # of each answer
    ended: list[float] = field(default_factory=list)  # when, since the start
    errors: dict[str, int] = field(default_factory=dict)  # status or kind of error -> how often
    hits: dict[int, list[tuple[str, float]]] = field(default_factory=dict)  # file -> (id, score), best first


def request_for(path: str, host: str, data: bytes) -> bytes:
    """A whole request: head and multipart body."""
    head = (
        f"--{BOUNDARY}\r\n"
        'Content-Disposition: form-data; name="file"; filename="picture.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    ).encode()
    body = head + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    lines = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return lines.encode() + body


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next answer. Raises ConnectionError, ValueError."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        return int(head[9:12]), await reader.readexactly(length)
    except (asyncio.IncompleteReadError, StopIteration):
        raise ConnectionError("the connection ended before the answer") from None


class Clients:
    """So many connections that share one list of pictures.

    Args:
        seconds: until no further request is sent; 0: when every picture was sent once.
        keep: note the hits of every picture.
    """

    def __init__(
        self, address: str, path: str, bodies: list[bytes], *, clients: int, seconds: float, keep: bool
    ) -> None:
        place = urlsplit(address)
        self.host, self.port = place.hostname or "127.0.0.1", place.port or 80
        self.requests = [request_for(path, f"{self.host}:{self.port}", body) for body in bodies]
        self.clients, self.limit, self.keep = clients, seconds, keep
        self.found, self.next, self.started = Found(), 0, 0.0

    async def run(self) -> Found:
        self.started = time.perf_counter()
        await asyncio.gather(*(self._client() for _ in range(self.clients)))
        return self.found

    def _more(self) -> bool:
        if self.limit:
            return time.perf_counter() - self.started < self.limit
        return self.next < len(self.requests)

    async def _client(self) -> None:
        connection: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while self._more():
            number = self.next % len(self.requests)
            self.next += 1
            try:
                connection = connection or await asyncio.open_connection(self.host, self.port)
                await self._ask(*connection, number)
            except (OSError, ValueError, asyncio.LimitOverrunError) as error:
                self._failed(type(error).__name__)
                connection = None
                await asyncio.sleep(REST)
        if connection is not None:
            connection[1].close()

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        began = time.perf_counter()
        writer.write(self.requests[number])
        status, body = await asyncio.wait_for(answer_of(reader), PATIENCE)
        ended = time.perf_counter()
        if status != 200:
            self._failed(str(status))
            await asyncio.sleep(REST)
            return
        self.found.seconds.append(ended - began)
        self.found.ended.append(ended - self.started)
        if self.keep:
            hits = json.loads(body)["hits"]
            self.found.hits[number] = [(hit["id"], hit["score"]) for hit in hits]

    def _failed(self, kind: str) -> None:
        self.found.errors[kind] = self.found.errors.get(kind, 0) + 1


def main() -> None:
    asked: dict[str, Any] = json.loads(sys.stdin.read())
    bodies = [Path(file).read_bytes() for file in asked.pop("files")]
    keep = bool(asked.get("keep", False))
    clients = Clients(
        asked["address"],
        asked["path"],
        bodies,
        clients=asked["clients"],
        seconds=asked.get("seconds", 0),
        keep=keep,
    )
    try:
        import uvloop

        found = uvloop.run(clients.run())
    except ModuleNotFoundError:
        found = asyncio.run(clients.run())
    print(json.dumps(vars(found)))


if __name__ == "__main__":
    main()
