"""Server-sent events as OpenAI's clients read them: the frame, the order, the sum, the end."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]


def body(model: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    return {"model": model, "messages": messages, "max_tokens": 120, "temperature": 0, "seed": 1} | more


def stream(http: httpx.Client, request: dict[str, Any]) -> list[dict[str, Any]]:
    """-> the chunks; checks the frame on the way."""
    with http.stream("POST", "/v1/chat/completions", json=request | {"stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "no-cache" in response.headers["cache-control"]
        text = "".join(response.iter_text())
    assert text.endswith("\n\n")
    events = [event for event in text.split("\n\n") if event and not event.startswith(":")]
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events[-1] == "data: [DONE]"
    assert events.count("data: [DONE]") == 1
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def joined(chunks: list[dict[str, Any]], field: str) -> str:
    return "".join(c["choices"][0]["delta"].get(field) or "" for c in chunks if c["choices"])


def test_chunks_have_openais_shape(http: httpx.Client, model: str) -> None:
    chunks = stream(http, body(model))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1 and chunks[0]["id"].startswith("chatcmpl-")
    assert len({c["created"] for c in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    reasons = [c["choices"][0]["finish_reason"] for c in chunks]
    assert reasons[-1] in ("stop", "length") and set(reasons[:-1]) == {None}


def test_the_deltas_add_up_to_the_whole_answer(http: httpx.Client, model: str) -> None:
    whole = http.post("/v1/chat/completions", json=body(model)).json()["choices"][0]
    chunks = stream(http, body(model))
    assert joined(chunks, "content") == (whole["message"]["content"] or "")
    assert joined(chunks, "reasoning_content") == (whole["message"].get("reasoning_content") or "")
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


def test_usage_comes_last_and_only_when_asked_for(http: httpx.Client, model: str) -> None:
    assert all(c.get("usage") is None for c in stream(http, body(model)))
    chunks = stream(http, body(model, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0


def test_no_special_token_leaks_into_the_text(http: httpx.Client, model: str) -> None:
    for effort in ("low", "medium", "high"):
        chunks = stream(http, body(model, reasoning_effort=effort))
        for field in ("content", "reasoning_content"):
            assert "<|" not in joined(chunks, field)


def test_tokens_arrive_while_the_answer_is_made(http: httpx.Client, model: str) -> None:
    arrivals = []
    request = body(model, stream=True, min_tokens=100, max_tokens=100)
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                arrivals.append(time.monotonic())
    assert len(arrivals) > 20
    assert arrivals[-1] - arrivals[0] > 3 * (arrivals[len(arrivals) // 10] - arrivals[0])


def test_several_choices_are_told_apart(http: httpx.Client, model: str) -> None:
    chunks = stream(http, body(model, n=3, max_tokens=20, temperature=1))
    by_index = {c["choices"][0]["index"] for c in chunks}
    assert by_index == {0, 1, 2}
    ends = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


def test_a_bad_request_is_a_json_error_and_no_stream(http: httpx.Client, model: str) -> None:
    response = http.post("/v1/chat/completions", json=body(model, stream=True, temperature=5))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "temperature"


def test_a_client_that_goes_away_frees_its_place(http: httpx.Client, model: str) -> None:
    request = body(model, stream=True, ignore_eos=True, max_tokens=2000)
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 10
    while http.get("/stats").json()["engine"]["num_running"]:
        assert time.monotonic() < deadline, "the request still runs"
        time.sleep(0.05)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_comes_before_content(http: httpx.Client, model: str, field: str) -> None:
    chunks = stream(http, body(model))
    kinds = [
        "thinking"
        if c["choices"][0]["delta"].get(field)
        else "answer"
        if c["choices"][0]["delta"].get("content")
        else ""
        for c in chunks
    ]
    kinds = [k for k in kinds if k]
    assert kinds == sorted(kinds, key=("thinking", "answer").index)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.p0.script import run

    run(__file__)
