"""POST /v1/messages of a real server: streams, tool loops and their cached tokens, budgets, stop sequences."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.contract import ANSWER, CITY, THINK
from tests.support.message_stream import folded_message, read_events
from tests.support.server_process import ServerProcess

MODEL = "gpt-oss-nano"
BLOCK = 64
TOOLS = [
    {"name": "get_weather", "description": "Does it", "input_schema": CITY, "cache_control": {"type": "ephemeral"}},
    {"name": "get_time", "input_schema": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object"}},
    {"type": "web_search_20260209", "name": "web_search"},
]


def body_of(**more: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 60, "messages": [{"role": "user", "content": "Hello"}], "seed": 7} | more


def post(server: ServerProcess, path: str = "/v1/messages?beta=true", **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body_of(**more), headers={"x-api-key": "none"}, timeout=60)


def ask(server: ServerProcess, **more: Any) -> dict[str, Any]:
    response = post(server, **more)
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()
    return message


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{k: v for k, v in block.items() if k != "id"} for block in message["content"]]
    usage = {k: v for k, v in message["usage"].items() if k not in ("input_tokens", "cache_read_input_tokens")}
    return message | {"id": "", "content": content, "usage": usage}


@pytest.mark.parametrize(
    "more",
    [
        {"logit_bias": ANSWER},
        {"logit_bias": THINK, "thinking": {"type": "adaptive", "display": "omitted"}},
        {"tools": TOOLS, "tool_choice": {"type": "any"}, "max_tokens": 200},
        {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "get_weather"}, "max_tokens": 12},
        {"output_config": {"format": {"type": "json_schema", "schema": CITY}}, "max_tokens": 100},
        {"thinking": {"type": "disabled"}, "logit_bias": THINK},
    ],
)
def test_a_stream_is_the_message(server: ServerProcess, more: dict[str, Any]) -> None:
    whole, response = ask(server, **more), post(server, stream=True, **more)
    streamed = folded_message(read_events(response.text))
    assert without_ids(streamed) == without_ids(whole)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert (whole["type"], whole["role"], whole["model"]) == ("message", "assistant", MODEL)
    kinds = {block["type"] for block in whole["content"]}
    if "tool_choice" in more and whole["stop_reason"] != "max_tokens":
        assert whole["stop_reason"] == "tool_use" and "tool_use" in kinds
    if more.get("thinking") == {"type": "disabled"}:
        assert "thinking" not in kinds
        assert whole["usage"]["output_tokens_details"]["thinking_tokens"] == 0


@pytest.mark.parametrize("display", ["summarized", "omitted"])
def test_the_second_turn_of_a_tool_loop_reuses_all_of_the_first(server: ServerProcess, display: str) -> None:
    """As Claude Code sends it: what was a list of one block comes back as a string."""
    context = f"Environment for {display} thinking. " * 20
    more: dict[str, Any] = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cch=1"},
            {"type": "text", "text": "Be brief."},
        ],
        "tools": TOOLS,
        "tool_choice": {"type": "any"},
        "thinking": {"type": "adaptive", "display": display},
        "logit_bias": THINK,
        "max_tokens": 300,
    }
    asked = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "system", "content": [{"type": "text", "text": context, "cache_control": {"type": "ephemeral"}}]},
    ]
    first = ask(server, messages=asked, **more)
    assert first["stop_reason"] == "tool_use" and first["content"][0]["type"] == "thinking"
    assert (first["content"][0]["thinking"] == "") == (display == "omitted")
    result = {"type": "tool_result", "tool_use_id": first["content"][-1]["id"], "content": "sun", "is_error": False}
    history = [
        {"role": "user", "content": "Weather?"},
        {"role": "system", "content": context},
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": [result]},
    ]
    billed = [{"type": "text", "text": "x-anthropic-billing-header: cch=2"}, more["system"][1]]
    second = ask(server, **more | {"messages": history, "system": billed})["usage"]
    counts = first["usage"]
    total = counts["input_tokens"] + counts["cache_read_input_tokens"] + counts["output_tokens"]
    assert second["cache_read_input_tokens"] >= (total - 1) // BLOCK * BLOCK  # the last token was not computed
    assert second["input_tokens"] > 0


def test_tokens_are_counted(server: ServerProcess) -> None:
    more: dict[str, Any] = {"system": "Be brief.", "tools": TOOLS}
    counted = post(server, "/v1/messages/count_tokens?beta=true", **more).json()
    usage = ask(server, max_tokens=1, **more)["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    started = read_events(post(server, max_tokens=1, stream=True, **more).text)[0]["message"]["usage"]
    assert started["input_tokens"] + started["cache_read_input_tokens"] == counted["input_tokens"]


def test_a_stop_sequence_is_reported(server: ServerProcess) -> None:
    whole = ask(server, logit_bias=ANSWER)
    text = whole["content"][-1]["text"]
    stop = text[len(text) // 2 :][:3]
    cut = ask(server, logit_bias=ANSWER, stop_sequences=["never seen", stop])
    assert (cut["stop_reason"], cut["stop_sequence"]) == ("stop_sequence", stop)
    assert cut["content"][-1]["text"] == text[: text.index(stop)]
    assert whole["stop_reason"] in ("end_turn", "max_tokens") and whole["stop_sequence"] is None


def test_a_budget_bounds_thinking(server: ServerProcess) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    usage = ask(server, max_tokens=1100, logit_bias=THINK, thinking=thinking)["usage"]
    assert 0 < usage["output_tokens_details"]["thinking_tokens"] <= 1024 + 16


def test_an_answer_that_was_begun_is_continued(server: ServerProcess) -> None:
    begun = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "The answer is"}]
    message = ask(server, messages=begun, max_tokens=5)
    assert [block["type"] for block in message["content"]] == ["text"]
    forced = post(server, messages=begun, tools=TOOLS, tool_choice={"type": "any"})
    assert forced.status_code == 400 and "messages.1" in forced.json()["error"]["message"]


def test_too_long_a_context_is_refused_in_anthropics_words(server: ServerProcess) -> None:
    limit = httpx.get(f"{server.url}/v1/models").json()["data"][0]["max_model_len"]
    counted = post(server, "/v1/messages/count_tokens").json()["input_tokens"]
    error = post(server, max_tokens=limit).json()["error"]
    assert error["message"] == (
        f"input length and `max_tokens` exceed context limit: {counted} + {limit} > {limit}, "
        "decrease input length or `max_tokens` and try again"
    )
    long = [{"role": "user", "content": "word " * limit}]
    counted = post(server, "/v1/messages/count_tokens", messages=long).json()["input_tokens"]
    assert counted > limit
    for stream in False, True:
        response = post(server, messages=long, stream=stream)
        assert response.status_code == 400
        assert response.json()["error"] == {
            "type": "invalid_request_error",
            "message": f"prompt is too long: {counted} tokens > {limit} maximum",
        }
