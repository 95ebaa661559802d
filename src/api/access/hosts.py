"""Which Host headers are answered.

A web site can have its own name resolve to 127.0.0.1 (DNS rebinding): the browser then takes our answers for that
site's own. It still sends that site's name as Host, so on a loopback address only names of this machine are answered.
"""

from __future__ import annotations

import ipaddress
import re
import socket

from gptoss.config.schema import ServerConfig

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]%]+)(:\d{0,5})?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server that binds `host`, a name or an address."""
    if not host:
        return False  # every address
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_is_loopback_address(str(address)) for address in found)


def _is_loopback_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


class HostCheck:
    """Allows this machine's names and those of allowed_hosts; any, if it is unset and `host` is not loopback."""

    def __init__(self, config: ServerConfig) -> None:
        named = config.allowed_hosts
        self._any = "*" in named if named is not None else not is_loopback(config.host)
        self._names = {"localhost", _normal(config.host), *map(_normal, named or ())}

    def allows(self, value: bytes) -> bool:
        """Whether a request with this Host header is answered."""
        if self._any:
            return True
        match = _HOST.fullmatch(value.decode("latin-1").strip(" \t"))
        if match is None:
            return False
        name = _normal(match["name"])
        return name in self._names or _is_loopback_address(name)


def _normal(name: str) -> str:
    return name.strip("[]").removesuffix(".").lower()
