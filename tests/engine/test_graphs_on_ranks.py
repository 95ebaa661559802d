"""Two tensor-parallel ranks replay what one rank computes, on devices that work as late as they can."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from gptoss.engine.core.executor import sampled_of
from gptoss.engine.core.scheduler import Scheduler
from gptoss.engine.messages import ModelRunnerOutput, SchedulerOutput, Step
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import Shard, make_shard, whole
from gptoss.engine.worker import model_runner
from gptoss.engine.worker.cuda_graphs import Forward, GraphRunner
from gptoss.engine.worker.graphed_steps import PrelaunchedStep
from gptoss.engine.worker.model_runner import ModelRunner
from gptoss.kernels.layers import LayerCache
from tests.engine.test_cuda_graphs import (
    BLOCK,
    CPU,
    ENGINE,
    KERNELS,
    MODEL,
    Guesses,
    Script,
    StandIn,
    decode,
    executed,
    into_one_buffer,
    request,
    served,
    side,
)
from tests.support.fake_device import FakeRanks, LateDevice
from tests.support.tiers import nightly_except

RANKS = 2


class LateModel:
    """Its eager passes are queued like a graph's."""

    def __init__(self, comm: Communicator, device: LateDevice) -> None:
        self.inner, self.device = StandIn(comm), device

    def forward(self, batch: ForwardBatch, cache: list[LayerCache], hidden: None = None) -> torch.Tensor:
        if self.device.is_running:
            return self.inner.forward(batch, cache)
        out = torch.empty(len(batch.sample_rows), len(self.inner.comm.shard.vocab))
        self.device.later(lambda: out.copy_(self.inner.forward(batch, cache)))
        return out


@dataclass
class Rank:
    runner: ModelRunner
    graphs: GraphRunner
    model: StandIn


def make_rank(ranks: FakeRanks, rank: int, shard: Shard | None = None) -> Rank:
    device = ranks.device

    def capture(forward: Forward) -> Forward:
        static = forward().clone()

        def replay() -> torch.Tensor:
            device.later(lambda: static.copy_(forward()))
            return static

        return replay

    with device.at_once():
        comm = Communicator(shard or shard_of(rank), CPU, Path("nowhere"))
        model = LateModel(comm, device)
        return rank_of(model, model.inner, comm, capture)


def shard_of(rank: int) -> Shard:
    layers = [range(MODEL.num_layers)]
    return make_shard(MODEL, rank, tensor_size=RANKS, stage_layers=layers, expert_parallel=False)


def rank_of(model: Any, inner: StandIn, comm: Communicator, capture: Callable[[Forward], Forward]) -> Rank:
    cache = [LayerCache(torch.zeros(200, BLOCK, 1, 1), torch.zeros(1)) for _ in range(2)]
    graphs = GraphRunner(ENGINE, model, cache, CPU, capture, comm)
    graphs.capture_all()
    runner = ModelRunner(ENGINE, model, cache, KERNELS, comm, graphs)
    runner._sampling = "torch"
    inner.passes = 0
    return Rank(runner, graphs, inner)


Steps = list[tuple[SchedulerOutput, ModelRunnerOutput]]


def plain_steps(seed: int, count: int = 40) -> Steps:
    plain, script, steps = side(graphed=False), Script(seed, scored=False), []
    plain.runner._sampling = "torch"
    for _ in range(count):
        out = script.step()
        result = plain.runner.execute_model(out, {})
        assert result is not None
        script.done(out, result.sampled)
        steps.append((out, result))
    return steps


def on_ranks(steps: Steps, watch: Callable[[Rank, int], None] = lambda *_: None) -> list[Rank]:
    """The steps' tokens are the same. `watch` is called after each step."""
    ranks = FakeRanks(RANKS)

    def main(rank: int) -> Rank:
        one, sampled = make_rank(ranks, rank), dict[str, list[int]]()
        for number, (out, expected) in enumerate(steps):
            found = one.runner.execute_model(out, sampled)
            if rank == 0:
                assert found is not None and found.sampled == expected.sampled and not found.failed
                ranks.post(number, sampled_of(found))
            else:
                assert found is None or not out.num_scheduled_tokens
            watch(one, number)
            sampled = ranks.receive(number) if rank else sampled_of(expected)
        return one

    return list(ranks.run(main))


@pytest.mark.parametrize("seed", nightly_except(1, of=range(3)))
def test_ranks_replay_what_one_rank_computes(seed: int) -> None:
    one, two = on_ranks(plain_steps(seed))
    assert one.model.passes == two.model.passes


def test_pieces_of_a_prompt_are_prepared_while_earlier_ones_wait_for_the_device() -> None:
    """Nothing is read from the device until the last one is sampled."""
    counts, new = (3, 4, 5, 2, 3), request("1", 17, blocks=5)
    outs = [SchedulerOutput([] if i else [new], {}, {"1": n}, []) for i, n in enumerate(counts)]
    plain, ranks = side(graphed=False), FakeRanks(1)
    plain.runner._sampling = "torch"
    expected = [plain.runner.execute_model(out, {}) for out in outs]

    def main(_: int) -> list[ModelRunnerOutput | None]:
        rank = make_rank(ranks, 0, whole(MODEL))
        return [rank.runner.execute_model(out, {}) for out in outs]

    assert expected[-1] is not None and list(expected[-1].sampled) == ["1"]
    assert ranks.run(main)[0] == expected


def replayed_over_gloo(rank: int, rendezvous: Path) -> int:
    comm = Communicator(shard_of(rank), CPU, rendezvous)
    model = StandIn(comm)
    one, sampled = rank_of(model, model, comm, into_one_buffer), dict[str, list[int]]()
    for out, expected in [*plain_steps(7, 20), *steady_steps(0.0)]:
        found = one.runner.execute_model(out, sampled)
        if rank == 0:
            assert found is not None and found.sampled == expected.sampled
        sampled = sampled_of(expected)
    comm.close()
    return model.passes


def test_ranks_over_gloo_replay_what_one_rank_computes(tmp_path: Path) -> None:
    """With torch.distributed itself, in processes."""
    with ProcessPoolExecutor(RANKS, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(replayed_over_gloo, rank, tmp_path / "meet") for rank in range(RANKS)]
        passes = [job.result(120) for job in jobs]
    assert passes[0] == passes[1] > 20


def test_drafts_change_no_answer_on_ranks() -> None:
    """What is accepted reaches the other rank with the next step, as the executor sends it."""
    one = side(graphed=False)
    one.runner._sampling = "torch"
    plain, _ = served(executed(one))
    ranks = FakeRanks(RANKS)

    def lead(rank: Rank) -> tuple[dict[str, list[int]], Scheduler]:
        step, number = Step(SchedulerOutput([], {}, {}, []), {}), 0

        def execute(out: SchedulerOutput) -> ModelRunnerOutput:
            nonlocal step, number
            step.out = out
            ranks.post(number, msgspec.msgpack.encode(step))
            number += 1
            result = rank.runner.execute_model(out, step.sampled)
            assert result is not None
            step.sampled = sampled_of(result)
            return result

        found = served(execute, Guesses(plain))
        ranks.post(number, None)
        return found

    def main(index: int) -> Any:
        rank, number = make_rank(ranks, index), 0
        if index == 0:
            return lead(rank)
        while (message := ranks.receive(number)) is not None:
            step = msgspec.msgpack.decode(message, type=Step)
            assert rank.runner.execute_model(step.out, step.sampled) is None or not step.out.num_scheduled_tokens
            number += 1
        return None

    answers, scheduler = ranks.run(main)[0]
    assert answers == plain
    assert 10 < scheduler.num_accepted < scheduler.num_drafts


def steady_steps(temperature: float, count: int = 6) -> Steps:
    plain, steps = side(graphed=False), Steps()
    plain.runner._sampling = "torch"
    new = [request("1", 3), request("2", 5)]
    for one in new:
        one.params = one.params.__class__(max_tokens=30, seed=1, temperature=temperature)
    outs = [SchedulerOutput(new, {}, {"1": 3, "2": 5}, []), *(decode(["1", "2"]) for _ in range(count - 1))]
    for out in outs:
        result = plain.runner.execute_model(out, {})
        assert result is not None
        steps.append((out, result))
    return steps


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_steady_step_was_started_on_all_ranks_before_the_host_knew_its_tokens(temperature: float) -> None:
    passes: dict[int, list[int]] = {0: [], 1: []}

    def watch(rank: Rank, number: int) -> None:
        passes[rank.model.comm.shard.rank].append(rank.model.passes)

    ranks = on_ranks(steady_steps(temperature), watch)
    # the first step is the prompts'; each one runs the next one, and nothing runs twice
    assert [rank.model.passes for rank in ranks] == [7, 7]
    assert passes[0] == [1, 2, 3, 4, 5, 6], "the next step is queued when the host has read the tokens of this one"


def test_a_token_that_is_drawn_anew_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_runner.sample

    def sample(*args: Any) -> Any:
        *given, sampled = args
        seen: list[torch.Tensor] = []

        def first(token_ids: torch.Tensor) -> None:
            seen.append(token_ids)
            if sampled is not None:
                sampled((token_ids + torch.arange(len(token_ids)) % 2) % MODEL.vocab_size)

        result = real(*given, first)
        if sampled is not None:
            sampled(seen[0])
        return result

    steps = steady_steps(1.0)
    monkeypatch.setattr(model_runner, "sample", sample)
    ready: list[int] = []
    whole = PrelaunchedStep.ready

    def counted(self: PrelaunchedStep, *args: Any) -> dict[str, int]:
        found = whole(self, *args)
        ready.append(len(found))
        return found

    monkeypatch.setattr(PrelaunchedStep, "ready", counted)
    ranks = on_ranks(steps)
    assert ready == [1] * 10  # of two requests, on both ranks
    assert [rank.model.passes for rank in ranks] == [12, 12]


def test_ranks_have_the_same_graphs_though_one_has_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def has_room(self: GraphRunner, tokens: int) -> bool:
        asked.append(self._shard.rank)
        return self._shard.rank == 0 or tokens <= 2

    monkeypatch.setattr(GraphRunner, "_has_room", has_room)
    ranks = on_ranks(plain_steps(5))
    assert {0, 1} == set(asked)
    for rank in ranks:
        assert rank.graphs.holds(2) and not rank.graphs.holds(3)
        assert rank.graphs.prompts is not None and not rank.graphs.prompts.replays
