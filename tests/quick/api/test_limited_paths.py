"""What counts against a key's limits."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic import BaseModel

from gptoss.api.app import LIMITED_PATHS
from gptoss.api.http.limited_paths import LimitedPaths, generates
from gptoss.api.http.openapi import json_body


class Body(BaseModel):
    text: str


def test_routes_say_what_they_take() -> None:
    router = APIRouter()

    @router.post("/answer", openapi_extra=json_body(Body))
    @generates
    async def answer() -> None: ...

    @router.post("/count", openapi_extra=json_body(Body))
    async def count() -> None: ...

    @router.get("/look")
    async def look() -> None: ...

    found = LimitedPaths.of(router.routes)
    assert found.works == {"/answer", "/count"}
    assert found.generates == {"/answer"}


def test_the_paths_of_this_server() -> None:
    generating = {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"}
    reading = {"/v1/chat/completions/render", "/v1/messages/count_tokens", "/v1/responses/input_tokens"}
    reading |= {"/tokenize", "/detokenize"}
    assert generating <= LIMITED_PATHS.generates <= LIMITED_PATHS.works
    assert reading <= LIMITED_PATHS.works - LIMITED_PATHS.generates
    assert LIMITED_PATHS.works.isdisjoint({"/health", "/ready", "/metrics", "/v1/models", "/v1/cancel"})
