"""The browser as a tool that the server runs: it searches, opens pages and finds text in them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from openai_harmony import ToolNamespaceConfig

from gptoss.generation.tool_types import SessionOptions, TextPart, ToolCall, ToolFailure, ToolResult, ToolSession
from gptoss.harmony.conversation import ToolDefinition, ToolNamespace
from gptoss.tools.browser.arguments import MAX_URL, Find, Open, Search, read_call
from gptoss.tools.browser.backend import MAX_RESULTS, Backend, Scope, usable
from gptoss.tools.browser.documents import page_of
from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.page import VIEW_SOURCE, Link, Page, SearchResult, find_page, search_page
from gptoss.tools.browser.session import BrowserSession
from gptoss.tools.browser.view import CountTokens, show_page

LINES_BEFORE = 4  # shown before the line that a link leads to
Action = dict[str, Any]  # of a web_search_call
_UNREAD: dict[str, Action] = {  # of a call that cannot be read
    "search": {"type": "search", "query": "", "queries": []},
    "open": {"type": "open_page", "url": None},
    "find": {"type": "find_in_page", "url": "", "pattern": ""},
}


def browser_namespace() -> ToolNamespace:
    """The browser as gpt-oss was trained to see it."""
    known = ToolNamespaceConfig.browser()
    functions = [ToolDefinition(tool.name, tool.description, tool.parameters) for tool in known.tools]
    return ToolNamespace(known.name, known.description, tuple(functions))


@dataclass(frozen=True, slots=True)
class _Window:
    """A page that is about to be shown, and the part of it."""

    page: Page
    line: int = 0
    num_lines: int | None = None
    results: Sequence[SearchResult] = ()  # that the page lists


@dataclass(frozen=True, slots=True)
class _Step:
    """A call that has been read: what the client sees of it, and what is left to do."""

    action: Action
    run: Callable[[], Awaitable[_Window]]


class BrowserRunner:
    """Runs `browser.search`, `browser.open` and `browser.find`."""

    name = "browser"
    parallel = False

    def __init__(self, backend: Backend, count_tokens: CountTokens, domains: Sequence[str] = ()) -> None:
        """`domains`: that may be read, besides what a request allows; empty: any."""
        self._backend, self._count_tokens = backend, count_tokens
        self._domains = tuple(domains)
        self.namespace = browser_namespace()

    async def open(self, options: SessionOptions) -> ToolSession:
        return BrowserSession()

    async def close(self) -> None:
        await self._backend.close()

    async def call(self, call: ToolCall, session: ToolSession) -> ToolResult:
        """Runs one call. The extras of its result are listed at ToolResult."""
        assert isinstance(session, BrowserSession)
        action = dict(_UNREAD.get(call.function, _UNREAD["search"]))
        try:
            step = self._step(
                read_call(call.function, call.text), session, Scope.of_options(call.options, self._domains)
            )
            action = step.action
            window = await step.run()
            text = show_page(window.page, session.next_cursor, window.line, window.num_lines, self._count_tokens)
            session.push(window.page)
        except BrowserError as error:
            failure = ToolFailure(error.kind, error.message, error.code)
            return ToolResult((TextPart(error.message),), failure, {"action": action, "sources": []})
        results = [{"url": one.url, "title": one.title or one.url} for one in window.results]
        return ToolResult.of_text(
            text, action=action, sources=_sources(window.page), results=results, title=window.page.title
        )

    def _step(self, call: Search | Open | Find, session: BrowserSession, scope: Scope) -> _Step:
        """Raises BrowserError if the call refers to nothing."""
        match call:
            case Search():
                action = {"type": "search", "query": call.query, "queries": [call.query]}
                return _Step(action, partial(self._search, call, scope))
            case Find():
                page = session.page(call.cursor)
                action = {"type": "find_in_page", "url": _url(page), "pattern": call.pattern}
                return _Step(action, partial(_find, page, call.pattern))
            case Open():
                return self._open(call, session, scope)

    def _open(self, call: Open, session: BrowserSession, scope: Scope) -> _Step:
        if isinstance(call.target, str):
            wanted = _full_url(call.target)
            link, kept = Link(wanted.removeprefix(VIEW_SOURCE)), None  # a URL is loaded again
        else:
            page = session.page(call.cursor)
            if call.target is None and not call.shows_source:
                return _Step(_open_page(_url(page)), partial(_ready, _Window(page, call.line or 0, call.num_lines)))
            link = Link(_url(page)) if call.target is None else _link(page, call.target)
            wanted = link.url
            kept = session.opened(VIEW_SOURCE + wanted if call.shows_source else wanted)
        if not link.url:
            raise BrowserError("invalid", "A page of search results has no source.")
        line = call.line if call.line is not None else _line_to_show(link)
        if kept is not None:
            return _Step(_open_page(link.url), partial(_ready, _Window(kept, line, call.num_lines)))
        shows_source = call.shows_source or wanted.startswith(VIEW_SOURCE)
        fetch = partial(self._fetch, link.url, scope, shows_source=shows_source)
        return _Step(_open_page(link.url), partial(_fetched, fetch, line, call.num_lines))

    async def _search(self, call: Search, scope: Scope) -> _Window:
        if call.num_results:
            scope = replace(scope, max_results=min(call.num_results, scope.max_results, MAX_RESULTS))
        results = await self._backend.search(call.query, scope)
        found = usable(results, scope)
        return _Window(search_page(call.query, found), results=found)

    async def _fetch(self, url: str, scope: Scope, *, shows_source: bool) -> Page:
        _check_allowed(url, scope)
        document = await self._backend.fetch(url)
        _check_allowed(document.url, scope)
        return await asyncio.to_thread(page_of, document, shows_source=shows_source)


def _check_allowed(url: str, scope: Scope) -> None:
    if not scope.allows(url):
        raise BrowserError("execution", f"{url} is outside the domains that may be read here.")


def _link(page: Page, number: int) -> Link:
    if number >= len(page.links):
        raise BrowserError("invalid", f"This page has no link with the id {number}.")
    return page.links[number]


def _line_to_show(link: Link) -> int:
    """The first line of the window in which the linked line is read."""
    if link.line is None:
        return 0
    return link.line - LINES_BEFORE if link.line > LINES_BEFORE else link.line


def _open_page(url: str) -> Action:
    return {"type": "open_page", "url": url}


async def _ready(window: _Window) -> _Window:
    return window


async def _fetched(fetch: Callable[[], Awaitable[Page]], line: int, num_lines: int | None) -> _Window:
    return _Window(await fetch(), line, num_lines)


async def _find(page: Page, pattern: str) -> _Window:
    if page.kind != "page":
        raise BrowserError("invalid", "`find` works on a page that has been opened, not on a list of results.")
    return _Window(await asyncio.to_thread(find_page, page, pattern))


def _url(page: Page) -> str:
    """The URL of the page that the client may open."""
    if page.kind == "find" and page.links:
        return page.links[0].url
    return page.url.removeprefix(VIEW_SOURCE)


def _full_url(text: str) -> str:
    """A URL that the model wrote, with a scheme. Raises BrowserError."""
    if len(text) > MAX_URL:
        raise BrowserError("invalid", f"The URL is longer than {MAX_URL} characters.")
    prefix = VIEW_SOURCE if text.startswith(VIEW_SOURCE) else ""
    url = text.removeprefix(prefix)
    try:
        scheme = urlsplit(url).scheme
    except ValueError:
        raise BrowserError("invalid", f"{url!r} is not a URL.") from None
    if "://" not in url:
        if scheme and "." not in scheme and ":" in url and not url.split(":", 1)[1][:1].isdigit():
            raise BrowserError("invalid", f"{url!r} is not a URL that can be opened.")
        url = f"https://{url}"
    return prefix + url


def _sources(page: Page) -> list[str]:
    """The URLs that a search has found."""
    return [link.url for link in page.links] if page.kind == "search" else []
