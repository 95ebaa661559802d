"""Addresses of hosts that share a model, and the connections between them. No torch.

Nothing is authenticated or encrypted: the network between the hosts must be private. Messages are msgpack, so that a
stranger cannot run code by sending one.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from multiprocessing.connection import Connection

import psutil

from gptoss.config.errors import ConfigError

MAX_GREETING_BYTES = 1 << 20
GREETING_TIMEOUT_S = 5.0  # for the first message on a connection
# A peer that does not answer counts as gone after KEEP_IDLE_S + KEEP_COUNT * KEEP_INTERVAL_S
KEEP_IDLE_S, KEEP_INTERVAL_S, KEEP_COUNT = 5, 2, 3
UNACKNOWLEDGED_MS = 10_000


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where the ranks meet: torch's store on host 0."""

    host: str
    port: int
    own: str  # the address that this rank's tensor traffic binds
    listen_fd: int | None = None  # rank 0's: the store's socket, bound to `host`


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on that address alone; port 0: any free one.

    Raises:
        ConfigError: the address is not this host's, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on master_addr {host} port {port}: {error}") from None


def connect(host: str, port: int, own: str | None) -> Connection:
    """Returns a connection to a listening host, from this host's address `own`. Raises OSError."""
    return connection_of(socket.create_connection((host, port), 10, (own, 0) if own is not None else None))


def connection_of(connected: socket.socket) -> Connection:
    """Returns a socket as a connection with messages, on which a dead host shows after 10 s."""
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEP_IDLE_S),
        ("TCP_KEEPINTVL", KEEP_INTERVAL_S),
        ("TCP_KEEPCNT", KEEP_COUNT),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS),
    ):
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connected.detach())


def address_towards(host: str, port: int) -> str:
    """Returns this host's address on the way to another. Raises OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Returns the name of the network interface that has the address."""
    for name, found in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in found):
            return str(name)
    return None
