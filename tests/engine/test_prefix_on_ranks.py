"""Prefixes by the token with tensor ranks and pipeline stages: a hit answers as a miss does, bit for bit."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from gptoss.engine.core.core import EngineCore
from gptoss.engine.messages import AddRequest, FinishReason, SchedulerOutput
from gptoss.engine.sampling_params import SamplingParams
from gptoss.kernels.cpu import native
from tests.engine.test_parallel import LAYOUTS, running
from tests.support.helpers import checkpoint
from tests.support.tiers import nightly_except

ONE_RANK = "one rank"
BLOCK, TOKENS = 64, 12
RNG = random.Random(39)
PROMPT, OTHER, LENT = (RNG.choices(range(199_998), k=count) for count in (270, 400, 100))
Answer = list[tuple[int, float, tuple[tuple[int, float], ...]]]


class Engine:
    """Runs requests and keeps what they answered. `salted`: no request shares its prefix with another."""

    def __init__(self, core: EngineCore, *, salted: bool = False) -> None:
        self.core = core
        self.salted = salted
        self.answers: dict[str, Answer] = {}
        self.num_cached: dict[str, int] = {}
        self.num_copies: Counter[str] = Counter()
        submit = core.executor.submit

        def counting(out: SchedulerOutput) -> None:
            for new in out.new_requests[: 1 if out.block_copies else 0]:
                self.num_copies[new.request_id] += len(out.block_copies)
            submit(out)

        core.executor.submit = counting  # type: ignore[method-assign]

    def add(self, name: str, prompt: list[int], tokens: int = TOKENS) -> None:
        params = SamplingParams(max_tokens=tokens, seed=3, temperature=0.8, top_p=0.95, logprobs=3, ignore_eos=True)
        salt = name if self.salted else ""
        assert self.core.add_request(AddRequest(name, prompt, params, cache_salt=salt)) is None
        self.answers[name] = []

    def step(self) -> None:
        for output in self.core.step():
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            if not self.answers[output.request_id]:
                self.num_cached[output.request_id] = output.num_cached_tokens
            for token, numbers in zip(output.token_ids, output.logprobs or [], strict=True):
                row = (token, numbers.logprob, tuple((t, p) for t, p in numbers.alternatives))
                self.answers[output.request_id].append(row)

    def run(self) -> None:
        while self.core.has_work:
            self.step()
        self.core.kv.check_integrity()

    def ask(self, name: str, prompt: list[int]) -> list[int]:
        """Returns the prompt and its answer."""
        self.add(name, prompt)
        self.run()
        return prompt + self.answer(name)

    def answer(self, name: str) -> list[int]:
        return [token for token, _, _ in self.answers[name]]


def converse(engine: Engine) -> None:
    """Turns of a chat, prompts that leave it inside a block, and two that begin as one that still runs."""
    first = engine.ask("first", PROMPT)
    engine.ask("37 tokens", PROMPT[:37] + OTHER[:50])
    engine.ask("4 blocks and 7 tokens", PROMPT[:263] + OTHER[:50])
    engine.ask("another turn", first[:275] + OTHER[:9])
    second = engine.ask("turn 2", first + OTHER[100:121])
    engine.ask("turn 3", second + OTHER[200:213])
    engine.add("running", LENT, tokens=24)
    while len(engine.answers["running"]) < 14:
        engine.step()
    engine.add("with the running one", LENT + engine.answer("running")[:12] + OTHER[:30])
    engine.add("beside it", OTHER[:41] + PROMPT[:30])
    engine.run()


# the last token of an answer is not computed; "beside it" begins as nothing before it
CACHED = {
    "first": 0,
    "37 tokens": 37,
    "4 blocks and 7 tokens": 263,
    "another turn": 275,
    "turn 2": 270 + TOKENS - 1,
    "turn 3": 270 + 2 * TOKENS + 21 - 1,
    "running": 0,
    "with the running one": 112,
    "beside it": 0,
}
# in both groups of layers; what "turn 2" and "turn 3" go on with is theirs: nobody else wants it
COPIES = {"37 tokens": 2, "4 blocks and 7 tokens": 2, "another turn": 2, "with the running one": 2}


def options_of(layout: str, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dtype": "float32" if native.library() is None else "bfloat16",
        "batch_invariant": True,
        "block_size": BLOCK,
        "num_speculative_tokens": 0,
        "cpu_kv_cache_gib": 0.02,
    }
    return options | LAYOUTS.get(layout, {}) | changes


def conversation(core: EngineCore, *, salted: bool = False) -> Engine:
    engine = Engine(core, salted=salted)
    converse(engine)
    return engine


@pytest.mark.parametrize("layout", nightly_except("tensor 2", "pipeline 2", of=(ONE_RANK, *LAYOUTS)))
@pytest.mark.parametrize("chunk", nightly_except(512, of=(512, 77)))
@pytest.mark.parametrize("caching", nightly_except(True, of=(True, False)))
def test_a_hit_answers_as_a_miss(layout: str, chunk: int, caching: bool) -> None:
    """A miss: each request has a salt of its own, or prefix caching is off."""
    options = options_of(layout, max_num_batched_tokens=chunk)
    with running(checkpoint(), **options) as core:
        hit = conversation(core)
        if caching:
            miss = conversation(core, salted=True)
    if not caching:
        with running(checkpoint(), **options, enable_prefix_caching=False) as core:
            miss = conversation(core)
    assert hit.num_cached == CACHED
    assert hit.num_copies == COPIES
    assert set(miss.num_cached.values()) == {0} and not miss.num_copies
    assert len(set(miss.answer("turn 3"))) > 6
    for name, answer in miss.answers.items():
        assert hit.answers[name] == answer, name
