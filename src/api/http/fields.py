"""Fields that several endpoints share, and their validation errors."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from gptoss.api.http.sender import Sender
from gptoss.engine.sampling_params import LogitBias
from gptoss.generation.request import GenerationRequest, Prompt, SamplingOptions
from gptoss.harmony.render import ReasoningEffort
from gptoss.harmony.special_tokens import VOCAB_SIZE

EFFORTS: dict[str, ReasoningEffort] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
MAX_STOPS = 32  # OpenAI allows 4, evaluation harnesses send more
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_USER_NAME = re.compile(r"[^\s<|\\/>]{0,64}")  # OpenAI's pattern
TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def contract_error(message: str, param: str | None = None, code: str = "invalid_value") -> PydanticCustomError:
    return PydanticCustomError("contract", "{text}", {"text": message, "param": param, "code": code})


def _function_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise contract_error(
            f"{value!r} is not a valid function name: 1 to 64 letters, digits, '_' and '-' are allowed"
        )
    return value


Number = Annotated[float, Field(allow_inf_nan=False)]
FunctionName = Annotated[str, AfterValidator(_function_name)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    # known fields that are ignored: they come from answers and request nothing
    also_known: ClassVar[frozenset[str]] = frozenset()
    # fields whose objects are the client's own
    opaque: ClassVar[frozenset[str]] = frozenset()
    # whether unknown fields are ignored without a report
    is_open: ClassVar[bool] = False


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


Choices = Annotated[list[str], Field(min_length=1, max_length=1000, fail_fast=True)]


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: exactly one of the first four fields is set."""

    json_: Annotated[Any, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    json_object: bool | None = None
    grammar: Any = None
    structural_tag: Any = None
    whitespace_pattern: Any = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


# Lists without a limit report only their first problem: collecting a million would block all other requests.
FIRST_PROBLEM = Field(fail_fast=True)


def max_entries(limit: int) -> BeforeValidator:
    """Refuses an object with more entries before any of them is validated."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticKnownError(
                "too_long", {"field_type": "Dictionary", "max_length": limit, "actual_length": len(value)}
            )
        return value

    return BeforeValidator(check)


Metadata = Annotated[dict[str, str], max_entries(16), Field(json_schema_extra={"maxProperties": 16})]
# Whether an assistant's text introduces a call or is the answer; without it the calls of the turn decide.
Phase = Literal["commentary", "final_answer"]
CHANNELS: dict[Phase, Literal["commentary", "final"]] = {"commentary": "commentary", "final_answer": "final"}


def stop_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


_BIASES: dict[str, Any] = {
    "propertyNames": {"pattern": "^[0-9]{1,9}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}
_Stop = Annotated[str, Field(min_length=1)]


class ChatTemplateKwargs(Strict):
    """Variables that other servers pass to the model's chat template."""

    reasoning_effort: Effort | None = None


class SamplingFields(Strict):
    """The fields that all endpoints with generation share."""

    model: str
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[
        Annotated[list[str], Field(max_length=MAX_STOPS)] | None,
        BeforeValidator(
            stop_list, json_schema_input_type=_Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None
        ),
    ] = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, Number], max_entries(VOCAB_SIZE), Field(json_schema_extra=_BIASES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # extensions, with the names of other servers
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
            raise contract_error(
                "The 'stream_options' parameter is only allowed when 'stream' is true.", "stream_options"
            )
        if self.stop is not None and any(not s for s in self.stop):
            raise contract_error("A stop sequence must not be empty.", "stop")
        for key, bias in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit() or len(key) > 9 or int(key) >= VOCAB_SIZE:
                raise contract_error(f"{key!r} is not a token id below {VOCAB_SIZE}.", "logit_bias")
            if not -100 <= bias <= 100:
                raise contract_error(f"The bias of token {key} is {bias:g}, not between -100 and 100.", "logit_bias")
        self._bias = LogitBias.of({int(k): v for k, v in (self.logit_bias or {}).items()})
        self.logit_bias = None  # as an object it may take 25 MB
        return self

    def generation_request(
        self,
        sender: Sender,
        prompt: Prompt,
        *,
        id_prefix: str,
        logprobs: int | None = None,
        **own: Any,
    ) -> GenerationRequest:
        """What all endpoints read alike; `own`: the other fields of the GenerationRequest."""
        return GenerationRequest(
            request_id=id_prefix + secrets.token_hex(12),
            prompt=prompt,
            sampling=self.sampling(logprobs),
            stop=self.stop or (),
            stream=bool(self.stream),
            num_choices=self.n or 1,
            priority=self.priority,
            tenant=sender.tenant,
            cache_scope=sender.cache_scope,
            cache_salt=self.cache_salt or "",
            **own,
        )

    def sampling(self, logprobs: int | None) -> SamplingOptions:
        return SamplingOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k or 0),
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=self._bias,
            seed=self.seed,
            logprobs=logprobs,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
        )


def check_parts(parts: list[Any], allowed: Mapping[str, str], where: str) -> None:
    """Raises a contract error if an array of content parts is not valid.

    `allowed` maps each type to its field with the text.
    """
    if not parts:
        raise contract_error("An array of content parts must not be empty.", where, "empty_array")
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(kind, str):
            raise contract_error("A content part is an object with a type.", f"{where}[{index}]", "invalid_type")
        if kind not in allowed:
            reason = "are not supported: this model reads text only."
            if kind in TEXT_PARTS:
                reason = f"are not allowed here; use {' or '.join(map(repr, allowed))}."
            raise contract_error(
                f"Content parts of type {kind!r} {reason}", f"{where}[{index}].type", "unsupported_value"
            )
        if not isinstance(part.get(allowed[kind]), str):
            raise contract_error(
                f"A part of type {kind!r} needs a string '{allowed[kind]}'.",
                f"{where}[{index}].{allowed[kind]}",
                "invalid_type",
            )


def joined_parts(content: str | list[Any], allowed: Mapping[str, str], between: str = "") -> str:
    """A text, or the joined texts of content parts that `check_parts` has checked with the same `allowed`."""
    if isinstance(content, str):
        return content
    return between.join(part[allowed[part["type"]]] for part in content)


def check_user_name(name: str, where: str) -> None:
    """Raises a contract error if a user's name cannot be in the header of a Harmony message."""
    if not _USER_NAME.fullmatch(name):
        raise contract_error(
            f"{name!r} is not a valid name: up to 64 characters without spaces, '<', '|', '\\', '/' and '>' "
            "are allowed.",
            where,
        )


def json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    names = {dict: "an object", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
