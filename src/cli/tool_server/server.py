"""Our tools as an MCP server."""

from __future__ import annotations

import base64
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.types import CallToolResult, ImageContent, TextContent
from pydantic import Field

from gptoss import __version__
from gptoss.cli.tool_server.sessions import Answer, SharedSessions
from gptoss.generation.tool_types import TextPart, ToolRunner

NAME = "gptoss"
STDIO = "stdio"  # identifies the one client of a process
SESSION_HEADERS = ("mcp-session-id", "x-session-id")  # the protocol's own; what gateways send
SESSION_ID = "session_id of an earlier result, to continue its state where the connection has no session"
Scope = Mapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]
SessionId = Annotated[str | None, Field(description=SESSION_ID)]


class ToolServer(MCPServer[Any]):
    """An MCP server that may require a key over HTTP."""

    key: str | None = None

    def streamable_http_app(self, **options: Any) -> Any:
        """The app for uvicorn."""
        app = super().streamable_http_app(**options)
        if self.key is not None:
            app.add_middleware(KeyRequired, key=self.key)
        return app


def make_server(runners: Mapping[str, ToolRunner], sessions: SharedSessions, key: str | None = None) -> ToolServer:
    """The server with the tools of these runners: `python`, or those of the browser.

    `key`: which HTTP requests must carry as bearer token; None: none.
    """
    server = ToolServer(NAME, version=__version__, log_level="WARNING")
    server.key = key
    if "python" in runners:
        _add_python(server, runners["python"], sessions)
    if "browser" in runners:
        _add_browser(server, runners["browser"], sessions)
    return server


def _add_python(server: MCPServer, runner: ToolRunner, sessions: SharedSessions) -> None:
    async def python(code: str, ctx: Context[Any, Any], session_id: SessionId = None) -> CallToolResult:
        answer = await sessions.call(runner, "python", code, client_of(ctx), session_id)
        return _shown(answer, ctx)

    assert runner.namespace is not None
    server.add_tool(python, description=runner.namespace.description)


def _add_browser(server: MCPServer, runner: ToolRunner, sessions: SharedSessions) -> None:
    async def call(
        name: str, arguments: dict[str, Any], ctx: Context[Any, Any], session_id: str | None
    ) -> CallToolResult:
        text = json.dumps({key: value for key, value in arguments.items() if value is not None})
        return _shown(await sessions.call(runner, f"browser.{name}", text, client_of(ctx), session_id), ctx)

    async def browser_search(
        query: str, ctx: Context[Any, Any], topn: int | None = None, session_id: SessionId = None
    ) -> CallToolResult:
        return await call("search", {"query": query, "topn": topn}, ctx, session_id)

    async def browser_open(
        ctx: Context[Any, Any],
        id: int | str | None = None,
        cursor: int | None = None,
        loc: int | None = None,
        num_lines: int | None = None,
        view_source: bool | None = None,
        session_id: SessionId = None,
    ) -> CallToolResult:
        given = {"id": id, "cursor": cursor, "loc": loc, "num_lines": num_lines, "view_source": view_source}
        return await call("open", given, ctx, session_id)

    async def browser_find(
        pattern: str, ctx: Context[Any, Any], cursor: int | None = None, session_id: SessionId = None
    ) -> CallToolResult:
        return await call("find", {"pattern": pattern, "cursor": cursor}, ctx, session_id)

    assert runner.namespace is not None
    descriptions = {one.name: one.description for one in runner.namespace.functions}
    for function in (browser_search, browser_open, browser_find):
        server.add_tool(function, description=descriptions[function.__name__.removeprefix("browser_")])


def client_of(ctx: Context[Any, Any]) -> str | None:
    """What identifies the client of a call; None: nothing, as over HTTP since protocol 2026-07-28."""
    if ctx.headers is None:
        return STDIO
    return next((f"{name}:{ctx.headers[name]}" for name in SESSION_HEADERS if ctx.headers.get(name)), None)


def _shown(answer: Answer, ctx: Context[Any, Any]) -> CallToolResult:
    content: list[TextContent | ImageContent] = []
    for part in answer.result.content:
        if isinstance(part, TextPart):
            content.append(TextContent(type="text", text=part.text))
        else:
            data = base64.b64encode(part.data).decode()
            content.append(ImageContent(type="image", data=data, mime_type=part.media_type))
    if answer.session_id and client_of(ctx) is None:
        content.append(TextContent(type="text", text=f"[session_id: {answer.session_id}]"))
    meta = {"session_id": answer.session_id} if answer.session_id else None
    return CallToolResult(content=list(content), is_error=not answer.result.ok, _meta=meta)


class KeyRequired:
    """An ASGI app that answers 401 to requests without the key."""

    def __init__(self, app: App, key: str) -> None:
        self._app, self._expected = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not self._is_allowed(scope):
            headers = [(b"www-authenticate", b"Bearer"), (b"content-length", b"0")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(sent, self._expected)
