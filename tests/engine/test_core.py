"""The engine core in this process: what one request may do to the others."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from gptoss.engine.core import grammar_matcher as guided_module
from gptoss.engine.core.core import EngineCore
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.messages import AddRequest, FinishReason, TokenOutput
from gptoss.engine.sampling_params import LogitBias, SamplingParams
from gptoss.harmony.special_tokens import SPECIAL_TOKENS, SPLIT_PATTERN, STOP_TOKEN_IDS
from tests.support.helpers import checkpoint, engine_config
from tests.support.vocabulary import public_vocabulary

POISON = 77_777


def make_core(**changes: Any) -> EngineCore:
    return EngineCore(engine_config(checkpoint(), **changes))


def request(name: str, prompt: list[int] | None = None, **options: Any) -> AddRequest:
    params = {"max_tokens": 5, "seed": 1, "ignore_eos": True} | options.pop("params", {})
    return AddRequest(name, prompt or [1, 2, 3], SamplingParams(**params), **options)


def finish(core: EngineCore) -> dict[str, TokenOutput]:
    last: dict[str, TokenOutput] = {}
    while core.has_work:
        for output in core.step():
            if output.finish_reason is not None:
                assert output.request_id not in last
                last[output.request_id] = output
    core.kv.check_integrity()
    assert core.kv.usage == 0
    return last


@pytest.mark.parametrize(
    "error", [RuntimeError("kernel"), MemoryError("no room"), torch.OutOfMemoryError("out of memory")]
)
def test_a_request_that_breaks_the_step_ends_alone(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    core = make_core()
    model = core.executor.worker.runner._model
    forward = model.forward

    def breaking(batch: Any, cache: Any, hidden: Any = None) -> torch.Tensor:
        if POISON in batch.token_ids.tolist():
            raise error
        return forward(batch, cache, hidden)

    monkeypatch.setattr(model, "forward", breaking)
    for name in ("a", "bad", "b"):
        core.add_request(request(name, [5, POISON] if name == "bad" else None))
    ended = finish(core)
    assert ended["bad"].finish_reason is FinishReason.ERROR and str(error) in (ended["bad"].error or "")
    assert ended["a"].finish_reason is ended["b"].finish_reason is FinishReason.LENGTH


def test_a_step_that_fails_for_everybody_is_the_engines_end(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()

    def broken(batch: Any, cache: Any, hidden: Any = None) -> torch.Tensor:
        raise RuntimeError("device lost")

    monkeypatch.setattr(core.executor.worker.runner._model, "forward", broken)
    for name in "ab":
        core.add_request(request(name))
    with pytest.raises(RuntimeError, match="device lost"):
        core.step()


def test_nan_logits_end_only_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    model = core.executor.worker.runner._model
    forward = model.forward

    def poisoned(batch: Any, cache: Any, hidden: Any = None) -> torch.Tensor:
        logits = forward(batch, cache, hidden).clone()
        if len(logits) == 2:
            logits[1] = torch.nan
        return logits

    monkeypatch.setattr(model, "forward", poisoned)
    for name in "ab":
        core.add_request(request(name))
    ended = finish(core)
    assert sorted(str(o.finish_reason) for o in ended.values()) == ["error", "length"]


def test_deadlines_end_a_request_with_an_error() -> None:
    core = make_core()
    core.add_request(request("late", timeout_s=0.05, params={"max_tokens": 5000}))
    core.add_request(request("fine"))
    core.step()
    time.sleep(0.06)
    ended = finish(core)
    assert ended["late"].error == "the request's deadline has passed"
    assert ended["fine"].finish_reason is FinishReason.LENGTH


def test_what_cannot_run_is_refused_with_a_reason() -> None:
    core = make_core(max_model_len=64)
    assert (
        "do not fit into 64 positions"
        in (core.add_request(request("long", list(range(64)))) or TokenOutput("", [])).error
    )  # type: ignore[operator]
    assert core.add_request(request("a")) is None
    assert "with this id" in (core.add_request(request("a")) or TokenOutput("", [])).error  # type: ignore[operator]
    assert (
        "without a vocabulary"
        in (core.add_request(request("g", params={"grammar": "start: /a/"})) or TokenOutput("", [])).error
    )  # type: ignore[operator]
    finish(core)


def test_blocks_are_known_by_the_hashes_that_came_with_the_request() -> None:
    """Other tokens with the same hashes find them, which shows that they are not computed again."""
    core = make_core()
    hashes = [b"first" + bytes(11), b"second" + bytes(10)]
    for name, token in (("a", 5), ("b", 6)):
        message = request(name, [token] * 40)
        message.block_hashes = hashes
        core.add_request(message)
        num_cached = finish(core)[name].num_cached_tokens
        assert num_cached == (0 if name == "a" else 2 * core.kv.block_size)


def test_a_request_that_does_not_fit_yet_does_not_keep_a_pipeline_from_its_results() -> None:
    core = make_core(enable_prefix_caching=False, num_speculative_tokens=0, cpu_kv_cache_gib=0.0024)
    core.executor.max_in_flight = core.scheduler._max_in_flight = 2
    num_tokens = core.max_model_len - 20
    for name in "ab":
        assert core.add_request(request(name, [7] * num_tokens)) is None
    ended = [output.request_id for _ in range(200) for output in core.step() if output.finish_reason is not None]
    assert ended == ["a", "b"]


def test_background_requests_run_when_nothing_else_does() -> None:
    core = make_core()
    core.add_request(request("b", params={"max_tokens": 20}, background=True))
    core.step()
    core.add_request(request("live"))
    stats = core.current_stats()
    assert (stats.num_running, stats.num_waiting) == (0, 1)
    assert (stats.num_background_running, stats.num_background_waiting) == (1, 0)
    steps = []
    while "live" in core.scheduler:
        steps.append({output.request_id for output in core.step()})
    assert steps == [{"live"}] * len(steps)
    assert finish(core)["b"].finish_reason is FinishReason.LENGTH


def test_a_background_prompt_is_computed_in_short_chunks() -> None:
    core = make_core()
    core.add_request(request("b", [7] * 200, background=True))
    core.step()
    assert core.scheduler._requests["b"].num_computed_tokens == 64  # on a CPU


def make_guided_core() -> EngineCore:
    return make_core(
        ranks_path=public_vocabulary().ranks_path,
        special_tokens=SPECIAL_TOKENS,
        split_pattern=SPLIT_PATTERN,
        eos_token_ids=STOP_TOKEN_IDS,
    )


def test_a_grammar_that_does_not_compile_ends_its_request_alone() -> None:
    core = make_guided_core()
    assert core.add_request(request("ok", params={"grammar": "start: /[0-9]+/", "max_tokens": 3})) is None
    refused = core.add_request(request("bad", params={"grammar": "start: ("}))
    ended = finish(core)
    bad = ended.get("bad", refused)  # the thread may have been done with it before it was looked at
    assert bad is not None and bad.finish_reason is FinishReason.ERROR
    assert (bad.error or "").startswith("grammar: ")
    assert ended["ok"].finish_reason is FinishReason.LENGTH


class SlowCompiler:
    """Compiles once it is allowed to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed = threading.Event()
        self.grammars: list[str] = []
        self._compile = guided_module.compile_grammar
        monkeypatch.setattr(guided_module, "compile_grammar", self.compile)

    def compile(self, tokenizer: Any, grammar: str) -> Any:
        self.grammars.append(grammar)
        assert self.allowed.wait(30)
        return self._compile(tokenizer, grammar)


def test_who_runs_does_not_wait_for_a_grammar_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    core, compiler = make_guided_core(), SlowCompiler(monkeypatch)
    for name in ("a", "b"):
        core.add_request(request(name, params={"grammar": "start: /[0-9]+/", "max_tokens": 3}))
    assert core.step() == [] and core.has_work
    assert core.current_stats().num_waiting == 2
    core.add_request(request("plain", params={"max_tokens": 4}))
    assert [core.step()[0].request_id for _ in range(4)] == ["plain"] * 4
    compiler.allowed.set()
    ended = finish(core)
    assert {name: output.finish_reason for name, output in ended.items()} == {
        "a": FinishReason.LENGTH,
        "b": FinishReason.LENGTH,
    }
    assert compiler.grammars == ["start: /[0-9]+/"]


def test_a_request_may_be_aborted_while_its_grammar_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    core, compiler = make_guided_core(), SlowCompiler(monkeypatch)
    core.add_request(request("a", params={"grammar": "start: /[0-9]+/"}))
    twice = core.add_request(request("a"))
    assert twice is not None and "with this id" in (twice.error or "")
    assert core.abort(["a", "unknown"]) == [TokenOutput("a", [], FinishReason.ABORT)]
    assert not core.has_work
    assert core.guided is not None and not core.guided._compiling, "it would be kept for ever"
    compiler.allowed.set()
    assert finish(core) == {}
    core.add_request(request("a", params={"grammar": "start: /[0-9]+/", "max_tokens": 2}))
    assert finish(core)["a"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("drafts", [0, pytest.param(3, marks=pytest.mark.nightly)])
def test_a_mask_that_takes_too_much_work_ends_its_request_alone(drafts: int) -> None:
    core = make_guided_core()
    if drafts:
        core.scheduler._drafter = Drafter(core.guided, drafts)
    grammar = "start: /.{0,3000}[a-p].{3000}/"
    params = {"grammar": grammar, "max_tokens": 2000, "ignore_eos": False, "logit_bias": LogitBias.of({64: 100.0})}
    core.add_request(request("much", params=params | {"stop_token_ids": STOP_TOKEN_IDS}))
    core.add_request(request("ok", params={"grammar": "start: /[0-9]+/", "max_tokens": 90}))
    ended = finish(core)
    assert ended["much"].finish_reason is FinishReason.ERROR
    assert (ended["much"].error or "").startswith("grammar: ")
    assert ended["ok"].finish_reason is FinishReason.LENGTH


def test_abort_gives_a_terminal_output() -> None:
    core = make_core()
    core.add_request(request("a", params={"max_tokens": 1000}))
    core.step()
    assert [(o.request_id, o.finish_reason) for o in core.abort(["a", "unknown"])] == [("a", FinishReason.ABORT)]
    assert not core.scheduler.has_requests()
    core.kv.check_integrity()


def test_a_step_that_keeps_an_idle_engine_warm_changes_nothing() -> None:
    def answers(core: EngineCore) -> list[TokenOutput]:
        core.add_request(request("r", list(range(70)), params={"logprobs": 1}))
        found = []
        while core.has_work:
            found += core.step()
        return found

    plain, warm = make_core(), make_core()
    first = answers(plain), answers(warm)
    before = warm.current_stats().num_steps_total
    for _ in range(3):
        warm.executor.keep_warm()
    assert warm.current_stats().num_steps_total == before
    second = answers(plain), answers(warm)  # their prefix is cached: what the steps wrote is not in it
    assert [o.logprobs for o in first[0]] == [o.logprobs for o in first[1]]
    assert [o.logprobs for o in second[0]] == [o.logprobs for o in second[1]]
    assert second[0][0].num_cached_tokens == second[1][0].num_cached_tokens == 69
