"""Which names the service answers to.

A web page can give its own name the address 127.0.0.1 (DNS rebinding); the browser then takes what listens
there for the page's own origin and lets it read and write. What the page cannot change is the Host that the
browser sends: its own name. So a service that knows its names refuses all others.
"""

import ipaddress
import re
from collections.abc import Collection

from dml.errors import ConfigError
from service.problems import Problem

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Accepted always: no page elsewhere can send them, and probes beside the service do."""
AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\s:/@\[\]]+))(?::[0-9]{0,5})?")
SHOWN = 100  # characters of a strange Host that are repeated in the answer


def name_of(host: str) -> str | None:
    """The name in a Host header, without its port, in lower case; None where there is none."""
    found = AUTHORITY.fullmatch(host.strip().lower())
    return None if found is None else found[1] or found[2].removesuffix(".") or None


def check_host(given: Collection[str], allowed: Collection[str]) -> None:
    """Refuse a request that was meant for someone else.

    Args:
        given: the Host headers of the request.
        allowed: names that are answered to, besides LOOPBACK; none: every name.

    Raises:
        Problem: "misdirected-request".
    """
    if not allowed:
        return
    names = {name_of(host) for host in given}
    if len(given) == 1 and names <= LOOPBACK | set(allowed):
        return
    shown = ", ".join(given)[:SHOWN]
    raise Problem(
        "misdirected-request",
        f'This service does not go by the name in Host, "{shown}"; --allow-host lets the operator add it.',
    )


def check_name(name: str) -> str:
    """A name for `allowed`, as Host headers are compared with it. Raises ConfigError."""
    bare = name.removeprefix("[").removesuffix("]").lower().removesuffix(".")
    try:
        fits = bool(ipaddress.IPv6Address(bare)) if ":" in bare else name_of(bare) == bare and "*" not in bare
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(
            f'A host to allow is a bare name, such as "photos.example.org" or an address, got "{name}". '
            f"Leave out the scheme, the port and any path; give the option once for each name."
        )
    return bare
