"""Logprobs of a prompt's own tokens: the model's, each once, whatever else happens in the engine."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from gptoss.engine.client.streams import OutputStream
from gptoss.engine.config import SCORED_ROWS
from gptoss.engine.core.core import EngineCore
from gptoss.engine.messages import AddRequest, FinishReason, TokenLogprobs, TokenOutput
from gptoss.engine.sampling_params import SamplingParams
from gptoss.kernels.cpu import native
from tests.support.helpers import checkpoint, engine_config, load_model, model_logits
from tests.support.tiers import nightly_except

PROMPT = random.Random(4).choices(range(199_998), k=2 * SCORED_ROWS + 23)
ALTERNATIVES = 3
# the native kernels' type; where they run, float32's plain torch is for the nightly run
DTYPES = ["float32"] if native.library() is None else nightly_except("bfloat16", of=("float32", "bfloat16"))


def make_core(**changes: Any) -> EngineCore:
    return EngineCore(engine_config(checkpoint(), **changes))


def request(name: str, prompt: list[int] = PROMPT, **options: Any) -> AddRequest:
    params = {"prompt_logprobs": ALTERNATIVES} | options.pop("params", {})
    return AddRequest(name, prompt, SamplingParams(max_tokens=3, seed=1, ignore_eos=True, **params), **options)


def run(core: EngineCore) -> tuple[dict[str, list[TokenLogprobs]], dict[str, TokenOutput]]:
    """-> (the prompts' logprobs, the last outputs)."""
    found: dict[str, list[TokenLogprobs]] = {}
    last: dict[str, TokenOutput] = {}
    while core.has_work:
        for output in core.step():
            found.setdefault(output.request_id, []).extend(output.prompt_logprobs or ())
            last[output.request_id] = output
    core.kv.check_integrity()
    return found, last


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """float32 [T, V]"""
    return torch.log_softmax(model_logits(load_model(checkpoint()), PROMPT), dim=-1)


def check(scores: list[TokenLogprobs], expected: torch.Tensor) -> None:
    assert len(scores) == len(PROMPT) - 1
    following = expected[:-1].gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1))[:, 0].tolist()
    assert [s.logprob for s in scores] == pytest.approx(following, abs=2e-4)
    best = expected[:-1].topk(ALTERNATIVES).values
    alternatives = [[logprob for _, logprob in s.alternatives] for s in scores]
    assert torch.allclose(torch.tensor(alternatives), best, atol=2e-4)
    for place, score in enumerate(scores):
        ids = torch.tensor([t for t, _ in score.alternatives])
        assert torch.allclose(expected[place][ids], best[place], atol=2e-4)


def test_they_are_the_models_and_need_no_more_room_a_step_than_is_planned(
    expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make_core(max_num_batched_tokens=100)
    model = core.executor.worker.runner._model
    forward, rows = model.forward, []

    def counted(batch: Any, cache: Any, hidden: Any = None) -> torch.Tensor:
        rows.append(len(batch.sample_rows))
        result: torch.Tensor = forward(batch, cache, hidden)
        return result

    monkeypatch.setattr(model, "forward", counted)
    for name in "abc":
        assert core.add_request(request(name)) is None
    core.add_request(request("plain", params={"prompt_logprobs": None}))
    found, last = run(core)
    for name in "abc":
        check(found[name], expected)
        assert last[name].finish_reason is FinishReason.LENGTH
    assert found["plain"] == []
    assert max(rows) <= SCORED_ROWS + 4


def test_others_do_not_wait_for_room_for_logits() -> None:
    core = make_core()
    for name in "abc":
        core.add_request(request(name))
    core.add_request(request("plain", [1, 2, 3], params={"prompt_logprobs": None}))
    assert [output.request_id for output in core.step()] == ["a", "plain"]
    found, last = run(core)
    assert {name: len(scores) for name, scores in found.items() if scores} == {
        "a": len(PROMPT) - 1 - SCORED_ROWS,
        "b": len(PROMPT) - 1,
        "c": len(PROMPT) - 1,
    }
    assert {output.finish_reason for output in last.values()} == {FinishReason.LENGTH}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cached_prompt_is_computed_again_and_bit_for_bit_the_same(dtype: str) -> None:
    core = make_core(dtype=dtype, batch_invariant=True)
    prompt = PROMPT[: SCORED_ROWS + 7]
    core.add_request(request("plain", prompt, params={"prompt_logprobs": None}))
    run(core)
    assert core.kv.get_computed_blocks(_as_request(core, "again", None)).num_tokens > 0
    core.add_request(request("first", prompt))
    first, last = run(core)
    assert last["first"].num_cached_tokens == 0
    for name in ("one", "other"):
        core.add_request(request(name, prompt))
    together, _ = run(core)
    assert together["one"] == together["other"] == first["first"]


def _as_request(core: EngineCore, name: str, prompt_logprobs: int | None) -> Any:
    core.add_request(request(name, params={"prompt_logprobs": prompt_logprobs}))
    made = core.scheduler._requests[name]
    core.abort([name])
    return made


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_after_a_preemption_none_comes_twice(expected: torch.Tensor, steps: int) -> None:
    core = make_core()
    core.add_request(request("a"))
    found: list[TokenLogprobs] = []
    for _ in range(steps):
        for output in core.step():
            found += output.prompt_logprobs or []
    running = core.scheduler._requests["a"]
    core.scheduler._preempt(running)
    rest, last = run(core)
    check(found + rest["a"], expected)
    assert last["a"].finish_reason is FinishReason.LENGTH and running.num_preemptions == 1


def test_the_next_engine_goes_on_where_the_last_one_was(expected: torch.Tensor) -> None:
    told = 70
    core = make_core()
    core.add_request(request("whole"))
    whole, _ = run(core)
    core.add_request(request("rest", num_scored_tokens=told))
    rest, _ = run(core)
    assert whole["whole"][told:] == rest["rest"]


def test_what_was_not_read_yet_is_joined_and_what_is_left_is_known() -> None:
    stream, score = OutputStream(request("a")), TokenLogprobs(-1.0, [])
    stream.put(TokenOutput("a", [], prompt_logprobs=[score] * 64))
    stream.put(TokenOutput("a", [], prompt_logprobs=[score] * 3))
    stream.put(TokenOutput("a", [7], queue_s=0.5, prefill_s=0.25, prompt_logprobs=[score]))
    taken = stream.take()
    assert (taken.token_ids, taken.queue_s, taken.prefill_s) == ([7], 0.5, 0.25)
    assert taken.prompt_logprobs == [score] * 68
    assert (stream.rest().output_ids, stream.rest().num_scored_tokens) == ([7], 68)


def test_a_prompt_of_one_token_has_none() -> None:
    core = make_core()
    core.add_request(request("a", [5]))
    found, last = run(core)
    assert found == {"a": []} and last["a"].finish_reason is FinishReason.LENGTH


def test_numbers_that_are_none_end_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    model = core.executor.worker.runner._model
    forward = model.forward

    def poisoned(batch: Any, cache: Any, hidden: Any = None) -> torch.Tensor:
        logits: torch.Tensor = forward(batch, cache, hidden).clone()
        logits[3] = torch.nan
        return logits

    monkeypatch.setattr(model, "forward", poisoned)
    core.add_request(request("a"))
    _, last = run(core)
    assert last["a"].finish_reason is FinishReason.ERROR
    assert last["a"].error == "the model's logits are not finite"
