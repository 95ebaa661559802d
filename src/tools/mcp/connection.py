"""One connection to an MCP server, held open by a task of its own.

The library's client belongs to the task that opened it; calls may come from any task. What it logs quotes what servers
send, so it is silent unless content is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO

from gptoss.generation.tool_types import McpTool, ToolResult
from gptoss.tools.address_guard import AddressPolicy
from gptoss.tools.mcp.results import failure_of, read_result

if TYPE_CHECKING:
    import httpx2
    from mcp import Client

logger = logging.getLogger(__name__)
MAX_TOOLS = 512  # of one server
MAX_PAGES = 64
MAX_SCHEMA_CHARS = 100_000  # of one tool; it is offered without a schema beyond
MAX_DESCRIPTION = 10_000  # characters
MAX_MESSAGE_BYTES = 16 * 2**20
CLOSE_S = 6.0  # a process has two seconds to end, and two more to be killed


@dataclass(frozen=True, slots=True)
class Target:
    """What is connected to: a URL, or a command."""

    url: str | None = None
    command: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    policy: AddressPolicy | None = None  # None: any address, for servers of the operator


class ConnectFailedError(Exception):
    """A server cannot be connected to or listed. `code` is an HTTP status or a JSON-RPC error code."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.message, self.code = message, code


class Connection:
    """Open it with `connect`; close it with `close`."""

    def __init__(
        self, target: Target, on_change: Callable[[], None] = lambda: None, *, shows_log: bool = False
    ) -> None:
        """Makes a connection that is not open.

        `on_change` is called when the server says that its tools have changed. `shows_log`: also what it logs.
        """
        self._target, self._on_change, self._shows_log = target, on_change, shows_log
        self._closing, self._stopped = asyncio.Event(), False
        self._task: asyncio.Task[None] | None = None
        self._client: Client | None = None

    @property
    def is_open(self) -> bool:
        return self._client is not None and self._task is not None and not self._task.done()

    async def connect(self, timeout_s: float) -> list[McpTool]:
        """Connects and lists the tools. Raises ConnectFailedError; close the connection also then."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[Client] = loop.create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.to_thread(importlib.import_module, "mcp")  # takes a second
                self._task = loop.create_task(self._hold(opened))
                self._client = await opened
                return await self.list_tools()
        except BaseException as error:
            self._stop()
            if not isinstance(error, Exception):
                raise
            failure = failure_of(error)
            raise ConnectFailedError(failure.message, failure.code) from error

    async def list_tools(self) -> list[McpTool]:
        """The server's tools. Raises what the library raises."""
        assert self._client is not None
        tools: list[McpTool] = []
        cursor: str | None = None
        for _ in range(MAX_PAGES):
            page = await self._client.list_tools(cursor=cursor, cache_mode="refresh")
            tools += [_tool(one) for one in page.tools]
            cursor = page.next_cursor
            if cursor is None or len(tools) >= MAX_TOOLS:
                break
        return list({tool.name: tool for tool in tools}.values())[:MAX_TOOLS]

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolResult:
        """Calls a tool. What goes wrong is a failed result."""
        client = self._client
        if client is None or not self.is_open:
            return ToolResult.failed("unavailable", "The MCP server cannot be reached.")
        try:
            return read_result(await client.call_tool(name, arguments))
        except Exception as error:
            failure = failure_of(error)
            if failure.kind == "unavailable":
                self._stop()
            return ToolResult.failed(failure.kind, failure.message, code=failure.code)

    async def close(self) -> None:
        """Ends the connection, and the server's process if it has one. Never raises."""
        self._stop()
        task = self._task
        if task is None:
            return
        _, running = await asyncio.wait({task}, timeout=CLOSE_S)
        if running:
            task.cancel()
            await asyncio.wait({task}, timeout=CLOSE_S)

    def _stop(self) -> None:
        """Lets the connection end; one that is being opened does not look whether it is to be closed."""
        self._closing.set()
        if self._client is None and self._task is not None and not self._stopped:
            self._task.cancel()
        self._stopped, self._client = True, None

    async def closed(self) -> None:
        """Returns once the connection has ended."""
        if self._task is not None:
            await asyncio.wait({self._task})

    async def _hold(self, opened: asyncio.Future[Client]) -> None:
        """Keeps the connection open until it is to be closed."""
        try:
            async with self._connected() as client:
                if opened.cancelled():
                    return
                opened.set_result(client)
                watching = asyncio.get_running_loop().create_task(self._watch(client))
                try:
                    await self._closing.wait()
                finally:
                    watching.cancel()
                    await asyncio.wait({watching})
        except BaseException as error:
            if not opened.done():
                opened.set_exception(error if isinstance(error, Exception) else ConnectFailedError("cancelled"))
            elif isinstance(error, Exception) and not self._closing.is_set():
                logger.debug("a connection to an MCP server ended: %s", type(error).__name__)
            if not isinstance(error, Exception):
                raise
        finally:
            self._client = None

    async def _watch(self, client: Client) -> None:
        """Reports changes of the tools, if the server sends them on a stream of its own."""
        from mcp.client.subscriptions import ListenNotSupportedError

        tools = client.server_capabilities.tools
        if tools is None or not tools.list_changed:
            return
        with contextlib.suppress(ListenNotSupportedError, Exception):  # it is listed again from time to time anyway
            async with client.listen(tools_list_changed=True) as changes:
                async for _ in changes:
                    self._on_change()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Client]:
        from mcp import Client, StdioServerParameters
        from mcp.client.stdio import stdio_client
        from mcp.client.streamable_http import streamable_http_client
        from mcp.types import Implementation

        from gptoss import __version__

        if not self._shows_log:
            logging.getLogger("mcp").setLevel(logging.CRITICAL + 1)
        info = Implementation(name="gptoss", version=__version__)
        async with contextlib.AsyncExitStack() as stack:
            if self._target.url is not None:
                http = await stack.enter_async_context(self._http_client())
                transport = streamable_http_client(
                    self._target.url, http_client=http, max_sse_event_size=MAX_MESSAGE_BYTES
                )
            else:
                command, *args = self._target.command
                server = StdioServerParameters(command=command, args=args, env=dict(self._target.env))
                transport = stdio_client(server, errlog=stack.enter_context(self._error_log()))
            client = Client(transport, client_info=info, message_handler=self._notified, cache=None)
            yield await stack.enter_async_context(client)

    async def _notified(self, message: Any) -> None:
        if getattr(message, "method", None) == "notifications/tools/list_changed":
            self._on_change()

    def _http_client(self) -> httpx2.AsyncClient:
        from gptoss.tools.mcp.http import http_client

        return http_client(self._target.policy, self._target.headers)

    @contextlib.contextmanager
    def _error_log(self) -> Iterator[TextIO]:
        """Where a server's process writes its log."""
        if self._shows_log:
            yield sys.stderr
            return
        with open(os.devnull, "w") as nothing:
            yield nothing


def _tool(given: Any) -> McpTool:
    schema = given.input_schema
    is_large = len(str(schema)) > MAX_SCHEMA_CHARS
    annotations = given.annotations.model_dump(by_alias=True, exclude_none=True) if given.annotations else None
    description = None if given.description is None else given.description[:MAX_DESCRIPTION]
    return McpTool(given.name, description, {"type": "object"} if is_large else dict(schema), annotations)
