"""A model over two hosts, which are two addresses of this machine."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess, free_port
from tests.support.waiting import wait_until

pytestmark = pytest.mark.nightly
BODY: dict[str, Any] = {
    "model": "gpt-oss-nano",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 40,
    "temperature": 1.0,
    "seed": 3,
    "ignore_eos": True,
}


@contextlib.contextmanager
def host(rank: int, flags: list[str], env: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    own = ["--node-rank", str(rank), "--node-addr", f"127.0.0.{rank + 1}"] if env is None else []
    server = ServerProcess(*flags, *own, env=env)
    try:
        yield server
    finally:
        server.end()


def layout(port: int) -> list[str]:
    keys = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [*shared(), *keys]


def shared() -> list[str]:
    folder = str(checkpoint())
    more = ["--tensor-parallel-size", "2", "--max-request-resumes", "5", "--max-engine-restarts", "20"]
    return ["--model", folder, "--cpu-kv-cache-gib", "0.1", "--num-threads", "1", *more]


def ask(server: ServerProcess) -> str:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=180)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"])


def test_a_host_that_is_back_is_used_again() -> None:
    flags = layout(free_port())
    with host(0, flags) as server:
        with host(1, flags) as other:
            server.wait_ready()
            first = ask(server)
            other.process.send_signal(signal.SIGKILL)
            other.process.wait()
            wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
            wait_until(lambda: "host 1 (127.0.0.2) is gone" in server.log)
        with host(1, flags) as other:
            server.wait_ready()
            assert ask(server) == first
            other.process.send_signal(signal.SIGTERM)
            assert other.process.wait(20) == 0
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 200 and health.json()["status"] == "degraded"


def test_hosts_that_torchrun_starts() -> None:
    env = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env |= {"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    with host(1, shared(), env | {"GROUP_RANK": "1"}), host(0, shared(), env | {"GROUP_RANK": "0"}) as server:
        server.wait_ready()
        assert ask(server)


def test_a_host_with_other_keys_ends_with_the_reason() -> None:
    flags = layout(free_port())
    with host(0, flags), host(1, [*flags, "--max-num-seqs", "3"]) as other:
        assert other.process.wait(60) == 1
        assert "host 0 refuses this host: max_num_seqs is 3 there" in other.log
