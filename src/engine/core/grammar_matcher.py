"""Compiles grammars, advances them with each token and computes masks for the sampler.

The engine runs any grammar without knowing what it is for.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

from gptoss.engine.core.loop_guard import LoopWatch
from gptoss.engine.sampling_params import LoopGuard
from gptoss.lru_cache import LruCache

MAX_COMPILED_BYTES = 256 * 2**20
# size of a compiled grammar; measured: 70 to 220 kB for 500 characters, 0.7 MB for 7,500, 15 MB for 320,000
GRAMMAR_BYTES, GRAMMAR_BYTES_PER_CHAR = 150_000, 60
MASK_THREADS = 8
COMPILE_THREADS = 2
# llguidance's defaults, 2,000 and 50,000, end an object of 500 optional properties in the middle of the answer; these
# allow 2,000 properties, at 50 ms for the mask of a key
MAX_ITEMS_IN_ROW, MAX_ITEMS_OF_MASK = 10_000, 400_000
# Parts of forced text that are split into tokens by themselves. Splitting takes quadratic time in the length of a part:
# 45 s for 200,000 letters without a break, 0.06 s in parts of 256.
BOUNDED_PARTS = r"\p{L}{256}|[^\s\p{L}\p{N}]{256}|\s{256}"
MIN_THREADED_MASKS = 96  # a mask takes about 5 us, waking the threads 100 us


class GrammarError(ValueError):
    """The grammar does not compile, or no longer matches what was generated."""


def load_tokenizer(
    ranks_path: Path, special_tokens: dict[str, int], split_pattern: str, vocab_size: int, eos_ids: list[int]
) -> LLTokenizer:
    fields = ranks_path.read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(fields[::2], fields[1::2], strict=True)}
    tokenizer: LLTokenizer = LLTokenizer.from_tiktoken(
        encoder=ranks,
        special_tokens=special_tokens,
        pattern=f"{BOUNDED_PARTS}|{split_pattern}",
        eos_token=eos_ids,
        n_vocab=vocab_size,
        slices=None,
    )
    return tokenizer


class GuidedDecoding:
    """The matchers of the live requests."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._executor = LLExecutor(min(MASK_THREADS, len(os.sched_getaffinity(0))))
        self._words = -(-tokenizer.vocab_size // 32)
        self._compiled: LruCache[str, LLMatcher] = LruCache(MAX_COMPILED_BYTES, _num_bytes)
        self._compilers = ThreadPoolExecutor(COMPILE_THREADS, "compile-grammar")
        self._compiling: dict[str, Future[LLMatcher]] = {}
        self._live: dict[str, LLMatcher] = {}
        self._guards: dict[str, LoopWatch] = {}

    def is_compiling(self, grammar: str) -> bool:
        """Whether the grammar is still being compiled; the first call starts that. If not, `add` is fast."""
        if grammar in self._compiled:
            return False
        if grammar not in self._compiling:
            self._compiling[grammar] = self._compilers.submit(compile_grammar, self._tokenizer, grammar)
        return not self._compiling[grammar].done()

    def forget_compiling(self, grammar: str) -> None:
        """Drops a compilation whose result is no longer needed."""
        begun = self._compiling.pop(grammar, None)
        if begun is not None:
            begun.cancel()

    def wait_compiled(self, timeout_s: float) -> None:
        """Waits until one of the running compilations is done."""
        wait(self._compiling.values(), timeout_s, FIRST_COMPLETED)

    def add(self, request_id: str, grammar: str, guard: LoopGuard | None = None) -> None:
        """Gives a request its matcher. Raises GrammarError if the grammar does not compile."""
        self._live[request_id] = self._compile(grammar).deep_copy()
        if guard is not None:
            self._guards[request_id] = LoopWatch(guard)

    def remove(self, request_id: str) -> None:
        self._live.pop(request_id, None)
        self._guards.pop(request_id, None)

    def advance(self, request_id: str, token_id: int) -> None:
        """Consumes a generated token. Raises GrammarError if it was not allowed."""
        matcher = self._live.get(request_id)
        if matcher is None or _is_over(matcher):
            return
        if matcher.is_error() or not matcher.consume_token(token_id):
            raise GrammarError(_reason(matcher))
        if request_id in self._guards:
            self._guards[request_id].push(token_id)

    def error_of(self, request_id: str) -> str | None:
        """Why no mask can be computed for the request any more; None if one can."""
        matcher = self._live.get(request_id)
        return _reason(matcher) if matcher is not None and matcher.is_error() else None

    def forced(self, request_id: str) -> list[int]:
        """The next tokens if the grammar leaves no choice of text, else none."""
        matcher = self._live.get(request_id)
        watch = self._guards.get(request_id)
        if matcher is None or matcher.is_stopped() or (watch is not None and watch.looping):
            return []
        tokens: list[int] = matcher.compute_ff_tokens()
        return tokens

    def allowed(self, request_id: str, token_ids: list[int]) -> list[int]:
        """The longest prefix of `token_ids` that the grammar accepts."""
        matcher = self._live.get(request_id)
        if matcher is None or matcher.is_stopped():
            return token_ids
        return token_ids[: matcher.validate_tokens(token_ids)]

    def bitmask(
        self, request_ids: list[str], drafts: Mapping[str, list[int]] = MappingProxyType({})
    ) -> tuple[list[str], memoryview]:
        """Returns (ids of the requests that have a grammar, bytes of their masks int32 [rows, words]).

        A request with drafts, which its grammar allows, has one more row per draft: the mask after it. A mask that
        takes more work than llguidance allows forbids everything, so that the request fails.
        """
        ids: list[str] = []
        for request_id in request_ids:
            matcher = self._live.get(request_id)
            if matcher is not None and not _is_over(matcher):
                ids += [request_id] * (1 + len(drafts.get(request_id, ())))
        masks = np.empty((len(ids), self._words), np.int32)
        together: list[tuple[LLMatcher, int]] = []
        row = 0
        while row < len(ids):
            request_id = ids[row]
            matcher, watch = self._live[request_id], self._guards.get(request_id)
            guesses = drafts.get(request_id, ())
            if guesses:
                self._follow(matcher, watch, guesses, masks[row : row + 1 + len(guesses)])
            elif watch is not None and watch.looping:
                self._fill(matcher, watch, masks[row])
            else:
                together.append((matcher, row))
            row += 1 + len(guesses)
        if len(together) < MIN_THREADED_MASKS:
            for matcher, index in together:
                self._fill(matcher, None, masks[index])
        else:
            self._executor.unsafe_compute_mask_ptr(together, masks.ctypes.data, masks.strides[0], len(masks))
            for matcher, index in together:
                if matcher.is_error():
                    masks[index].fill(0)
        return ids, masks.reshape(-1).view(np.uint8).data

    def _follow(self, matcher: LLMatcher, watch: LoopWatch | None, guesses: Sequence[int], masks: np.ndarray) -> None:
        """Fills masks int32 [1 + len(guesses), words]: of the next token, and after each guess."""
        self._fill(matcher, watch, masks[0])
        # on a copy: after a rollback a matcher allows other tokens than before
        matcher, watch = matcher.deep_copy(), watch.copy() if watch is not None else None
        for number, token_id in enumerate(guesses, start=1):
            if not matcher.consume_token(token_id):  # never sampled, so neither are the guesses after it
                masks[number:] = masks[number - 1]
                return
            if watch is not None:
                watch.push(token_id)
            self._fill(matcher, watch, masks[number])

    def _fill(self, matcher: LLMatcher, watch: LoopWatch | None, mask: np.ndarray) -> None:
        """Fills a mask int32 [words]."""
        if _is_over(matcher):  # after a draft that ended the text nothing is forbidden
            mask.fill(-1)
            return
        matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if matcher.is_error():  # its mask would allow the end of the turn
            mask.fill(0)
            return
        if watch is None or not watch.looping:
            return
        words = mask.view(np.uint32)
        for token_id in watch.break_ids:
            word, bit = token_id // 32, np.uint32(1 << token_id % 32)
            if words[word] & bit:
                words.fill(0)
                words[word] = bit
                return

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = self._compiled.get(grammar)
        if matcher is None:
            begun = self._compiling.pop(grammar, None)
            matcher = compile_grammar(self._tokenizer, grammar) if begun is None else begun.result()
            self._compiled.put(grammar, matcher)
        return matcher


def _num_bytes(grammar: str, _matcher: object = None) -> int:
    """Estimated size of a compiled grammar, at most that of the cache."""
    return min(MAX_COMPILED_BYTES, GRAMMAR_BYTES + GRAMMAR_BYTES_PER_CHAR * len(grammar))


def _is_over(matcher: LLMatcher) -> bool:
    """Whether the text is complete. `is_stopped` is also true for a matcher that has failed."""
    return matcher.is_stopped() and not matcher.is_error()


def _reason(matcher: LLMatcher) -> str:
    """The first line of llguidance's error; the rest shows the grammar."""
    return "".join(matcher.get_error().splitlines()[:1])


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compiles a grammar. Raises GrammarError with llguidance's reason."""
    matcher = _matcher(tokenizer, grammar, precompute=True)
    if matcher.is_error() and "precomputation" in matcher.get_error():
        # many large patterns: compute their states on demand
        matcher = _matcher(tokenizer, grammar, precompute=False)
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return matcher


def _matcher(tokenizer: LLTokenizer, grammar: str, *, precompute: bool) -> LLMatcher:
    return LLMatcher(
        tokenizer,
        LLMatcher.grammar_from_lark(grammar),
        log_level=0,
        limits=LLParserLimits(
            verbose_errors=False,
            max_items_in_row=MAX_ITEMS_IN_ROW,
            step_max_items=MAX_ITEMS_OF_MASK,
            precompute_large_lexemes=precompute,
        ),
    )
