"""uvicorn's HTTP protocol with limits that uvicorn itself does not have.

They apply to the time and size of headers, the time an answer waits for its client, the number of connections, in total
and per address, and the number of pipelined requests. Invalid HTTP gets an error in the API's own format.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from gptoss.api.http.error_responses import error_response
from gptoss.api.http.errors import ApiError, HeadersTooLarge, HeadersTooSlow, InvalidRequest, RateLimited, Unavailable
from gptoss.api.http.paths import ALWAYS_OPEN

logger = logging.getLogger(__name__)


HEALTH_CONNECTIONS = 32  # beyond max_connections, for /health and /ready only
HEALTH_TIMEOUT_S = 1.0  # for their headers
MIN_TAKEN_BYTES = 16 * 1024  # that a client must read of a waiting answer within send_timeout_s
MAX_PIPELINED = 32  # waiting requests of one connection
WARNING_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    header_timeout_s: float = 10.0
    max_header_bytes: int = 32_768
    send_timeout_s: float = 60.0
    max_connections: int = 4096
    max_connections_per_address: int = 0  # 0: no limit


@dataclass(slots=True)
class OpenConnections:
    """Counts the open connections of one server."""

    total: int = 0
    of_address: Counter[str] = field(default_factory=Counter)
    warned_at: float = -WARNING_INTERVAL_S

    def add(self, address: str) -> None:
        self.total += 1
        self.of_address[address] += 1

    def remove(self, address: str) -> None:
        self.total -= 1
        self.of_address[address] -= 1
        if not self.of_address[address]:
            del self.of_address[address]

    def warn(self, limit: int) -> None:
        if time.monotonic() - self.warned_at >= WARNING_INTERVAL_S:
            self.warned_at = time.monotonic()
            logger.warning("%d connections are open (max_connections): refusing more", limit)


def limited_protocol(its_limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """Returns a protocol class with these limits."""

    class Limited(HttpProtocol):
        limits = its_limits
        open_connections = OpenConnections()

    return Limited


class TooManyPipelined(Exception):
    """Stops the parser within the data it was given."""


class CountingTransport:
    """A transport that counts written bytes and reports its closing."""

    def __init__(self, transport: asyncio.Transport, on_close: Callable[[], None]) -> None:
        self._transport, self._on_close = transport, on_close
        self.num_written = 0

    def write(self, data: bytes) -> None:
        self.num_written += len(data)
        self._transport.write(data)

    def close(self) -> None:
        self._transport.close()
        self._on_close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


class HttpProtocol(HttpToolsProtocol):
    limits: ConnectionLimits
    open_connections: OpenConnections

    _address = ""
    _is_reserved = False  # beyond max_connections
    _timer: asyncio.TimerHandle | None = None
    _begun = False  # a request's headers have begun and not ended
    _num_bytes = 0  # of these headers, without the data that contained their beginning
    _unread: asyncio.TimerHandle | None = None
    _due_bytes = 0  # bytes that the client must have read when that timer ends
    _running: RequestResponseCycle | None = None  # the last one started
    _ignores_rest = False  # further requests are dropped; the last accepted one closes the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        counting: Any = CountingTransport(transport, self._watch_unread)
        super().connection_made(counting)
        self._address = self.client[0] if self.client else ""
        opened, limits = self.open_connections, self.limits
        opened.add(self._address)
        of_address = opened.of_address[self._address]
        if 0 < limits.max_connections_per_address < of_address:
            if of_address == limits.max_connections_per_address + 1:
                logger.warning("%s has %d connections: refusing more", self._address, of_address - 1)
            self._refuse(
                RateLimited(
                    f"There are {of_address - 1} connections from your address already.", code="rate_limit_exceeded"
                )
            )
        elif opened.total > limits.max_connections + HEALTH_CONNECTIONS:
            self._refuse(_too_many_connections())
        elif opened.total > limits.max_connections:
            opened.warn(limits.max_connections)
            self.app, self._is_reserved = _health_only(self.app), True
            self._await_headers()
        else:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._unread is not None:
            self._unread.cancel()
        self.open_connections.remove(self._address)
        super().connection_lost(exc)  # handles only the newest request
        self.pipeline.clear()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def _watch_unread(self) -> None:
        """Starts the timer within which the client must read part of the buffered data."""
        waiting = self.transport.get_write_buffer_size()
        if self._unread is None and waiting:
            written = self.transport.num_written  # type: ignore[attr-defined]
            self._due_bytes = min(written, written - waiting + MIN_TAKEN_BYTES)
            self._unread = self.loop.call_later(self.limits.send_timeout_s, self._check_taken)

    def _check_taken(self) -> None:
        self._unread = None
        taken = self.transport.num_written - self.transport.get_write_buffer_size()  # type: ignore[attr-defined]
        if taken >= self._due_bytes:
            self._watch_unread()
            return
        logger.warning(
            "%s did not read its answer for %g s: aborting the connection", self._address, self.limits.send_timeout_s
        )
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing() or self._ignores_rest:
            return
        within = self._begun
        super().data_received(data)
        if not within or not self._begun:
            return
        self._num_bytes += len(data)
        if self._num_bytes > self.limits.max_header_bytes:
            self._refuse(HeadersTooLarge(f"The headers have more than {self.limits.max_header_bytes} bytes."))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise TooManyPipelined
        super().on_message_begin()
        self._begun, self._num_bytes = True, 0
        if self._timer is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        self._begun = False
        self._stop_waiting()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = _without_chunks(app, cycle)
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.pipeline and not self._ignores_rest:  # super() has resumed reading
            self.flow.pause_reading()

    def send_400_response(self, msg: str) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._ignores_rest = True
            self.flow.resume_reading()  # a close with unread data would reset the connection
            self.cycle.keep_alive = False  # so that the client knows which requests to repeat
            return
        self._refuse(InvalidRequest(f"This is not a valid HTTP request: {msg}"))

    def _unsupported_upgrade_warning(self) -> None:
        """Does nothing: the request is handled as any other (RFC 9110, 7.8), and clients could fill the log."""

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _header_timeout_s(self) -> float:
        return HEALTH_TIMEOUT_S if self._is_reserved else self.limits.header_timeout_s

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(self._header_timeout_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._is_answering:  # the headers of a pipelined request may wait until this one is answered
            self._await_headers()
        elif self._begun:
            self._refuse(HeadersTooSlow(f"The headers did not arrive within {self._header_timeout_s:g} s."))
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Sends an error and closes; in the middle of another answer it only closes."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if not self._is_answering:
            self.transport.write(_response(error.status, error.body))
        self.transport.close()


def _without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """Makes bodies of unknown length end with the connection (RFC 9112, 6.1 and 6.3).

    HTTP/1.0 has no chunks, but uvicorn sends them to any client.
    """

    async def plain(scope: Scope, receive: Receive, send: Send) -> None:
        is_sized = True

        async def send_plain(message: Message) -> None:
            nonlocal is_sized
            if message["type"] == "http.response.start":
                is_sized = any(name.lower() == b"content-length" for name, _ in message["headers"])
                if not is_sized:
                    cycle.chunked_encoding = False
            elif not is_sized:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, send_plain)

    return plain


def _health_only(app: ASGIApp) -> ASGIApp:
    """The app for a connection beyond max_connections, which closes after one answer."""

    async def reserved(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        if scope["path"] in ALWAYS_OPEN:
            await app(scope, receive, send_and_close)
            return
        error = _too_many_connections()
        await error_response(scope, error)(scope, receive, send_and_close)

    return reserved


def _too_many_connections() -> Unavailable:
    return Unavailable("Too many connections are open.", code="overloaded", headers={"retry-after": "1"})


def _response(status: int, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return STATUS_LINE[status] + head % len(content) + content
