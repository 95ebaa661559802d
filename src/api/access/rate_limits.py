"""Rate limits per key: requests and tokens per minute, and concurrent requests.

A request counts once for each choice of each prompt. The tokens it may use are reserved when it is admitted; the tokens
it has used are charged when it ends.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter, RateLimiter, SlidingWindowCounterRateLimiter

from gptoss.api.access.api_keys import Caller
from gptoss.api.http.errors import RateLimited


@dataclass(slots=True, eq=False)
class Allowance:
    """The part of its caller's limits that an HTTP request holds until its response has ended."""

    caller: Caller
    num_concurrent: int = 1
    num_reserved: int = 0  # tokens


@dataclass(frozen=True, slots=True)
class Work:
    """The size of a request, known once its body has been read."""

    num_choices: int  # of all prompts
    num_prompt_tokens: int  # of all prompts
    max_tokens: int  # of all choices
    has_max_tokens: bool  # whether the client set it


class RateLimits:
    """The limits and current usage of all keys."""

    def __init__(self) -> None:
        storage = MemoryStorage()
        self._requests = MovingWindowRateLimiter(storage)
        # a counter: a moving window keeps an entry for each token
        self._tokens = SlidingWindowCounterRateLimiter(storage)
        self._concurrent: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()  # tokens

    def enter(self, caller: Caller, *, generates: bool) -> Allowance:
        """Takes one request from the caller's limits. `generates`: whether it uses tokens.

        Raises RateLimited, with Retry-After and x-ratelimit headers.
        """
        self._check_concurrent(caller, 1)
        if generates:
            self._check_tokens_left(caller)
        self._hit_requests(caller, 1)
        self._concurrent[caller.name] += 1
        return Allowance(caller)

    def admit(self, allowance: Allowance, work: Work) -> None:
        """Takes what a request needs beyond `enter`. Raises RateLimited, with nothing reserved.

        If the client sets no maximum of tokens, at most the remaining ones are reserved.
        """
        caller, more = allowance.caller, work.num_choices - 1
        self._check_concurrent(caller, more)
        reserved = self._reservation(caller, work)
        if more:
            self._hit_requests(caller, more, work.num_choices)
        allowance.num_concurrent += more
        self._concurrent[caller.name] += more
        allowance.num_reserved += reserved
        self._reserved[caller.name] += reserved

    def take_tool_call(self, caller: Caller) -> str | None:
        """Takes a call of a tool that the server runs; returns what refuses it, or None."""
        limit = caller.tool_calls_per_minute
        if not limit or self._requests.hit(RateLimitItemPerMinute(limit), caller.name, "tools"):
            return None
        return f"Not run: the limit of {limit} tool calls per minute is reached."

    def settle(self, allowance: Allowance, num_tokens: int) -> None:
        """Charges the tokens a request has used instead of those reserved, at most all that are left."""
        self._release_tokens(allowance)
        caller = allowance.caller
        if not caller.tokens_per_minute or not num_tokens:
            return
        item = RateLimitItemPerMinute(caller.tokens_per_minute)
        if self._tokens.hit(item, caller.name, "tokens", cost=num_tokens):
            return
        left = self._window(self._tokens, caller, "tokens", caller.tokens_per_minute)
        if left is not None and left.remaining > 0:
            self._tokens.hit(item, caller.name, "tokens", cost=left.remaining)

    def leave(self, allowance: Allowance) -> None:
        """Releases what is held, when the response has ended."""
        self._release_tokens(allowance)
        self._concurrent[allowance.caller.name] -= allowance.num_concurrent

    def headers(self, caller: Caller) -> dict[str, str]:
        """OpenAI's x-ratelimit headers for the caller's limits."""
        out = {}
        for limiter, kind, limit in (
            (self._requests, "requests", caller.requests_per_minute),
            (self._tokens, "tokens", caller.tokens_per_minute),
        ):
            window = self._window(limiter, caller, kind, limit)
            if window is not None:
                out[f"x-ratelimit-limit-{kind}"] = str(limit)
                out[f"x-ratelimit-remaining-{kind}"] = str(window.remaining)
                out[f"x-ratelimit-reset-{kind}"] = f"{window.reset_in_s:.0f}s"
        return out

    def _release_tokens(self, allowance: Allowance) -> None:
        self._reserved[allowance.caller.name] -= allowance.num_reserved
        allowance.num_reserved = 0

    def _check_concurrent(self, caller: Caller, more: int) -> None:
        limit, running = caller.max_concurrent_requests, self._concurrent[caller.name]
        if not limit or not more or running + more <= limit:
            return
        problem = f"{limit} requests of this key are running already."
        if running < limit:
            problem = f"This request would make {running + more} choices of this key run at once; the limit is {limit}."
        raise RateLimited(problem, None, "concurrency_exceeded", {"retry-after": "1"})

    def _check_tokens_left(self, caller: Caller) -> None:
        window = self._window(self._tokens, caller, "tokens", caller.tokens_per_minute)
        if window is not None and window.remaining - self._reserved[caller.name] < 1:
            raise self._too_many(caller, f"Limit of {caller.tokens_per_minute} tokens per minute reached.", window)

    def _reservation(self, caller: Caller, work: Work) -> int:
        """Tokens to reserve. Raises RateLimited if too few are left."""
        limit = caller.tokens_per_minute
        window = self._window(self._tokens, caller, "tokens", limit)
        if window is None:
            return 0
        left = window.remaining - self._reserved[caller.name]
        wanted = work.num_prompt_tokens + work.max_tokens
        needed = wanted if work.has_max_tokens else work.num_prompt_tokens + work.num_choices
        if needed > limit:
            raise self._too_many(
                caller,
                f"This request may use {needed} tokens; the limit of this key is {limit} per minute. "
                "Shorten the prompt, or lower 'max_tokens' or 'n'.",
                window,
            )
        if needed > left:
            raise self._too_many(
                caller,
                f"Limit of {limit} tokens per minute reached: {max(0, left)} are left, "
                f"and this request may use {needed}.",
                window,
            )
        return min(wanted, left)

    def _hit_requests(self, caller: Caller, count: int, num_choices: int = 1) -> None:
        limit = caller.requests_per_minute
        if not limit:
            return
        if self._requests.hit(RateLimitItemPerMinute(limit), caller.name, "requests", cost=count):
            return
        window = self._window(self._requests, caller, "requests", limit)
        assert window is not None
        problem = f"Limit of {limit} requests per minute reached."
        if num_choices > 1:
            problem += f" This one counts as {num_choices}, one for each choice of each prompt."
        raise self._too_many(caller, problem, window)

    def _too_many(self, caller: Caller, message: str, window: _Window) -> RateLimited:
        wait = {"retry-after": str(max(1, math.ceil(window.reset_in_s)))}
        return RateLimited(message, None, "rate_limit_exceeded", self.headers(caller) | wait)

    @staticmethod
    def _window(limiter: RateLimiter, caller: Caller, kind: str, limit: int) -> _Window | None:
        if not limit:
            return None
        stats = limiter.get_window_stats(RateLimitItemPerMinute(limit), caller.name, kind)
        return _Window(stats.remaining, max(0.0, stats.reset_time - time.time()))


@dataclass(frozen=True, slots=True)
class _Window:
    remaining: int
    reset_in_s: float
