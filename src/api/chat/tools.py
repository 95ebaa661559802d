"""`tools`, `tool_choice` and their legacy forms as a ToolPolicy."""

from __future__ import annotations

from typing import Any

from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.http.tool_choice import ToolChoice, function_name, read_tool_choice
from gptoss.generation.request import FunctionTool, ToolPolicy


def read_tools(request: ChatCompletionRequest) -> ToolPolicy:
    """Raises InvalidRequest naming the field."""
    if is_legacy(request):
        functions, choice = request.functions or [], _legacy_choice(request.function_call)
    else:
        functions, choice = [tool.function for tool in request.tools or ()], read_tool_choice(request.tool_choice)
    tools = [FunctionTool(f.name, f.description, f.parameters, bool(f.strict)) for f in functions]
    max_calls = 1 if request.parallel_tool_calls is False or is_legacy(request) else None
    return ToolPolicy(tools, choice.mode, choice.allowed, max_calls)


def is_legacy(request: ChatCompletionRequest) -> bool:
    """Whether tools come as `functions`: calls are then answered as `function_call`."""
    return bool(request.functions) and not request.tools


def _legacy_choice(choice: Any) -> ToolChoice:
    if choice is None or choice == "auto":
        return ToolChoice()
    if choice == "none":
        return ToolChoice("none")
    return ToolChoice("required", [function_name(choice, "function_call.name")])
