"""Keys of the tools that the server runs, and the entries of `mcp_servers`."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gptoss.config.key import key

DOMAIN = re.compile(r"\w([\w.-]*\w)?")
LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,47}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToolKeys:
    """tools"""

    mcp_servers: dict[str, dict[str, Any]] = key(
        {}, "MCP servers by label: {docs: {url: 'https://...', headers: {...}, allowed_tools: [...]}}", secret=True
    )
    allow_request_mcp_urls: bool = key(False, "let requests name MCP servers by URL; needs request_mcp_hosts")
    request_mcp_hosts: list[str] = key([], "hosts of those URLs: tools.example.com, '*.example.com', or an address")
    private_tool_networks: list[str] = key(
        [], "networks, as 10.0.0.0/8, that URLs of requests and pages may reach although they are not public"
    )
    mcp_timeout_s: float = key(10.0, "time for an MCP server to connect and list its tools", gt=0)
    mcp_refresh_s: float = key(60.0, "interval at which the tools of configured MCP servers are listed again", gt=0)
    browser_backend: Literal["folder", "searxng", "exa", "you"] | None = key(
        None, "where the browser of web_search finds pages; unset: requests that offer web_search run without it"
    )
    browser_folder: Path | None = key(None, "documents that the backend folder searches and opens")
    browser_folder_url: str = key("local:///", "URL of that folder in answers, as https://docs.example.com/")
    browser_url: str | None = key(None, "URL of the SearXNG server of the backend searxng", secret=True)
    browser_domains: list[str] = key([], "domains that the browser may read, with their subdomains; empty: any")
    browser_max_page_bytes: int = key(4 * 2**20, "largest page that the browser fetches; the rest is cut", ge=1024)
    max_tool_calls: int = key(128, "tool calls of one answer, where a request does not set fewer", ge=1)
    tool_timeout_s: float = key(120.0, "time of one tool call", gt=0)
    tool_deadline_s: float = key(600.0, "time from a request's start in which its tools may run", gt=0)
    max_tool_result_bytes: int = key(65_536, "text of one tool result that the model reads", ge=256)
    max_tool_sessions: int = key(64, "live sessions of tools that keep state", ge=1)
    max_tool_sessions_per_key: int = key(16, "live sessions per key", ge=1)
    tool_session_idle_s: float = key(1200.0, "time after its last use that a session is kept", gt=0)


class McpServerEntry(BaseModel):
    """One entry of `mcp_servers`. `${NAME}` in headers and env stands for a variable of the environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: str | None = None
    command: Annotated[list[str], Field(min_length=1)] | None = None
    headers: dict[str, str] = {}
    env: dict[str, str] = {}
    allowed_tools: list[str] | None = None
    description: str | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.url is None) == (self.command is None):
            raise ValueError("exactly one of url and command is needed")
        if self.url is not None and urlsplit(self.url).scheme not in ("http", "https"):
            raise ValueError("url must begin with http:// or https://")
        if self.url is None and self.headers:
            raise ValueError("headers need a url")
        if self.command is None and self.env:
            raise ValueError("env needs a command")
        return self


def mcp_entries(servers: Mapping[str, Mapping[str, Any]]) -> dict[str, McpServerEntry]:
    """The validated entries by label. Raises ValueError, which names the entry and quotes no value."""
    entries = {}
    for label, given in servers.items():
        if not LABEL.fullmatch(str(label)):
            raise ValueError(f"{label!r} is not a label: a letter, then up to 47 letters, digits, '_' or '-'")
        try:
            entries[label] = McpServerEntry.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, (label, *first["loc"])))
            raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    return entries


def filled(values: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """The values with `${NAME}` replaced. Raises ValueError for a variable that is not set."""

    def value_of(found: re.Match[str]) -> str:
        if found[1] not in environment:
            raise ValueError(f"the variable {found[1]} is not set")
        return environment[found[1]]

    return {name: _VARIABLE.sub(value_of, value) for name, value in values.items()}


def check_domains(domains: list[str]) -> list[str]:
    """Returns the domains. Raises ValueError for an invalid host name."""
    for domain in domains:
        if not DOMAIN.fullmatch(domain):
            raise ValueError(f"{domain!r} is not a domain: leave out scheme, port and path")
    return domains


def check_networks(networks: list[str]) -> list[str]:
    """Returns the networks. Raises ValueError for one that cannot be read."""
    for network in networks:
        ipaddress.ip_network(network)
    return networks
