"""The browser that a configuration describes."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.tools.browser.backend import Backend
from gptoss.tools.browser.folder import DEFAULT_URL, FolderBackend
from gptoss.tools.browser.runner import BrowserRunner
from gptoss.tools.browser.view import CountTokens

BackendName = Literal["folder", "searxng", "exa", "you"]
KEY_VARIABLES: dict[BackendName, str] = {"exa": "EXA_API_KEY", "you": "YDC_API_KEY"}
_PACKAGES = ("lxml",)
_WEB_PACKAGES = ("httpx2", "httpcore2")


@dataclass(frozen=True, slots=True, kw_only=True)
class BrowserSettings:
    """What the operator configures."""

    backend: BackendName
    folder: Path | None = None  # of the folder backend
    folder_url: str = DEFAULT_URL  # under which its documents are shown
    url: str | None = None  # of a SearXNG server
    max_page_bytes: int = 4 * 2**20
    domains: Sequence[str] = ()  # whose pages may be opened, with their subdomains; empty: any
    private_networks: Sequence[str] = ()  # that pages may be on although they are not public


def make_browser(
    config: ServerConfig, count_tokens: CountTokens, environment: Mapping[str, str] = os.environ
) -> BrowserRunner | None:
    """The browser of a server's configuration; None if it has none. Raises ConfigError."""
    if config.browser_backend is None:
        return None
    settings = BrowserSettings(
        backend=config.browser_backend,
        folder=config.browser_folder,
        folder_url=config.browser_folder_url,
        url=config.browser_url,
        max_page_bytes=config.browser_max_page_bytes,
        domains=config.browser_domains,
        private_networks=config.private_tool_networks,
    )
    return build_browser(settings, count_tokens, environment)


def build_browser(
    settings: BrowserSettings, count_tokens: CountTokens, environment: Mapping[str, str]
) -> BrowserRunner:
    """The browser. Raises ConfigError if something is missing."""
    _check_packages(settings.backend)
    return BrowserRunner(_backend(settings, environment), count_tokens, settings.domains)


def _check_packages(backend: BackendName) -> None:
    needed = _PACKAGES if backend == "folder" else (*_PACKAGES, *_WEB_PACKAGES)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"browser_backend {backend!r} requires {' and '.join(missing)}; install the package's extra 'tools', or "
            f"run: pip install {' '.join(needed)}"
        )


def _backend(settings: BrowserSettings, environment: Mapping[str, str]) -> Backend:
    if settings.backend == "folder":
        if settings.folder is None:
            raise ConfigError("browser_backend 'folder' needs browser_folder: the folder of the documents")
        backend = FolderBackend(settings.folder, settings.folder_url)
        backend.warm()
        return backend
    from gptoss.tools.address_guard import AddressPolicy
    from gptoss.tools.browser.search_apis import ExaBackend, SearxngBackend, YouBackend
    from gptoss.tools.browser.web import WebPages

    hosts = tuple(pattern for domain in settings.domains for pattern in (domain, f"*.{domain}"))
    policy = AddressPolicy(hosts or None, tuple(ipaddress.ip_network(one) for one in settings.private_networks))
    if settings.backend == "searxng":
        if settings.url is None or urlsplit(settings.url).scheme not in ("http", "https"):
            raise ConfigError("browser_backend 'searxng' needs browser_url, the http(s) URL of the SearXNG server")
        return SearxngBackend(settings.url, WebPages(policy, settings.max_page_bytes))
    key = environment.get(KEY_VARIABLES[settings.backend], "").strip()
    if not key:
        raise ConfigError(f"browser_backend {settings.backend!r} needs its key in {KEY_VARIABLES[settings.backend]}")
    return ExaBackend(key, policy) if settings.backend == "exa" else YouBackend(key, policy)
