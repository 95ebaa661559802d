"""What a backend fetches, and the page that it becomes."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass

from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.html_text import CUT, MAX_LINKS, MAX_TEXT, html_to_text, link_target
from gptoss.tools.browser.page import VIEW_SOURCE, Page, domain_of, text_page
from gptoss.tools.browser.text import clean, link_text

_HTML_TYPES = ("text/html", "application/xhtml+xml")
_TEXT_TYPES = re.compile(r"text/.+|application/(.+\+)?(json|xml|javascript|yaml|x-yaml|toml|sql|x-sh|x-ndjson|x-tex)")
_CHARSET = re.compile(rb"<meta[^>]{0,300}?charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{1,40})", re.IGNORECASE)
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
# by the names of Python's codecs; as browsers do, a subset is read as what it is a subset of
_CODECS = {
    **{name: name for name in ("utf-8", "utf-16-le", "utf-16-be", "gb18030", "big5", "euc_jp", "euc_kr", "cp949")},
    **{name: name for name in ("iso2022_jp", "koi8-r", "koi8-u", "mac-roman", "cp874", "iso8859-10", "iso8859-13")},
    **{f"cp{page}": f"cp{page}" for page in (866, *range(1250, 1259))},
    **{f"iso8859-{part}": f"iso8859-{part}" for part in (2, 3, 4, 5, 6, 7, 8, 14, 15, 16)},
    "utf-16": "utf-16-le",
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5hkscs": "big5hkscs",
    "shift_jis": "cp932",
    "cp932": "cp932",
    "tis-620": "cp874",
}
_MARKDOWN_LINK = re.compile(r"(?<!!)\[([^\[\]\n]{1,500})\]\(<?([^()<>\s]{1,2048})>?(?:\s+\"[^\"\n]{0,300}\")?\)")
_MARKDOWN_TITLE = re.compile(r"^#\s+(.{1,300})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Document:
    """What a URL has led to. `url` is the one after redirects."""

    url: str
    body: bytes
    media_type: str  # without parameters, in lower case; empty if it is not known
    charset: str | None = None  # as the server names it
    title: str = ""
    is_cut: bool = False  # the body is longer


def page_of(document: Document, *, shows_source: bool = False) -> Page:
    """The page of a document, or of its source. Raises BrowserError if it is not text.

    It takes up to seconds for a large document: run it in a thread.
    """
    kind = document.media_type or _sniffed(document.body)
    if kind not in _HTML_TYPES and not _TEXT_TYPES.fullmatch(kind):
        raise BrowserError("execution", f"The page is {kind or 'of an unknown type'}, which cannot be shown as text.")
    text = decoded(document)
    if shows_source:
        return text_page(VIEW_SOURCE + document.url, document.title, _cut(clean(text), document))
    if kind in _HTML_TYPES:
        html = html_to_text(text, document.url)
        return text_page(document.url, document.title or html.title, _cut(html.text, document), html.links)
    if kind == "text/markdown":
        return _markdown_page(document, clean(text))
    return text_page(document.url, document.title, _cut(clean(text), document))


def _sniffed(body: bytes) -> str:
    if b"\0" in body[:1024] and not body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "binary"
    return "text/html" if body[:1024].lstrip().startswith(b"<") else "text/plain"


def _cut(text: str, document: Document) -> str:
    is_cut = document.is_cut or len(text) > MAX_TEXT
    return text[:MAX_TEXT].removesuffix(CUT) + CUT if is_cut else text


def decoded(document: Document) -> str:
    """The text of a document, in the encoding that it names; bytes that are wrong become U+FFFD."""
    body = document.body
    for mark, name in _MARKS:
        if body.startswith(mark):
            return body[len(mark) :].decode(name, "replace")
    named = _codec(document.charset or "")
    if named is None:
        found = _CHARSET.search(body[:2048])
        named = _codec(found[1].decode()) if found else None
        if named is not None and named.startswith("utf-16"):
            named = "utf-8"  # it could not have been read as ASCII
    if named is not None:
        return body.decode(named, "replace")
    try:
        return body.decode("utf-8", "replace" if document.is_cut else "strict")
    except UnicodeDecodeError:
        return body.decode("cp1252", "replace")


def _codec(label: str) -> str | None:
    """The codec of a charset's label; None if it is unknown or not one for text."""
    try:
        return _CODECS.get(codecs.lookup(label.strip().strip("\"'")).name)
    except (LookupError, ValueError):
        return None


def _markdown_page(document: Document, text: str) -> Page:
    ids: dict[str, int] = {}

    def mark(link: re.Match[str]) -> str:
        label, url = link_text(link[1]), link_target(document.url, link[2])
        if not label or url is None or link[2].startswith("#") or len(ids) >= MAX_LINKS:
            return link[0]
        number = ids.setdefault(url, len(ids))
        domain = domain_of(url)
        return f"【{number}†{label}】" if domain == domain_of(document.url) else f"【{number}†{label}†{clean(domain)}】"

    heading = _MARKDOWN_TITLE.search(text[:20_000])
    title = document.title or (heading[1] if heading else "")
    return text_page(document.url, title, _cut(_MARKDOWN_LINK.sub(mark, text[:MAX_TEXT]), document), list(ids))
