"""A scheduler and a runner without a model, which samples at random and checks what a worker relies on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from gptoss.engine.config import EngineConfig
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.kv_cache_manager import NULL_BLOCK, KVCacheManager
from gptoss.engine.core.request import Request
from gptoss.engine.core.scheduler import Scheduler
from gptoss.engine.messages import ModelRunnerOutput, SchedulerOutput
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.sampling_params import SamplingParams

STOP = 9
WINDOW = 128


def make_scheduler(
    num_blocks: int = 200, drafter: Drafter | None = None, lookahead: int = 0, **changes: Any
) -> Scheduler:
    options: dict[str, Any] = {
        "max_model_len": 4096,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": 16,
    } | changes
    config = EngineConfig(ModelConfig.from_json(hf_config(SIZES["nano"])), None, load_format="dummy", **options)
    kv = KVCacheManager(num_blocks, config.block_size, WINDOW, enable_prefix_caching=config.enable_prefix_caching)
    return Scheduler(config, kv, drafter=drafter, lookahead=lookahead)


def make_request(name: str, prompt: int | list[int] = 10, max_tokens: int = 5, **options: Any) -> Request:
    ids = prompt if isinstance(prompt, list) else [100 + i % 50 for i in range(prompt)]
    params = SamplingParams(max_tokens=max_tokens, seed=0, stop_token_ids=(STOP,), **options.pop("params", {}))
    return Request(name, list(ids), params, **options)


def add_requests(scheduler: Scheduler, tenant: str, count: int, max_tokens: int = 50) -> None:
    for i in range(count):
        prompt = [1000 * i + k for k in range(40)]
        scheduler.add_request(make_request(f"{tenant}{i}", prompt, max_tokens, tenant=tenant))


@dataclass
class FakeCache:
    """What the blocks hold: in each slot a number made from the token and all before it."""

    block_size: int
    slots: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, row) -> what was written last
    chains: dict[str, list[int]] = field(default_factory=dict)  # request -> the numbers of its tokens

    def extend(self, name: str, token_ids: list[int], salt: str = "") -> None:
        chain = self.chains.setdefault(name, [hash(salt)])
        for token in token_ids:
            chain.append(hash((chain[-1], token)))

    def copy(self, copies: list[tuple[int, int]]) -> None:
        sources, targets = {a for a, _ in copies}, [b for _, b in copies]
        assert len(set(targets)) == len(targets) and not sources & set(targets) and NULL_BLOCK not in sources
        for source, target in copies:
            for row in range(self.block_size):
                self.slots[target, row] = self.slots.get((source, row), -1)

    def write(self, name: str, table: list[int], start: int, end: int, num_known: int) -> None:
        chain = self.chains[name]
        for position in range(start, end):
            slot = table[position // self.block_size], position % self.block_size
            self.slots[slot] = chain[position + 1] if position < num_known else -1

    def check(self, name: str, table: list[int], start: int, end: int) -> None:
        chain = self.chains[name]
        for position in range(start, end):
            slot = table[position // self.block_size], position % self.block_size
            assert self.slots.get(slot) == chain[position + 1], f"{name}: position {position} is wrong"


@dataclass
class FakeRunner:
    """Checks that what the scheduler says fits together, as a worker would rely on it."""

    scheduler: Scheduler
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    stop_chance: float = 0.0
    lengths: dict[str, int] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    tables: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    ended: Counter[str] = field(default_factory=Counter)
    outputs: dict[str, list[int]] = field(default_factory=dict)
    num_copies: int = 0

    def __post_init__(self) -> None:
        self.cache = FakeCache(self.scheduler._config.block_size)

    def step(self) -> SchedulerOutput:
        """Schedules a step, makes up its tokens, and checks the invariants of both."""
        has_live = bool(self.scheduler.num_running or self.scheduler.num_waiting)
        out = self.scheduler.schedule()
        self._check_limits(out, has_live=has_live)
        self._apply(out)
        result = ModelRunnerOutput({}, {})
        writers: Counter[tuple[int, int]] = Counter()
        for name, count in out.num_scheduled_tokens.items():
            self._run_request(name, count, out, result, writers)
        assert all(n == 1 for n in writers.values()), "two requests write to one slot"
        for output in self.scheduler.update_from_output(out, result):
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            self.ended[output.request_id] += output.finish_reason is not None
        self.scheduler._kv.check_integrity()
        return out

    def _check_limits(self, out: SchedulerOutput, *, has_live: bool) -> None:
        """`has_live`: whether a live request ran or waited before the step."""
        scheduler = self.scheduler
        assert out.total_tokens <= scheduler._config.max_num_batched_tokens
        background = [name for name in out.num_scheduled_tokens if scheduler._requests[name].background]
        assert not background or (not has_live and len(background) == len(out.num_scheduled_tokens))
        assert sum(n for name, n in out.num_scheduled_tokens.items() if name in background and n > 1) <= 256
        assert len(out.num_scheduled_tokens) <= scheduler._config.max_num_seqs

    def _apply(self, out: SchedulerOutput) -> None:
        """Keeps tables and lengths as a worker does."""
        for name in out.finished_or_preempted_ids:
            self._write_ahead(name)
            del self.tables[name], self.cache.chains[name]
        self.cache.copy(out.block_copies)
        self.num_copies += len(out.block_copies)
        for new in out.new_requests:
            assert new.request_id not in self.tables
            self.cache.extend(new.request_id, new.token_ids, self.scheduler._requests[new.request_id].cache_salt)
            self.tables[new.request_id] = (list(new.block_ids[0]), list(new.block_ids[1]))
            self.lengths[new.request_id] = len(new.token_ids)
            self.computed[new.request_id] = new.num_computed_tokens
        for name, added in out.new_block_ids.items():
            for table, blocks in zip(self.tables[name], added, strict=True):
                table += blocks

    def _run_request(
        self,
        name: str,
        count: int,
        out: SchedulerOutput,
        result: ModelRunnerOutput,
        writers: Counter[tuple[int, int]],
    ) -> None:
        """Computes `count` tokens of a request; accepts some of its drafts, and samples after its last token."""
        assert count > 0
        start, end = self.computed[name], self.computed[name] + count
        self._check_table(name, start, end, writers)
        if name in {new.request_id for new in out.new_requests} or self.rng.random() < 0.1:
            self._check_contents(name, start)
        for table in self.tables[name]:
            self.cache.write(name, table, start, end, self.lengths[name])
        drafts = out.draft_tokens.get(name, [])
        right = drafts[: self.rng.randint(0, len(drafts))]
        self.computed[name] = end - len(drafts) + len(right)
        if end != self.lengths[name] + len(drafts):
            return
        if right:
            result.accepted[name] = right
        token = STOP if self.rng.random() < self.stop_chance else 100 + self.rng.randrange(50)
        result.sampled[name] = token
        self.lengths[name] += len(right) + 1
        self.cache.extend(name, [*right, token])
        for table in self.tables[name]:
            self.cache.write(name, table, start, self.computed[name], self.lengths[name])

    def _check_table(self, name: str, start: int, end: int, writers: Counter[tuple[int, int]]) -> None:
        size = self.scheduler._config.block_size
        full, sliding = self.tables[name]
        assert len(full) == len(sliding) >= -(-end // size)
        assert NULL_BLOCK not in full[: -(-end // size)]
        first_seen = max(0, start - WINDOW + 1)
        assert NULL_BLOCK not in sliding[first_seen // size : -(-end // size)]
        for table in (full, sliding):
            for position in range(start, end):
                writers[(table[position // size], position % size)] += 1

    def _check_contents(self, name: str, start: int) -> None:
        """All that the tokens from `start` on see in the cache is what they should see."""
        full, sliding = self.tables[name]
        self.cache.check(name, full, 0, start)
        self.cache.check(name, sliding, max(0, start - WINDOW + 1), start)

    def _write_ahead(self, name: str) -> None:
        """A step that was started before the request's end was known writes another token into its blocks."""
        if self.scheduler._lookahead and self.num_slots(name) > self.computed[name]:
            for table in self.tables[name]:
                self.cache.write(name, table, self.computed[name], self.computed[name] + 1, 0)

    def num_slots(self, name: str) -> int:
        """Tokens that the request's blocks hold."""
        return min(map(len, self.tables[name])) * self.scheduler._config.block_size

    def run(self, max_steps: int = 10_000) -> None:
        """Steps until no request is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError("requests never ended")

    def steps_to_the_end(self, name: str) -> int:
        for step in range(1, 2000):
            self.step()
            if self.ended[name]:
                return step
        raise AssertionError(f"{name} never ended")
