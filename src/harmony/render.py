"""Renders Harmony messages as token ids.

Assistant history is written channel-first, `<|channel|>commentary to=functions.f <|constrain|>json<|message|>`, as the
model writes it; openai-harmony puts the recipient first, which the model has not seen and copies with errors.
Message text never becomes a special token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from gptoss.harmony.bpe import UNLIMITED, Limits
from gptoss.harmony.conversation import Channel, ResponseSchema, ToolDefinition, ToolNamespace
from gptoss.harmony.special_tokens import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from gptoss.harmony.tool_schema import render_namespace, render_tools
from gptoss.harmony.vocabulary_files import Vocabulary

ReasoningEffort = Literal["low", "medium", "high"]

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"


@dataclass(frozen=True, slots=True)
class HarmonyMessage:
    """One message. `header` is the text after the start token, for assistants without the channel part."""

    header: str  # "system", "developer", "user", "assistant" or "functions.f to=assistant"
    text: str
    channel: str | None = None
    recipient: str | None = None  # assistant tool calls
    content_type: str | None = None
    ends_with_call: bool = False


def render_message(message: HarmonyMessage, vocabulary: Vocabulary, limits: Limits = UNLIMITED) -> list[int]:
    """The ids of a message. Raises TooManyTokensError or EncodingStoppedError."""

    def encode(text: str) -> list[int]:
        return vocabulary.encode(text, limits)

    ids = [START, *encode(message.header)]
    if message.channel is not None:
        after = message.channel
        if message.recipient is not None:
            after += f" to={message.recipient}"
        if message.content_type is not None:
            ids += [CHANNEL, *encode(after + " "), CONSTRAIN, *encode(message.content_type)]
        else:
            ids += [CHANNEL, *encode(after)]
    ids += [MESSAGE, *encode(message.text), CALL if message.ends_with_call else END]
    limits.check(len(ids))
    return ids


def split_generated(token_ids: Sequence[int], vocabulary: Vocabulary) -> list[tuple[HarmonyMessage, list[int]]]:
    """The messages that the model generated after `<|start|>assistant`, each with its ids in history.

    Only messages with a well-formed header and an end token are returned; `<|return|>` becomes `<|end|>`.
    """
    prefix = generation_prefix(vocabulary)
    found, current = [], list(prefix)
    for token in token_ids:
        if token == START:
            current = [START]
            continue
        current.append(END if token == RETURN else token)
        if token in (END, RETURN, CALL):
            message = _read_message(current, prefix, vocabulary)
            if message is not None:
                found.append((message, current))
            current = []
    return found


def _read_message(ids: list[int], prefix: list[int], vocabulary: Vocabulary) -> HarmonyMessage | None:
    if ids[: len(prefix) + 1] != [*prefix, CHANNEL] or MESSAGE not in ids:
        return None
    at = ids.index(MESSAGE)
    header, body = ids[len(prefix) + 1 : at], ids[at + 1 : -1]
    text = b"".join(map(vocabulary.bytes_of, body))
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        return None
    content_type = None
    if CONSTRAIN in header:
        content_type = vocabulary.decode(header[header.index(CONSTRAIN) + 1 :])
        header = header[: header.index(CONSTRAIN)]
    channel, _, recipient = vocabulary.decode(header).strip().partition(" to=")
    message = HarmonyMessage("assistant", decoded, channel, recipient or None, content_type, ids[-1] == CALL)
    well_formed = channel in ("analysis", "commentary", "final") and message.ends_with_call == bool(recipient)
    # a replayed message must equal the generated one
    return message if well_formed and max(body, default=0) < START else None


def generation_prefix(vocabulary: Vocabulary) -> list[int]:
    """The ids that every prompt ends with: the model continues from here."""
    return [START, *vocabulary.encode("assistant")]


def system_message(
    effort: ReasoningEffort,
    *,
    has_tools: bool,
    current_date: str | None,
    identity: str = IDENTITY,
    builtins: Sequence[ToolNamespace] = (),
) -> HarmonyMessage:
    """The system message. `has_tools`: of the developer message; `builtins` are shown here."""
    lines = [identity, f"Knowledge cutoff: {KNOWLEDGE_CUTOFF}"]
    if current_date:
        lines.append(f"Current date: {current_date}")
    channels = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    if has_tools:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    tools = ["# Tools", *map(render_namespace, builtins)] if builtins else []
    return HarmonyMessage("system", "\n\n".join(["\n".join(lines), f"Reasoning: {effort}", *tools, channels]))


def developer_message(
    instructions: str | None, tools: Sequence[ToolDefinition] = (), schema: ResponseSchema | None = None
) -> HarmonyMessage | None:
    """The message with instructions, tools and the schema of the final message; None without any of them."""
    sections = []
    if instructions:
        sections.append(f"# Instructions\n\n{instructions}")
    if tools:
        sections.append(render_tools(tools))
    if schema is not None:
        lines = [f"## {schema.name}\n"]
        if schema.description:
            lines.append(f"// {schema.description}")
        lines.append(json.dumps(schema.schema, ensure_ascii=False, separators=(",", ":")))
        sections.append("# Response Formats\n\n" + "\n".join(lines))
    return HarmonyMessage("developer", "\n\n".join(sections)) if sections else None


def tool_call(name: str, text: str, *, is_json: bool = True) -> HarmonyMessage:
    """The message of a call. `is_json` is false for the free text of a custom tool."""
    return HarmonyMessage(
        "assistant",
        text,
        "commentary",
        f"functions.{name}",
        content_type="json" if is_json else None,
        ends_with_call=True,
    )


def builtin_call(recipient: str, text: str) -> HarmonyMessage:
    """The message of a call of a built-in tool, as the model writes it."""
    return HarmonyMessage("assistant", text, "analysis", f"{recipient} code", ends_with_call=True)


def builtin_result(recipient: str, text: str) -> HarmonyMessage:
    """The result of a built-in tool: its author is the recipient of the call."""
    return HarmonyMessage(f"{recipient} to=assistant", text, "analysis")


def tool_result(name: str, text: str) -> HarmonyMessage:
    return HarmonyMessage(f"functions.{name} to=assistant", text, "commentary")


def assistant_text(channel: Channel, text: str) -> HarmonyMessage:
    return HarmonyMessage("assistant", text, channel)
