"""The page at /: chat and live figures. Static files only: no other host, no inline code."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from gptoss.api.http.errors import NotFound
from gptoss.resources import resource

router = APIRouter()

FILES = StaticFiles(directory=resource("assets", "page"))
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    return await _file("index.html", request.scope)


@router.get("/page/{path:path}", include_in_schema=False)
async def part(path: str, request: Request) -> Response:
    return await _file(path, request.scope)


async def _file(path: str, scope: Scope) -> Response:
    """Returns a file of assets/page, or 304 if the client's copy is current. Raises NotFound."""
    try:
        response = await FILES.get_response(path, scope)
    except HTTPException:
        raise NotFound(f"The page has no file {path!r}.") from None
    response.headers.update(HEADERS)
    return response
