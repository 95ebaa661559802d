"""Items of the server's tools that come back as history: calls, lists and approvals.

Calls become those of a function, so that the model reads them as it wrote them. An approval without a call asks for the
call to be run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from gptoss.api.hosted.names import browser_session, joined_name
from gptoss.api.http.errors import InvalidRequest, from_validation
from gptoss.api.http.fields import Strict
from gptoss.api.responses.tools.browser_calls import SEARCH, read_search
from gptoss.api.responses.tools.placed import PlacedItem
from gptoss.generation.hosted import Approved
from gptoss.generation.tool_types import McpTool
from gptoss.harmony.conversation import ToolCall, ToolResult

DECLINED = "The user did not allow this call."
NOT_RUN = "This call was not run."
OUTPUT_UNKNOWN = "[The output of this code is no longer known.]"
T = TypeVar("T", bound=Strict)


class ListedTool(Strict):
    name: str
    input_schema: Any = None
    description: str | None = None
    annotations: Any = None


class ListToolsItem(Strict):
    type: Literal["mcp_list_tools"]
    server_label: str
    tools: list[ListedTool] = []
    error: Any = None


class McpCallItem(Strict):
    type: Literal["mcp_call"]
    id: str
    server_label: str
    name: str
    arguments: str
    output: str | None = None
    error: Any = None
    approval_request_id: str | None = None


class ApprovalRequestItem(Strict):
    type: Literal["mcp_approval_request"]
    id: str
    server_label: str
    name: str
    arguments: str


class ApprovalResponseItem(Strict):
    type: Literal["mcp_approval_response"]
    approval_request_id: str
    approve: bool
    reason: str | None = None


ITEMS: dict[str, type[Strict]] = {
    "mcp_list_tools": ListToolsItem,
    "mcp_call": McpCallItem,
    "mcp_approval_request": ApprovalRequestItem,
    "mcp_approval_response": ApprovalResponseItem,
}


@dataclass(frozen=True, slots=True)
class HostedHistory:
    """What the items say about the server's tools."""

    items: list[PlacedItem]  # all, those of MCP as calls of functions
    known: dict[str, list[McpTool]] = field(default_factory=dict)  # tools that have been listed, by label
    approved: list[Approved] = field(default_factory=list)  # calls that are to be run now
    containers: list[str] = field(default_factory=list)  # sessions in which calls ran, the last one last

    def with_results(self, results: Mapping[str, str]) -> list[PlacedItem]:
        """The items with the results of approved calls, by their origin."""
        return [
            PlacedItem(placed.item | {"output": results[placed.item["call_id"]]}, placed.where)
            if _is_output(placed.item) and placed.item["call_id"] in results
            else placed
            for placed in self.items
        ]


def read_history(items: Sequence[PlacedItem], text_of: Callable[[str], str | None]) -> HostedHistory:
    """Reads MCP's items. Raises InvalidRequest for one that is not valid, or an answer to nothing.

    Also for a second answer: it could allow what the first declined, or run the call twice.

    `text_of`: what the model read of the result of the item with this id, if it is still known.
    """
    containers = [*_containers(items)]
    items = [one for placed in items for one in _with_result(placed, text_of)]
    if not any(_kind(placed.item) in ITEMS for placed in items):
        return HostedHistory([*items], containers=containers)
    read = [(_read(placed) if _kind(placed.item) in ITEMS else None) for placed in items]
    requests = {one.id: one for one in read if isinstance(one, ApprovalRequestItem)}
    run = {one.approval_request_id for one in read if isinstance(one, McpCallItem)}
    history, answered = HostedHistory([], containers=containers), set[str]()
    last_written = max((index for index, placed in enumerate(items) if _is_written(placed.item)), default=-1)
    for index, (placed, one) in enumerate(zip(items, read, strict=True)):
        match one:
            case None:
                history.items.append(placed)
            case ListToolsItem(error=None):
                history.known[one.server_label] = [_tool(tool) for tool in one.tools]
            case McpCallItem():
                history.items.extend(_pair(one, one.id, _text(one), placed.where))
            case ApprovalResponseItem():
                asked = requests.get(one.approval_request_id)
                if asked is None:
                    text = f"No approval request has the id {one.approval_request_id!r}."
                    raise InvalidRequest(text, f"{placed.where}.approval_request_id", "invalid_value")
                if one.approval_request_id not in run:
                    if one.approval_request_id in answered:
                        text = f"The approval request {one.approval_request_id!r} is answered already."
                        raise InvalidRequest(text, f"{placed.where}.approval_request_id", "invalid_value")
                    answered.add(one.approval_request_id)
                    _answer(history, asked, one, placed.where, is_past=index < last_written)
    return history


def _answer(
    history: HostedHistory, asked: ApprovalRequestItem, one: ApprovalResponseItem, where: str, *, is_past: bool
) -> None:
    """Adds a call that has been allowed or declined. `is_past`: the model has gone on without it since."""
    declined = DECLINED if not one.reason else f"{DECLINED} {one.reason}"
    text = (NOT_RUN if is_past else "") if one.approve else declined
    history.items.extend(_pair(asked, asked.id, text, where))
    if one.approve and not is_past:
        name = joined_name(asked.server_label, asked.name)
        history.approved.append(Approved(name, asked.arguments, asked.id, asked.id))


def _pair(call: McpCallItem | ApprovalRequestItem, call_id: str, output: str, where: str) -> list[PlacedItem]:
    name = joined_name(call.server_label, call.name)
    made = {"type": "function_call", "call_id": call_id, "name": name, "arguments": call.arguments}
    result = {"type": "function_call_output", "call_id": call_id, "output": output}
    return [PlacedItem(made, where), PlacedItem(result, where)]


def _text(call: McpCallItem) -> str:
    if call.output is not None:
        return call.output
    error = call.error
    if isinstance(error, Mapping):
        content = error.get("content")
        if isinstance(content, list):
            return "\n".join(str(one.get("text", "")) for one in content if isinstance(one, Mapping))
        error = error.get("message")
    return NOT_RUN if error is None else error if isinstance(error, str) else json.dumps(error)


def _tool(given: ListedTool) -> McpTool:
    schema = given.input_schema if isinstance(given.input_schema, dict) else {"type": "object"}
    annotations = given.annotations if isinstance(given.annotations, dict) else None
    return McpTool(given.name, given.description, schema, annotations)


def _containers(items: Sequence[PlacedItem]) -> Iterator[str]:
    for placed in items:
        kind = _kind(placed.item)
        found = placed.item.get("container_id") if kind == "code_interpreter_call" else None
        if kind == "web_search_call":
            found = browser_session(SEARCH, placed.item.get("id"))
        if isinstance(found, str):
            yield found


def _with_result(placed: PlacedItem, text_of: Callable[[str], str | None]) -> list[PlacedItem]:
    """The item; what has been run as a call and its result."""
    item = placed.item
    if _kind(item) == "web_search_call":
        return _search_with_result(placed, text_of)
    if _kind(item) != "code_interpreter_call" or not isinstance(item.get("code"), str) or not item["code"]:
        return [placed]
    call_id = item["id"] if isinstance(item.get("id"), str) and item["id"] else f"{placed.where}.id"
    text = text_of(call_id)
    result = _printed(item.get("outputs")) if text is None else text
    made = {"type": "function_call_output", "call_id": call_id, "output": result}
    return [PlacedItem({**item, "call_id": call_id}, placed.where), PlacedItem(made, placed.where)]


def _search_with_result(placed: PlacedItem, text_of: Callable[[str], str | None]) -> list[PlacedItem]:
    """The item; a call of the browser that is still known as two items that hold their messages."""
    item_id = placed.item.get("id")
    kept = text_of(item_id) if isinstance(item_id, str) and item_id.startswith(SEARCH) else None
    if kept is None:
        return [placed]
    ran, call_id = read_search(kept), f"{placed.where} {item_id}"
    call = ToolCall(ran.recipient, ran.text, call_id, is_builtin=True, origin=placed.where)
    result = ToolResult(ran.result, call_id, origin=placed.where)
    return [
        PlacedItem({"type": "builtin_call", "call_id": call_id, "message": call}, placed.where),
        PlacedItem({"type": "builtin_call_output", "call_id": call_id, "message": result}, placed.where),
    ]


def _printed(outputs: Any) -> str:
    """What code printed, as the model reads it. Clients have it only where they ask for it."""
    if not isinstance(outputs, list):
        return OUTPUT_UNKNOWN
    read = [one for one in outputs if isinstance(one, Mapping)]
    logs = [one["logs"].removesuffix("\n") for one in read if isinstance(one.get("logs"), str)]
    return "\n".join([*logs, *("[an image, image/png]" for one in read if one.get("type") == "image")])


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, Mapping) else None
    return kind if isinstance(kind, str) else ""


def _is_written(item: Any) -> bool:
    """Whether the model wrote it, in an answer that has no call to wait for."""
    kind = _kind(item)
    if kind in ("reasoning", "function_call"):
        return True
    return kind in ("", "message") and isinstance(item, Mapping) and item.get("role") == "assistant"


def _is_output(item: Any) -> bool:
    return _kind(item) == "function_call_output"


def _read(placed: PlacedItem) -> Strict:
    try:
        return ITEMS[_kind(placed.item)].model_validate(dict(placed.item))
    except ValidationError as error:
        raise from_validation(error, (placed.where,)) from None
