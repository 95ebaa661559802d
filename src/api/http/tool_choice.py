"""OpenAI's functions, custom tools and `tool_choice`, which chat and Responses share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.fields import FunctionName, Strict
from gptoss.api.http.openapi import object_of

Mode = Literal["auto", "none", "required"]
_NAMED = object_of({"name": {"type": "string"}})
_CHOSEN = [object_of({"type": {"const": kind}, kind: _NAMED}) for kind in ("function", "custom")]
_ALLOWED = object_of(
    {"tools": {"type": "array", "minItems": 1, "items": {"anyOf": _CHOSEN}}}, {"mode": {"enum": ["auto", "required"]}}
)
CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["auto", "none", "required", None]},
        *_CHOSEN,
        object_of({"type": {"const": "allowed_tools"}, "allowed_tools": _ALLOWED}),
    ]
}
LEGACY_CHOICE_SCHEMA = {"anyOf": [{"enum": ["auto", "none", None]}, _NAMED]}


class FunctionDefinition(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextGrammar(Strict):
    syntax: Literal["lark", "regex"]
    definition: str


class CustomDefinition(Strict):
    name: FunctionName
    description: str | None = None


class ToolChoice(NamedTuple):
    mode: Mode = "auto"
    allowed: list[str] | None = None  # names; None: all


def read_tool_choice(choice: Any, name_field: str = "tool_choice.function.name") -> ToolChoice:
    """Reads `tool_choice`. Raises InvalidRequest.

    `name_field`: the field with the name of a single function.
    """
    if choice is None or choice == "auto":
        return ToolChoice()
    if choice == "none" or choice == "required":
        return ToolChoice("none" if choice == "none" else "required")
    kind = choice.get("type") if isinstance(choice, Mapping) else None
    if kind == "function":
        return ToolChoice("required", [function_name(choice.get("function"), name_field)])
    if kind == "custom":
        return ToolChoice("required", [function_name(choice.get("custom"), "tool_choice.custom.name")])
    if kind == "allowed_tools":
        return _allowed(choice)
    raise InvalidRequest(
        "'tool_choice' must be 'none', 'auto', 'required', or an object of type 'function', 'custom' or "
        "'allowed_tools'.",
        "tool_choice",
        "invalid_value",
    )


def _allowed(choice: Mapping[str, Any]) -> ToolChoice:
    inner = choice.get("allowed_tools")
    inner = inner if isinstance(inner, Mapping) else choice  # the Responses API writes it flat
    tools, mode = inner.get("tools"), inner.get("mode", "auto")
    if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
        raise InvalidRequest(
            "'allowed_tools' needs mode 'auto' or 'required' and a list of tools.",
            "tool_choice.allowed_tools",
            "invalid_value",
        )
    names = [
        function_name(_definition(tool), f"tool_choice.allowed_tools.tools[{index}]")
        for index, tool in enumerate(tools)
    ]
    return ToolChoice("auto" if mode == "auto" else "required", names)


def _definition(tool: Any) -> Any:
    if not isinstance(tool, Mapping):
        return tool
    return tool.get("custom" if tool.get("type") == "custom" else "function")


def function_name(function: Any, param: str) -> str:
    """The name of `{"name": ...}`. Raises InvalidRequest naming `param`."""
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest("A function's name is missing.", param, "missing_required_parameter")
    return name
