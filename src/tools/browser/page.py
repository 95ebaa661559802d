"""Pages: those that the model opens, and those that the browser makes of results and matches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from gptoss.tools.browser.text import WrappedText, clean, link_text, on_one_line, without_links, wrapped

VIEW_SOURCE = "view-source:"
MAX_MATCHES = 50
MATCH_LINES = 4
MAX_TITLE = 300  # characters
MAX_SNIPPET = 1_000
MAX_CITED = 150
_LINK_ID = re.compile(r"【(\d+)†")

PageKind = Literal["page", "search", "find"]


@dataclass(frozen=True, slots=True)
class Link:
    url: str
    line: int | None = None  # of the page that it leads to


@dataclass(frozen=True, slots=True)
class SearchResult:
    title: str
    url: str
    snippet: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Text in lines, and the targets of its links by their ids. A search page has no URL."""

    url: str
    title: str
    text: WrappedText
    links: Sequence[Link] = ()
    kind: PageKind = "page"
    source_title: str = ""  # of a find page: the title of the page that was searched
    num_chars: int = field(init=False)

    def __post_init__(self) -> None:
        size = sum(map(len, self.text.lines)) + 100 * (len(self.text.lines) + len(self.links))
        object.__setattr__(self, "num_chars", size)

    @property
    def lines(self) -> tuple[str, ...]:
        return self.text.lines

    def source(self, line: int) -> SearchResult | None:
        """What a citation of this line refers to; None if it is nothing that has a URL."""
        paragraph = ""
        if 0 <= line < len(self.lines):
            paragraph = "".join(self.lines[index] for index in self.text.paragraph(line))
        cited = on_one_line(without_links(paragraph), MAX_CITED)
        if self.kind == "page":
            return SearchResult(self.title, self.url.removeprefix(VIEW_SOURCE), cited)
        if self.kind == "find":
            return SearchResult(self.source_title, self.links[0].url, cited) if self.links else None
        found = _LINK_ID.search(paragraph)
        if found is None or int(found[1]) >= len(self.links):
            return None
        return SearchResult("", self.links[int(found[1])].url, cited.removeprefix("* "))


def domain_of(url: str) -> str:
    """The host of a URL with its port; empty if there is none."""
    try:
        return urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return ""


def text_page(url: str, title: str, text: str, links: Sequence[str] = ()) -> Page:
    """A page of clean text, which begins with its URL."""
    shown = on_one_line(title, MAX_TITLE) or domain_of(url) or on_one_line(unquote(url.rpartition("/")[2]), MAX_TITLE)
    return Page(url, shown, wrapped(f"\nURL: {on_one_line(url, 2048)}\n{text}"), [Link(target) for target in links])


def search_page(query: str, results: Iterable[SearchResult]) -> Page:
    """The results of a search as a list of links."""
    links: list[Link] = []
    items: list[str] = []
    for index, result in enumerate(results):
        title = link_text(result.title, MAX_TITLE) or link_text(result.url)
        domain = domain_of(result.url)
        mark = f"【{index}†{title}†{domain}】" if domain else f"【{index}†{title}】"
        items.append(f"  * {mark} {on_one_line(result.snippet, MAX_SNIPPET)}".rstrip())
        links.append(Link(result.url))
    text = "\n".join(["", "URL: ", "# Search results", "", *items]) if items else "\nURL: \nThe search found nothing."
    return Page("", on_one_line(query, MAX_TITLE), wrapped(text), links, "search")


def find_page(page: Page, pattern: str) -> Page:
    """The lines of a page in which a pattern occurs, in any case; it may continue in the next line."""
    lines = without_links("\n".join(page.lines)).split("\n")
    chunks: list[str] = []
    links: list[Link] = []
    next_line = 0
    for line in _matching_lines(lines, page.text.begins, pattern):
        if line < next_line:
            continue
        next_line = line + MATCH_LINES
        chunks.append(f"# 【{len(links)}†match at L{line}】\n" + "\n".join(lines[line:next_line]))
        links.append(Link(page.url, line))
        if len(links) == MAX_MATCHES:
            break
    shown = on_one_line(pattern, MAX_TITLE)
    text = "\n\n".join(chunks) if chunks else f"No match for `{shown}`."
    title = f"Matches of `{shown}` in {page.title}"
    url = f"{page.url}/find?pattern={quote(pattern[:MAX_TITLE], errors='replace')}"
    return Page(url, on_one_line(title, 2 * MAX_TITLE), wrapped(text), links, "find", page.title)


def _matching_lines(lines: Sequence[str], begins: bytes, pattern: str) -> Iterable[int]:
    """The indices of the lines in which a match begins, ascending."""
    wanted = clean(pattern).replace("\n", " ").lower()
    if not wanted:
        return
    first = 0
    while first < len(lines):
        end = begins.find(1, first + 1)
        end = len(lines) if end < 0 else end
        yield from _matches_in_paragraph([line.lower() for line in lines[first:end]], first, wanted)
        first = end


def _matches_in_paragraph(lines: Sequence[str], first: int, wanted: str) -> Iterable[int]:
    text = "".join(lines)
    if len(wanted) > len(text):
        return
    at, index, passed = text.find(wanted), 0, 0
    while at >= 0:
        while passed + len(lines[index]) <= at:
            passed += len(lines[index])
            index += 1
        yield first + index
        # one match a line is enough
        at = text.find(wanted, passed + len(lines[index]))
