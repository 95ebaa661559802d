"""The body of /v1/responses, and its items."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, model_validator

from gptoss.api.http.fields import (
    FIRST_PROBLEM,
    ChatTemplateKwargs,
    Effort,
    Metadata,
    SamplingFields,
    Strict,
    contract_error,
)
from gptoss.api.http.openapi import object_of
from gptoss.api.http.output_format import FormatType, SchemaName
from gptoss.api.http.tool_choice import CHOICE_SCHEMA
from gptoss.api.responses.tools.client_tools import KINDS

SEALED_REASONING = "reasoning.encrypted_content"
ELSEWHERE = ("conversation", "prompt")  # what OpenAI keeps apart from responses
_STRING = {"type": "string"}
_TYPED = object_of({"type": _STRING})
_CHOICE = {
    "anyOf": [
        *CHOICE_SCHEMA["anyOf"],
        object_of({"type": {"enum": ["function", "custom"]}, "name": _STRING}, {"namespace": _STRING}),
        object_of({"type": {"const": "namespace"}, "name": _STRING}),
        object_of(
            {"type": {"const": "allowed_tools"}, "tools": {"type": "array", "minItems": 1, "items": _TYPED}},
            {"mode": {"enum": ["auto", "required"]}},
        ),
        object_of({"type": {"enum": [*KINDS]}}),
        object_of({"type": {"const": "mcp"}, "server_label": _STRING}, {"name": _STRING}),
    ]
}
# Chat's fields that would change the answer: the values that ask for nothing, and what to do instead.
OF_CHAT = {
    "response_format": (None, "Use 'text.format'."),
    "continue_final_message": (False, "An answer is a new item."),
    "add_generation_prompt": (True, "An answer is a new item."),
}


class TextFormat(Strict):
    type: FormatType
    name: SchemaName | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> TextFormat:
        if self.type == "text" and self.schema_ is not None:
            raise contract_error(
                "'text.format.schema' needs type 'json_schema' or 'json_object'.", "text.format.schema"
            )
        if self.type == "json_schema":
            for name, value in ("name", self.name), ("schema", self.schema_):
                if value is None:
                    where = f"text.format.{name}"
                    raise contract_error(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
        return self


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Strict):
    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(SamplingFields):
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    tools: Annotated[list[Annotated[Any, WithJsonSchema(_TYPED)]], Field(max_length=128)] | None = None
    tool_choice: Annotated[Any, WithJsonSchema(_CHOICE)] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    include: Annotated[list[str], FIRST_PROBLEM] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    safety_identifier: Annotated[str, Field(max_length=64)] | None = None
    prompt_cache_key: str | None = None
    client_metadata: Any = None  # Codex's
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    background: bool | None = None
    previous_response_id: Annotated[str, Field(min_length=1)] | None = None
    conversation: Any = None
    prompt: Any = None
    response_format: Any = None
    continue_final_message: Any = None
    add_generation_prompt: Any = None
    # extensions, named as elsewhere
    profile: str | None = None
    reasoning_budget: Annotated[int, Field(ge=0)] | None = None
    chat_template_kwargs: ChatTemplateKwargs | None = None
    include_relaxations: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        for field in ELSEWHERE:
            if getattr(self, field) is not None:
                raise contract_error(
                    f"'{field}' is not supported. Send the earlier items in 'input', or 'previous_response_id'.",
                    field,
                    "unsupported_parameter",
                )
        for field, (nothing, instead) in OF_CHAT.items():
            if getattr(self, field) not in (None, nothing):
                raise contract_error(f"'{field}' is not supported here. {instead}", field, "unsupported_parameter")
        if self.background:
            raise contract_error("'background' is not supported.", "background", "unsupported_parameter")
        if (self.n or 1) != 1:
            raise contract_error("'n' must be 1 for /v1/responses.", "n", "unsupported_value")
        if self.input == []:
            raise contract_error("An array of input items must not be empty.", "input", "empty_array")
        return self

    @property
    def encodes_reasoning(self) -> bool:
        """Whether reasoning items get `encrypted_content`.

        They do if `include` lists it, or if the client may have to send the items back.
        """
        return bool(self.tools) or SEALED_REASONING in (self.include or ())

    @property
    def effort(self) -> Effort | None:
        return self.reasoning.effort if self.reasoning is not None else None
