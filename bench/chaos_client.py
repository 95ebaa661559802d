"""A hostile client: slow, huge, cut off, or gone, at random (chaos.py)."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx

from bench.soak import HANGS_AFTER_S, Client

CHAT = "/v1/chat/completions"
# how the server counts a client's outcome; it does not count others as requests
OUTCOMES = {
    "ok": "ok",
    "failed": "failed",
    "left": "cancelled",
    "cancelled": "cancelled",
    "bad": "rejected",
    "too large": "rejected",
    "cut off while sending": "rejected",
}
UNCOUNTED = ("unread", "headers")


class ChaosClient(Client):
    """A client of the soak test with more ways to misbehave."""

    def run(self) -> None:
        actions: dict[Callable[[httpx.Client], str], int] = {
            self.stream: 4,
            self.json: 3,
            self.leave: 3,
            self.cancel: 2,
            self.bad: 3,
            self.many: 1,
            self.read_slowly: 2,
            self.write_slowly: 2,
            self.cut: 2,
            self.oversized: 2,
            self.too_large: 1,
            self.unread: 1,
            self.large_headers: 1,
        }
        with httpx.Client(base_url=self._url, timeout=HANGS_AFTER_S) as session:
            while time.monotonic() < self._until:
                self.busy_since = time.monotonic()
                action = self._rng.choices(list(actions), list(actions.values()))[0]
                try:
                    result = action(session)
                except (httpx.HTTPError, OSError, json.JSONDecodeError) as error:
                    result = f"{action.__name__}: {type(error).__name__}"
                with self._lock:
                    self._counts[result] += 1

    def read_slowly(self, session: httpx.Client) -> str:
        body = self.body(stream=True)
        with session.stream("POST", CHAT, json=body) as response:
            if response.status_code != 200:
                return f"refused {response.status_code}"
            last = ""
            for number, line in enumerate(response.iter_lines()):
                if number < 20:
                    time.sleep(self._rng.random() / 5)
                if '"error"' in line[:20]:
                    return "failed"
                last = line or last
        return "ok" if last == "data: [DONE]" else "cut off"

    def write_slowly(self, session: httpx.Client) -> str:
        content = json.dumps(self.body()).encode()

        def parts() -> Any:
            for begin in range(0, len(content), 40):
                yield content[begin : begin + 40]
                time.sleep(0.05)

        headers = {"content-type": "application/json", "content-length": str(len(content))}
        return self._outcome(session.post(CHAT, content=parts(), headers=headers))

    def cut(self, _: httpx.Client) -> str:
        """Goes away in the middle of the body, half of the time with a reset."""
        with self._connection() as connection:
            connection.sendall(self._head(1000) + b'{"messages": [')
            time.sleep(0.05)
            if self._rng.random() < 0.5:
                linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        return "cut off while sending"

    def oversized(self, session: httpx.Client) -> str:
        """Inputs that do not fit: too many tokens, too deep, too many values."""
        hello = [{"role": "user", "content": "hello"}]
        body: dict[str, Any] = {"model": "gpt-oss-nano", "messages": hello}
        oversized = self._rng.choice(
            (
                {"messages": [{"role": "user", "content": "word " * 20_000}]},
                {"messages": [{"role": "user", "content": "x" * 200_000}]},
                {"stop": ["a"] * 1000},
                {"logprobs": True, "top_logprobs": 10**6},
                {"n": 10**6},
            )
        )
        deep = '{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}"
        content = deep if self._rng.random() < 0.2 else json.dumps(body | oversized)
        response = session.post(CHAT, content=content, headers={"content-type": "application/json"})
        return "bad" if response.status_code == 400 else f"oversized: {response.status_code}"

    def too_large(self, _: httpx.Client) -> str:
        with self._connection() as connection:
            connection.sendall(self._head(100 * 2**20) + b"{")
            status = connection.recv(4096).split(b" ")[1:2]
        return "too large" if status == [b"413"] else f"too large: {status}"

    def unread(self, _: httpx.Client) -> str:
        """Asks for large answers and reads none."""
        content = json.dumps({"model": "gpt-oss-nano", "prompt": "a b " * 4000}).encode()
        with self._connection() as connection, contextlib.suppress(TimeoutError, ConnectionError):
            connection.settimeout(1)
            for _ in range(self._rng.randint(1, 40)):
                connection.sendall(self._head(len(content), "/tokenize") + content)
            time.sleep(2 * self._rng.random())
        return "unread"

    def large_headers(self, session: httpx.Client) -> str:
        response = session.get("/v1/models", headers={"x-large": "x" * 40_000})
        return "headers" if response.status_code == 431 else f"headers: {response.status_code}"

    def _connection(self) -> socket.socket:
        url = httpx.URL(self._url)
        return socket.create_connection((url.host, url.port or 80), timeout=HANGS_AFTER_S)

    @staticmethod
    def _head(length: int, path: str = CHAT) -> bytes:
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {length}\r\n"
        return head.encode() + b"content-type: application/json\r\n\r\n"
