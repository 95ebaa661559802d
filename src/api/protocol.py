"""The chat-completions wire format: what a request may say. Strict: a boolean is no integer, "10" is not 10."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from gptoss.engine.sampling_params import LogitBias

VOCAB_SIZE = 201_088
MAX_TOOLS = 128
EFFORTS = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
RESULT_ROLES = ("tool", "function")
ROLES = ("developer", "system", "user", "assistant", *RESULT_ROLES)
PARTS = {"text": "text"}  # types of content parts, and the field of each that has its text
ASSISTANT_PARTS = PARTS | {"refusal": "refusal"}
MAX_STOPS = 32  # OpenAI allows 4, evaluation harnesses send more
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_USER_NAME = re.compile(r"[^\s<|\\/>]{0,64}")  # OpenAI's pattern
TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text")

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def fail(message: str, param: str | None = None, code: str = "invalid_value") -> PydanticCustomError:
    return PydanticCustomError("contract", "{text}", {"text": message, "param": param, "code": code})


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise fail("a number must be finite")
    return value


def _function_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise fail(f"{value!r} is no function name: 1 to 64 letters, digits, '_' and '-' are allowed")
    return value


Number = Annotated[float, AfterValidator(_finite)]
FunctionName = Annotated[str, AfterValidator(_function_name)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    # fields that are read over without a report: they come back from answers and ask for nothing
    also_known: ClassVar[frozenset[str]] = frozenset()


class FunctionDefinition(Strict):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


def _check_num_tools(tools: list[Any], info: ValidationInfo) -> list[Any]:
    limit = (info.context or {}).get("max_tools", MAX_TOOLS)
    if len(tools) > limit:
        raise PydanticKnownError("too_long", {"field_type": "List", "max_length": limit, "actual_length": len(tools)})
    return tools


Tools = Annotated[list[Tool], AfterValidator(_check_num_tools), Field(json_schema_extra={"maxItems": MAX_TOOLS})]


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None  # llama.cpp's form

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.schema_ is not None and (self.type == "text" or self.json_schema is not None):
            raise fail(
                "'response_format.schema' needs type 'json_object', or 'json_schema' without the field of that name.",
                "response_format.schema",
            )
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise fail(
                "Missing required parameter: 'response_format.json_schema'.",
                "response_format.json_schema",
                "missing_required_parameter",
            )
        return self


Choices = Annotated[list[str], Field(min_length=1, max_length=1000, fail_fast=True)]


class StructuredOutputs(Strict):
    """vLLM's: exactly one of the first four."""

    json_: Annotated[Any, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    json_object: bool | None = None
    grammar: Any = None
    structural_tag: Any = None
    whitespace_pattern: Any = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class ChatTemplateKwargs(Strict):
    """What would go to the model's chat template elsewhere."""

    reasoning_effort: Effort | None = None


class ReasoningOptions(Strict):
    effort: Effort | None = None
    exclude: bool | None = None
    enabled: bool | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None


# of a list without a limit the first problem is told; to note a million of them would hold up all other requests
FIRST_PROBLEM = Field(fail_fast=True)


def few(limit: int) -> BeforeValidator:
    """Refuses an object of more entries before each of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticKnownError(
                "too_long", {"field_type": "Dictionary", "max_length": limit, "actual_length": len(value)}
            )
        return value

    return BeforeValidator(check)


Metadata = Annotated[dict[str, str], few(16)]


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


# Whether an assistant's words introduce a call or are the answer; without it, the calls of the turn tell.
Phase = Literal["commentary", "final_answer"]


class Message(Strict):
    also_known = frozenset({"annotations", "audio", "parsed"})

    role: str
    content: Any = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FIRST_PROBLEM] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None
    refusal: str | None = None
    # a list: each of them is a message, empty ones too
    reasoning: str | list[str] | None = None
    reasoning_content: str | list[str] | None = None
    phase: Phase | None = None


def stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class SamplingFields(Strict):
    """What chat and raw completions have in common."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[Annotated[list[str], Field(max_length=MAX_STOPS)] | None, BeforeValidator(stop_list)] = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Number], few(VOCAB_SIZE)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # extensions, named as elsewhere
    top_k: Annotated[int, Field(ge=-1, le=VOCAB_SIZE)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=2)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] | None = None
    cache_salt: Annotated[str, Field(max_length=64)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: Any = None
    guided_whitespace_pattern: Any = None
    structural_tag: Any = None
    json_schema: Any = None  # llama.cpp's, as `grammar`
    grammar: Any = None

    _bias: LogitBias | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise fail("The 'stream_options' parameter is only allowed when 'stream' is true.", "stream_options")
        if self.stop is not None and any(not s for s in self.stop):
            raise fail("A stop sequence must not be empty.", "stop")
        for key, bias in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= VOCAB_SIZE:
                raise fail(f"{key!r} is no token id below {VOCAB_SIZE}.", "logit_bias")
            if not -100 <= bias <= 100:
                raise fail(f"The bias of token {key} is {bias:g}, not between -100 and 100.", "logit_bias")
        self._bias = LogitBias.of({int(k): v for k, v in (self.logit_bias or {}).items()})
        return self

    @property
    def bias(self) -> LogitBias | None:
        """`logit_bias` for the engine, made when the request was validated."""
        return self._bias


class ChatCompletionRequest(SamplingFields):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[FunctionDefinition], Field(max_length=128)] | None = None
    function_call: Any = None
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
    web_search_options: Any = None
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
            raise fail("'top_logprobs' is only allowed when 'logprobs' is true.", "top_logprobs")
        for field in ("audio", "prediction", "web_search_options"):
            if getattr(self, field) is not None:
                raise fail(f"'{field}' is not supported by this model.", field, "unsupported_parameter")
        if self.modalities is not None and self.modalities != ["text"]:
            raise fail("'modalities' may only be ['text'].", "modalities", "unsupported_value")
        for index, message in enumerate(self.messages):
            check_message(message, f"messages[{index}]")
        return self


def check_message(message: Message, where: str) -> None:
    """Raises for what a role does not allow; `where` is the message's place, as in `messages[2]`."""
    role = message.role
    if role not in ROLES:
        raise fail(f"Invalid value: {role!r}. Supported roles are {', '.join(ROLES)}.", f"{where}.role")
    content = message.content
    if content is None:
        if role != "assistant":
            raise fail(f"A message with role '{role}' needs content.", f"{where}.content", "missing_required_parameter")
    elif isinstance(content, list):
        if content or role not in RESULT_ROLES:  # a tool may return nothing
            check_parts(content, PARTS if role != "assistant" else ASSISTANT_PARTS, f"{where}.content")
    elif not isinstance(content, str):
        raise fail(
            f"content must be a string or an array of parts, not {_json_type(content)}.",
            f"{where}.content",
            "invalid_type",
        )
    if role == "tool" and not message.tool_call_id:
        raise fail(
            "A message with role 'tool' needs tool_call_id.", f"{where}.tool_call_id", "missing_required_parameter"
        )
    if role == "function" and not message.name:
        raise fail("A message with role 'function' needs name.", f"{where}.name", "missing_required_parameter")
    if role == "user" and not _USER_NAME.fullmatch(message.name or ""):
        raise fail(
            f"{message.name!r} is not a valid name: up to 64 characters without spaces, '<', '|', '\\', '/' and '>' "
            "are allowed.",
            f"{where}.name",
        )
    for index, call in enumerate(message.tool_calls or ()):
        if getattr(call, call.type) is None:
            missing = f"{where}.tool_calls[{index}].{call.type}"
            raise fail(f"Missing required parameter: '{missing}'.", missing, "missing_required_parameter")


def check_parts(parts: list[Any], allowed: Mapping[str, str], where: str) -> None:
    """Raises for an array of content parts that is not one. `allowed`: each type, and the field that has its text."""
    if not parts:
        raise fail("An array of content parts must not be empty.", where, "empty_array")
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            raise fail("A content part is an object with a type.", f"{where}[{index}]", "invalid_type")
        if kind not in allowed:
            reason = "are not supported: this model reads text only."
            if kind in TEXT_PARTS:
                reason = f"are not allowed here; use {' or '.join(map(repr, allowed))}."
            raise fail(f"Content parts of type {kind!r} {reason}", f"{where}[{index}].type", "unsupported_value")
        if not isinstance(part.get(allowed[kind]), str):
            raise fail(
                f"A part of type {kind!r} needs a string '{allowed[kind]}'.",
                f"{where}[{index}].{allowed[kind]}",
                "invalid_type",
            )


def _json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
