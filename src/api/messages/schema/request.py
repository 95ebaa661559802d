"""The body of /v1/messages: Anthropic's fields, and the sampling fields of the other endpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gptoss.api.http.anthropic_errors import NO_THREADS
from gptoss.api.http.errors import Location
from gptoss.api.http.fields import FIRST_PROBLEM, MAX_STOPS, Number, SamplingFields, Strict, contract_error
from gptoss.api.messages.schema.blocks import Message, SystemPrompt
from gptoss.api.messages.schema.tools import McpServer, Tool, ToolChoice

MAX_TOOLS = 1024  # agents with several MCP servers send hundreds
MAX_SERVERS = 20
Effort = Literal["minimal", "low", "medium", "high", "xhigh", "max"]


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
