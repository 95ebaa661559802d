"""HTTP to MCP servers: bounded answers, and guarded addresses where a request names the server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import httpx2

from gptoss.tools.address_guard import AddressPolicy
from gptoss.tools.guarded_http import GuardedTransport

MAX_ANSWER_BYTES = 32 * 2**20  # of one answer that is not a stream of events
TIMEOUT = httpx2.Timeout(30.0, read=600.0)  # a call has its own deadline


class AnswerTooLargeError(httpx2.TransportError):
    """A server sends more than one answer may have."""


class _BoundedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream, self._left = stream, MAX_ANSWER_BYTES

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            self._left -= len(part)
            if self._left < 0:
                raise AnswerTooLargeError("the answer is too large")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


class BoundedTransport(httpx2.AsyncBaseTransport):
    """Refuses answers that are too large, or compressed: they may be larger than they look."""

    def __init__(self, inner: httpx2.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await self._inner.handle_async_request(request)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise AnswerTooLargeError("the answer is compressed")
        is_events = response.headers.get("content-type", "").startswith("text/event-stream")
        if not is_events and isinstance(response.stream, httpx2.AsyncByteStream):
            response.stream = _BoundedStream(response.stream)
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


def http_client(policy: AddressPolicy | None, headers: Mapping[str, str]) -> httpx2.AsyncClient:
    """A client for one server. `policy`: None for servers of the operator, which may be anywhere."""
    inner = httpx2.AsyncHTTPTransport(trust_env=False) if policy is None else GuardedTransport(policy)
    return httpx2.AsyncClient(
        transport=BoundedTransport(inner),
        headers={"accept-encoding": "identity", **headers},
        timeout=TIMEOUT,
        trust_env=False,
    )
