"""The items of a Responses request as a conversation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from gptoss.api.http.encrypted_content import ForeignContentError, decode_text
from gptoss.api.http.errors import InvalidRequest, from_validation
from gptoss.api.http.fields import CHANNELS, check_parts, check_user_name, joined_parts
from gptoss.api.responses.input.items import (
    ASSISTANT_PARTS,
    FOREIGN,
    INPUT_PARTS,
    ITEMS,
    OUTPUT_PARTS,
    REASONING_PARTS,
    SUMMARY_PARTS,
    CallItem,
    CallOutputItem,
    CodeInterpreterItem,
    CustomCallItem,
    FunctionCallItem,
    InputMessage,
    Item,
    LocalShellCallItem,
    LocalShellOutputItem,
    OutputItem,
    PatchCallItem,
    PatchOutputItem,
    ReasoningItem,
    ShellCallItem,
    ShellOutputItem,
)
from gptoss.api.responses.tools.client_tools import arguments_of, output_text
from gptoss.api.responses.tools.patch import Operation, joined_patches, write_patch
from gptoss.api.responses.tools.placed import PlacedItem
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.harmony.conversation import (
    AssistantMessage,
    Conversation,
    DeveloperMessage,
    Message,
    ToolCall,
    ToolResult,
    UserMessage,
)
from gptoss.harmony.layout import messages_before

logger = logging.getLogger(__name__)
_warn_left_out = WarnOnce(logger, "input items of type %s are left out: the model cannot read them", limit=100)
_warn_names = WarnOnce(logger, "names of messages are not shown to the model for roles: %s")


def read_items(items: Sequence[PlacedItem], name: Callable[[str | None, str], str]) -> list[Message | None]:
    """The message of each item; None for an item that the model cannot read or that says nothing.

    `name`: the model's name for a function, of its namespace and name. Raises InvalidRequest for an invalid item.
    """
    left_out: set[Any] = set()  # ids of calls that the model cannot read
    messages: list[Message | None] = []
    for placed in items:
        made = placed.item.get("message") if isinstance(placed.item, Mapping) else None
        if isinstance(made, ToolCall | ToolResult):  # read_history has read it
            messages.append(made)
            continue
        item = _validated(placed)
        if item is None:
            left_out.add(_id_of_call(placed.item))
        elif isinstance(item, CallItem):
            left_out.discard(item.call_id)
        elif isinstance(item, OutputItem) and item.call_id in left_out:
            _warn_left_out([item.type])
            item = None
        messages.append(None if item is None else _message(item, placed.where, name))
    return messages


def conversation_of(instructions: str | None, messages: Iterable[Message | None]) -> Conversation:
    """The conversation of messages that `read_items` returned, or of some of them.

    Raises:
        InvalidRequest: there are none.
    """
    read: list[Message] = [DeveloperMessage(instructions)] if instructions else []
    read += [message for message in messages if message is not None]
    if not read:
        raise InvalidRequest("'input' has no item that the model can read.", "input", "empty_array")
    _mark_preambles(read)
    return Conversation(tuple(_as_written([*joined_patches(read)])))


def _id_of_call(item: Mapping[str, Any]) -> str | None:
    """The id by which a result refers to a call of another server's tool."""
    ids = (item.get("call_id"), item.get("id"))
    return next((name for name in ids if isinstance(name, str) and name), None)


def _mark_preambles(messages: list[Message]) -> None:
    """Words before more reasoning and more words of the same turn are a preamble: an answer ends the turn."""
    words_follow = reasoning_follows = False
    for index, message in reversed(list(enumerate(messages))):
        if isinstance(message, UserMessage):
            words_follow = reasoning_follows = False
        elif isinstance(message, AssistantMessage) and message.channel == "analysis":
            reasoning_follows = words_follow
        elif isinstance(message, AssistantMessage):
            if reasoning_follows and message.channel is None:
                messages[index] = replace(message, channel="commentary")
            words_follow = True


def _as_written(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages. Where a client has joined texts before a call, its id parts them again."""
    texts: list[AssistantMessage] = []  # before a call, as a chat message has them: reasoning, then words
    previous: Message | None = None
    for message in messages:
        if isinstance(message, AssistantMessage):
            if texts and (message.channel == "analysis" or texts[-1].channel != "analysis"):
                yield from texts
                texts = []
            texts.append(message)
        else:
            if isinstance(message, ToolCall) and not isinstance(previous, ToolCall):
                texts = _parted(texts, message.id or "")
            yield from texts
            yield message
            texts = []
        previous = message
    yield from texts


def _parted(texts: list[AssistantMessage], call_id: str) -> list[AssistantMessage]:
    """The texts as the model wrote them before the call of this id. A final answer is not part of them."""
    if texts and texts[-1].channel == "final":
        return [*texts, *(messages_before(call_id, "", "") or ())]
    reasoning = [text.text for text in texts if text.channel == "analysis"]
    words = [text for text in texts if text.channel != "analysis"]
    if reasoning == [""] or any(text.channel is not None for text in words):
        return texts
    parted = messages_before(call_id, "".join(reasoning), "".join(text.text for text in words))
    return texts if parted is None else parted


def _validated(placed: PlacedItem) -> Item | None:
    """The validated item; None for a known kind that only another server can read."""
    given, where = placed.item, placed.where
    if not isinstance(given, Mapping):
        raise InvalidRequest("An input item is an object.", where, "invalid_type")
    kind = given.get("type") or "message"
    model = ITEMS.get(kind) if isinstance(kind, str) else None
    if model is None:
        if isinstance(kind, str) and FOREIGN.fullmatch(kind):
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


def _message(item: Item, where: str, name: Callable[[str | None, str], str]) -> Message | None:
    """The item as the model reads it; None: there is nothing to read."""
    match item:
        case ReasoningItem():
            text = _reasoning(item, where)
            return None if text is None else AssistantMessage(text, "analysis")
        case CodeInterpreterItem():
            if item.code and item.call_id:
                return ToolCall("python", item.code, item.call_id, is_json=False, is_builtin=True, origin=where)
            _warn_left_out([item.type])
            return None
        case FunctionCallItem():
            return ToolCall(name(item.namespace, item.name), item.arguments, item.call_id, origin=where)
        case CustomCallItem():
            called = name(item.namespace, item.name)
            return ToolCall(called, item.input, item.call_id, is_json=False, origin=where)
        case PatchCallItem(operation=operation):
            patch = write_patch([Operation(operation.type, operation.path, operation.diff)])
            return ToolCall(name(None, "apply_patch"), patch, item.call_id, is_json=False, origin=where)
        case ShellCallItem():
            return ToolCall(name(None, "shell"), arguments_of(item.action), item.call_id, origin=where)
        case LocalShellCallItem():
            return ToolCall(name(None, "local_shell"), arguments_of(item.action), item.call_id, origin=where)
        case CallOutputItem() | PatchOutputItem() | ShellOutputItem() | LocalShellOutputItem():
            return _result(item, where)
        case InputMessage(role="assistant"):
            text = _text(item.content, ASSISTANT_PARTS, f"{where}.content")
            return AssistantMessage(text, CHANNELS[item.phase] if item.phase else None)
        case InputMessage():
            return _input_message(item, where)


def _result(item: OutputItem, where: str) -> ToolResult:
    match item:
        case PatchOutputItem():
            text = item.output or f"The change {'failed' if item.status == 'failed' else 'is made'}."
        case ShellOutputItem(output=list(outputs)):
            text = output_text(outputs)
        case _:
            output = item.output or ""
            text = "" if output == [] else _text(output, OUTPUT_PARTS, f"{where}.output")
    if not item.call_id:
        raise InvalidRequest("A result needs call_id.", f"{where}.call_id", "missing_required_parameter")
    return ToolResult(text, item.call_id, origin=where)


def _input_message(item: InputMessage, where: str) -> UserMessage | DeveloperMessage:
    text = _text(item.content, INPUT_PARTS, f"{where}.content")
    if item.role == "user":
        with contract_errors():
            check_user_name(item.name or "", f"{where}.name")
        return UserMessage(text, item.name)
    if item.name:
        _warn_names([item.role])
    return DeveloperMessage(text)


def _reasoning(item: ReasoningItem, where: str) -> str | None:
    """The content, else the encrypted content of this server, else the summary; None without any of them."""
    if item.content:
        return _text(item.content, REASONING_PARTS, f"{where}.content")
    if item.encrypted_content is not None:
        try:
            return decode_text(item.encrypted_content)
        except ForeignContentError:
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


def _text(content: str | list[Any], allowed: Mapping[str, str], where: str, *, between: str = "") -> str:
    """A string, or the texts of an array's parts in order."""
    if not isinstance(content, str):
        with contract_errors():
            check_parts(content, allowed, where)
    return joined_parts(content, allowed, between)


@contextmanager
def contract_errors() -> Iterator[None]:
    """Turns the error of a check written for pydantic into InvalidRequest."""
    try:
        yield
    except PydanticCustomError as error:
        problem = error.context or {}
        raise InvalidRequest(problem["text"], problem["param"], problem["code"]) from None
