"""A conversation as Harmony messages: the assistant's turns in the form in which the model wrote them.

A turn is what the assistant writes between two user messages. Whether a text of the assistant is a preamble or the
final answer follows from the whole turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gptoss.harmony.conversation import (
    AssistantMessage,
    DeveloperMessage,
    Message,
    PromptError,
    ToolCall,
    ToolResult,
    UserMessage,
)
from gptoss.harmony.render import (
    HarmonyMessage,
    assistant_text,
    builtin_call,
    builtin_result,
    developer_message,
    tool_call,
    tool_result,
)


@dataclass(slots=True)
class _Piece:
    message: Message
    call: int = -1  # number of the call, counted over the conversation; a result has its call's
    is_builtin: bool = False  # the call or the result of a built-in tool


def render_history(messages: Sequence[Message]) -> Iterator[HarmonyMessage]:
    """The messages without those of the system. Analysis before the last final answer is left out.

    Raises:
        PromptError: names the call or the result that cannot be rendered.
    """
    calls = _Calls()
    pieces = [calls.piece(message) for message in messages if not _is_empty(message)]
    pieces = _calls_before_results(_results_at_their_calls(pieces))
    _order_results(pieces)
    _set_channels(pieces)
    finals = (i for i, piece in enumerate(pieces) if _channel(piece) == "final")
    last_final = max(finals, default=-1)
    for index, piece in enumerate(pieces):
        if index > last_final or _channel(piece) != "analysis":
            rendered = _render(piece, calls.names)
            if rendered is not None:
                yield rendered


def _is_empty(message: Message) -> bool:
    return isinstance(message, AssistantMessage) and not message.text and message.channel is None


def _channel(piece: _Piece) -> str | None:
    if piece.is_builtin:
        return "analysis"
    return piece.message.channel if isinstance(piece.message, AssistantMessage) else None


class _Calls:
    """Numbers the calls of a conversation, and finds the call that a result belongs to."""

    def __init__(self) -> None:
        self.names: list[str] = []  # by number of the call
        self._builtin: set[int] = set()  # numbers of calls
        self._numbers: dict[str, int] = {}  # by id of the call
        self._answered: dict[int, ToolResult] = {}  # by number of the call
        self._open: dict[str, ToolCall] = {}  # by id: calls since the last message that the assistant did not write

    def piece(self, message: Message) -> _Piece:
        """A message with the number of its call. Raises PromptError."""
        number = self.number(message)
        return _Piece(message, number, number in self._builtin)

    def number(self, message: Message) -> int:
        """The number of a call, or of a result's call; -1 for other messages."""
        if isinstance(message, ToolCall):
            return self._add(message)
        if isinstance(message, AssistantMessage):
            return -1
        self._open.clear()
        if not isinstance(message, ToolResult):
            return -1
        return self._called_by_name(message) if message.call_id is None else self._called(message, message.call_id)

    def _add(self, call: ToolCall) -> int:
        number = len(self.names)
        if call.id is not None:
            if call.id in self._open:
                raise PromptError(
                    f"'{self._open[call.id].origin}' and '{call.origin}' have the same id {call.id!r}",
                    call.origin,
                    "id",
                )
            self._open[call.id] = call
            self._numbers[call.id] = number
        self.names.append(clean_name(call.name))
        if call.is_builtin:
            self._builtin.add(number)
        return number

    def _called(self, result: ToolResult, call_id: str) -> int:
        number = self._numbers.get(call_id)
        if number is None:
            raise PromptError(
                f"no earlier assistant message made a tool call with id {call_id!r}", result.origin, "call_id"
            )
        if number in self._answered:
            raise PromptError(
                f"'{self._answered[number].origin}' and '{result.origin}' are results of one call, of id {call_id!r}",
                result.origin,
                "call_id",
            )
        self._answered[number] = result
        return number

    def _called_by_name(self, result: ToolResult) -> int:
        """The number of the last call of a function, for results without the id of a call."""
        if result.name not in self.names:
            raise PromptError(f"no earlier assistant message called {result.name!r}", result.origin, "name")
        return len(self.names) - 1 - self.names[::-1].index(result.name)


def _results_at_their_calls(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Moves a result that came after the calls of a later step to the calls of its own step."""
    step, is_open = -1, False
    step_of: dict[int, int] = {}  # by number of the call
    last_call: dict[int, int] = {}  # by step: its index
    late: dict[int, list[_Piece]] = {}  # by index of the call that they follow
    kept: list[tuple[int, _Piece]] = []
    for index, piece in enumerate(pieces):
        if isinstance(piece.message, ToolCall):
            step, is_open = (step, True) if is_open else (step + 1, True)
            step_of[piece.call], last_call[step] = step, index
        elif not isinstance(piece.message, AssistantMessage):
            is_open = False
        if isinstance(piece.message, ToolResult) and step_of.get(piece.call, step) != step:
            late.setdefault(last_call[step_of[piece.call]], []).append(piece)
        else:
            kept.append((index, piece))
    return [one for index, piece in kept for one in (piece, *late.get(index, ()))]


def _calls_before_results(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Moves texts between calls and their results before the calls.

    The model ends its message with a call.
    """
    ordered: list[_Piece] = []
    for piece in pieces:
        if isinstance(piece.message, ToolResult):
            after = _start_of_run(ordered, len(ordered), AssistantMessage)
            calls = _start_of_run(ordered, after, ToolCall)
            ordered[calls:] = ordered[after:] + ordered[calls:after]
        ordered.append(piece)
    return ordered


def _start_of_run(pieces: Sequence[_Piece], end: int, kind: type[Message]) -> int:
    """Where the run of messages of this kind that ends at `end` begins."""
    while end and isinstance(pieces[end - 1].message, kind):
        end -= 1
    return end


def _order_results(pieces: list[_Piece]) -> None:
    """Sorts the results between two calls in the order of their calls.

    Harmony has no ids to match them by.
    """
    indices: list[int] = []
    for index in range(len(pieces) + 1):
        if index == len(pieces) or isinstance(pieces[index].message, ToolCall):
            results = sorted((pieces[i] for i in indices), key=lambda piece: piece.call)
            for i, result in zip(indices, results, strict=True):
                pieces[i] = result
            indices = []
        elif isinstance(pieces[index].message, ToolResult):
            indices.append(index)


def _set_channels(pieces: Sequence[_Piece]) -> None:
    """Text that a call or a result of the same turn follows is commentary, other text is the final answer."""
    turn_continues = False
    for piece in reversed(pieces):
        message = piece.message
        if isinstance(message, ToolCall | ToolResult):
            turn_continues = True
        elif isinstance(message, UserMessage):
            turn_continues = False
        elif isinstance(message, AssistantMessage) and message.channel is None:
            piece.message = replace(message, channel="commentary" if turn_continues else "final")


def _render(piece: _Piece, names: Sequence[str]) -> HarmonyMessage | None:
    message = piece.message
    match message:
        case UserMessage():
            return HarmonyMessage(f"user:{message.name}" if message.name else "user", message.text)
        case DeveloperMessage():
            return developer_message(message.text)
        case AssistantMessage():
            return assistant_text(message.channel or "final", message.text)
        case ToolCall() if piece.is_builtin:
            return builtin_call(names[piece.call], message.arguments)
        case ToolResult() if piece.is_builtin:
            return builtin_result(names[piece.call], message.text)
        case ToolCall():
            return tool_call(names[piece.call], message.arguments, is_json=message.is_json)
        case ToolResult():
            return tool_result(names[piece.call], message.text)


def clean_name(name: str) -> str:
    """The name without markers that a broken server leaked into it: `f` of `f<|channel|>analysis`."""
    return name.split("<|", 1)[0].strip().removeprefix("functions.")
