"""HTTP as clients see it on the socket, from a small app behind our protocol."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gptoss.api.http.sse import EventStream
from gptoss.api.http.uvicorn_server import (
    HEALTH_CONNECTIONS,
    MAX_PIPELINED,
    ConnectionLimits,
    OpenConnections,
    limited_protocol,
)
from gptoss.api.middleware.head_as_get import HeadAsGet
from gptoss.config.schema import ServerConfig

ROOT = Path(__file__).resolve().parents[2]
LARGE = 16 * 2**20
LEFT = threading.Event()
EVENTS = [b"data: 1\n\n", b"data: \xc3\xa9\n\n", b"data: [DONE]\n\n"]


async def _stream(_: Request) -> Response:
    async def events() -> AsyncGenerator[bytes, None]:
        for event in EVENTS:
            yield event
            await asyncio.sleep(0.01)

    return EventStream(events(), lambda: None, ServerConfig())


async def _json(_: Request) -> Response:
    return JSONResponse({"a": 1})


async def _until_left(request: Request) -> Response:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    LEFT.set()
    return Response()


async def _large(_: Request) -> Response:
    return Response(b" " * LARGE)


@contextlib.contextmanager
def served(protocol: Any) -> Iterator[int]:
    routes = [
        Route("/stream", _stream, methods=["POST"]),
        Route("/json", _json, methods=["GET"]),
        Route("/large", _large, methods=["GET"]),
        Route("/until-left", _until_left, methods=["GET"]),
        Route("/health", _json, methods=["GET"]),
    ]
    app = Starlette(routes=routes)
    app.add_middleware(HeadAsGet)
    config = uvicorn.Config(app, http=protocol, ws="none", log_config=None, timeout_keep_alive=1)
    server = uvicorn.Server(config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            yield bound.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(limited_protocol(ConnectionLimits())) as port:
        yield port


@pytest.fixture(scope="module")
def strict() -> Iterator[tuple[int, OpenConnections]]:
    """A server with small limits, and what it has open."""
    protocol: Any = limited_protocol(ConnectionLimits(send_timeout_s=0.4, max_connections=3))
    with served(protocol) as port:
        yield port, protocol.open_connections


def exchange(port: int, *lines: str) -> tuple[bytes, list[bytes], bytes]:
    """-> (status line, header lines, body), all that comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall("\r\n".join([*lines, "", ""]).encode())
        received = b""
        with contextlib.suppress(TimeoutError):
            while part := client.recv(65536):
                received += part
    head, _, body = received.partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    return status, [line.lower() for line in headers], body


def named(headers: list[bytes], name: bytes) -> list[bytes]:
    return [line.partition(b": ")[2] for line in headers if line.startswith(name + b":")]


@pytest.mark.parametrize("more", [(), ("Connection: keep-alive",), ("Connection: close",)])
def test_a_stream_over_http_1_0_is_plain_events(port: int, more: tuple[str, ...]) -> None:
    status, headers, body = exchange(port, "POST /stream HTTP/1.0", "Content-Length: 0", *more)
    assert status.endswith(b"200 OK")
    assert body == b"".join(EVENTS)
    assert not named(headers, b"transfer-encoding") and not named(headers, b"content-length")
    assert named(headers, b"connection") == [b"close"]


def test_a_stream_that_is_to_close_has_one_connection_header(port: int) -> None:
    request = ("POST /stream HTTP/1.1", "Host: x", "Content-Length: 0", "Connection: close")
    _, headers, body = exchange(port, *request)
    assert named(headers, b"connection") == [b"close"]
    assert named(headers, b"transfer-encoding") == [b"chunked"] and body.endswith(b"0\r\n\r\n")


def test_a_json_answer_over_http_1_0_has_its_length(port: int) -> None:
    _, headers, body = exchange(port, "GET /json HTTP/1.0")
    assert named(headers, b"content-length") == [b"7"] and body == b'{"a":1}'


def test_head_is_get_without_the_body(port: int) -> None:
    close = ("Host: x", "Connection: close")
    got, given = (exchange(port, f"{m} /json HTTP/1.1", *close) for m in ("GET", "HEAD"))
    assert given[0] == got[0] and given[2] == b""
    assert named(given[1], b"content-length") == [b"7"]
    assert b"405" in exchange(port, "HEAD /stream HTTP/1.1", *close)[0]
    assert b"404" in exchange(port, "HEAD /nothing HTTP/1.1", *close)[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


GET = "GET {} HTTP/1.1\r\nHost: x\r\n\r\n"


def test_an_answer_that_its_client_does_not_read_is_given_up(
    strict: tuple[int, OpenConnections], caplog: pytest.LogCaptureFixture
) -> None:
    port, opened = strict
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(GET.format("/large").encode())
        wait_until(lambda: opened.total == 1)
        wait_until(lambda: opened.total == 0)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(2**20):
                received += len(part)
    assert received < LARGE
    assert "did not read its answer for 0.4 s: aborting the connection" in caplog.text


def test_a_client_that_sends_without_reading_is_closed(
    strict: tuple[int, OpenConnections], caplog: pytest.LogCaptureFixture
) -> None:
    """By the limit of pipelined requests, before the unread answers are many."""
    port, opened = strict
    with socket.create_connection(("127.0.0.1", port), timeout=0.5) as client:
        with contextlib.suppress(TimeoutError, ConnectionError):
            while True:
                client.sendall(GET.format("/json").encode() * 1000)
        wait_until(lambda: opened.total == 0)
        assert "Traceback" not in caplog.text
        client.settimeout(5)
        answers = b""
        with contextlib.suppress(ConnectionError):
            while part := client.recv(2**20):
                answers += part
    assert answers.startswith(b"HTTP/1.1 200")


def test_a_slow_reader_gets_all_of_its_answer(strict: tuple[int, OpenConnections]) -> None:
    port, _ = strict
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        client.settimeout(10)
        client.connect(("127.0.0.1", port))
        client.sendall(GET.format("/large").encode())
        started, received = time.monotonic(), 0
        while received < LARGE:
            received += len(client.recv(2**18))
            if received < LARGE // 2:
                time.sleep(0.02)
    assert time.monotonic() - started > 0.8, "longer than it may stand still"


def test_beyond_max_connections_only_health_is_answered(
    strict: tuple[int, OpenConnections], caplog: pytest.LogCaptureFixture
) -> None:
    port, opened = strict
    with contextlib.ExitStack() as held:
        for _ in range(3):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        wait_until(lambda: opened.total == 3)
        status, headers, body = exchange(port, "GET /json HTTP/1.1", "Host: x")
        assert b" 503 " in status and b"Too many connections are open." in body
        assert named(headers, b"retry-after") == [b"1"] and named(headers, b"connection") == [b"close"]
        status, headers, body = exchange(port, "GET /health HTTP/1.1", "Host: x")
        assert b" 200 " in status and body == b'{"a":1}'
        assert named(headers, b"connection") == [b"close"]
        assert caplog.text.count("3 connections are open (max_connections)") == 1
        for _ in range(HEALTH_CONNECTIONS):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        wait_until(lambda: opened.total == 3 + HEALTH_CONNECTIONS)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as refused:
            assert b" 503 " in refused.recv(4096)
    wait_until(lambda: opened.total == 0)
    assert b" 200 " in exchange(port, "GET /json HTTP/1.0")[0]


def test_connections_are_as_many_as_files_allow() -> None:
    code = (
        "import resource, sys; soft, hard, wanted = map(int, sys.argv[1:])\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))\n"
        "from gptoss.api.http.descriptors import allowed_connections\n"
        "try: print(allowed_connections(wanted), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
        "except Exception as error: print(type(error).__name__, error)"
    )

    def allowed(*limits: int) -> list[str]:
        command = [sys.executable, "-c", code, *map(str, limits)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return done.stdout.split(maxsplit=1)

    assert allowed(200, 200, 50) == ["50", "200\n"]
    count, raised = map(int, allowed(100, 400, 200))
    assert count == 200 and 264 < raised < 300
    count, raised = map(int, allowed(100, 200, 4096))
    assert 100 < count < 136 and raised == 200
    name, text = allowed(60, 60, 4096)
    assert name == "ConfigError" and "ulimit -n" in text


# --- several requests at once on one connection ---


@pytest.mark.parametrize("count", [2, MAX_PIPELINED + 1])
def test_pipelined_requests_are_all_answered(port: int, count: int) -> None:
    request = "GET /json HTTP/1.1\r\nHost: x\r\n"
    last = "GET /json HTTP/1.1\r\nHost: x\r\nConnection: close"
    status, _, body = exchange(port, *[request] * (count - 1), last)
    assert status.endswith(b"200 OK") and body.count(b"200 OK") == count - 1


def test_more_are_dropped_and_the_last_answer_says_so(port: int) -> None:
    status, _, body = exchange(port, *["GET /json HTTP/1.1\r\nHost: x\r\n"] * 10_000)
    answers = body.split(b"HTTP/1.1 ")
    assert status.endswith(b"200 OK") and len(answers) == MAX_PIPELINED + 1
    assert [b"connection: close" in answer.lower() for answer in answers[-2:]] == [False, True]


def test_a_client_that_leaves_ends_the_request_before_the_last(port: int, caplog: pytest.LogCaptureFixture) -> None:
    LEFT.clear()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b"GET /until-left HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        time.sleep(0.1)
    assert LEFT.wait(5)
    time.sleep(0.1)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_upgrade_is_answered_as_a_request(port: int) -> None:
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    status, _, body = exchange(port, "GET /json HTTP/1.1", "Host: x", *upgrade)
    assert status.endswith(b"200 OK") and body == b'{"a":1}'
