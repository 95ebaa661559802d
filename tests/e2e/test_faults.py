"""What happens when something dies."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess, running_server
from tests.support.waiting import wait_until

FLAGS = ("--model", str(checkpoint()), "--cpu-kv-cache-gib", "0.1")
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def client_of(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One that survives what the tests do to its engine."""
    with running_server(*FLAGS, "--engine-step-timeout-s", "3", "--max-engine-restarts", "20") as server:
        yield server


def test_a_killed_engine_ends_the_stream_and_serves_the_next_request(server: ServerProcess) -> None:
    before = server.stats()
    with client_of(server) as client:
        stream = client.chat.completions.create(
            model="gpt-oss-nano", messages=MESSAGES, stream=True, max_tokens=20_000, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        first_pid = server.stats()["engine"]["pid"]
        os.kill(first_pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="engine died"):
            for _ in chunks:
                pass
        assert httpx.get(f"{server.url}/ready").status_code == 503
        answer = client.chat.completions.create(model="gpt-oss-nano", messages=MESSAGES, max_tokens=5)
        assert answer.usage.completion_tokens == 5
        stats = server.stats()
        assert stats["engine"]["restarts"] == before["engine"]["restarts"] + 1
        assert stats["engine"]["pid"] != first_pid
        assert stats["requests"]["failed"] == before["requests"]["failed"] + 1
        assert httpx.get(f"{server.url}/ready").status_code == 200


def test_a_killed_server_leaves_no_orphan() -> None:
    with running_server(*FLAGS, "--no-warm-up") as server:
        engine = psutil.Process(server.stats()["engine"]["pid"])
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
        engine.wait(timeout=10)
        assert not engine.is_running()


def test_sigterm_ends_with_zero_and_takes_the_engine_along() -> None:
    with running_server(*FLAGS, "--no-warm-up") as server:
        engine = psutil.Process(server.stats()["engine"]["pid"])
        started = time.monotonic()
        assert server.stop() == 0, server.log
        assert time.monotonic() - started < 15
        assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE


def test_a_broken_checkpoint_is_an_error_and_not_a_restart_loop(tmp_path: Any) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in checkpoint().iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").write_bytes((checkpoint() / "model.safetensors").read_bytes()[:100_000])
    server = ServerProcess("--model", str(folder))
    assert server.process.wait(60) != 0
    assert "truncated or damaged" in server.log
    server.stop()


def test_a_hub_model_without_a_network_fails_fast_and_says_how_to_fetch_it(tmp_path: Any) -> None:
    started = time.monotonic()
    server = ServerProcess(
        "--model", "20b", env={"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    )
    assert server.process.wait(30) == 2
    assert time.monotonic() - started < 10
    assert "hf download openai/gpt-oss-20b" in server.log
    assert str(tmp_path) in server.log
    server.stop()


def test_a_stalled_engine_counts_as_dead(server: ServerProcess) -> None:
    restarts = server.stats()["engine"]["restarts"]
    with client_of(server) as client:
        stream = iter(
            client.chat.completions.create(
                model="gpt-oss-nano", messages=MESSAGES, stream=True, max_tokens=20_000, extra_body={"ignore_eos": True}
            )
        )
        next(stream)
        os.kill(server.stats()["engine"]["pid"], signal.SIGSTOP)
        with pytest.raises(openai.APIError, match="no step within 3 s"):
            for _ in stream:
                pass
        answer = client.chat.completions.create(model="gpt-oss-nano", messages=MESSAGES, max_tokens=3)
        assert answer.usage.completion_tokens == 3
        assert server.stats()["engine"]["restarts"] == restarts + 1


def test_an_idle_engine_is_not_stalled(server: ServerProcess) -> None:
    before = server.stats()["engine"]
    with client_of(server) as client:
        time.sleep(4)
        assert client.chat.completions.create(model="gpt-oss-nano", messages=MESSAGES, max_tokens=3).usage is not None
    engine = server.stats()["engine"]
    assert (engine["restarts"], engine["pid"]) == (before["restarts"], before["pid"])


def test_an_engine_that_cannot_come_back_is_given_up() -> None:
    with running_server(*FLAGS, "--max-engine-restarts", "0", "--no-warm-up") as server:
        os.kill(server.stats()["engine"]["pid"], signal.SIGKILL)
        wait_until(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        assert httpx.get(f"{server.url}/health").json()["status"] == "unhealthy"
        body = {"model": "gpt-oss-nano", "messages": MESSAGES}
        response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
        assert "retry-after" in response.headers
