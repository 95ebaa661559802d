"""Errors in OpenAI's format, and their conversion to HTTP responses."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from gptoss.api.http.anthropic_errors import OVERLOADED, anthropic_error, speaks_anthropic
from gptoss.engine.client.errors import EngineDeadError, EngineError, QueueFullError
from gptoss.generation.errors import GenerationCancelledError, GenerationError, GenerationFailedError, Path


class ApiError(Exception):
    """Becomes `{"error": {message, type, param, code}}` with `status`."""

    status = 500
    type = "server_error"

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code = message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequest(ApiError):
    status = 400
    type = "invalid_request_error"


class NotFound(InvalidRequest):
    status = 404


class BodyTooLarge(InvalidRequest):
    status = 413


class HeadersTooLarge(InvalidRequest):
    status = 431


class HeadersTooSlow(InvalidRequest):
    status = 408


class BodyTooSlow(InvalidRequest):
    status = 408


class UnsupportedMediaType(InvalidRequest):
    status = 415


class Unauthorized(InvalidRequest):
    status = 401

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param, code, {"www-authenticate": "Bearer"})


class Forbidden(InvalidRequest):
    status = 403


class Cancelled(InvalidRequest):
    """POST /v1/cancel/{id} ended the request."""

    status = 409

    def __init__(self) -> None:
        super().__init__("The request was cancelled.", None, "request_cancelled")


class RateLimited(ApiError):
    status = 429
    type = "rate_limit_error"


class Unavailable(ApiError):
    status = 503


class EngineFailure(ApiError):
    """The engine ended this request with an error after it was accepted."""


def from_engine(error: EngineError) -> ApiError:
    if isinstance(error, QueueFullError):
        wait = max(1, round(error.retry_after_s))
        return RateLimited(str(error), code="rate_limit_exceeded", headers={"retry-after": str(wait)})
    if isinstance(error, EngineDeadError):
        return Unavailable(str(error), code="engine_dead", headers={"retry-after": "30"})
    return Unavailable(str(error), code="overloaded", headers={"retry-after": "5"})


@contextlib.contextmanager
def field_names(name_of: Callable[[Path], str | None]) -> Iterator[None]:
    """A GenerationError within becomes an InvalidRequest; `name_of` names the field at its path."""
    try:
        yield
    except GenerationError as error:
        raise InvalidRequest(error.message, name_of(error.path), error.code) from error


def from_generation(error: GenerationFailedError) -> ApiError:
    return Cancelled() if isinstance(error, GenerationCancelledError) else EngineFailure(str(error))


Location = tuple[int | str, ...]
E = TypeVar("E", bound=Exception)


def openai_param(location: Location) -> str | None:
    """A field in OpenAI's notation: `messages[0].content`."""
    out = ""
    for part in location:
        if isinstance(part, int):
            out += f"[{part}]"
        elif not part.startswith("function-") and part not in ("str", "list", "dict", "int", "float", "bool"):
            out += f".{part}" if out else part
    return out or None


def from_validation(
    error: ValidationError, within: Location = (), name_of: Callable[[Location], str | None] = openai_param
) -> InvalidRequest:
    """The first problem, with OpenAI's texts and codes.

    `within`: location of the validated part in the body.
    """
    first = error.errors(include_url=False)[0]
    param = name_of((*within, *first["loc"]))
    message, kind = first["msg"], first["type"]
    context = first.get("ctx") or {}
    code = context.get("code") or _CODES.get(kind)
    if code is None:
        code = "invalid_type" if kind.endswith("_type") or kind.startswith("is_instance") else "invalid_value"
    if kind == "missing":
        message = f"Missing required parameter: '{param}'."
    elif not message.endswith("."):
        message = f"Invalid value for '{param}': {message}." if param else f"{message}."
    return InvalidRequest(message, context.get("param") or param, code)


_CODES = {
    "missing": "missing_required_parameter",
    "too_short": "empty_array",
    "too_long": "array_above_max_length",
    "string_too_long": "string_above_max_length",
    "string_too_short": "string_below_min_length",
    "greater_than_equal": "integer_below_min_value",
    "greater_than": "integer_below_min_value",
    "less_than_equal": "integer_above_max_value",
    "literal_error": "invalid_value",
    "string_pattern_mismatch": "invalid_value",
}


def json_response(status: int, body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(body, ensure_ascii=False), status, headers, "application/json")


def error_response(scope: Scope, error: ApiError, status: int | None = None) -> Response:
    """An error in the format of the path's endpoint. `status` overrides the error's own."""
    status = error.status if status is None else status
    if not speaks_anthropic(scope["path"]):
        return json_response(status, error.body, error.headers)
    if error.code == "overloaded":
        status = OVERLOADED
    request_id = scope.get("state", {}).get("request_id")
    body = anthropic_error(status, error.message, error.param, request_id, error.code)
    return json_response(status, body, error.headers)


def install(app: FastAPI) -> None:
    """Makes the app answer these exceptions with errors in the API's format."""

    def answer(kind: type[E], converted: Callable[[E], ApiError]) -> None:
        async def handler(request: Request, error: E) -> Response:
            return error_response(request.scope, converted(error))

        app.exception_handler(kind)(handler)

    answer(ApiError, lambda error: error)
    answer(EngineError, from_engine)
    answer(GenerationFailedError, from_generation)
    answer(ValidationError, from_validation)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        text = {
            404: f"Unknown URL: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed on {request.url.path}",
        }.get(error.status_code, str(error.detail))
        known = InvalidRequest(text, headers=dict(error.headers or {}))
        return error_response(request.scope, known, error.status_code)


def internal_error(scope: Scope) -> Response:
    """A 500 for bugs, without internal details."""
    return error_response(scope, ApiError("The server had an error while processing your request."))
