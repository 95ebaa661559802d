"""The ASGI layer that identifies the caller and applies limits."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss.api.access.access import Access
from gptoss.api.access.api_keys import Caller
from gptoss.api.access.hosts import HostCheck
from gptoss.api.access.rate_limits import Allowance
from gptoss.api.http.error_responses import error_response
from gptoss.api.http.errors import ApiError, Forbidden, HeadersTooLarge
from gptoss.api.http.limited_paths import LimitedPaths
from gptoss.api.http.paths import ALWAYS_OPEN, DEBUG, PAGE
from gptoss.config.schema import ServerConfig


class AuthMiddleware:
    """Checks headers, host and key of each request, and applies the key's limits."""

    def __init__(self, app: ASGIApp, config: ServerConfig, access: Access, limited: LimitedPaths) -> None:
        self._app = app
        self._config = config
        self._access = access
        self._limited = limited
        self._hosts = HostCheck(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # there are no websocket routes, and their keys would not be checked
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller, allowance = self._admit(scope)
        except ApiError as error:
            self._access.refused[error.code or error.type] += 1
            await error_response(scope, error)(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["caller"], state["allowance"] = caller, allowance
        limits = self._access.limits
        extra = limits.headers(caller) if allowance is not None else {}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = {name for name, _ in message["headers"]}  # a refusal has its own
                added = ((k.encode(), v.encode()) for k, v in extra.items())
                message["headers"] = [*message["headers"], *(header for header in added if header[0] not in known)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers if extra else send)
        finally:
            if allowance is not None:
                limits.leave(allowance)

    def _admit(self, scope: Scope) -> tuple[Caller, Allowance | None]:
        """The caller, and what the request holds of its limits if it is work. Raises ApiError."""
        path, max_bytes = scope["path"], self._config.max_header_bytes
        if sum(len(k) + len(v) for k, v in scope["headers"]) > max_bytes:
            raise HeadersTooLarge(f"The headers have more than {max_bytes} bytes.")
        if path not in ALWAYS_OPEN:  # probes send the address of the pod
            self._check_host(scope)
        if scope["method"] == "OPTIONS":  # a preflight request has no key
            return self._access.keys.anonymous, None
        keys = self._access.keys
        caller = keys.anonymous if self._is_open(path) else keys.identify(dict(scope["headers"]))
        if path in DEBUG and not self._config.debug_endpoints:
            raise Forbidden("This endpoint is off; debug_endpoints switches it on.", code="debug_endpoint")
        if path not in self._limited.works or scope["method"] != "POST":
            return caller, None
        return caller, self._access.enter(caller, generates=path in self._limited.generates)

    def _check_host(self, scope: Scope) -> None:
        """Raises Forbidden if the Host header is not allowed."""
        for name, value in scope["headers"]:
            if name == b"host" and not self._hosts.allows(value):
                shown = value[:100].decode("latin-1")
                raise Forbidden(
                    f"Host {shown!r} is not allowed: use localhost, or add the name to allowed_hosts.",
                    code="host_not_allowed",
                )

    def _is_open(self, path: str) -> bool:
        """Whether the path needs no key."""
        if path in ALWAYS_OPEN:
            return True
        if path == "/" or path.startswith(PAGE):
            return self._config.public_page
        return path == "/metrics" and self._config.public_metrics
