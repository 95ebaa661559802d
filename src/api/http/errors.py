"""Errors in OpenAI's format."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from pydantic import ValidationError

from gptoss.engine.client.errors import AdapterGoneError, EngineDeadError, EngineError, QueueFullError
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
    if isinstance(error, AdapterGoneError):
        return NotFound(str(error), "model", "model_not_found")
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


def _is_of_a_union(part: str) -> bool:
    """Whether a part of a location is not a field but one of the types that a field may have."""
    if part in ("str", "list", "dict", "int", "float", "bool"):
        return True
    return part.startswith(("function-", "<", "list[", "dict[", "literal[")) or part[:1].isupper()


def openai_param(location: Location) -> str | None:
    """A field in OpenAI's notation: `messages[0].content`."""
    out = ""
    for part in location:
        if isinstance(part, int):
            out += f"[{part}]"
        elif not _is_of_a_union(part):
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
