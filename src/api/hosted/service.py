"""The tools of a server: made from its configuration, and prepared for each request."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptoss.api.hosted.entries import HostedEntry, McpEntry, PlacedEntry
from gptoss.api.hosted.names import hashed_name, joined_name
from gptoss.api.hosted.registry import make_builtins
from gptoss.api.http.errors import InvalidRequest
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.config.tool_keys import mcp_entries
from gptoss.generation.background import Background
from gptoss.generation.hosted import HostedTool, HostedTools, LoopLimits
from gptoss.generation.request import FunctionTool
from gptoss.generation.tool_sessions import SessionChain, SessionLimits, ToolSessions
from gptoss.generation.tool_types import McpTool, ToolFailure
from gptoss.harmony.conversation import ToolNamespace
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.enforce import enforceable
from gptoss.harmony.vocabulary_files import Vocabulary
from gptoss.lru_cache import LruCache
from gptoss.tools.address_guard import AddressRefusedError
from gptoss.tools.mcp.runner import McpRunner
from gptoss.tools.mcp.servers import (
    ConfiguredServer,
    Listing,
    McpServers,
    RequestServer,
    RequestUrls,
    address_policy,
    target_of,
)

REQUEST_SERVER = "mcp:request"  # the name of all servers that requests name, whose labels are anything
DRAIN_S = 8.0
RESULT_BYTES = 16 * 2**20  # of results that are kept for later requests


@dataclass(frozen=True, slots=True)
class ShownListing:
    """The tools of one server, as they are reported."""

    label: str
    tools: Sequence[McpTool] = ()
    failure: ToolFailure | None = None
    is_known: bool = False  # the request's items have it already


@dataclass(slots=True)
class Prepared:
    """What a request offers of the server's tools."""

    chain: SessionChain
    entries: dict[str, HostedEntry] = field(default_factory=dict)  # by their field of the request
    functions: list[FunctionTool] = field(default_factory=list)
    where: list[str] = field(default_factory=list)  # of each function
    namespaces: list[ToolNamespace] = field(default_factory=list)
    by_name: dict[str, HostedTool] = field(default_factory=dict)
    listings: list[ShownListing] = field(default_factory=list)
    labels: dict[str, tuple[str, str]] = field(default_factory=dict)  # model's name: label, tool
    recipients: dict[str, list[str]] = field(default_factory=dict)  # type of an entry: what it offers
    keep_result: Callable[[str, str], object] = lambda item, text: None  # of an item, as the model reads it

    def names_of(self, label: str, tool: str | None = None) -> list[str]:
        """The model's names of a server's tools, or of one of them."""
        return [name for name, (of, own) in self.labels.items() if of == label and tool in (None, own)]

    @property
    def hosted(self) -> frozenset[str]:
        return frozenset(self.by_name)


class ToolService:
    """The tools of a server."""

    def __init__(self, config: ServerConfig, vocabulary: Vocabulary) -> None:
        """Makes the tools that are configured; nothing runs before `start`. Raises ConfigError."""
        self._config = config
        self.background = Background()
        limits = SessionLimits(config.max_tool_sessions, config.max_tool_sessions_per_key, config.tool_session_idle_s)
        self.sessions = ToolSessions(limits, self.background)
        self.builtins = make_builtins(config, lambda text: len(vocabulary.encode(text)))
        self.mcp = _make_mcp(config)
        # what the model read of results, by tenant and id of the item, for later requests of the same turn
        self.results: LruCache[tuple[str, str], str] = LruCache(RESULT_BYTES, lambda _, text: len(text))
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to connect to MCP servers; returns at once."""
        self.mcp.start()
        self._sweeping = asyncio.get_running_loop().create_task(self.sessions.sweep())

    async def close(self) -> None:
        """Ends all sessions, processes and connections."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        self.sessions.close()
        await self.background.drain(DRAIN_S)
        for runner in self.builtins.values():
            await runner.close()
        await self.mcp.close()

    def runs(self, kind: str) -> bool:
        """Whether entries of this type are run here; others are left out."""
        if kind == "mcp":
            return True
        name = {"code_interpreter": "python"}.get(kind, "browser")
        return name in self.builtins

    async def prepare(
        self,
        entries: Sequence[PlacedEntry],
        tenant: str,
        previous: str | None = None,
        known: Mapping[str, Sequence[McpTool]] | None = None,
        taken: Sequence[str] = (),
        containers: Sequence[str] = (),
    ) -> Prepared:
        """Lists the tools of the entries, each server within its time.

        `previous`: id of the response that the request continues. `known`: tools that its items list, by label.
        `taken`: names of the client's functions. `containers`: ids of sessions that its items used, the last one last.
        The caller finishes the chain, also if this raises InvalidRequest.
        """
        prepared = Prepared(self.sessions.chain(tenant, previous), {one.where: one.entry for one in entries})
        prepared.keep_result = lambda item, text: self.results.put((tenant, item), text)
        try:
            servers = [self._server(one) for one in entries]
            for server in servers:
                if isinstance(server, RequestServer):
                    prepared.chain.also_close(server.close)
            found = await asyncio.gather(
                *(_listing(one, server, known or {}) for one, server in zip(entries, servers, strict=True))
            )
            for one, server, listing in zip(entries, servers, found, strict=True):
                if isinstance(one.entry, McpEntry):
                    assert server is not None and listing is not None
                    self._add_server(prepared, one, server, listing, taken)
                else:
                    self._check_memory(one)
                    self._add_builtin(prepared, one, containers)
        except BaseException:
            prepared.chain.finish(None)
            raise
        return prepared

    def hosted_tools(
        self,
        prepared: Prepared,
        *,
        max_calls: int | None,
        parallel: bool,
        keeps_sessions: bool = False,
        shows_containers: bool = False,
        shows_pages: bool = False,
    ) -> HostedTools:
        """What the request's loop runs. `max_calls`: as the request has it.

        `shows_containers`, `shows_pages`: the client reads ids of sessions of Python, of the browser.
        """
        config = self._config
        limits = LoopLimits(
            min(config.max_tool_calls, max_calls or config.max_tool_calls),
            config.tool_deadline_s,
            config.tool_timeout_s,
            config.max_tool_result_bytes,
        )
        named = frozenset(
            name for name, is_shown in (("python", shows_containers), ("browser", shows_pages)) if is_shown
        )
        return HostedTools(prepared.by_name, prepared.chain, self.background, limits, parallel, keeps_sessions, named)

    def _server(self, placed: PlacedEntry) -> ConfiguredServer | RequestServer | None:
        """The server of an entry; None for a built-in tool. Raises InvalidRequest."""
        entry = placed.entry
        if not isinstance(entry, McpEntry):
            return None
        if entry.server_url is None:
            server = self.mcp.configured.get(entry.server_label)
            if server is None:
                text = f"No MCP server {entry.server_label!r} is configured: name one that is, or a 'server_url'."
                raise InvalidRequest(text, f"{placed.where}.server_label", "invalid_value")
            return server
        headers = dict(entry.headers or {})
        if entry.authorization is not None:
            headers["authorization"] = f"Bearer {entry.authorization.removeprefix('Bearer ')}"
        _check_headers(headers, placed.where)
        try:
            return self.mcp.of_url(entry.server_url, headers)
        except AddressRefusedError as error:
            where = f"{placed.where}.{placed.field}"
            raise InvalidRequest(f"'{where}' may not be used: {error.message}.", where, "invalid_value") from None

    def _add_server(
        self,
        prepared: Prepared,
        placed: PlacedEntry,
        server: ConfiguredServer | RequestServer,
        listing: ShownListing,
        taken: Sequence[str],
    ) -> None:
        entry = placed.entry
        assert isinstance(entry, McpEntry)
        if any(one.label == listing.label for one in prepared.listings):
            text = f"Two MCP servers have the label {listing.label!r}."
            raise InvalidRequest(text, f"{placed.where}.server_label", "invalid_value")
        allowed = self._config.mcp_servers.get(listing.label, {}).get("allowed_tools")
        of_server = isinstance(server, ConfiguredServer) and allowed is not None
        offered = [
            tool
            for tool in listing.tools
            if entry.allows(tool)
            and (not of_server or tool.name in (allowed or ()))
            and (placed.allows is None or placed.allows(tool.name))
        ]
        prepared.listings.append(ShownListing(listing.label, offered, listing.failure, listing.is_known))
        name = f"mcp:{listing.label}" if isinstance(server, ConfiguredServer) else REQUEST_SERVER
        runner = McpRunner(name, server)
        for index, tool in enumerate(offered):
            model_name = joined_name(listing.label, tool.name)
            if model_name in prepared.by_name or model_name in taken:
                model_name = hashed_name(listing.label, tool.name)
            introduction = (entry.server_description,) if index == 0 else ()
            description = "\n\n".join(filter(None, (*introduction, tool.description))) or None
            label = f"'{tool.name}' of MCP server '{listing.label}'"
            prepared.functions.append(FunctionTool(model_name, description, _usable(tool.input_schema), label=label))
            prepared.where.append(placed.where)
            prepared.labels[model_name] = (listing.label, tool.name)
            prepared.by_name[model_name] = HostedTool(runner, tool.name, entry.needs_approval(tool))

    def _check_memory(self, placed: PlacedEntry) -> None:
        """Raises InvalidRequest for a container that is larger than this server's."""
        assert not isinstance(placed.entry, McpEntry)
        most = self._config.python_tool_memory_bytes
        wanted = placed.entry.options().get("memory_bytes")
        if wanted is not None and wanted > most:
            text = f"Containers of this server have at most {most} bytes of memory (python_tool_memory_bytes)."
            raise InvalidRequest(text, f"{placed.where}.container.memory_limit", "invalid_value")

    def _add_builtin(self, prepared: Prepared, placed: PlacedEntry, containers: Sequence[str]) -> None:
        entry = placed.entry
        assert not isinstance(entry, McpEntry)
        runner = self.builtins[entry.runner]
        space = runner.namespace
        assert space is not None
        if any(one.name == space.name for one in prepared.namespaces):
            return  # web_search twice
        prepared.namespaces.append(space)
        prepared.recipients[entry.type] = [*space.recipients]
        session_id = entry.session_id
        if session_id is None:  # `auto` continues in the container of the items
            live = (one for one in reversed(containers) if prepared.chain.has(runner, one))
            session_id = next(live, None)
        given = {**entry.options(), **(placed.options or {})}
        options = {name: value for name, value in given.items() if value is not None}
        for recipient in space.recipients:
            most = (placed.max_uses or {}).get(recipient)
            prepared.by_name[recipient] = HostedTool(runner, recipient, False, options, session_id, most)


async def _listing(
    placed: PlacedEntry, server: ConfiguredServer | RequestServer | None, known: Mapping[str, Sequence[McpTool]]
) -> ShownListing | None:
    """The listing of an entry's server; None for a built-in tool."""
    entry = placed.entry
    if server is None or not isinstance(entry, McpEntry):
        return None
    label = entry.server_label
    if label in known:  # tools that are gone since then fail when they are called
        return ShownListing(label, known[label], is_known=True)
    listing: Listing = await server.listing()
    return ShownListing(label, listing.tools, listing.failure)


def _usable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, or that of any object where a server's is none: the request is not at fault."""
    try:
        enforceable(schema, False, arguments=True, where="parameters")
    except (SchemaError, RecursionError):
        return {"type": "object"}
    return schema


def _check_headers(headers: Mapping[str, str], where: str) -> None:
    """Raises InvalidRequest for a header that HTTP does not allow, or that is not the request's to set."""
    for name, value in headers.items():
        is_token = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
        is_text = value.isascii() and value.isprintable()
        if not is_token or not is_text or name.lower() in ("host", "content-length", "transfer-encoding", "connection"):
            raise InvalidRequest("This header cannot be sent.", f"{where}.headers", "invalid_value")


def _make_mcp(config: ServerConfig) -> McpServers:
    if (config.mcp_servers or config.allow_request_mcp_urls) and importlib.util.find_spec("mcp") is None:
        raise ConfigError(
            "mcp_servers and allow_request_mcp_urls require mcp; install the package's extra 'tools', or run: "
            "pip install 'mcp>=2.3,<3'"
        )
    try:
        targets = {label: target_of(entry) for label, entry in mcp_entries(config.mcp_servers).items()}
    except ValueError as error:
        raise ConfigError(f"mcp_servers: {error}") from None
    try:
        policy = address_policy(config.request_mcp_hosts, config.private_tool_networks)
    except ValueError as error:
        raise ConfigError(f"request_mcp_hosts: {error}") from None
    urls = RequestUrls(config.allow_request_mcp_urls, policy)
    return McpServers(targets, urls, config.mcp_timeout_s, config.mcp_refresh_s, shows_log=config.log_content)
