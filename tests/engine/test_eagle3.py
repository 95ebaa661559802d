"""EAGLE-3 heads in an engine: answers are the same with them as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss.config.errors import ConfigError
from gptoss.engine.core.core import EngineCore
from gptoss.engine.core.draft_proposer import MIN_PAUSE, Drafter
from gptoss.engine.messages import AddRequest, ModelRunnerOutput, NewRequest, SchedulerOutput
from gptoss.engine.model.draft_head import read_draft_head
from gptoss.engine.model.eagle3 import Eagle3Head
from gptoss.engine.model.gpt_oss import layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.parallel.memory_plan import eager_tap_bytes
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable
from gptoss.engine.worker.draft_runner import DraftRunner
from gptoss.engine.worker.worker import Worker
from gptoss.kernels.cpu import native
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.triton.backend import TritonBackend
from tests.engine.test_draft_proposer import answers_of, make_core
from tests.support.draft_heads import write_bigram_head, write_head
from tests.support.eagle3_reference import model_of
from tests.support.fake_runner import FakeRunner, make_request, make_scheduler
from tests.support.helpers import checkpoint, engine_config
from tests.support.tiers import nightly_except, sized

needs_native = pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")
FOLDER = checkpoint()
MODEL = ModelConfig.from_folder(FOLDER)


def core_of(**keys: Any) -> EngineCore:
    """An engine without a vocabulary, which takes a second to load."""
    return EngineCore(engine_config(FOLDER, dtype="bfloat16", **keys))


def ask(core: EngineCore, requests: dict[str, tuple[list[int], dict[str, Any]]]) -> tuple[dict[str, list[int]], int]:
    """-> (the tokens by request, steps)."""
    for name, (prompt, options) in requests.items():
        core.add_request(AddRequest(name, prompt, SamplingParams(ignore_eos=True, **options)))
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    steps = 0
    while core.has_work:
        for output in core.step():
            assert output.error is None
            tokens[output.request_id] += output.token_ids
        steps += 1
    core.kv.check_integrity()
    return tokens, steps


PROMPT = [7 * i % 900 + 3 for i in range(70)]
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 40}


@pytest.fixture(scope="module")
def plain() -> tuple[EngineCore, dict[str, list[int]]]:
    """An engine without drafts, and its answer to PROMPT."""
    core = core_of(num_speculative_tokens=0)
    return core, ask(core, {"a": (PROMPT, DRAWN)})[0]


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory, plain: tuple[EngineCore, dict[str, list[int]]]) -> Path:
    """A head that knows the answer to PROMPT."""
    answer = plain[1]["a"]
    assert len(set(answer)) == len(answer), "a model of random weights draws from all of its vocabulary"
    embedding = model_of(torch.bfloat16).weights.embedding
    assert embedding is not None
    return write_bigram_head(tmp_path_factory.mktemp("heads"), MODEL, embedding.float().numpy(), answer)


@needs_native
@pytest.mark.parametrize("count", nightly_except(3, of=(1, 2, 3, 4)))
def test_answers_are_the_same_with_a_head_that_guesses_wrong(tmp_path: Path, count: int) -> None:
    """With a grammar too: the guesses that break it are for GuidedDecoding to cut."""
    core = make_core(num_speculative_tokens=count, speculative_model=write_head(tmp_path, MODEL))
    drafter, core.scheduler._drafter = core.scheduler._drafter, None
    plain, _ = answers_of(core, sized(8, nightly=40))
    core.scheduler._drafter = drafter
    tokens, _ = answers_of(core, sized(8, nightly=40))
    assert tokens == plain
    stats = core.current_stats()
    assert stats.num_head_draft_total > stats.num_head_accepted_total


@pytest.fixture(scope="module")
def with_head(knowing: Path) -> EngineCore:
    return core_of(speculative_model=knowing)


@needs_native
def test_guesses_that_are_right_save_steps(
    knowing: Path, plain: tuple[EngineCore, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once more with a cached prefix, whose blocks hold the head's keys too."""
    core = core_of(num_speculative_tokens=3, speculative_model=knowing, max_num_batched_tokens=24)
    drafter = core.scheduler._drafter
    monkeypatch.setattr(drafter, "finish", lambda request: None)  # nothing is remembered
    tokens, steps = ask(core, {"a": (PROMPT, DRAWN)})
    assert tokens["a"] == plain[1]["a"]
    stats = core.current_stats()
    assert stats.num_head_accepted_total == stats.num_head_draft_total == stats.num_accepted_total
    assert stats.num_head_accepted_total >= 29
    assert steps == 3 + 10, "the prompt in three chunks, then four tokens a step"
    again, fewer = ask(core, {"b": (PROMPT, DRAWN)})
    assert again["b"] == tokens["a"]
    assert fewer == steps - 2
    runner = core.executor.worker.runner._draft_runner
    assert runner is not None
    assert int((runner.cache.key.abs().sum((2, 3)) > 0).sum()) >= len(PROMPT) + 39


@needs_native
@pytest.mark.parametrize(
    "kind", nightly_except("preempted", "two", of=("preempted", "aborted", "scored", "crowd", "two"))
)
def test_answers_are_the_same_whatever_else_happens(
    knowing: Path, plain: tuple[EngineCore, dict[str, list[int]]], with_head: EngineCore, kind: str
) -> None:
    """A head that is right for one of the requests and wrong for the others."""
    others = {
        f"o{n}": (PROMPT[n:], {"temperature": 1.0, "seed": n, "max_tokens": 30})
        for n in range({"crowd": 7, "two": 1}.get(kind, 3))
    }
    if kind == "scored":
        others["o1"][1]["prompt_logprobs"] = 0
    cores = [plain[0], with_head]
    if kind == "preempted":
        small: dict[str, Any] = {"enable_prefix_caching": False}
        cores = [
            core_of(num_speculative_tokens=0, cpu_kv_cache_gib=0.0006, **small),
            core_of(speculative_model=knowing, cpu_kv_cache_gib=0.0008, **small),
        ]
    answers = []
    for core in cores:
        if kind == "aborted":
            core.add_request(AddRequest("gone", PROMPT[9:], SamplingParams(max_tokens=50, seed=1, ignore_eos=True)))
            for _ in range(4):
                core.step()
            core.abort(["gone"])
        answers.append(ask(core, {"a": (PROMPT, DRAWN), **others})[0])
        assert (core.current_stats().num_preemptions_total > 0) == (kind == "preempted")
    assert answers[0] == answers[1]
    assert cores[1].current_stats().num_head_accepted_total > 0


@needs_native
def test_prompt_logprobs_and_logprobs_are_the_same(
    plain: tuple[EngineCore, dict[str, list[int]]], with_head: EngineCore
) -> None:
    found = []
    for core in (plain[0], with_head):
        before = core.current_stats().num_draft_total
        params = SamplingParams(max_tokens=6, seed=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
        core.add_request(AddRequest("a", PROMPT, params))
        outputs = []
        while core.has_work:
            outputs += [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in core.step()]
        found.append(outputs)
        assert core.current_stats().num_draft_total == before
    assert found[0] == found[1]


def test_the_head_does_not_see_requests_with_an_adapter(tmp_path: Path) -> None:
    model = model_of(torch.float32)
    head = Eagle3Head(read_draft_head(write_head(tmp_path, MODEL), MODEL), model, 64)
    cache = LayerCache(*(torch.zeros(4, 16, 2, 64) for _ in range(2)))
    runner = DraftRunner(head, cache, 16, 64)
    states = []
    for number, adapter in enumerate((0, 3)):
        blocks = ([1 + number], [1 + number])
        new = NewRequest(f"r{number}", [5, 6, 7], 3, SamplingParams(max_tokens=9, seed=0), blocks, 0, adapter)
        states.append(new)
    rows = RequestTable().apply(SchedulerOutput(states, {}, {"r0": 3, "r1": 3}, []))
    output = ModelRunnerOutput({"r0": 8, "r1": 8}, {})
    hidden = [torch.randn(6, MODEL.hidden_size) for _ in range(3)]
    drafts = runner.run(rows, hidden, output, {"r0": 2, "r1": 2})
    assert drafts.keys() == {"r0"} and len(drafts["r0"]) == 2
    written = (cache.key.abs().sum((2, 3)) > 0).sum(1).tolist()
    assert written == [0, 4, 0, 0]
    assert runner.run(rows, hidden, ModelRunnerOutput({}, {}, {"r0": "not finite"}), {}) == {}


def test_guesses_end_where_the_blocks_do(tmp_path: Path) -> None:
    head = Eagle3Head(read_draft_head(write_head(tmp_path, MODEL), MODEL), model_of(torch.float32), 64)
    for num_known, max_model_len, wanted in ((14, 64, 3), (15, 64, 2), (16, 64, 1), (13, 14, 2)):
        runner = DraftRunner(head, LayerCache(*(torch.zeros(3, 16, 2, 64) for _ in range(2))), 16, max_model_len)
        new = NewRequest("r", list(range(num_known)), num_known, SamplingParams(max_tokens=9, seed=0), ([1], [1]), 0)
        rows = RequestTable().apply(SchedulerOutput([new], {}, {"r": num_known}, []))
        hidden = [torch.randn(num_known, MODEL.hidden_size) for _ in range(3)]
        drafts = runner.run(rows, hidden, ModelRunnerOutput({"r": 8}, {}), {"r": 3})
        assert len(drafts["r"]) == wanted


def test_a_warm_up_leaves_the_blocks_of_requests_alone(tmp_path: Path) -> None:
    head = Eagle3Head(read_draft_head(write_head(tmp_path, MODEL), MODEL), model_of(torch.float32), 256)
    cache = LayerCache(*(torch.zeros(3, 16, 2, 64) for _ in range(2)))
    for num_tokens in (1, 16, 40):
        DraftRunner(head, cache, 16, 256).warm_up(num_tokens)
    assert int((cache.key[0].abs().sum((1, 2)) > 0).sum()) == 16
    assert not cache.key[1:].any() and not cache.value[1:].any()


def test_engines_that_cannot_check_guesses_say_so(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"speculative_model \(--speculative-model\) works on one rank, with the compiled"
    ):
        EngineCore(engine_config(FOLDER, dtype="float32", speculative_model=write_head(tmp_path, MODEL)))


@pytest.mark.parametrize("eager", [True, False])
def test_one_gpu_takes_a_head_with_and_without_graphs(tmp_path: Path, eager: bool) -> None:
    worker = Worker(engine_config(FOLDER, speculative_model=write_head(tmp_path, MODEL), enforce_eager=eager))
    worker.kernels = TritonBackend(layer_shape(MODEL, whole(MODEL), 64), torch.bfloat16, torch.device("cpu"))
    worker._check_draft_head()
    worker.comm.world_size = 2
    with pytest.raises(ConfigError, match="this engine runs triton kernels on 2"):
        worker._check_draft_head()


def drafter_with(guesses: list[int]) -> tuple[Drafter, Any]:
    drafter, request = Drafter(None, 3, has_head=True), make_request("a", [1, 2, 3, 4, 5, 6], max_tokens=100)
    assert drafter.head_limit(request, 3, 0) == 3
    drafter.receive(request, guesses)
    return drafter, request


def test_guesses_are_drafts_for_the_tokens_that_they_follow_alone() -> None:
    drafter, request = drafter_with([40, 41, 42])
    assert drafter.propose(request, 3) == [40, 41, 42]
    assert drafter.propose(request, 2) == [40, 41]
    request.token_ids.append(40)
    assert drafter.propose(request, 3) == []


def test_what_is_forced_or_remembered_goes_before_guesses() -> None:
    class Forced:
        def forced(self, request_id: str) -> list[int]:
            return [40]

        def allowed(self, request_id: str, drafts: list[int]) -> list[int]:
            return drafts[:2]  # the third breaks the grammar

    drafter, request = drafter_with([40, 41, 42])
    drafter._guided = Forced()  # type: ignore[assignment]
    assert drafter.propose(request, 3) == [40, 41]
    drafter.receive(request, [50, 51, 52])
    assert drafter.propose(request, 3) == [40], "guesses that begin otherwise are of no use"
    drafter, request = drafter_with([40, 41, 42])
    request.token_ids += [1, 2, 3]
    drafter.receive(request, [40, 41, 42])
    assert drafter.propose(request, 3) == [4, 5, 6]
    assert drafter.head_limit(request, 3, 3) == 0, "while remembered drafts are tried the head is not asked"


def test_guesses_are_asked_for_as_far_as_they_are_right() -> None:
    drafter, request = drafter_with([])
    limits = []
    for _ in range(120):
        limit = drafter.head_limit(request, 3, 0)
        limits.append(limit)
        drafter.receive(request, [40, 41, 42][:limit])
        num_drafts = len(drafter.propose(request, 3))
        drafter.observe("a", num_drafts, min(1, num_drafts))  # the first is always right, the second never
    assert limits[0] == 3
    assert limits[30:].count(1) > 80 and set(limits[30:]) == {1, 2}
    assert drafter.num_head_accepted == 120


def test_a_head_that_is_never_right_is_hardly_asked() -> None:
    drafter, request = drafter_with([])
    limits = []
    for _ in range(300):
        limits.append(drafter.head_limit(request, 3, 0))
        drafter.receive(request, [40, 41, 42][: limits[-1]])
        drafter.observe("a", len(drafter.propose(request, 3)), 0)
    assert limits[0] == 3 and sum(map(bool, limits)) <= 9 + 6
    assert limits[20 : 20 + MIN_PAUSE - 1].count(0) >= MIN_PAUSE - 2


def test_the_scheduler_asks_the_head_for_what_the_next_step_may_draft() -> None:
    for count, wanted in ((1, [3]), (2, [1, 1]), (3, [1]), (4, [])):
        scheduler = make_scheduler(drafter=Drafter(None, 3, has_head=True), max_num_seqs=8)
        for number in range(count):
            scheduler.add_request(make_request(f"r{number}", 10, 9))
        out = FakeRunner(scheduler).step()
        assert list(out.draft_limits.values()) == wanted
    for params, most in (({"logprobs": 0}, 9), ({}, 2)):  # the second answer ends before a draft could help
        scheduler = make_scheduler(drafter=Drafter(None, 3, has_head=True))
        scheduler.add_request(make_request("a", 10, most, params=params))
        assert not FakeRunner(scheduler).step().draft_limits
    scheduler = make_scheduler(drafter=Drafter(None, 3, has_head=True))
    request = make_request("a", 10, 9)
    request.adapter = 2
    scheduler.add_request(request)
    assert not FakeRunner(scheduler).step().draft_limits


@needs_native
@pytest.mark.parametrize("taps", nightly_except((1, 3, 5), of=((1, 3, 5), (6,))))
def test_the_plan_has_room_for_the_states_of_a_long_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taps: tuple[int, ...]
) -> None:
    core = make_core(speculative_model=write_head(tmp_path, MODEL, taps=taps), max_num_batched_tokens=1500)
    worker = core.executor.worker
    assert isinstance(worker, Worker)
    runner, held = worker.runner._draft_runner, []
    assert runner is not None
    run = runner.run

    def noting(rows: Any, states: list[torch.Tensor], *rest: Any) -> dict[str, list[int]]:
        held.append(sum(state.untyped_storage().nbytes() for state in states))
        return run(rows, states, *rest)

    monkeypatch.setattr(runner, "run", noting)
    assert core.add_request(AddRequest("r", [7] * 1500, SamplingParams(max_tokens=8, seed=0))) is None
    core.step()
    assert held == [len(taps) * 1500 * MODEL.hidden_size * 2]
    assert held[0] <= eager_tap_bytes(worker.config, whole(MODEL), 2)
