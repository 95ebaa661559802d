"""The outermost ASGI layer: request ids, timing, and a plain 500."""

from __future__ import annotations

import logging
import time
import uuid
from urllib.parse import quote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss.api.http import error_responses
from gptoss.api.http.anthropic_errors import speaks_anthropic

logger = logging.getLogger(__name__)


class RequestIdMiddleware:
    """Adds x-request-id and openai-processing-ms, and turns uncaught errors into a plain 500.

    Pure ASGI: Starlette's BaseHTTPMiddleware would hide a client's disconnect from the routes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                elapsed_ms = int((time.monotonic() - started) * 1000)
                headers = message["headers"]
                if message["status"] == 307:
                    headers = [
                        (name, _redirect_path(scope) if name == b"location" else value) for name, value in headers
                    ]
                message["headers"] = [
                    *headers,
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(elapsed_ms).encode()),
                    (b"openai-version", b"2020-10-01"),
                ]
                if speaks_anthropic(scope["path"]):
                    message["headers"].append((b"request-id", request_id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            logger.exception("unhandled error in %s (%s)", scope["path"], request_id)
            if begun:
                raise
            await error_responses.internal_error(scope)(scope, receive, send_with_headers)


def _redirect_path(scope: Scope) -> bytes:
    """The target of Starlette's redirect to the path with or without the last slash, as a path.

    Starlette's own location contains the host that the client sent.
    """
    path = scope["path"]
    path = path.rstrip("/") if path.endswith("/") else path + "/"
    location = "/" + quote(path.lstrip("/"))
    query = scope["query_string"].decode("latin-1")
    return f"{location}?{query}".encode("latin-1") if query else location.encode()
