"""One Harmony message to token ids.

Assistant history is written channel-first, `<|channel|>commentary to=functions.f <|constrain|>json<|message|>`, as the
model itself writes it; openai-harmony puts the recipient first, which the model has not seen and copies with errors.
Message text never becomes a special token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from src.harmony.tool_types import render_tools
from src.harmony.vocabulary import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, START, Vocabulary

ReasoningEffort = Literal["low", "medium", "high"]

IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
KNOWLEDGE_CUTOFF = "2024-06"


@dataclass(frozen=True, slots=True)
class HarmonyMessage:
    """`header` is the text after the start token, for assistants without the channel part."""

    header: str  # "system", "developer", "user", "assistant" or "functions.f to=assistant"
    text: str
    channel: str | None = None
    recipient: str | None = None  # assistant tool calls
    content_type: str | None = None
    ends_with_call: bool = False


def render_message(message: HarmonyMessage, vocabulary: Vocabulary) -> list[int]:
    ids = [START, *vocabulary.encode(message.header)]
    if message.channel is not None:
        after = message.channel
        if message.recipient is not None:
            after += f" to={message.recipient}"
        if message.content_type is not None:
            ids += [
                CHANNEL,
                *vocabulary.encode(after + " "),
                CONSTRAIN,
                *vocabulary.encode(message.content_type),
            ]
        else:
            ids += [CHANNEL, *vocabulary.encode(after)]
    ids += [MESSAGE, *vocabulary.encode(message.text), CALL if message.ends_with_call else END]
    return ids


def generation_prefix(vocabulary: Vocabulary) -> list[int]:
    """What every prompt ends with: the model goes on from here."""
    return [START, *vocabulary.encode("assistant")]


def system_message(
    effort: ReasoningEffort, *, has_tools: bool, current_date: str | None, identity: str = IDENTITY
) -> HarmonyMessage:
    lines = [identity, f"Knowledge cutoff: {KNOWLEDGE_CUTOFF}"]
    if current_date:
        lines.append(f"Current date: {current_date}")
    channels = (
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    if has_tools:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    return HarmonyMessage(
        "system", "\n\n".join(["\n".join(lines), f"Reasoning: {effort}", channels])
    )


def developer_message(
    instructions: str | None,
    tools: Sequence[Mapping[str, Any]] = (),
    response_format: Mapping[str, Any] | None = None,
) -> HarmonyMessage | None:
    """`response_format` is {name, description, schema}. None if there is nothing to say."""
    sections = []
    if instructions:
        sections.append(f"# Instructions\n\n{instructions}")
    if tools:
        sections.append(render_tools(tools))
    if response_format is not None:
        lines = [f"## {response_format['name']}\n"]
        if response_format.get("description"):
            lines.append(f"// {response_format['description']}")
        lines.append(
            json.dumps(response_format["schema"], ensure_ascii=False, separators=(",", ":"))
        )
        sections.append("# Response Formats\n\n" + "\n".join(lines))
    return HarmonyMessage("developer", "\n\n".join(sections)) if sections else None


def tool_call(name: str, arguments: str) -> HarmonyMessage:
    return HarmonyMessage(
        "assistant",
        arguments,
        "commentary",
        f"functions.{name}",
        content_type="json",
        ends_with_call=True,
    )


def tool_result(name: str, text: str) -> HarmonyMessage:
    return HarmonyMessage(f"functions.{name} to=assistant", text, "commentary")


def assistant_text(
    channel: Literal["analysis", "commentary", "final"], text: str
) -> HarmonyMessage:
    return HarmonyMessage("assistant", text, channel)
