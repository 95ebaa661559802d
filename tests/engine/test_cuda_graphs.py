"""Steps that are replayed, and started before they are asked for, give the tokens that plain steps give.

The model here is a stand-in whose logits depend on every token that it finds in the cache through the block tables, so
that a wrong slot, length, table or token shows. Its repeated pass writes into one buffer, as a graph does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.gpt_oss import layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.cuda_graphs import Forward, GraphRunner, graph_sizes
from gptoss.engine.worker.model_runner import ModelRunner
from gptoss.engine.worker.sampling import sampler
from gptoss.kernels.device_copy import PendingReadback
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.triton.backend import TritonBackend
from gptoss.kernels.triton.metadata import TritonStep

CPU = torch.device("cpu")
MODEL = ModelConfig.from_json(hf_config(SIZES["nano"]) | {"vocab_size": 96})
BLOCK = 4
ENGINE = EngineConfig(MODEL, None, load_format="dummy", max_model_len=64, max_num_seqs=4, block_size=BLOCK)
KERNELS = TritonBackend(layer_shape(MODEL, whole(MODEL), 64), torch.float32, CPU)  # lays the steps out


class StandIn:
    """Its cache holds token + 1 at each slot, once for each kind of layer."""

    def __init__(self) -> None:
        self.passes = 0

    def forward(self, batch: ForwardBatch, cache: list[LayerCache], hidden: None = None) -> torch.Tensor:
        self.passes += 1
        step = batch.step
        assert isinstance(step, TritonStep)
        rows = []
        for group, layer in zip(step.attention, cache, strict=True):
            layer.key.view(-1)[group.slot_mapping] = batch.token_ids.float() + 1
        full = step.attention[0]
        tokens = sum(int(n) > 0 for n in full.length) if full.num_decodes else len(batch.token_ids)
        if full.num_decodes in (0, len(full.length)):  # no rows of prefill among them
            assert int(step.num_tokens) == tokens
        for seq, length in enumerate(full.length.tolist()):
            first, end = full.query_start[seq : seq + 2].tolist()
            for row in range(first, end):
                seen = int(step.positions[row]) + 1 if length else 0
                assert seen <= length or not length
                state = 0.0
                for group, layer in zip(step.attention, cache, strict=True):
                    table = group.block_table[seq].tolist()
                    for p in range(seen):
                        state += float(layer.key.view(-1)[table[p // BLOCK] * BLOCK + p % BLOCK]) * (p + 1)
                rows.append(torch.sin(torch.arange(MODEL.vocab_size) * (state % 97 + 1)))
        return torch.stack(rows)[batch.sample_rows]


def into_one_buffer(forward: Forward) -> Forward:
    static = forward().clone()

    def replay() -> torch.Tensor:
        return static.copy_(forward())

    return replay


@dataclass
class Side:
    runner: ModelRunner
    model: StandIn


def side(*, graphed: bool) -> Side:
    model: Any = StandIn()
    cache = [LayerCache(torch.zeros(200, BLOCK, 1, 1), torch.zeros(1)) for _ in range(2)]
    graphs = None
    if graphed:
        graphs = GraphRunner(ENGINE, model, cache, CPU, into_one_buffer)
        graphs.capture_all()
        model.passes = 0
    comm = Communicator(whole(MODEL), CPU)
    return Side(ModelRunner(ENGINE, model, cache, KERNELS, comm, graphs), model)


class Script:
    """What a scheduler would ask for: requests that join, decode, end, are aborted and preempted at random."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.next_block = 1
        self.tokens: dict[str, int] = {}  # known tokens
        self.computed: dict[str, int] = {}
        self.blocks: dict[str, int] = {}
        self.prompts: dict[str, int] = {}
        self.joined = 0

    def take(self, count: int) -> list[int]:
        self.next_block += count
        return list(range(self.next_block - count, self.next_block))

    def join(self) -> tuple[NewRequest, int]:
        self.joined += 1
        name, length = f"r{self.joined}", self.rng.randint(1, 9)
        ids = [self.rng.randrange(96) for _ in range(length)]
        blocks = self.take(-(-length // BLOCK)), self.take(-(-length // BLOCK))
        params = SamplingParams(
            max_tokens=self.rng.randint(1, 12),
            seed=self.joined,
            temperature=self.rng.choice((0.0, 1.0)),
            prompt_logprobs=self.rng.choice((None, None, 2)),
        )
        self.tokens[name] = self.prompts[name] = length
        self.computed[name], self.blocks[name] = 0, len(blocks[0])
        count = length if self.rng.random() < 0.7 else max(1, length // 2)
        return NewRequest(name, ids, length, params, blocks, 0), count

    def step(self) -> SchedulerOutput:
        new, counts, added = [], {}, {}
        gone = [name for name in self.tokens if self.rng.random() < 0.08]
        for name in gone:
            for table in (self.tokens, self.computed, self.blocks):
                del table[name]
        for name in self.tokens:
            if self.rng.random() < 0.1:
                continue  # has to wait
            counts[name] = self.tokens[name] - self.computed[name]
            if self.computed[name] + counts[name] > self.blocks[name] * BLOCK:
                added[name] = (self.take(1), self.take(1))
                self.blocks[name] += 1
        if len(self.tokens) < 4 and self.rng.random() < 0.5:
            request, count = self.join()
            new.append(request)
            counts[request.request_id] = count
        order = list(counts.items())
        self.rng.shuffle(order)
        return SchedulerOutput(new, added, dict(order), gone)

    def done(self, out: SchedulerOutput, sampled: dict[str, int]) -> None:
        for name, count in out.num_scheduled_tokens.items():
            self.computed[name] += count
            self.tokens[name] += name in sampled


@pytest.mark.parametrize("seed", range(12))
def test_replayed_steps_give_the_tokens_of_plain_ones(seed: int) -> None:
    plain, graphed = side(graphed=False), side(graphed=True)
    script = Script(seed)
    scored = 0
    for _ in range(40):
        out = script.step()
        expected = plain.runner.execute_model(out, {})
        found = graphed.runner.execute_model(out, {})
        assert expected is not None and found is not None
        assert found.sampled == expected.sampled
        assert found.prompt_logprobs == expected.prompt_logprobs
        scored += len(found.prompt_logprobs)
        assert not found.failed
        script.done(out, expected.sampled)
    assert scored


def decode(names: list[str]) -> SchedulerOutput:
    return SchedulerOutput([], {}, dict.fromkeys(names, 1), [])


def request(name: str, length: int, max_tokens: int = 30, blocks: int = 4) -> NewRequest:
    first = 10 * int(name)
    tables = (list(range(first, first + blocks)), list(range(first, first + blocks)))
    return NewRequest(name, list(range(length)), length, SamplingParams(max_tokens=max_tokens, seed=1), tables, 0)


def test_a_steady_step_was_computed_before_it_was_asked_for() -> None:
    one = side(graphed=True)
    one.runner.execute_model(SchedulerOutput([request("1", 3), request("2", 5)], {}, {"1": 3, "2": 5}, []), {})
    before = one.model.passes
    for _ in range(5):
        one.runner.execute_model(decode(["1", "2"]), {})
    assert one.model.passes == before + 5  # each step ran the one after it, and nothing twice


def test_a_request_that_ends_takes_no_other_with_it() -> None:
    one = side(graphed=True)
    one.runner.execute_model(SchedulerOutput([request("1", 3), request("2", 5)], {}, {"1": 3, "2": 5}, []), {})
    before = one.model.passes
    one.runner.execute_model(SchedulerOutput([], {}, {"2": 1}, ["1"]), {})
    assert one.model.passes == before + 1  # 2's token was there; only the next step ran


def test_nothing_is_started_for_a_request_at_its_end_or_without_room() -> None:
    last, full = request("1", 3, max_tokens=1), request("2", 4, blocks=1)
    for new, count in ((last, 3), (full, 4)):
        one = side(graphed=True)
        one.runner.execute_model(SchedulerOutput([new], {}, {new.request_id: count}, []), {})
        assert one.model.passes == 1


def test_tokens_are_not_waited_for_before_the_next_step_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    one = side(graphed=True)
    ahead = GraphRunner.prelaunch

    def prelaunch(self: GraphRunner, *args: Any) -> Any:
        events.append("next step")
        return ahead(self, *args)

    class Watched(PendingReadback):
        def __init__(self, tensors: list[torch.Tensor]) -> None:
            events.append(f"{len(tensors)} copied")
            super().__init__(tensors)

        def values(self) -> list[Any]:
            events.append("read")
            return super().values()

    monkeypatch.setattr(GraphRunner, "prelaunch", prelaunch)
    monkeypatch.setattr(sampler, "PendingReadback", Watched)
    new = request("1", 3)
    new.params = msgspec.structs.replace(new.params, logprobs=2)
    found = one.runner.execute_model(SchedulerOutput([new], {}, {"1": 3}, []), {})
    assert events == ["5 copied", "next step", "read"]  # token, logit; logprob, the two best
    assert found is not None and len(found.logprobs["1"].alternatives) == 2


@pytest.mark.parametrize("most", [0, 2])
def test_batches_without_memory_for_a_graph_are_computed_step_by_step(most: int) -> None:
    def capture(forward: Forward) -> Forward:
        if len(forward()) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return into_one_buffer(forward)

    plain, graphed = side(graphed=False), side(graphed=True)
    graphs = graphed.runner._graphs
    assert graphs is not None
    graphs._replays.clear()
    graphs._capture = capture
    graphs.capture_all()
    assert graphs.holds(2) is (most == 2) and not graphs.holds(3)
    script = Script(3)
    for _ in range(30):
        out = script.step()
        expected, found = (one.runner.execute_model(out, {}) for one in (plain, graphed))
        assert expected is not None and found is not None
        assert found.sampled == expected.sampled
        script.done(out, expected.sampled)


@pytest.mark.parametrize("limit", [1, 5, 8, 32, 100, 256, 257])
def test_graph_sizes_reach_the_limit_and_no_further(limit: int) -> None:
    sizes = graph_sizes(limit)
    assert sizes[0] == 1 and sizes[-1] == limit and sizes == sorted(set(sizes))
