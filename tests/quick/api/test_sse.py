from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest
from starlette.types import Message, Receive, Send

from gptoss import logging_setup
from gptoss.api.http.sse import EventStream, encode_event
from gptoss.config.schema import ServerConfig

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "asgi": {"spec_version": "2.3"}}
HOUR = 3600.0


@pytest.mark.parametrize("text", ["a\x85b", "a\u2028b\u2029c", "a\x0bb\x0cc\x1cd\r\ne", "é🙂\u2028"])
def test_an_event_is_one_line_by_any_reading(text: str) -> None:
    encoded = encode_event({"content": text}).decode()
    assert len(encoded.splitlines()) == 1
    assert json.loads(encoded) == {"content": text}


class Connection:
    """What a server passes to an application, and what came of it."""

    def __init__(self, on_body: Callable[[bytes], Any] | None = None) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self._on_body = on_body

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def receive(self) -> Receive:
        async def receive() -> Message:
            await self.gone.wait()
            return {"type": "http.disconnect"}

        return receive

    @property
    def send(self) -> Send:
        async def send(message: Message) -> None:
            self.sent.append(message)
            if self._on_body is not None and message.get("body"):
                await self._on_body(message["body"])

        return send


class Events:
    """A generator that tells how it ended."""

    def __init__(self, *events: bytes, then: Callable[[], Any] | None = None) -> None:
        self.ended = self.num_ends = 0
        self._events, self._then = events, then

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for event in self._events:
                yield event
            if self._then is not None:
                await self._then()
        finally:
            self.ended += 1

    def tell(self) -> None:
        self.num_ends += 1


def stream(events: Events, **settings: float) -> EventStream:
    return EventStream(events(), events.tell, ServerConfig(**settings))  # type: ignore[arg-type]


async def test_a_stream_is_its_events_and_an_end() -> None:
    events, connection = Events(b"data: 1\n\n", b"data: 2\n\n"), Connection()
    await stream(events)(SCOPE, connection.receive, connection.send)
    start, *parts = connection.sent
    headers = dict(start["headers"])
    assert start["status"] == 200
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"cache-control"] == b"no-cache" and b"content-length" not in headers
    assert headers[b"x-accel-buffering"] == b"no"
    assert [p["body"] for p in parts] == [b"data: 1\n\n", b"data: 2\n\n", b""]
    assert [p["more_body"] for p in parts] == [True, True, False]
    assert (events.ended, events.num_ends) == (1, 1)


async def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    events = Events(b"data: 1\n\n", then=lambda: asyncio.sleep(0.2))
    connection = Connection()
    await stream(events, keep_alive_s=0.05)(SCOPE, connection.receive, connection.send)
    assert connection.body.startswith(b"data: 1\n\n: keep-alive\n\n: keep-alive\n\n")


async def test_nothing_is_generated_for_a_client_that_went_away() -> None:
    events = Events(b"data: 1\n\n", then=lambda: asyncio.sleep(HOUR))

    async def leave(_: bytes) -> None:
        connection.gone.set()

    connection = Connection(leave)
    await asyncio.wait_for(stream(events)(SCOPE, connection.receive, connection.send), 5)
    assert (events.ended, events.num_ends) == (1, 1)


async def test_a_client_that_takes_nothing_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    events = Events(b"data: 1\n\n", b"data: 2\n\n")
    connection = Connection(lambda _: asyncio.sleep(HOUR))
    slow = stream(events, send_timeout_s=0.05)
    await asyncio.wait_for(slow(SCOPE, connection.receive, connection.send), 5)
    assert connection.body == b"data: 1\n\n" and (events.ended, events.num_ends) == (1, 1)
    assert "a client read nothing for 0.05 s" in caplog.text


async def test_what_fails_in_a_stream_is_raised_and_ends_it() -> None:
    async def fail() -> None:
        raise LookupError("lost")

    events, connection = Events(b"data: 1\n\n", then=fail), Connection()
    with pytest.raises(LookupError, match="lost"):
        await stream(events)(SCOPE, connection.receive, connection.send)
    assert (events.ended, events.num_ends) == (1, 1)


async def test_a_stream_that_cannot_begin_is_ended_too() -> None:
    async def broken(_: Message) -> None:
        raise OSError("no connection")

    events = Events(b"data: 1\n\n")
    with pytest.raises(OSError, match="no connection"):
        await stream(events)(SCOPE, Connection().receive, broken)
    assert events.num_ends == 1


async def test_no_log_level_tells_what_is_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    logging_setup.configure("debug", "text")
    try:
        connection = Connection()
        await stream(Events(b"data: private\n\n"))(SCOPE, connection.receive, connection.send)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert b"private" in connection.body
    assert "private" not in capsys.readouterr().err
