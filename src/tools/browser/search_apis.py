"""Search engines over HTTP: SearXNG, Exa and You.com. The operator gives their addresses."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2

from gptoss import __version__
from gptoss.tools.address_guard import AddressPolicy, AddressRefusedError
from gptoss.tools.browser.backend import MAX_RESULTS, Scope
from gptoss.tools.browser.documents import Document
from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.page import SearchResult
from gptoss.tools.browser.web import WebPages, read_bounded

EXA_URL = "https://api.exa.ai"
YOU_URL = "https://ydc-index.io"
MAX_ANSWER_BYTES = 16 * 2**20
TIMEOUT_S = 30.0


class _Api:
    """A service that answers with JSON."""

    def __init__(self, name: str, url: str, headers: Mapping[str, str] | None = None) -> None:
        own = {"User-Agent": f"gptoss/{__version__}", "Accept-Encoding": "gzip, identity", **(headers or {})}
        self._name, self._url = name, url.rstrip("/")
        self._client = httpx2.AsyncClient(headers=own, timeout=TIMEOUT_S)

    async def close(self) -> None:
        await self._client.aclose()

    async def get(self, path: str, query: Mapping[str, str | int]) -> Any:
        return await self._ask("GET", path, params=dict(query))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return await self._ask("POST", path, json=body)

    async def _ask(self, method: str, path: str, **content: Any) -> Any:
        """The JSON of an answer. Raises BrowserError without the service's text, which may have the key."""
        try:
            async with self._client.stream(method, self._url + path, **content) as response:
                if response.status_code != 200:
                    code = response.status_code
                    raise BrowserError("http", f"{self._name} answers with status {code}{_hint(code)}.", code)
                body, is_cut = await read_bounded(response, MAX_ANSWER_BYTES)
        except httpx2.TimeoutException:
            raise BrowserError("timeout", f"{self._name} did not answer in time.") from None
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise BrowserError("unavailable", f"{self._name} cannot be reached: {type(error).__name__}.") from None
        try:
            return None if is_cut else json.loads(body)
        except (ValueError, RecursionError):
            raise BrowserError("protocol", f"{self._name} does not answer with JSON.") from None


def _hint(code: int) -> str:
    return {401: " (is its key valid?)", 403: " (is the key valid, or the format allowed?)", 429: " (too many)"}.get(
        code, ""
    )


def _items(answer: Any, *path: str) -> list[Mapping[str, Any]]:
    """The objects of a list inside an answer; empty where it is not there."""
    for name in path:
        answer = answer.get(name) if isinstance(answer, Mapping) else None
    return [item for item in answer if isinstance(item, Mapping)] if isinstance(answer, list) else []


def _results(items: Iterable[Mapping[str, Any]], *snippets: str) -> list[SearchResult]:
    """Results of web pages. `snippets`: the fields that may have a text, the best first."""
    found = []
    for item in items:
        url = item.get("url")
        if not isinstance(url, str) or _scheme(url) not in ("http", "https") or len(url) > 2048:
            continue
        texts = (_text(item.get(name)) for name in snippets)
        found.append(SearchResult(_text(item.get("title")), url, next(filter(None, texts), "")))
    return found


def _scheme(url: str) -> str:
    try:
        return urlsplit(url).scheme
    except ValueError:
        return ""


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " … ".join(part for part in value if isinstance(part, str))
    return value if isinstance(value, str) else ""


class SearxngBackend:
    """A SearXNG server, whose settings must allow the format json; this server fetches the pages."""

    def __init__(self, url: str, pages: WebPages) -> None:
        self._api, self._pages = _Api("The search engine", url), pages

    async def search(self, query: str, scope: Scope) -> list[SearchResult]:
        if scope.allowed_domains:
            query += " (" + " OR ".join(f"site:{name}" for name in scope.allowed_domains[:10]) + ")"
        answer = await self._api.get("/search", {"q": query, "format": "json"})
        return _results(_items(answer, "results"), "content")

    async def fetch(self, url: str) -> Document:
        return await self._pages.fetch(url)

    async def close(self) -> None:
        await self._api.close()
        await self._pages.close()


class _Hosted:
    """A service that also loads pages. It is asked for no URL that the policy refuses."""

    def __init__(self, name: str, url: str, key: str, policy: AddressPolicy) -> None:
        self._api, self._policy = _Api(name, url, {"x-api-key": key}), policy

    async def close(self) -> None:
        await self._api.close()

    def _check(self, url: str) -> None:
        try:
            self._policy.check_url(url)
        except AddressRefusedError as error:
            raise BrowserError("execution", f"This page may not be opened: {error.message}.") from None


class ExaBackend(_Hosted):
    def __init__(self, key: str, policy: AddressPolicy, url: str = EXA_URL) -> None:
        super().__init__("Exa", url, key, policy)

    async def search(self, query: str, scope: Scope) -> list[SearchResult]:
        body: dict[str, Any] = {
            "query": query,
            "numResults": scope.max_results,
            "contents": {"highlights": True, "summary": True},
        }
        if scope.allowed_domains:
            body["includeDomains"] = list(scope.allowed_domains)
        if scope.country:
            body["userLocation"] = scope.country
        return _results(_items(await self._api.post("/search", body), "results"), "summary", "highlights", "text")

    async def fetch(self, url: str) -> Document:
        self._check(url)
        answer = await self._api.post("/contents", {"urls": [url], "text": {"includeHtmlTags": True}})
        found = _items(answer, "results")
        if not found or not isinstance(found[0].get("text"), str):
            raise BrowserError("execution", "Exa has no text of this page.")
        return _html(url, found[0]["text"], found[0].get("title"))


class YouBackend(_Hosted):
    def __init__(self, key: str, policy: AddressPolicy, url: str = YOU_URL) -> None:
        super().__init__("You.com", url, key, policy)

    async def search(self, query: str, scope: Scope) -> list[SearchResult]:
        asked: dict[str, str | int] = {"query": query, "count": min(scope.max_results, MAX_RESULTS)}
        if scope.allowed_domains:
            asked["include_domains"] = ",".join(scope.allowed_domains)
        if scope.country:
            asked["country"] = scope.country
        answer = await self._api.get("/v1/search", asked)
        found = [*_items(answer, "results", "web"), *_items(answer, "results", "news")]
        return _results(found, "snippets", "description")

    async def fetch(self, url: str) -> Document:
        self._check(url)
        answer = await self._api.post("/v1/contents", {"urls": [url], "formats": ["html"]})
        found = _items({"pages": answer}, "pages")
        if not found or not isinstance(found[0].get("html"), str):
            raise BrowserError("execution", "You.com has no text of this page.")
        return _html(url, found[0]["html"], found[0].get("title"))


def _html(url: str, html: str, title: Any) -> Document:
    return Document(url, html.encode("utf-8", "replace"), "text/html", "utf-8", _text(title))
