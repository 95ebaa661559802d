"""Drafts: guesses that save steps and change nothing."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from gptoss.config.errors import ConfigError
from gptoss.engine.core.core import EngineCore
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.grammar_matcher import GuidedDecoding
from gptoss.engine.core.request import Request
from gptoss.engine.messages import AddRequest
from gptoss.engine.sampling_params import SamplingParams
from gptoss.harmony.special_tokens import SPECIAL_TOKENS, SPLIT_PATTERN, STOP_TOKEN_IDS
from gptoss.kernels.cpu import native
from tests.support.fake_runner import STOP, FakeRunner, make_request, make_scheduler
from tests.support.helpers import checkpoint, engine_config
from tests.support.tokenizer import public_tokenizer
from tests.support.vocabulary import public_vocabulary

needs_native = pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")


class Oracle(Drafter):
    """Knows the answers, and errs in one token of three."""

    def __init__(self, answers: dict[str, list[int]], prompts: dict[str, int]) -> None:
        super().__init__(None, 3)
        self.answers, self.prompts = answers, prompts
        self.rng = random.Random(0)

    def propose(self, request: Request, count: int) -> list[int]:
        done = request.num_tokens - self.prompts[request.request_id]
        right = self.answers[request.request_id][done : done + min(3, count)]
        return [t if self.rng.random() < 0.67 else (t + 1) % 1000 for t in right]


def make_core(**changes: Any) -> EngineCore:
    vocabulary = public_vocabulary()
    return EngineCore(
        engine_config(
            checkpoint(),
            dtype="bfloat16",
            ranks_path=vocabulary.ranks_path,
            special_tokens=SPECIAL_TOKENS,
            split_pattern=SPLIT_PATTERN,
            eos_token_ids=STOP_TOKEN_IDS,
            **changes,
        )
    )


OPTIONS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.4, "repetition_penalty": 1.2},
    {"temperature": 1.0, "grammar": "start: /[ a-z]+/"},
]


def answers_of(core: EngineCore, size: int = 40) -> tuple[dict[str, list[int]], int]:
    """-> (the tokens by request, how many steps they took). The last two run together."""
    tokens: dict[str, list[int]] = {}
    steps = 0
    for numbers in ((0,), (1,), (2, 3)):
        for number in numbers:
            params = SamplingParams(max_tokens=size, seed=number, ignore_eos=True, **OPTIONS[number])
            prompt = [1 + (7 * number + i) % 90 for i in range(20 + number)]
            assert core.add_request(AddRequest(f"r{number}", prompt, params)) is None
        while core.has_work:
            for output in core.step():
                assert output.error is None
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
            steps += 1
    core.kv.check_integrity()
    return tokens, steps


@needs_native
def test_answers_are_the_same_with_drafts_right_and_wrong() -> None:
    plain, plain_steps = answers_of(make_core(num_speculative_tokens=0))
    assert all(len(tokens) == 40 for tokens in plain.values())
    core = make_core(num_speculative_tokens=3)
    prompts = {f"r{n}": 20 + n for n in range(len(OPTIONS))}
    core.scheduler._drafter = Oracle(plain, prompts)
    # the guesses that break its grammar are for GuidedDecoding to cut
    oracle = core.scheduler._drafter
    propose, guided = oracle.propose, core.guided
    assert guided is not None
    oracle.propose = lambda r, n: guided.allowed(r.request_id, propose(r, n))  # type: ignore[method-assign]
    drafted, steps = answers_of(core)
    assert drafted == plain
    stats = core.current_stats()
    assert 0 < stats.num_accepted_total < stats.num_draft_total
    assert steps < 0.7 * plain_steps


@needs_native
def test_what_a_grammar_forces_is_drafted_and_right() -> None:
    core = make_core()
    grammar = f'start: <[{SPECIAL_TOKENS["<|channel|>"]}]> "one and only text" /[0-9]/'
    params = SamplingParams(max_tokens=20, seed=0, ignore_eos=True, grammar=grammar)
    core.add_request(AddRequest("r", [5, 6, 7], params))
    tokens: list[int] = []
    steps = 0
    while core.has_work:
        for output in core.step():
            tokens += output.token_ids
        steps += 1
        if len(tokens) >= 6:
            core.abort(["r"])
    vocabulary = public_vocabulary()
    assert vocabulary.decode(tokens).startswith("<|channel|>one and only text")
    assert core.current_stats().num_accepted_total >= 3
    assert steps < len(tokens)


def test_engines_that_cannot_check_drafts_say_so() -> None:
    config = engine_config(checkpoint(), dtype="float32", num_speculative_tokens=2)
    with pytest.raises(ConfigError, match=r"num_speculative_tokens \(2\) .* torch kernels on 1"):
        EngineCore(config)
    core = EngineCore(engine_config(checkpoint(), dtype="float32"))
    assert core.scheduler._drafter is None
    with pytest.raises(ConfigError, match="must be a count"):
        engine_config(checkpoint(), num_speculative_tokens=-2)


def request_of(tokens: list[int], salt: str = "", name: str = "a") -> Request:
    params = SamplingParams(max_tokens=50, seed=0, stop_token_ids=(STOP,))
    return Request(name, tokens, params, cache_salt=salt)


def test_what_followed_the_same_three_tokens_is_proposed() -> None:
    drafter = Drafter(None, 3)
    request = request_of([1, 2, 3, 4, 5, 6, 7, 1, 2, 3])
    assert drafter.propose(request, 5) == [4, 5, 6]
    assert drafter.propose(request, 2) == [4, 5]
    request.token_ids += [8, 1, 2, 3]
    assert drafter.propose(request, 3) == [8, 1, 2], "the latest place counts"
    request.token_ids += [40, 41]
    assert drafter.propose(request, 3) == []


def test_a_guess_ends_before_a_stop_token() -> None:
    request = request_of([1, 2, 3, 4, STOP, 6, 1, 2, 3])
    assert Drafter(None, 3).propose(request, 3) == [4]


def test_answers_are_remembered_for_requests_with_the_same_salt() -> None:
    drafter = Drafter(None, 3)
    first = request_of([1, 2, 3], salt="x")
    first.token_ids += [4, 5, 6, 7]
    drafter.finish(first)
    assert drafter.propose(request_of([9, 1, 2, 3], "x", "b"), 3) == [4, 5, 6]
    assert drafter.propose(request_of([9, 4, 5, 6], "x", "c"), 3) == [7]
    assert drafter.propose(request_of([9, 1, 2, 3], "y", "d"), 3) == []


def test_only_answers_are_remembered_not_prompts() -> None:
    drafter = Drafter(None, 3)
    drafter.finish(request_of([1, 2, 3, 4, 5]))
    assert drafter.propose(request_of([1, 2, 3], name="b"), 3) == []


class Eager(Drafter):
    """Proposes as much as it may."""

    def propose(self, request: Request, count: int) -> list[int]:
        return [100 + request.num_tokens % 50] * min(count, self.max_tokens)


def test_the_scheduler_keeps_its_books_with_drafts() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        scheduler = make_scheduler(num_blocks=30, drafter=Eager(None, 3), max_model_len=200)
        runner = FakeRunner(scheduler, rng, stop_chance=0.03)
        for number in range(8):
            scheduler.add_request(make_request(f"r{number}", rng.randint(1, 150), rng.randint(1, 60)))
        runner.run()
        assert runner.ended == {f"r{n}": 1 for n in range(8)}
        assert scheduler.num_drafts > scheduler.num_accepted > 0
        assert scheduler._kv.usage == 0


def test_drafts_never_go_beyond_an_answers_length() -> None:
    for most in range(1, 8):
        scheduler = make_scheduler(drafter=Eager(None, 3))
        request = make_request("a", 10, most)
        scheduler.add_request(request)
        runner = FakeRunner(scheduler)
        runner.run()
        assert len(runner.outputs["a"]) == most


def test_no_drafts_for_logprobs_nor_in_a_crowd() -> None:
    scheduler = make_scheduler(drafter=Eager(None, 3))
    scheduler.add_request(make_request("a", 10, 9, params={"logprobs": 0}))
    FakeRunner(scheduler).run()
    assert scheduler.num_drafts == 0
    for count in range(1, 6):
        scheduler = make_scheduler(drafter=Eager(None, 3), max_num_seqs=8)
        for number in range(count):
            scheduler.add_request(make_request(f"r{number}", 10, 9))
        out = FakeRunner(scheduler).step()
        drafts = sum(map(len, out.draft_tokens.values()))
        assert len(out.num_scheduled_tokens) == count
        assert drafts == max(0, min(3, 4 - count))


def test_masks_behind_drafts_are_what_they_would_be_there() -> None:

    vocabulary = public_vocabulary()
    tokenizer = public_tokenizer()
    text = vocabulary.encode("red or green")
    guided, plain = GuidedDecoding(tokenizer), GuidedDecoding(tokenizer)
    for one in (guided, plain):
        one.add("r", 'start: ("red or green" | "red or blue") " things"')
    ids, masks = guided.bitmask(["r"], {"r": text})
    assert ids == ["r"] * (1 + len(text))
    size = len(masks) // len(ids)
    for place, token in enumerate(text):
        _, expected = plain.bitmask(["r"])
        assert masks[place * size : (place + 1) * size] == expected
        plain.advance("r", token)
    assert masks[-size:] == plain.bitmask(["r"])[1]
    assert guided.bitmask(["r"])[1] == masks[:size], "looking ahead leaves the grammar where it was"
    assert guided.allowed("r", [*text, *vocabulary.encode(" stones")]) == text
    wrong = [text[0], 5, *text[1:]]
    ids, padded = guided.bitmask(["r"], {"r": wrong})
    assert len(ids) == 1 + len(wrong) and len(padded) == len(ids) * size
    assert padded[: 2 * size] == masks[: 2 * size]
    assert guided.forced("r") == vocabulary.encode("red or")


def propose_and_observe(drafter: Drafter, request: Request, num_accepted: int) -> int:
    """One step of a request; returns the number of drafts."""
    drafts = drafter.propose(request, 3)
    if drafts:
        drafter.observe(request.request_id, len(drafts), min(num_accepted, len(drafts)))
    return len(drafts)


def test_drafts_that_are_wrong_stop_and_are_tried_again_ever_more_rarely() -> None:
    drafter, request = Drafter(None, 3), make_request("a", [1, 2, 3, 4, 5, 6, 1, 2, 3], max_tokens=100)
    steps = [propose_and_observe(drafter, request, 0) for _ in range(300)]
    assert steps[0] == 3
    assert steps[1:9] == [0] * 8 and steps[9] == 1
    assert sum(steps) <= 3 + 6  # trials after pauses of 8, 16, 32, 64, 128 and 128 steps


def test_drafts_that_are_right_again_come_back_in_full() -> None:
    drafter, request = Drafter(None, 3), make_request("a", [1, 2, 3, 4, 5, 6, 1, 2, 3], max_tokens=100)
    assert propose_and_observe(drafter, request, 0) == 3
    rest = [propose_and_observe(drafter, request, 3) for _ in range(12)]
    assert rest == [0] * 8 + [1, 3, 3, 3]


def test_drafts_that_are_mostly_right_never_stop() -> None:
    drafter, request = Drafter(None, 3), make_request("a", [1, 2, 3, 4, 5, 6, 1, 2, 3], max_tokens=100)
    assert [propose_and_observe(drafter, request, 2) for _ in range(200)] == [3] * 200


class TwoForced:
    """A grammar that forces two tokens, until it is told not to."""

    forcing = True

    def forced(self, request_id: str) -> list[int]:
        return [1, 2] if self.forcing else []

    def allowed(self, request_id: str, drafts: list[int]) -> list[int]:
        return drafts


def test_forced_tokens_do_not_count() -> None:
    guided = TwoForced()
    drafter = Drafter(guided, 3)  # type: ignore[arg-type]
    request = make_request("a", [1, 2, 3, 1, 2, 70, 71, 1, 2, 3], max_tokens=100)
    steps = [propose_and_observe(drafter, request, 2) for _ in range(9)]
    assert steps == [3, 3] + [2] * 7  # the third token was remembered, and wrong
    guided.forcing = False
    assert propose_and_observe(drafter, request, 0) == 0  # the pause goes on: right forced tokens have not ended it


@pytest.mark.timeout(60)
def test_forced_text_without_a_break_is_split_in_parts() -> None:
    """As one part it takes 45 s."""
    guided = GuidedDecoding(public_tokenizer())
    guided.add("endless", 'start: "x" start')
    started = time.monotonic()
    assert len(guided.forced("endless")) > 20_000
    assert time.monotonic() - started < 10
