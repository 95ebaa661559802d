"""`tools`, `tool_choice` and their legacy forms as a ToolPolicy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptoss.api.chat.schema import ChatCompletionRequest, CustomTool, Tool
from gptoss.api.hosted.entries import McpEntry, PlacedEntry, check_entry
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.tool_choice import FunctionDefinition, ToolChoice, function_name, read_tool_choice
from gptoss.generation.request import FunctionTool, ToolPolicy
from gptoss.harmony.conversation import FreeText


def read_tools(request: ChatCompletionRequest, hosted: Prepared | None = None) -> ToolPolicy:
    """The tools and how the model may call them. Raises InvalidRequest, which names the field.

    `hosted`: what the server runs of them; its functions come last.
    """
    if is_legacy(request):
        tools, choice = [_function(one) for one in request.functions or ()], _legacy_choice(request.function_call)
    else:
        own = [one for one in request.tools or () if isinstance(one, Tool)]
        tools, choice = [_tool(one) for one in own], read_tool_choice(request.tool_choice)
    max_calls = 1 if request.parallel_tool_calls is False or is_legacy(request) else None
    if hosted is None:
        return ToolPolicy(tools, choice.mode, choice.allowed, max_calls)
    return ToolPolicy(
        [*tools, *hosted.functions], choice.mode, choice.allowed, max_calls, hosted.namespaces, hosted.hosted
    )


def hosted_entries(request: ChatCompletionRequest, runs: Callable[[str], bool]) -> list[PlacedEntry]:
    """The tools that the server runs. Raises InvalidRequest. `runs`: whether it runs those of a type.

    A chat completion has no approvals, and one answer.
    """
    found = []
    for index, tool in enumerate(request.tools or ()):
        if not isinstance(tool, Tool):
            where = f"tools[{index}]"
            check_entry(tool, where)
            if isinstance(tool, McpEntry) and tool.require_approval != "never":
                text = "A chat completion cannot ask for approval: set 'require_approval' to 'never'."
                raise InvalidRequest(text, f"{where}.require_approval", "unsupported_value")
            if not runs(tool.type):
                text = f"This server does not run tools of type '{tool.type}'."
                raise InvalidRequest(text, f"{where}.type", "unsupported_value")
            found.append(PlacedEntry(where, tool))
    if request.web_search_options is not None:
        if not runs("web_search"):
            text = "'web_search_options' is not supported by this server: it has no browser."
            raise InvalidRequest(text, "web_search_options", "unsupported_parameter")
        found.append(PlacedEntry("web_search_options", request.web_search_options.entry))
    if found and (request.n or 1) != 1:
        raise InvalidRequest("'n' must be 1 with tools that the server runs.", "n", "unsupported_value")
    return found


def _tool(tool: Tool) -> FunctionTool:
    if tool.type == "custom":
        assert tool.custom is not None
        return _custom(tool.custom)
    assert tool.function is not None
    return _function(tool.function)


def _function(one: FunctionDefinition) -> FunctionTool:
    return FunctionTool(one.name, one.description, one.parameters, bool(one.strict))


def _custom(one: CustomTool) -> FunctionTool:
    grammar = one.format.grammar if one.format is not None and one.format.type == "grammar" else None
    free_text = FreeText() if grammar is None else FreeText(grammar.syntax, grammar.definition)
    return FunctionTool(one.name, one.description, free_text=free_text)


def is_legacy(request: ChatCompletionRequest) -> bool:
    """Whether tools come as `functions`: calls are then answered as `function_call`."""
    return bool(request.functions) and not request.tools


def _legacy_choice(choice: Any) -> ToolChoice:
    if choice is None or choice == "auto":
        return ToolChoice()
    if choice == "none":
        return ToolChoice("none")
    return ToolChoice("required", [function_name(choice, "function_call.name")])
