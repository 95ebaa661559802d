"""Where the browser's results and pages come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from gptoss.tools.browser.documents import Document
from gptoss.tools.browser.page import SearchResult

MAX_RESULTS = 20
_RESULTS_BY_CONTEXT = {"low": 5, "medium": 10, "high": MAX_RESULTS}


@dataclass(frozen=True, slots=True)
class Scope:
    """What a request says about its searches."""

    max_results: int = 10
    allowed_domains: tuple[str, ...] | None = None  # with all their subdomains; None: any
    country: str | None = None  # of the user: two letters
    operator_domains: tuple[str, ...] = ()  # as above, of all requests; empty: any
    blocked_domains: tuple[str, ...] = ()  # with all their subdomains

    @classmethod
    def of_options(cls, options: Mapping[str, Any], operator_domains: Sequence[str] = ()) -> Scope:
        """Reads the fields of a request's tool: see SessionOptions."""
        domains, location = options.get("allowed_domains"), options.get("user_location") or {}
        return cls(
            _RESULTS_BY_CONTEXT.get(options.get("search_context_size") or "medium", 10),
            _normal(domains) if domains else None,
            location.get("country") or None,
            _normal(operator_domains),
            _normal(options.get("blocked_domains") or ()),
        )

    def allows(self, url: str) -> bool:
        """Whether pages of this URL may be shown."""
        if self.allowed_domains is None and not self.operator_domains and not self.blocked_domains:
            return True
        try:
            host = (urlsplit(url).hostname or "").rstrip(".").lower()
        except ValueError:
            return False
        # links to arXiv are opened as HTML on ar5iv
        hosts = [host, host.replace("ar5iv.org", "arxiv.org")]
        if _is_within(hosts, self.blocked_domains):
            return False
        return all(_is_within(hosts, names) for names in (self.allowed_domains, self.operator_domains) if names)


def _is_within(hosts: Sequence[str], domains: Sequence[str]) -> bool:
    return any(one == name or one.endswith(f".{name}") for one in hosts for name in domains)


def _normal(domains: Sequence[str]) -> tuple[str, ...]:
    return tuple(domain.lower().strip(".") for domain in domains)


class Backend(Protocol):
    """A search engine with the pages that it finds. Its methods raise BrowserError."""

    async def search(self, query: str, scope: Scope) -> list[SearchResult]:
        """Results, the best first; more than the scope allows are dropped later."""

    async def fetch(self, url: str) -> Document:
        """The document of a URL."""

    async def close(self) -> None:
        """Ends its connections."""


def usable(results: Iterable[SearchResult], scope: Scope) -> list[SearchResult]:
    """The results that the scope allows, each URL once."""
    kept: dict[str, SearchResult] = {}
    for result in results:
        if len(kept) < scope.max_results and scope.allows(result.url):
            kept.setdefault(result.url, result)
    return list(kept.values())
