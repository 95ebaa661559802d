"""Limits of a key: they count work, the tokens a request may use are reserved, those it used are charged."""

from __future__ import annotations

from typing import Any

import pytest

from gptoss.api.access.api_keys import Caller
from gptoss.api.access.rate_limits import Allowance, RateLimits, Work
from gptoss.api.http.errors import RateLimited


def caller(requests: int = 0, tokens: int = 0, concurrent: int = 0) -> Caller:
    return Caller("a", b"", requests, tokens, concurrent)


def work(choices: int = 1, prompt: int = 10, answer: int = 10, *, named: bool = True) -> Work:
    return Work(choices, prompt, answer, named)


def refused(limits: RateLimits, who: Caller, wanted: Work | None = None) -> RateLimited:
    with pytest.raises(RateLimited) as raised:
        limits.admit(limits.enter(who, generates=True), wanted or work())
    return raised.value


def admitted(limits: RateLimits, who: Caller, **wanted: Any) -> Allowance:
    allowance = limits.enter(who, generates=True)
    limits.admit(allowance, work(**wanted))
    return allowance


def remaining(limits: RateLimits, who: Caller, kind: str) -> int:
    return int(limits.headers(who)[f"x-ratelimit-remaining-{kind}"])


def test_choices_and_prompts_count_as_requests() -> None:
    limits, who = RateLimits(), caller(requests=10)
    admitted(limits, who, choices=7)
    assert remaining(limits, who, "requests") == 3
    error = refused(limits, who, work(choices=4))
    assert "counts as 4" in error.message and error.code == "rate_limit_exceeded"
    admitted(limits, who, choices=2)
    assert remaining(limits, who, "requests") == 0


def test_choices_count_as_requests_that_run() -> None:
    limits, who = RateLimits(), caller(concurrent=4)
    first = admitted(limits, who, choices=2)
    allowance = limits.enter(who, generates=True)
    with pytest.raises(RateLimited, match="5 choices of this key run at once; the limit is 4"):
        limits.admit(allowance, work(choices=3))
    limits.admit(allowance, work(choices=2))
    with pytest.raises(RateLimited, match="are running already"):
        limits.enter(who, generates=False)
    limits.leave(first)
    limits.leave(allowance)
    assert admitted(limits, who, choices=4).num_concurrent == 4


def test_what_may_be_taken_is_reserved_until_it_is_charged() -> None:
    limits, who = RateLimits(), caller(tokens=100)
    first = admitted(limits, who, prompt=20, answer=40)
    assert refused(limits, who, work(prompt=20, answer=21)).code == "rate_limit_exceeded"
    second = admitted(limits, who, prompt=20, answer=20)
    with pytest.raises(RateLimited, match="Limit of 100 tokens per minute reached"):
        limits.enter(who, generates=True)
    limits.settle(first, 25)
    limits.leave(first)
    assert remaining(limits, who, "tokens") == 75
    limits.leave(second)  # it failed: nothing was taken
    assert admitted(limits, who, prompt=25, answer=50).num_reserved == 75


def test_a_refused_request_reserves_nothing() -> None:
    limits, who = RateLimits(), caller(requests=3, tokens=100)
    allowance = limits.enter(who, generates=True)
    with pytest.raises(RateLimited):
        limits.admit(allowance, work(choices=9))
    limits.leave(allowance)
    assert admitted(limits, who, prompt=50, answer=50).num_reserved == 100


def test_what_can_never_fit_is_refused() -> None:
    error = refused(RateLimits(), caller(tokens=100), work(prompt=50, answer=51))
    assert error.message.startswith("This request may use 101 tokens; the limit of this key is 100")


def test_without_max_tokens_what_is_left_is_reserved_at_most() -> None:
    limits, who = RateLimits(), caller(tokens=100)
    first = admitted(limits, who, prompt=20, answer=4096, named=False)
    assert first.num_reserved == 100
    with pytest.raises(RateLimited):
        limits.enter(who, generates=True)
    limits.settle(first, 30)
    limits.leave(first)
    assert admitted(limits, who, prompt=20, answer=4096, named=False).num_reserved == 70


def test_counting_tokens_needs_none_but_is_a_request() -> None:
    limits, who = RateLimits(), caller(requests=2, tokens=100)
    first = admitted(limits, who, prompt=50, answer=50)
    limits.leave(limits.enter(who, generates=False))
    with pytest.raises(RateLimited, match="2 requests per minute"):
        limits.enter(who, generates=False)
    limits.leave(first)


def test_keys_do_not_share_limits() -> None:
    limits = RateLimits()
    a, b = caller(1, 20, 1), Caller("b", b"", 1, 20, 1)
    admitted(limits, a)
    assert (remaining(limits, b, "requests"), remaining(limits, b, "tokens")) == (1, 20)
    assert admitted(limits, b).num_concurrent == 1
    refused(limits, a)
    refused(limits, b)


def test_tool_calls_have_a_limit_of_their_own() -> None:
    limits = RateLimits()
    one, other = (Caller(name, b"", 1, 0, 0, tool_calls_per_minute=2) for name in "ab")
    assert [limits.take_tool_call(one) for _ in range(2)] == [None, None]
    assert limits.take_tool_call(one) == "Not run: the limit of 2 tool calls per minute is reached."
    assert limits.take_tool_call(other) is None and limits.take_tool_call(caller()) is None
    limits.leave(limits.enter(one, generates=False))  # they are no requests
