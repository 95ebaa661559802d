"""The page at /: live figures and a chat. Plain files, no outside host, nothing inline."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from gptoss.api.http.errors import NotFound
from gptoss.resources import resource

router = APIRouter()

FOLDER = resource("assets", "page")
TYPES = {"index.html": "text/html", "page.js": "text/javascript", "page.css": "text/css", "icon.svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def index() -> Response:
    return _file("index.html")


@router.get("/page/{name}", include_in_schema=False)
async def part(name: str) -> Response:
    return _file(name)


def _file(name: str) -> Response:
    if name not in TYPES:
        raise NotFound(f"The page has no file {name!r}.")
    return FileResponse(FOLDER / name, media_type=TYPES[name], headers=HEADERS)
