"""What an outsider can do to a server: only what docs/security.md says.

Tests share two servers: `server`, which is open (with debug endpoints), and `keyed`, which asks for a key. A test that needs
another configuration should check it without a server (tests/unit/test_access.py) where it can.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers import checkpoint
from tests.server_process import PYTHON, ROOT, ServerProcess, running_server

FLAGS = ("--model", str(checkpoint()), "--cpu-kv-cache-gib", "0.1", "--max-model-len", "8192")
BODY: dict[str, Any] = {
    "model": "gpt-oss-nano", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "seed": 1,
}  # fmt: skip
KEYS = "- {name: alice, key: key-of-alice}\n- {name: bob, key: key-of-bob}\n"
ALICE, BOB = ({"authorization": f"Bearer key-of-{name}"} for name in ("alice", "bob"))


@dataclass(frozen=True)
class Keyed:
    """A server that knows alice and bob, and its keys file."""

    server: ServerProcess
    keys_file: Path

    @property
    def url(self) -> str:
        return self.server.url

    def reload(self, text: str, logged: str) -> None:
        """Writes the keys file, sends SIGHUP and waits for a new line in the log."""
        before = self.server.log.count(logged)
        self.keys_file.write_text(text)
        self.server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.server.log.count(logged) > before)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(KEYS)
    with running_server(*FLAGS, "--api-keys-file", str(file)) as server:
        yield Keyed(server, file)


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def said(server: ServerProcess, *head: bytes) -> bytes:
    """What the server answers to a request of these headers, which no HTTP client would send, until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"".join(head) + b"\r\nconnection: close\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def failed_start(*flags: str, **environment: str) -> str:
    """What a server that refuses to start writes; fails if it starts or shows a traceback."""
    done = subprocess.run(
        [os.environ.get(PYTHON, sys.executable), "src/server.py", "--port", "0", *flags],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


class TestKeys:
    """Keys that are configured are asked for, whatever becomes of them."""

    def test_a_server_does_not_start_with_keys_that_come_out_empty(self, tmp_path: Path) -> None:
        file = tmp_path / "keys.yaml"
        file.write_text("[]")
        assert "holds no key" in failed_start("--api-keys-file", str(file))
        assert "GPTOSS_API_KEY): an empty or blank key" in failed_start(GPTOSS_API_KEY="")

    @pytest.mark.parametrize("text", ["[]", "", "{}", "- {name: alice, key: '        '}", "- ["])
    def test_keys_that_come_out_empty_at_a_reload_change_nothing(
        self, keyed: Keyed, text: str
    ) -> None:
        keyed.reload(text, "keys not reloaded")
        assert httpx.get(f"{keyed.url}/v1/models").status_code == 401
        assert httpx.get(f"{keyed.url}/v1/models", headers=ALICE).status_code == 200
        keyed.reload(KEYS, "keys reloaded: 2")

    @pytest.mark.parametrize("key", [b"\xa0", b"\xa0 \xa0", b"\x85", b" \t ", b""])
    @pytest.mark.parametrize("header", [b"authorization: Bearer ", b"x-api-key: ", b"api-key: "])
    def test_a_blank_key_is_no_key(self, keyed: Keyed, header: bytes, key: bytes) -> None:
        answer = said(keyed.server, b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n", header + key)
        assert b" 401 " in answer.partition(b"\r\n")[0]
