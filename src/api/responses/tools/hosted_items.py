"""Calls of the server's tools as items of a response, and the events that report them.

The order is OpenAI's: https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol

from gptoss.api.hosted.names import browser_call_id
from gptoss.api.hosted.service import Prepared, ShownListing
from gptoss.api.responses.tools.browser_calls import SEARCH, RanSearch, keep_search
from gptoss.api.responses.tools.calls import Event, ItemList
from gptoss.generation.hosted import HostedCall, ToolEvent
from gptoss.generation.tool_run import text_for_model
from gptoss.generation.tool_types import ImagePart, TextPart, ToolFailure, ToolResult

SOURCES = "web_search_call.action.sources"  # what `include` calls them
OUTPUTS = "code_interpreter_call.outputs"
INTERNAL_ERROR = -32603  # JSON-RPC's


class _Item:
    """One item of a response, which may be open while others begin."""

    def __init__(self, items: ItemList, prefix: str, fields: dict[str, Any]) -> None:
        self._index = len(items.items)
        self.fields: dict[str, Any] = {"id": prefix + secrets.token_hex(24)} | fields
        items.items.append(self.fields)

    def added(self) -> Event:
        return self._whole("response.output_item.added")

    def done(self) -> Event:
        return self._whole("response.output_item.done")

    def event(self, name: str, /, **more: Any) -> Event:
        return {"type": name, "item_id": self.fields["id"], "output_index": self._index} | more

    def _whole(self, name: str) -> Event:
        return {"type": name, "output_index": self._index, "item": dict(self.fields)}


class HostedItem(Protocol):
    """The item of one call."""

    def feed(self, event: ToolEvent) -> Iterator[Event]: ...

    def interrupt(self) -> Iterator[Event]:
        """Ends an item whose call does not end."""


class McpCall:
    def __init__(self, items: ItemList, call: HostedCall, label: str, name: str) -> None:
        self._item = _Item(
            items,
            "mcp_",
            {
                "type": "mcp_call",
                "status": "in_progress",
                "server_label": label,
                "name": name,
                "arguments": "",
                "output": None,
                "error": None,
                "approval_request_id": call.approval_id,
            },
        )

    def feed(self, event: ToolEvent) -> Iterator[Event]:
        item = self._item
        match event.state:
            case "begun":
                yield item.added()
                yield item.event("response.mcp_call.in_progress")
            case "text":
                item.fields["arguments"] += event.text
                yield item.event("response.mcp_call_arguments.delta", delta=event.text)
            case "whole":
                yield item.event("response.mcp_call_arguments.done", arguments=item.fields["arguments"])
                item.fields["status"] = "calling"
            case "cut":
                yield from self.interrupt()
            case "finished":
                assert event.call.result is not None
                yield from self._finished(event.call.result)

    def interrupt(self) -> Iterator[Event]:
        self._item.fields["status"] = "incomplete"
        yield self._item.done()

    def _finished(self, result: ToolResult) -> Iterator[Event]:
        text = text_of(result)
        failure = result.failure
        if failure is None:
            self._item.fields |= {"status": "completed", "output": text}
        else:
            self._item.fields |= {"status": "failed", "error": mcp_error(failure, text)}
        yield self._item.event(f"response.mcp_call.{self._item.fields['status']}")
        yield self._item.done()


def mcp_error(failure: ToolFailure, text: str) -> dict[str, Any]:
    """A failure as the field `error` of an mcp_call."""
    if failure.kind == "execution":
        return {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": text}]}
    if failure.kind == "http" and failure.code is not None:
        return {"type": "http_error", "code": failure.code, "message": failure.message}
    code = failure.code if failure.code is not None else INTERNAL_ERROR
    return {"type": "mcp_protocol_error", "code": code, "message": failure.message}


class ApprovalRequest:
    """A call that has to be approved: its item comes when it is whole."""

    def __init__(self, items: ItemList, label: str, name: str) -> None:
        self._items, self._label, self._name = items, label, name

    def feed(self, event: ToolEvent) -> Iterator[Event]:
        if event.state == "whole":
            fields = {
                "type": "mcp_approval_request",
                "server_label": self._label,
                "name": self._name,
                "arguments": event.call.text,
            }
            item = _Item(self._items, "mcpr_", fields)
            yield item.added()
            yield item.done()

    def interrupt(self) -> Iterator[Event]:
        yield from ()


class WebSearchCall:
    """A call of the browser: its item comes when the action is known."""

    def __init__(self, items: ItemList, keep_result: Callable[[str, str], object], *, with_sources: bool) -> None:
        self._items, self._keep_result, self._with_sources = items, keep_result, with_sources
        self._item: _Item | None = None

    def feed(self, event: ToolEvent) -> Iterator[Event]:
        if event.state == "running":
            item_id = browser_call_id(SEARCH, event.call.session_id)
            action = action_of(event.call)
            fields = {"id": item_id, "type": "web_search_call", "status": "in_progress", "action": action}
            self._item = _Item(self._items, SEARCH, fields)
            yield self._item.added()
            yield self._item.event("response.web_search_call.in_progress")
            self._item.fields["status"] = "searching"
            yield self._item.event("response.web_search_call.searching")
        elif event.state == "finished" and self._item is not None:
            result = event.call.result
            assert result is not None
            self._item.fields["action"] = self._action(result, self._item.fields["action"])
            self._item.fields["status"] = "completed" if result.ok else "failed"
            ran = RanSearch(event.call.tool.recipient, event.call.text, text_for_model(result))
            self._keep_result(self._item.fields["id"], keep_search(ran))
            yield self._item.event("response.web_search_call.completed")
            yield self._item.done()

    def interrupt(self) -> Iterator[Event]:
        if self._item is not None:
            self._item.fields["status"] = "incomplete"
            yield self._item.done()

    def _action(self, result: ToolResult, before: dict[str, Any]) -> dict[str, Any]:
        action = dict(result.extras.get("action") or before)
        if self._with_sources and action["type"] == "search":
            action["sources"] = [{"type": "url", "url": url} for url in result.extras.get("sources") or ()]
        return action


def action_of(call: HostedCall) -> dict[str, Any]:
    """The action of a browser call, as far as its arguments have it."""
    try:
        arguments = json.loads(call.text)
    except (ValueError, RecursionError):
        arguments = {}
    arguments = arguments if isinstance(arguments, dict) else {}

    def text(name: str) -> str:
        return value if isinstance(value := arguments.get(name), str) else ""

    match call.tool.recipient.rpartition(".")[2]:
        case "open":
            return {"type": "open_page", "url": text("id") or None}
        case "find":
            return {"type": "find_in_page", "pattern": text("pattern"), "url": ""}
    return {"type": "search", "query": text("query"), "queries": [text("query")]}


class CodeInterpreterCall:
    """A call of Python: its item comes when its container is known."""

    def __init__(self, items: ItemList, keep_result: Callable[[str, str], object], *, with_outputs: bool) -> None:
        self._items, self._keep_result, self._with_outputs = items, keep_result, with_outputs
        self._item: _Item | None = None

    def feed(self, event: ToolEvent) -> Iterator[Event]:
        if event.state == "running":
            fields = {
                "type": "code_interpreter_call",
                "status": "in_progress",
                "code": "",
                "container_id": event.call.session_id,
                "outputs": None,
            }
            item = self._item = _Item(self._items, "ci_", fields)
            name = "response.code_interpreter_call"
            yield item.added()
            yield item.event(f"{name}.in_progress")
            if event.call.text:
                yield item.event(f"{name}_code.delta", delta=event.call.text)
            item.fields["code"] = event.call.text
            yield item.event(f"{name}_code.done", code=event.call.text)
            item.fields["status"] = "interpreting"
            yield item.event(f"{name}.interpreting")
        elif event.state == "finished" and self._item is not None:
            result = event.call.result
            assert result is not None
            self._item.fields["status"] = "completed" if result.ok else "failed"
            self._keep_result(self._item.fields["id"], text_for_model(result))
            if self._with_outputs:
                self._item.fields["outputs"] = outputs_of(result)
            yield self._item.event("response.code_interpreter_call.completed")
            yield self._item.done()

    def interrupt(self) -> Iterator[Event]:
        if self._item is not None:
            self._item.fields["status"] = "incomplete"
            yield self._item.done()


def outputs_of(result: ToolResult) -> list[dict[str, Any]]:
    """What a Python call printed and drew: the runner's own list, or one made of its parts."""
    if "outputs" in result.extras:
        return [dict(one) for one in result.extras["outputs"]]
    outputs: list[dict[str, Any]] = []
    for part in result.content:
        if isinstance(part, ImagePart):
            data = base64.b64encode(part.data).decode()
            outputs.append({"type": "image", "url": f"data:{part.media_type};base64,{data}"})
        elif part.text:
            outputs.append({"type": "logs", "logs": part.text})
    return outputs


def text_of(result: ToolResult) -> str:
    """The texts of a result, and data URLs of its images."""
    return "\n".join(_shown(part) for part in result.content)


def _shown(part: TextPart | ImagePart) -> str:
    if isinstance(part, TextPart):
        return part.text
    return f"data:{part.media_type};base64,{base64.b64encode(part.data).decode()}"


class HostedItems:
    """The items of a response's calls of the server's tools."""

    def __init__(self, items: ItemList, prepared: Prepared, include: Collection[str]) -> None:
        """`include`: optional fields of the items that the request asks for."""
        self._items, self._prepared, self._include = items, prepared, include
        self._open: dict[HostedCall, HostedItem] = {}

    def listings(self) -> list[Event]:
        """The events of the servers' lists that the request does not have already."""
        events: list[Event] = []
        for listing in self._prepared.listings:
            events += [] if listing.is_known else self._listing(listing)
        return events

    def feed(self, event: ToolEvent) -> list[Event]:
        call = event.call
        if call not in self._open:
            self._open[call] = self._item_of(call)
        events = [*self._open[call].feed(event)]
        if event.state in ("finished", "cut") or (event.state == "whole" and call.needs_approval):
            del self._open[call]
        return events

    def close(self) -> list[Event]:
        """Ends the items of calls that do not end: the response has failed."""
        events = [event for item in self._open.values() for event in item.interrupt()]
        self._open = {}
        return events

    def _listing(self, listing: ShownListing) -> list[Event]:
        fields: dict[str, Any] = {"type": "mcp_list_tools", "server_label": listing.label, "tools": []}
        item = _Item(self._items, "mcpl_", fields)
        events = [item.added(), item.event("response.mcp_list_tools.in_progress")]
        if listing.failure is not None:
            item.fields["error"] = listing.failure.message
            return [*events, item.event("response.mcp_list_tools.failed"), item.done()]
        item.fields["tools"] = [
            {
                "name": tool.name,
                "input_schema": tool.input_schema,
                "description": tool.description,
                "annotations": tool.annotations,
            }
            for tool in listing.tools
        ]
        return [*events, item.event("response.mcp_list_tools.completed"), item.done()]

    def _item_of(self, call: HostedCall) -> HostedItem:
        labels = self._prepared.labels.get(call.name)
        if labels is not None:
            label, name = labels
            return (
                ApprovalRequest(self._items, label, name)
                if call.needs_approval
                else McpCall(self._items, call, label, name)
            )
        keep = self._prepared.keep_result
        if call.tool.runner.name == "python":
            return CodeInterpreterCall(self._items, keep, with_outputs=OUTPUTS in self._include)
        return WebSearchCall(self._items, keep, with_sources=SOURCES in self._include)
