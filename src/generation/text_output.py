"""One choice of a raw completion: engine outputs in, text with its logprobs out. No I/O."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from gptoss.engine.messages import FinishReason, TokenLogprobs, TokenOutput
from gptoss.generation.stop_strings import StopStrings
from gptoss.harmony.special_tokens import STOP_TOKEN_IDS
from gptoss.harmony.vocabulary_files import Vocabulary

# OpenAI's `logprobs` of completions: lists with an entry for each token
Numbers = dict[str, list[Any]]


def no_numbers() -> Numbers:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def joined(first: Numbers, second: Numbers) -> Numbers:
    return {name: first[name] + second[name] for name in first}


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
    text: str = ""
    num_chars: int = 0  # of the text of all tokens, also of what a stop string holds back
    numbers: Numbers = field(default_factory=no_numbers)
    # of the prompt's tokens but the first
    scores: list[TokenLogprobs] = field(default_factory=list)
    _decoder: codecs.IncrementalDecoder = field(default_factory=_decoder)

    @cached_property
    def echo(self) -> str:
        return self.vocabulary.decode(self.prompt_ids) if self.echoes else ""

    @property
    def is_scored(self) -> bool:
        """Whether all logprobs of the prompt are there."""
        return len(self.scores) == len(self.prompt_ids) - 1

    def echo_numbers(self) -> Numbers:
        """Of the prompt's tokens; the first has no logprob, as nothing stands before it."""
        numbers, decoder, num_chars = no_numbers(), _decoder(), 0
        for token_id, score in zip(self.prompt_ids, [None, *self.scores], strict=True):
            self._add_numbers(token_id, score, num_chars, numbers)
            num_chars += len(decoder.decode(self.vocabulary.bytes_of(token_id)))
        return numbers

    def feed(self, output: TokenOutput) -> tuple[str, Numbers]:
        """-> (new text, logprobs of the new tokens)."""
        new, numbers = "", no_numbers()
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.scores += output.prompt_logprobs or ()
        for place, token_id in enumerate(() if self.is_silent else output.token_ids):
            self.num_tokens += 1
            if output.logprobs is not None:
                offset = len(self.echo) + self.num_chars
                self._add_numbers(token_id, output.logprobs[place], offset, numbers)
            if token_id in STOP_TOKEN_IDS or token_id >= self.vocabulary.num_ordinary:
                continue
            decoded = self._decoder.decode(self.vocabulary.bytes_of(token_id))
            self.num_chars += len(decoded)
            new += self.stops.feed(decoded)
            if self.stops.stopped:
                self.finish_reason = "stop"
                break
        if self.finish_reason is None and output.finish_reason is not None:
            new += self.stops.feed(self._decoder.decode(b"", final=True))
            new += self.stops.flush()
            self._finish(output.finish_reason, output.error)
        self.text += new
        for name, entries in numbers.items():
            self.numbers[name] += entries
        return new, numbers

    def _finish(self, reason: FinishReason, error: str | None) -> None:
        if reason in (FinishReason.ERROR, FinishReason.ABORT):
            self.finish_reason, self.error = "error", error or "the request was cancelled"
        else:
            self.finish_reason = "length" if self.is_silent else str(reason)

    def _add_numbers(self, token_id: int, score: TokenLogprobs | None, offset: int, out: Numbers) -> None:
        out["tokens"].append(self._name(token_id))
        out["token_logprobs"].append(None if score is None else min(score.logprob, 0.0))
        out["top_logprobs"].append(
            None if score is None else {self._name(t): min(p, 0.0) for t, p in score.alternatives}
        )
        out["text_offset"].append(offset)

    def _name(self, token_id: int) -> str:
        data = self.vocabulary.bytes_of(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
