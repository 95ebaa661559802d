"""The deltas of an answer's rounds as those of one: calls of the server's tools become ToolEvents."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from gptoss.generation.chat_output import ChatChoice, ChatDelta
from gptoss.generation.hosted import HostedCall, HostedTool, ToolEvent, ToolState
from gptoss.generation.plan import Plan
from gptoss.generation.session import Usage
from gptoss.generation.tool_types import AnswerFilter, Citation
from gptoss.harmony.deltas import Delta

AnswerDelta = ChatDelta | ToolEvent


class AnswerChoice(Protocol):
    """What a renderer reads of a choice."""

    @property
    def index(self) -> int: ...

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def error(self) -> str | None: ...

    @property
    def num_calls(self) -> int:
        """Calls that the client answers."""

    @property
    def stop_string(self) -> str | None: ...

    @property
    def custom_calls(self) -> set[int]: ...

    @property
    def messages(self) -> list[tuple[str, int]]: ...


class Answer(Protocol):
    """What a renderer reads: a Generation, or a ToolLoop."""

    @property
    def plan(self) -> Plan: ...

    @property
    def choices(self) -> Sequence[AnswerChoice]: ...

    @property
    def usage(self) -> Usage: ...

    def events(self) -> AsyncGenerator[Sequence[tuple[AnswerChoice, Sequence[AnswerDelta]]], None]: ...

    def close(self) -> None: ...


class LoopChoice:
    """The one choice of an answer in several rounds."""

    index = 0

    def __init__(self) -> None:
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.num_calls = 0
        self.custom_calls: set[int] = set()
        self.rounds: list[ChatChoice] = []

    def fail(self, error: str) -> None:
        self.finish_reason, self.error = "error", error

    @property
    def num_tokens(self) -> int:
        return sum(one.num_tokens for one in self.rounds)

    @property
    def token_ids(self) -> list[int]:
        return [token for one in self.rounds for token in one.token_ids]

    @property
    def recoveries(self) -> Counter[str]:
        return sum((one.recoveries for one in self.rounds), Counter())

    @property
    def stop_string(self) -> str | None:
        return self.rounds[-1].stop_string if self.rounds else None

    @property
    def messages(self) -> list[tuple[str, int]]:
        return [message for one in self.rounds for message in one.messages]


class RoundReader:
    """Reads the deltas of one round after the other."""

    def __init__(
        self, choice: LoopChoice, tools: Mapping[str, HostedTool], new_filters: Callable[[], list[AnswerFilter]]
    ) -> None:
        """`new_filters`: for each text of the final answer, see ToolSession.answer_filter."""
        self._choice, self._tools, self._new_filters = choice, tools, new_filters
        self.calls: list[HostedCall] = []  # of the server's tools, in this round
        self.num_calls = 0  # of the server's tools, in all rounds
        self.num_client_calls = 0  # in this round
        self._filters: list[AnswerFilter] = []  # of the text that is open
        self._open: HostedCall | None = None

    def begin_round(self) -> None:
        self.calls, self.num_client_calls = [], 0

    def read(self, inner: ChatChoice, deltas: Sequence[ChatDelta]) -> list[AnswerDelta]:
        """The deltas as those of the whole answer."""
        return [event for item in deltas for event in self._read(inner, item)]

    def end_round(self, *, is_whole: bool) -> list[AnswerDelta]:
        """Ends what is open. `is_whole`: the round was not cut off."""
        return [*self._end_text(), *self._end_call("whole" if is_whole else "cut")]

    def new_call(self, name: str) -> HostedCall:
        """A call of the server's tool of this name."""
        call = HostedCall(self.num_calls, name, self._tools[name])
        self.num_calls += 1
        self.calls.append(call)
        return call

    def _read(self, inner: ChatChoice, item: ChatDelta) -> list[AnswerDelta]:
        delta = item.delta
        if delta.kind == "tool_call":
            return self._read_call(inner, item)
        events: list[AnswerDelta] = []
        if delta.channel is not None or self._open is not None:
            events += [*self._end_text(), *self._end_call("whole")]
        if delta.channel == "final":
            self._filters = self._new_filters()
        if delta.kind == "content" and self._filters and delta.channel is None:
            return events + self._filtered(item)
        return [*events, item]

    def _read_call(self, inner: ChatChoice, item: ChatDelta) -> list[AnswerDelta]:
        delta, events = item.delta, list[AnswerDelta]()
        if delta.tool_name is not None:
            events += [*self._end_text(), *self._end_call("whole")]
            if delta.tool_name in self._tools:
                self._open = self.new_call(delta.tool_name)
                events.append(ToolEvent(self._open, "begun"))
            else:
                self._begin_client_call(inner, delta)
        if self._open is None:
            return [*events, replace(item, delta=replace(delta, tool_index=self._choice.num_calls - 1))]
        self._open.text += delta.text
        return [*events, ToolEvent(self._open, "text", delta.text)] if delta.text else events

    def _begin_client_call(self, inner: ChatChoice, delta: Delta) -> None:
        choice = self._choice
        if delta.tool_index in inner.custom_calls:
            choice.custom_calls.add(choice.num_calls)
        choice.num_calls += 1
        self.num_client_calls += 1

    def _end_call(self, state: ToolState) -> list[AnswerDelta]:
        call, self._open = self._open, None
        return [] if call is None else [ToolEvent(call, state)]

    def _filtered(self, item: ChatDelta) -> list[AnswerDelta]:
        text, citations = item.delta.text, list[Citation]()
        for one in self._filters:
            text, found = one.feed(text)
            citations += found
        if not text and not item.logprobs and not citations:
            return []
        return [replace(item, delta=replace(item.delta, text=text), citations=tuple(citations))]

    def _end_text(self) -> list[AnswerDelta]:
        filters, self._filters = self._filters, []
        text, citations = "", list[Citation]()
        for index, one in enumerate(filters):
            held, found = one.flush()
            citations += found
            for later in filters[index + 1 :]:
                held, found = later.feed(held)
                citations += found
            text += held
        return [ChatDelta(Delta("content", text), None, tuple(citations))] if text or citations else []
