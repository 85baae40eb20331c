"""Who may do what: the scope that each address of the service needs, and the check of a request against it.

A service to which a key was ever added answers nobody without one, but for `PUBLIC` addresses. One without
keys answers everybody who reaches it, which is why `dml serve` keeps it on a loopback address.
"""

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request

from service.keys import Key, Scope, id_of
from service.limits import Limiter, Verdict
from service.problems import Problem
from service.settings import Settings

PUBLIC = None
"""Answered without a key: probes, the files of the page, and what explains the service."""

_ITEM = "/v1/collections/{collection}/items/{id:path}"

NEEDED: Mapping[tuple[str, str], Scope | None] = {
    ("GET", "/livez"): PUBLIC,
    ("HEAD", "/livez"): PUBLIC,
    ("GET", "/readyz"): PUBLIC,
    ("HEAD", "/readyz"): PUBLIC,
    ("GET", "/healthz"): PUBLIC,
    ("HEAD", "/healthz"): PUBLIC,
    ("GET", "/"): PUBLIC,
    ("HEAD", "/"): PUBLIC,
    ("GET", "/favicon.svg"): PUBLIC,
    ("GET", "/web/{name}"): PUBLIC,
    ("GET", "/problems"): PUBLIC,
    ("GET", "/problems/{slug}"): PUBLIC,
    ("GET", "/openapi.json"): PUBLIC,
    ("HEAD", "/openapi.json"): PUBLIC,
    ("GET", "/metrics"): Scope.SEARCH,
    ("GET", "/v1"): Scope.SEARCH,
    ("GET", "/v1/models"): Scope.SEARCH,
    ("POST", "/v1/embeddings"): Scope.SEARCH,
    ("GET", "/v1/collections"): Scope.SEARCH,
    ("GET", "/v1/collections/{collection}"): Scope.SEARCH,
    ("POST", "/v1/collections/{collection}/count"): Scope.SEARCH,
    ("POST", "/v1/collections/{collection}/search"): Scope.SEARCH,
    ("POST", "/v1/collections/{collection}/search/image"): Scope.SEARCH,
    ("POST", "/v1/collections/{collection}/search/batch"): Scope.SEARCH,
    ("GET", "/v1/collections/{collection}/items"): Scope.SEARCH,
    ("GET", _ITEM): Scope.SEARCH,
    ("GET", f"{_ITEM}/image"): Scope.SEARCH,
    ("GET", f"{_ITEM}/similar"): Scope.SEARCH,
    ("PUT", _ITEM): Scope.WRITE,
    ("PATCH", _ITEM): Scope.WRITE,
    ("DELETE", _ITEM): Scope.WRITE,
    ("POST", "/v1/collections/{collection}/items"): Scope.WRITE,
    ("POST", "/v1/collections/{collection}/items/delete"): Scope.WRITE,
    ("POST", "/v1/collections/{collection}/duplicates"): Scope.WRITE,
    ("POST", "/v1/collections/{collection}/feedback"): Scope.SEARCH,
    ("GET", "/v1/collections/{collection}/feedback"): Scope.ADMIN,
    ("POST", "/v1/collections/{collection}/rebuild"): Scope.ADMIN,
    ("PUT", "/v1/collections/{collection}"): Scope.ADMIN,
    ("DELETE", "/v1/collections/{collection}"): Scope.ADMIN,
    ("POST", "/v1/admin/reload"): Scope.ADMIN,
    ("GET", "/v1/aliases"): Scope.SEARCH,
    ("GET", "/v1/aliases/{alias}"): Scope.SEARCH,
    ("PUT", "/v1/aliases/{alias}"): Scope.ADMIN,
    ("DELETE", "/v1/aliases/{alias}"): Scope.ADMIN,
    ("GET", "/v1/jobs"): Scope.SEARCH,
    ("GET", "/v1/jobs/{job}"): Scope.SEARCH,
    ("DELETE", "/v1/jobs/{job}"): Scope.WRITE,
}
"""(method, route) -> the scope that it needs. A route that is missing here needs an admin key."""

CHALLENGE = 'Bearer realm="dml"'  # RFC 6750


@dataclass
class Gate:
    """Decides about requests; one per app.

    Args:
        find: the key of a text, when it may be used now.
        keys_exist: whether a key was ever added.
        settings: rates, and whether metrics are open.
    """

    find: Callable[[str], Key | None]
    keys_exist: Callable[[], bool]
    settings: Settings
    limiter: Limiter = field(default_factory=Limiter)
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._keys_needed()  # now, and not only when somebody asks: until then, the keys could vanish

    def needed(self, method: str, route: str) -> Scope | None:
        """The scope that a request needs. `route` is the template of its path."""
        if route == "/metrics" and self.settings.open_metrics:
            return PUBLIC
        return NEEDED.get((method, route), Scope.ADMIN)

    def identify(self, text: str | None, address: str) -> Key | None:
        """The key of the text that a request came with; None where the service has no keys.

        Raises:
            Problem: "unauthorized", "rate-limited" (too many wrong keys).
        """
        if not self._keys_needed():
            return None
        if text is None:
            self.count(None, address)
            raise unauthorized("The request brought no API key.")
        key = self.find(text)
        if key is None:
            raise self._failure(address)
        return key

    def count(self, key: Key | None, address: str) -> Verdict | None:
        """Count a request of a key, or of an address without one; None where there is no limit.

        Raises:
            Problem: "rate-limited".
        """
        rate = self.settings.rate if key is None else key.rate
        if rate is None:
            return None
        name, who = ("address", network_of(address)) if key is None else ("key", key.id)
        verdict = self.limiter.take(rate, name, who)
        if not verdict.allowed:
            whose = "An address without a key" if key is None else "This key"
            raise over(verdict, name, f"{whose} may ask {rate}.")
        return verdict

    def check_scope(self, key: Key | None, needed: Scope) -> None:
        """Raises Problem "forbidden" when the key does not reach so far."""
        if key is None or key.scope >= needed:
            return
        raise Problem(
            "forbidden",
            f'This needs a key of the scope {needed}; the key "{key.name}" has the scope {key.scope}.',
            headers={"WWW-Authenticate": f'{CHALLENGE}, error="insufficient_scope", scope="{needed}"'},
        )

    def _keys_needed(self) -> bool:
        """Once there were keys, there are: a state file that vanishes must not open the service."""
        self._closed = self._closed or self.keys_exist()
        return self._closed

    def _failure(self, address: str) -> Problem:
        """For a key that is unknown, expired or revoked. Which of them is not told; the log has its id."""
        verdict = self.limiter.take(self.settings.failure_rate, "failure", network_of(address))
        if not verdict.allowed:
            return over(verdict, "failure", f"More than {verdict.rate} wrong keys came from {address}.")
        return unauthorized("The API key is not known here.", error="invalid_token")


def credential(headers: Headers) -> str | None:
    """The key in `Authorization: Bearer` or `api-key`; None where there is none.

    Other schemes of Authorization are not ours: a proxy in front may use them for itself.

    Raises:
        Problem: "malformed", for two that differ.
    """
    given = [value.strip() for value in headers.getlist("api-key")]
    for value in headers.getlist("authorization"):
        scheme, _, rest = value.strip().partition(" ")
        if scheme.lower() == "bearer":
            given.append(rest.strip())
    if len(set(given)) > 1:
        raise Problem("malformed", "The request brought two different keys. Send one, in one header.")
    return given[0] if given else None


def unauthorized(detail: str, *, error: str | None = None) -> Problem:
    challenge = CHALLENGE if error is None else f'{CHALLENGE}, error="{error}"'
    return Problem(
        "unauthorized",
        f"{detail} Send one as 'Authorization: Bearer KEY' or 'api-key: KEY'.",
        headers={"WWW-Authenticate": challenge},
    )


def over(verdict: Verdict, name: str, detail: str) -> Problem:
    return Problem(
        "rate-limited",
        f"{detail} The next one is answered in {verdict.seconds} s.",
        headers={"Retry-After": str(verdict.seconds), **verdict.headers(name)},
        limit=verdict.rate.requests,
    )


def network_of(address: str) -> str:
    """What counts as one address: in IPv6 the /64 that a single client has for itself."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((found, 64), strict=False))


async def authorize(request: Request) -> None:
    """Dependency of every route: who asks, how often, and may they? Raises Problem."""
    gate: Gate = request.app.state.gate
    needed = gate.needed(request.method, request.scope["route"].path)
    if needed is None:  # PUBLIC
        return
    state: dict[str, Any] = request.scope["state"]
    address = request.client.host if request.client else "unknown"
    text = credential(request.headers)
    state["key_id"] = None if text is None else id_of(text)
    key = gate.identify(text, address)
    state["key"] = None if key is None else key.name
    state["scope"] = Scope.ADMIN if key is None else key.scope
    verdict = gate.count(key, address)
    if verdict is not None:
        state["headers"] = verdict.headers("address" if key is None else "key")
    gate.check_scope(key, needed)
