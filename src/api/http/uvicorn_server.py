"""uvicorn's HTTP protocol, and what it leaves open: how long headers may take, how long they may grow before they end,
how long an answer may wait for its client, how many connections there may be, and of one address, how many requests of
one connection may wait for their turn, and an answer in the API's own form for what is no HTTP."""

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

from gptoss.api.http.errors import (
    ApiError,
    HeadersTooLarge,
    HeadersTooSlow,
    InvalidRequest,
    RateLimited,
    Unavailable,
    error_response,
)
from gptoss.api.http.paths import ALWAYS_OPEN

logger = logging.getLogger(__name__)


HEALTH_CONNECTIONS = 32  # beyond max_connections, for /health and /ready alone
HEALTH_TIMEOUT_S = 1.0  # for their headers
MIN_TAKEN_BYTES = 16 * 1024  # of an answer that waits, within send_timeout_s
MAX_PIPELINED = 32  # requests of a connection that wait while an earlier one is answered
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
    """Those of one server."""

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
            logger.warning("%d connections are open (max_connections): more are refused", limit)


def limited_protocol(its_limits: ConnectionLimits) -> type[HttpToolsProtocol]:
    """The protocol with these limits."""

    class Limited(HttpProtocol):
        limits = its_limits
        open_connections = OpenConnections()

    return Limited


class TooManyPipelined(Exception):
    """Stops the parser within what it was given."""


class CountingTransport:
    """A transport that counts what is written and reports when it is closed."""

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
    _begun = False  # some of a request's headers are there, not all
    _num_bytes = 0  # of them, without those that came in one piece with their beginning
    _unread: asyncio.TimerHandle | None = None
    _due_bytes = 0  # what the client must have taken when that timer ends
    _running: RequestResponseCycle | None = None  # the last one started
    _ignores_rest = False  # further requests are dropped: the last accepted one closes

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        counting: Any = CountingTransport(transport, self._watch_unread)
        super().connection_made(counting)
        self._address = self.client[0] if self.client else ""
        opened, limits = self.open_connections, self.limits
        opened.add(self._address)
        of_address = opened.of_address[self._address]
        if 0 < limits.max_connections_per_address < of_address:
            if of_address == limits.max_connections_per_address + 1:
                logger.warning("%s has %d connections: more are refused", self._address, of_address - 1)
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
        super().connection_lost(exc)  # which knows the newest request alone
        self.pipeline.clear()
        if self._running is not None:
            self._running.disconnected = True
            self._running.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_unread()

    def _watch_unread(self) -> None:
        """Gives the client time to take a part of what waits for it."""
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
            "%s did not read its answer for %g s: the connection is aborted", self._address, self.limits.send_timeout_s
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
        if self.pipeline and not self._ignores_rest:  # it has resumed reading
            self.flow.pause_reading()

    def send_400_response(self, msg: str) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            self._ignores_rest = True
            self.flow.resume_reading()  # a close with unread data would reset the connection
            self.cycle.keep_alive = False  # so the client knows what to send again
            return
        self._refuse(InvalidRequest(f"This is no valid HTTP request: {msg}"))

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: the request is answered as any other (RFC 9110, 7.8), and its client could fill the log."""

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
        if self._is_answering:  # the next request is sent while this one is answered: that may wait
            self._await_headers()
        elif self._begun:
            self._refuse(HeadersTooSlow(f"The headers did not arrive within {self._header_timeout_s:g} s."))
        elif not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answers and closes. In the middle of another answer it can only close."""
        self._stop_waiting()
        if self.transport.is_closing():
            return
        if not self._is_answering:
            self.transport.write(_response(error.status, error.body))
        self.transport.close()


def _without_chunks(app: ASGIApp, cycle: RequestResponseCycle) -> ASGIApp:
    """An app whose bodies of unknown length end with the connection (RFC 9112, 6.1 and 6.3): HTTP/1.0 knows no
    chunks, and uvicorn sends them to any client."""

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
