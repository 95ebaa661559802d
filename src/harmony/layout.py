"""Encodes the messages before a tool call in the id of the call.

A chat message has one text of reasoning and one of content. If the model wrote other messages than one of each in this
order, the id of the call specifies how to split the texts when they return: `call_<hex>_A5P0A12` is analysis of five
characters, an empty preamble and analysis of twelve. Lengths are in base 36.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence

from gptoss.harmony.conversation import AssistantMessage, Channel
from gptoss.harmony.deltas import SEPARATOR

_CHANNELS: dict[str, Channel] = {"A": "analysis", "P": "commentary"}
_LETTERS: dict[str, str] = {channel: letter for letter, channel in _CHANNELS.items()}
_ID = re.compile(r"call_[0-9a-f]{24}_((?:[AP][0-9a-z]{1,6})+)")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def new_call_id(before: Sequence[tuple[str, int]] = ()) -> str:
    """A new id.

    `before`: channel and length of the messages between the last call, or the prompt, and this call.
    """
    call_id = f"call_{secrets.token_hex(12)}"
    if _is_usual(before) or any(channel not in _LETTERS for channel, _ in before):
        return call_id
    return f"{call_id}_" + "".join(_LETTERS[channel] + _base36(size) for channel, size in before)


def _is_usual(before: Sequence[tuple[str, int]]) -> bool:
    """Whether a chat message implies this form.

    It is analysis, then a preamble, each at most once and not empty.
    """
    channels = [channel for channel, _ in before]
    ordered = channels in ([], ["analysis"], ["commentary"], ["analysis", "commentary"])
    return ordered and all(size for _, size in before)


def messages_before(call_id: str, reasoning: str, words: str) -> list[AssistantMessage] | None:
    """The messages that the texts were joined from.

    None if the id does not specify them or the texts have changed.
    """
    found = _ID.fullmatch(call_id)
    if found is None:
        return None
    rest: dict[Channel, str] = {"analysis": reasoning, "commentary": words}
    begun: set[Channel] = set()
    messages: list[AssistantMessage] = []
    for letter, size in re.findall(r"([AP])([0-9a-z]+)", found[1]):
        channel, length = _CHANNELS[letter], int(size, 36)
        if length and channel in begun:
            if not rest[channel].startswith(SEPARATOR):
                return None
            rest[channel] = rest[channel].removeprefix(SEPARATOR)
        if length:
            begun.add(channel)
        messages.append(AssistantMessage(rest[channel][:length], channel))
        if len(messages[-1].text) < length:
            return None
        rest[channel] = rest[channel][length:]
    return None if any(rest.values()) else messages


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits or "0"
