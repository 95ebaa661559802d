"""The window of a page that the model sees at a time: at most 1,024 tokens, with numbered lines.

[3] Title (https://example.com/page)
**viewing lines [0 - 41] of 170**

L0: ...
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import unquote

from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.page import Page
from gptoss.tools.browser.text import on_one_line

VIEW_TOKENS = 1024
_MAX_URL = 1024  # characters
_MAX_HEADER = 384  # tokens

CountTokens = Callable[[str], int]


def show_page(page: Page, cursor: int, first: int, num_lines: int | None, count_tokens: CountTokens) -> str:
    """The lines of a page from `first` on: as many as fit, at least one and at most `num_lines`.

    Raises BrowserError if the page has no such line.
    """
    last = len(page.lines) - 1
    if not 0 <= first <= last:
        raise BrowserError("invalid", f"`loc` is {first}, but the lines of this page are 0 to {last}.")
    head = _head(page, cursor, count_tokens)
    budget = VIEW_TOKENS - count_tokens(f"[{cursor}] {head}\n**viewing lines [{last} - {last}] of {last}**\n\n")
    shown: list[str] = []
    for number in range(first, last + 1 if not num_lines else min(last + 1, first + num_lines)):
        line = f"L{number}: {page.lines[number]}"
        # a line begins a piece of its own, so that the tokens of lines add up
        budget -= count_tokens(f"{line}\n")
        if shown and budget < 0:
            break
        shown.append(line)
    position = f"**viewing lines [{first} - {first + len(shown) - 1}] of {last}**"
    return f"[{cursor}] {head}\n{position}\n\n" + "\n".join(shown)


def _head(page: Page, cursor: int, count_tokens: CountTokens) -> str:
    """Title and URL, shortened to a bounded number of tokens."""
    title, url = page.title, on_one_line(unquote(page.url), _MAX_URL)
    while True:
        head = f"{title} ({url})" if url else title
        if count_tokens(head) <= _MAX_HEADER:
            return head
        if len(title) > len(url):
            title = on_one_line(title, len(title) * 2 // 3)
        else:
            url = on_one_line(url, len(url) * 2 // 3)
