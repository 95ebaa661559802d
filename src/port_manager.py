"""Choosing and holding a port. The socket that was tested is the socket that serves, so nobody can slip in between."""

from __future__ import annotations

import errno
import socket

import psutil

MAX_TRIES = 100


class PortError(OSError):
    """The port cannot be had. The message names who has it."""


def reserve(host: str, port: int, *, auto: bool = False) -> socket.socket:
    """-> a bound socket on `port`, or with `auto` on the next free port after it.

    Raises:
        PortError: taken, not allowed, or `host` is no address of this machine.
    """
    tries = MAX_TRIES if auto and port else 1
    for candidate in range(port, min(port + tries, 65_536)):
        try:
            return _bind(host, candidate)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise PortError(
                    f"cannot bind {host}:{candidate}: {error.strerror or error}"
                ) from error
    if auto:
        raise PortError(f"no free port between {port} and {port + tries - 1}")
    raise PortError(
        f"port {port} is in use{_owner_text(port)}; choose another with --port, or use --auto-port"
    )


def owner(port: int) -> psutil.Process | None:
    """The process that listens on `port`, None if there is none or it cannot be seen."""
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return None
    for connection in connections:
        if (
            connection.status == psutil.CONN_LISTEN
            and getattr(connection.laddr, "port", None) == port
            and connection.pid
        ):
            try:
                return psutil.Process(connection.pid)
            except psutil.NoSuchProcess:
                return None
    return None


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)  # a port counts as taken only once somebody listens
    except OSError:
        bound.close()
        raise
    bound.set_inheritable(False)
    return bound


def _owner_text(port: int) -> str:
    process = owner(port)
    if process is None:
        return ""
    try:
        return f" by {process.name()} (pid {process.pid})"
    except psutil.Error:
        return f" (pid {process.pid})"
