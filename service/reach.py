"""Which hosts the service may reach for its clients: the operator's list, and what a name may lead to.

A service that opens whatever address it is given lends strangers its place in the network (server-side
request forgery): the metadata service of a cloud, databases and consoles that trust their neighbours. So only
hosts on the list are asked, on the ports given there; and addresses of the link, multicast ones, and those at
which clouds answer to their own machines are never connected to. For a pattern such as `*.example.org`, whose
names the operator has not seen, only addresses of the public internet are.
"""

import ipaddress
from dataclasses import dataclass

from dml.errors import ConfigError
from service.hosts import check_name

DEFAULT_PORTS = {"http": 80, "https": 443}

CLOUDS = frozenset(
    map(ipaddress.ip_address, ("168.63.129.16", "100.100.100.200", "192.0.0.192", "fd00:ec2::254"))
)
"""Where clouds answer to their own machines, besides 169.254.169.254, which is an address of the link."""

PROTOCOLS = ipaddress.ip_network("192.0.0.0/24")
"""Kept for protocols; some of it counts as global."""

UNICAST = ipaddress.ip_network("2000::/3")
"""All of IPv6 that is given out for the public internet."""

NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""What networks of IPv6 alone reach IPv4 through."""

WITH_IPV4 = (
    *map(ipaddress.ip_network, ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b:1::/96")),
    NAT64,
)
"""IPv6 whose last 32 bits are an IPv4 address: compatible, mapped, translated, and behind a NAT64."""

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class AllowedHost:
    """One entry of the operator's list.

    Attributes:
        name: a host name or an address in lower case; of a pattern, what follows "*.".
        port: the only port; None: 80 for http and 443 for https.
        below: a pattern: every name that ends in "." + `name`, but not `name` itself.
    """

    name: str
    port: int | None = None
    below: bool = False

    @classmethod
    def parse(cls, text: str) -> "AllowedHost":
        """An entry as the operator writes it: NAME, *.NAME or ADDRESS, each with :PORT or without.

        >>> AllowedHost.parse("*.cdn.example.org")
        AllowedHost(name='cdn.example.org', port=None, below=True)
        >>> AllowedHost.parse("[fd00::7]:9000")
        AllowedHost(name='fd00::7', port=9000, below=False)

        Raises:
            ConfigError
        """
        pattern = text.removeprefix("*.")
        host, colon, port = pattern.rpartition(":")
        if not colon or pattern.endswith("]") or (pattern.count(":") > 1 and not pattern.startswith("[")):
            host, port = pattern, ""
        below = pattern != text
        try:
            name = check_name(host)
            if colon and host != pattern and not 1 <= int(port) <= 65_535:
                raise ValueError(port)
            if below and ("." not in name or is_address(name)):
                raise ValueError(name)
        except (ConfigError, ValueError):
            raise ConfigError(
                f"A host to fetch pictures from is a name, a pattern of names or an address, with a port "
                f'where it is not that of http or https: "photos.example.org", "*.cdn.example.org", '
                f'"10.0.0.7:9000"; got "{text}". Leave out the scheme and any path.'
            ) from None
        return cls(name, int(port) if port else None, below)

    def takes(self, scheme: str, host: str, port: int) -> bool:
        """Whether an address of this scheme, host (lower case) and port is on the list by this entry."""
        return self.names(host) and port == (DEFAULT_PORTS[scheme] if self.port is None else self.port)

    def names(self, host: str) -> bool:
        """Whether this is the name, or one that the pattern stands for. A pattern stands for no address."""
        if not self.below:
            return host == self.name
        return host.endswith("." + self.name) and not (set("%:") & set(host) or is_address(host))


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def may_connect(address: Address, *, public_only: bool) -> bool:
    """Whether a connection to this address may be opened, whatever name led to it."""
    if address.is_link_local or address.is_multicast or address.is_unspecified or address in CLOUDS:
        return False
    inner = within(address)
    if inner is not None and not address.is_loopback and not may_connect(inner, public_only=public_only):
        return False
    if not public_only:
        return True
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and address not in PROTOCOLS
    if address.ipv4_mapped is not None or address in NAT64:
        return True  # what is within was looked at
    return address in UNICAST and address.is_global and inner is None


def within(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for, or leads to through a tunnel."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address.teredo is not None:
        return address.teredo[1]
    if any(address in network for network in WITH_IPV4):
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.sixtofour
