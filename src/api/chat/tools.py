"""`tools`, `tool_choice` and their legacy forms as a ToolPolicy."""

from __future__ import annotations

from typing import Any

from gptoss.api.chat.schema import ChatCompletionRequest, CustomTool, Tool
from gptoss.api.http.tool_choice import FunctionDefinition, ToolChoice, function_name, read_tool_choice
from gptoss.generation.request import FunctionTool, ToolPolicy
from gptoss.harmony.conversation import FreeText


def read_tools(request: ChatCompletionRequest) -> ToolPolicy:
    """The tools and how the model may call them. Raises InvalidRequest, which names the field."""
    if is_legacy(request):
        tools, choice = [_function(one) for one in request.functions or ()], _legacy_choice(request.function_call)
    else:
        tools, choice = [_tool(one) for one in request.tools or ()], read_tool_choice(request.tool_choice)
    max_calls = 1 if request.parallel_tool_calls is False or is_legacy(request) else None
    return ToolPolicy(tools, choice.mode, choice.allowed, max_calls)


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
