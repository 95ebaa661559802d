"""Fields that no endpoint knows, at any depth, by client."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.requests import Request

from gptoss.api.access.api_keys import Caller
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.completions.schema import CompletionRequest
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.sender import ANONYMOUS, client_of
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.telemetry.unknown_fields import MAX_PAIRS, UnknownFields, find_unknown

USER = {"role": "user", "content": "x"}
CHAT = {"model": "m", "messages": [USER]}
CALL = {"id": "c", "index": 0, "type": "function", "function": {"name": "f", "arguments": "{}"}}

TOOL = {"type": "function", "function": {"name": "f"}}
PARSED = CALL | {"function": {"name": "f", "arguments": "{}", "parsed_arguments": {"a": 1}}}


def found(model: type[BaseModel], body: dict[str, Any]) -> list[str]:
    return list(find_unknown(body, model.model_validate(body)))


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"min_new_tokens": 1}, ["min_new_tokens"]),
        ({"stream": True, "stream_options": {"include_usage": True, "x": 1}}, ["stream_options.x"]),
        ({"messages": [USER, USER | {"weight": 1}]}, ["messages[1].weight"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]},
            ["messages[0].content[0].cache_control"],
        ),
        (
            {"tools": [{"type": "function", "x": 1, "function": {"name": "f", "y": 2}}]},
            ["tools[0].x", "tools[0].function.y"],
        ),
        ({"functions": [{"name": "f", "z": 1}]}, ["functions[0].z"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"q": 1}, "w": 1}}},
            ["response_format.json_schema.w"],
        ),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, ["reasoning.summary"]),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL | {"v": 1}]}]}, ["messages[0].tool_calls[0].v"]),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}, "u": 1},
            },
            ["tool_choice.u"],
        ),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f", "q": 1}}},
            ["tool_choice.function.q"],
        ),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "p": 1,
                        "tools": [{"type": "function", "function": {"name": "f", "r": 1}}],
                    },
                },
            },
            ["tool_choice.allowed_tools.p", "tool_choice.allowed_tools.tools[0].function.r"],
        ),
        ({"functions": [{"name": "f"}], "function_call": {"name": "f", "s": 1}}, ["function_call.s"]),
        (
            {
                "messages": [{"role": "assistant", "content": "a", "parsed": {"b": 1}, "tool_calls": [PARSED]}],
                "x": None,
            },
            [],
        ),
        ({"messages": [USER | {"weight": None, "content": [{"type": "text", "text": "a", "y": None}]}]}, []),
        ({"messages": [{"role": "assistant", "content": "a", "annotations": [], "audio": None, "refusal": None}]}, []),
        ({"metadata": {"any": "key"}, "logit_bias": {"5": 1}, "tools": None, "stop": "a"}, []),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x-any": 1}}}]}, []),
    ],
)
def test_chat(more: dict[str, Any], names: list[str]) -> None:
    assert found(ChatCompletionRequest, CHAT | more) == names


ANSWERED = [
    {
        "type": "reasoning",
        "id": "rs",
        "status": None,
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "t"}],
        "encrypted_content": "e",
    },
    {
        "type": "message",
        "id": "msg",
        "status": "completed",
        "role": "assistant",
        "phase": "final_answer",
        "content": [{"type": "output_text", "text": "t", "annotations": [], "logprobs": []}],
    },
    {
        "type": "function_call",
        "id": "fc",
        "status": "completed",
        "call_id": "c",
        "name": "f",
        "namespace": "n",
        "arguments": "{}",
    },
    {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "t"}]},
]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ({"input": ANSWERED}, []),
        (
            {
                "input": [
                    ANSWERED[2] | {"parsed_arguments": {}, "caller": {"type": "direct"}, "async_": True, "new": None}
                ]
            },
            [],
        ),
        ({"input": [ANSWERED[1] | {"content": [ANSWERED[1]["content"][0] | {"parsed": {"a": 1}, "new": None}]}]}, []),
        (
            {
                "tools": [],
                "tool_choice": {"type": "allowed_tools", "tools": [{"type": "function", "name": "f", "x": 1}]},
            },
            ["tool_choice.tools[0].x"],
        ),
        ({"input": [USER | {"weight": 1}]}, ["input[0].weight"]),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": 1}]}]},
            ["input[0].content[0].x"],
        ),
        ({"input": [*ANSWERED[:3], ANSWERED[3] | {"is_error": True}]}, ["input[3].is_error"]),
        ({"input": [{"type": "compaction", "anything": 1}, USER]}, []),
        ({"tools": [{"type": "function", "name": "f", "x": 1}, {"type": "web_search", "y": 1}]}, ["tools[0].x"]),
        (
            {"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f", "x": 1}]}]},
            ["tools[0].tools[0].x"],
        ),
        ({"tools": [], "tool_choice": {"type": "function", "name": "f", "namespace": "n", "x": 1}}, ["tool_choice.x"]),
        ({"text": {"format": {"type": "text", "x": 1}, "y": 2}}, ["text.y", "text.format.x"]),
        ({"reasoning": {"effort": "low", "z": 1}, "w": 1}, ["w", "reasoning.z"]),
    ],
)
def test_responses(more: dict[str, Any], names: list[str]) -> None:
    assert found(ResponsesRequest, {"model": "m", "input": "x"} | more) == names


def test_completions() -> None:
    body = {"model": "m", "prompt": "x", "stream": True, "stream_options": {"a": 1}, "b": 2}
    assert found(CompletionRequest, body) == ["b", "stream_options.a"]


def check(fields: UnknownFields, client: str, **more: Any) -> None:
    body = CHAT | more
    fields.check(body, ChatCompletionRequest.model_validate(body), client)


def test_each_client_is_reported_once_for_each_field(caplog: pytest.LogCaptureFixture) -> None:
    fields = UnknownFields("warn")
    two = [USER | {"w": 1}, USER | {"w": 2}]
    check(fields, "a", **{"x\n": 1}, messages=two)
    check(fields, "a", **{"x\n": 1}, messages=two)
    check(fields, "b", **{"x\n": 1})
    check(fields, "a", y=1)
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        r"ignoring unknown request fields of 'a': 'x\n', 'messages[].w'",
        r"ignoring unknown request fields of 'b': 'x\n'",
        "ignoring unknown request fields of 'a': 'y'",
    ]


def test_no_more_pairs_are_kept_than_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    fields = UnknownFields("warn")
    for number in range(MAX_PAIRS + 50):
        check(fields, f"client {number}", x=1)
    check(fields, "client 0", x=1)
    check(fields, "one more", **{f"field {i}": 1 for i in range(2000)})
    assert len(caplog.records) == MAX_PAIRS


def test_unknown_fields_can_be_refused_or_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(InvalidRequest) as error:
        check(UnknownFields("reject"), "a", messages=[USER, USER | {"w": 1}])
    assert (error.value.param, error.value.code) == ("messages[1].w", "unknown_parameter")
    check(UnknownFields("reject"), "a", top_k=3)
    check(UnknownFields("ignore"), "a", anything=1)
    assert not caplog.records


@pytest.mark.parametrize(
    ("agent", "key", "name"),
    [
        ("my-client/1.2 (linux)", None, "my-client"),
        ("OpenAI/Python 3.50.0", None, "OpenAI"),
        ("codex_cli_rs/0.171.0 (Ubuntu; x86_64)", ANONYMOUS, "codex_cli_rs"),
        ("curl/8.1", "team", "team"),
        ("", None, "unknown"),
        ("(only a comment)", None, "unknown"),
        ("x" * 5000, None, "x" * 64),
    ],
)
def test_a_client_is_its_key_or_its_product(agent: str, key: str | None, name: str) -> None:
    scope: dict[str, Any] = {"type": "http", "headers": [(b"user-agent", agent.encode())]}
    if key is not None:
        scope["state"] = {"caller": Caller(key, b"", 0, 0, 0)}
    assert client_of(Request(scope)) == name
