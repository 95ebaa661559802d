"""Errors in Anthropic's format."""

from __future__ import annotations

from typing import Any

PATH = "/v1/messages"
OVERLOADED = 529
NO_THREADS = "thread_unsupported_request"  # by which Anthropic's SDK knows that it has to send the whole conversation
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}


def speaks_anthropic(path: str) -> bool:
    """Whether clients of this path expect Anthropic's error format."""
    return path == PATH or path.startswith(f"{PATH}/")


def anthropic_error(
    status: int, message: str, param: str | None, request_id: str | None, code: str | None = None
) -> dict[str, Any]:
    """The body. The format has no field for `param`, so the message names it."""
    if param is not None and param not in message:
        message = f"{param}: {message}"
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    error: dict[str, Any] = {"type": kind, "message": message}
    if code == NO_THREADS:
        error["details"] = {"error_code": code, "unsupported": ["thread"]}
    return {"type": "error", "error": error, "request_id": request_id}
