"""The ASGI layer that identifies the caller and applies limits."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss.api.access.access import Access
from gptoss.api.http.errors import ApiError, HeadersTooLarge, error_response
from gptoss.api.http.limited_paths import LimitedPaths
from gptoss.api.http.paths import ALWAYS_OPEN


class AuthMiddleware:
    """The ASGI layer: identifies the caller, applies limits to what takes work, and adds their headers."""

    def __init__(self, app: ASGIApp, access: Access, limited: LimitedPaths) -> None:
        self._app = app
        self._access = access
        self._limited = limited

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route is one, and nothing below checks keys for it
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        preflight = scope["method"] == "OPTIONS"
        try:
            if sum(len(k) + len(v) for k, v in scope["headers"]) > self._access.max_header_bytes:
                raise HeadersTooLarge(f"The headers have more than {self._access.max_header_bytes} bytes.")
            if path not in ALWAYS_OPEN:  # probes send the address of the pod
                self._access.check_host(scope["headers"])
            caller = self._access.identify(
                {} if preflight else dict(scope["headers"]), "/health" if preflight else path
            )
            works = path in self._limited.works and scope["method"] == "POST"
            allowance = self._access.enter(caller, generates=path in self._limited.generates) if works else None
        except ApiError as error:
            self._access.refused[error.code or error.type] += 1
            await error_response(scope, error)(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["caller"], state["allowance"] = caller, allowance
        usage = self._access.usage
        extra = usage.headers(caller) if allowance is not None else {}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}  # a refusal brings its own
                added = ((k.encode(), v.encode()) for k, v in extra.items())
                message["headers"] = [*message["headers"], *(header for header in added if header[0] not in known)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers if extra else send)
        finally:
            if allowance is not None:
                usage.leave(allowance)
