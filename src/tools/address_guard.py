"""Which hosts and addresses a URL that a request or a page names may lead to.

Without it a client that names a URL reaches whatever the server's machine reaches: its own ports, the cloud's metadata
service, the internal network. A name is resolved once and the connection goes to an address that was checked
(guarded_http.py), so a second DNS answer changes nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from urllib.parse import urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
_NAT64 = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
_PATTERN = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


class AddressRefusedError(Exception):
    """A URL or an address that may not be reached. `message` names neither other hosts nor addresses."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, and so are all addresses that it stands for."""
    return all(_is_public(one) for one in _meanings(address))


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address.is_site_local:
        return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified or address.is_loopback
    )


def _meanings(address: Address) -> Iterator[Address]:
    """The address, or the IPv4 address within it to which a kernel or a gateway sends its packets."""
    if isinstance(address, IPv4Address):
        yield address
        return
    if address.ipv4_mapped is not None:  # ::ffff:127.0.0.1
        yield address.ipv4_mapped
        return
    value = int(address)
    if value >> 32 == 0 and value > 1:  # ::127.0.0.1
        yield IPv4Address(value)
        return
    if any(address in network for network in _NAT64):
        yield IPv4Address(value & 0xFFFF_FFFF)
        return
    yield address
    if address.sixtofour is not None:
        yield address.sixtofour
    if address.teredo is not None:
        yield from address.teredo


@dataclass(frozen=True, slots=True)
class AddressPolicy:
    """What may be reached.

    `hosts`: names, `*.example.com` for all names below one, or addresses; None: any. `networks`: those that may be
    reached although they are not public. A name that is allowed does not allow a private address.
    """

    hosts: tuple[str, ...] | None = None
    networks: tuple[Network, ...] = ()

    def check_url(self, url: str) -> None:
        """Raises AddressRefusedError unless the URL is http(s), and its host may be named."""
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise AddressRefusedError("not a valid URL") from None
        if parts.scheme not in ("http", "https") or not host:
            raise AddressRefusedError("only http and https URLs with a host are allowed")
        if parts.username is not None or parts.password is not None:
            raise AddressRefusedError("a URL with a user name or password is not allowed")
        self.check_host(host)

    def check_host(self, host: str) -> None:
        """Raises AddressRefusedError if the host is not one of `hosts`, or is an address that is refused."""
        name = host.rstrip(".").lower().strip("[]")
        if self.hosts is not None and not any(_matches(name, pattern) for pattern in self.hosts):
            raise AddressRefusedError(f"the host {host!r} is not on the allow-list")
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return
        self.check_address(address)

    def check_address(self, address: Address) -> None:
        """Raises AddressRefusedError for an address that is neither public nor in one of `networks`."""
        if isinstance(address, IPv6Address) and address.scope_id is not None:
            raise AddressRefusedError("an address with a zone is not allowed")
        meanings = [*_meanings(address)]
        if is_public(address) or all(any(_within(one, net) for net in self.networks) for one in meanings):
            return
        raise AddressRefusedError("the address is private, local or reserved, and not allowed")

    def check_resolved(self, addresses: Sequence[str]) -> list[str]:
        """The addresses of a name, all of which may be reached. Raises AddressRefusedError if one may not."""
        for address in addresses:
            self.check_address(ipaddress.ip_address(address))
        if not addresses:
            raise AddressRefusedError("the host has no address")
        return [*addresses]


def _within(address: Address, network: Network) -> bool:
    return address.version == network.version and address in network


def _matches(name: str, pattern: str) -> bool:
    pattern = pattern.lower()
    return name.endswith(pattern[1:]) if pattern.startswith("*.") else name == pattern


def is_host_pattern(text: str) -> bool:
    """Whether a configured host is a name, `*.` and a name, or an address."""
    try:
        return ipaddress.ip_address(text) is not None
    except ValueError:
        return _PATTERN.fullmatch(text.lower()) is not None
