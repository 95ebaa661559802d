"""What tests of a server's operation send, and waiting for it."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

FLAGS = ("--model", str(checkpoint()), "--cpu-kv-cache-gib", "0.1", "--max-model-len", "8192")
BODY: dict[str, Any] = {
    "model": "gpt-oss-nano",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 8,
    "seed": 1,
}
ENDLESS = {**BODY, "max_tokens": 7000, "ignore_eos": True}


def post(
    server: ServerProcess, key: str | None = None, path: str = "/v1/chat/completions", **more: Any
) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}{path}", json=BODY | more, headers=headers, timeout=60)


def wait_running(server: ServerProcess, count: int = 1, **headers: str) -> None:
    wait_until(lambda: httpx.get(f"{server.url}/stats", headers=headers).json()["engine"]["num_running"] >= count)
