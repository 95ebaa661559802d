"""The messages of a request as a conversation."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence

from gptoss.api.hosted.names import joined_name
from gptoss.api.http.encrypted_content import ForeignContentError, decode_text
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.messages.schema.blocks import (
    AssistantBlock,
    DocumentBlock,
    ForeignBlock,
    McpToolResultBlock,
    McpToolUseBlock,
    RedactedThinkingBlock,
    ResultBlock,
    SearchResultBlock,
    SystemMessage,
    TextBlock,
    ThinkingBlock,
    ToolReferenceBlock,
    ToolResultBlock,
    ToolUseBlock,
    UserBlock,
)
from gptoss.api.messages.schema.blocks import AssistantMessage as AssistantInput
from gptoss.api.messages.schema.blocks import Message as InputMessage
from gptoss.api.messages.schema.request import CountTokensRequest
from gptoss.api.messages.server_tools import Runs, mark_of, read_calls, runs_nothing
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.request import Prefill
from gptoss.harmony.conversation import (
    AssistantMessage,
    Channel,
    Conversation,
    DeveloperMessage,
    Message,
    ToolCall,
    ToolResult,
    UserMessage,
)

logger = logging.getLogger(__name__)
_warn_left_out = WarnOnce(logger, "content blocks are left out: the model cannot read %s", limit=100)
BILLING = "x-anthropic-billing-header"  # Claude Code's, which may change with every request
NOT_RUN = "This call was not run."
BETWEEN = "\n\n"  # two blocks


def read_conversation(request: CountTokensRequest, runs: Runs = runs_nothing) -> tuple[Conversation, Prefill | None]:
    """Returns the conversation, and the answer that its last message begins. Raises InvalidRequest.

    `runs`: whether this server runs built-in tools of a type; the model reads no calls of others.
    """
    prefill = _prefill(request.messages)
    messages = request.messages if prefill is None else request.messages[:-1]
    read: list[Message] = [*_system(request.system or "")]
    for index, message in enumerate(messages):
        read += _read(message, f"messages.{index}.content", runs)
    return Conversation(tuple(read)), prefill


def num_rendered(messages: Iterable[object]) -> int:
    """The number of Harmony messages at least, of a list that has not been validated."""
    count = 0
    for message in messages:
        if isinstance(message, dict):
            blocks = message.get("content")
            if isinstance(blocks, list):
                calls = sum(isinstance(b, dict) and b.get("type") in ("tool_use", "tool_result") for b in blocks)
                texts = any(isinstance(b, dict) and b.get("type") == "text" for b in blocks)
                count += calls + (texts and message.get("role") == "user")
            else:
                count += message.get("role") == "user"
    return count


def _system(content: str | Sequence[TextBlock]) -> Iterator[DeveloperMessage]:
    texts = [content] if isinstance(content, str) else [block.text for block in content]
    for text in texts:
        kept = _without_billing(text)
        if kept:
            yield DeveloperMessage(kept)


def _without_billing(text: str) -> str:
    return text.partition("\n")[2].lstrip("\n") if text.startswith(BILLING) else text


def _read(message: InputMessage, where: str, runs: Runs) -> Iterable[Message]:
    if isinstance(message, SystemMessage):
        system = message.content
        texts = [system] if isinstance(system, str) else [b.text for b in system if isinstance(b, TextBlock)]
        text = BETWEEN.join(filter(None, map(_without_billing, texts)))
        return [DeveloperMessage(text)] if text else []
    if isinstance(message, AssistantInput):
        return _assistant(_assistant_blocks(message), where, runs)
    content = message.content
    return [UserMessage(content)] if isinstance(content, str) else _user(content, where)


def _user(blocks: Sequence[UserBlock], where: str) -> Iterator[Message]:
    """Results first, whatever the order: they follow their calls."""
    texts = []
    for index, block in enumerate(blocks):
        if isinstance(block, ToolResultBlock):
            yield ToolResult(_result(block), block.tool_use_id, origin=f"{where}.{index}")
        elif isinstance(block, ForeignBlock):
            _warn_left_out([block.type])
        else:
            texts.append(_text(block))
    if texts:
        yield UserMessage(BETWEEN.join(texts))


def _result(block: ToolResultBlock | McpToolResultBlock) -> str:
    content = block.content or ""
    text = content if isinstance(content, str) else BETWEEN.join(map(_text, content))
    return f"Error: {text}" if block.is_error else text


def _text(block: UserBlock | ResultBlock) -> str:
    match block:
        case TextBlock():
            return block.text
        case SearchResultBlock():
            return "\n".join([f"{block.title} ({block.source})", *(part.text for part in block.content)])
        case DocumentBlock():
            return "\n".join(filter(None, [block.title, block.context, _document(block)]))
        case ToolReferenceBlock():
            return f"The tool '{block.tool_name}' is available."
    return ""


def _document(block: DocumentBlock) -> str:
    source = block.source
    if source.type == "text":
        return source.data or ""
    content = source.content or ""
    return content if isinstance(content, str) else BETWEEN.join(b.text for b in content if isinstance(b, TextBlock))


def _assistant_blocks(message: AssistantInput) -> list[AssistantBlock]:
    content = message.content
    return [TextBlock(type="text", text=content)] if isinstance(content, str) else list(content)


def _assistant(blocks: Sequence[AssistantBlock], where: str, runs: Runs = runs_nothing) -> Iterator[Message]:
    """Each block as one message, in order; texts that follow a citation belong to the text that has it."""
    foreign = {index: block for index, block in enumerate(blocks) if isinstance(block, ForeignBlock)}
    ran = read_calls(foreign, where, runs)
    begun = ""  # of a text that continues
    for index, block in enumerate(blocks):
        match block:
            case TextBlock() if block.citations and isinstance(next(iter(blocks[index + 1 :]), None), TextBlock):
                begun += _marked(block)
            case TextBlock():
                text, begun = begun + _marked(block), ""
                yield AssistantMessage(text, _channel(text, blocks[index + 1 :]))
            case ThinkingBlock() | RedactedThinkingBlock():
                thought = _thought(block, f"{where}.{index}")
                if thought is not None:
                    yield AssistantMessage(thought, "analysis")
            case ToolUseBlock():
                arguments = json.dumps(block.input, ensure_ascii=False, separators=(",", ":"))
                yield ToolCall(block.name, arguments, block.id, origin=f"{where}.{index}")
            case McpToolUseBlock():
                arguments = json.dumps(block.input, ensure_ascii=False, separators=(",", ":"))
                yield ToolCall(
                    joined_name(block.server_name, block.name), arguments, block.id, origin=f"{where}.{index}"
                )
                if not any(isinstance(b, McpToolResultBlock) and b.tool_use_id == block.id for b in blocks[index:]):
                    yield ToolResult(NOT_RUN, block.id, origin=f"{where}.{index}")
            case McpToolResultBlock():
                yield ToolResult(_result(block), block.tool_use_id, origin=f"{where}.{index}")
            case ForeignBlock() if index in ran:
                yield ran[index]
            case ForeignBlock():
                _warn_left_out([block.type])


def _marked(block: TextBlock) -> str:
    """The text with the marks of its citations, as the model wrote it."""
    citations = block.citations if isinstance(block.citations, list) else []
    marks = "".join(map(mark_of, citations))
    text = block.text.rstrip() if marks else block.text
    return text + marks + block.text[len(text) :]


def _channel(text: str, after: Sequence[AssistantBlock]) -> Channel | None:
    """The channel of a text; a text before another one is a preamble.

    None: it depends on the turn, which leaves out a message without text.
    """
    if any(isinstance(block, TextBlock) for block in after):
        return "commentary"
    if text:
        return None
    return "commentary" if any(isinstance(block, ToolUseBlock | McpToolUseBlock) for block in after) else "final"


def _thought(block: ThinkingBlock | RedactedThinkingBlock, where: str) -> str | None:
    """The text, else the text in the signature or data of this server; None if there is none."""
    if isinstance(block, ThinkingBlock) and block.thinking:
        return block.thinking
    if isinstance(block, RedactedThinkingBlock):
        content, field = block.data, "data"
    else:
        content, field = block.signature or "", "signature"
    try:
        return decode_text(content)
    except ForeignContentError:
        _warn_left_out([f"{block.type} of another server"])
        return None
    except ValueError as error:
        message = f"This thinking cannot be read: {error}. Send it as it was received, or leave the block out."
        raise InvalidRequest(message, f"{where}.{field}", "invalid_encrypted_content") from None


def _prefill(messages: Sequence[InputMessage]) -> Prefill | None:
    """The text of a last message of the assistant, which the answer continues."""
    last = messages[-1]
    if not isinstance(last, AssistantInput):
        return None
    blocks = _assistant_blocks(last)
    if any(isinstance(block, ToolUseBlock | McpToolUseBlock) for block in blocks):
        return None
    read = _assistant(blocks, f"messages.{len(messages) - 1}.content")
    texts = [one for one in read if isinstance(one, AssistantMessage)]
    text = "".join(one.text for one in texts if one.channel != "analysis")
    return Prefill(text, [one.text for one in texts if one.channel == "analysis"]) if text else None
