"""The validated messages of a chat request as a conversation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gptoss.api.chat.schema import ASSISTANT_PARTS, PARTS, Message
from gptoss.api.chat.schema import ToolCall as WireCall
from gptoss.api.http.fields import CHANNELS, joined_parts
from gptoss.harmony import conversation as domain
from gptoss.harmony.conversation import (
    AssistantMessage,
    Conversation,
    DeveloperMessage,
    ToolCall,
    ToolResult,
    UserMessage,
)
from gptoss.harmony.layout import messages_before

FIELDS = {"id": "id", "call_id": "tool_call_id", "name": "name"}  # what chat calls the fields of a PromptError


def read_messages(messages: Sequence[Message]) -> Conversation:
    """The conversation of messages that `check_message` has passed."""
    read = (one for index, message in enumerate(messages) for one in _read(message, f"messages[{index}]"))
    return Conversation(tuple(read))


def _read(message: Message, origin: str) -> Iterator[domain.Message]:
    if message.role == "assistant":
        yield from _texts(message)
        yield from _calls(message, origin)
        return
    text = joined_parts(message.content, PARTS)
    if message.role == "user":
        yield UserMessage(text, message.name)
    elif message.role == "tool":
        yield ToolResult(text, call_id=message.tool_call_id, origin=origin)
    elif message.role == "function":
        yield ToolResult(text, name=message.name, origin=origin)
    else:
        yield DeveloperMessage(text)


def _texts(message: Message) -> Sequence[AssistantMessage]:
    """Reasoning, then words, unless the id of the first call says otherwise."""
    reasoning = message.reasoning_content or message.reasoning or ""
    has_content = message.content is not None
    words = joined_parts(message.content, ASSISTANT_PARTS) if has_content else message.refusal or ""
    if message.tool_calls and isinstance(reasoning, str) and message.phase is None:
        before = messages_before(message.tool_calls[0].id, reasoning, words)
        if before is not None:
            return before
    thoughts = [reasoning] if isinstance(reasoning, str) and reasoning else reasoning
    channel = CHANNELS[message.phase] if message.phase and (words or has_content) else None
    return [*(AssistantMessage(thought, "analysis") for thought in thoughts), AssistantMessage(words, channel)]


def _calls(message: Message, origin: str) -> Iterator[ToolCall]:
    for index, call in enumerate(message.tool_calls or ()):
        yield _call(call, f"{origin}.tool_calls[{index}]")
    if message.function_call is not None:
        yield ToolCall(message.function_call.name, message.function_call.arguments)


def _call(call: WireCall, origin: str) -> ToolCall:
    if call.type == "custom":
        assert call.custom is not None
        return ToolCall(call.custom.name, call.custom.input, call.id, is_json=False, origin=origin)
    assert call.function is not None
    return ToolCall(call.function.name, call.function.arguments, call.id, origin=origin)
