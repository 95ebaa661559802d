"""uvicorn's HTTP protocol, and what it leaves open: how long headers may take, how long they may grow before they end,
how many connections one address may have, and an answer in the API's own form for what is no HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from src.api.errors import ApiError, HeadersTooLarge, HeadersTooSlow, InvalidRequest, RateLimited

logger = logging.getLogger(__name__)


def limited_protocol(
    timeout_s: float, max_bytes: int, max_connections: int
) -> type[HttpToolsProtocol]:
    """The protocol with these limits for the headers of a request, and for the connections of an address (0: none)."""

    class Limited(HttpProtocol):
        header_timeout_s = timeout_s
        max_header_bytes = max_bytes
        max_connections_per_address = max_connections
        num_connections: Counter[str] = Counter()

    return Limited


class HttpProtocol(HttpToolsProtocol):
    header_timeout_s: float
    max_header_bytes: int
    max_connections_per_address: int
    num_connections: Counter[str]  # of each address that has any

    _address = ""
    _timer: asyncio.TimerHandle | None = None
    _begun = False  # some of a request's headers are there, not all
    _num_bytes = 0  # of them, without those that came in one piece with their beginning

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self.num_connections[self._address] += 1
        limit = self.max_connections_per_address
        if 0 < limit < self.num_connections[self._address]:
            if self.num_connections[self._address] == limit + 1:
                logger.warning("%s has %d connections: more are refused", self._address, limit)
            self._refuse(
                RateLimited(
                    f"There are {limit} connections from your address already.",
                    code="rate_limit_exceeded",
                )
            )
            return
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self.num_connections[self._address] -= 1
        if not self.num_connections[self._address]:
            del self.num_connections[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        within = self._begun
        super().data_received(data)
        if not within or not self._begun:
            return
        self._num_bytes += len(data)
        if self._num_bytes > self.max_header_bytes:
            self._refuse(
                HeadersTooLarge(f"The headers have more than {self.max_header_bytes} bytes.")
            )

    def on_message_begin(self) -> None:
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
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(f"This is no valid HTTP request: {msg}"))

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(self.header_timeout_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if self._is_answering:  # the next request is sent while this one is answered: that may wait
            self._await_headers()
        elif self._begun:
            self._refuse(
                HeadersTooSlow(f"The headers did not arrive within {self.header_timeout_s:g} s.")
            )
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


def _response(status: int, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return STATUS_LINE[status] + head % len(content) + content
