"""Which web pages may talk to the service through the browser of a visitor.

Its own page may. Pages of other origins may not read anything (there are no CORS headers), and what they can
send without asking first (a form, an upload) is refused: a service on 127.0.0.1 has no other way to tell its
operator from a page that the operator happens to visit. Origins that are allowed get the usual CORS answers.
"""

import re
from collections.abc import Collection

from starlette.datastructures import Headers

from dml.errors import ConfigError
from service.problems import Problem

ORIGIN = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::[0-9]{1,5})?")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"
SENT = "Authorization, Content-Type, Idempotency-Key, If-Match, If-None-Match, X-Request-Id, api-key"
READ = "ETag, Location, RateLimit, RateLimit-Policy, Retry-After, Server-Timing, X-Request-Id"
REMEMBERED_SECONDS = 600
SHOWN = 100  # characters of a strange Origin that are repeated in the answer


def check_origin(text: str) -> str:
    """An origin for `Settings.cors_origins`, as browsers write it. Raises ConfigError."""
    origin = text.lower().rstrip("/")
    if not ORIGIN.fullmatch(origin):
        raise ConfigError(
            f'An origin is a scheme, a host and perhaps a port, such as "https://shop.example.org", '
            f'got "{text}". There is no word for all origins: name each.'
        )
    return origin


def check_sender(method: str, headers: Headers, allowed: Collection[str]) -> None:
    """Refuse a request that changes or computes something, when a page of another origin sent it.

    Browsers say so in Sec-Fetch-Site; older ones, and all on plain HTTP, send Origin, which then has to be
    the host that was asked. Programs send neither.

    Raises:
        Problem: "cross-origin".
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if method in SAFE_METHODS or origin in allowed or site in ("same-origin", "none"):
        return
    if site is None and (origin is None or origin.partition("://")[2] == headers.get("host", "").lower()):
        return
    raise Problem(
        "cross-origin",
        f'A page of "{(origin or "another origin")[:SHOWN]}" sent this, and only the page of this service '
        f"may; --cors-origin lets the operator add others.",
    )


def is_preflight(method: str, headers: Headers, allowed: Collection[str]) -> bool:
    """Whether a browser asks, for a page that is allowed, whether it may send something."""
    return (
        method == "OPTIONS"
        and "access-control-request-method" in headers
        and headers.get("origin") in allowed
    )


def sharing_headers(headers: Headers, allowed: Collection[str], *, preflight: bool = False) -> dict[str, str]:
    """The CORS headers of an answer. Where no origins are allowed there are none."""
    if not allowed:
        return {}
    shared = {"Vary": "Origin", "Cross-Origin-Resource-Policy": "cross-origin"}
    origin = headers.get("origin")
    if origin not in allowed or origin is None:
        return shared
    shared |= {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": READ}
    if preflight:
        shared |= {
            "Access-Control-Allow-Methods": METHODS,
            "Access-Control-Allow-Headers": SENT,
            "Access-Control-Max-Age": str(REMEMBERED_SECONDS),
        }
    return shared
