"""gptoss.client against the API: what is typed, tools that are Python functions, both clients alike."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from gptoss.client import AsyncGptOss, GptOss, Reply, ToolCall, ToolError, ToolLoopError, extra_body, tool_definition
from gptoss.client.clients import v1_url
from tests.support.instant_engine import served
from tests.support.script import Line, call, say, think
from tests.support.scripted_engine import ScriptedEngine
from tests.support.server_process import ROOT
from tests.support.vocabulary import public_vocabulary

MODEL = "gpt-oss-nano"


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def url(engine: ScriptedEngine) -> Iterator[str]:
    with served(engine=engine) as found:
        yield found


@pytest.fixture(autouse=True)
def _fresh(engine: ScriptedEngine) -> None:
    engine.lines.clear()
    engine.requests.clear()


class Both:
    """Calls a method on the blocking client, or on the asynchronous one."""

    def __init__(self, url: str, is_async: bool) -> None:
        self.url, self.is_async = url, is_async

    def __call__(self, method: str, *args: Any, **options: Any) -> Any:
        if not self.is_async:
            with GptOss(self.url, max_retries=0) as client:
                return getattr(client, method)(*args, **options)

        async def run() -> Any:
            async with AsyncGptOss(self.url, max_retries=0) as client:
                return await getattr(client, method)(*args, **options)

        return asyncio.run(run())


@pytest.fixture(params=["sync", "async"])
def ask(url: str, request: pytest.FixtureRequest) -> Both:
    return Both(url, request.param == "async")


def test_both_clients_have_the_same_methods() -> None:
    for name in ("ask", "run_tools", "model_id", "render", "cancel", "health", "stats"):
        sync, asynchronous = getattr(GptOss, name), getattr(AsyncGptOss, name)
        assert inspect.signature(sync) == inspect.signature(asynchronous)
        assert inspect.iscoroutinefunction(asynchronous)


def test_an_answer_with_what_only_this_server_has(ask: Both, engine: ScriptedEngine) -> None:
    engine.lines.append(think("Short.") + say("42"))
    reply = ask("ask", "What is 12 + 30?", profile="latency_first", reasoning_budget=7, temperature=0, priority=3)
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("42", "Short.", "stop")
    assert (reply.served_model.model_id, reply.served_model.profile) == (MODEL, "latency_first")
    assert engine.requests[0].priority == 3 and engine.requests[0].params.temperature == 0
    engine.lines.append(say("Again."))
    again = ask("ask", [{"role": "user", "content": "Hi"}, reply.as_history, {"role": "user", "content": "Again"}])
    assert again.text == "Again."


def test_reports_are_typed(ask: Both) -> None:
    health, stats = ask("health"), ask("stats")
    assert health.status in ("ok", "degraded") and health.model_id == stats.model_id == MODEL
    assert stats.requests.total >= 0 and stats.latency.ttft_s.p50 is None or stats.latency.requests
    assert stats.model_extra["engine"]["state"] == "ready"
    rendered = ask("render", "Hi", profile="balanced")
    assert rendered.num_tokens == len(rendered.prompt_token_ids) > 0 and rendered.prompt.endswith("<|start|>assistant")
    assert ask("cancel", "chatcmpl-none") is False
    assert ask("model_id") == MODEL


def test_the_other_methods_of_openai_take_extra_body(url: str, engine: ScriptedEngine) -> None:
    engine.lines.append(think("Hm.") + say("Hi."))
    with GptOss(f"{url}/v1") as client:
        chunks = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            extra_body=extra_body(include_reasoning=False, reasoning_budget=None),
        )
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "Hi."
    assert not any((delta.model_extra or {}).get("reasoning") for delta in deltas)


def test_errors_are_openais_and_name_the_field(ask: Both) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        ask("ask", "Hi", profile="fast")
    assert raised.value.param == "profile"


def add(a: int, b: int = 1) -> int:
    """Adds two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a + b


def broken(city: str) -> str:
    raise RuntimeError("no network")


def refuse(city: str) -> str:
    raise ToolError("unknown city")


def lookup(name: str) -> dict[str, Any]:
    return {"name": name, "known": True}


def test_functions_are_run_until_the_model_answers(ask: Both, engine: ScriptedEngine) -> None:
    lines: list[Line] = [call("add", '{"a": 12, "b": 30}'), call("lookup", '{"name": "x"}'), say("42")]
    engine.lines.extend(lines)
    seen: list[ToolCall] = []
    run = ask("run_tools", "12 + 30?", [add, lookup], on_call=seen.append)
    assert run.text == "42" and isinstance(run.reply, Reply)
    assert [(c.name, c.result, c.failed) for c in run.calls] == [
        ("add", "42", False),
        ("lookup", '{"name":"x","known":true}', False),
    ]
    assert seen == run.calls
    assert [message["role"] for message in run.messages] == [
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    prompt = public_vocabulary().decode(engine.requests[-1].token_ids)
    assert "Adds two numbers." in prompt and "// the first number" in prompt and ">42<" in prompt


@pytest.mark.parametrize(
    ("name", "arguments", "result"),
    [
        ("broken", '{"city": "Rome"}', "RuntimeError: no network"),
        ("refuse", '{"city": "Rome"}', "unknown city"),
        ("add", '{"a": "many"}', "invalid arguments: a: Input should be a valid integer"),
        ("add", "{", "invalid arguments"),
    ],
)
def test_the_model_reads_what_went_wrong(
    ask: Both, engine: ScriptedEngine, name: str, arguments: str, result: str
) -> None:
    engine.lines.extend([call(name, arguments), say("Sorry.")])
    run = ask("run_tools", "Hi", [add, broken, refuse])
    assert run.text == "Sorry."
    assert run.calls[0].failed and result in json.loads(run.calls[0].result)["error"]


def test_a_loop_ends_after_its_rounds(ask: Both, engine: ScriptedEngine) -> None:
    engine.lines.extend([call("add", '{"a": 1}')] * 3)
    with pytest.raises(ToolLoopError) as raised:
        ask("run_tools", "Hi", [add], max_rounds=2)
    assert len(raised.value.run.calls) == 2 and len(engine.requests) == 3


def test_asynchronous_functions(url: str, engine: ScriptedEngine) -> None:
    async def slow(name: str) -> str:
        await asyncio.sleep(0)
        return f"Hello {name}"

    engine.lines.extend([call("slow", '{"name": "you"}'), say("Done.")])
    assert Both(url, True)("run_tools", "Hi", [slow]).calls[0].result == "Hello you"
    engine.lines.extend([call("slow", '{"name": "you"}'), say("Done.")])
    failed = Both(url, False)("run_tools", "Hi", [slow]).calls[0]
    assert failed.failed and "use AsyncGptOss" in failed.result


def test_copies_are_clients_too(url: str, engine: ScriptedEngine) -> None:
    engine.lines.extend([say("One."), say("Two."), say("Three.")])
    with GptOss(url, max_retries=0) as client:
        assert client.with_options(timeout=5).ask("Hi").text == "One."
        assert client.copy(base_url=url).ask("Hi").text == "Two."
        assert client.with_options(api_key="other").api_key == "other"

    async def run() -> str:
        async with AsyncGptOss(base_url=url, max_retries=0) as client:
            return (await client.with_options(timeout=5).ask("Hi")).text

    assert asyncio.run(run()) == "Three."


def test_a_reply_is_not_a_stream(ask: Both, engine: ScriptedEngine) -> None:
    for options in ({}, {"tools": [add]}):
        with pytest.raises(TypeError, match=r"use chat\.completions\.create\(stream=True"):
            ask("run_tools" if options else "ask", "Hi", stream=True, **options)
    assert not engine.requests


def test_only_functions_are_tools() -> None:
    for thing in (functools.partial(add, a=1), {"type": "function"}, 3):
        with pytest.raises(TypeError, match="cannot be a tool: only functions and methods can"):
            tool_definition(thing)  # type: ignore[arg-type]


class Place(BaseModel):
    city: str
    country: str = "Italy"


def forecast(
    place: Place,
    days: Annotated[int, Field(ge=1, le=9)] = 3,
    unit: Literal["C", "F"] = "C",
    notes: list[str] | None = None,
) -> str:
    """Weather of the next days.

    :param place: where
    :param days: how many days
    """
    return place.city


def test_a_signature_becomes_a_schema() -> None:
    function = tool_definition(forecast)["function"]
    assert (function["name"], function["description"]) == ("forecast", "Weather of the next days.")
    properties = function["parameters"]["properties"]
    assert function["parameters"]["required"] == ["place"]
    assert function["parameters"]["additionalProperties"] is False
    assert properties["days"] | {"default": 3} == {
        "type": "integer",
        "minimum": 1,
        "maximum": 9,
        "default": 3,
        "description": "how many days",
    }
    assert properties["unit"]["enum"] == ["C", "F"]


def test_arguments_arrive_as_the_signature_says(ask: Both, engine: ScriptedEngine) -> None:
    engine.lines.extend([call("forecast", '{"place": {"city": "Rome"}, "unit": "F"}'), say("Sunny.")])
    assert ask("run_tools", "Hi", [forecast]).calls[0].result == "Rome"


@pytest.mark.parametrize("function", [lambda *args: 1, lambda **options: 1, eval("lambda a, /: 1")])
def test_a_signature_that_json_cannot_call_is_an_error(function: Any) -> None:
    with pytest.raises(TypeError, match="only named parameters"):
        tool_definition(function)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTOSS_URL", raising=False)
    assert v1_url(None) == "http://127.0.0.1:8000/v1"
    assert [v1_url(u) for u in ("host:1", "http://host/v1/", "https://host/a")] == [
        "http://host:1/v1",
        "http://host/v1",
        "https://host/a/v1",
    ]
    monkeypatch.setenv("GPTOSS_URL", "http://other:9")
    assert v1_url(None) == "http://other:9/v1"


@contextmanager
def _transport(statuses: list[int]) -> Iterator[GptOss]:
    import httpx2

    def answer(request: httpx2.Request) -> httpx2.Response:
        status = statuses.pop(0)
        return httpx2.Response(status, json={"data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}]})

    with GptOss("http://none", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))) as client:
        yield client


def test_retries_are_openais(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    statuses = [503, 429, 200]
    with _transport(statuses) as client:
        assert client.model_id() == "m" and not statuses


def test_an_unhealthy_server_reports_why(url: str) -> None:
    report = httpx.get(f"{url}/health").json() | {"status": "unhealthy", "reasons": ["engine is dead: why"]}
    import httpx2

    transport = httpx2.MockTransport(lambda _: httpx2.Response(503, json=report))
    with GptOss("http://none", max_retries=0, http_client=httpx2.Client(transport=transport)) as client:
        assert client.health().reasons == ["engine is dead: why"]


def test_the_client_loads_nothing_of_the_server() -> None:
    code = "import sys, gptoss.client; print([m for m in sys.modules if m in ('torch', 'fastapi', 'starlette', 'zmq')])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "[]"
