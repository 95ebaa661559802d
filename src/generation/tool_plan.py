"""Tools and their policy, resolved to what the model is shown and what it may call."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gptoss.generation.errors import GenerationError
from gptoss.generation.relaxed_schema import RelaxedSchema
from gptoss.generation.request import FunctionTool, ToolPolicy
from gptoss.harmony.conversation import FreeText, ToolNamespace
from gptoss.harmony.free_text import FreeTextError, free_text_rule
from gptoss.harmony.grammar import ToolSpec
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.context import ALL, Relaxed
from gptoss.harmony.schema.enforce import Enforced, enforceable

MAX_GUIDED_SCHEMA = 20_000  # characters; of a larger one only the object is enforced unasked
MAX_PROPERTIES = 20_000  # of all schemas
MAX_DEFINITIONS = 100_000  # characters of custom tools, together
TOO_LARGE = Relaxed("parameters", ALL, "too large to be enforced unasked")


@dataclass(frozen=True, slots=True)
class ToolPlan:
    shown: Sequence[FunctionTool]  # in the developer message
    builtins: Sequence[ToolNamespace] = ()  # in the system message
    callable: list[ToolSpec] = field(default_factory=list)
    relaxed: list[RelaxedSchema] = field(default_factory=list)


def plan_tools(policy: ToolPolicy, *, guide_arguments: bool = False) -> ToolPlan:
    """The plan of a request's tools. Raises GenerationError.

    `guide_arguments`: arguments follow the tool's schema even where the request does not ask for it, if the schema can
    be enforced.
    """
    _check_names(policy)
    _check_definitions(policy)
    is_none = policy.mode == "none"
    plan = ToolPlan([] if is_none else policy.tools, () if is_none else policy.builtins)
    num_properties = 0
    for index, tool in enumerate(policy.tools):
        may_call = policy.may_call(tool.name)
        if tool.free_text is not None:
            spec = _custom_spec(tool.name, tool.free_text, index)
            plan.callable.extend([spec] if may_call else [])
            continue
        enforced = _enforced(tool, index, strict=may_call and tool.strict)
        num_properties += enforced.num_properties if enforced is not None else 0
        if num_properties > MAX_PROPERTIES:
            message = f"The schemas of the tools have more than {MAX_PROPERTIES} properties in all."
            raise GenerationError(message, ("tools",), "invalid_function_parameters")
        if may_call:
            spec, not_enforced = _spec(tool, enforced, forced=policy.must_call, guide=guide_arguments)
            plan.callable.append(spec)
            plan.relaxed.extend(RelaxedSchema("function", tool.name, relaxed) for relaxed in not_enforced)
    plan.callable.extend(_builtin_specs(policy, guide=guide_arguments))
    return plan


def _builtin_specs(policy: ToolPolicy, *, guide: bool) -> Iterator[ToolSpec]:
    """The grammar's entries of the built-in tools that may be called."""
    for space in policy.builtins:
        if not space.functions and policy.may_call(space.name):
            yield ToolSpec(space.name, None, False, policy.must_call, text_rule="TEXT", is_builtin=True)
        for tool in space.functions:
            name = f"{space.name}.{tool.name}"
            if policy.may_call(name):
                asked = policy.must_call
                yield ToolSpec(name, tool.parameters, asked or guide, asked, is_builtin=True)


def _custom_spec(name: str, wanted: FreeText, index: int) -> ToolSpec:
    """The grammar's entry of a custom tool, whose text follows its definition if it has one."""
    is_defined = wanted.syntax is not None
    try:
        return ToolSpec(name, None, is_defined, is_defined, strict=True, text_rule=free_text_rule(wanted))
    except FreeTextError as error:
        message = f"The {wanted.syntax} definition cannot be enforced: {error}."
        raise GenerationError(message, ("tools", index, "definition"), "invalid_value") from None


def _check_definitions(policy: ToolPolicy) -> None:
    num_chars = sum(len(tool.free_text.definition) for tool in policy.tools if tool.free_text is not None)
    if num_chars > MAX_DEFINITIONS:
        message = f"The definitions of custom tools have {num_chars} characters; at most {MAX_DEFINITIONS} are allowed."
        raise GenerationError(message, ("tools",), "invalid_value")


def _check_names(policy: ToolPolicy) -> None:
    names = [tool.name for tool in policy.tools]
    recipients = [name for space in policy.builtins for name in space.recipients]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise GenerationError(f"Two tools are named {name!r}.", ("tools", index, "name"), "invalid_value")
    if policy.must_call and not names and not recipients:
        raise GenerationError("A call is required, and no tools are offered.", ("tool_choice",), "invalid_value")
    for name in policy.allowed or ():
        if name not in names and name not in recipients:
            message = f"The tool choice names {name!r}, which is not among the tools."
            raise GenerationError(message, ("tool_choice",), "invalid_value")


def _enforced(tool: FunctionTool, index: int, *, strict: bool) -> Enforced | None:
    """What the grammar enforces of its parameters; None where it has none."""
    if tool.parameters is None:
        return None
    try:
        return enforceable(tool.parameters, strict, arguments=True, where="parameters")
    except SchemaError as error:
        name = tool.label or f"'{tool.name}'"
        message = f"Invalid schema for function {name}: {error}"
        raise GenerationError(message, ("tools", index, "parameters"), "invalid_function_parameters") from None


def _spec(
    tool: FunctionTool, enforced: Enforced | None, *, forced: bool, guide: bool
) -> tuple[ToolSpec, Sequence[Relaxed]]:
    """Returns the grammar's entry of a function, and what of its schema it does not enforce."""
    asked = forced or tool.strict
    if enforced is None:
        return ToolSpec(tool.name, None, asked or guide, asked, tool.strict), ()
    if not asked and not guide:
        return ToolSpec(tool.name, enforced.schema, False, False, tool.strict), ()
    if not asked and len(json.dumps(enforced.schema)) > MAX_GUIDED_SCHEMA:
        return ToolSpec(tool.name, None, True, False, tool.strict), (TOO_LARGE,)
    return ToolSpec(tool.name, enforced.schema, True, asked, tool.strict), enforced.relaxed
