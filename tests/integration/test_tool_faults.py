"""Answers with tools in which something breaks: each ends in one terminal event, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gptoss.api.hosted.service import ToolService
from gptoss.engine.client.errors import QueueFullError
from tests.support.instant_engine import served
from tests.support.mcp_server import mcp_over_http
from tests.support.script import Dies, Line, call, say, think
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tiers import is_nightly, sized

SERVER = str(Path(__file__).parents[1] / "support" / "mcp_server.py")
TERMINAL = ("response.completed", "response.incomplete", "response.failed")
GARBAGE = [
    b"\0\xff\xfe" * 10,
    b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\nnot json!",
    b'HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: {"jsonrpc": 1}\n\n',
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{",
    b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
    b"",  # the connection stays open
]


@contextlib.contextmanager
def garbage() -> Iterator[str]:
    """The URL of a server that answers each connection with the next piece of garbage, and keeps some open."""
    bound = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []
    pieces = iter(GARBAGE * 1000)

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = bound.accept()
                connection.recv(65536)
                piece = next(pieces)
                with contextlib.suppress(OSError):
                    connection.sendall(piece)
                held.append(connection)
                if piece:
                    held.pop().close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/mcp"
    finally:
        bound.close()
        for connection in held:
            connection.close()


class Server:
    """The API with servers that break."""

    def __init__(self, engine: ScriptedEngine, url: str, service: ToolService, broken: str) -> None:
        self.engine, self.url, self.service, self.broken = engine, url, service, broken
        self.client = httpx.Client(base_url=url, timeout=30.0)

    def says(self, *lines: Line) -> None:
        self.engine.lines.clear()
        self.engine.lines.extend(lines)

    def is_idle(self) -> bool:
        stats = self.client.get("/metrics").text
        active = next(line for line in stats.splitlines() if line.startswith("gptoss_requests_active"))
        return active.endswith(" 0.0") and not self.service.background and not len(self.service.sessions)

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 20
        while not self.is_idle():
            assert time.monotonic() < deadline, "something is left"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    engine = ScriptedEngine()
    made: list[ToolService] = []
    original = ToolService.__init__

    def remember(self: ToolService, *given: Any) -> None:
        original(self, *given)
        made.append(self)

    own = {"own": {"command": [sys.executable, SERVER, "stdio"]}} if is_nightly() else {}
    with mcp_over_http() as url, garbage() as broken, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToolService, "__init__", remember)
        servers = {"calc": {"url": url}, "junk": {"url": broken}} | own
        settings: Any = {
            "mcp_servers": servers,
            "mcp_timeout_s": 15.0,
            "tool_timeout_s": 0.3,
            "allow_request_mcp_urls": True,
            "request_mcp_hosts": ["127.0.0.1"],
            "private_tool_networks": ["127.0.0.0/8"],
        }
        with served(engine=engine, **settings) as api:
            server = Server(engine, api, made[-1], broken)
            yield server
            server.client.close()
    assert not [one for one in psutil.Process().children(recursive=True) if SERVER in one.cmdline()]


def entry(label: str) -> dict[str, Any]:
    return {"type": "mcp", "server_label": label, "require_approval": "never"}


def ask(server: Server, label: str, *, read: int | None = None, **more: Any) -> list[str]:
    """The types of a stream's events. `read`: the client goes away after so many of them."""
    body = {"model": "gpt-oss-nano", "input": "Go", "tools": [entry(label) | more], "stream": True}
    kinds: list[str] = []
    with server.client.stream("POST", "/v1/responses", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: "):
                kinds.append(json.loads(line[6:])["type"])
                if len(kinds) == read:
                    return kinds
    return kinds


def scenario(server: Server, kind: str, rng: random.Random) -> None:
    """One answer in which one thing breaks."""
    label = "own" if kind == "process" else "junk" if kind in ("garbage", "garbage_url") else "calc"
    add = call(f"{label}__add", '{"a": 1, "b": 2}')
    lines: list[Line] = [think("Hm.") + add for _ in range(rng.randint(0, 2))]
    last: Line = say("Done.")
    more: dict[str, Any] = {}
    read: int | None = None
    match kind:
        case "process":
            lines.append(call("own__die", "{}"))
        case "timeout":
            lines.append(call("calc__sleep", '{"seconds": 60}'))
        case "error":
            lines.append(call("calc__fail", "{}"))
        case "arguments":
            lines.append(call("calc__add", rng.choice(["[]", "{", "\x00", '{"a":' * 500, ""])))
        case "client":
            lines += [add, call("calc__sleep", '{"seconds": 60}')]
            read = rng.randint(1, 16)
        case "engine":
            last = Dies(rng.choice(["", think("Hm."), "<|channel|>analysis", add.removesuffix("<|call|>")]))
        case "busy":
            lines.append(add)
            last = QueueFullError("too many", 1.0)
        case "garbage_url":
            more = {"server_url": server.broken}
    server.says(*lines, last)
    kinds = ask(server, label, read=read, **more)
    if read is None:
        assert [one for one in kinds if one in TERMINAL] == kinds[-1:], (kind, kinds)


# those that wait for processes and time limits run at night
KINDS = ("timeout", "error", "arguments", "client", "engine", "busy", "garbage_url", *sized((), ("process", "garbage")))


@pytest.mark.parametrize("round_", range(sized(1, 23)))
def test_whatever_breaks_one_terminal_event_ends_the_answer(server: Server, round_: int) -> None:
    rng = random.Random(round_)
    before = len(psutil.Process().children(recursive=True))  # other modules of this process may have servers
    for kind in KINDS:
        scenario(server, kind, rng)
        server.wait_until_idle()
    server.says(call("calc__add", '{"a": 1, "b": 2}'), say("3."))
    assert ask(server, "calc")[-1] == "response.completed"
    server.wait_until_idle()
    assert len(psutil.Process().children(recursive=True)) <= before


def test_a_cancelled_request_ends_while_its_tool_runs(server: Server) -> None:
    server.says(call("calc__sleep", '{"seconds": 60}'), say("No."))
    body = {"model": "gpt-oss-nano", "input": "Go", "tools": [entry("calc")], "stream": True}
    kinds: list[str] = []
    with server.client.stream("POST", "/v1/responses", json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                event = json.loads(line[6:])
                kinds.append(event["type"])
                if event["type"] == "response.created":
                    response_id = event["response"]["id"]
                if event["type"] == "response.mcp_call_arguments.done":
                    assert httpx.post(f"{server.url}/v1/cancel/{response_id}").status_code == 200
    assert kinds[-2:] == ["response.output_item.done", "response.failed"]
    server.wait_until_idle()
