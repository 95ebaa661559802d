"""Grammars over generated tokens: compiled once, advanced with each token, turned into bitmasks for the sampler.

The engine runs whatever grammar a request brings; what it means is the caller's business.
"""

from __future__ import annotations

import base64
from collections import OrderedDict, deque
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from src.engine.sampling_params import LoopGuard

MAX_CACHED_GRAMMARS = 10_000


class GrammarError(ValueError):
    """The grammar does not compile, or no longer matches what was generated."""


def load_tokenizer(
    ranks_path: Path,
    special_tokens: dict[str, int],
    split_pattern: str,
    vocab_size: int,
    eos_ids: list[int],
) -> LLTokenizer:
    fields = ranks_path.read_bytes().split()
    ranks = {
        base64.b64decode(token): int(rank)
        for token, rank in zip(fields[::2], fields[1::2], strict=True)
    }
    tokenizer: LLTokenizer = LLTokenizer.from_tiktoken(
        encoder=ranks,
        special_tokens=special_tokens,
        pattern=split_pattern,
        eos_token=eos_ids,
        n_vocab=vocab_size,
        slices=None,
    )
    return tokenizer


class GuidedDecoding:
    """The matchers of the live requests."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._words = -(-tokenizer.vocab_size // 32)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._live: dict[str, LLMatcher] = {}
        self._guards: dict[str, _LoopWatch] = {}

    def add(self, request_id: str, grammar: str, guard: LoopGuard | None = None) -> None:
        """Raises GrammarError if it does not compile."""
        self._live[request_id] = self._compile(grammar).deep_copy()
        if guard is not None:
            self._guards[request_id] = _LoopWatch(guard)

    def remove(self, request_id: str) -> None:
        self._live.pop(request_id, None)
        self._guards.pop(request_id, None)

    def advance(self, request_id: str, token_id: int) -> None:
        """Raises GrammarError if the token was not allowed."""
        matcher = self._live.get(request_id)
        if matcher is None or matcher.is_stopped():
            return
        if not matcher.consume_token(token_id):
            raise GrammarError(matcher.get_error())
        if request_id in self._guards:
            self._guards[request_id].push(token_id)

    def forced(self, request_id: str) -> list[int]:
        """The tokens that the text has to go on with, where the grammar leaves no choice of text."""
        matcher = self._live.get(request_id)
        watch = self._guards.get(request_id)
        if matcher is None or matcher.is_stopped() or (watch is not None and watch.looping):
            return []
        tokens: list[int] = matcher.compute_ff_tokens()
        return tokens

    def allowed(self, request_id: str, token_ids: list[int]) -> list[int]:
        """As many of the first of these tokens as the grammar takes."""
        matcher = self._live.get(request_id)
        if matcher is None or matcher.is_stopped():
            return token_ids
        return token_ids[: matcher.validate_tokens(token_ids)]

    def bitmask(
        self, request_ids: list[str], drafts: Mapping[str, list[int]] = MappingProxyType({})
    ) -> tuple[list[str], bytes]:
        """-> (the ids among these that have a grammar, their masks int32 [rows, words]). One with drafts, which its
        grammar allows, comes once more for each: the mask of what may follow it."""
        ids: list[str] = []
        masks: list[np.ndarray] = []
        for request_id in request_ids:
            matcher = self._live.get(request_id)
            if matcher is None or matcher.is_stopped():
                continue
            watch = self._guards.get(request_id)
            masks.append(self._mask(matcher, watch))
            guesses = drafts.get(request_id, ())
            if guesses:  # on a copy: a matcher that is rolled back allows other tokens than before
                matcher, watch = matcher.deep_copy(), watch.copy() if watch is not None else None
            for number, token_id in enumerate(guesses):
                if not matcher.consume_token(token_id):  # never drawn, so neither is what follows
                    masks += [masks[-1]] * (len(guesses) - number)
                    break
                if watch is not None:
                    watch.push(token_id)
                masks.append(self._mask(matcher, watch))
            ids += [request_id] * (1 + len(guesses))
        return ids, b"".join(mask.tobytes() for mask in masks)

    def _mask(self, matcher: LLMatcher, watch: _LoopWatch | None) -> np.ndarray:
        """int32 [words]."""
        if matcher.is_stopped():  # behind a draft that ended it: nothing is forbidden any more
            return np.full(self._words, -1, np.int32)
        if watch is not None and watch.looping and matcher.validate_tokens([watch.break_id]):
            mask = np.zeros(self._words, np.int32)
            mask.view(np.uint32)[watch.break_id // 32] = 1 << watch.break_id % 32
        else:
            mask = np.empty(self._words, np.int32)
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return mask

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = compile_grammar(self._tokenizer, grammar)
            self._compiled[grammar] = matcher
            if len(self._compiled) > MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return matcher


class _LoopWatch:
    """Sees whether the latest tokens are one short run over and over."""

    def __init__(self, guard: LoopGuard) -> None:
        self._guard = guard
        self.break_id = guard.break_token_id
        self._tokens: deque[int] = deque(maxlen=guard.repeats * guard.max_period)

    def copy(self) -> _LoopWatch:
        other = _LoopWatch(self._guard)
        other._tokens.extend(self._tokens)
        return other

    def push(self, token_id: int) -> None:
        if token_id == self.break_id:
            self._tokens.clear()
        else:
            self._tokens.append(token_id)

    @property
    def looping(self) -> bool:
        tokens = list(self._tokens)
        for period in range(1, len(tokens) // self._guard.repeats + 1):
            span = period * self._guard.repeats
            # equal to itself shifted by one period
            if (
                tokens[-1] == tokens[-1 - period]
                and tokens[-span:-period] == tokens[-span + period :]
            ):
                return True
        return False


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Raises GrammarError with llguidance's reason."""
    matcher = LLMatcher(
        tokenizer,
        LLMatcher.grammar_from_lark(grammar),
        log_level=0,
        limits=LLParserLimits(verbose_errors=False),
    )
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return matcher
