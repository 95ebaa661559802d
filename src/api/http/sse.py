"""Responses whose generation stops when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

import msgspec
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gptoss.config.schema import ServerConfig

logger = logging.getLogger(__name__)

# Line breaks in Unicode but not in server-sent events; clients that use str.splitlines would split events there.
_UNICODE_BREAKS = tuple((c.encode(), b"\\u%04x" % ord(c)) for c in "\x85\u2028\u2029")


class Renderer(Protocol):
    """Renders an answer in an endpoint's wire format."""

    def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, ready to send."""

    async def collect(self) -> bytes:
        """The whole answer as one JSON body."""


KEEP_ALIVE = ServerSentEvent(comment="keep-alive", sep="\n")
DONE = b"data: [DONE]\n\n"


def encode_event(value: Any) -> bytes:
    """JSON on one line, whichever characters a client treats as line breaks."""
    text: bytes = msgspec.json.encode(value)
    for char, escape in _UNICODE_BREAKS:
        if char in text:
            text = text.replace(char, escape)
    return text


def respond(
    renderer: Renderer,
    on_end: Callable[[], None],
    config: ServerConfig,
    *,
    streams: bool,
    keep_alive: ServerSentEvent = KEEP_ALIVE,
) -> Response:
    """The answer as a stream or as one body. `on_end` is always called when the response ends."""
    if streams:
        return EventStream(renderer.stream(), on_end, config, keep_alive)
    return JsonWhenDone(renderer.collect, on_end)


class EventStream(EventSourceResponse):
    """Sends encoded events. The generator is closed when the client disconnects or stops reading."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_end: Callable[[], None],
        config: ServerConfig,
        keep_alive: ServerSentEvent = KEEP_ALIVE,
    ) -> None:
        """`on_end` is always called when the response ends, even if no event was requested."""
        super().__init__(
            events,
            headers={"cache-control": "no-cache"},
            ping=config.keep_alive_s,
            ping_message_factory=lambda: keep_alive,
            sep="\n",
            send_timeout=config.send_timeout_s,
        )
        del self.headers["connection"]  # set by the HTTP protocol
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            logger.warning("a client read nothing for %g s: ending its answer", self.send_timeout)
        finally:
            self._on_end()


class JsonWhenDone(Response):
    """A JSON body that takes time to compute. The work is cancelled when the client disconnects."""

    media_type = "application/json"

    def __init__(self, work: Callable[[], Awaitable[bytes]], on_end: Callable[[], None]) -> None:
        """`on_end` is always called when the response ends, even if the work never began."""
        super().__init__(b"")
        self._work = work
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run() -> bytes:
            return await self._work()

        task = asyncio.create_task(run())
        try:
            await _until_disconnect(task, receive)
        finally:
            self._on_end()
        if task.cancelled():
            return
        self.body = task.result()
        self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


async def _until_disconnect(task: asyncio.Task[object], receive: Receive) -> None:
    """Waits for the task, or cancels it when the client disconnects."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.create_task(disconnected())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for other in (watcher, task):
            if not other.done():
                other.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await other
