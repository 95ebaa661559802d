"""Pages from the web, fetched by this server: bounded, and from addresses that a policy allows."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from http.cookiejar import DefaultCookiePolicy
from urllib.parse import urljoin

import httpx2

from gptoss import __version__
from gptoss.tools.address_guard import AddressPolicy, AddressRefusedError
from gptoss.tools.browser.documents import Document
from gptoss.tools.browser.errors import BrowserError
from gptoss.tools.guarded_http import guarded_client

MAX_BYTES = 4 * 2**20  # of a page, decompressed
MAX_REDIRECTS = 10
TIMEOUT_S = 15.0  # of connecting, and of each read
HEADERS = {
    "User-Agent": f"Mozilla/5.0 (compatible; gptoss/{__version__})",
    "Accept": "text/html,application/xhtml+xml,text/*;q=0.9,application/json;q=0.9,*/*;q=0.5",
    "Accept-Language": "en,*;q=0.5",
    "Accept-Encoding": "gzip, identity",  # what read_bounded knows
}


class WebPages:
    """Fetches pages. Cookies are neither kept nor sent: one client serves all conversations."""

    def __init__(self, policy: AddressPolicy, max_bytes: int = MAX_BYTES) -> None:
        self._client = guarded_client(policy, headers=HEADERS, timeout=TIMEOUT_S)
        self._client.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._max_bytes = max_bytes

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, url: str) -> Document:
        """The document of a URL, after redirects. Raises BrowserError."""
        try:
            for _ in range(MAX_REDIRECTS + 1):
                async with self._client.stream("GET", url) as response:
                    location = response.headers.get("location") if response.is_redirect else None
                    if location is None:
                        return await self._read(response)
                    url = urljoin(url, location)
        except AddressRefusedError as error:
            raise BrowserError("execution", f"This page may not be opened: {error.message}.") from None
        except (httpx2.InvalidURL, ValueError):
            raise BrowserError("execution", "The page redirects to something that is not a URL.") from None
        except httpx2.TimeoutException:
            raise BrowserError("timeout", "The page did not answer in time.") from None
        except httpx2.HTTPError as error:
            raise BrowserError("unavailable", f"The page cannot be loaded: {_reason(error)}.") from None
        raise BrowserError("execution", f"The page redirects more than {MAX_REDIRECTS} times.")

    async def _read(self, response: httpx2.Response) -> Document:
        if response.status_code >= 400:
            code = response.status_code
            raise BrowserError("http", f"The page answers with status {code} {response.reason_phrase}.".strip(), code)
        body, is_cut = await read_bounded(response, self._max_bytes)
        media_type, charset = _content_type(response.headers.get("content-type", ""))
        return Document(str(response.url), body, media_type, charset, is_cut=is_cut)


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200].rstrip(".")


def _content_type(header: str) -> tuple[str, str | None]:
    """Media type and charset of a Content-Type header."""
    kind, *parameters = header.split(";")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return kind.strip().lower(), value.strip()
    return kind.strip().lower(), None


async def read_bounded(response: httpx2.Response, max_bytes: int) -> tuple[bytes, bool]:
    """The decompressed body up to `max_bytes`, and whether there is more.

    Raises BrowserError, or httpx2's errors. httpx2 would decompress a chunk as a whole, whatever its size becomes.
    """
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise BrowserError("execution", f"The page is compressed with {encoding[:40]!r}, which was not asked for.")
    parts: list[bytes] = []
    size = 0
    async for part in _decompressed(response.aiter_raw(), encoding, max_bytes + 1):
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            break
    return b"".join(parts)[:max_bytes], size > max_bytes


async def _decompressed(chunks: AsyncIterator[bytes], encoding: str, max_bytes: int) -> AsyncIterator[bytes]:
    """Parts of the decompressed body, none longer than `max_bytes`."""
    if encoding in ("identity", ""):
        async for chunk in chunks:
            yield chunk
        return
    decoder = zlib.decompressobj(32 + zlib.MAX_WBITS)  # gzip or zlib
    is_first = True
    async for chunk in chunks:
        try:
            part = decoder.decompress(chunk, max_bytes)
        except zlib.error:
            if not is_first or encoding != "deflate":
                raise BrowserError("execution", "The page's compressed data is damaged.") from None
            decoder = zlib.decompressobj(-zlib.MAX_WBITS)  # deflate without a header, as some servers send it
            part = _raw(decoder, chunk, max_bytes)
        is_first = False
        if part:
            yield part


def _raw(decoder: zlib._Decompress, chunk: bytes, max_bytes: int) -> bytes:
    try:
        return decoder.decompress(chunk, max_bytes)
    except zlib.error:
        raise BrowserError("execution", "The page's compressed data is damaged.") from None
