"""How many requests a key, or an address without a key, may make: a moving window for each.

The strategy is that of the library `limits`; the windows lie in this process. So each process of a service
counts for itself, and a restart forgets. The library's own memory starts a timer thread every few
milliseconds of traffic and keeps every address for as long as it is told to; `Windows` needs neither.
"""

import math
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from limits import RateLimitItemPerSecond
from limits.storage import MovingWindowSupport, Storage
from limits.strategies import MovingWindowRateLimiter

from dml.errors import ConfigError

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400}
RATE = re.compile(r"([0-9]{1,9}) ?/ ?(s|min|h|d)")
MOST_REQUESTS = 100_000
"""In one window: each is remembered for as long as the window lasts."""
MOST_WINDOWS = 10_000
"""Keys and addresses that are counted at once; beyond, the one that was quiet the longest is forgotten."""


@dataclass(frozen=True)
class Rate:
    """So many requests in so many seconds, in whichever seconds they fall.

    Raises:
        ConfigError: for a rate that lets nothing through, or a window too large to be counted.
    """

    requests: int
    seconds: int

    def __post_init__(self) -> None:
        if not 1 <= self.requests <= MOST_REQUESTS or not 1 <= self.seconds <= SECONDS["d"]:
            raise ConfigError(
                f"A rate is 1 to {MOST_REQUESTS:,} requests in at most a day, got {self.requests:,} in "
                f"{self.seconds:,} seconds. Count in a shorter time: 10/s for 36,000/h."
            )

    @classmethod
    def parse(cls, text: str) -> "Rate":
        """ "100/min" -> 100 requests in 60 seconds. Raises ConfigError."""
        found = RATE.fullmatch(text.strip())
        if found is None:
            raise ConfigError(
                f'A rate is a number of requests, a slash and s, min, h or d, such as 100/min; got "{text}".'
            )
        return cls(int(found[1]), SECONDS[found[2]])

    def __str__(self) -> str:
        unit = next((name for name, seconds in SECONDS.items() if seconds == self.seconds), None)
        return f"{self.requests}/{unit}" if unit else f"{self.requests} in {self.seconds} s"


@dataclass(frozen=True)
class Verdict:
    """Whether one request is within a rate, and what is left of it."""

    allowed: bool
    rate: Rate
    remaining: int
    seconds: int
    """Until the window moves on by a request: when refused, until the next one is let through."""

    def headers(self, name: str) -> dict[str, str]:
        """The fields RateLimit and RateLimit-Policy (IETF draft "RateLimit header fields for HTTP")."""
        return {
            "RateLimit-Policy": f'"{name}";q={self.rate.requests};w={self.rate.seconds}',
            "RateLimit": f'"{name}";r={self.remaining};t={self.seconds}',
        }


class Limiter:
    """Counts requests by whom they are from. Not for several threads: the event loop asks.

    Args:
        clock: seconds; a test may bring its own.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._strategy = MovingWindowRateLimiter(Windows(clock))

    def take(self, rate: Rate, *who: str) -> Verdict:
        """Count one request, unless it is one too many: what is refused does not count."""
        item = RateLimitItemPerSecond(rate.requests, rate.seconds)
        allowed = self._strategy.hit(item, *who)
        stats = self._strategy.get_window_stats(item, *who)
        left = max(1, math.ceil(stats.reset_time - self._clock()))
        return Verdict(allowed, rate, remaining=stats.remaining, seconds=min(left, rate.seconds))


class Windows(Storage, MovingWindowSupport):
    """The moving windows of a process: for each who, the times of the requests in it, oldest first."""

    def __init__(self, clock: Callable[[], float], *, most: int = MOST_WINDOWS) -> None:
        super().__init__()
        self._clock, self._most = clock, most
        self._windows: OrderedDict[str, deque[float]] = OrderedDict()

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        window = self._window(key, expiry)
        if len(window) + amount > limit:
            return False
        window.extend([self._clock()] * amount)
        self._windows[key] = window
        self._windows.move_to_end(key)
        while len(self._windows) > self._most:
            self._windows.popitem(last=False)
        return True

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        window = self._window(key, expiry)
        return (window[0] if window else self._clock()), len(window)

    def _window(self, key: str, expiry: int) -> deque[float]:
        """The window as it is now; forgotten when nothing is left in it."""
        window = self._windows.get(key)
        if window is None:
            return deque()
        start = self._clock() - expiry
        while window and window[0] <= start:
            window.popleft()
        if not window:
            del self._windows[key]
        return window

    # What the library's other strategies would need

    @property
    def base_exceptions(self) -> type[Exception]:
        return ValueError

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        raise NotImplementedError("moving windows only")

    def get(self, key: str) -> int:
        raise NotImplementedError("moving windows only")

    def get_expiry(self, key: str) -> float:
        raise NotImplementedError("moving windows only")

    def check(self) -> bool:
        return True

    def reset(self) -> int | None:
        count = len(self._windows)
        self._windows.clear()
        return count

    def clear(self, key: str) -> None:
        self._windows.pop(key, None)
