"""The pages that one conversation has opened, by cursor."""

from __future__ import annotations

import secrets

from gptoss.tools.browser.citations import CitationFilter
from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.page import Page, SearchResult
from gptoss.tools.browser.text import WrappedText

MAX_CHARS = 8_000_000  # of the pages of a session; the oldest are dropped
_DROPPED = WrappedText((), b"")


class BrowserSession:
    """A stack of pages. A cursor is an index into it, and never changes its page."""

    is_alive = True

    def __init__(self) -> None:
        self.id = f"brws_{secrets.token_hex(16)}"
        self._stack: list[Page] = []
        self._num_chars = 0

    def answer_filter(self) -> CitationFilter:
        return CitationFilter(self.source)

    async def close(self) -> None:
        self._stack.clear()

    @property
    def next_cursor(self) -> int:
        return len(self._stack)

    def push(self, page: Page) -> int:
        """Opens a page. -> its cursor"""
        if not any(page is one for one in self._stack):
            self._num_chars += page.num_chars
        self._stack.append(page)
        self._drop_oldest(page)
        return len(self._stack) - 1

    def page(self, cursor: int | None = None) -> Page:
        """The page at a cursor; None: the last one. Raises BrowserError."""
        if not self._stack:
            raise BrowserError("invalid", "No page is open yet: search, or open a URL.")
        last = len(self._stack) - 1
        if cursor is None:
            cursor = last
        if not 0 <= cursor <= last:
            raise BrowserError(
                "invalid", f"There is no cursor {cursor}: the cursors of the open pages are 0 to {last}."
            )
        page = self._stack[cursor]
        if page.text is _DROPPED:
            raise BrowserError("gone", f"The page at cursor {cursor} is no longer kept: open {page.url or 'it'} again.")
        return page

    def opened(self, url: str) -> Page | None:
        """The page of this URL that was opened last, if it is still kept."""
        found = (page for page in reversed(self._stack) if page.url == url and page.text is not _DROPPED)
        return next(found, None)

    def source(self, cursor: int, line: int) -> SearchResult | None:
        """What a citation refers to; None if there is no such page."""
        return self._stack[cursor].source(line) if 0 <= cursor < len(self._stack) else None

    def _drop_oldest(self, latest: Page) -> None:
        """Keeps title and URL of the oldest pages alone, while all together are too large."""
        for page in self._stack:
            if self._num_chars <= MAX_CHARS:
                return
            if page is latest or page.text is _DROPPED:
                continue
            self._num_chars -= page.num_chars
            shell = Page(page.url, page.title, _DROPPED, page.links[:1], page.kind, page.source_title)
            self._stack = [shell if one is page else one for one in self._stack]
