"""Limits of a key: they count work, what a request may take is reserved, and what it took is charged."""

from __future__ import annotations

from typing import Any

import pytest

from gptoss.api.access.api_keys import Caller
from gptoss.api.access.usage import Allowance, Usage, Work
from gptoss.api.http.errors import RateLimited


def caller(requests: int = 0, tokens: int = 0, concurrent: int = 0) -> Caller:
    return Caller("a", b"", requests, tokens, concurrent)


def work(choices: int = 1, prompt: int = 10, answer: int = 10, *, named: bool = True) -> Work:
    return Work(choices, prompt, answer, named)


def refused(usage: Usage, who: Caller, wanted: Work | None = None) -> RateLimited:
    with pytest.raises(RateLimited) as raised:
        usage.admit(usage.enter(who, generates=True), wanted or work())
    return raised.value


def admitted(usage: Usage, who: Caller, **wanted: Any) -> Allowance:
    allowance = usage.enter(who, generates=True)
    usage.admit(allowance, work(**wanted))
    return allowance


def remaining(usage: Usage, who: Caller, kind: str) -> int:
    return int(usage.headers(who)[f"x-ratelimit-remaining-{kind}"])


def test_choices_and_prompts_count_as_requests() -> None:
    usage, who = Usage(), caller(requests=10)
    admitted(usage, who, choices=7)
    assert remaining(usage, who, "requests") == 3
    error = refused(usage, who, work(choices=4))
    assert "counts as 4" in error.message and error.code == "rate_limit_exceeded"
    admitted(usage, who, choices=2)
    assert remaining(usage, who, "requests") == 0


def test_choices_count_as_requests_that_run() -> None:
    usage, who = Usage(), caller(concurrent=4)
    first = admitted(usage, who, choices=2)
    door = usage.enter(who, generates=True)
    with pytest.raises(RateLimited, match="5 choices of this key run at once; the limit is 4"):
        usage.admit(door, work(choices=3))
    usage.admit(door, work(choices=2))
    with pytest.raises(RateLimited, match="are running already"):
        usage.enter(who, generates=False)
    usage.leave(first)
    usage.leave(door)
    assert admitted(usage, who, choices=4).num_concurrent == 4


def test_what_may_be_taken_is_reserved_until_it_is_charged() -> None:
    usage, who = Usage(), caller(tokens=100)
    first = admitted(usage, who, prompt=20, answer=40)
    assert refused(usage, who, work(prompt=20, answer=21)).code == "rate_limit_exceeded"
    second = admitted(usage, who, prompt=20, answer=20)
    with pytest.raises(RateLimited, match="Limit of 100 tokens per minute reached"):
        usage.enter(who, generates=True)
    usage.settle(first, 25)
    usage.leave(first)
    assert remaining(usage, who, "tokens") == 75
    usage.leave(second)  # it failed: nothing was taken
    assert admitted(usage, who, prompt=25, answer=50).num_reserved == 75


def test_a_refused_request_reserves_nothing() -> None:
    usage, who = Usage(), caller(requests=3, tokens=100)
    allowance = usage.enter(who, generates=True)
    with pytest.raises(RateLimited):
        usage.admit(allowance, work(choices=9))
    usage.leave(allowance)
    assert admitted(usage, who, prompt=50, answer=50).num_reserved == 100


def test_what_can_never_fit_is_told() -> None:
    error = refused(Usage(), caller(tokens=100), work(prompt=50, answer=51))
    assert error.message.startswith("This request may take 101 tokens; the limit of this key is 100")


def test_without_max_tokens_what_is_left_is_reserved_at_most() -> None:
    usage, who = Usage(), caller(tokens=100)
    first = admitted(usage, who, prompt=20, answer=4096, named=False)
    assert first.num_reserved == 100
    with pytest.raises(RateLimited):
        usage.enter(who, generates=True)
    usage.settle(first, 30)
    usage.leave(first)
    assert admitted(usage, who, prompt=20, answer=4096, named=False).num_reserved == 70


def test_counting_tokens_needs_none_but_is_a_request() -> None:
    usage, who = Usage(), caller(requests=2, tokens=100)
    first = admitted(usage, who, prompt=50, answer=50)
    usage.leave(usage.enter(who, generates=False))
    with pytest.raises(RateLimited, match="2 requests per minute"):
        usage.enter(who, generates=False)
    usage.leave(first)


def test_keys_do_not_share_limits() -> None:
    usage = Usage()
    a, b = caller(1, 20, 1), Caller("b", b"", 1, 20, 1)
    admitted(usage, a)
    assert (remaining(usage, b, "requests"), remaining(usage, b, "tokens")) == (1, 20)
    assert admitted(usage, b).num_concurrent == 1
    refused(usage, a)
    refused(usage, b)
