"""Tools over HTTP: which are called, in which form, and what is refused."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.e2e.contract import CALL_TOOL, CITY, MODEL, TOOLS, USER, VOCABULARY, ask, error_of, fold, tool
from tests.support.server_process import ServerProcess


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stream", [False, True])
def test_required_always_calls(client: openai.OpenAI, seed: int, stream: bool) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": "required", "seed": seed, "max_tokens": 200, "stream": stream}
    if stream:
        folded = fold(list(ask(client, **options)))[0]
        calls, finish = [tuple(c) for c in folded["calls"]], folded["finish"]
    else:
        choice = ask(client, **options).choices[0]
        calls, finish = (
            [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls],
            choice.finish_reason,
        )
    assert len(calls) == 1
    call_id, name, arguments = calls[0]
    assert call_id.startswith("call_")
    schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == name)
    if finish == "tool_calls":
        jsonschema.validate(json.loads(arguments), schema or {"type": "object"})
    else:
        assert finish == "length"


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "get_weather"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
        },
    ],
)
def test_a_named_choice_calls_that_function(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(4):
        answer = ask(client, tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=200).choices[0]
        assert [c.function.name for c in answer.message.tool_calls] == ["get_weather"]
        jsonschema.validate(json.loads(answer.message.tool_calls[0].function.arguments), CITY)


@pytest.mark.parametrize(
    ("syntax", "definition", "form"),
    [
        ("regex", "[0-9]{3}[a-c]?", r"[0-9]{3}[a-c]?"),
        ("lark", 'start: line~1..2\nline: "+ " /[a-z]{1,4}/ LF\n%import common.LF\n', r"(\+ [a-z]{1,4}\r?\n){1,2}"),
    ],
)
def test_the_text_of_a_custom_tool_follows_its_definition(
    client: openai.OpenAI, syntax: Any, definition: str, form: str
) -> None:
    grammar: Any = {"syntax": syntax, "definition": definition}
    of_chat: Any = {"type": "custom", "custom": {"name": "x", "format": {"type": "grammar", "grammar": grammar}}}
    choice: Any = {"type": "custom", "custom": {"name": "x"}}
    for seed in range(3):
        answer = ask(client, tools=[*TOOLS, of_chat], tool_choice=choice, seed=seed, max_tokens=100).choices[0]
        (made,) = answer.message.tool_calls
        assert made.custom.name == "x" and re.fullmatch(form, made.custom.input)
    flat: Any = {"type": "custom", "name": "x", "format": {"type": "grammar", **grammar}}
    response = client.responses.create(
        model=MODEL, input="Go", tools=[flat], tool_choice={"type": "custom", "name": "x"}, max_output_tokens=100
    )
    item: Any = response.output[-1]
    assert item.type == "custom_tool_call" and re.fullmatch(form, item.input)


def test_none_never_calls_and_keeps_the_instructions(client: openai.OpenAI, server: ServerProcess) -> None:
    messages: Any = [{"role": "system", "content": "KEEP THIS"}, USER]
    for seed in range(5):
        answer = ask(client, messages=messages, tools=TOOLS, tool_choice="none", seed=seed)
        assert answer.choices[0].message.tool_calls is None
    body = {"model": MODEL, "messages": messages, "tools": TOOLS, "tool_choice": "none"}
    prompt = httpx.post(f"{server.url}/v1/chat/completions/render", json=body).json()["prompt"]
    assert "KEEP THIS" in prompt and "get_weather" not in prompt


@pytest.mark.parametrize("more", [{"strict": True}, {}], ids=["strict", "guided"])
def test_tools_follow_their_schema_under_auto(client: openai.OpenAI, more: dict[str, bool]) -> None:
    offered = [tool("get_weather", CITY, **more)]
    ended = 0
    for seed in range(10):
        bias = {**CALL_TOOL, str(VOCABULARY.encode(" to")[0]): 60}
        options: Any = {"logit_bias": bias, "seed": seed, "max_tokens": 150, "extra_body": {"reasoning_budget": 0}}
        answer = ask(client, tools=offered, **options).choices[0]
        for call in answer.message.tool_calls or []:
            if answer.finish_reason == "tool_calls":
                ended += 1
                jsonschema.validate(json.loads(call.function.arguments), CITY)
    assert ended > 0


def test_ids_are_unique_and_results_find_their_call(client: openai.OpenAI) -> None:
    answer = ask(client, tools=TOOLS, tool_choice="required", max_tokens=200, n=4)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(ids) == len(set(ids)) == 4
    message = answer.choices[0].message
    history = [USER, message.model_dump(), {"role": "tool", "tool_call_id": ids[0], "content": "42", "name": "x"}]
    after = ask(client, messages=history, tools=TOOLS)
    assert after.usage.prompt_tokens_details.cached_tokens > 0


def test_legacy_functions_are_answered_in_their_form(client: openai.OpenAI) -> None:
    functions: Any = [TOOLS[0]["function"]]
    answer = ask(client, functions=functions, function_call={"name": "get_weather"}, max_tokens=200).choices[0]
    assert answer.finish_reason == "function_call"
    assert answer.message.function_call.name == "get_weather"
    assert answer.message.tool_calls is None
    history: Any = [
        USER,
        answer.message.model_dump(exclude_none=True),
        {"role": "function", "name": "get_weather", "content": "4"},
    ]
    assert ask(client, messages=history, functions=functions).usage.completion_tokens > 0


def custom(definition: str | None) -> dict[str, Any]:
    grammar = {} if definition is None else {"grammar": {"syntax": "lark", "definition": definition}}
    return {"type": "custom", "custom": {"name": "x", "format": {"type": "grammar", **grammar}}}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[3].function.name"),
        ({"tools": [{"type": "custom", "function": {"name": "x"}}]}, "tools[0].custom"),
        ({"tools": [{"type": "browser", "function": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [custom("start: <[5]>")]}, "tools[0].custom.format.grammar.definition"),
        ({"tools": [custom(None)]}, "tools[0].custom.format.grammar"),
        ({"tools": [custom('start: "a"')] * 2}, "tools[1].custom.name"),
        (
            {"tools": [tool("f", {"type": "object", "properties": {"a": {"uniqueItems": True}}}, strict=True)]},
            "tools[0].function.parameters",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"min_tokens": 50, "max_tokens": 10}, "min_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_runs(
    server: ServerProcess, change: dict[str, Any], param: str
) -> None:
    status, error = error_of(server, {"model": MODEL, "messages": [USER], "tools": TOOLS} | change)
    assert (status, error["param"]) == (400, param), error


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": 5},
        {"type": 5},
        {"anyOf": 5},
        {"anyOf": [5]},
        {"items": [1]},
        {"required": 5},
        {"required": [5]},
        {"properties": {"a": {"enum": 5}}},
        {"$ref": 5},
        {"$defs": []},
        {"properties": {"a": 5}},
        {"oneOf": [True], "type": [1]},
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_parameters_that_are_no_schema_are_refused(server: ServerProcess, parameters: Any, choice: str) -> None:
    body = {"model": MODEL, "messages": [USER], "tools": [tool("f", parameters)], "tool_choice": choice}
    status, error = error_of(server, body)
    assert (status, error["param"], error["code"]) == (
        400,
        "tools[0].function.parameters",
        "invalid_function_parameters",
    )


def test_odd_but_valid_schemas_are_rendered(server: ServerProcess) -> None:
    for parameters in (
        {},
        {"properties": {"a": True, "b": {}}},
        {"type": "object", "oneOf": [True, {"type": "null"}]},
        {"type": []},
        {"title": 5, "properties": {"a": {"title": 5, "description": 6, "examples": [1]}}},
    ):
        body = {"model": MODEL, "messages": [USER], "tools": [tool("f", parameters)]}
        assert httpx.post(f"{server.url}/v1/chat/completions/render", json=body).status_code == 200, parameters
