"""Pages from the web and answers of search engines, from servers of the test: shapes as recorded, and bad ones."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import json
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gptoss.tools.address_guard import AddressPolicy
from gptoss.tools.browser.backend import Scope
from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.page import SearchResult
from gptoss.tools.browser.search_apis import ExaBackend, SearxngBackend, YouBackend
from gptoss.tools.browser.web import MAX_REDIRECTS, WebPages

LOOPBACK = AddressPolicy(networks=(ipaddress.ip_network("127.0.0.0/8"),))
Answer = Callable[[str, dict[str, str], bytes], Awaitable[bytes] | bytes]  # path, headers and body to a whole response


def response(body: bytes | str, status: int = 200, **headers: str) -> bytes:
    data = body.encode() if isinstance(body, str) else body
    names = {"content-type": "text/html", "content-length": str(len(data)), "connection": "close"}
    names |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = f"HTTP/1.1 {status} X\r\n" + "".join(f"{name}: {value}\r\n" for name, value in names.items())
    return head.encode() + b"\r\n" + data


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    """A server for one request a connection. -> its URL"""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        made = answer(first.split()[1], headers, body)
        writer.write(made if isinstance(made, bytes) else await made)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def pages(policy: AddressPolicy = LOOPBACK, max_bytes: int = 10_000) -> AsyncIterator[WebPages]:
    made = WebPages(policy, max_bytes)
    try:
        yield made
    finally:
        await made.close()


async def test_a_page_is_fetched_with_its_type_after_redirects() -> None:
    def answer(path: str, headers: dict[str, str], body: bytes) -> bytes:
        assert headers["accept-encoding"] == "gzip, identity" and "cookie" not in headers
        if path == "/a":
            return response("", 302, location="b?c", set_cookie="seen=1")
        return response("<p>hi", content_type='Text/HTML; x=y; charset="latin-1"')

    async with serving(answer) as url, pages() as web:
        document = await web.fetch(f"{url}/a#part")
        assert (document.url, document.body) == (f"{url}/b?c", b"<p>hi")
        assert (document.media_type, document.charset, document.is_cut) == ("text/html", '"latin-1"', False)


async def test_no_address_of_the_own_network_is_fetched_also_after_a_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(path: str, headers: dict[str, str], body: bytes) -> bytes:
        asked.append(path)
        return response("", 301, location=targets[path])

    targets = {
        "/a": "http://10.0.0.1/",
        "/b": "http://[::ffff:a00:1]/",
        "/c": "file:///etc/passwd",
        "/d": "http://u:p@127.0.0.1/",
    }
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    async with serving(answer) as url, pages() as web, pages(AddressPolicy()) as public:
        for path in targets:
            with pytest.raises(BrowserError, match="may not be opened"):
                await web.fetch(url + path)
        assert asked == [*targets]
        for private in (
            url,
            "http://localhost/",
            "http://169.254.169.254/latest",
            "http://0x7f000001/",
            "ftp://e.org/x",
        ):
            with pytest.raises(BrowserError):
                await public.fetch(private)
        assert asked == [*targets]


async def test_a_page_is_bounded_whatever_it_is_compressed_with() -> None:
    bomb = b"x" * 3_000_000
    raw = zlib.compressobj(wbits=-15)
    bodies = {
        "/plain": response(bomb),
        "/gzip": response(gzip.compress(bomb), content_encoding="gzip"),
        "/zlib": response(zlib.compress(bomb), content_encoding="deflate"),
        "/raw": response(raw.compress(bomb) + raw.flush(), content_encoding="deflate"),
    }
    async with serving(lambda path, *_: bodies[path]) as url, pages() as web:
        for path in bodies:
            document = await web.fetch(url + path)
            assert document.body == b"x" * 10_000 and document.is_cut


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (response("", 404), "http", "status 404"),
        (response("", 503), "http", "status 503"),
        (response("", 302, location="http://["), "execution", "not a URL"),
        (response("x", content_encoding="br"), "execution", "compressed with 'br'"),
        (response(b"no gzip", content_encoding="gzip"), "execution", "damaged"),
        (response(b"\xff\xff\xff", content_encoding="deflate"), "execution", "damaged"),
        (b"nonsense\r\n\r\n", "unavailable", "cannot be loaded"),
        (b"", "unavailable", "cannot be loaded"),
        (response("short", content_length="99"), "unavailable", "cannot be loaded"),
    ],
)
async def test_a_page_that_cannot_be_loaded_is_an_error(answer: bytes, kind: str, message: str) -> None:
    async with serving(lambda *_: answer) as url, pages() as web:
        with pytest.raises(BrowserError, match=message) as error:
            await web.fetch(url)
        assert error.value.kind == kind


async def test_redirects_end() -> None:
    asked = []

    def answer(path: str, headers: dict[str, str], body: bytes) -> bytes:
        asked.append(path)
        return response("", 302, location=f"{path}x")

    async with serving(answer) as url, pages() as web:
        with pytest.raises(BrowserError, match="redirects more than"):
            await web.fetch(url)
    assert len(asked) == MAX_REDIRECTS + 1


SEARXNG = {
    "query": "q",
    "number_of_results": 0,
    "results": [
        {"url": "https://one.org/", "title": "One", "content": "first", "engine": "duckduckgo", "score": 1.0},
        {"url": "javascript:x", "title": "bad"},
        {"url": "https://two.org/x", "title": None, "content": None},
        "junk",
    ],
    "answers": [],
    "suggestions": [],
}
EXA = {
    "requestId": "r",
    "resolvedSearchType": "neural",
    "results": [
        {
            "id": "https://one.org",
            "url": "https://one.org/",
            "title": "One",
            "publishedDate": "2026-01-01",
            "summary": "first",
        },
        {"id": "x", "url": "https://two.org/x", "title": "Two", "highlights": ["a", "b"]},
    ],
    "costDollars": {"total": 0.005},
}
YOU = {
    "results": {
        "web": [
            {"url": "https://one.org/", "title": "One", "description": "d", "snippets": ["first"], "page_age": "x"}
        ],
        "news": [{"url": "https://two.org/x", "title": "Two", "description": "second"}],
    },
    "metadata": {"query": "q", "search_uuid": "u", "latency": 0.1},
}


async def test_searxng_is_asked_for_json() -> None:
    asked: list[str] = []

    def answer(path: str, headers: dict[str, str], body: bytes) -> bytes:
        asked.append(path)
        return response(json.dumps(SEARXNG), content_type="application/json")

    async with serving(answer) as url:
        backend = SearxngBackend(f"{url}/base/", WebPages(AddressPolicy()))
        assert await backend.search("q?", Scope()) == [
            SearchResult("One", "https://one.org/", "first"),
            SearchResult("", "https://two.org/x", ""),
        ]
        await backend.search("q", Scope(5, ("a.org", "b.org")))
        await backend.close()
    assert asked[0] == "/base/search?q=q%3F&format=json"
    assert "site%3Aa.org+OR+site%3Ab.org" in asked[1]


async def test_exa_searches_and_loads_pages() -> None:
    asked: list[tuple[str, str, Any]] = []

    def answer(path: str, headers: dict[str, str], body: bytes) -> bytes:
        asked.append((path, headers["x-api-key"], json.loads(body)))
        if path == "/search":
            return response(json.dumps(EXA))
        return response(json.dumps({"results": [{"url": "https://one.org/", "title": "One", "text": "<p>é</p>"}]}))

    async with serving(answer) as url:
        backend = ExaBackend("key", AddressPolicy(), url)
        results = await backend.search("q", Scope(7, ("one.org",), "DE"))
        document = await backend.fetch("https://one.org/")
        with pytest.raises(BrowserError, match="may not be opened"):
            await backend.fetch("http://10.0.0.1/wiki")
        await backend.close()
    assert results == [
        SearchResult("One", "https://one.org/", "first"),
        SearchResult("Two", "https://two.org/x", "a … b"),
    ]
    assert (document.url, document.body.decode(), document.title) == ("https://one.org/", "<p>é</p>", "One")
    contents = {"highlights": True, "summary": True}
    assert asked == [
        ("/search", "key", {"query": "q", "numResults": 7, "contents": contents, "includeDomains": ["one.org"], "userLocation": "DE"}),
        ("/contents", "key", {"urls": ["https://one.org/"], "text": {"includeHtmlTags": True}}),
    ]  # fmt: skip


async def test_you_com_searches_and_loads_pages() -> None:
    asked: list[tuple[str, str]] = []

    def answer(path: str, headers: dict[str, str], body: bytes) -> bytes:
        asked.append((path, headers["x-api-key"]))
        if path.startswith("/v1/search"):
            return response(json.dumps(YOU))
        assert json.loads(body) == {"urls": ["https://one.org/"], "formats": ["html"]}
        return response(json.dumps([{"url": "https://one.org/", "title": "One", "html": "<p>x"}]))

    async with serving(answer) as url:
        backend = YouBackend("key", AddressPolicy(), url)
        results = await backend.search("q", Scope(7, ("one.org", "b.org"), "US"))
        document = await backend.fetch("https://one.org/")
        await backend.close()
    assert results == [
        SearchResult("One", "https://one.org/", "first"),
        SearchResult("Two", "https://two.org/x", "second"),
    ]
    assert document.body == b"<p>x" and document.title == "One"
    assert asked == [
        ("/v1/search?query=q&count=7&include_domains=one.org%2Cb.org&country=US", "key"),
        ("/v1/contents", "key"),
    ]


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (response("the key secret-1 is wrong", 401), "http", "Exa answers with status 401 .is its key valid"),
        (response("", 429), "http", "429 .too many"),
        (response("", 500), "http", "500"),
        (response("no json"), "protocol", "does not answer with JSON"),
        (response("[" * 100_000), "protocol", "does not answer with JSON"),
        (b"", "unavailable", "cannot be reached"),
    ],
)
async def test_a_search_that_fails_is_an_error_without_the_key(answer: bytes, kind: str, message: str) -> None:
    async with serving(lambda *_: answer) as url:
        backend = ExaBackend("secret-1", AddressPolicy(), url)
        for asking in (backend.search("q", Scope()), backend.fetch("https://one.org")):
            with pytest.raises(BrowserError, match=message) as error:
                await asking
            assert error.value.kind == kind and "secret-1" not in error.value.message and url not in error.value.message
        await backend.close()


@pytest.mark.parametrize(
    "answer",
    [
        "null",
        "[]",
        "{}",
        '{"results": 3}',
        '{"results": [1, {"url": 2}, {"url": "http://["}]}',
        '{"results": {"web": {}}}',
    ],
)
async def test_answers_of_another_shape_are_no_results(answer: str) -> None:
    async with serving(lambda *_: response(answer)) as url:
        for backend in (
            ExaBackend("k", AddressPolicy(), url),
            YouBackend("k", AddressPolicy(), url),
            SearxngBackend(url, WebPages(AddressPolicy())),
        ):
            assert await backend.search("q", Scope()) == []
            if not isinstance(backend, SearxngBackend):
                with pytest.raises(BrowserError, match="has no text of this page"):
                    await backend.fetch("https://one.org")
            await backend.close()
