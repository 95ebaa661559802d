"""The validated messages of a chat request as a conversation, and the message the answer continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gptoss.api.chat.schema import ASSISTANT_PARTS, PARTS, ChatCompletionRequest, Message
from gptoss.api.chat.schema import ToolCall as WireCall
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.fields import CHANNELS, joined_parts
from gptoss.generation.request import Prefill
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

CONTINUE = "continue_final_message"
FIELDS = {"id": "id", "call_id": "tool_call_id", "name": "name"}  # what chat calls the fields of a PromptError


def read_messages(messages: Sequence[Message]) -> Conversation:
    """The conversation of messages that `check_message` has passed."""
    read = (one for index, message in enumerate(messages) for one in _read(message, f"messages[{index}]"))
    return Conversation(tuple(read))


def read_prefill(request: ChatCompletionRequest, *, constrained: bool) -> Prefill | None:
    """The last message if the answer continues it, else None.

    `constrained`: the answer has to be a call, or of a given format. Raises InvalidRequest.
    """
    if not request.continue_final_message:
        return None
    if request.add_generation_prompt:
        raise InvalidRequest(f"'{CONTINUE}' cannot be combined with 'add_generation_prompt'.", CONTINUE)
    last = request.messages[-1]
    if last.role != "assistant" or not last.content:
        raise InvalidRequest(f"'{CONTINUE}' needs a last message of the assistant with content.", CONTINUE)
    if last.tool_calls or last.function_call:
        raise InvalidRequest(f"'{CONTINUE}' cannot continue a message with calls.", CONTINUE)
    if constrained:
        raise InvalidRequest(f"'{CONTINUE}' cannot be combined with a response format or a forced call.", CONTINUE)
    texts = [one for one in read_messages([last]).messages if isinstance(one, AssistantMessage)]
    return Prefill(
        "".join(text.text for text in texts if text.channel != "analysis"),
        [text.text for text in texts if text.channel == "analysis"],
    )


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
