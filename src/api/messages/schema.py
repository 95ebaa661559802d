"""The body of /v1/messages: Anthropic's fields, and the sampling fields of the other endpoints.

Content blocks are listed by the role that may have them. Tags are in angle brackets, which no field name has.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, WithJsonSchema, model_validator

from gptoss.api.hosted.entries import Domain, Label, UserLocation
from gptoss.api.http.anthropic_errors import NO_THREADS
from gptoss.api.http.errors import Location
from gptoss.api.http.fields import FIRST_PROBLEM, MAX_STOPS, Number, SamplingFields, Strict, contract_error
from gptoss.api.http.openapi import object_of

MAX_TOOLS = 1024  # agents with several MCP servers send hundreds
_SERVER_TOOL = re.compile(
    r"(advisor|bash|browser|code_execution|computer|memory|text_editor|tool_search\w*|web_fetch|web_search)(_\d{8})?"
)
MAX_SERVERS = 20
Effort = Literal["minimal", "low", "medium", "high", "xhigh", "max"]
# What Anthropic's servers leave in a history when they run tools themselves
_FOREIGN = re.compile(
    r"server_tool_use|(?!tool_result|mcp_tool_result)\w+_tool_result|container_upload|compaction|fallback|advisor\w*"
)


def tag(value: Any) -> str | None:
    """Chooses the model of a block by its type."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    if not isinstance(kind, str):
        return None
    return "<foreign>" if _FOREIGN.fullmatch(kind) else f"<{kind}>"


def form(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<string>"


class Block(Strict):
    cache_control: Any = None


class TextBlock(Block):
    also_known = frozenset({"parsed_output"})
    opaque = frozenset({"citations"})

    type: Literal["text"]
    text: str
    citations: Any = None


class ImageBlock(Block):
    type: Literal["image"]

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        raise contract_error("Images are not supported: this model reads text only.", code="unsupported_value")


class SearchResultBlock(Block):
    also_known = frozenset({"citations"})

    type: Literal["search_result"]
    source: str
    title: str
    content: Annotated[list[TextBlock], FIRST_PROBLEM]


class ToolReferenceBlock(Block):
    type: Literal["tool_reference"]
    tool_name: str


Text = Annotated[str, Tag("<string>")]
AText = Annotated[TextBlock, Tag("<text>")]
AnImage = Annotated[ImageBlock, Tag("<image>")]
TextOrImage = Annotated[AText | AnImage, Discriminator(tag)]
DocumentContent = Annotated[Text | Annotated[list[TextOrImage], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]
SystemPrompt = Annotated[Text | Annotated[list[TextBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]


class DocumentSource(Strict):
    type: str
    media_type: str | None = None
    data: str | None = None
    content: DocumentContent | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        if self.type not in ("text", "content") or (self.data if self.type == "text" else self.content) is None:
            raise contract_error(
                "Documents are supported as text only: a source of type 'text' has 'data', one of 'content' 'content'.",
                code="unsupported_value",
            )
        return self


class DocumentBlock(Block):
    also_known = frozenset({"citations"})

    type: Literal["document"]
    source: DocumentSource
    title: str | None = None
    context: str | None = None


ASearchResult = Annotated[SearchResultBlock, Tag("<search_result>")]
ADocument = Annotated[DocumentBlock, Tag("<document>")]
ResultBlock = Annotated[
    AText | AnImage | ASearchResult | ADocument | Annotated[ToolReferenceBlock, Tag("<tool_reference>")],
    Discriminator(tag),
]
ResultContent = Annotated[Text | Annotated[list[ResultBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: ResultContent | None = None
    is_error: bool | None = None


class ToolUseBlock(Block):
    also_known = frozenset({"caller"})
    opaque = frozenset({"input"})

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    input: dict[str, Any]


# the schema of tool_result's content again would be more than generators of requests can read
_TEXTS = {"type": "array", "items": object_of({"type": {"const": "text"}, "text": {"type": "string"}})}
McpContent = Annotated[ResultContent, WithJsonSchema({"anyOf": [{"type": "string"}, _TEXTS]})]


class McpToolUseBlock(Block):
    """A call of a tool of an MCP server, which a server has run."""

    opaque = frozenset({"input"})

    type: Literal["mcp_tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: str
    server_name: str
    input: dict[str, Any]


class McpToolResultBlock(Block):
    type: Literal["mcp_tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1)]
    content: McpContent | None = None
    is_error: bool | None = None


class ThinkingBlock(Block):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Block):
    type: Literal["redacted_thinking"]
    data: str


class ForeignBlock(Strict):
    """What a server's own tools leave. Its other fields are its own."""

    is_open = True
    opaque = frozenset({"input", "content"})

    type: str
    id: Any = None
    name: Any = None
    input: Any = None
    tool_use_id: Any = None
    content: Any = None


class CustomTool(Strict):
    """A tool that the client runs."""

    also_known = frozenset({"allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"})

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Any = None


class ChangedTool(Strict):
    type: Literal["tool_reference", "tool_definition"]
    name: str | None = None
    tool_name: str | None = None
    definition: CustomTool | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "tool_definition" and self.definition is None:
            raise contract_error("A tool_definition needs 'definition'.", code="missing_required_parameter")
        if self.type == "tool_reference" and not (self.name or self.tool_name):
            raise contract_error("A tool_reference needs 'name'.", code="missing_required_parameter")
        return self

    @property
    def tool(self) -> str:
        """The name of the tool."""
        return self.definition.name if self.definition is not None else self.name or self.tool_name or ""


class ToolChangeBlock(Block):
    """Tools that are added or removed in mid-conversation."""

    type: Literal["tool_addition", "tool_removal"]
    tool: ChangedTool


AForeign = Annotated[ForeignBlock, Tag("<foreign>")]
UserBlock = Annotated[
    AText | AnImage | ASearchResult | ADocument | AForeign | Annotated[ToolResultBlock, Tag("<tool_result>")],
    Discriminator(tag),
]
UserContent = Annotated[Text | Annotated[list[UserBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]
AssistantBlock = Annotated[
    AText
    | AForeign
    | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted_thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")]
    | Annotated[McpToolUseBlock, Tag("<mcp_tool_use>")]
    | Annotated[McpToolResultBlock, Tag("<mcp_tool_result>")],
    Discriminator(tag),
]
AssistantContent = Annotated[Text | Annotated[list[AssistantBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]
SystemBlock = Annotated[
    AText | Annotated[ToolChangeBlock, Tag("<tool_addition>")] | Annotated[ToolChangeBlock, Tag("<tool_removal>")],
    Discriminator(tag),
]
SystemContent = Annotated[Text | Annotated[list[SystemBlock], FIRST_PROBLEM, Tag("<list>")], Discriminator(form)]


class UserMessage(Strict):
    role: Literal["user"]
    content: UserContent


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: AssistantContent


class SystemMessage(Strict):
    """Instructions at the place where they begin to hold."""

    role: Literal["system"]
    content: SystemContent


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return f"<{role}>" if isinstance(role, str) else None


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    Discriminator(_role),
]


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


class Thinking(Strict):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Annotated[int, Field(ge=1024)] | None = None
    display: Literal["summarized", "omitted", "updates"] | None = None

    @model_validator(mode="after")
    def _with_budget(self) -> Self:
        if self.type == "enabled" and self.budget_tokens is None:
            where = "thinking.budget_tokens"
            raise contract_error(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
        return self


class JsonFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    effort: Effort | None = None
    format: JsonFormat | None = None
    task_budget: Any = None


class Metadata(Strict):
    user_id: str | None = None


class CountTokensRequest(SamplingFields):
    also_known = frozenset({"max_tokens"})

    messages: Annotated[list[Message], Field(min_length=1), FIRST_PROBLEM]
    system: SystemPrompt | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS), FIRST_PROBLEM] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    temperature: Annotated[Number, Field(ge=0, le=1)] | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MAX_STOPS)] | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    cache_control: Any = None
    # what Anthropic's services have and this server does not
    betas: Any = None
    container: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    mcp_servers: Annotated[list[McpServer], Field(max_length=MAX_SERVERS)] | None = None
    speed: Any = None
    thread: Any = None  # a conversation that Anthropic's servers keep
    # extensions, named as elsewhere
    profile: str | None = None
    include_relaxations: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.thread is not None:
            raise contract_error(
                "'thread' is not supported: send the whole conversation in 'messages'.", "thread", NO_THREADS
            )
        if (self.n or 1) != 1:
            raise contract_error("'n' must be 1 for /v1/messages.", "n", "unsupported_value")
        if self.stop and self.stop_sequences:
            raise contract_error("'stop' cannot be combined with 'stop_sequences'.", "stop")
        if self.stop_sequences:
            self.stop = self.stop_sequences
        return self

    @property
    def hides_thinking(self) -> bool:
        """Whether thinking is answered with its signature alone."""
        return self.thinking is not None and self.thinking.display == "omitted"


class MessagesRequest(CountTokensRequest):
    max_tokens: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        budget = self.thinking.budget_tokens if self.thinking is not None else None
        if budget is not None and budget >= self.max_tokens:
            raise contract_error("'thinking.budget_tokens' must be below 'max_tokens'.", "thinking.budget_tokens")
        return self


def field_of(location: Location) -> str | None:
    """A field as Anthropic writes it: `messages.0.content`."""
    return ".".join(str(part) for part in location if not str(part).startswith("<")) or None
