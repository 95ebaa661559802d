"""Proposes draft tokens: what a grammar forces, what followed the same tokens, a draft head's guesses.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) searches the request's own text;
answers of earlier requests are searched too (after SuffixDecoding, Oliaro et al. 2024, arXiv 2411.04975).
A wrong draft costs a row, which reads other experts' weights; drafts never change what is sampled. A request whose
remembered drafts are mostly wrong gets none for a while (_Acceptance), and a draft head guesses for it no further than
its guesses are mostly right.
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
HEAD_SMOOTHING = 0.05  # a draft head guesses at every step, so its average may take longer to move
MIN_PAUSE, MAX_PAUSE = 8, 128  # steps without drafts
Key = tuple[int, ...]


class Drafter:
    """Proposes drafts from the live requests, and from earlier answers with the same cache salt."""

    def __init__(self, guided: GuidedDecoding | None, max_tokens: int, *, has_head: bool = False) -> None:
        """`max_tokens`: of one draft. `has_head`: whether a draft head guesses after each step."""
        self._guided = guided
        self.max_tokens = max_tokens
        self.has_head = has_head
        self.num_head_drafts = 0
        self.num_head_accepted = 0
        self._live: dict[str, _Live] = {}
        self._answers: LruCache[tuple[str, Key], tuple[int, ...]] = LruCache(MAX_ANSWER_ENTRIES)

    def propose(self, request: Request, count: int) -> list[int]:
        """Returns up to `count` tokens that may follow, none of which ends the request or breaks its grammar."""
        count = min(count, self.max_tokens)
        guided, request_id = self._guided, request.request_id
        drafts = guided.forced(request_id)[:count] if guided is not None else []
        live = self._live_of(request)
        live.num_forced = len(drafts)
        if len(drafts) < count:
            allowed = live.acceptance.num_allowed(count - len(drafts))
            remembered = self._remembered(request, live.index, drafts, allowed) if allowed else []
            live.is_guessed = not remembered
            drafts += remembered or self._guessed(request, live, drafts, count)
        stops = request.params.stop_token_ids
        end = next((n for n, token in enumerate(drafts) if token in stops), len(drafts))
        return drafts[:end] if guided is None else guided.allowed(request_id, drafts[:end])

    def observe(self, request_id: str, num_drafts: int, num_accepted: int) -> None:
        """Learns how many of the drafts last proposed for the request were right."""
        live = self._live.get(request_id)
        if live is None or num_drafts <= live.num_forced:
            return
        num_drafts, num_accepted = num_drafts - live.num_forced, max(0, num_accepted - live.num_forced)
        if not live.is_guessed:
            live.acceptance.observe(num_drafts, num_accepted)
            return
        self.num_head_drafts += num_drafts
        self.num_head_accepted += num_accepted
        for number, acceptance in enumerate(live.guesses[:num_drafts]):
            acceptance.observe(1, int(number < num_accepted))

    def head_limit(self, request: Request, count: int, num_drafts: int) -> int:
        """How many tokens, up to `count`, the draft head is to guess after a step with `num_drafts` drafts.

        A guess is worth its row while it and all before it are right in at least MIN_ACCEPTANCE of the cases. 0 while
        remembered drafts are tried.
        """
        if not self.has_head or count <= 0:
            return 0
        live = self._live_of(request)
        if num_drafts > live.num_forced and not live.is_guessed:
            return 0
        if not live.guesses:
            live.guesses = [_Acceptance(HEAD_SMOOTHING) for _ in range(self.max_tokens)]
        limit = 0
        for acceptance in live.guesses[:count]:
            if not acceptance.num_allowed(1):
                break
            limit += 1
        return limit

    def receive(self, request: Request, guesses: list[int]) -> None:
        """Takes the draft head's guesses of the tokens after the request's last one."""
        self._live_of(request).head = (request.num_tokens, guesses)

    def _guessed(self, request: Request, live: _Live, drafts: list[int], count: int) -> list[int]:
        """The draft head's guesses after `drafts`, if it guessed these too."""
        position, guesses = live.head
        if position != request.num_tokens or guesses[: len(drafts)] != drafts:
            return []
        return guesses[len(drafts) : count]

    def _live_of(self, request: Request) -> _Live:
        live = self._live.get(request.request_id)
        if live is None:
            live = self._live[request.request_id] = _Live(_Index(request.num_tokens))
        return live

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
    """The share of a request's drafts that were right, and what may be proposed for it."""

    __slots__ = ("_pause", "_rate", "_remaining", "_smoothing")

    def __init__(self, smoothing: float = SMOOTHING) -> None:
        self._smoothing = smoothing
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
            self._rate += self._smoothing * ((number < num_accepted) - self._rate)
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
    is_guessed: bool = False  # whether the others are of the draft head
    head: tuple[int, list[int]] = (-1, [])  # number of known tokens, and the draft head's guesses after them
    guesses: list[_Acceptance] = field(default_factory=list)  # of the draft head, by distance
