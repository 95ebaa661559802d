"""Anthropic's SDK for Python against a running server of nano.

TEST_SERVER_URL=http://127.0.0.1:8000 pytest compat/test_anthropic.py
"""

from __future__ import annotations

import os
from typing import Any

import anthropic
import pydantic
import pytest
from anthropic import beta_tool

URL = os.environ.get("TEST_SERVER_URL", "http://127.0.0.1:8000")
MODEL = os.environ.get("TEST_SERVER_MODEL", "gpt-oss-nano")
TOOL: Any = {
    "name": "get_weather",
    "description": "Get the current weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city"}},
        "required": ["city"],
    },
}
ASK: dict[str, Any] = {
    "model": MODEL,
    "max_tokens": 300,
    "extra_body": {"temperature": 0.0},  # the SDK has no such argument since 2.0
    "messages": [{"role": "user", "content": "What is 12 + 30?"}],
}
WEATHER = ASK | {"messages": [{"role": "user", "content": "What is the weather in Oslo?"}], "tools": [TOOL]}


@pytest.fixture(scope="module")
def client() -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=URL, api_key="none", max_retries=0, timeout=120)


def without_ids(message: Any) -> dict[str, Any]:
    """Cached tokens depend on what was asked before."""
    found: dict[str, Any] = message.model_dump(exclude={"id": True, "content": {"__all__": {"id", "parsed_output"}}})
    usage = found.pop("usage")
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    return found | {"prompt": prompt, "output": usage["output_tokens"], "details": usage["output_tokens_details"]}


@pytest.mark.parametrize(
    "body",
    [
        ASK,
        ASK | {"thinking": {"type": "adaptive", "display": "omitted"}},
        ASK | {"thinking": {"type": "disabled"}},
        ASK | {"stop_sequences": ["42", "30"]},
        ASK | {"max_tokens": 3},
        WEATHER,
        WEATHER | {"tool_choice": {"type": "tool", "name": "get_weather"}},
    ],
)
@pytest.mark.parametrize("beta", [False, True])
def test_a_stream_is_the_message(client: anthropic.Anthropic, body: dict[str, Any], beta: bool) -> None:
    messages: Any = client.beta.messages if beta else client.messages
    whole = messages.create(**body)
    with messages.stream(**body) as stream:
        assert without_ids(stream.get_final_message()) == without_ids(whole)
    assert whole.stop_reason in ("end_turn", "max_tokens", "stop_sequence", "tool_use")
    assert whole._request_id.startswith("req_")


def test_the_text_of_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(**ASK) as stream:
        text = "".join(stream.text_stream)
    assert text and text == stream.get_final_text()


def test_the_tool_runner(client: anthropic.Anthropic) -> None:
    asked = []

    @beta_tool
    def get_weather(city: str) -> str:
        """Get the current weather of a city.

        Args:
            city: The city
        """
        asked.append(city)
        return "sunny, 21 degrees"

    body = {k: v for k, v in WEATHER.items() if k != "tools"}
    turns = list(client.beta.messages.tool_runner(tools=[get_weather], **body))
    assert asked and turns[0].stop_reason == "tool_use" and turns[-1].stop_reason == "end_turn"
    usage = turns[1].usage
    assert usage.cache_read_input_tokens and usage.cache_read_input_tokens > usage.input_tokens


def test_parsed_output(client: anthropic.Anthropic) -> None:
    class Sum(pydantic.BaseModel):
        total: int

    parsed = client.messages.parse(**ASK, output_format=Sum)
    assert isinstance(parsed.parsed_output, Sum)


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    body = {k: v for k, v in WEATHER.items() if k in ("model", "messages", "tools")}
    usage = client.messages.create(**WEATHER).usage
    counted = client.messages.count_tokens(**body).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_have_their_classes(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.create(**ASK | {"model": "other"})
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**ASK | {"extra_body": {"temperature": 3}})
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0"):
        image = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x.png"}}
        client.messages.create(**ASK | {"messages": [{"role": "user", "content": [image]}]})


def test_batches_are_refused(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="batches are not supported"):
        client.messages.batches.create(requests=[{"custom_id": "a", "params": ASK}])  # type: ignore[typeddict-item]
    with pytest.raises(anthropic.NotFoundError, match="batches are not supported"):
        client.messages.batches.list()
