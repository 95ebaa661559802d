"""The tools of one MCP server as a ToolRunner."""

from __future__ import annotations

import json
import secrets
from typing import Any

from gptoss.generation.tool_types import AnswerFilter, SessionOptions, ToolCall, ToolResult
from gptoss.harmony.conversation import ToolNamespace
from gptoss.tools.mcp.servers import McpServer


class McpSession:
    """Holds nothing: the connection belongs to the server."""

    is_alive = True

    def __init__(self) -> None:
        self.id = f"mcps_{secrets.token_hex(16)}"

    def answer_filter(self) -> AnswerFilter | None:
        return None

    async def close(self) -> None:
        """Does nothing."""


class McpRunner:
    """Calls the tools of one server, whose names are the recipients."""

    namespace: ToolNamespace | None = None
    parallel = True

    def __init__(self, name: str, server: McpServer) -> None:
        """`name`: in metrics and logs."""
        self.name, self._server = name, server

    async def open(self, options: SessionOptions) -> McpSession:
        return McpSession()

    async def call(self, call: ToolCall, session: object) -> ToolResult:
        try:
            arguments: Any = json.loads(call.text) if call.text.strip() else {}
        except (ValueError, RecursionError):
            return ToolResult.failed("invalid", "The arguments are not valid JSON.")
        if not isinstance(arguments, dict):
            return ToolResult.failed("invalid", "The arguments are not a JSON object.")
        connection = await self._server.connected()
        if connection is None:
            return ToolResult.failed("unavailable", "The MCP server cannot be reached.")
        return await connection.call(call.recipient, arguments)

    async def close(self) -> None:
        """Does nothing: the server is closed by what opened it."""
