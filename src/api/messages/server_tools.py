"""Calls of web search and code execution as Anthropic's blocks."""

from __future__ import annotations

import json
from typing import Any

from gptoss.generation.hosted import HostedCall
from gptoss.generation.tool_run import text_for_model
from gptoss.generation.tool_types import ToolResult

Block = dict[str, Any]


def name_of(call: HostedCall) -> str:
    """What Anthropic calls the tool of a built-in tool's call."""
    if call.tool.runner.name == "python":
        return "code_execution"
    return "web_search" if call.tool.recipient.endswith(".search") else "web_fetch"


def input_of(call: HostedCall) -> Block:
    """The call as an object: code stands in `code`."""
    if call.tool.runner.name == "python":
        return {"code": call.text}
    try:
        read = json.loads(call.text)
    except (ValueError, RecursionError):
        return {"arguments": call.text}
    return read if isinstance(read, dict) else {"arguments": read}


def result_of(call: HostedCall, result: ToolResult) -> Block:
    """The type and the content of the block with the result."""
    name, text = name_of(call), text_for_model(result)
    if name == "code_execution":
        content: Any = {
            "type": "code_execution_result",
            "stdout": text,
            "stderr": "",
            "return_code": 0 if result.ok else 1,
            "content": [],
        }
    elif not result.ok:
        content = {"type": f"{name}_tool_result_error", "error_code": "unavailable"}
    elif name == "web_search":
        found = {"type": "web_search_result", "title": "", "encrypted_content": "", "page_age": None}
        content = [found | {"url": url} for url in result.extras.get("sources") or ()]
    else:
        source = {"type": "text", "media_type": "text/plain", "data": text}
        url = (result.extras.get("action") or {}).get("url") or ""
        document = {"type": "document", "source": source, "title": None, "citations": None}
        content = {"type": "web_fetch_result", "url": url, "retrieved_at": None, "content": document}
    return {"type": f"{name}_tool_result", "content": content}
