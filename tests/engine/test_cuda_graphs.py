"""Steps that are replayed, and started before they are asked for, give the tokens that plain steps give.

The model here is a stand-in whose logits depend on every token that it finds in the cache through the block tables, so
that a wrong slot, length, table or token shows. Its repeated pass writes into one buffer, as a graph does.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.kv_cache_manager import KVCacheManager
from gptoss.engine.core.request import Request
from gptoss.engine.core.scheduler import Scheduler
from gptoss.engine.messages import ModelRunnerOutput, NewRequest, SchedulerOutput
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.gpt_oss import layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.cuda_graphs import Forward, GraphRunner
from gptoss.engine.worker.draft_runner import DraftRunner
from gptoss.engine.worker.graphed_steps import GraphedSteps
from gptoss.engine.worker.model_runner import ModelRunner
from gptoss.engine.worker.sampling import sampler
from gptoss.kernels.device_copy import PendingReadback
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.triton.backend import TritonBackend
from gptoss.kernels.triton.metadata import TILE_TOKENS, TritonAttentionMetadata, TritonStep

CPU = torch.device("cpu")
MODEL = ModelConfig.from_json(hf_config(SIZES["nano"]) | {"vocab_size": 96})
BLOCK = 4
ENGINE = EngineConfig(MODEL, None, load_format="dummy", max_model_len=64, max_num_seqs=4, block_size=BLOCK)
KERNELS = TritonBackend(layer_shape(MODEL, whole(MODEL), 64), torch.float32, CPU)  # lays the steps out


class StandIn:
    """Its cache holds token + 1 at each slot, once for each kind of layer.

    It has two taps, whose states are what its logits are computed from, and the positions.
    """

    config = MODEL
    residual_dtype = torch.float32

    def __init__(self, comm: Communicator | None = None) -> None:
        self.comm = comm or Communicator(whole(MODEL), CPU)
        self.passes = 0

    def forward(
        self,
        batch: ForwardBatch,
        cache: list[LayerCache],
        hidden: None = None,
        states: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        self.passes += 1
        step = batch.step
        assert isinstance(step, TritonStep)
        shard, sums = self.comm.shard, torch.zeros(len(batch.token_ids), 1)
        for kind, (group, layer) in enumerate(zip(step.attention, cache, strict=True)):
            keys = layer.key.view(-1)
            keys[group.slot_mapping] = batch.token_ids.float() + 1
            for row, seen, seq in attending(step, group):
                assert int(step.positions[row]) + 1 == seen and row < int(step.num_tokens)
                slots = (group.block_table[seq, :, None] * BLOCK + torch.arange(BLOCK)).flatten()[:seen]
                if kind % shard.tensor_size == shard.tensor_rank:
                    sums[row] += (keys[slots] * torch.arange(1, seen + 1)).sum()
        sums = self.comm.all_reduce(sums)
        if states is not None:
            states += [x.float().expand(-1, MODEL.hidden_size) for x in (sums, step.positions[:, None])]
        return logits_of(sums[batch.sample_rows], shard.vocab)


def logits_of(sums: torch.Tensor, vocab: range) -> torch.Tensor:
    """sums [R, 1] -> [R, V]."""
    return torch.sin(torch.arange(vocab.start, vocab.stop) * (sums % 97 + 1))


def attending(step: TritonStep, group: TritonAttentionMetadata) -> Iterator[tuple[int, int, int]]:
    """The rows that are tokens, how many keys each sees, and its sequence."""
    for seq in range(group.num_decodes):
        if length := int(group.length[seq]):
            yield seq, length, seq
    for seq, first in zip(group.tile_seq.tolist(), group.tile_first.tolist(), strict=True):
        start, end = group.query_start[seq : seq + 2].tolist()
        if length := int(group.length[seq]):
            for row in range(first, min(first + TILE_TOKENS, end)):
                yield row, length - end + row + 1, seq


def into_one_buffer(forward: Forward) -> Forward:
    static = forward().clone()

    def replay() -> torch.Tensor:
        return static.copy_(forward())

    return replay


@dataclass
class Side:
    runner: ModelRunner
    model: StandIn


def side(*, graphed: bool, head: Any = None) -> Side:
    """`head`: a stand-in for a draft head, which takes both taps."""
    model: Any = StandIn()
    cache = [LayerCache(torch.zeros(200, BLOCK, 1, 1), torch.zeros(1)) for _ in range(2)]
    graphs = None
    if graphed:
        graphs = GraphRunner(ENGINE, model, cache, CPU, into_one_buffer, num_taps=0 if head is None else 2)
        graphs.capture_all()
        model.passes = 0
    comm = Communicator(whole(MODEL), CPU)
    drafts = None
    if head is not None:
        own = LayerCache(torch.zeros(200, BLOCK, 1, 1), torch.zeros(200, BLOCK, 1, 1))
        drafts = DraftRunner(head, own, BLOCK, ENGINE.max_model_len)
    return Side(ModelRunner(ENGINE, model, cache, KERNELS, comm, graphs, draft_runner=drafts), model)


class Script:
    """What a scheduler would ask for: requests that join, decode, end, are aborted and preempted at random."""

    def __init__(self, seed: int, *, scored: bool = True) -> None:
        self.rng, self.scored = random.Random(seed), scored
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
            prompt_logprobs=self.rng.choice((None, None, 2)) if self.scored else None,
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


Execute = Callable[[SchedulerOutput], ModelRunnerOutput]


class Guesses(Drafter):
    """Knows the answers, and errs in one token of three; knows nothing in half of the steps."""

    def __init__(self, answers: dict[str, list[int]]) -> None:
        super().__init__(None, ENGINE.max_drafts)
        self.answers, self.rng = answers, random.Random(0)

    def propose(self, request: Request, count: int) -> list[int]:
        if self.rng.random() < 0.5:
            return []
        done = request.num_output_tokens
        right = self.answers[request.request_id][done : done + min(self.rng.randint(1, self.max_tokens), count)]
        return [t if self.rng.random() < 0.67 else (t + 1) % 96 for t in right]


def served(execute: Execute, drafter: Drafter | None = None) -> tuple[dict[str, list[int]], Scheduler]:
    """The answers to three requests, of which the last ones run together."""
    kv = KVCacheManager(199, BLOCK, MODEL.sliding_window, enable_prefix_caching=True)
    scheduler, answers = Scheduler(ENGINE, kv, drafter=drafter, lookahead=1), dict[str, list[int]]()
    for names in (("1",), ("2", "3")):
        for name in names:
            params = SamplingParams(max_tokens=20 + int(name), seed=int(name), temperature=0.5 * (int(name) - 1))
            scheduler.add_request(Request(name, [7 * int(name) + i for i in range(5 * int(name))], params))
        while scheduler.has_requests():
            out = scheduler.schedule()
            assert out.num_scheduled_tokens, "a request waits for a token that no step samples"
            for output in scheduler.update_from_output(out, execute(out)):
                assert output.error is None
                answers.setdefault(output.request_id, []).extend(output.token_ids)
    kv.check_integrity()
    return answers, scheduler


def executed(one: Side) -> Execute:
    def execute(out: SchedulerOutput) -> ModelRunnerOutput:
        result = one.runner.execute_model(out, {})
        assert result is not None
        return result

    return execute


def test_drafts_change_no_answer_and_are_checked_by_graphs() -> None:
    plain, _ = served(executed(side(graphed=False)))
    one = side(graphed=True)
    steps = one.runner._steps
    assert steps is not None
    steps._eager = lambda *_: pytest.fail("no step needs an eager pass")
    answers, scheduler = served(executed(one), Guesses(plain))
    assert answers == plain
    assert 10 < scheduler.num_accepted < scheduler.num_drafts


def test_without_drafts_a_request_that_may_have_some_is_started_ahead() -> None:
    plain, _ = served(executed(side(graphed=False)))
    passes = []
    for drafter in (None, Drafter(None, 3)):
        one = side(graphed=True)
        answers, scheduler = served(executed(one), drafter)
        assert answers == plain and scheduler.num_drafts == 0
        passes.append(one.model.passes)
    assert passes[0] == passes[1]


def test_a_prelaunched_row_is_used_beside_its_drafts() -> None:
    one = side(graphed=True)
    one.runner.execute_model(SchedulerOutput([request("1", 3), request("2", 5)], {}, {"1": 3, "2": 5}, []), {})
    before = one.model.passes
    out = SchedulerOutput([], {}, {"1": 3, "2": 1}, [], {"1": [50, 60]})
    one.runner.execute_model(out, {})
    # the drafts; and the next step, of the other request alone
    assert one.model.passes == before + 2
    steps = one.runner._steps
    assert steps is not None and steps._prelaunched is not None
    assert list(steps._prelaunched.rows) == ["2"]


def test_drafts_of_several_requests_whose_first_rows_are_there() -> None:
    plain, one = side(graphed=False), side(graphed=True)
    begin = SchedulerOutput([request("1", 3), request("2", 5)], {}, {"1": 3, "2": 5}, [])
    found = [plain.runner.execute_model(out, {}) for out in (begin, *2 * [decode(["1", "2"])])]
    right, after = ({} if result is None else result.sampled for result in found[1:])
    one.runner.execute_model(begin, {})
    drafts = {name: [token] for name, token in right.items()}
    checked = one.runner.execute_model(SchedulerOutput([], {}, {"1": 2, "2": 2}, [], drafts), {})
    assert checked is not None and checked.accepted == drafts and checked.sampled == after


@pytest.mark.parametrize("count", [1, 3, 17])
def test_a_mixed_step_launches_graphs_only(count: int) -> None:
    """One that decodes, and another whose prompt is longer than a tile."""
    one = side(graphed=True)
    steps = one.runner._steps
    assert steps is not None
    steps._eager = lambda *_: pytest.fail("no step needs an eager pass")
    one.runner.execute_model(SchedulerOutput([request("1", 3)], {}, {"1": 3}, []), {})
    before = one.model.passes
    one.runner.execute_model(SchedulerOutput([request("3", 17, blocks=6)], {}, {"1": 1, "3": count}, []), {})
    assert one.model.passes == before + 2, "the prompt, and the next step"


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
    ahead = GraphedSteps._start

    def start(self: GraphedSteps, *args: Any, **options: Any) -> None:
        events.append("next step")
        ahead(self, *args, **options)

    class Watched(PendingReadback):
        def __init__(self, tensors: list[torch.Tensor]) -> None:
            events.append(f"{len(tensors)} copied")
            super().__init__(tensors)

        def values(self) -> list[Any]:
            events.append("read")
            return super().values()

    monkeypatch.setattr(GraphedSteps, "_start", start)
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
    """A step of few requests holds their drafts too."""
    config = dataclasses.replace(ENGINE, max_num_seqs=limit)
    sizes = config.decode_graph_sizes
    assert sizes[0] == 1 and sizes[-1] == max(limit, 4) and sizes == sorted(set(sizes))
