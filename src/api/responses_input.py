"""What a Responses request may contain, and the chat request that it and the items before it stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gptoss.api.errors import InvalidRequest
from gptoss.api.protocol import FIRST_PROBLEM, ChatTemplateKwargs, Effort, Metadata, SamplingFields, Strict, fail
from gptoss.api.responses_items import Conversation, PlacedItem, read_items
from gptoss.api.responses_tools import ToolTable, read_choice, read_tools

LOGPROBS = "message.output_text.logprobs"  # what `include` calls them
SEALED_REASONING = "reasoning.encrypted_content"
ELSEWHERE = ("conversation", "prompt")  # what OpenAI keeps apart from responses
# Chat's fields that would change the answer: the values that ask for nothing, and what to do instead.
OF_CHAT = {
    "response_format": (None, "Use 'text.format'."),
    "continue_final_message": (False, "An answer is a new item."),
    "add_generation_prompt": (True, "An answer is a new item."),
}

# Where the chat request says what this one says elsewhere.
PLACES = (
    (re.compile(r"^tool_choice\.function\b"), "tool_choice"),
    (re.compile(r"^response_format\.json_schema\b"), "text.format"),
    (re.compile(r"^response_format\b"), "text.format"),
    (re.compile(r"^(max_completion_tokens|max_tokens)$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^messages$"), "input"),
)

_QUOTED = re.compile(r"'([^'\s]+)'")


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _complete(self) -> TextFormat:
        if self.type == "json_schema":
            for name, value in ("name", self.name), ("schema", self.schema_):
                if value is None:
                    where = f"text.format.{name}"
                    raise fail(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
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
    tools: Annotated[list[Any], Field(max_length=128)] | None = None
    tool_choice: Any = None
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
                raise fail(
                    f"'{field}' is not supported. Send the earlier items in 'input', or 'previous_response_id'.",
                    field,
                    "unsupported_parameter",
                )
        for field, (nothing, instead) in OF_CHAT.items():
            if getattr(self, field) not in (None, nothing):
                raise fail(f"'{field}' is not supported here. {instead}", field, "unsupported_parameter")
        if self.background:
            raise fail("'background' is not supported.", "background", "unsupported_parameter")
        if (self.n or 1) != 1:
            raise fail("A response has one answer: 'n' may only be 1.", "n", "unsupported_value")
        if self.input == []:
            raise fail("An array of input items must not be empty.", "input", "empty_array")
        return self

    @property
    def seals_reasoning(self) -> bool:
        """Whether reasoning items get `encrypted_content`: where they may have to come back, or it was asked for."""
        return bool(self.tools) or SEALED_REASONING in (self.include or ())

    def placed(self) -> list[PlacedItem]:
        """The items of `input`; a string is a user's message."""
        if isinstance(self.input, str):
            return [PlacedItem({"type": "message", "role": "user", "content": self.input}, "input")]
        return [PlacedItem(item, f"input[{index}]") for index, item in enumerate(self.input)]

    @property
    def effort(self) -> Effort | None:
        return self.reasoning.effort if self.reasoning is not None else None


@dataclass(frozen=True, slots=True)
class ChatBody:
    body: dict[str, Any]
    places: list[str]  # the field by which each of its messages came
    tools: ToolTable

    def in_words_of_responses(self, error: InvalidRequest) -> InvalidRequest:
        """The same error, naming fields and functions as they are called here."""
        message = _QUOTED.sub(lambda found: self._quoted(found, error.param), error.message)
        param = self._field(error.param or "")
        return type(error)(message, param or None, error.code, error.headers)

    def _quoted(self, found: re.Match[str], param: str | None) -> str:
        name = found[1]
        if name == param or name.startswith(("messages[", "tools[")):
            return f"'{self._field(name)}'"
        named = self.tools.client_name(name)
        return f"'{named['name']}'" + (f" of namespace '{named['namespace']}'" if "namespace" in named else "")

    def _field(self, param: str) -> str:
        tool = re.match(r"^tools\[(\d+)\](\.function)?", param)
        if tool is not None and int(tool[1]) < len(self.tools.offered):
            return self.tools.where(int(tool[1])) + param[tool.end() :]
        found = re.match(r"^messages\[(\d+)\](.*)$", param)
        if found is not None and int(found[1]) < len(self.places):
            place = self.places[int(found[1])]
            rest = found[2].replace(".tool_call_id", ".call_id")
            param = place + (rest if place.endswith("]") else "")
        for pattern, name in PLACES:
            param = pattern.sub(name, param)
        return param


def chat_body(request: ResponsesRequest, items: Sequence[PlacedItem]) -> ChatBody:
    """`items`: the whole conversation. Raises InvalidRequest for one that cannot be read."""
    tools, conversation = read_tools(request.tools or ()), Conversation()
    if request.instructions:
        conversation.append({"role": "developer", "content": request.instructions}, "instructions")
    read_items(items, conversation, tools.model_name)
    if not conversation.messages:
        raise InvalidRequest("'input' has no item that the model can read.", "input", "empty_array")
    shared = SamplingFields.model_fields.keys() & request.model_fields_set
    body: dict[str, Any] = {name: getattr(request, name) for name in sorted(shared - {"stream_options", "n"})}
    text = request.text or TextOptions()
    optional = {
        "max_completion_tokens": request.max_output_tokens,
        "tools": tools.as_chat() or None,
        "tool_choice": read_choice(request.tool_choice, tools),
        "parallel_tool_calls": request.parallel_tool_calls,
        "response_format": _response_format(text.format),
        "verbosity": text.verbosity,
        "reasoning_effort": request.effort,
        "chat_template_kwargs": request.chat_template_kwargs,
        "reasoning_budget": request.reasoning_budget,
        "profile": request.profile,
        "include_relaxations": request.include_relaxations,
        "service_tier": request.service_tier,
    }
    if LOGPROBS in (request.include or ()):
        optional |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    given = {name: value for name, value in optional.items() if value is not None}
    return ChatBody(body | {"messages": conversation.messages} | given, conversation.places, tools)


def _response_format(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        schema = {} if wanted.schema_ is None else {"schema": wanted.schema_}
        return {"type": wanted.type} | schema
    return {"type": "json_schema", "json_schema": wanted.model_dump(exclude={"type"}, by_alias=True, exclude_none=True)}
