"""HTTP as clients see it on the socket, from a small app behind our protocol."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncGenerator, Iterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from src.api.app import HeadAsGet
from src.api.http_protocol import limited_protocol
from src.api.streaming import EventStream
from src.config import ServerConfig

EVENTS = [b"data: 1\n\n", b"data: \xc3\xa9\n\n", b"data: [DONE]\n\n"]


async def _stream(_: Request) -> Response:
    async def events() -> AsyncGenerator[bytes, None]:
        for event in EVENTS:
            yield event
            await asyncio.sleep(0.01)

    return EventStream(events(), lambda: None, ServerConfig())


async def _json(_: Request) -> Response:
    return JSONResponse({"a": 1})


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    app = Starlette(
        routes=[Route("/stream", _stream, methods=["POST"]), Route("/json", _json, methods=["GET"])]
    )
    app.add_middleware(HeadAsGet)
    config = uvicorn.Config(app, http=limited_protocol(10, 32_768, 0), log_config=None)
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
