"""/v1/messages with an engine that follows a script: a coding agent's loop, failures, keys, and malformed bodies."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptoss.api.messages.schema.request import MessagesRequest
from gptoss.engine.client.errors import EngineDeadError, EngineError, QueueFullError
from tests.support.coding_agent import first_turn, next_turn
from tests.support.instant_engine import served
from tests.support.message_stream import folded_message, read_events
from tests.support.script import BLOCK, Dies, call, say, think
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiers import sized

MODEL = "gpt-oss-nano"
TOOLS = first_turn(MODEL)["tools"]
SHELL = TOOLS[1]["name"]
ARGUMENT = next(iter(TOOLS[1]["input_schema"]["properties"]))
KEY = "a-key-of-the-test"
NUM_MALFORMED = sized(150, 2000)
HI: dict[str, Any] = {"model": MODEL, "max_tokens": 50, "messages": [{"role": "user", "content": "Hi"}]}


def post(url: str, body: Any, path: str = "/v1/messages?beta=true", **headers: str) -> httpx.Response:
    return httpx.post(f"{url}{path}", json=body, headers=headers, timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ScriptedEngine, str]]:
    engine = ScriptedEngine()
    with served(engine=engine) as url:
        yield engine, url


@pytest.fixture
def engine(server: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    server[0].lines.clear()
    server[0].requests.clear()
    return server[0]


@pytest.fixture
def url(server: tuple[ScriptedEngine, str]) -> str:
    return server[1]


def test_a_coding_agent_loses_nothing_between_its_turns(engine: ScriptedEngine, url: str) -> None:
    """Spaces in the arguments, which the client's JSON does not keep, are kept for the prompt."""
    written = think("I echo.") + call(SHELL, f'{{ "{ARGUMENT}": "echo hi"}}')
    engine.lines += [written, say("Hi.")]
    body = first_turn(MODEL)
    first = folded_message(read_events(post(url, body).text))
    assert first["stop_reason"] == "tool_use"
    assert [block["type"] for block in first["content"]] == ["thinking", "tool_use"]
    assert first["content"][0]["thinking"] == "" and first["content"][1]["input"] == {ARGUMENT: "echo hi"}
    second = folded_message(read_events(post(url, next_turn(body, first["content"], "hi")).text))
    one, two = engine.requests
    whole = one.token_ids + engine.vocabulary.encode_with_special(written)
    assert two.token_ids[: len(whole)] == whole
    cached = second["usage"]["cache_read_input_tokens"]
    assert cached == (len(whole) - 1) // BLOCK * BLOCK
    assert second["usage"]["input_tokens"] == len(two.token_ids) - cached
    assert second["content"] == [{"type": "text", "text": "Hi."}] and second["stop_reason"] == "end_turn"
    assert "billing" not in engine.vocabulary.decode(one.token_ids)
    assert one.params.grammar is not None


@pytest.mark.parametrize("tool", TOOLS, ids=range(len(TOOLS)))
def test_every_schema_of_a_coding_agent_is_in_the_grammar(url: str, tool: dict[str, Any]) -> None:
    body = HI | {"tools": [tool | {"description": ""}], "tool_choice": {"type": "any"}, "max_tokens": 20}
    rendered = {"type": "function", "function": {"name": tool["name"], "parameters": tool["input_schema"]}}
    assert post(url, body).status_code == 200
    asked = {"model": MODEL, "messages": HI["messages"], "tools": [rendered], "tool_choice": "required"}
    plan = httpx.post(f"{url}/v1/chat/completions/render", json=asked | {"include_relaxations": True}).json()
    for name in tool["input_schema"]["properties"]:
        assert name in plan["grammar"]


REFUSALS: list[tuple[EngineError, int, str, str]] = [
    (QueueFullError("full", 3.0), 429, "rate_limit_error", "3"),
    (EngineDeadError("gone"), 503, "overloaded_error", "30"),
    (EngineError("not now"), 529, "overloaded_error", "5"),
]


def test_refusals(engine: ScriptedEngine, url: str) -> None:
    for line, status, kind, retry_after in REFUSALS:
        for stream in False, True:
            engine.lines.append(line)
            response = post(url, HI | {"stream": stream})
            assert response.status_code == status and response.json()["error"]["type"] == kind
            assert response.json()["request_id"] == response.headers["request-id"]
            assert response.headers["retry-after"] == retry_after


def test_an_engine_that_dies(engine: ScriptedEngine, url: str) -> None:
    engine.lines += [Dies(think("Hm.")), Dies(think("Hm."))]
    response, streamed = post(url, HI), post(url, HI | {"stream": True})
    assert response.status_code == 500 and response.json()["error"]["type"] == "api_error"
    events = read_events(streamed.text)
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "error"
    assert events[-1]["error"] == response.json()["error"]
    assert events[-1]["request_id"] == streamed.headers["request-id"]


def test_keys_and_limits(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"- name: me\n  key: {KEY}\n  requests_per_minute: 3\n")
    with served(api_keys_file=keys) as url:
        for headers in {}, {"x-api-key": "wrong"}:
            response = post(url, HI, **headers)
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
        for path in "/v1/messages", "/v1/messages/count_tokens":
            assert post(url, HI, path, **{"x-api-key": KEY}).status_code == 200
        assert post(url, HI, **{"authorization": f"Bearer {KEY}"}).status_code == 200
        response = post(url, HI, **{"x-api-key": KEY})
        assert response.status_code == 429 and response.json()["error"]["type"] == "rate_limit_error"
        assert int(response.headers["retry-after"]) > 0
        counts = httpx.get(f"{url}/stats", headers={"x-api-key": KEY}).json()["requests"]
        assert counts["ok"] == 2, counts


def test_refusals_beside_the_endpoint_and_its_keep_alive() -> None:
    with served(max_body_bytes=2000, pause_s=0.15, keep_alive_s=0.1) as url:
        events = read_events(post(url, HI | {"stream": True}).text)  # a comment is not an event
        assert folded_message(events)["content"][-1] == {"type": "text", "text": "Hi."}
        assert sum(event["type"] == "ping" for event in events) > 2
        large = post(url, HI | {"system": "x" * 3000})
        assert large.status_code == 413 and large.json()["error"]["type"] == "request_too_large"
        host = post(url, HI, host="example.com")
        assert host.status_code == 403 and host.json()["error"]["type"] == "permission_error"


def test_what_is_not_there(url: str) -> None:
    model = post(url, HI | {"model": "claude-sonnet-4-5"})
    assert model.status_code == 404 and model.json()["error"]["type"] == "not_found_error"
    batch = post(url, {"requests": []}, "/v1/messages/batches")
    assert batch.status_code == 404 and "batches" in batch.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/messages").status_code == 405
    assert post(url, [1]).json()["error"]["type"] == "invalid_request_error"
    thread = post(url, HI | {"thread": {"type": "create"}})
    assert thread.status_code == 400 and "thread" in thread.json()["error"]["message"]
    assert thread.json()["error"]["details"]["error_code"] == "thread_unsupported_request"  # the SDK reads it


def test_so_many_messages_are_not_read_one_by_one(url: str) -> None:
    body = HI | {"messages": HI["messages"] * 40_000}
    error = post(url, body).json()["error"]
    assert error["message"] == "prompt is too long: 160000 tokens > 131072 maximum"


# --- malformed bodies ---

ODD: list[Any] = [None, True, -1, 0, 1.5, 10**30, "", "x", "\x00", [], [1], {}, {"type": "text"}, {"type": []}, [[]]]
ODD += [
    "auto",
    {"type": "image"},
    [{"type": "tool_result"}],
    [{"type": "tool_use", "id": "a", "name": "f", "input": 1}],
]


def rich() -> dict[str, Any]:
    """Something of everything."""
    body = first_turn(MODEL)
    called = {"type": "tool_use", "id": "toolu_1", "name": SHELL, "input": {ARGUMENT: "ls"}}
    thought = {"type": "thinking", "thinking": "Hm.", "signature": "plain.v1."}
    told = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": [{"type": "text", "text": "a"}, {"type": "tool_reference", "tool_name": SHELL}],
        "is_error": True,
    }
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x"}, "title": "T"}
    change = {"type": "tool_removal", "tool": {"type": "tool_reference", "name": "other"}}
    result = {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "x"}]}
    body["messages"] += [
        {"role": "assistant", "content": [thought, {"type": "text", "text": "Look."}, called]},
        {"role": "user", "content": [told, document, result]},
        {"role": "system", "content": [change]},
    ]
    schema = {"type": "json_schema", "schema": {"type": "object", "properties": {"a": {"type": "string"}}}}
    more = {"output_config": {"effort": "low", "format": schema}, "tool_choice": {"type": "auto"}, "top_k": 5}
    few = [tool | {"description": "x"} for tool in (TOOLS[1], TOOLS[-1])]
    body["system"][-1]["text"] = body["messages"][1]["content"][0]["text"] = "x"
    more |= {"stop_sequences": ["x"], "temperature": 0.5, "stream": False, "max_tokens": 20, "tools": few}
    return body | more


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def malformed(body: dict[str, Any], source: random.Random) -> dict[str, Any]:
    """The body with one to three values changed, left out, doubled or renamed."""
    body = copy.deepcopy(body)
    for _ in range(source.choice([1, 1, 2, 3])):
        found = list(places(body))
        *parents, last = source.choice(found)
        inner: Any = body
        for key in parents:
            inner = inner[key]
        kind = source.randrange(4)
        if kind == 0:
            del inner[last]
        elif kind == 1 and isinstance(inner, list):
            inner.insert(0, copy.deepcopy(inner[last]))
        elif kind == 1:
            inner[f"{last}_"] = inner.pop(last)
        else:
            inner[last] = copy.deepcopy(source.choice(ODD))
    return body


def names_a_field(message: str, body: dict[str, Any]) -> bool:
    """Whether a path in quotes or before a colon begins with a field of the body."""
    named = re.findall(r"['`]([\w.]+)['`]|^([\w.]+):", message)
    first = {(quoted or leading).partition(".")[0] for quoted, leading in named}
    return bool(first & (set(MessagesRequest.model_fields) | set(body))) or message.startswith("prompt is too long")


def test_malformed_bodies_are_refused_by_field(engine: ScriptedEngine, url: str) -> None:
    source, statuses = random.Random(0), dict.fromkeys((200, 400, 404), 0)
    with httpx.Client(base_url=url, timeout=60) as client:
        body = rich()
        assert client.post("/v1/messages", json=body).status_code == 200
        for number in range(NUM_MALFORMED):
            sent = malformed(body, source)
            path = "/v1/messages" if number % 4 else "/v1/messages/count_tokens"
            response = client.post(path, json=sent)
            assert response.status_code in statuses, (response.text, json.dumps(sent)[-3000:])
            statuses[response.status_code] += 1
            if response.status_code == 400:
                error = response.json()["error"]
                assert error["type"] == "invalid_request_error"
                assert names_a_field(error["message"], sent), (error, json.dumps(sent)[-3000:])
    assert statuses[400] > NUM_MALFORMED / 3 and statuses[200] > 0
