"""smg in front of two servers of nano: what arrives, what does not, and where conversations go."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.server_process import ServerProcess, free_port, running_server

KEY = "k" * 24
FLAGS = ("--model", "nano", "--num-threads", "1", "--cpu-kv-cache-gib", "0.2", "--api-key", KEY)
HELLO = [{"role": "user", "content": "What is 12 + 30?"}]


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ServerProcess]]:
    with running_server(*FLAGS) as one, running_server(*FLAGS) as other:
        yield [one, other]


@pytest.fixture(scope="module")
def gateway(servers: list[ServerProcess]) -> Iterator[httpx.Client]:
    port = free_port()
    command = [os.environ["SMG"], "launch", "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    command += ["--prometheus-port", str(free_port()), "--policy", "cache_aware"]
    running = subprocess.Popen(
        [*command, "--worker-urls", *(server.url for server in servers)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120, trust_env=False) as client:
        deadline = time.monotonic() + 90
        while True:
            with contextlib.suppress(httpx.TransportError):
                if client.get("/v1/models").json().get("data"):
                    break
            assert time.monotonic() < deadline and running.poll() is None
            time.sleep(0.3)
        yield client
    running.terminate()
    running.wait(30)


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "gpt-oss-nano", "messages": HELLO, "max_tokens": 60, "temperature": 0, **more}


def test_every_endpoint_answers(gateway: httpx.Client) -> None:
    answer = gateway.post("/v1/chat/completions", json=chat()).raise_for_status().json()
    assert "42" in answer["choices"][0]["message"]["content"]
    body = {"model": "gpt-oss-nano", "input": "What is 12 + 30?"}
    assert gateway.post("/v1/responses", json=body).raise_for_status().json()["status"] == "completed"
    message = {"model": "gpt-oss-nano", "max_tokens": 60, "messages": HELLO}
    assert gateway.post("/v1/messages", json=message).raise_for_status().json()["stop_reason"] == "end_turn"
    count = {"model": "gpt-oss-nano", "messages": HELLO}
    assert gateway.post("/v1/messages/count_tokens", json=count).raise_for_status().json()["input_tokens"] > 10
    with gateway.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as stream:
        assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"


@pytest.mark.parametrize(
    "field, value", [("profile", "nix"), ("reasoning_budget", "x"), ("cache_salt", 5), ("priority", "x")]
)
def test_our_fields_arrive_on_chat(gateway: httpx.Client, field: str, value: object) -> None:
    """The server refuses their wrong values by name."""
    error = gateway.post("/v1/chat/completions", json=chat(**{field: value}))
    assert error.status_code == 400 and error.json()["error"]["param"] == field


def test_our_fields_do_not_arrive_on_responses(gateway: httpx.Client) -> None:
    """smg 1.13 refuses them itself: choose the server's profile instead."""
    error = gateway.post("/v1/responses", json={"model": "gpt-oss-nano", "input": "hi", "profile": "balanced"})
    assert error.status_code == 400 and "unknown field `profile`" in error.text


def test_x_api_key_does_not_arrive(gateway: httpx.Client) -> None:
    """Claude Code must use ANTHROPIC_AUTH_TOKEN behind it."""
    body = {"model": "gpt-oss-nano", "max_tokens": 20, "messages": HELLO}
    answer = httpx.post(f"{gateway.base_url}/v1/messages", json=body, headers={"x-api-key": KEY}, timeout=60)
    assert answer.status_code == 401


def test_conversations_stay_with_their_server(gateway: httpx.Client, servers: list[ServerProcess]) -> None:
    for conversation in range(4):
        for turn in range(4):
            content = f"{conversation} " + "alpha bravo charlie " * 60 + f"{turn}"
            answer = gateway.post("/v1/chat/completions", json=chat(messages=[{"role": "user", "content": content}]))
            cached = answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached >= 128) == (turn > 0), (conversation, turn, cached)
    headers = {"Authorization": f"Bearer {KEY}"}
    for server in servers:
        assert httpx.get(f"{server.url}/stats", headers=headers).json()["requests"]["ok"] > 3


def test_what_schedulers_scrape_is_there(servers: list[ServerProcess]) -> None:
    """The endpoint picker of Kubernetes' Gateway API inference extension, and llm-d's."""
    text = httpx.get(f"{servers[0].url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
    for name in ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "cache_config_info"):
        assert f"\nvllm:{name}{{" in text, name
    assert 'block_size="64"' in text and 'num_gpu_blocks="' in text
