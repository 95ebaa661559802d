"""Entries of `tools` that the server runs: their fields, and what they allow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Discriminator, Field, StringConstraints, Tag, ValidationError

from gptoss.api.http.errors import InvalidRequest, from_validation
from gptoss.api.http.fields import Strict
from gptoss.config.tool_keys import DOMAIN, LABEL
from gptoss.generation.tool_types import McpTool

Label = Annotated[str, StringConstraints(pattern=f"^{LABEL.pattern}$")]
Domain = Annotated[str, StringConstraints(pattern=f"^{DOMAIN.pattern}$", max_length=253)]
Place = tuple[int | str, ...]
WEB_SEARCH = ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11")
CODE_INTERPRETER = ("code_interpreter",)
MEMORY = {"1g": 2**30, "4g": 4 * 2**30, "16g": 16 * 2**30, "64g": 64 * 2**30}


def _form(given: Any) -> str:
    """The tag of a field's form, so that an error is about the form that was sent."""
    return "<object>" if isinstance(given, Mapping | Strict) else "<plain>"


class ToolFilter(Strict):
    """Tools of a server: those that match all that is given.

    A field that is not known is an error: a filter without it would match more.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    tool_names: list[str] | None = None
    read_only: bool | None = None

    @property
    def is_empty(self) -> bool:
        return self.tool_names is None and self.read_only is None

    def matches(self, tool: McpTool) -> bool:
        named = self.tool_names is None or tool.name in self.tool_names
        return named and (self.read_only is None or self.read_only == tool.is_read_only)


class ApprovalRules(Strict):
    model_config = ConfigDict(strict=True, extra="forbid")

    always: ToolFilter | None = None
    never: ToolFilter | None = None


AllowedTools = Annotated[
    Annotated[list[str], Tag("<plain>")] | Annotated[ToolFilter, Tag("<object>")], Discriminator(_form)
]
RequiredApproval = Annotated[
    Annotated[Literal["always", "never"], Tag("<plain>")] | Annotated[ApprovalRules, Tag("<object>")],
    Discriminator(_form),
]


class McpEntry(Strict):
    """A server by its label in the configuration, or by its URL."""

    also_known = frozenset({"defer_loading", "allowed_callers"})
    opaque = frozenset({"headers"})

    type: Literal["mcp"]
    server_label: Label
    server_url: Annotated[str, Field(max_length=2048)] | None = None
    connector_id: str | None = None
    tunnel_id: str | None = None
    server_description: str | None = None
    headers: Annotated[dict[str, str], Field(max_length=64)] | None = None
    authorization: str | None = None
    allowed_tools: AllowedTools | None = None
    require_approval: RequiredApproval | None = None

    def allows(self, tool: McpTool) -> bool:
        """Whether the request offers the tool."""
        allowed = self.allowed_tools
        if isinstance(allowed, ToolFilter):
            return allowed.matches(tool)
        return allowed is None or tool.name in allowed

    def needs_approval(self, tool: McpTool) -> bool:
        """Whether a call has to be approved. What no rule names has to be; an empty `never` names nothing."""
        rules = self.require_approval
        if not isinstance(rules, ApprovalRules):
            return rules != "never"
        if rules.always is not None and rules.always.matches(tool):
            return True
        return rules.never is None or rules.never.is_empty or not rules.never.matches(tool)

    def shown(self) -> dict[str, Any]:
        """The entry as a response repeats it: without what gives access."""
        return self.model_dump(exclude_none=True, exclude={"headers", "authorization"})


class SearchFilters(Strict):
    allowed_domains: Annotated[list[Domain], Field(max_length=100)] | None = None


class UserLocation(Strict):
    type: Literal["approximate"] | None = None
    city: Annotated[str, Field(max_length=256)] | None = None
    country: Annotated[str, StringConstraints(pattern="^[A-Za-z]{2}$")] | None = None
    region: Annotated[str, Field(max_length=256)] | None = None
    timezone: Annotated[str, Field(max_length=256)] | None = None


class WebSearchEntry(Strict):
    runner: ClassVar[str] = "browser"
    also_known = frozenset({"external_web_access", "search_content_types"})

    type: Literal[WEB_SEARCH]  # type: ignore[valid-type]
    filters: SearchFilters | None = None
    search_context_size: Literal["low", "medium", "high"] | None = None
    user_location: UserLocation | None = None

    def shown(self) -> dict[str, Any]:
        """The entry as a response repeats it."""
        return self.model_dump(exclude_none=True)

    def options(self) -> dict[str, Any]:
        """What the session is opened with."""
        domains = self.filters.allowed_domains if self.filters is not None else None
        return {
            "allowed_domains": None if domains is None else tuple(domains),
            "search_context_size": self.search_context_size or "medium",
            "user_location": self.user_location.model_dump(exclude_none=True) if self.user_location else None,
        }

    @property
    def session_id(self) -> str | None:
        return None


class AutoContainer(Strict):
    type: Literal["auto"]
    file_ids: list[str] | None = None
    memory_limit: Literal["1g", "4g", "16g", "64g"] | None = None
    network_policy: Any = None


ContainerField = Annotated[
    Annotated[str, Tag("<plain>")] | Annotated[AutoContainer, Tag("<object>")], Discriminator(_form)
]


class CodeInterpreterEntry(Strict):
    runner: ClassVar[str] = "python"

    type: Literal["code_interpreter"]
    container: ContainerField | None = None

    def shown(self) -> dict[str, Any]:
        """The entry as a response repeats it."""
        return {"container": {"type": "auto"}} | self.model_dump(exclude_none=True)

    def options(self) -> dict[str, Any]:
        """What the session is opened with."""
        limit = self.container.memory_limit if isinstance(self.container, AutoContainer) else None
        return {"memory_bytes": None if limit is None else MEMORY[limit]}

    @property
    def session_id(self) -> str | None:
        """Of the container that the request names."""
        return self.container if isinstance(self.container, str) else None


BuiltinEntry = WebSearchEntry | CodeInterpreterEntry
HostedEntry = McpEntry | BuiltinEntry
ENTRIES: dict[str, type[HostedEntry]] = {
    "mcp": McpEntry,
    **dict.fromkeys(WEB_SEARCH, WebSearchEntry),
    **dict.fromkeys(CODE_INTERPRETER, CodeInterpreterEntry),
}


@dataclass(frozen=True, slots=True)
class PlacedEntry:
    """An entry and the field of the request that holds it."""

    where: str
    entry: HostedEntry
    allows: Callable[[str], bool] | None = None  # further, by the name of a tool
    field: str = "server_url"  # what the endpoint calls the server's URL
    options: Mapping[str, Any] | None = None  # of the session, besides those of the entry
    max_uses: Mapping[str, int] | None = None  # in one answer, by recipient


def read_entry(given: Mapping[str, Any], where: str, place: Place) -> HostedEntry:
    """The validated entry. Raises InvalidRequest."""
    try:
        entry = ENTRIES[given["type"]].model_validate(dict(given))
    except ValidationError as error:
        raise from_validation(error, place) from None
    check_entry(entry, where)
    return entry


def check_entry(entry: HostedEntry, where: str) -> None:
    """Raises InvalidRequest for what this server does not have, or fields that do not belong together."""
    if isinstance(entry, McpEntry):
        _check_mcp(entry, where)
    container = entry.container if isinstance(entry, CodeInterpreterEntry) else None
    if isinstance(container, AutoContainer) and container.file_ids:
        text = "This server stores no files: send their contents in the input."
        raise InvalidRequest(text, f"{where}.container.file_ids", "unsupported_value")
    policy = container.network_policy if isinstance(container, AutoContainer) else None
    if policy is not None and (not isinstance(policy, Mapping) or policy.get("type") != "disabled"):
        text = "Containers of this server have no network: use {'type': 'disabled'}, or leave it out."
        raise InvalidRequest(text, f"{where}.container.network_policy", "unsupported_value")


def _check_mcp(entry: McpEntry, where: str) -> None:
    for field in ("connector_id", "tunnel_id"):
        if getattr(entry, field) is not None:
            text = f"'{field}' names a service of OpenAI's. Use 'server_url', or the label of a configured server."
            raise InvalidRequest(text, f"{where}.{field}", "unsupported_parameter")
    for field in ("headers", "authorization"):
        if getattr(entry, field) is not None and entry.server_url is None:
            text = f"'{field}' needs 'server_url': a configured server has its own."
            raise InvalidRequest(text, f"{where}.{field}", "unsupported_parameter")
