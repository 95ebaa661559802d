"""Chat messages as Harmony messages: the assistant's turns in the form in which the model wrote them.

A turn is what the assistant writes between two user messages. It may arrive in several messages; which of its words are
a preamble and which the final answer follows from the whole turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptoss.harmony.layout import messages_before
from gptoss.harmony.render import HarmonyMessage, assistant_text, developer_message, tool_call, tool_result

Message = Mapping[str, Any]


class PromptError(ValueError):
    """Messages that cannot be rendered. `param` names the field, as in `messages[2].tool_call_id`."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


@dataclass(slots=True)
class _Piece:
    kind: Literal["user", "developer", "analysis", "words", "call", "result"]
    text: str
    name: str | None = None  # of the user, or of the function
    phase: str | None = None  # of words: "commentary" or "final_answer"
    number: int = -1  # of the call, counted over the conversation; a result has its call's
    is_json: bool = True  # of calls


def render_history(messages: Sequence[Message], first: int = 0) -> Iterator[HarmonyMessage]:
    """The messages from index `first` on. Analysis before the last final answer is left out.

    Raises:
        PromptError: names the message that cannot be rendered.
    """
    pieces = _calls_before_results(_results_at_their_calls(_Reader().read(messages, first)))
    _order_results(pieces)
    _set_phases(pieces)
    finals = (i for i, p in enumerate(pieces) if p.phase == "final_answer")
    last_final = max(finals, default=-1)
    for index, piece in enumerate(pieces):
        if piece.kind != "analysis" or index > last_final:
            rendered = _render(piece)
            if rendered is not None:
                yield rendered


class _Reader:
    """Messages to pieces. Keeps the calls made so far, which results refer to."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # by id of the call
        self._names: list[str] = []  # by number of the call
        self._answered: dict[int, int] = {}  # by number of the call: the message with its result
        # of the calls since anyone else wrote: their places
        self._open_ids: dict[str, tuple[int, int]] = {}

    def read(self, messages: Sequence[Message], first: int) -> list[_Piece]:
        pieces: list[_Piece] = []
        for index in range(first, len(messages)):
            message = messages[index]
            if message["role"] == "assistant":
                pieces += self._assistant(message, index)
            else:
                self._open_ids.clear()
                pieces.append(self._other(message, index))
        return pieces

    def _other(self, message: Message, index: int) -> _Piece:
        role, text = message["role"], message_text(message)
        if role == "user":
            return _Piece("user", text, name=message.get("name"))
        if role in ("system", "developer"):
            return _Piece("developer", text)
        if role == "tool":
            call_id = message.get("tool_call_id")
            if call_id not in self._numbers:
                raise PromptError(
                    f"no earlier assistant message made a tool call with id {call_id!r}",
                    f"messages[{index}].tool_call_id",
                )
            number = self._numbers[call_id]
            if number in self._answered:
                earlier = f"messages[{self._answered[number]}]"
                raise PromptError(
                    f"'{earlier}' and 'messages[{index}]' are results of one call, of id {call_id!r}",
                    f"messages[{index}].tool_call_id",
                )
            self._answered[number] = index
            return _Piece("result", text, name=self._names[number], number=number)
        if role == "function":
            name = message.get("name")
            if name not in self._names:
                raise PromptError(f"no earlier assistant message called {name!r}", f"messages[{index}].name")
            number = len(self._names) - 1 - self._names[::-1].index(name)
            return _Piece("result", text, name=name, number=number)
        raise PromptError(f"unknown role {role!r}", f"messages[{index}].role")

    def _assistant(self, message: Message, index: int) -> Iterator[_Piece]:
        """Reasoning, then words, then calls, unless the first call's id tells of another order."""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ()
        calls = message.get("tool_calls") or ()
        legacy = message.get("function_call")
        text, phase = message_text(message), message.get("phase")
        known = None
        if calls and isinstance(reasoning, str | tuple) and phase is None:
            known = messages_before(calls[0]["id"], str(reasoning or ""), text)
        if known is not None:
            for channel, part in known:
                is_analysis = channel == "analysis"
                yield _Piece("analysis", part) if is_analysis else _words(part, "commentary")
        else:
            for thought in [reasoning] if isinstance(reasoning, str) else reasoning:
                yield _Piece("analysis", thought)
            if text or (phase and message.get("content") is not None):
                yield _words(text, phase or ("commentary" if calls or legacy else None))
        for number, call in enumerate(calls):
            yield self._call(call, (index, number))
        if legacy:
            yield self._numbered(legacy["name"], legacy.get("arguments") or "")

    def _call(self, call: Mapping[str, Any], place: tuple[int, int]) -> _Piece:
        call_id = call["id"]
        if call_id in self._open_ids:
            raise PromptError(
                f"'{_field(self._open_ids[call_id])}' and '{_field(place)}' have the same id {call_id!r}",
                f"{_field(place)}.id",
            )
        self._open_ids[call_id] = place
        self._numbers[call_id] = len(self._names)
        if call.get("type") == "custom":
            custom = call["custom"]
            return self._numbered(custom["name"], custom.get("input") or "", is_json=False)
        function = call["function"]
        return self._numbered(function["name"], function.get("arguments") or "")

    def _numbered(self, name: str, text: str, *, is_json: bool = True) -> _Piece:
        name = clean_name(name)
        self._names.append(name)
        return _Piece("call", text, name=name, number=len(self._names) - 1, is_json=is_json)


def _field(place: tuple[int, int]) -> str:
    return "messages[{}].tool_calls[{}]".format(*place)


def _words(text: str, phase: str | None) -> _Piece:
    return _Piece("words", text, phase=phase)


def _results_at_their_calls(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Moves a result that came after the calls of a later step to those of its own."""
    step, is_open = -1, False
    step_of: dict[int, int] = {}  # by number of the call
    last_call: dict[int, int] = {}  # by step: its place
    late: dict[int, list[_Piece]] = {}  # by place of the call that they go behind
    kept: list[tuple[int, _Piece]] = []
    for index, piece in enumerate(pieces):
        if piece.kind == "call":
            step, is_open = (step, True) if is_open else (step + 1, True)
            step_of[piece.number], last_call[step] = step, index
        elif piece.kind not in ("analysis", "words"):
            is_open = False
        if piece.kind == "result" and step_of.get(piece.number, step) != step:
            late.setdefault(last_call[step_of[piece.number]], []).append(piece)
        else:
            kept.append((index, piece))
    return [one for index, piece in kept for one in (piece, *late.get(index, ()))]


def _calls_before_results(pieces: Sequence[_Piece]) -> list[_Piece]:
    """Moves what stands between calls and their results before the calls: the model ends its message with a call."""
    ordered: list[_Piece] = []
    for piece in pieces:
        if piece.kind == "result":
            after = _run_end(ordered, len(ordered), ("analysis", "words"))
            calls = _run_end(ordered, after, ("call",))
            ordered[calls:] = ordered[after:] + ordered[calls:after]
        ordered.append(piece)
    return ordered


def _run_end(pieces: Sequence[_Piece], end: int, kinds: tuple[str, ...]) -> int:
    """Where the run of these kinds that ends at `end` begins."""
    while end and pieces[end - 1].kind in kinds:
        end -= 1
    return end


def _order_results(pieces: list[_Piece]) -> None:
    """Puts the results between two calls in the order of their calls: Harmony has no ids to tell them apart."""
    places: list[int] = []
    for index in range(len(pieces) + 1):
        if index == len(pieces) or pieces[index].kind == "call":
            results = sorted((pieces[i] for i in places), key=lambda piece: piece.number)
            for place, result in zip(places, results, strict=True):
                pieces[place] = result
            places = []
        elif pieces[index].kind == "result":
            places.append(index)


def _set_phases(pieces: Sequence[_Piece]) -> None:
    """Words that a call or a result of the same turn follows are commentary, others are the final answer."""
    turn_goes_on = False
    for piece in reversed(pieces):
        if piece.kind in ("call", "result"):
            turn_goes_on = True
        elif piece.kind == "user":
            turn_goes_on = False
        elif piece.kind == "words" and piece.phase is None:
            piece.phase = "commentary" if turn_goes_on else "final_answer"


def _render(piece: _Piece) -> HarmonyMessage | None:
    text = piece.text
    match piece.kind:
        case "user":
            return HarmonyMessage(f"user:{piece.name}" if piece.name else "user", text)
        case "developer":
            return developer_message(text)
        case "analysis":
            return assistant_text("analysis", text)
        case "words":
            return assistant_text("commentary" if piece.phase == "commentary" else "final", text)
        case "call":
            return tool_call(piece.name or "", text, is_json=piece.is_json)
        case "result":
            return tool_result(piece.name or "", text)


def clean_name(name: str) -> str:
    """Clients replay names that a broken server leaked markers into: `f<|channel|>analysis` is `f`."""
    return name.split("<|", 1)[0].strip().removeprefix("functions.")


def message_text(message: Message) -> str:
    """A string, or the parts of an array joined in order."""
    content = message.get("content")
    if content is None:
        return str(message.get("refusal") or "") if message["role"] == "assistant" else ""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or part.get("refusal") or "") for part in content)
