"""`tools`, `tool_choice` and changes of them in mid-conversation as a ToolPolicy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import ValidationError

from gptoss.api.hosted.entries import CodeInterpreterEntry, McpEntry, PlacedEntry, SearchFilters, WebSearchEntry
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.errors import InvalidRequest, from_validation
from gptoss.api.messages.schema.blocks import SystemMessage, ToolChangeBlock
from gptoss.api.messages.schema.request import CountTokensRequest, field_of
from gptoss.api.messages.schema.tools import CustomTool, McpToolset, SearchOptions, ServerTool
from gptoss.api.messages.server_tools import runs_nothing
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.request import FunctionTool, ToolPolicy

logger = logging.getLogger(__name__)
_warn_server_tools = WarnOnce(logger, "tools that Anthropic's servers run are left out: %s", limit=100)
Mode = Literal["auto", "none", "required"]
SEARCH = "browser.search"
_MODES: dict[str, Mode] = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


@dataclass(frozen=True, slots=True)
class OfferedTools:
    policy: ToolPolicy
    fields: list[str]  # of the request, one for each tool


def builtin_entries(request: CountTokensRequest, runs: Callable[[str], bool]) -> list[PlacedEntry]:
    """The built-in tools that this server runs. Raises InvalidRequest.

    `runs`: whether it runs those of a type.
    """
    found: list[PlacedEntry] = []
    for index, tool in enumerate(request.tools or ()):
        kind = tool.kind if isinstance(tool, ServerTool) else None
        if not isinstance(tool, ServerTool) or kind is None or not runs(kind):
            continue
        if kind == "web_search":
            found.append(_search_entry(tool, index))
        else:
            found.append(PlacedEntry(f"tools.{index}", CodeInterpreterEntry(type="code_interpreter")))
    return found


def _search_entry(tool: ServerTool, index: int) -> PlacedEntry:
    try:
        options = SearchOptions.model_validate(tool.model_dump(include={*SearchOptions.model_fields}))
    except ValidationError as error:
        raise from_validation(error, ("tools", index), field_of) from None
    filters = SearchFilters(allowed_domains=options.allowed_domains)
    entry = WebSearchEntry(type="web_search", filters=filters, user_location=options.user_location)
    blocked = {"blocked_domains": tuple(options.blocked_domains)} if options.blocked_domains else {}
    most = {SEARCH: options.max_uses} if options.max_uses is not None else {}
    return PlacedEntry(f"tools.{index}", entry, options=blocked, max_uses=most)


def hosted_entries(request: CountTokensRequest) -> list[PlacedEntry]:
    """The MCP servers whose tools are offered. Raises InvalidRequest.

    In Anthropic's older form a server's tools are offered with it, in the newer one by an `mcp_toolset`.
    """
    toolsets = {tool.mcp_server_name: tool for tool in request.tools or () if isinstance(tool, McpToolset)}
    names = {server.name for server in request.mcp_servers or ()}
    for index, tool in enumerate(request.tools or ()):
        if isinstance(tool, McpToolset) and tool.mcp_server_name not in names:
            text = f"No MCP server in 'mcp_servers' has the name {tool.mcp_server_name!r}."
            raise InvalidRequest(text, f"tools.{index}.mcp_server_name", "invalid_value")
    found = []
    for index, server in enumerate(request.mcp_servers or ()):
        toolset, config = toolsets.get(server.name), server.tool_configuration
        if config is not None and config.enabled is False:
            continue
        entry = McpEntry.model_construct(
            type="mcp",
            server_label=server.name,
            server_url=server.url,
            authorization=server.authorization_token,
            allowed_tools=config.allowed_tools if config is not None else None,
            require_approval="never",
        )
        where = f"mcp_servers.{index}"
        if server.url is None and server.authorization_token is not None:
            text = "'authorization_token' needs 'url': a configured server has its own."
            raise InvalidRequest(text, f"{where}.authorization_token", "unsupported_parameter")
        found.append(PlacedEntry(where, entry, toolset.allows if toolset is not None else None, field="url"))
    return found


def read_tools(
    request: CountTokensRequest, hosted: Prepared | None = None, runs: Callable[[str], bool] = runs_nothing
) -> OfferedTools:
    """The tools that the model may call, in an order that keeps the beginning of the prompt.

    `hosted`: what the server runs of them; it comes last. `runs`: whether it runs those of a type.

    Tools that are added later come last, and removed ones are shown but may not be called.

    Raises InvalidRequest naming the field.
    """
    offered: list[tuple[str, CustomTool]] = []
    for index, tool in enumerate(request.tools or ()):
        if isinstance(tool, CustomTool):
            offered.append((f"tools.{index}", tool))
        elif isinstance(tool, ServerTool) and (tool.kind is None or not runs(tool.kind)):
            _warn_server_tools([tool.type])
    names = {tool.name for _, tool in offered}
    removed: set[str] = set()
    for where, change in _changes(request):
        name = change.tool.tool
        if change.type == "tool_removal":
            removed.add(name)
            continue
        removed.discard(name)
        if name not in names and change.tool.definition is not None:
            names.add(name)
            offered.append((f"{where}.tool.definition", change.tool.definition))
    tools = [FunctionTool(t.name, t.description, t.input_schema, bool(t.strict)) for _, t in offered]
    fields = [where for where, _ in offered]
    if hosted is None:
        return OfferedTools(_policy(request, tools, removed), fields)
    policy = _policy(request, [*tools, *hosted.functions], removed)
    policy = replace(
        policy, builtins=hosted.namespaces, hosted=hosted.hosted, allowed=_allowed(policy, hosted, request)
    )
    return OfferedTools(policy, [*fields, *hosted.where])


def _allowed(policy: ToolPolicy, hosted: Prepared, request: CountTokensRequest) -> Sequence[str] | None:
    """The names that may be called; that of a built-in tool stands for its functions."""
    if policy.allowed is None:
        return None
    kinds = {tool.name or tool.type: tool.kind for tool in request.tools or () if isinstance(tool, ServerTool)}
    chosen = request.tool_choice is not None and request.tool_choice.type == "tool"
    names = [hosted.recipients.get(kinds.get(name) or "", [name]) for name in policy.allowed]
    more = [] if chosen else [name for found in hosted.recipients.values() for name in found]
    return [*(name for found in names for name in found), *more]


def _policy(request: CountTokensRequest, tools: list[FunctionTool], removed: set[str]) -> ToolPolicy:
    choice = request.tool_choice
    allowed = [tool.name for tool in tools if tool.name not in removed] if removed else None
    if choice is None:
        return ToolPolicy(tools, allowed=allowed)
    max_calls = 1 if choice.disable_parallel_tool_use else None
    if choice.type == "tool":
        assert choice.name is not None
        if choice.name in removed:
            message = f"'tool_choice.name' is {choice.name!r}, a tool that was removed."
            raise InvalidRequest(message, "tool_choice.name", "invalid_value")
        allowed = [choice.name]
    elif choice.type == "any" and allowed == []:
        raise InvalidRequest("'tool_choice' is 'any', but every tool was removed.", "tool_choice", "invalid_value")
    return ToolPolicy(tools, _MODES[choice.type], allowed, max_calls)


def _changes(request: CountTokensRequest) -> Iterator[tuple[str, ToolChangeBlock]]:
    for index, message in enumerate(request.messages):
        if isinstance(message, SystemMessage) and not isinstance(message.content, str):
            for position, block in enumerate(message.content):
                if isinstance(block, ToolChangeBlock):
                    yield f"messages.{index}.content.{position}", block
