"""One choice of a raw completion: engine outputs in, text with its logprobs out. No I/O."""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from gptoss.engine.messages import FinishReason, TokenLogprobs, TokenOutput
from gptoss.generation.plan import Plan
from gptoss.generation.session import Accounting, Engine, Generation, start
from gptoss.generation.stop_strings import StopStrings
from gptoss.harmony.deltas import Kind
from gptoss.harmony.special_tokens import STOP_TOKEN_IDS
from gptoss.harmony.vocabulary_files import Vocabulary


class TextLogprob(NamedTuple):
    """The logprob of one token of the prompt or the answer; the prompt's first token has none."""

    token: str
    logprob: float | None
    alternatives: dict[str, float] | None
    offset: int  # where its text begins, in characters


@dataclass(frozen=True, slots=True)
class TextDelta:
    text: str
    logprobs: list[TextLogprob]

    @property
    def visible_kind(self) -> Kind | None:
        return "content" if self.text else None


def _decoder() -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8")("replace")


@dataclass(eq=False)
class TextChoice:
    """Folds engine outputs into plain text; special tokens give none."""

    index: int
    vocabulary: Vocabulary
    prompt_ids: list[int]
    stops: StopStrings
    echoes: bool = False  # the text begins with the prompt's
    is_silent: bool = False  # what is generated is not wanted
    finish_reason: str | None = None
    error: str | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    recoveries: Counter[str] = field(default_factory=Counter)
    # of the prompt's tokens but the first
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _num_chars: int = 0  # of the text of all tokens, also of what a stop string holds back
    _decoder: codecs.IncrementalDecoder = field(default_factory=_decoder)

    @cached_property
    def echo(self) -> str:
        return self.vocabulary.decode(self.prompt_ids) if self.echoes else ""

    @property
    def is_scored(self) -> bool:
        """Whether all logprobs of the prompt are there."""
        return len(self.prompt_logprobs) == len(self.prompt_ids) - 1

    def echo_logprobs(self) -> list[TextLogprob]:
        """The logprobs of the prompt's tokens."""
        out, decoder, num_chars = [], _decoder(), 0
        for token_id, logprobs in zip(self.prompt_ids, [None, *self.prompt_logprobs], strict=True):
            out.append(self._logprob(token_id, logprobs, num_chars))
            num_chars += len(decoder.decode(self.vocabulary.bytes_of(token_id)))
        return out

    def feed(self, output: TokenOutput) -> list[TextDelta]:
        """The text and logprobs of one output, or nothing. After `finish_reason` is set, the rest is dropped."""
        text, logprobs = "", []
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.prompt_logprobs += output.prompt_logprobs or ()
        for index, token_id in enumerate(() if self.is_silent else output.token_ids):
            self.num_tokens += 1
            self.token_ids.append(token_id)
            if output.logprobs is not None:
                offset = len(self.echo) + self._num_chars
                logprobs.append(self._logprob(token_id, output.logprobs[index], offset))
            if token_id in STOP_TOKEN_IDS or token_id >= self.vocabulary.num_ordinary:
                continue
            decoded = self._decoder.decode(self.vocabulary.bytes_of(token_id))
            self._num_chars += len(decoded)
            text += self.stops.feed(decoded)
            if self.stops.stopped:
                self.finish_reason = "stop"
                break
        if self.finish_reason is None and output.finish_reason is not None:
            text += self.stops.feed(self._decoder.decode(b"", final=True))
            text += self.stops.flush()
            self._finish(output.finish_reason, output.error)
        return [TextDelta(text, logprobs)] if text or logprobs else []

    def _finish(self, reason: FinishReason, error: str | None) -> None:
        if reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.finish_reason, self.error = "error", error or "the request was cancelled"
        else:
            self.finish_reason = "length" if self.is_silent else str(reason)

    def _logprob(self, token_id: int, logprobs: TokenLogprobs | None, offset: int) -> TextLogprob:
        name = self._name(token_id)
        if logprobs is None:
            return TextLogprob(name, None, None, offset)
        alternatives = {self._name(t): min(p, 0.0) for t, p in logprobs.alternatives}
        return TextLogprob(name, min(logprobs.logprob, 0.0), alternatives, offset)

    def _name(self, token_id: int) -> str:
        data = self.vocabulary.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def text_choices(plan: Plan, vocabulary: Vocabulary) -> Sequence[TextChoice]:
    """One for each request of a plan of raw prompts."""
    return [
        TextChoice(
            index, vocabulary, request.token_ids, StopStrings(plan.stop), echoes=plan.echo, is_silent=plan.is_silent
        )
        for index, request in enumerate(plan.requests)
    ]


async def start_text(
    plan: Plan, vocabulary: Vocabulary, engine: Engine, accounting: Accounting
) -> Generation[TextChoice, TextDelta]:
    """See session.start."""
    return await start(plan, text_choices(plan, vocabulary), engine, accounting)
