"""The entries of `tools` and `mcp_servers` in a body of /v1/messages, and `tool_choice`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from gptoss.api.hosted.entries import Domain, Label, UserLocation
from gptoss.api.http.fields import Strict, contract_error

_SERVER_TOOL = re.compile(
    r"(advisor|bash|browser|code_execution|computer|memory|text_editor|tool_search\w*|web_fetch|web_search)(_\d{8})?"
)


class CustomTool(Strict):
    """A tool that the client runs."""

    also_known = frozenset({"allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"})

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Any = None


class ServerTool(Strict):
    """A tool that a server runs: this one's web search and code execution; others are left out."""

    is_open = True

    type: str
    name: str | None = None
    allowed_domains: Annotated[list[str], Field(max_length=100)] | None = None
    # read where the tool runs: SearchOptions
    blocked_domains: Any = None
    max_uses: Any = None
    user_location: Any = None

    @property
    def kind(self) -> str | None:
        """The type of the tool here; None if there is none."""
        name = re.sub(r"_\d{8}$", "", self.type)
        return {"web_search": "web_search", "code_execution": "code_interpreter"}.get(name)


class SearchOptions(Strict):
    """The fields of a web search that runs here."""

    allowed_domains: Annotated[list[Domain], Field(max_length=100)] | None = None
    blocked_domains: Annotated[list[Domain], Field(max_length=100)] | None = None
    max_uses: Annotated[int, Field(ge=1)] | None = None
    user_location: UserLocation | None = None

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        if self.allowed_domains and self.blocked_domains:
            raise contract_error("'blocked_domains' cannot be combined with 'allowed_domains'.")
        return self


class McpConfig(Strict):
    also_known = frozenset({"defer_loading"})

    enabled: bool | None = None


class McpToolset(Strict):
    """The tools of one of `mcp_servers`."""

    type: Literal["mcp_toolset"]
    mcp_server_name: str
    default_config: McpConfig | None = None
    configs: dict[str, McpConfig] | None = None  # by the name of a tool
    cache_control: Any = None

    def allows(self, name: str) -> bool:
        """Whether the tool of this name is offered."""
        own = (self.configs or {}).get(name)
        for config in (own, self.default_config):
            if config is not None and config.enabled is not None:
                return config.enabled
        return True


class McpToolConfiguration(Strict):
    enabled: bool | None = None
    allowed_tools: list[str] | None = None


class McpServer(Strict):
    """A server by its URL, or by its name in the configuration."""

    type: Literal["url"]
    name: Label
    url: Annotated[str, Field(max_length=2048)] | None = None
    authorization_token: str | None = None
    tool_configuration: McpToolConfiguration | None = None


def _tool(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if kind == "mcp_toolset":
        return "<toolset>"
    return "<server>" if isinstance(kind, str) and _SERVER_TOOL.fullmatch(kind) else "<custom>"


Tool = Annotated[
    Annotated[CustomTool, Tag("<custom>")]
    | Annotated[ServerTool, Tag("<server>")]
    | Annotated[McpToolset, Tag("<toolset>")],
    Discriminator(_tool),
]


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.type == "tool" and not self.name:
            raise contract_error(
                "A tool_choice of type 'tool' needs a name.", "tool_choice.name", "missing_required_parameter"
            )
        return self
