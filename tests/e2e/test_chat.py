"""Chat completions through the real openai client against a real server with random weights."""

from __future__ import annotations

import concurrent.futures
import gzip
import json
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.contract import MODEL, USER, ask, error_of, fold
from tests.support.server_process import ServerProcess


def test_json_answer_has_openais_shape(client: openai.OpenAI) -> None:
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    choice = answer.choices[0]
    assert choice.finish_reason in ("stop", "length")
    assert choice.message.role == "assistant"
    assert choice.message.tool_calls is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens <= 40
    assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    assert answer._request_id.startswith("req_")


def test_spec_required_keys_are_there_even_when_null(server: ServerProcess) -> None:
    body = {"model": MODEL, "messages": [USER], "max_tokens": 5}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    choice = response.json()["choices"][0]
    assert choice["logprobs"] is None
    assert choice["message"]["refusal"] is None
    assert "content" in choice["message"] and "tool_calls" not in choice["message"]
    assert response.headers["openai-processing-ms"].isdigit()
    assert choice["message"].get("reasoning") == choice["message"].get("reasoning_content")


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"n": 3}, {"reasoning_effort": "high", "top_p": 0.9}])
def test_the_stream_equals_the_json_answer(client: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = ask(client, **options)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    folded = fold(chunks)
    for choice in whole.choices:
        got = folded[choice.index]
        assert got["content"] == (choice.message.content or "")
        assert got["reasoning"] == (getattr(choice.message, "reasoning_content", None) or "")
        assert got["finish"] == choice.finish_reason
    last = chunks[-1]
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.completion_tokens_details == whole.usage.completion_tokens_details
    assert all(c.usage is None for c in chunks[:-1])


def test_stream_bytes_follow_the_rules(server: ServerProcess) -> None:
    body = {"model": MODEL, "messages": [USER], "max_tokens": 20, "stream": True, "n": 2}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert "content-length" not in response.headers
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)
    chunks = [json.loads(line[6:]) for line in lines[:-1]]
    assert [c["choices"][0]["index"] for c in chunks[:2]] == [0, 1]
    assert all(c["choices"][0]["delta"] == {"role": "assistant", "content": ""} for c in chunks[:2])
    assert not any("role" in c["choices"][0]["delta"] for c in chunks[2:])
    assert len({(c["id"], c["created"], c["model"]) for c in chunks}) == 1
    assert all(c["choices"] and "finish_reason" in c["choices"][0] and "usage" not in c for c in chunks)
    assert sum(c["choices"][0]["finish_reason"] is not None for c in chunks) == 2


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(client: openai.OpenAI) -> None:
    first, again, other = (ask(client, seed=seed).choices[0].message for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_chat_of_three_turns_finds_its_prefix_cached(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "system", "content": "Be brief. " * 30}, {"role": "user", "content": "One"}]
    cached = []
    for text in ("Two", "Three", ""):
        answer = ask(client, messages=messages, max_tokens=100)
        cached.append((answer.usage.prompt_tokens_details.cached_tokens, answer.usage.prompt_tokens))
        content = answer.choices[0].message.content or "nothing"
        messages += [{"role": "assistant", "content": content}, {"role": "user", "content": text}]
    assert cached[1][0] > 0 and cached[2][0] > 0
    assert cached[2][0] >= 128


def test_sixteen_streams_at_once_equal_sixteen_alone(client: openai.OpenAI) -> None:
    def one(seed: int) -> str:
        return "".join(c.choices[0].delta.content or "" for c in ask(client, seed=seed, stream=True, temperature=0.5))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(one, range(16)))
    assert len(set(together)) > 8
    assert sum(bool(text) for text in together) > 8  # random weights end some answers at once


def test_a_closed_stream_frees_its_place(client: openai.OpenAI, server: ServerProcess) -> None:
    before = server.wait_idle()["requests"]["cancelled"]
    stream = ask(client, stream=True, max_tokens=5000, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    assert server.wait_idle(5)["requests"]["cancelled"] == before + 1


def test_an_abandoned_json_request_frees_its_place(server: ServerProcess) -> None:
    before = server.wait_idle()["requests"]["cancelled"]
    body = {"model": MODEL, "messages": [USER], "max_tokens": 20_000, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=1)
    assert server.wait_idle(5)["requests"]["cancelled"] == before + 1


def test_models_are_listed_and_found(client: openai.OpenAI, server: ServerProcess) -> None:
    (model,) = client.models.list()
    for alias in (MODEL, "nano", "openai/gpt-oss-nano", "gpt-oss:nano"):
        assert client.models.retrieve(alias).model_dump() == model.model_dump() | {"id": alias}
    assert model.owned_by == "openai"
    for path in ("/", "/health", "/ready", "/v1/models", "/metrics"):
        assert httpx.head(f"{server.url}{path}").status_code == 200, path
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-4")
    assert error.value.code == "model_not_found"


def test_health_stats_and_metrics(server: ServerProcess, client: openai.OpenAI) -> None:
    before = server.wait_idle()
    answer = ask(client)
    after = server.wait_idle()
    assert after["requests"]["ok"] == before["requests"]["ok"] + 1
    assert after["dense_dtype"] == after["dtype"]
    assert after["tokens"]["output"] == before["tokens"]["output"] + answer.usage.completion_tokens
    assert after["tokens"]["prompt"] == before["tokens"]["prompt"] + answer.usage.prompt_tokens
    health = httpx.get(f"{server.url}/health").json()
    assert health["status"] == "ok" and health["model_id"] == MODEL
    text = httpx.get(f"{server.url}/metrics").text
    values = {
        (sample.name, sample.labels.get("outcome")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert values["gptoss_requests_total", "ok"] == after["requests"]["ok"]
    assert values["gptoss_generation_tokens_total", None] == after["tokens"]["output"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [USER, {"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages[1].tool_call_id"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 33}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"201088": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a\n"}}]}, "tools[0].function.name"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"metadata": "x"}, "metadata"),
        ({"profile": "turbo"}, "profile"),
    ],
)
def test_bad_fields_are_named(server: ServerProcess, change: dict[str, Any], param: str) -> None:
    status, error = error_of(server, {"model": MODEL, "messages": [USER]} | change)
    assert (status, error["param"], error["type"]) == (400, param, "invalid_request_error"), error


def test_an_unknown_model_is_a_404(server: ServerProcess) -> None:
    status, error = error_of(server, {"model": "gpt-4", "messages": [USER]})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


def test_too_long_a_prompt_says_so(server: ServerProcess) -> None:
    status, error = error_of(server, {"model": MODEL, "messages": [{"role": "user", "content": "word " * 150_000}]})
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "maximum context length is" in error["message"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": ""},
        {"role": "assistant", "tool_calls": [None]},
        {"role": "tool", "tool_call_id": "a", "content": ""},
    ],
)
def test_more_messages_than_can_fit_are_not_even_read(server: ServerProcess, message: dict[str, Any]) -> None:
    unreadable = {"role": "nobody"}
    status, error = error_of(server, {"model": MODEL, "messages": [unreadable, *[message] * 40_000]})
    assert (status, error["param"], error["code"]) == (400, "messages", "context_length_exceeded")
    assert "your 40000 messages" in error["message"]


def test_many_messages_are_read_as_few_are(server: ServerProcess) -> None:
    """They are read in a thread."""
    messages = [{"role": "user", "content": f"{n}"} for n in range(400)]
    counts = [
        httpx.post(f"{server.url}/tokenize", json={"messages": some}).json()["count"]
        for some in (messages[:1], messages[:200], messages[:201], messages[:400])
    ]
    assert counts[3] - counts[1] == 200 * (counts[2] - counts[1])
    status, error = error_of(server, {"model": MODEL, "messages": [*messages, {"role": "nobody"}]})
    assert (status, error["param"]) == (400, "messages[400].role")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"a": 1e999}',
        b"[" * 100_000,
        b"1" * 5000,
        b"{} x",
        b'{"model": "gpt-oss-nano", "messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
    ids=[
        "empty",
        "half",
        "array",
        "string",
        "not utf-8",
        "nan",
        "infinite",
        "deep",
        "long number",
        "trailing",
        "surrogate",
    ],
)
def test_bodies_that_are_no_json_objects(server: ServerProcess, body: bytes) -> None:
    status, error = error_of(server, body)
    assert (status, error["type"]) == (400, "invalid_request_error")


def test_wrong_type_size_method_and_path(server: ServerProcess) -> None:
    assert error_of(server, b"{}", headers={"content-type": "text/plain"})[0] == 415
    status, error = error_of(server, gzip.compress(b"{}"), headers={"content-encoding": "gzip"})
    assert status == 415 and "'gzip'" in error["message"]
    assert error_of(server, b" " * 50_000_000)[0] == 413
    for method, path, status in (("GET", "/v1/chat/completions", 405), ("POST", "/v1/nothing", 404)):
        response = httpx.request(method, server.url + path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
