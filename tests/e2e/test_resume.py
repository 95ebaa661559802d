"""Requests whose engine dies, on a server that lets them go on in the next one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess, running_server
from tests.support.waiting import wait_until

FLAGS = ("--model", str(checkpoint()), "--cpu-kv-cache-gib", "0.1", "--max-request-resumes", "1")
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
LONG: Any = {
    "model": "gpt-oss-nano",
    "messages": MESSAGES,
    "max_tokens": 300,
    "temperature": 1.0,
    "seed": 5,
    "extra_body": {"ignore_eos": True, "top_k": 50},
}
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 40, "maxItems": 40}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(*FLAGS, "--max-engine-restarts", "50") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def kill_engine(server: ServerProcess) -> None:
    os.kill(server.stats()["engine"]["pid"], signal.SIGKILL)


def wait_for_steps(server: ServerProcess, count: int) -> None:
    """More of them than there were."""
    first = server.stats()["engine"]["num_steps_total"]
    wait_until(lambda: server.stats()["engine"]["num_steps_total"] >= first + count, 30)


def wait_until_red(server: ServerProcess) -> None:
    wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)


def wait_for_another(server: ServerProcess, restarts: int) -> None:
    """Until the engine that follows so many restarts serves."""

    def serves() -> bool:
        engine = server.stats()["engine"]
        return engine["restarts"] > restarts and engine["state"] == "ready"

    wait_until(serves, 60)


def pieces(chunks: Any) -> Iterator[tuple[str, str]]:
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            yield delta.get("reasoning_content") or "", delta.get("content") or ""


def text(chunks: Any) -> str:
    return "|".join(map("".join, zip(*pieces(chunks), strict=True)))


def test_a_stream_goes_on_as_if_nothing_had_happened(server: ServerProcess, client: openai.OpenAI) -> None:
    whole = text(client.chat.completions.create(stream=True, **LONG))
    before = server.stats()
    stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **LONG)
    chunks = []
    for chunk in stream:
        chunks.append(chunk)
        if len(chunks) == 1:
            wait_for_steps(server, 40)
            kill_engine(server)
            wait_until_red(server)
    assert text(chunks) == whole
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 300
    assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens
    after = server.wait_idle()
    assert after["engine"]["resumed_requests"] == before["engine"]["resumed_requests"] + 1
    assert after["engine"]["restarts"] == before["engine"]["restarts"] + 1
    assert after["requests"]["failed"] == before["requests"]["failed"]
    assert after["requests"]["ok"] == before["requests"]["ok"] + 1
    assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_grammar_goes_on_where_it_was(server: ServerProcess, client: openai.OpenAI) -> None:
    asked: Any = {
        "model": "gpt-oss-nano",
        "messages": MESSAGES,
        "seed": 3,
        "max_tokens": 2000,
        "extra_body": {"top_k": 50, "reasoning_budget": 20},
        "reasoning_effort": "low",
        "response_format": {"type": "json_schema", "json_schema": {"name": "numbers", "schema": NUMBERS}},
    }

    def ask(**more: Any) -> Any:
        answer = client.chat.completions.create(**asked | more)
        return answer.choices[0].message.content, answer.choices[0].finish_reason

    whole = ask()
    assert len(json.loads(whole[0])) == 40 and whole[1] == "stop"
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, seed=3 + i % 2) for i in range(4)]
        wait_until(lambda: server.stats()["engine"]["num_running"] == 4)
        wait_for_steps(server, 10)
        kill_engine(server)
        found = [answer.result() for answer in answers]
    assert found[0] == found[2] == whole and found[1] == found[3] != whole
    assert len(json.loads(found[1][0])) == 40


def test_what_no_engine_has_begun_is_not_lost(server: ServerProcess) -> None:
    body = {"model": "gpt-oss-nano", "messages": MESSAGES, "max_tokens": 4}
    restarts = server.stats()["engine"]["restarts"]
    engine = server.stats()["engine"]["pid"]
    os.kill(engine, signal.SIGSTOP)
    with ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body, timeout=60) for _ in range(8)
        ]
        wait_until(lambda: server.stats()["requests"]["active"] == 8)
        os.kill(engine, signal.SIGKILL)
        assert [answer.result().status_code for answer in answers] == [200] * 8
    wait_for_another(server, restarts)
    server.wait_idle()


def test_a_second_death_ends_it(server: ServerProcess, client: openai.OpenAI) -> None:
    restarts = server.stats()["engine"]["restarts"]
    stream = client.chat.completions.create(stream=True, **LONG | {"max_tokens": 20_000})
    next(stream)
    kill_engine(server)
    wait_for_another(server, restarts)
    kill_engine(server)
    with pytest.raises(openai.APIError, match="engine died"):
        for _ in stream:
            pass
    wait_for_another(server, restarts + 1)
    server.wait_idle()


def test_a_request_is_cancelled_while_no_engine_is_there(server: ServerProcess, client: openai.OpenAI) -> None:
    before = server.stats()
    stream = client.chat.completions.create(stream=True, **LONG | {"max_tokens": 20_000})
    first = next(stream)
    kill_engine(server)
    wait_until_red(server)
    assert httpx.post(f"{server.url}/v1/cancel/{first.id}").status_code == 200
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert caught.value.code == "request_cancelled"
    wait_for_another(server, before["engine"]["restarts"])
    assert server.wait_idle()["requests"]["cancelled"] == before["requests"]["cancelled"] + 1


def test_a_client_that_leaves_meanwhile_is_forgotten(server: ServerProcess, client: openai.OpenAI) -> None:
    restarts = server.stats()["engine"]["restarts"]
    stream = client.chat.completions.create(stream=True, **LONG | {"max_tokens": 20_000})
    next(stream)
    kill_engine(server)
    stream.close()
    wait_for_another(server, restarts)
    assert server.wait_idle()["engine"]["num_steps_total"] == 0
