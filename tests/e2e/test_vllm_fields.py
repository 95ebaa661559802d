"""The fields of vLLM and llama.cpp, on every endpoint."""

from __future__ import annotations

import functools
import json
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.e2e.contract import CITY, MODEL, TOOLS, USER, ask, error_of, fold
from tests.support.server_process import ServerProcess

ANSWERS = ["in the morning", "in the evening, late"]
ONE_OF: list[dict[str, Any]] = [
    {"guided_choice": ANSWERS},
    {"structured_outputs": {"choice": ANSWERS}},
    {"guided_regex": "in the (morning|evening, late)"},
    {"structured_outputs": {"regex": "^in the (morning|evening, late)$"}},
]
ASK = {"temperature": 1, "seed": 3}


@pytest.mark.parametrize("fields", ONE_OF)
def test_choices_and_patterns_hold_on_every_endpoint(server: ServerProcess, fields: dict[str, Any]) -> None:
    body = ASK | {"model": MODEL, "reasoning_budget": 3} | fields
    post = functools.partial(httpx.post, timeout=60)
    chat = post(f"{server.url}/v1/chat/completions", json=body | {"messages": [USER]}).json()
    assert chat["choices"][0]["message"]["content"] in ANSWERS
    tools = {"messages": [USER], "tools": TOOLS, "max_tokens": 300}
    choice = post(f"{server.url}/v1/chat/completions", json=body | tools).json()["choices"][0]
    assert choice["message"]["content"] in (*ANSWERS, None) or choice["finish_reason"] == "length"
    response = post(f"{server.url}/v1/responses", json=body | {"input": "x"}).json()
    texts = [item["content"][0]["text"] for item in response["output"] if item["type"] == "message"]
    assert len(texts) == 1 and texts[0] in ANSWERS
    raw = {"model": MODEL, "prompt": "When?", "max_tokens": 40} | ASK | fields
    text = post(f"{server.url}/v1/completions", json=raw).json()["choices"][0]
    assert text["text"] in ANSWERS and text["finish_reason"] == "stop"


def follows_city(text: str) -> bool:
    return jsonschema.Draft202012Validator(CITY).is_valid(json.loads(text))


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": CITY},
        {"structured_outputs": {"json": json.dumps(CITY)}},
        {"response_format": {"type": "json_object", "schema": CITY}},
    ],
)
def test_schemas_hold_on_every_endpoint(server: ServerProcess, fields: dict[str, Any]) -> None:
    post = functools.partial(httpx.post, timeout=60)
    body = ASK | {"model": MODEL, "max_tokens": 200} | fields
    chat = post(f"{server.url}/v1/chat/completions", json=body | {"messages": [USER]}).json()
    assert follows_city(chat["choices"][0]["message"]["content"])
    raw = post(f"{server.url}/v1/completions", json=body | {"prompt": "A city:"}).json()
    assert follows_city(raw["choices"][0]["text"])
    in_responses = {key: value for key, value in body.items() if key != "response_format"}
    if "response_format" in fields:
        in_responses["text"] = {"format": fields["response_format"]}
    in_responses["max_output_tokens"] = in_responses.pop("max_tokens")
    response = post(f"{server.url}/v1/responses", json=in_responses | {"input": "x"}).json()
    assert follows_city(response["output"][-1]["content"][0]["text"])


def test_a_final_message_is_continued(client: openai.OpenAI, server: ServerProcess) -> None:
    messages: Any = [USER, {"role": "assistant", "content": "The answer is"}]
    for stream in (False, True):
        answer = ask(
            client,
            messages=messages,
            stream=stream,
            max_tokens=8,
            extra_body={"continue_final_message": True, "add_generation_prompt": False},
        )
        if stream:
            folded = fold(list(answer))[0]
            assert folded["content"] and not folded["reasoning"]
        else:
            message = answer.choices[0].message
            assert message.content and not getattr(message, "reasoning_content", None)
    tool = {"type": "function", "function": {"name": "f"}}
    several = ask(
        client,
        messages=messages,
        n=2,
        max_tokens=8,
        logprobs=True,
        stop=["never"],
        tools=[tool],
        extra_body={"continue_final_message": True},
    )
    assert [bool(choice.logprobs.content) for choice in several.choices] == [True, True]
    body = {"model": MODEL, "messages": messages, "add_generation_prompt": False}
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(f"{url}/render", json=body).json()["prompt"].endswith("<|end|>")
    told = httpx.post(url, json=body | {"max_tokens": 30}, timeout=60).json()["choices"][0]
    assert told["message"]["content"] or told["message"]["reasoning_content"]
    more = {"continue_final_message": True, "add_generation_prompt": False, "guided_regex": "a"}
    status, error = error_of(server, body | more)
    assert (status, error["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_the_templates_effort_is_read(server: ServerProcess, path: str) -> None:
    def reads(**more: Any) -> Any:
        messages = {"messages": [USER]} if path.startswith("chat") else {"input": "x"}
        body = {"model": MODEL} | messages | more
        if path.startswith("chat"):
            return httpx.post(f"{server.url}/v1/{path}/render", json=body)
        return httpx.post(f"{server.url}/v1/{path}", json=body | {"max_output_tokens": 16})

    for effort in ("low", "high"):
        answer = reads(chat_template_kwargs={"reasoning_effort": effort, "other": 1})
        assert answer.status_code == 200, answer.text
        if path.startswith("chat"):
            assert f"Reasoning: {effort}" in answer.json()["prompt"]
    wrong = reads(chat_template_kwargs={"reasoning_effort": "huge"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "chat_template_kwargs.reasoning_effort")
