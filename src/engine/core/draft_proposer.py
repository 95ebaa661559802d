"""Proposes draft tokens: what a grammar forces, and what followed the same tokens before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) searches the request's own text;
answers of earlier requests are searched too (after SuffixDecoding, Oliaro et al. 2024, arXiv 2411.04975).
A wrong draft costs a row, which reads other experts' weights; drafts never change what is sampled. A request whose
remembered drafts are mostly wrong gets none for a while (_Acceptance).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from gptoss.engine.core.grammar_matcher import GuidedDecoding
from gptoss.engine.core.request import Request
from gptoss.lru_cache import LruCache

MATCHED_TOKENS = 3
LOOKBACK = 8192  # last tokens of a prompt that are indexed
MAX_ANSWER_ENTRIES = 50_000
# Of 20b's 3.7 GB per token a row's experts are 1.3 GB, and its arithmetic takes time too: a draft that is right in less
# than half of the cases does not pay.
MIN_ACCEPTANCE = 0.5
FIRST_ACCEPTANCE = 0.75  # assumed of a new request
SMOOTHING = 0.2  # weight of the latest draft token
MIN_PAUSE, MAX_PAUSE = 8, 128  # steps without drafts
Key = tuple[int, ...]


class Drafter:
    """Proposes drafts from the live requests, and from earlier answers with the same cache salt."""

    def __init__(self, guided: GuidedDecoding | None, max_tokens: int) -> None:
        """`max_tokens`: of one draft."""
        self._guided = guided
        self.max_tokens = max_tokens
        self._live: dict[str, _Live] = {}
        self._answers: LruCache[tuple[str, Key], tuple[int, ...]] = LruCache(MAX_ANSWER_ENTRIES)

    def propose(self, request: Request, count: int) -> list[int]:
        """Returns up to `count` tokens that may follow, none of which ends the request or breaks its grammar."""
        count = min(count, self.max_tokens)
        guided, request_id = self._guided, request.request_id
        drafts = guided.forced(request_id)[:count] if guided is not None else []
        if len(drafts) < count:
            live = self._live.get(request_id)
            if live is None:
                live = self._live[request_id] = _Live(_Index(request.num_tokens))
            live.num_forced = len(drafts)
            allowed = live.acceptance.num_allowed(count - len(drafts))
            if allowed:
                drafts += self._remembered(request, live.index, drafts, allowed)
        stops = request.params.stop_token_ids
        end = next((n for n, token in enumerate(drafts) if token in stops), len(drafts))
        return drafts[:end] if guided is None else guided.allowed(request_id, drafts[:end])

    def observe(self, request_id: str, num_drafts: int, num_accepted: int) -> None:
        """Learns how many of the drafts last proposed for the request were right."""
        live = self._live.get(request_id)
        if live is not None and num_drafts > live.num_forced:
            live.acceptance.observe(num_drafts - live.num_forced, max(0, num_accepted - live.num_forced))

    def _remembered(self, request: Request, index: _Index, drafts: list[int], count: int) -> list[int]:
        """What followed the last tokens, including `drafts`, at an earlier occurrence."""
        tokens = request.token_ids
        index.update(tokens)
        key = tuple([*tokens[-MATCHED_TOKENS:], *drafts][-MATCHED_TOKENS:])
        position = index.positions.get(key)
        if position is not None:
            return tokens[position : position + count]
        return list((self._answers.get((request.cache_salt, key)) or ())[:count])

    def finish(self, request: Request) -> None:
        """Indexes the answer of a request that has ended."""
        self._live.pop(request.request_id, None)
        tokens = request.token_ids
        for end in range(max(request.num_prompt_tokens, MATCHED_TOKENS), len(tokens)):
            key = (request.cache_salt, tuple(tokens[end - MATCHED_TOKENS : end]))
            self._answers.put(key, tuple(tokens[end : end + self.max_tokens]))


class _Index:
    """The latest position after each run of MATCHED_TOKENS tokens."""

    __slots__ = ("_done", "positions")

    def __init__(self, num_tokens: int) -> None:
        self.positions: dict[Key, int] = {}
        self._done = max(MATCHED_TOKENS, num_tokens - LOOKBACK)

    def update(self, token_ids: list[int]) -> None:
        for end in range(self._done, len(token_ids)):
            self.positions[tuple(token_ids[end - MATCHED_TOKENS : end])] = end
        self._done = max(self._done, len(token_ids))


class _Acceptance:
    """The share of a request's remembered drafts that were right, and what may be proposed for it."""

    __slots__ = ("_pause", "_rate", "_remaining")

    def __init__(self) -> None:
        self._rate = FIRST_ACCEPTANCE
        self._pause = MIN_PAUSE
        self._remaining = 0  # steps of the current pause

    def num_allowed(self, count: int) -> int:
        """How many of `count` tokens may be proposed in this step; one, as a trial, after a pause."""
        if self._rate >= MIN_ACCEPTANCE:
            return count
        if self._remaining > 0:
            self._remaining -= 1
            return 0
        return min(count, 1)

    def observe(self, num_drafts: int, num_accepted: int) -> None:
        for number in range(num_drafts):
            self._rate += SMOOTHING * ((number < num_accepted) - self._rate)
        if num_accepted:
            self._pause = MIN_PAUSE
        elif self._rate < MIN_ACCEPTANCE:
            self._remaining = self._pause
            self._pause = min(2 * self._pause, MAX_PAUSE)


@dataclass(slots=True)
class _Live:
    """What is known of a live request."""

    index: _Index
    acceptance: _Acceptance = field(default_factory=_Acceptance)
    num_forced: int = 0  # leading tokens of the last draft that its grammar forces
