"""Structured output: every finished answer validates."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.e2e.contract import ANSWER, CALL_TOOL, CITY, MODEL, USER, VOCABULARY, Plan, ask, fold, tool
from tests.support.server_process import ServerProcess


@pytest.mark.parametrize("effort", ["low", "high"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_finished_answer_validates(client: openai.OpenAI, effort: str, stream: bool) -> None:
    fmt = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for seed in range(5):
        answer = ask(client, response_format=fmt, seed=seed, max_tokens=150, reasoning_effort=effort, stream=stream)
        if stream:
            folded = fold(list(answer))[0]
            content, finish = folded["content"], folded["finish"]
        else:
            content, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert finish == "stop"
        jsonschema.validate(json.loads(content), CITY)


def test_pydantic_models_parse(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": [USER], "response_format": Plan, "max_tokens": 400}
    found = []
    for seed in range(6):
        with contextlib.suppress(openai.LengthFinishReasonError):
            found.append(client.chat.completions.parse(**asked, seed=seed).choices[0].message.parsed)
    assert found and all(isinstance(parsed, Plan) and len(parsed.steps) in (1, 2) for parsed in found)


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    for seed in range(4):
        choice = ask(client, response_format={"type": "json_object"}, seed=seed, max_tokens=200).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.startswith("{")


@pytest.mark.parametrize("kind", ["call", "answer"])
def test_tools_and_a_schema_together(client: openai.OpenAI, kind: str) -> None:
    fmt = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    bias = ANSWER if kind == "answer" else {**CALL_TOOL, str(VOCABULARY.encode(" to")[0]): 60}
    finished = 0
    for seed in range(5):
        options: Any = {"tools": [tool("f", CITY, strict=True)], "seed": seed, "max_tokens": 200, "logit_bias": bias}
        choice = ask(client, response_format=fmt, **options).choices[0]
        if choice.finish_reason == "length":
            continue
        finished += 1
        if kind == "call":
            jsonschema.validate(json.loads(choice.message.tool_calls[0].function.arguments), CITY)
        else:
            jsonschema.validate(json.loads(choice.message.content), CITY)
    assert finished > 0


def test_the_schema_is_shown_to_the_model(server: ServerProcess) -> None:
    fmt = {"type": "json_schema", "json_schema": {"name": "city", "description": "A city", "schema": CITY}}
    body = {"model": MODEL, "messages": [USER], "response_format": fmt}
    prompt = httpx.post(f"{server.url}/v1/chat/completions/render", json=body).json()["prompt"]
    assert "# Response Formats\n\n## city\n\n// A city\n" in prompt
