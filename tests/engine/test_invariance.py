"""The same request gives the same tokens and logprobs, bit for bit, whatever else happens in the engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from gptoss.engine.core.core import EngineCore
from gptoss.engine.messages import AddRequest, FinishReason
from gptoss.engine.sampling_params import SamplingParams
from gptoss.kernels.cpu import native
from tests.support.helpers import checkpoint, engine_config
from tests.support.tiers import nightly_except

Answer = list[tuple[int, float, tuple[tuple[int, float], ...]]]
PROMPT = random.Random(1).choices(range(199_998), k=300)
# the native kernels' type; where they run, float32's plain torch is for the nightly run
DTYPES = ["float32"] if native.library() is None else nightly_except("bfloat16", of=("float32", "bfloat16"))


def core(dtype: str, **changes: Any) -> EngineCore:
    defaults: dict[str, Any] = {
        "dtype": dtype,
        "batch_invariant": True,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
    }
    return EngineCore(engine_config(checkpoint(), **(defaults | changes)))


def request(name: str, prompt: list[int], seed: int = 3, tokens: int = 24, **params: Any) -> AddRequest:
    options = {"temperature": 0.8, "top_p": 0.95, "logprobs": 5, "ignore_eos": True} | params
    return AddRequest(name, prompt, SamplingParams(max_tokens=tokens, seed=seed, **options))


def run(
    engine: EngineCore, requests: list[AddRequest], between: Callable[[int], None] = lambda _: None
) -> dict[str, Answer]:
    answers: dict[str, Answer] = {}
    for message in requests:
        assert engine.add_request(message) is None
    step = 0
    while engine.scheduler.has_requests():
        for output in engine.step():
            assert output.finish_reason in (None, FinishReason.LENGTH), output.error
            for token, numbers in zip(output.token_ids, output.logprobs or [], strict=True):
                row = (token, numbers.logprob, tuple(map(tuple, numbers.alternatives)))
                answers.setdefault(output.request_id, []).append(row)  # type: ignore[arg-type]
        between(step)
        step += 1
    engine.kv.check_integrity()
    assert engine.kv.usage == 0
    return answers


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def alone(dtype: str) -> Answer:
    answer = run(core(dtype, enable_prefix_caching=False), [request("r", PROMPT)])["r"]
    assert len({token for token, _, _ in answer}) > 10
    return answer


def test_among_31_others(dtype: str, alone: Answer) -> None:
    rng = random.Random(0)
    others = [
        request(f"o{i}", rng.choices(range(199_998), k=rng.randrange(1, 200)), seed=i, tokens=rng.randrange(1, 30))
        for i in range(31 if dtype == "bfloat16" else 5)
    ]
    assert run(core(dtype), [*others[:16], request("r", PROMPT), *others[16:]])["r"] == alone


@pytest.mark.parametrize("chunk", [32, 77, 512])
def test_whole_or_chunked(dtype: str, alone: Answer, chunk: int) -> None:
    assert run(core(dtype, max_num_batched_tokens=chunk), [request("r", PROMPT)])["r"] == alone


@pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")
def test_with_int8_matrices() -> None:
    def answer(others: int = 0, **changes: Any) -> Answer:
        batch = [request(f"o{i}", PROMPT[i : 7 * i + 1], seed=i) for i in range(others)]
        return run(core("bfloat16", enable_prefix_caching=False, **changes), [*batch, request("r", PROMPT)])["r"]

    alone = answer(dense_dtype="int8")
    assert answer(9, dense_dtype="int8") == alone
    assert answer(dense_dtype="int8", max_num_batched_tokens=77) == alone
    assert answer(dense_dtype="int8", num_threads=3) == alone
    assert answer() != alone


def test_prefix_cache_hit_or_miss(dtype: str, alone: Answer) -> None:
    engine = core(dtype)
    assert run(engine, [request("first", PROMPT)])["first"] == alone
    assert run(engine, [request("again", PROMPT)])["again"] == alone
    assert engine.kv.num_hit_tokens == len(PROMPT) - 1
    run(engine, [request("half", PROMPT[:150])])
    assert run(engine, [request("third", PROMPT)])["third"] == alone


def test_after_preemption(dtype: str, alone: Answer) -> None:
    """A cache too small for all: the request is thrown out and computed again."""
    engine = core(dtype, enable_prefix_caching=False)
    seen = 0

    def preempt(step: int) -> None:
        nonlocal seen
        scheduler = engine.scheduler
        victim = next((r for r in scheduler._live.running if r.request_id == "r"), None)
        if step in (3, 9) and victim is not None:
            scheduler._preempt(victim)
            seen += 1

    assert run(engine, [request("r", PROMPT), request("o", PROMPT[:40])], preempt)["r"] == alone
    assert seen == 2


def test_other_seeds_give_other_answers(dtype: str, alone: Answer) -> None:
    assert run(core(dtype), [request("r", PROMPT, seed=4)])["r"] != alone
