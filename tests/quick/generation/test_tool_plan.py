"""Which arguments the grammar enforces."""

from __future__ import annotations

from typing import Any

import pytest

from gptoss.generation import tool_plan
from gptoss.generation.errors import GenerationError
from gptoss.generation.request import FunctionTool, ToolPolicy
from gptoss.generation.tool_plan import MAX_GUIDED_SCHEMA, plan_tools
from gptoss.harmony.grammar import TurnSpec, fitted_grammar
from tests.support.vocabulary import public_vocabulary

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
FREE = {"type": "object"}
BEYOND = {"type": "object", "properties": {"a": {"$ref": "https://elsewhere/schema"}}}
HUGE = {"type": "object", "properties": {"a": {"enum": [f"{n:0100}" for n in range(MAX_GUIDED_SCHEMA // 100)]}}}


def request(*schemas: dict[str, Any] | None, **more: Any) -> ToolPolicy:
    return ToolPolicy([FunctionTool(f"t{i}", None, schema) for i, schema in enumerate(schemas)], **more)


def enforced(asked: ToolPolicy, *, guide: bool) -> list[tuple[bool, bool]]:
    return [(t.constrained, t.asked) for t in plan_tools(asked, guide_arguments=guide).callable]


def test_arguments_follow_a_schema_that_nobody_asked_to_enforce() -> None:
    assert enforced(request(PLACE), guide=True) == [(True, False)]
    assert enforced(request(PLACE), guide=False) == [(False, False)]


@pytest.mark.parametrize("schema", [None, {}, FREE, {"properties": {}}, HUGE])
def test_arguments_are_an_object_where_no_more_can_be_said(schema: dict[str, Any] | None) -> None:
    asked = request(schema)
    assert enforced(asked, guide=True) == [(True, False)]
    assert enforced(asked, guide=False) == [(False, False)]
    plan = plan_tools(asked, guide_arguments=True)
    grammar, left_out = fitted_grammar(TurnSpec(plan.callable), public_vocabulary())
    assert '"type": "object"' in grammar and not left_out
    assert [r.relaxed.reason for r in plan.relaxed] == (["too large to be enforced unasked"] if schema is HUGE else [])


def test_what_is_asked_for_is_enforced() -> None:
    assert enforced(request(PLACE, FREE, mode="required"), guide=True) == [(True, True)] * 2


@pytest.mark.parametrize("more", [{}, {"mode": "required"}])
def test_what_cannot_be_enforced_is_relaxed_alone(more: dict[str, Any]) -> None:
    plan = plan_tools(request(BEYOND, PLACE, **more), guide_arguments=True)
    assert [tool.constrained for tool in plan.callable] == [True, True]
    assert [(r.name, r.relaxed.path) for r in plan.relaxed] == [("t0", "parameters.properties.a.$ref")]


def test_with_strict_it_is_refused() -> None:
    tools = [FunctionTool("t0", None, PLACE), FunctionTool("t1", None, BEYOND, strict=True)]
    problem = "Invalid schema for function 't1': parameters.properties.a.\\$ref"
    with pytest.raises(GenerationError, match=problem) as error:
        plan_tools(ToolPolicy(tools), guide_arguments=True)
    assert error.value.path == ("tools", 1, "parameters")


def test_parameters_that_no_one_declared_are_not_made_up() -> None:
    nested = {
        "type": "object",
        "properties": {
            "place": {"type": "object", "properties": {"city": {"type": "string"}}},
            "stops": {"type": "array", "items": {"properties": {"name": {"type": "string"}}}},
            "more": {"type": "object", "additionalProperties": True, "properties": {}},
            "either": {"properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"minProperties": 2}]},
            "free": {"type": "object"},
        },
    }
    (tool,) = plan_tools(request(nested), guide_arguments=True).callable
    assert tool.parameters is not None and tool.parameters["additionalProperties"] is False
    properties = tool.parameters["properties"]
    assert properties["place"]["additionalProperties"] is False
    assert properties["stops"]["items"]["additionalProperties"] is False
    assert properties["either"]["additionalProperties"] is False
    assert properties["more"] == properties["free"] == {"type": "object"}
    assert "additionalProperties" not in nested, "the request is as it was"


def test_the_schemas_of_all_tools_have_a_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_plan, "MAX_PROPERTIES", 100)
    half = {"type": "object", "properties": {f"p{i}": {} for i in range(50)}}
    plan_tools(request(half, half))
    with pytest.raises(GenerationError, match="the tools have more than 100 properties in all") as raised:
        plan_tools(request(half, half, PLACE))
    assert raised.value.path == ("tools",)


def test_a_schema_that_is_too_large_names_its_tool() -> None:
    huge = {"type": "object", "properties": {f"p{i}": {} for i in range(5_001)}}
    with pytest.raises(GenerationError, match="function 't1': parameters has 5001 properties in all") as raised:
        plan_tools(request(PLACE, huge))
    assert raised.value.path == ("tools", 1, "parameters")
