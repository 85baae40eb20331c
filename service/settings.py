"""What an operator may set, and the limits that protect the service. Defaults live here and nowhere else."""

import os
from dataclasses import dataclass
from typing import Literal

from dml.errors import ConfigError
from service.hosts import check_name
from service.limits import Rate
from service.origins import check_origin
from service.reach import AllowedHost

MEBIBYTE = 1024 * 1024
WRONG_KEYS = Rate(20, 60)


def usable_cores() -> int:
    """Cores this process may run on: less than the machine has, inside a container with a CPU set."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Settings:
    """Limits and switches of one service.

    Raises:
        ConfigError: for a limit that would let nothing through.
    """

    max_body_bytes: int = 16 * MEBIBYTE
    """A request whose body is larger is answered 413 while it arrives; the rest is never kept."""
    max_pixels: int = 25_000_000
    """A picture with more is refused from its header alone, before any pixel is decoded."""
    max_pixels_in_flight: int = 64_000_000
    """Pictures of this many pixels together are decoded at once; the next one waits for its turn. A pixel
    takes 8 to 10 bytes until the encoder has its small square; in WebP and JPEG 2000 up to 20."""
    max_limit: int = 1000
    """Hits or items in one answer."""
    max_window: int = 10_000
    """Largest limit + offset of a search; deeper pages are what cursors are for."""
    max_searches: int = 32
    """Searches in one batch request."""
    max_images: int = 32
    """Pictures in one embeddings request."""
    max_items: int = 1000
    """Items in one batch that is written."""
    max_ids: int = 1000
    """Ids in one delete request, and examples (positive or negative) in one query."""
    max_payload_bytes: int = 64 * 1024
    """A payload as JSON in UTF-8."""
    thumbnail_pixels: int = 384
    """Longer side of the thumbnails that size=thumb answers with."""
    workers: int = max(4, 2 * usable_cores())
    """Threads that decode, embed and search. Twice the cores: half of them wait for the encoder's thread."""
    processes: int = 1
    """Processes that share the cores; each has its part of them."""
    queue: int = 128
    """Requests that may wait for a thread; one more is answered 503 with Retry-After."""
    deadline_seconds: float = 30.0
    """A request that has not been answered by then is answered 504."""
    max_batch: int = 16
    """Pictures the encoder takes at once when several requests are waiting for it."""
    max_wait_seconds: float = 0.002
    """On a GPU, a call of the encoder may wait so long for pictures that are being decoded at that moment."""
    fetch_hosts: tuple[str, ...] = ()
    """Hosts from which pictures are fetched for clients that give an address instead of a picture, see
    `service.reach.AllowedHost`; none: no address is opened."""
    fetch_seconds: float = 10.0
    """A picture that has not come whole from its address by then is given up."""
    allow_hosts: tuple[str, ...] = ()
    """Names that the service answers to besides 127.0.0.1, localhost and [::1]; none: whatever Host says. On
    a loopback address `dml serve` adds that address, so that no other name is answered to."""
    cors_origins: tuple[str, ...] = ()
    """Origins, such as "https://shop.example.org", whose pages may ask the service from a browser; none: only
    its own page may."""
    rate: Rate | None = None
    """What an address may ask without a key; None: as much as it likes. A key has a rate of its own."""
    failure_rate: Rate = WRONG_KEYS
    """Wrong keys that an address may send; more are answered 429 unseen. A right key always counts."""
    open_metrics: bool = False
    """Answer /metrics without a key also where there are keys."""
    max_header_bytes: int = 32 * 1024
    """Address and header lines of a request together; more is answered 431."""
    header_seconds: float = 10.0
    """A connection on which no whole head of a request has come by then is closed."""
    body_seconds: float = 60.0
    """A body that has not arrived whole by then is answered 408."""
    stall_seconds: float = 30.0
    """A client that has taken nothing of its answer for so long is disconnected."""
    max_connections: int = 1000
    """Connections that may be open; one more is answered 503 and closed."""
    read_only: bool = False
    """Refuse every write with 403."""
    log_format: Literal["auto", "plain", "json"] = "auto"
    """auto: plain on a terminal, JSON lines elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lines below are left out. A request is info, one that the service failed a warning, a probe debug."""
    tracing: bool = False
    """Send a trace of each request to where the OTEL_ variables say."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and value <= 0
                and name != "queue"
            ):
                raise ConfigError(f"the service setting {name} must be above 0, got {value}")
        object.__setattr__(self, "allow_hosts", tuple(check_name(name) for name in self.allow_hosts))
        object.__setattr__(self, "cors_origins", tuple(check_origin(name) for name in self.cors_origins))
        for host in self.fetch_hosts:
            AllowedHost.parse(host)
        if self.queue < 0:
            raise ConfigError(f"the service setting queue must be at least 0, got {self.queue}")
