"""Proposes draft tokens: what a grammar forces, and what followed the same tokens before.

Prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding) searches the request's own text;
answers of earlier requests are searched too (after SuffixDecoding, Oliaro et al. 2024, arXiv 2411.04975).
A wrong draft costs a little arithmetic; drafts never change what is sampled.
"""

from __future__ import annotations

from gptoss.engine.core.grammar_matcher import GuidedDecoding
from gptoss.engine.core.request import Request
from gptoss.lru_cache import LruCache

MATCHED_TOKENS = 3
LOOKBACK = 8192  # last tokens of a prompt that are indexed
MAX_ANSWER_ENTRIES = 50_000
Key = tuple[int, ...]


class Drafter:
    """Proposes drafts from the live requests, and from earlier answers with the same cache salt."""

    def __init__(self, guided: GuidedDecoding | None, max_tokens: int) -> None:
        """`max_tokens`: of one draft."""
        self._guided = guided
        self.max_tokens = max_tokens
        self._live: dict[str, _Index] = {}
        self._answers: LruCache[tuple[str, Key], tuple[int, ...]] = LruCache(MAX_ANSWER_ENTRIES)

    def propose(self, request: Request, count: int) -> list[int]:
        """Returns up to `count` tokens that may follow, none of which ends the request or breaks its grammar."""
        count = min(count, self.max_tokens)
        guided, request_id = self._guided, request.request_id
        drafts = guided.forced(request_id)[:count] if guided is not None else []
        if len(drafts) < count:
            drafts += self._remembered(request, drafts, count - len(drafts))
        stops = request.params.stop_token_ids
        end = next((n for n, token in enumerate(drafts) if token in stops), len(drafts))
        return drafts[:end] if guided is None else guided.allowed(request_id, drafts[:end])

    def _remembered(self, request: Request, drafts: list[int], count: int) -> list[int]:
        """What followed the last tokens, including `drafts`, at an earlier occurrence."""
        tokens = request.token_ids
        index = self._live.get(request.request_id)
        if index is None:
            index = self._live[request.request_id] = _Index(request.num_tokens)
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
