"""One choice of a conversation's answer: engine outputs in, deltas with their logprobs out. No I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss.engine.messages import FinishReason, TokenOutput
from gptoss.generation.logprobs import ContentLogprobs
from gptoss.generation.plan import Plan
from gptoss.generation.request import Beginning
from gptoss.generation.session import Accounting, Engine, Generation, Remember, start
from gptoss.generation.stop_strings import StopStrings
from gptoss.generation.tool_types import Citation
from gptoss.harmony.deltas import Delta, Kind
from gptoss.harmony.parser import ResponseParser
from gptoss.harmony.vocabulary_files import Vocabulary


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """A piece of an answer with what belongs to it."""

    delta: Delta
    logprobs: list[dict[str, Any]] | None = None  # of the content tokens that this text completes
    citations: tuple[Citation, ...] = ()  # that this text completes

    @property
    def visible_kind(self) -> Kind | None:
        return self.delta.kind if self.delta.text or self.delta.tool_name is not None else None


class ChatChoice:
    """Folds the outputs of one engine request. `finish_reason` is set with the last delta."""

    def __init__(
        self,
        index: int,
        parser: ResponseParser,
        stops: Sequence[str],
        bytes_of: Callable[[int], bytes] | None,
        *,
        stop_on_calls_after: int | None = None,
        joins_messages: bool = True,
        custom_names: Collection[str] = (),
    ) -> None:
        """`bytes_of` token ids is given when logprobs are wanted.
        `joins_messages`: messages of one kind are one text, with a line break between them.
        `custom_names`: of the tools whose calls are plain text."""
        self.index = index
        self.parser = parser
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_calls = 0
        self.token_ids: list[int] = []
        self.custom_calls: set[int] = set()  # indices of those whose text is plain
        self.messages: list[tuple[str, int]] = []  # channel and length of those before the first call
        self._joins_messages, self._custom_names = joins_messages, custom_names
        self._stops = StopStrings(stops)
        self._logprobs = ContentLogprobs(bytes_of) if bytes_of is not None else None
        self._max_calls = stop_on_calls_after

    @property
    def num_reasoning_tokens(self) -> int:
        return self.parser.num_reasoning_tokens

    @property
    def stop_string(self) -> str | None:
        """The one that ended the answer."""
        return self._stops.found

    @property
    def recoveries(self) -> Counter[str]:
        return self.parser.recoveries

    def feed(self, output: TokenOutput) -> list[ChatDelta]:
        """Deltas of one output. After `finish_reason` is set, the rest of the output is dropped."""
        out: list[ChatDelta] = []
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        for index, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            self.token_ids.append(token_id)
            if self._logprobs is not None and output.logprobs is not None:
                position = self.num_tokens - 1
                self._logprobs.waiting[position] = (token_id, output.logprobs[index])
            for delta in self.parser.push(token_id):
                self._add(delta, out)
                if self.finish_reason is not None:
                    return out
        if output.finish_reason is not None:
            self._finish(output, out)
        return out

    def _finish(self, output: TokenOutput, out: list[ChatDelta]) -> None:
        truncated = output.finish_reason is not FinishReason.STOP
        for delta in self.parser.finish(truncated=truncated):
            self._add(delta, out)
        if self.finish_reason is not None:
            return
        self._flush(out)
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.error = output.error or "the request was cancelled"
            self.finish_reason = "error"
        elif output.finish_reason is FinishReason.LENGTH:
            self.finish_reason = "length"
        else:
            self.finish_reason = "tool_calls" if self.num_calls else "stop"

    def _flush(self, out: list[ChatDelta]) -> None:
        """What was held back, as it could have become a stop string."""
        rest = self._stops.flush()
        if rest:
            out.append(self._content(rest, (), last=True))

    def _add(self, delta: Delta, out: list[ChatDelta]) -> None:
        begins = delta.channel is not None or delta.tool_name is not None
        if begins and not self._joins_messages:
            self._flush(out)
        if delta.is_separator and not self._joins_messages:
            return
        if delta.channel is not None:
            self.messages.append((delta.channel, 0))
            out.append(ChatDelta(delta))
            return
        if delta.kind != "tool_call" and not delta.is_separator and not self.num_calls:
            channel, length = self.messages[-1]
            self.messages[-1] = channel, length + len(delta.text)
        if delta.kind == "tool_call":
            if delta.tool_name is not None:
                self.num_calls += 1
                if delta.tool_name in self._custom_names:
                    self.custom_calls.add(delta.tool_index)
            if self._max_calls is not None and delta.tool_index >= self._max_calls:
                self.num_calls = self._max_calls
                return
            out.append(ChatDelta(delta))
        elif delta.kind == "content":
            if self._logprobs is not None and delta.is_separator:
                self._logprobs.enqueue_separator()
            text = self._stops.feed(delta.text)
            piece = self._content(text, delta.tokens, last=self._stops.stopped)
            if text or piece.logprobs:
                out.append(piece)
            if self._stops.stopped:
                self.finish_reason = "stop"
        else:
            out.append(ChatDelta(delta))

    def _content(self, text: str, tokens: Sequence[int], *, last: bool) -> ChatDelta:
        entries = None
        if self._logprobs is not None:
            self._logprobs.enqueue([t for t in tokens if t in self._logprobs.waiting])
            entries = self._logprobs.take(len(text.encode()), last=last)
        return ChatDelta(Delta("content", text), entries)


async def start_chat(
    plan: Plan,
    vocabulary: Vocabulary,
    engine: Engine,
    accounting: Accounting,
    remember: Remember,
    *,
    joins_messages: bool = True,
) -> Generation[ChatChoice, ChatDelta]:
    """Runs a conversation's plan: see session.start. `joins_messages`: see ChatChoice."""
    choices = [
        make_choice(plan, index, vocabulary, joins_messages=joins_messages) for index in range(len(plan.requests))
    ]
    return await start(plan, choices, engine, accounting, remember)


def make_choice(
    plan: Plan, index: int, vocabulary: Vocabulary, *, joins_messages: bool, begun: Collection[Kind] = ()
) -> ChatChoice:
    """Makes the choice of one engine request. `begun`: kinds of text that the answer has already."""
    return ChatChoice(
        index,
        start_parser(ResponseParser(vocabulary, plan.tool_names, plan.custom_names, begun), plan.begins),
        plan.stop,
        vocabulary.bytes_of if plan.params.logprobs is not None else None,
        stop_on_calls_after=plan.max_calls,
        joins_messages=joins_messages,
        custom_names=plan.custom_names,
    )


def start_parser(parser: ResponseParser, begins: Beginning) -> ResponseParser:
    """The parser, in the state in which the prompt leaves it."""
    if begins == "final":
        parser.open_final()
    elif begins == "turn":
        parser.await_start()
    return parser
