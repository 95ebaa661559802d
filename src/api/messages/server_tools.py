"""Web search and code execution as Anthropic's blocks, in answers and in history."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from gptoss.api.http.encrypted_content import decode_text, encode_text
from gptoss.generation.hosted import HostedCall
from gptoss.generation.tool_run import text_for_model
from gptoss.generation.tool_types import Citation, ToolFailure, ToolResult
from gptoss.harmony.conversation import ToolCall
from gptoss.harmony.conversation import ToolResult as ReadResult

Block = dict[str, Any]
Runs = Callable[[str], bool]
KINDS = {"web_search": "web_search", "web_fetch": "web_search", "code_execution": "code_interpreter"}
USE = "srvtoolu_"  # begins the id of a call's block
_SEARCH_ERRORS = {"invalid": "invalid_tool_input", "limit": "max_uses_exceeded"}
_FETCH_ERRORS = _SEARCH_ERRORS | dict.fromkeys(("http", "timeout", "execution"), "url_not_accessible")
TOO_MANY = 429  # the HTTP status


class ServerBlock(Protocol):
    """A block that came back: of a call or of a result. Its fields have not been validated."""

    type: str
    id: Any
    name: Any
    input: Any
    tool_use_id: Any
    content: Any


def runs_nothing(kind: str) -> bool:
    """Whether built-in tools of a type run: none do."""
    return False


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
    elif result.failure is not None:
        content = {"type": f"{name}_tool_result_error", "error_code": _error_code(name, result.failure)}
    elif name == "web_search":
        content = [_found(one) for one in _results(result)]
        if content:  # what the model has read, for later requests
            content[0]["encrypted_content"] = encode_text(text)
    else:
        source = {"type": "text", "media_type": "text/plain", "data": text}
        url = (result.extras.get("action") or {}).get("url") or ""
        document = {"type": "document", "source": source, "title": result.extras.get("title"), "citations": None}
        content = {"type": "web_fetch_result", "url": url, "retrieved_at": None, "content": document}
    return {"type": f"{name}_tool_result", "content": content}


def _results(result: ToolResult) -> Sequence[Mapping[str, str]]:
    known = result.extras.get("results")
    return known if known is not None else [{"url": url, "title": url} for url in result.extras.get("sources") or ()]


def _found(one: Mapping[str, str]) -> Block:
    return {
        "type": "web_search_result",
        "url": one["url"],
        "title": one["title"],
        "encrypted_content": "",
        "page_age": None,
    }


def _error_code(name: str, failure: ToolFailure) -> str:
    if failure.code == TOO_MANY:
        return "too_many_requests"
    return (_SEARCH_ERRORS if name == "web_search" else _FETCH_ERRORS).get(failure.kind, "unavailable")


def citation_of(citation: Citation) -> Block:
    """A citation of a text block. Its mark comes back with it, so that the model reads what it wrote."""
    return {
        "type": "web_search_result_location",
        "url": citation.url,
        "title": citation.title,
        "cited_text": citation.text,
        "encrypted_index": encode_text(citation.mark),
    }


def mark_of(citation: Any) -> str:
    """The mark of a citation that came back; empty if another server made it."""
    index = citation.get("encrypted_index") if isinstance(citation, Mapping) else None
    try:
        return decode_text(index) if isinstance(index, str) else ""
    except ValueError:
        return ""


def read_calls(blocks: Mapping[int, ServerBlock], where: str, runs: Runs) -> dict[int, ToolCall | ReadResult]:
    """The calls and results that the model can read, by the index of their block.

    `runs`: whether this server runs tools of a type. Calls without a result, of other tools or without the fields of
    a call are not among them.
    """
    found: dict[int, ToolCall | ReadResult] = {}
    called: dict[str, tuple[int, ToolCall]] = {}
    for index, block in blocks.items():
        origin = f"{where}.{index}"
        call = _read_call(block, origin) if block.type == "server_tool_use" else None
        if call is not None and call.id is not None and runs(KINDS[str(block.name)]):
            called.setdefault(call.id, (index, call))
        elif isinstance(block.tool_use_id, str) and block.tool_use_id in called:
            at, call = called.pop(block.tool_use_id)
            found[at] = call
            found[index] = ReadResult(_text(block.content), block.tool_use_id, origin=origin)
    return found


def _read_call(block: ServerBlock, origin: str) -> ToolCall | None:
    given = block.input
    if not isinstance(given, dict) or not isinstance(block.id, str) or not block.id:
        return None
    if block.name == "code_execution":
        code = given.get("code")
        if not isinstance(code, str):
            return None
        return ToolCall("python", code, block.id, is_json=False, is_builtin=True, origin=origin)
    if block.name not in ("web_search", "web_fetch"):
        return None
    function = "search" if block.name == "web_search" else "find" if "pattern" in given else "open"
    raw = given.get("arguments") if len(given) == 1 else None
    text = raw if isinstance(raw, str) else json.dumps(given, ensure_ascii=False, separators=(",", ":"))
    return ToolCall(f"browser.{function}", text, block.id, is_builtin=True, origin=origin)


def _text(content: Any) -> str:
    """What the model reads of a result's content."""
    if isinstance(content, list):
        results = [one for one in content if isinstance(one, Mapping)]
        return _sealed(results) or "\n".join(f"{one.get('title')} ({one.get('url')})" for one in results)
    if not isinstance(content, Mapping):
        return ""
    if "error_code" in content:
        return f"Error: {content['error_code']}"
    if isinstance(content.get("stdout"), str):
        return "\n".join(filter(None, [content["stdout"], str(content.get("stderr") or "")]))
    document = content.get("content")
    source = document.get("source") if isinstance(document, Mapping) else None
    data = source.get("data") if isinstance(source, Mapping) and source.get("type") == "text" else None
    return data if isinstance(data, str) else f"[{content.get('url') or 'A page'}]"


def _sealed(results: Sequence[Mapping[str, Any]]) -> str:
    for one in results:
        content = one.get("encrypted_content")
        if isinstance(content, str) and content:
            try:
                return decode_text(content)
            except ValueError:
                return ""
    return ""
