"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, WithJsonSchema, model_validator

from gptoss.api.hosted.entries import CodeInterpreterEntry, McpEntry, UserLocation, WebSearchEntry
from gptoss.api.http.fields import (
    FIRST_PROBLEM,
    ChatTemplateKwargs,
    Effort,
    Metadata,
    Phase,
    SamplingFields,
    Strict,
    check_parts,
    check_user_name,
    contract_error,
    json_type,
)
from gptoss.api.http.openapi import parts_schema
from gptoss.api.http.output_format import ResponseFormat
from gptoss.api.http.tool_choice import (
    CHOICE_SCHEMA,
    LEGACY_CHOICE_SCHEMA,
    CustomDefinition,
    FunctionDefinition,
    TextGrammar,
)

MAX_TOOLS = 128
RESULT_ROLES = ("tool", "function")
ROLES = ("developer", "system", "user", "assistant", *RESULT_ROLES)
PARTS = {"text": "text"}  # types of content parts, and the field of each that has its text
ASSISTANT_PARTS = PARTS | {"refusal": "refusal"}
_CONTENT = {"anyOf": [{"type": ["string", "null"]}, parts_schema(ASSISTANT_PARTS)]}


class InputFormat(Strict):
    """`grammar` is there where the type is `grammar`: see check_tool."""

    type: Literal["text", "grammar"]
    grammar: TextGrammar | None = None


class CustomTool(CustomDefinition):
    format: InputFormat | None = None


class Tool(Strict):
    """`function` or `custom` is there, as `type` has it: see check_tool."""

    type: Literal["function", "custom"]
    function: FunctionDefinition | None = None
    custom: CustomTool | None = None


HOSTED = ("mcp", "code_interpreter")  # types of tools that the server runs


def _hosted_kind(tool: Any) -> str:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    return f"<{kind}>" if kind in HOSTED else "<tool>"


AnyTool = Annotated[
    Annotated[Tool, Tag("<tool>")]
    | Annotated[McpEntry, Tag("<mcp>")]
    | Annotated[CodeInterpreterEntry, Tag("<code_interpreter>")],
    Discriminator(_hosted_kind),
]


class ReasoningOptions(Strict):
    effort: Effort | None = None
    exclude: bool | None = None
    enabled: bool | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None


class FunctionCall(Strict):
    also_known = frozenset({"parsed_arguments"})

    name: str
    arguments: str = ""


class CustomCall(Strict):
    name: str
    input: str = ""


class ToolCall(Strict):
    """`function` or `custom` is there, as `type` has it: see check_message."""

    also_known = frozenset({"index"})

    id: Annotated[str, Field(min_length=1)]
    type: Literal["function", "custom"] = "function"
    function: FunctionCall | None = None
    custom: CustomCall | None = None


class Message(Strict):
    also_known = frozenset({"annotations", "audio", "parsed", "hosted_tool_calls"})

    role: Annotated[str, WithJsonSchema({"enum": [*ROLES]})]
    content: Annotated[Any, WithJsonSchema(_CONTENT)] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FIRST_PROBLEM] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    # a list: each of them is a message, empty ones too
    reasoning: str | list[str] | None = None
    reasoning_content: str | list[str] | None = None
    phase: Phase | None = None


class ApproximateLocation(Strict):
    type: Literal["approximate"] = "approximate"
    approximate: UserLocation = UserLocation()


class WebSearchOptions(Strict):
    """The browser of this server: see the entry `web_search` of /v1/responses."""

    search_context_size: Literal["low", "medium", "high"] | None = None
    user_location: ApproximateLocation | None = None

    @property
    def entry(self) -> WebSearchEntry:
        """The options as an entry of `tools`."""
        location = self.user_location.approximate if self.user_location is not None else None
        return WebSearchEntry.model_construct(
            type="web_search", search_context_size=self.search_context_size, user_location=location
        )


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[AnyTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[Any, WithJsonSchema(CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionDefinition], Field(max_length=128)] | None = None
    function_call: Annotated[Any, WithJsonSchema(LEGACY_CHOICE_SCHEMA)] = None
    reasoning_effort: Effort | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    safety_identifier: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: str | None = None
    modalities: Annotated[list[str], FIRST_PROBLEM] | None = None
    audio: Any = None
    prediction: Any = None
    web_search_options: WebSearchOptions | None = None
    # extensions, named as elsewhere
    reasoning: ReasoningOptions | None = None
    include_reasoning: bool | None = None
    reasoning_budget: Annotated[int, Field(ge=0)] | None = None
    profile: str | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    include_relaxations: bool | None = None  # report what of the schemas is not enforced

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise contract_error("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")
        for field in ("audio", "prediction"):
            if getattr(self, field) is not None:
                raise contract_error(f"'{field}' is not supported by this model.", field, "unsupported_parameter")
        if self.modalities is not None and self.modalities != ["text"]:
            raise contract_error("'modalities' may only be ['text'].", "modalities", "unsupported_value")
        for index, tool in enumerate(self.tools or ()):
            if isinstance(tool, Tool):
                check_tool(tool, f"tools[{index}]")
        for index, message in enumerate(self.messages):
            check_message(message, f"messages[{index}]")
        return self


def check_tool(tool: Tool, where: str) -> None:
    """Raises a contract error if a tool has no definition."""
    missing = f"{where}.{tool.type}" if getattr(tool, tool.type) is None else None
    wanted = tool.custom.format if tool.custom is not None else None
    if wanted is not None and wanted.type == "grammar" and wanted.grammar is None:
        missing = missing or f"{where}.custom.format.grammar"
    if missing is not None:
        raise contract_error(f"Missing required parameter: '{missing}'.", missing, "missing_required_parameter")


def check_message(message: Message, where: str) -> None:
    """Raises a contract error for what the role does not allow.

    `where` is the message's field, as in `messages[2]`.
    """
    role = message.role
    if role not in ROLES:
        raise contract_error(f"Invalid value: {role!r}. Supported roles are {', '.join(ROLES)}.", f"{where}.role")
    content = message.content
    if content is None:
        if role != "assistant":
            raise contract_error(
                f"A message with role '{role}' needs content.", f"{where}.content", "missing_required_parameter"
            )
    elif isinstance(content, list):
        if content or role not in RESULT_ROLES:  # a tool may return nothing
            check_parts(content, PARTS if role != "assistant" else ASSISTANT_PARTS, f"{where}.content")
    elif not isinstance(content, str):
        raise contract_error(
            f"content must be a string or an array of parts, not {json_type(content)}.",
            f"{where}.content",
            "invalid_type",
        )
    if role == "tool" and not message.tool_call_id:
        raise contract_error(
            "A message with role 'tool' needs tool_call_id.", f"{where}.tool_call_id", "missing_required_parameter"
        )
    if role == "function" and not message.name:
        raise contract_error(
            "A message with role 'function' needs name.", f"{where}.name", "missing_required_parameter"
        )
    if role == "user":
        check_user_name(message.name or "", f"{where}.name")
    for index, call in enumerate(message.tool_calls or ()):
        if getattr(call, call.type) is None:
            missing = f"{where}.tool_calls[{index}].{call.type}"
            raise contract_error(f"Missing required parameter: '{missing}'.", missing, "missing_required_parameter")
