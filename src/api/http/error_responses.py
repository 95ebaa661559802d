"""Errors as HTTP responses, in the format of the path's clients."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from gptoss.api.http.anthropic_errors import OVERLOADED, anthropic_error, speaks_anthropic
from gptoss.api.http.errors import ApiError, InvalidRequest, from_engine, from_generation, from_validation
from gptoss.engine.client.errors import EngineError
from gptoss.generation.errors import GenerationFailedError

E = TypeVar("E", bound=Exception)


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
