"""The page's files: served with strict headers, complete, and without any other host."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from gptoss.api.http import error_responses
from gptoss.api.ops.dashboard import HEADERS, router
from gptoss.resources import resource

FOLDER = resource("assets", "page")
ALL = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
OWN = [name for name in ALL if not name.startswith("vendor/")]
LIBRARIES = [name for name in ALL if name.endswith((".js", ".css")) and name not in OWN]
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
NAMED_ONLY = {"www.w3.org", "github.com"}  # namespaces, and where a library's comments say it comes from


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    error_responses.install(app)
    app.include_router(router)
    with TestClient(app) as made:
        yield made


def text(name: str) -> str:
    return (FOLDER / name).read_text()


@pytest.mark.parametrize("name", ["", *ALL])
def test_every_file_is_served_with_strict_headers(client: TestClient, name: str) -> None:
    response = client.get(f"/page/{name}" if name else "/")
    assert response.status_code == 200
    assert response.content == (FOLDER / (name or "index.html")).read_bytes()
    assert {key: response.headers[key] for key in HEADERS} == HEADERS
    kind = TYPES.get(Path(name or "index.html").suffix)
    assert kind is None or response.headers["content-type"].split(";")[0] == kind


def test_the_policy_allows_nothing_inline_and_no_other_host() -> None:
    policy = HEADERS["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert not re.search(r"unsafe|data:|blob:|http|\*|nonce|sha256", policy)
    for directive in ("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"):
        assert directive in policy
    assert HEADERS["x-content-type-options"] == "nosniff"


def test_a_current_copy_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/page.js")
    again = client.get("/page/page.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["content-security-policy"] == HEADERS["content-security-policy"]


@pytest.mark.parametrize(
    "name",
    ["none.js", "", "vendor", "vendor/none", "../nano/README.md", "%2e%2e/nano/README.md", "/etc/passwd", "a%00b"],
)
def test_there_are_no_other_files(client: TestClient, name: str) -> None:
    response = client.get(f"/page/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_the_document_has_nothing_inline_and_only_relative_addresses() -> None:
    page = text("index.html")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<base|<iframe", page)
    assert not re.search(r"<script(?![^>]*\ssrc=)", page)
    asked = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert asked and {name.removeprefix("page/") for name in asked} <= set(ALL)


def test_scripts_and_styles_import_only_each_other() -> None:
    for name in OWN:
        for imported in re.findall(r'(?:from|import)\s*\(?"([^"]+)"', text(name) if name.endswith(".js") else ""):
            assert (FOLDER / imported).is_file() and imported.startswith("./"), (name, imported)
        assert not re.search(r"url\(|@import|\beval\(|new Function|innerHTML|document\.write", text(name)), name


@pytest.mark.parametrize("name", [name for name in ALL if name in OWN or name in LIBRARIES])
def test_no_file_names_another_host(name: str) -> None:
    hosts = set(re.findall(r"(?:https?|wss?):(?:\\?/){2}([\w.-]+)", text(name)))
    assert hosts <= (NAMED_ONLY if name in LIBRARIES else {"www.w3.org"})


def test_libraries_are_listed_with_version_licence_and_hash() -> None:
    rows = re.findall(
        r"^\| (\S+) \| ([\d.]+) \| (.+?) \| `(.+?)` \| `(\w{64})` \|$", text("vendor/README.md"), re.MULTILINE
    )
    assert sorted(f"vendor/{file}" for _, _, _, file, _ in rows) == LIBRARIES
    for library, version, licence, file, digest in rows:
        content = (FOLDER / "vendor" / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, file
        assert version.encode() in content or file.endswith(".css"), file
        assert licence.startswith(("MIT", "Apache-2.0")), library
        assert (FOLDER / "vendor" / file).with_name("LICENSE").stat().st_size > 1000


def test_the_page_is_small() -> None:
    asked = {name for name in ALL if name.endswith((".html", ".js", ".css", ".svg"))}
    assert sum((FOLDER / name).stat().st_size for name in asked) < 250_000
