"""A folder of documents instead of the web: its files are the pages, a search ranks their text.

It needs no network. Only files inside the folder are read: links out of it, hidden files and large ones are left out.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from gptoss.config.errors import ConfigError
from gptoss.tools.browser.backend import Scope
from gptoss.tools.browser.documents import Document, page_of
from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.browser.page import Page, SearchResult
from gptoss.tools.browser.ranking import Indexed, best_passage, ranked, term_weights
from gptoss.tools.browser.text import without_links

DEFAULT_URL = "local:///"
MAX_FILE_BYTES = 4 * 2**20
MAX_FILES = 20_000
MAX_INDEXED_BYTES = 256 * 2**20
FRESH_S = 5.0  # a search after this looks for changed files
_INDEX_NAMES = ("index.html", "index.md", "README.md")
_TYPES = {
    **dict.fromkeys((".html", ".htm", ".xhtml"), "text/html"),
    **dict.fromkeys((".md", ".markdown"), "text/markdown"),
}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _File:
    stamp: tuple[int, int]  # time of the last change and size
    title: str
    words: Indexed


@dataclass(slots=True)
class FolderBackend:
    """Documents below `root`, under URLs that begin with `base_url`."""

    root: Path
    base_url: str = DEFAULT_URL
    _files: dict[str, _File] = field(default_factory=dict)  # by path below the root
    _scanned: float = -1e9  # time.monotonic()
    _closed: bool = False
    _indexing: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="browser-index")
    )

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise ConfigError(f"browser_folder: {self.root} is not a folder")
        self.root = self.root.resolve()
        self.base_url = self.base_url if self.base_url.endswith("/") else f"{self.base_url}/"

    def warm(self) -> None:
        """Begins to index the folder, so that the first search waits less."""
        self._indexing.submit(self._fresh_files)

    async def close(self) -> None:
        self._closed = True
        self._indexing.shutdown(wait=False, cancel_futures=True)

    async def search(self, query: str, scope: Scope) -> list[SearchResult]:
        """The best documents that the scope allows, each with the passage that answers the query best."""
        # a call that is cut off does not end the indexing
        files = await asyncio.shield(asyncio.wrap_future(self._indexing.submit(self._fresh_files)))
        return await asyncio.to_thread(self._search, files, query, scope)

    async def fetch(self, url: str) -> Document:
        return await asyncio.to_thread(self._read_url, url)

    def _search(self, indexed: Mapping[str, _File], query: str, scope: Scope) -> list[SearchResult]:
        files = {path: one.words for path, one in indexed.items() if scope.allows(self._url(path))}
        found = []
        weights = term_weights(query, files.values())
        for path in ranked(weights, files):
            page = self._page(path)
            if page is not None:
                text = without_links("\n".join(page.lines[2:])).split("\n")
                lines = [line for line in text if line.strip("# ") != page.title]
                found.append(SearchResult(page.title, page.url, best_passage(weights, lines)))
            if len(found) == scope.max_results:
                break
        return found

    def _fresh_files(self) -> Mapping[str, _File]:
        """The index, which is made again if it is old. Runs in one thread alone."""
        started = time.monotonic()
        if started - self._scanned > FRESH_S:
            before, self._files = self._files, self._scan()
            self._scanned = time.monotonic()
            if len(before) != len(self._files):
                logger.info("browser: %d documents, indexed in %.1f s", len(self._files), self._scanned - started)
        return self._files

    def _scan(self) -> dict[str, _File]:
        """The index of all files; those that have not changed are taken from the last one."""
        found: dict[str, _File] = {}
        num_bytes = 0
        for path, stat in self._paths():
            if self._closed:
                break
            if len(found) >= MAX_FILES or num_bytes >= MAX_INDEXED_BYTES:
                logger.warning("browser: only the first %d files of the folder are searched", len(found))
                break
            known = self._files.get(path)
            stamp = stat.st_mtime_ns, stat.st_size
            if known is None or known.stamp != stamp:
                page = self._page(path)
                if page is None:
                    continue
                text = without_links("\n".join(page.lines[2:]))
                known = _File(stamp, page.title, Indexed.of(f"{page.title} {path}", text))
            found[path] = known
            num_bytes += stat.st_size
        return found

    def _paths(self) -> Iterator[tuple[str, os.stat_result]]:
        """Path and stat of each file that may be a page, in a fixed order."""
        for folder, folders, names in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = Path(folder, name)
                relative = path.relative_to(self.root).as_posix()
                try:
                    inside = self._inside(relative)
                    stat = inside.stat() if inside is not None else None
                except OSError:
                    continue
                if stat is not None and stat.st_size <= MAX_FILE_BYTES:
                    yield relative, stat

    def _inside(self, relative: str) -> Path | None:
        """The file at this path; None unless it is a regular file inside the folder, and not hidden."""
        if "\0" in relative or any(part.startswith(".") for part in relative.split("/")):
            return None
        path = (self.root / relative).resolve()
        hidden = path.is_relative_to(self.root) and any(
            part.startswith(".") for part in path.relative_to(self.root).parts
        )
        return path if path.is_relative_to(self.root) and path.is_file() and not hidden else None

    def _url(self, relative: str) -> str:
        return self.base_url + quote(relative, errors="surrogateescape")

    def _page(self, relative: str) -> Page | None:
        """The page of a file; None if it is not text, or is gone."""
        try:
            path = self._inside(relative)
            return None if path is None else page_of(self._document(path, relative))
        except (OSError, BrowserError):
            return None

    def _document(self, path: Path, relative: str) -> Document:
        with path.open("rb") as file:
            body = file.read(MAX_FILE_BYTES + 1)
        kind = _TYPES.get(path.suffix.lower(), "")
        if kind == "" and b"\0" not in body[:1024]:
            kind = "text/plain"
        title = "" if kind in ("text/html", "text/markdown") else path.name
        return Document(
            self._url(relative), body[:MAX_FILE_BYTES], kind, title=title, is_cut=len(body) > MAX_FILE_BYTES
        )

    def _read_url(self, url: str) -> Document:
        path = re.split("[?#]", url, maxsplit=1)[0]
        if not path.startswith(self.base_url):
            raise BrowserError("execution", f"Only documents below {self.base_url} can be opened here: search for one.")
        relative = unquote(path.removeprefix(self.base_url), errors="surrogateescape")
        names = [relative] if relative and not relative.endswith("/") else []
        names += [f"{relative.rstrip('/')}/{name}".lstrip("/") for name in _INDEX_NAMES]
        missing = BrowserError("http", f"There is no document {url}.", 404)
        try:
            for name in names:
                inside = self._inside(name)
                if inside is not None:
                    return self._document(inside, name)
        except (OSError, ValueError) as error:
            raise missing from error
        raise missing
