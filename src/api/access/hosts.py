"""Checks Host headers, against DNS rebinding.

A web site can make its own name resolve to 127.0.0.1; the browser then treats our responses as that site's. It still
sends that site's name as Host, so on a loopback address only names of this machine are accepted.
"""

from __future__ import annotations

import ipaddress
import re
import socket

from gptoss.config.schema import ServerConfig

_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[^:\[\]%]+)(:\d{0,5})?", re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to a server bound to `host`, a name or an address."""
    if not host:
        return False  # binds every address
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
    """Allows names of this machine and of allowed_hosts.

    Any name is allowed if allowed_hosts is unset and `host` is not loopback.
    """

    def __init__(self, config: ServerConfig) -> None:
        named = config.allowed_hosts
        self._any = "*" in named if named is not None else not is_loopback(config.host)
        self._names = {"localhost", _normal(config.host), *map(_normal, named or ())}

    def allows(self, value: bytes) -> bool:
        """Whether requests with this Host header are accepted."""
        if self._any:
            return True
        match = _HOST.fullmatch(value.decode("latin-1").strip(" \t"))
        if match is None:
            return False
        name = _normal(match["name"])
        return name in self._names or _is_loopback_address(name)


def _normal(name: str) -> str:
    return name.strip("[]").removesuffix(".").lower()
