"""A server with two engines."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess, running_server
from tests.support.tiers import sized
from tests.support.waiting import wait_until

FLAGS = ("--model", str(checkpoint()), "--cpu-kv-cache-gib", "0.1", "--data-parallel-size", "2")
MORE = ("--max-request-resumes", "1", "--max-engine-restarts", "50", "--max-num-seqs", "8")
KILLS = sized(1, nightly=20)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(*FLAGS, *MORE) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def engines(server: ServerProcess) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.stats()["engines"]
    return found


def asked(seed: int, max_tokens: int) -> dict[str, Any]:
    return {
        "model": "gpt-oss-nano",
        "messages": [{"role": "user", "content": f"Hi {seed % 4}"}],
        "max_tokens": max_tokens,
        "temperature": 1.0,
        "seed": seed % 4,
        "extra_body": {"ignore_eos": True, "top_k": 50},
    }


def streamed(client: openai.OpenAI, seed: int, max_tokens: int) -> str:
    text = ""
    for chunk in client.chat.completions.create(stream=True, **asked(seed, max_tokens)):
        for choice in chunk.choices:
            delta = choice.delta.model_dump()
            text += (delta.get("reasoning_content") or "") + (delta.get("content") or "")
    return text


def test_each_engine_gives_the_same_answers(server: ServerProcess, client: openai.OpenAI) -> None:
    before = [engine["num_steps_total"] for engine in engines(server)]
    with ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(lambda seed: streamed(client, seed, 30), range(16)))
    assert [len(set(texts[i::4])) for i in range(4)] == [1, 1, 1, 1] and len(set(texts)) == 4
    after = [engine["num_steps_total"] for engine in engines(server)]
    assert all(b > a for a, b in zip(before, after, strict=True))


def test_figures_are_sums_and_each_engines_own(server: ServerProcess) -> None:
    stats = server.wait_idle()
    assert stats["engine"]["state"] == "ready"
    assert stats["engine"]["num_blocks"] == sum(one["num_blocks"] for one in stats["engines"])
    assert stats["prefix_cache"]["queried_tokens"] == sum(one["num_prefix_queried_total"] for one in stats["engines"])
    text = httpx.get(f"{server.url}/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in ("gptoss_engine_steps", "gptoss_engine_ready", "vllm:num_requests_running", "vllm:prefix_cache_hits"):
        assert {sample.labels["engine"] for sample in families[name].samples} == {"0", "1"}, name
    found = {s.labels["engine"]: s.value for s in families["gptoss_engine_steps"].samples}
    assert [found["0"], found["1"]] == [one["num_steps_total"] for one in stats["engines"]]


def test_a_conversation_stays_where_its_beginning_is_cached(server: ServerProcess, client: openai.OpenAI) -> None:
    beginnings = [f"You are assistant {i}. " + "Answer briefly and name your sources. " * 30 for i in range(4)]
    before = engines(server)
    for turn in range(3):
        for beginning in beginnings:
            messages: Any = [{"role": "system", "content": beginning}, {"role": "user", "content": f"Question {turn}"}]
            answer = client.chat.completions.create(model="gpt-oss-nano", messages=messages, max_tokens=4)
            assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
            assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 128 * (turn > 0)
    hits = [b["num_prefix_hit_total"] - a["num_prefix_hit_total"] for a, b in zip(before, engines(server), strict=True)]
    assert all(hits), "each engine has two of them"


def test_the_others_go_on_when_an_engine_dies(server: ServerProcess, client: openai.OpenAI) -> None:
    expected = [streamed(client, seed, 100) for seed in range(4)]
    for number in range(KILLS):
        victim, before = number % 2, server.stats()
        with ThreadPoolExecutor(8) as pool:
            answers = [pool.submit(streamed, client, seed, 100) for seed in range(8)]
            wait_until(lambda: all(engine["num_running"] for engine in engines(server)))
            os.kill(before["engines"][victim]["pid"], signal.SIGKILL)
            wait_until(lambda victim=victim: engines(server)[victim]["state"] != "ready")  # type: ignore[misc]
            health = httpx.get(f"{server.url}/health")
            assert httpx.get(f"{server.url}/ready").status_code == health.status_code == 200
            assert health.json()["status"] == "degraded" and health.json()["engine"] == "ready"
            assert f"engine {victim} is restarting" in health.json()["reasons"]
            assert [answer.result() for answer in answers] == expected * 2
        wait_until(lambda victim=victim: engines(server)[victim]["state"] == "ready", 60)  # type: ignore[misc]
        after = server.wait_idle()
        assert after["requests"]["failed"] == before["requests"]["failed"]
        assert after["requests"]["ok"] == before["requests"]["ok"] + 8
        assert after["engine"]["resumed_requests"] > before["engine"]["resumed_requests"]
        restarts = [b["restarts"] - a["restarts"] for a, b in zip(before["engines"], after["engines"], strict=True)]
        assert restarts == [int(i == victim) for i in range(2)]
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


def test_requests_of_both_engines_can_be_cancelled(server: ServerProcess, client: openai.OpenAI) -> None:
    streams = [client.chat.completions.create(stream=True, **asked(i, 10_000)) for i in range(4)]
    ids = [next(stream).id for stream in streams]
    wait_until(lambda: [engine["num_running"] for engine in engines(server)] == [2, 2])
    for request_id, stream in zip(ids, streams, strict=True):
        assert httpx.post(f"{server.url}/v1/cancel/{request_id}").status_code == 200
        with pytest.raises(openai.APIError, match="cancelled"):
            for _ in stream:
                pass
    server.wait_idle()


def test_a_stored_response_is_continued_by_any_engine(client: openai.OpenAI) -> None:
    first = client.responses.create(model="gpt-oss-nano", input="Hi", max_output_tokens=40)
    second = client.responses.create(
        model="gpt-oss-nano", input="And now?", previous_response_id=first.id, max_output_tokens=8
    )
    assert second.usage is not None and second.usage.input_tokens > first.usage.input_tokens


def test_choices_of_one_request_run_on_both_engines(server: ServerProcess, client: openai.OpenAI) -> None:
    before = [engine["num_steps_total"] for engine in engines(server)]
    answer = client.chat.completions.create(n=6, **asked(1, 20))
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert answer.usage is not None and answer.usage.completion_tokens == 120
    assert all(b > a for a, b in zip(before, [e["num_steps_total"] for e in engines(server)], strict=True))


def test_one_drain_waits_for_both_engines(server: ServerProcess, client: openai.OpenAI) -> None:
    """The last test: it ends the server."""
    streams = [client.chat.completions.create(stream=True, **asked(i, 200)) for i in range(4)]
    for stream in streams:
        next(stream)
    wait_until(lambda: [engine["num_running"] for engine in engines(server)] == [2, 2], 5)
    server.process.send_signal(signal.SIGTERM)
    assert [sum(len(chunk.choices) for chunk in stream) > 1 for stream in streams] == [True] * 4
    assert server.process.wait(20) == 0, server.log
