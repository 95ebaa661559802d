"""Citations of an answer: `【3†L9】` becomes `([example.com](https://example.com/page))`."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

from gptoss.generation.tool_types import Citation
from gptoss.tools.browser.page import SearchResult, domain_of

# what it refers to, by cursor and line
FindSource = Callable[[int, int], SearchResult | None]
_MARK = re.compile(r"【(\d{1,6})(?:†([^†【】]{0,200}))?(?:†[^†【】]{0,300})?】")
_BEGUN = re.compile(r"【(?:\d{0,6}|\d{1,6}†[^†【】]{0,200}|\d{1,6}†[^†【】]{0,200}†[^†【】]{0,300})\Z")
_LINE = re.compile(r"L(\d{1,9})")
_SAFE = "%/:=&?~#+!$,;'@*[]"  # of a URL: what may stay as it is between parentheses


class CitationFilter:
    """Rewrites one text as it is generated. A mark whose page is not known stays as it is."""

    def __init__(self, find_source: FindSource) -> None:
        self._find_source = find_source
        self._held = ""  # may become a mark
        self._length = 0  # characters shown
        self._last = ""  # character shown
        self._after_link = False

    def feed(self, text: str) -> tuple[str, list[Citation]]:
        """The text that may be shown now, and the citations that it completes."""
        text = self._held + text
        begun = _BEGUN.search(text, max(0, text.rfind("【")))
        self._held = text[begun.start() :] if begun is not None else ""
        return self._rewritten(text[: begun.start()] if begun is not None else text)

    def flush(self) -> tuple[str, list[Citation]]:
        """What was held back."""
        text, self._held = self._held, ""
        return self._rewritten(text)

    def _rewritten(self, text: str) -> tuple[str, list[Citation]]:
        pieces: list[str] = []
        citations: list[Citation] = []
        at = 0
        for mark in _MARK.finditer(text):
            line = _LINE.search(mark[2] or "")
            source = self._find_source(int(mark[1]), int(line[1]) if line else 0)
            if source is None:
                continue
            self._show(text[at : mark.start()], pieces)
            citations.append(self._cite(source, mark[0], pieces))
            at = mark.end()
        self._show(text[at:], pieces)
        return "".join(pieces), citations

    def _show(self, text: str, pieces: list[str]) -> None:
        if not text:
            return
        if self._after_link and (text[0].isalnum() or text[0] in "([\"'"):
            text = f" {text}"
        self._after_link = False
        self._add(text, pieces)

    def _cite(self, source: SearchResult, mark: str, pieces: list[str]) -> Citation:
        url = quote(source.url, safe=_SAFE, errors="replace")
        domain = domain_of(source.url) or source.title
        label = re.sub(r"[\[\]\n]", " ", domain).strip() or "source"
        is_apart = not self._last or self._last.isspace()
        if not is_apart:
            self._add(" ", pieces)
        link = f"([{label}]({url}))"
        start, end = self._length, self._length + len(link)
        citation = Citation(start, end, source.url, source.title or domain, source.snippet, mark, int(not is_apart))
        self._add(link, pieces)
        self._after_link = True
        return citation

    def _add(self, text: str, pieces: list[str]) -> None:
        pieces.append(text)
        self._length += len(text)
        self._last = text[-1]
