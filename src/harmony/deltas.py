"""The deltas of an answer, and the message that they add up to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["reasoning", "content", "tool_call"]
SEPARATOR = "\n"  # between two messages of one kind; it has no token


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer.

    The first delta of a tool call has its name, that of any other message its channel.
    """

    kind: Kind
    text: str
    tool_index: int = -1
    tool_name: str | None = None
    channel: str | None = None  # of a message that begins here; such a delta has no text
    is_separator: bool = False
    tokens: tuple[int, ...] = ()  # positions in the output of the tokens of this text


@dataclass(slots=True)
class ToolCall:
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedMessage:
    """The sum of all deltas. None: there was no such part; "" is a part without text."""

    reasoning: str | None = None
    content: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        if delta.kind == "reasoning":
            self.reasoning = (self.reasoning or "") + delta.text
        elif delta.kind == "content":
            self.content = (self.content or "") + delta.text
        else:
            if delta.tool_name is not None:
                self.tool_calls.append(ToolCall(delta.tool_name))
            self.tool_calls[delta.tool_index].arguments += delta.text

    @classmethod
    def fold(cls, deltas: Iterable[Delta]) -> ParsedMessage:
        message = cls()
        for delta in deltas:
            message.add(delta)
        return message
