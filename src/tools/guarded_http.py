"""An HTTP client that connects only to addresses that an AddressPolicy allows.

It ignores the proxies of the environment. For each connection, also that after a redirect, the host is checked and
resolved once, and the connection goes to one of the addresses that were checked. TLS still verifies the name.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable, Mapping
from typing import Any

import httpcore2
import httpx2

from gptoss.tools.address_guard import AddressPolicy, AddressRefusedError

logging.getLogger("httpx2").setLevel(logging.WARNING)  # at INFO it logs every URL, which may hold a secret


class GuardedBackend(httpcore2.AsyncNetworkBackend):
    """Opens connections to checked addresses."""

    def __init__(self, policy: AddressPolicy) -> None:
        self._policy, self._inner = policy, httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connects to one of the addresses of the host. Raises AddressRefusedError or errors of httpcore2."""
        self._policy.check_host(host)
        loop = asyncio.get_running_loop()
        end = None if timeout is None else loop.time() + timeout
        addresses = self._policy.check_resolved(await _resolve(host, port, timeout))
        error: Exception = httpcore2.ConnectError("no address answers")
        for address in addresses:
            left = None if end is None else max(0.001, end - loop.time())
            try:
                return await self._inner.connect_tcp(address, port, left, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as problem:
                error = problem
        raise error

    async def connect_unix_socket(self, *_: Any, **__: Any) -> httpcore2.AsyncNetworkStream:
        raise AddressRefusedError("sockets of this machine are not allowed")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def _resolve(host: str, port: int, timeout: float | None) -> list[str]:
    """The addresses of a name, in the resolver's order."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise httpcore2.ConnectTimeout(f"{host!r} was not resolved in time") from None
    except (OSError, UnicodeError) as error:
        raise httpcore2.ConnectError(f"{host!r} cannot be resolved: {error}") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class GuardedTransport(httpx2.AsyncHTTPTransport):
    """Checks each request's URL before a connection is opened or used again."""

    def __init__(self, policy: AddressPolicy, *, max_connections: int = 16) -> None:
        super().__init__(trust_env=False)
        self._policy = policy
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=httpx2.create_ssl_context(),
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=30.0,
            network_backend=GuardedBackend(policy),
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self._policy.check_url(str(request.url))
        return await super().handle_async_request(request)


def guarded_client(
    policy: AddressPolicy, *, headers: Mapping[str, str] | None = None, timeout: httpx2.Timeout | float = 30.0
) -> httpx2.AsyncClient:
    """A client that follows no redirect by itself; with `follow_redirects=True` each hop is checked.

    Requests raise AddressRefusedError besides httpx2's own errors.
    """
    return httpx2.AsyncClient(
        transport=GuardedTransport(policy), headers=dict(headers or {}), timeout=timeout, trust_env=False
    )
