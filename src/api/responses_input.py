"""What a Responses request may say, and the chat request that it and the items before it stand for."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from src.api.errors import InvalidRequest, from_validation
from src.api.protocol import (
    FIRST_PROBLEM,
    Effort,
    FunctionName,
    Metadata,
    SamplingFields,
    Strict,
    check_parts,
    fail,
)
from src.api.sealed import unseal
from src.api.warn_once import WarnOnce

LOGPROBS = "message.output_text.logprobs"  # what `include` calls them
SEALED_REASONING = "reasoning.encrypted_content"
ELSEWHERE = ("conversation", "prompt")  # what OpenAI keeps apart from responses
logger = logging.getLogger(__name__)
_warn_left_out = WarnOnce(
    logger, "tools of type %s are not offered to the model: only functions are", limit=100
)

# Where the chat request says what this one says elsewhere.
PLACES = (
    (re.compile(r"^tools\[(\d+)\]\.function\b"), r"tools[\1]"),
    (re.compile(r"^tool_choice\.function\b"), "tool_choice"),
    (re.compile(r"^response_format\.json_schema\b"), "text.format"),
    (re.compile(r"^response_format\b"), "text.format"),
    (re.compile(r"^(max_completion_tokens|max_tokens)$"), "max_output_tokens"),
    (re.compile(r"^reasoning_effort$"), "reasoning.effort"),
    (re.compile(r"^messages$"), "input"),
)


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An item as it was sent or stored, and the field of the request that it came by."""

    item: Any
    where: str


class FunctionTool(Strict):
    type: Literal["function"] = "function"
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


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
                    raise fail(
                        f"Missing required parameter: '{where}'.",
                        where,
                        "missing_required_parameter",
                    )
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
    # extensions, named as elsewhere
    profile: str | None = None
    reasoning_budget: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        for field in ELSEWHERE:
            if getattr(self, field) is not None:
                raise fail(
                    f"'{field}' is not supported. Send the earlier items in 'input', or 'previous_response_id'.",
                    field,
                    "unsupported_parameter",
                )
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


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Any]


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    arguments: str


class FunctionOutputItem(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Any]


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    content: list[Any] | None = None
    encrypted_content: str | None = None


Item = InputMessage | FunctionCallItem | FunctionOutputItem | ReasoningItem
ITEMS: dict[str, type[Item]] = {
    "message": InputMessage,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
    "reasoning": ReasoningItem,
}
INPUT_PARTS = dict.fromkeys(("input_text", "text"), "text")
OUTPUT_PARTS = dict.fromkeys(("output_text", "input_text", "text"), "text")
ASSISTANT_PARTS = OUTPUT_PARTS | {"refusal": "refusal"}
REASONING_PARTS = dict.fromkeys(("reasoning_text", "text"), "text")


@dataclass(frozen=True, slots=True)
class ChatBody:
    body: dict[str, Any]
    places: list[str]  # the field by which each of its messages came
    tools: dict[int, FunctionTool]  # those that are offered, by their places in the request

    def in_words_of_responses(self, error: InvalidRequest) -> InvalidRequest:
        """The same error, naming the field as it is called here."""
        places = list(self.tools)
        param = re.sub(
            r"^tools\[(\d+)\]", lambda found: f"tools[{places[int(found[1])]}]", error.param or ""
        )
        found = re.match(r"^messages\[(\d+)\](.*)$", param)
        if found is not None:
            place = self.places[int(found[1])]
            rest = found[2].replace(".tool_call_id", ".call_id")
            param = place + (rest if place.endswith("]") else "")
        for pattern, name in PLACES:
            param = pattern.sub(name, param)
        return type(error)(error.message, param or None, error.code, error.headers)


def num_rendered(items: Sequence[Any]) -> int:
    """At least so many Harmony messages, or items that are none. Reasoning may go, system messages are joined."""
    return sum(
        not isinstance(item, Mapping)
        or item.get("role") == "user"
        or item.get("type") in ("function_call", "function_call_output")
        or not (item.get("role") or item.get("type"))
        for item in items
    )


def chat_body(request: ResponsesRequest, items: Sequence[PlacedItem]) -> ChatBody:
    """`items`: the whole conversation. Raises InvalidRequest for one that cannot be read."""
    messages, places = _messages(request.instructions, items)
    tools = _offered(request.tools or ())
    shared = SamplingFields.model_fields.keys() & request.model_fields_set
    body: dict[str, Any] = {
        name: getattr(request, name) for name in sorted(shared - {"stream_options", "n"})
    }
    text = request.text or TextOptions()
    optional = {
        "max_completion_tokens": request.max_output_tokens,
        "tools": [_nested(tool) for tool in tools.values()] or None,
        "tool_choice": _nested_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "response_format": _response_format(text.format),
        "verbosity": text.verbosity,
        "reasoning_effort": request.effort,
        "reasoning_budget": request.reasoning_budget,
        "profile": request.profile,
        "service_tier": request.service_tier,
    }
    if LOGPROBS in (request.include or ()):
        optional |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    given = {name: value for name, value in optional.items() if value is not None}
    return ChatBody(body | {"messages": messages} | given, places, tools)


def _messages(
    instructions: str | None, items: Sequence[PlacedItem]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Chat messages. What the assistant did in a row, reasoning, words and calls, is one message."""
    messages: list[dict[str, Any]] = []
    places: list[str] = []
    if instructions:
        messages.append({"role": "developer", "content": instructions})
        places.append("instructions")
    turn: dict[str, Any] | None = None  # the assistant's message that may go on
    for placed in items:
        item, where = _item(placed), placed.where
        part = _part_of_turn(item, where)
        if part is None:
            turn = None
            messages.append(_other(item, where))
            places.append(where)
            continue
        if turn is None or not _goes_on(turn, part):
            turn = {"role": "assistant"}
            messages.append(turn)
            places.append(where)
        calls = turn.get("tool_calls", []) + part.pop("tool_calls", [])
        turn |= part
        if calls:
            turn["tool_calls"] = calls
    return messages, places


def _goes_on(turn: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Reasoning, then words, then calls: what would go back in that order begins another message."""
    if "tool_calls" in part:
        return True
    return not turn.keys() & ({"content", "tool_calls"} | part.keys())


def _item(placed: PlacedItem) -> Item:
    given, where = placed.item, placed.where
    if not isinstance(given, Mapping):
        raise InvalidRequest("An input item is an object.", where, "invalid_type")
    kind = given.get("type", "message")
    model = ITEMS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise InvalidRequest(
            f"Input items of type {kind!r} are not supported; there are {', '.join(ITEMS)}.",
            f"{where}.type",
            "unsupported_value",
        )
    try:
        return model.model_validate(dict(given))
    except ValidationError as error:
        raise from_validation(error, (where,)) from None


def _part_of_turn(item: Item, where: str) -> dict[str, Any] | None:
    """What this item adds to the assistant's message; None: it is no part of one."""
    if isinstance(item, ReasoningItem):
        return {"reasoning_content": _reasoning(item, where)}
    if isinstance(item, FunctionCallItem):
        function = {"name": item.name, "arguments": item.arguments}
        return {
            "tool_calls": [{"id": item.call_id, "type": "function", "function": function}],
        }
    if isinstance(item, InputMessage) and item.role == "assistant":
        return {"content": _text(item.content, ASSISTANT_PARTS, f"{where}.content")}
    return None


def _reasoning(item: ReasoningItem, where: str) -> str:
    if item.content or item.encrypted_content is None:
        return _text(item.content or "", REASONING_PARTS, f"{where}.content")
    try:
        return unseal(item.encrypted_content)
    except ValueError as error:
        raise InvalidRequest(
            f"This reasoning cannot be read: {error}. Send its 'content', or leave the item out.",
            f"{where}.encrypted_content",
            "invalid_encrypted_content",
        ) from None


def _other(item: Item, where: str) -> dict[str, Any]:
    if isinstance(item, FunctionOutputItem):
        text = _text(item.output, OUTPUT_PARTS, f"{where}.output")
        return {"role": "tool", "tool_call_id": item.call_id, "content": text}
    assert isinstance(item, InputMessage)
    return {"role": item.role, "content": _text(item.content, INPUT_PARTS, f"{where}.content")}


def _text(content: str | list[Any], allowed: Mapping[str, str], where: str) -> str:
    """A string, or the texts of an array's parts in order."""
    if isinstance(content, str):
        return content
    try:
        check_parts(content, allowed, where)
    except PydanticCustomError as error:
        problem = error.context or {}
        raise InvalidRequest(problem["text"], problem["param"], problem["code"]) from None
    return "".join(part[allowed[part["type"]]] for part in content)


def _offered(tools: Sequence[Any]) -> dict[int, FunctionTool]:
    """The functions among the tools, by their places. Raises InvalidRequest.

    Clients offer tools that OpenAI runs, or groups of tools, with every request and can do without: these are left out.
    """
    offered: dict[int, FunctionTool] = {}
    for index, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or not isinstance(kind, str):
            raise InvalidRequest(
                "A tool is an object with a type.", f"tools[{index}]", "invalid_type"
            )
        if kind != "function":
            _warn_left_out([kind])
            continue
        try:
            offered[index] = FunctionTool.model_validate(dict(tool))
        except ValidationError as error:
            raise from_validation(error, ("tools", index)) from None
    return offered


def _nested(tool: FunctionTool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude={"type"})}


def _nested_choice(choice: Any) -> Any:
    """`{"type": "function", "name": f}` as chat has it; what is something else is left for it to judge."""
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    tools = choice.get("tools")
    if choice.get("type") == "allowed_tools" and isinstance(tools, list):
        return {**choice, "tools": [_nested_choice(tool) for tool in tools]}
    return choice


def _response_format(wanted: TextFormat | None) -> dict[str, Any] | None:
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    return {
        "type": "json_schema",
        "json_schema": wanted.model_dump(exclude={"type"}, by_alias=True, exclude_none=True),
    }
