"""Which arguments the grammar enforces."""

from __future__ import annotations

from typing import Any

import pytest

from gptoss.api.chat import tools
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.chat.tools import MAX_GUIDED_SCHEMA, plan_tools
from gptoss.api.http.errors import InvalidRequest
from gptoss.harmony.grammar import TurnSpec, fitted_grammar
from tests.support.vocabulary import public_vocabulary

PLACE = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
FREE = {"type": "object"}
BEYOND = {"type": "object", "properties": {"a": {"$ref": "https://elsewhere/schema"}}}
HUGE = {"type": "object", "properties": {"a": {"enum": [f"{n:0100}" for n in range(MAX_GUIDED_SCHEMA // 100)]}}}


def request(*schemas: dict[str, Any] | None, **more: Any) -> ChatCompletionRequest:
    tools = [
        {"type": "function", "function": {"name": f"t{i}"} | ({} if s is None else {"parameters": s})}
        for i, s in enumerate(schemas)
    ]
    return ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools, **more}
    )


def enforced(asked: ChatCompletionRequest, *, guide: bool) -> list[tuple[bool, bool]]:
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
    assert enforced(request(PLACE, FREE, tool_choice="required"), guide=True) == [(True, True)] * 2


@pytest.mark.parametrize("more", [{}, {"tool_choice": "required"}])
def test_what_cannot_be_enforced_is_relaxed_alone(more: dict[str, Any]) -> None:
    plan = plan_tools(request(BEYOND, PLACE, **more), guide_arguments=True)
    assert [tool.constrained for tool in plan.callable] == [True, True]
    assert [(r.name, r.relaxed.path) for r in plan.relaxed] == [("t0", "parameters.properties.a.$ref")]


def test_with_strict_it_is_refused() -> None:
    asked = request(PLACE, BEYOND)
    assert asked.tools is not None
    asked.tools[1].function.strict = True
    with pytest.raises(InvalidRequest, match="Invalid schema for function 't1': parameters.properties.a.\\$ref"):
        plan_tools(asked, guide_arguments=True)


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
    monkeypatch.setattr(tools, "MAX_PROPERTIES", 100)
    half = {"type": "object", "properties": {f"p{i}": {} for i in range(50)}}
    plan_tools(request(half, half))
    with pytest.raises(InvalidRequest, match="'tools' have more than 100 properties in all") as raised:
        plan_tools(request(half, half, PLACE))
    assert raised.value.param == "tools"


def test_a_schema_that_is_too_large_names_its_tool() -> None:
    huge = {"type": "object", "properties": {f"p{i}": {} for i in range(5_001)}}
    with pytest.raises(InvalidRequest, match="function 't1': parameters has 5001 properties in all") as raised:
        plan_tools(request(PLACE, huge))
    assert raised.value.param == "tools[1].function.parameters"
