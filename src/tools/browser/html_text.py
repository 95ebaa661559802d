"""HTML as the text that the model reads: headings, lists and links in the form it was trained on.

Links become `【id†text】`, or `【id†text†domain】` if they lead to another domain; images `[Image 0: alt]`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

from gptoss.tools.browser.page import MAX_TITLE, domain_of
from gptoss.tools.browser.text import clean, link_text, on_one_line

MAX_TEXT = 1_000_000  # characters of a page
CUT = "\n\n[The page is longer than what can be shown.]"
MAX_LINKS = 20_000
MAX_URL = 2048
_SKIPPED = {"script", "style", "noscript", "template", "head", "svg", "math", "iframe", "object", "canvas"}
_SKIPPED |= {"audio", "video", "select", "datalist", "textarea"}
_PARAGRAPHS = {"p", "div", "section", "article", "main", "header", "footer", "nav", "aside", "form", "fieldset"}
_PARAGRAPHS |= {"address", "figure", "figcaption", "details", "summary", "dialog", "body", "caption", "table"}
_PARAGRAPHS |= {"h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "dl", "pre", "blockquote"}
_LINES = {"li", "dt", "dd", "tr", "thead", "tbody", "tfoot", "legend"}
_HEADING = re.compile(r"h[1-6]")
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_INDEX = re.compile(r"[\w-]+")
_EMPTY = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_CHUNK = 16_384  # bytes that are parsed at once
MAX_DEPTH = 512  # the time for an end tag is linear in the number of open elements
MAX_CAPTURED = 1_000  # characters of a link's text, before whitespace is merged; the rest follows it


@dataclass(slots=True)
class HtmlText:
    title: str
    text: str
    links: list[str]


def html_to_text(html: str, url: str) -> HtmlText:
    """The text of an HTML page, with at most MAX_TEXT characters. Never raises for bad HTML.

    The parser reports elements as it reads them, and makes no tree: that would take quadratic time for attributes.
    """
    from lxml import etree

    reader = _Reader(url, url)
    parser = etree.HTMLParser(target=reader, encoding="utf-8", no_network=True, huge_tree=True)
    data = html.replace("\0", " ").encode("utf-8", "replace")
    with contextlib.suppress(etree.XMLSyntaxError):
        for start in range(0, len(data), _CHUNK):
            parser.feed(data[start : start + _CHUNK])
            if reader.is_done:
                break
        parser.close()
    return reader.close()


def link_target(base: str, link: str) -> str | None:
    """The URL of a link without its fragment; None if it is none that can be opened."""
    link = link.strip()
    if len(link) > MAX_URL:
        return None
    # urljoin knows how URLs of these schemes are joined, whatever the base's is
    scheme, separator, rest = base.partition("://")
    known = scheme in ("http", "https")
    try:
        joined = urljoin(base if known else f"http://{rest}", link).partition("#")[0]
        parts = urlsplit(joined)
    except ValueError:
        return None
    if parts.scheme not in ("http", "https"):
        return None
    if not known and parts.scheme == "http" and parts.netloc == rest.partition("/")[0]:
        return f"{scheme}{separator}{joined.partition('://')[2]}"
    return joined if parts.netloc and len(joined) <= MAX_URL else None


def _readable(url: str) -> str:
    """The URL, or that of the paper as HTML where it leads to arXiv."""
    parts = urlsplit(url)
    if parts.netloc.lower() in ("arxiv.org", "www.arxiv.org", "export.arxiv.org"):
        return parts._replace(netloc="ar5iv.org").geturl()
    return url


@dataclass(slots=True)
class _Writer:
    """Collects text: whitespace is merged, and line ends are written before the next text."""

    pieces: list[str] = field(default_factory=list)
    size: int = 0
    prefix: str = ""  # begins the next line
    is_cut: bool = False
    _line_ends: int = 0  # before the next text
    _space: bool = False  # before the next text of this line
    _at_start: bool = True  # of a line

    @property
    def is_full(self) -> bool:
        return self.size >= MAX_TEXT

    def end_line(self, count: int = 1) -> None:
        """The next text begins a new line, after count - 1 empty ones."""
        if self.size:
            self._line_ends = max(self._line_ends, count)

    def write(self, text: str) -> None:
        """Adds text; its whitespace is merged with what is there."""
        words = " ".join(text.split())
        if not words:
            self._space = self._space or bool(text)
            return
        self._begin(space=self._space or text[0].isspace())
        self._add(words)
        self._space = text[-1].isspace()

    def write_lines(self, text: str) -> None:
        """Adds text whose lines stay as they are."""
        for index, line in enumerate(text.split("\n")):
            if index:
                self._line_ends = min(self._line_ends + 1, 2)
            if line.strip():
                self._begin(space=False)
                self._add(line.rstrip())

    def break_line(self) -> None:
        self.end_line(min(self._line_ends + 1, 2))

    def _begin(self, *, space: bool) -> None:
        if self._line_ends:
            self._add("\n" * self._line_ends)
            self._line_ends, self._at_start = 0, True
        if self._at_start:
            self._add(self.prefix)
            self.prefix, self._at_start = "", False
        elif space:
            self._add(" ")
        self._space = False

    def _add(self, text: str) -> None:
        self.pieces.append(text)
        self.size += len(text)

    def text(self) -> str:
        text = "".join(self.pieces)[:MAX_TEXT]
        return text + CUT if self.is_cut or self.is_full else text


@dataclass(slots=True)
class _Capture:
    """The texts inside a link, or inside a raised or lowered text, which are written as one."""

    tag: str
    href: str = ""
    texts: list[str] = field(default_factory=list)
    size: int = 0
    images: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.size += len(text)


@dataclass(slots=True)
class _Reader:
    """Writes the text of a page from what a parser reports: start, data and end of its elements."""

    url: str
    base: str
    title: str = ""
    ids: dict[str, int] = field(default_factory=dict)  # of the links, by URL
    writer: _Writer = field(default_factory=_Writer)
    num_images: int = 0
    lists: list[int] = field(default_factory=list)  # items so far of the open lists; -1: not numbered
    pre: int = 0  # open pre elements
    num_left_out: int = 0  # open elements since one that is left out, with it
    in_title: bool = False
    capture: _Capture | None = None
    cells: int = 0  # of the current row
    depth: int = 0  # open elements
    is_done: bool = False  # the rest is not read

    def close(self) -> HtmlText:
        self._end_capture()
        return HtmlText(on_one_line(self.title, MAX_TITLE), self.writer.text(), list(self.ids))

    def comment(self, text: str) -> None:
        pass

    def pi(self, target: str, data: str | None = None) -> None:
        pass

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.depth += tag not in _EMPTY
        self.is_done = self.is_done or self.writer.is_full or self.depth > MAX_DEPTH
        if self.is_done:
            self.writer.is_cut = True
            return
        if tag == "base" and self.base == self.url:
            self.base = link_target(self.url, attributes.get("href", "")) or self.url
        if tag in _EMPTY:
            if not self.num_left_out:
                self._empty(tag, attributes)
        elif self.num_left_out or _is_left_out(tag, attributes):
            self.num_left_out += 1
            self.in_title = tag == "title" and not self.title
        elif tag == "title":
            self.in_title = not self.title
        elif tag in ("a", "sup", "sub"):
            self._start_capture(tag, attributes)
        elif self.capture is not None:
            self.capture.add(" ")
        else:
            self._start(tag)

    def data(self, text: str) -> None:
        if self.is_done:
            return
        if self.in_title:
            self.title += text[: max(0, MAX_CAPTURED - len(self.title))]
        elif self.num_left_out:
            return
        elif self.capture is not None:
            room = max(0, MAX_CAPTURED - self.capture.size)
            self.capture.add(text[:room])
            if len(text) > room:  # it may not have been closed
                self._end_capture()
                self.data(text[room:])
        elif self.pre:
            self.writer.write_lines(clean(text))
        else:
            self.writer.write(clean(text))

    def end(self, tag: str) -> None:
        self.in_title = False
        if tag in _EMPTY or self.is_done:
            return
        self.depth -= 1
        if self.num_left_out:
            self.num_left_out -= 1
        elif self.capture is not None:
            if tag == self.capture.tag:
                self._end_capture()
            else:
                self.capture.add(" ")
        else:
            self._end(tag)

    def _empty(self, tag: str, attributes: Mapping[str, str]) -> None:
        """Writes an element that has no content."""
        if tag == "img":
            name = on_one_line(attributes.get("alt") or attributes.get("title") or "", MAX_TITLE)
            image = f"[Image {self.num_images}: {name}]" if name else f"[Image {self.num_images}]"
            self.num_images += 1
            if self.capture is None:
                self.writer.write(image)
            else:
                self.capture.images.append(image)
        elif self.capture is not None:
            self.capture.add(" ")
        elif tag == "br":
            self.writer.break_line()
        elif tag == "hr":
            self.writer.end_line(2)
            self.writer.write("* * *")
            self.writer.end_line(2)

    def _start_capture(self, tag: str, attributes: Mapping[str, str]) -> None:
        href = attributes.get("href")
        if tag != "a" and self.capture is not None:
            self.capture.add(" ")
        elif tag != "a" or href is not None:
            self._end_capture()
            self.capture = _Capture(tag, href or "")

    def _end_capture(self) -> None:
        """Writes what has been captured: a link, a raised text, or the images inside."""
        capture, self.capture = self.capture, None
        if capture is None:
            return
        text = "".join(capture.texts)
        if capture.tag == "a":
            self._write_link(capture.href, link_text(text), starts_apart=text[:1].isspace())
            self.writer.write(" " if text[-1:].isspace() else "")
        elif _INDEX.fullmatch(text):
            self.writer.write(f"{'^' if capture.tag == 'sup' else '_'}{{{text}}}")
        else:
            self.writer.write(clean(text))
        if not text.strip():
            for image in capture.images:
                self.writer.write(image)

    def _write_link(self, href: str, text: str, *, starts_apart: bool) -> None:
        if not text:
            return  # an image, perhaps
        self.writer.write(" " if starts_apart else "")
        url = None if href.startswith("#") else link_target(self.base, href)
        if url is None or (url not in self.ids and len(self.ids) >= MAX_LINKS):
            self.writer.write(text)
            return
        same = domain_of(url) == domain_of(self.url)
        url = _readable(url)
        number = self.ids.setdefault(url, len(self.ids))
        self.writer.write(f"【{number}†{text}】" if same else f"【{number}†{text}†{clean(domain_of(url))}】")

    def _start(self, tag: str) -> None:
        writer = self.writer
        if tag in _PARAGRAPHS:
            if not writer.prefix:  # else it begins an item
                writer.end_line(1 if tag in ("ul", "ol") and self.lists else 2)
        elif tag in _LINES:
            writer.end_line()
        if _HEADING.fullmatch(tag):
            writer.prefix = "#" * int(tag[1]) + " "
        match tag:
            case "ul":
                self.lists.append(-1)
            case "ol":
                self.lists.append(0)
            case "li":
                writer.prefix = self._bullet()
            case "blockquote":
                writer.prefix = "> "
            case "dd":
                writer.prefix = "    "
            case "pre":
                self.pre += 1
            case "tr":
                self.cells = 0
            case "td" | "th":
                if self.cells:
                    writer.write(" | ")
                self.cells += 1

    def _end(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self.writer.end_line(1 if tag in ("ul", "ol") and len(self.lists) > 1 else 2)
            self.writer.prefix = ""
        elif tag in _LINES:
            self.writer.end_line()
            self.writer.prefix = ""
        if tag in ("ul", "ol") and self.lists:
            self.lists.pop()
        elif tag == "pre" and self.pre:
            self.pre -= 1

    def _bullet(self) -> str:
        depth = min(max(len(self.lists), 1), 8)
        if self.lists and self.lists[-1] >= 0:
            self.lists[-1] += 1
            return f"{'  ' * depth}{self.lists[-1]}. "
        return "  " * depth + "* "


def _is_left_out(tag: str, attributes: Mapping[str, str]) -> bool:
    return tag in _SKIPPED or "hidden" in attributes or bool(_HIDDEN.search(attributes.get("style", "")[:2000]))
