"""`tools`, `tool_choice` and changes of them in mid-conversation as a ToolPolicy."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gptoss.api.http.errors import InvalidRequest
from gptoss.api.messages.schema import CountTokensRequest, CustomTool, SystemMessage, ToolChangeBlock
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.request import FunctionTool, ToolPolicy

logger = logging.getLogger(__name__)
_warn_server_tools = WarnOnce(logger, "tools that Anthropic's servers run are left out: %s", limit=100)
Mode = Literal["auto", "none", "required"]
_MODES: dict[str, Mode] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class OfferedTools:
    policy: ToolPolicy
    fields: list[str]  # of the request, one for each tool


def read_tools(request: CountTokensRequest) -> OfferedTools:
    """The tools that the model may call, in an order that keeps the beginning of the prompt.

    Tools that are added later come last, and removed ones are shown but may not be called.

    Raises InvalidRequest naming the field.
    """
    offered: list[tuple[str, CustomTool]] = []
    for index, tool in enumerate(request.tools or ()):
        if isinstance(tool, CustomTool):
            offered.append((f"tools.{index}", tool))
        else:
            _warn_server_tools([tool.type])
    names = {tool.name for _, tool in offered}
    removed: set[str] = set()
    for where, change in _changes(request):
        name = change.tool.tool
        if change.type == "tool_removal":
            removed.add(name)
            continue
        removed.discard(name)
        if name not in names and change.tool.definition is not None:
            names.add(name)
            offered.append((f"{where}.tool.definition", change.tool.definition))
    tools = [FunctionTool(t.name, t.description, t.input_schema, bool(t.strict)) for _, t in offered]
    return OfferedTools(_policy(request, tools, removed), [where for where, _ in offered])


def _policy(request: CountTokensRequest, tools: list[FunctionTool], removed: set[str]) -> ToolPolicy:
    choice = request.tool_choice
    allowed = [tool.name for tool in tools if tool.name not in removed] if removed else None
    if choice is None:
        return ToolPolicy(tools, allowed=allowed)
    max_calls = 1 if choice.disable_parallel_tool_use else None
    if choice.type == "tool":
        assert choice.name is not None
        if choice.name in removed:
            message = f"'tool_choice.name' is {choice.name!r}, a tool that was removed."
            raise InvalidRequest(message, "tool_choice.name", "invalid_value")
        allowed = [choice.name]
    elif choice.type == "any" and allowed == []:
        raise InvalidRequest("'tool_choice' is 'any', but every tool was removed.", "tool_choice", "invalid_value")
    return ToolPolicy(tools, _MODES[choice.type], allowed, max_calls)


def _changes(request: CountTokensRequest) -> Iterator[tuple[str, ToolChangeBlock]]:
    for index, message in enumerate(request.messages):
        if isinstance(message, SystemMessage) and not isinstance(message.content, str):
            for position, block in enumerate(message.content):
                if isinstance(block, ToolChangeBlock):
                    yield f"messages.{index}.content.{position}", block
