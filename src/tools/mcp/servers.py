"""MCP servers: those of the configuration, which stay connected, and those that a request names."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gptoss.config.tool_keys import McpServerEntry, filled
from gptoss.generation.tool_types import McpTool, ToolFailure
from gptoss.tools.address_guard import AddressPolicy, AddressRefusedError, is_host_pattern
from gptoss.tools.mcp.connection import ConnectFailedError, Connection, Target

logger = logging.getLogger(__name__)
MAX_WAIT_S = 60.0  # between two tries to connect
RECENT_S = 5.0  # a server that could not be reached this recently is not waited for


@dataclass(frozen=True, slots=True)
class Listing:
    """The tools of a server, or why they could not be listed."""

    tools: Sequence[McpTool] = ()
    failure: ToolFailure | None = None


class McpServer(Protocol):
    """A server that may be listed and called."""

    async def connected(self) -> Connection | None:
        """An open connection; None if there is none in time."""

    async def listing(self) -> Listing:
        """Its tools. Never raises, and takes no longer than the time for connecting."""


class ConfiguredServer:
    """A server of the configuration. `run` keeps it connected and listed."""

    def __init__(self, label: str, target: Target, timeout_s: float, refresh_s: float, *, shows_log: bool) -> None:
        self.label = label
        self._target, self._timeout_s, self._refresh_s, self._shows_log = target, timeout_s, refresh_s, shows_log
        self._connection: Connection | None = None
        self._listing: Listing | None = None  # None while it connects
        self._listed = asyncio.Event()
        self._wake = asyncio.Event()  # lists again, or connects at once
        self._failed_at = -RECENT_S

    @property
    def connection(self) -> Connection | None:
        held = self._connection
        return held if held is not None and held.is_open else None

    @property
    def is_up(self) -> bool:
        return self.connection is not None

    async def listing(self) -> Listing:
        if not self._listed.is_set() or (not self.is_up and time.monotonic() - self._failed_at > RECENT_S):
            self._listed.clear()
            self._wake.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await self._listed.wait()
        if self._listing is None or not self._listed.is_set():
            return Listing(failure=ToolFailure("timeout", "The MCP server did not answer in time."))
        return self._listing

    async def connected(self) -> Connection | None:
        if self.connection is None:
            await self.listing()
        return self.connection

    async def run(self) -> None:
        """Connects, lists, and connects again when the connection ends, until it is cancelled."""
        wait_s = 1.0
        while True:
            connection = Connection(self._target, self._wake.set, shows_log=self._shows_log)
            self._wake.clear()
            try:
                self._list(await connection.connect(self._timeout_s))
                self._connection, wait_s = connection, 1.0
                await self._stay(connection)
            except ConnectFailedError as error:
                self._fail(error.message, error.code)
            finally:
                self._connection = None
                await connection.close()
            await self._pause(wait_s)
            wait_s = min(wait_s * 2, MAX_WAIT_S)

    async def _stay(self, connection: Connection) -> None:
        """Lists the tools again when they change, until the connection ends."""
        ended = asyncio.get_running_loop().create_task(connection.closed())
        try:
            while not ended.done():
                changed = asyncio.get_running_loop().create_task(self._wake.wait())
                await asyncio.wait({ended, changed}, timeout=self._refresh_s, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                self._wake.clear()
                if ended.done():
                    break
                try:
                    async with asyncio.timeout(self._timeout_s):
                        self._list(await connection.list_tools())
                except Exception as error:
                    logger.warning("MCP server %s cannot be listed again: %s", self.label, type(error).__name__)
                    break
        finally:
            ended.cancel()
        logger.warning("the connection to MCP server %s has ended", self.label)

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _list(self, tools: Sequence[McpTool]) -> None:
        if self._listing is None or [one.name for one in self._listing.tools] != [one.name for one in tools]:
            logger.info("MCP server %s offers %d tools", self.label, len(tools))
        self._listing = Listing(tuple(tools))
        self._listed.set()

    def _fail(self, message: str, code: int | None) -> None:
        self._failed_at = time.monotonic()
        if self._listing is None or self._listing.failure is None:
            logger.warning("MCP server %s: %s", self.label, message)
        self._listing = Listing(failure=ToolFailure("unavailable", message, code))
        self._listed.set()


class RequestServer:
    """A server that a request names by its URL: connected for this request alone."""

    def __init__(self, target: Target, timeout_s: float, *, shows_log: bool) -> None:
        self._timeout_s = timeout_s
        self._connection = Connection(target, shows_log=shows_log)
        self._listing: Listing | None = None
        self._turn = asyncio.Lock()

    async def connected(self) -> Connection | None:
        await self.listing()
        return self._connection if self._connection.is_open else None

    async def listing(self) -> Listing:
        async with self._turn:
            if self._listing is None:
                try:
                    self._listing = Listing(tuple(await self._connection.connect(self._timeout_s)))
                except ConnectFailedError as error:
                    self._listing = Listing(failure=ToolFailure("unavailable", error.message, error.code))
        return self._listing

    async def close(self) -> None:
        """Ends the connection. Never raises."""
        await self._connection.close()


@dataclass(frozen=True, slots=True)
class RequestUrls:
    """Which servers requests may name by URL."""

    allowed: bool = False
    policy: AddressPolicy = AddressPolicy(())


class McpServers:
    """All servers of a configuration. `start` connects them in the background."""

    def __init__(
        self, targets: Mapping[str, Target], urls: RequestUrls, timeout_s: float, refresh_s: float, *, shows_log: bool
    ) -> None:
        self._urls, self._timeout_s, self._shows_log = urls, timeout_s, shows_log
        self.configured = {
            label: ConfiguredServer(label, target, timeout_s, refresh_s, shows_log=shows_log)
            for label, target in targets.items()
        }
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begins to connect; returns at once."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(server.run()) for server in self.configured.values()]

    async def close(self) -> None:
        """Ends all connections."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def of_url(self, url: str, headers: Mapping[str, str]) -> RequestServer:
        """A server that a request names. Raises AddressRefusedError if it may not."""
        if not self._urls.allowed:
            raise AddressRefusedError("this server takes no URLs of MCP servers from requests")
        self._urls.policy.check_url(url)
        target = Target(url, headers=dict(headers), policy=self._urls.policy)
        return RequestServer(target, self._timeout_s, shows_log=self._shows_log)


def address_policy(hosts: Iterable[str] | None, networks: Iterable[str]) -> AddressPolicy:
    """The policy of the configuration's hosts and networks. Raises ValueError."""
    for host in hosts or ():
        if not is_host_pattern(host):
            raise ValueError(f"{host!r} is not a host: leave out scheme, port and path")
    return AddressPolicy(None if hosts is None else tuple(hosts), tuple(ipaddress.ip_network(one) for one in networks))


def target_of(entry: McpServerEntry, environment: Mapping[str, str] = os.environ) -> Target:
    """The target of an entry of `mcp_servers`. Raises ValueError for a variable that is not set."""
    if entry.url is not None:
        return Target(entry.url, headers=filled(entry.headers, environment))
    return Target(command=tuple(entry.command or ()), env=filled(entry.env, environment))
