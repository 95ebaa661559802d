"""Items of a Responses conversation, and the chat messages that they stand for."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_core import PydanticCustomError

from gptoss.api.http.errors import InvalidRequest, from_validation
from gptoss.api.http.fields import Phase, Strict, check_parts
from gptoss.api.responses.encrypted_content import ForeignSeal, unseal
from gptoss.api.telemetry.warn_once import WarnOnce

logger = logging.getLogger(__name__)
_warn_left_out = WarnOnce(logger, "input items of type %s are left out: the model cannot read them", limit=100)
# What OpenAI's own tools and services leave in a history: https://platform.openai.com/docs/api-reference/responses
_FOREIGN = re.compile(
    r"\w+_call|\w+_call_output|mcp_\w+|\w*compaction\w*|tool_search_output|program|program_output"
    r"|additional_tools|configuration_update|ghost_snapshot"
)


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An item as it was sent or stored, and the field of the request that it came by."""

    item: Any
    where: str


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Any]
    name: str | None = None
    phase: Phase | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    namespace: str | None = None
    arguments: str


class CustomCallItem(Strict):
    type: Literal["custom_tool_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    namespace: str | None = None
    input: str


class CallOutputItem(Strict):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | list[Any]


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    content: list[Any] | None = None
    encrypted_content: str | None = None
    summary: list[Any] | None = None


CallItem = FunctionCallItem | CustomCallItem
Item = InputMessage | CallItem | CallOutputItem | ReasoningItem
ITEMS: dict[str, type[Item]] = {
    "message": InputMessage,
    "function_call": FunctionCallItem,
    "function_call_output": CallOutputItem,
    "custom_tool_call": CustomCallItem,
    "custom_tool_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
}
INPUT_PARTS = dict.fromkeys(("input_text", "text"), "text")
OUTPUT_PARTS = dict.fromkeys(("output_text", "input_text", "text"), "text")
ASSISTANT_PARTS = OUTPUT_PARTS | {"refusal": "refusal"}
REASONING_PARTS = dict.fromkeys(("reasoning_text", "text"), "text")
SUMMARY_PARTS = dict.fromkeys(("summary_text", "text"), "text")


def num_rendered(items: Sequence[Any]) -> int:
    """At least so many Harmony messages, or items that are none. Reasoning may go, system messages are joined."""
    return sum(
        not isinstance(item, Mapping)
        or item.get("role") == "user"
        or (item.get("type") in ITEMS and item["type"] not in ("message", "reasoning"))
        or not (item.get("role") or item.get("type"))
        for item in items
    )


@dataclass(slots=True)
class Conversation:
    """Chat messages. What the assistant did in a row, reasoning, words and calls, is one message."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)  # the field by which each message came

    def append(self, message: dict[str, Any], where: str) -> None:
        self.messages.append(message)
        self.places.append(where)


def read_items(items: Sequence[PlacedItem], conversation: Conversation, name: Callable[[str | None, str], str]) -> None:
    """Appends the items' messages. `name`: the model's name for a function, of its namespace and name.

    Raises:
        InvalidRequest: an item that cannot be read.
    """
    turn: dict[str, Any] | None = None  # the assistant's message that may go on
    open_calls: dict[str, str] = {}  # their ids and places, until someone else writes
    left_out: set[Any] = set()  # ids of calls that the model cannot read
    for placed in items:
        item, where = _item(placed), placed.where
        if item is None:
            left_out.add(_id_of_call(placed.item))
            continue
        if isinstance(item, FunctionCallItem | CustomCallItem):
            _check_unused(item.call_id, where, open_calls)
            left_out.discard(item.call_id)
        if isinstance(item, CallOutputItem) and item.call_id in left_out:
            _warn_left_out([item.type])
            continue
        part = _part_of_turn(item, where, name)
        if part is None:
            turn = None
            open_calls.clear()
            conversation.append(_other(item, where), where)
            continue
        if not part:
            continue
        if turn is None or not _goes_on(turn, part):
            turn = {"role": "assistant"}
            conversation.append(turn, where)
        calls = turn.get("tool_calls", []) + part.pop("tool_calls", [])
        turn |= part
        if calls:
            turn["tool_calls"] = calls
    _mark_preambles(conversation.messages)


def _id_of_call(item: Mapping[str, Any]) -> str | None:
    """By which a result refers to an item of another server."""
    ids = (item.get("call_id"), item.get("id"))
    return next((name for name in ids if isinstance(name, str) and name), None)


def _check_unused(call_id: str, where: str, open_calls: dict[str, str]) -> None:
    if call_id in open_calls:
        raise InvalidRequest(
            f"'{open_calls[call_id]}' and '{where}' have the same call_id {call_id!r}.",
            f"{where}.call_id",
            "invalid_value",
        )
    open_calls[call_id] = where


def _goes_on(turn: Mapping[str, Any], part: Mapping[str, Any]) -> bool:
    """Reasoning, then words, then calls: what would go back in that order begins another message."""
    if "tool_calls" in part:
        return turn.get("phase") != "final_answer"
    return not turn.keys() & ({"content", "tool_calls"} | part.keys())


def _mark_preambles(messages: Sequence[dict[str, Any]]) -> None:
    """Words before more reasoning and more words of the same turn are a preamble: an answer ends the turn."""
    words_follow = reasoning_follows = False
    for message in reversed(messages):
        if message["role"] == "user":
            words_follow = reasoning_follows = False
        if message["role"] != "assistant":
            continue
        if "content" in message:
            if reasoning_follows:
                message.setdefault("phase", "commentary")
            words_follow = True
        if "reasoning_content" in message:
            reasoning_follows = words_follow


def _item(placed: PlacedItem) -> Item | None:
    """None: an item of a known kind that only another server can read."""
    given, where = placed.item, placed.where
    if not isinstance(given, Mapping):
        raise InvalidRequest("An input item is an object.", where, "invalid_type")
    kind = given.get("type") or "message"
    model = ITEMS.get(kind) if isinstance(kind, str) else None
    if model is None:
        if isinstance(kind, str) and _FOREIGN.fullmatch(kind):
            _warn_left_out([kind])
            return None
        raise InvalidRequest(
            f"Input items of type {kind!r} are not supported; use one of {', '.join(ITEMS)}.",
            f"{where}.type",
            "unsupported_value",
        )
    try:
        return model.model_validate(dict(given) | {"type": kind})
    except ValidationError as error:
        raise from_validation(error, (where,)) from None


def _part_of_turn(item: Item, where: str, name: Callable[[str | None, str], str]) -> dict[str, Any] | None:
    """What this item adds to the assistant's message, {} for nothing; None: it is no part of one."""
    if isinstance(item, ReasoningItem):
        text = _reasoning(item, where)
        return {} if text is None else {"reasoning_content": text or [text]}
    if isinstance(item, FunctionCallItem):
        function = {"name": name(item.namespace, item.name), "arguments": item.arguments}
        return {"tool_calls": [{"id": item.call_id, "type": "function", "function": function}]}
    if isinstance(item, CustomCallItem):
        custom = {"name": name(item.namespace, item.name), "input": item.input}
        return {"tool_calls": [{"id": item.call_id, "type": "custom", "custom": custom}]}
    if isinstance(item, InputMessage) and item.role == "assistant":
        text = _text(item.content, ASSISTANT_PARTS, f"{where}.content")
        return {"content": text} | ({"phase": item.phase} if item.phase else {})
    return None


def _reasoning(item: ReasoningItem, where: str) -> str | None:
    """The text, or else what this server sealed, or else the summary; None: there is nothing to read."""
    if item.content:
        return _text(item.content, REASONING_PARTS, f"{where}.content")
    if item.encrypted_content is not None:
        try:
            return unseal(item.encrypted_content)
        except ForeignSeal:
            _warn_left_out(["reasoning with another server's encrypted_content"])
        except ValueError as error:
            raise InvalidRequest(
                f"This reasoning cannot be read: {error}. Send its 'content', or leave the item out.",
                f"{where}.encrypted_content",
                "invalid_encrypted_content",
            ) from None
    if item.summary:
        return _text(item.summary, SUMMARY_PARTS, f"{where}.summary", between="\n\n")
    return None


def _other(item: Item, where: str) -> dict[str, Any]:
    if isinstance(item, CallOutputItem):
        text = "" if item.output == [] else _text(item.output, OUTPUT_PARTS, f"{where}.output")
        return {"role": "tool", "tool_call_id": item.call_id, "content": text}
    assert isinstance(item, InputMessage)
    text = _text(item.content, INPUT_PARTS, f"{where}.content")
    return {"role": item.role, "content": text} | ({"name": item.name} if item.name else {})


def _text(content: str | list[Any], allowed: Mapping[str, str], where: str, *, between: str = "") -> str:
    """A string, or the texts of an array's parts in order."""
    if isinstance(content, str):
        return content
    try:
        check_parts(content, allowed, where)
    except PydanticCustomError as error:
        problem = error.context or {}
        raise InvalidRequest(problem["text"], problem["param"], problem["code"]) from None
    return between.join(part[allowed[part["type"]]] for part in content)
