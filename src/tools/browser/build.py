"""The browser that a configuration describes."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.tools.browser.backend import Backend
from gptoss.tools.browser.folder import FolderBackend
from gptoss.tools.browser.runner import BrowserRunner
from gptoss.tools.browser.view import CountTokens

BackendName = Literal["folder", "searxng", "exa", "you"]
KEY_VARIABLES: dict[BackendName, str] = {"exa": "EXA_API_KEY", "you": "YDC_API_KEY"}
_PACKAGES = ("lxml",)
_WEB_PACKAGES = ("httpx2", "httpcore2")


def make_browser(
    config: ServerConfig, count_tokens: CountTokens, environment: Mapping[str, str] = os.environ
) -> BrowserRunner | None:
    """The browser of a configuration; None if it has none. Raises ConfigError if something is missing."""
    name = config.browser_backend
    if name is None:
        return None
    _check_packages(name)
    return BrowserRunner(_backend(name, config, environment), count_tokens, config.browser_domains)


def _check_packages(backend: BackendName) -> None:
    needed = _PACKAGES if backend == "folder" else (*_PACKAGES, *_WEB_PACKAGES)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"browser_backend {backend!r} requires {' and '.join(missing)}; install the package's extra 'tools', or "
            f"run: pip install {' '.join(needed)}"
        )


def _backend(name: BackendName, config: ServerConfig, environment: Mapping[str, str]) -> Backend:
    if name == "folder":
        assert config.browser_folder is not None
        backend = FolderBackend(config.browser_folder, config.browser_folder_url)
        backend.warm()
        return backend
    from gptoss.tools.address_guard import AddressPolicy
    from gptoss.tools.browser.search_apis import ExaBackend, SearxngBackend, YouBackend
    from gptoss.tools.browser.web import WebPages

    hosts = tuple(pattern for domain in config.browser_domains for pattern in (domain, f"*.{domain}"))
    networks = tuple(ipaddress.ip_network(one) for one in config.private_tool_networks)
    policy = AddressPolicy(hosts or None, networks)
    if name == "searxng":
        if config.browser_url is None or urlsplit(config.browser_url).scheme not in ("http", "https"):
            raise ConfigError("browser_url is not the http(s) URL of a SearXNG server")
        return SearxngBackend(config.browser_url, WebPages(policy, config.browser_max_page_bytes))
    key = environment.get(KEY_VARIABLES[name], "").strip()
    if not key:
        raise ConfigError(f"browser_backend {name!r} needs its key in the variable {KEY_VARIABLES[name]}")
    return ExaBackend(key, policy) if name == "exa" else YouBackend(key, policy)
