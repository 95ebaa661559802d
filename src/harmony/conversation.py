"""The domain types of a conversation and its tools: every wire format is read into them.

Each message stands for one Harmony message. An assistant's message of a wire format that has reasoning, words and calls
is several of them, in this order unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Channel = Literal["analysis", "commentary", "final"]


@dataclass(frozen=True, slots=True)
class DeveloperMessage:
    """Instructions, of a system message too."""

    text: str


@dataclass(frozen=True, slots=True)
class UserMessage:
    text: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """Text of the assistant. Without a channel the turn decides: commentary if a call follows, else final.

    Without channel and text it is not rendered.
    """

    text: str
    channel: Channel | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call by the assistant.

    `id` is None for a legacy `function_call`, whose result refers to it by name.
    """

    name: str
    arguments: str
    id: str | None = None
    is_json: bool = True  # False for the free text of a custom tool
    is_builtin: bool = False  # of a built-in tool, whose recipient is the name: part of the analysis
    origin: str = ""  # path of the call in the request, for errors


@dataclass(frozen=True, slots=True)
class ToolResult:
    """The result of the call with this id, or of the last call of this function where there is no id."""

    text: str
    call_id: str | None = None
    name: str | None = None
    origin: str = ""  # path of the result in the request, for errors


Message = DeveloperMessage | UserMessage | AssistantMessage | ToolCall | ToolResult


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class FreeText:
    """The input of a custom tool: any text, or what a Lark grammar or a regular expression defines."""

    syntax: Literal["lark", "regex"] | None = None  # None: any text
    definition: str = ""


@dataclass(frozen=True, slots=True)
class ToolDefinition:
    """A tool that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] | None = None
    free_text: FreeText | None = field(default=None, kw_only=True)  # of a custom tool, which has no parameters


@dataclass(frozen=True, slots=True)
class ToolNamespace:
    """A built-in tool as the system message shows it: ToolNamespaceConfig of openai-harmony.

    With functions it is called as `browser.search`, with JSON; without, by its own name, as `python`, with plain text.
    """

    name: str
    description: str | None = None
    functions: tuple[ToolDefinition, ...] = ()

    @property
    def recipients(self) -> tuple[str, ...]:
        """What calls are addressed to."""
        return tuple(f"{self.name}.{one.name}" for one in self.functions) or (self.name,)


@dataclass(frozen=True, slots=True)
class ResponseSchema:
    """A JSON schema of the final message, as the developer message shows it."""

    name: str
    schema: Any
    description: str | None = None


class PromptError(ValueError):
    """A conversation that cannot be rendered: `field` of the call or result at `origin` is wrong."""

    def __init__(self, message: str, origin: str, field: Literal["id", "call_id", "name"]) -> None:
        super().__init__(message)
        self.origin, self.field = origin, field
