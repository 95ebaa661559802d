"""`tools`, `tool_choice` and their legacy forms, resolved to what the model may do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptoss.api.chat.schema import ChatCompletionRequest, FunctionDefinition
from gptoss.api.http.errors import InvalidRequest
from gptoss.generation.relaxed_schema import RelaxedSchema
from gptoss.harmony.conversation import ToolDefinition
from gptoss.harmony.grammar import ToolSpec
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.enforce import Enforced, enforceable
from gptoss.harmony.schema.rewrite import ALL, Relaxed

MAX_GUIDED_SCHEMA = 20_000  # characters; of a larger one only the object is enforced unasked
MAX_PROPERTIES = 20_000  # of all schemas
TOO_LARGE = Relaxed("parameters", ALL, "too large to be enforced unasked")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    shown: list[ToolDefinition]  # in the prompt
    callable: list[ToolSpec]  # may be called
    must_call: bool
    legacy: bool  # asked for with `functions`: answered with `function_call`
    relaxed: list[RelaxedSchema] = field(default_factory=list)


def plan_tools(request: ChatCompletionRequest, *, guide_arguments: bool = False) -> ToolPlan:
    """`guide_arguments`: arguments follow the tool's schema even where nobody asked for it, if the schema can be
    enforced. Raises InvalidRequest naming the field.
    """
    legacy = bool(request.functions) and not request.tools
    functions = list(request.functions or []) if legacy else [tool.function for tool in request.tools or []]
    where = "functions" if legacy else "tools"
    names = [f.name for f in functions]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InvalidRequest(f"Two tools are named {name!r}.", f"{where}[{index}].function.name", "invalid_value")
    mode, allowed = _legacy_choice(request.function_call) if legacy else _choice(request.tool_choice)
    parameter = "function_call" if legacy else "tool_choice"
    if mode in ("required", "named") and not functions:
        raise InvalidRequest(f"'{parameter}' needs 'tools'.", parameter, "invalid_value")
    for name in allowed or ():
        if name not in names:
            raise InvalidRequest(f"'{parameter}' names {name!r}, which is not in 'tools'.", parameter, "invalid_value")
    forced = mode in ("required", "named")
    specs, relaxed, num_properties = [], [], 0
    for index, function in enumerate(functions):
        place = f"{where}[{index}]" + ("" if legacy else ".function")
        callable_ = mode != "none" and (allowed is None or function.name in allowed)
        enforced = _enforced(function, place, strict=callable_ and bool(function.strict))
        num_properties += enforced.num_properties if enforced is not None else 0
        if num_properties > MAX_PROPERTIES:
            raise InvalidRequest(
                f"The schemas of '{where}' have more than {MAX_PROPERTIES} properties in all.",
                where,
                "invalid_function_parameters",
            )
        if not callable_:
            continue
        spec, not_enforced = _spec(function, enforced, forced=forced, guide=guide_arguments)
        specs.append(spec)
        relaxed += [RelaxedSchema("function", function.name, r) for r in not_enforced]
    shown = [] if mode == "none" else [ToolDefinition(f.name, f.description, f.parameters) for f in functions]
    return ToolPlan(shown, specs, forced, legacy, relaxed)


def _enforced(function: FunctionDefinition, place: str, *, strict: bool) -> Enforced | None:
    """What the grammar enforces of its parameters; None where it has none."""
    if function.parameters is None:
        return None
    try:
        return enforceable(function.parameters, strict, arguments=True, where="parameters")
    except SchemaError as error:
        raise InvalidRequest(
            f"Invalid schema for function '{function.name}': {error}",
            f"{place}.parameters",
            "invalid_function_parameters",
        ) from None


def _spec(
    function: FunctionDefinition, enforced: Enforced | None, *, forced: bool, guide: bool
) -> tuple[ToolSpec, Sequence[Relaxed]]:
    """-> (what the grammar gets, what it does not enforce)."""
    strict = bool(function.strict)
    asked = forced or strict
    if enforced is None:
        return ToolSpec(function.name, None, asked or guide, asked, strict), ()
    if not asked and not guide:
        return ToolSpec(function.name, enforced.schema, False, False, strict), ()
    if not asked and len(json.dumps(enforced.schema)) > MAX_GUIDED_SCHEMA:
        return ToolSpec(function.name, None, True, False, strict), (TOO_LARGE,)
    return ToolSpec(function.name, enforced.schema, True, asked, strict), enforced.relaxed


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
            inner = inner if isinstance(inner, Mapping) else choice  # the Responses API writes it flat
            tools = inner.get("tools")
            mode = inner.get("mode", "auto")
            if mode not in ("auto", "required") or not isinstance(tools, list) or not tools:
                raise InvalidRequest(
                    "'allowed_tools' needs mode 'auto' or 'required' and a list of tools.",
                    "tool_choice.allowed_tools",
                    "invalid_value",
                )
            names = [
                _name(t.get("function") if isinstance(t, Mapping) else t, f"tool_choice.allowed_tools.tools[{i}]")
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
