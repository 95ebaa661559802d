"""`tools`, `tool_choice` and their legacy forms, resolved to what the model may do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from src.api.errors import InvalidRequest
from src.api.protocol import ChatCompletionRequest, FunctionDefinition
from src.harmony.grammar import SchemaError, ToolSpec, check_schema
from src.harmony.tool_types import check_shape

MAX_GUIDED_SCHEMA = 20_000  # characters; a larger one is enforced only if it is asked for


@dataclass(frozen=True, slots=True)
class ToolPlan:
    shown: list[dict[str, Any]]  # in the prompt
    callable: list[ToolSpec]  # may be called
    must_call: bool
    legacy: bool  # asked for with `functions`: answered with `function_call`


def plan_tools(request: ChatCompletionRequest, *, guide_arguments: bool = False) -> ToolPlan:
    """`guide_arguments`: arguments follow the tool's schema even where nobody asked for it, if the schema can be
    enforced. Raises InvalidRequest naming the field.
    """
    legacy = bool(request.functions) and not request.tools
    functions = (
        list(request.functions or []) if legacy else [tool.function for tool in request.tools or []]
    )
    where = "functions" if legacy else "tools"
    names = [f.name for f in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(
                f"Two tools are named {name!r}.", f"{where}[{index}].function.name", "invalid_value"
            )
        _check_parameters(functions[index], f"{where}[{index}]" + ("" if legacy else ".function"))
    mode, allowed = (
        _legacy_choice(request.function_call) if legacy else _choice(request.tool_choice)
    )
    parameter = "function_call" if legacy else "tool_choice"
    if mode in ("required", "named") and not functions:
        raise InvalidRequest(f"'{parameter}' needs 'tools'.", parameter, "invalid_value")
    for name in allowed or ():
        if name not in names:
            raise InvalidRequest(
                f"'{parameter}' names {name!r}, which is not in 'tools'.",
                parameter,
                "invalid_value",
            )
    forced = mode in ("required", "named")
    chosen = (
        [] if mode == "none" else [f for f in functions if allowed is None or f.name in allowed]
    )
    specs = []
    for index, function in enumerate(functions):
        if function not in chosen:
            continue
        constrained = forced or bool(function.strict)
        if constrained and function.parameters:
            try:
                check_schema(function.parameters)
            except SchemaError as error:
                place = f"{where}[{index}]" + ("" if legacy else ".function") + ".parameters"
                raise InvalidRequest(
                    f"Invalid schema for function '{function.name}': {error}",
                    place,
                    "invalid_function_parameters",
                ) from None
        guided = not constrained and guide_arguments and _can_guide(function)
        specs.append(
            ToolSpec(
                function.name,
                _closed(function.parameters),
                constrained or guided,
                asked=constrained,
            )
        )
    shown = [] if mode == "none" else [_shown(f) for f in functions]
    return ToolPlan(shown, specs, forced, legacy)


def _can_guide(function: FunctionDefinition) -> bool:
    """A tool without properties may take any object, so there is nothing to guide."""
    if not (function.parameters or {}).get("properties"):
        return False
    try:
        check_schema(function.parameters)
    except SchemaError:
        return False
    return len(json.dumps(function.parameters)) <= MAX_GUIDED_SCHEMA


OPEN_ENDED = (
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
    "allOf",
    "anyOf",
    "oneOf",
    "if",
    "$ref",
)


def _closed(schema: Any) -> Any:
    """The schema without the leave, which JSON Schema gives where nothing is said, to invent further properties."""
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    if isinstance(schema.get("properties"), Mapping):
        closed["properties"] = {name: _closed(s) for name, s in schema["properties"].items()}
        if not any(keyword in schema for keyword in OPEN_ENDED):
            closed["additionalProperties"] = False
    if isinstance(schema.get("items"), Mapping):
        closed["items"] = _closed(schema["items"])
    return closed


def _check_parameters(function: FunctionDefinition, where: str) -> None:
    try:
        check_shape(function.parameters or {}, "parameters")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"Invalid schema for function '{function.name}': {error or 'nested too deeply'}",
            f"{where}.parameters",
            "invalid_function_parameters",
        ) from None


def _shown(function: FunctionDefinition) -> dict[str, Any]:
    return {
        "name": function.name,
        "description": function.description,
        "parameters": function.parameters,
    }


def _choice(choice: Any) -> tuple[str, list[str] | None]:
    """-> (none, auto, required or named; the names allowed, None for all)."""
    if choice is None or choice == "auto":
        return "auto", None
    if choice in ("none", "required"):
        return str(choice), None
    if isinstance(choice, Mapping):
        kind = choice.get("type")
        if kind == "function":
            return "named", [_name(choice.get("function"), "tool_choice.function.name")]
        if kind == "allowed_tools":
            inner = choice.get("allowed_tools")
            inner = (
                inner if isinstance(inner, Mapping) else choice
            )  # the Responses API writes it flat
            tools = inner.get("tools")
            mode = inner.get("mode", "auto")
            if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
                raise InvalidRequest(
                    "'allowed_tools' needs mode 'auto' or 'required' and a list of tools.",
                    "tool_choice.allowed_tools",
                    "invalid_value",
                )
            names = [
                _name(
                    t.get("function") if isinstance(t, Mapping) else t,
                    f"tool_choice.allowed_tools.tools[{i}]",
                )
                for i, t in enumerate(tools)
            ]
            return mode, names
    raise InvalidRequest(
        "'tool_choice' must be 'none', 'auto', 'required', or an object of type 'function' or 'allowed_tools'.",
        "tool_choice",
        "invalid_value",
    )


def _legacy_choice(choice: Any) -> tuple[str, list[str] | None]:
    if choice is None or choice == "auto":
        return "auto", None
    if choice == "none":
        return "none", None
    return "named", [_name(choice, "function_call.name")]


def _name(function: Any, param: str) -> str:
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest("A function's name is missing.", param, "missing_required_parameter")
    return name
