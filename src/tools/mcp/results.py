"""What an MCP server returns, as a ToolResult, and what goes wrong with it."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from gptoss.generation.tool_types import ImagePart, ResultPart, TextPart, ToolFailure, ToolResult
from gptoss.tools.address_guard import AddressRefusedError

MAX_MESSAGE = 500  # characters of what a server says of an error
BROKEN = "The MCP server's answer is not valid."


def read_result(result: Any) -> ToolResult:
    """The result of a call; `result` is a CallToolResult of the mcp library."""
    parts = tuple(part for block in result.content if (part := _part(block)) is not None)
    if not parts and result.structured_content is not None:
        parts = (TextPart(json.dumps(result.structured_content, ensure_ascii=False)),)
    if not result.is_error:
        return ToolResult(parts)
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart)) or "The tool reports an error."
    return ToolResult(parts or (TextPart(text),), ToolFailure("execution", text[:MAX_MESSAGE]))


def _part(block: Any) -> ResultPart | None:
    match block.type:
        case "text":
            return TextPart(block.text)
        case "image":
            try:
                return ImagePart(base64.b64decode(block.data, validate=True), block.mime_type)
            except (binascii.Error, ValueError):
                return TextPart("[an image that cannot be read]")
        case "audio":
            return TextPart(f"[audio, {block.mime_type}]")
        case "resource_link":
            return TextPart(f"[{block.name}]({block.uri})")
        case "resource":
            text = getattr(block.resource, "text", None)
            return TextPart(text if text is not None else f"[a file, {block.resource.uri}]")
    return None


def failure_of(error: BaseException) -> ToolFailure:
    """What an exception of a connection means to a client. It quotes nothing that the server sent."""
    import httpx2
    from mcp import MCPError
    from mcp.types import CONNECTION_CLOSED
    from pydantic import ValidationError

    error = innermost(error)
    match error:
        case AddressRefusedError():
            return ToolFailure("unavailable", f"The MCP server may not be reached: {error.message}.")
        case httpx2.HTTPStatusError():
            code = error.response.status_code
            return ToolFailure("http", f"The MCP server answered with HTTP status {code}.", code)
        case TimeoutError() | httpx2.TimeoutException():
            return ToolFailure("timeout", "The MCP server did not answer in time.")
        case MCPError() if error.code == CONNECTION_CLOSED:
            return ToolFailure("unavailable", "The connection to the MCP server has ended.")
        case MCPError():
            return ToolFailure("protocol", error.message[:MAX_MESSAGE] or BROKEN, error.code)
        case ValidationError():
            return ToolFailure("protocol", BROKEN)
        case OSError() | httpx2.TransportError():
            return ToolFailure("unavailable", "The MCP server cannot be reached.")
    return ToolFailure("protocol", BROKEN)


def innermost(error: BaseException) -> BaseException:
    """The first exception of nested groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
