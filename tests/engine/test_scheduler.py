"""The control plane without a model: a fake runner samples, the invariants are checked after every step."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss.engine.config import EngineConfig
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.kv_cache_manager import FULL_GROUP, NULL_BLOCK, SLIDING_GROUP, KVCacheManager
from gptoss.engine.core.request import Request, RequestStatus
from gptoss.engine.core.scheduler import Scheduler
from gptoss.engine.messages import FinishReason, ModelRunnerOutput, SchedulerOutput
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


@dataclass
class FakeCache:
    """What the blocks hold: of each token's place, a number made from the token and all before it."""

    block_size: int
    places: dict[tuple[int, int], int] = field(default_factory=dict)  # (block, row) -> what was written last
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
                self.places[target, row] = self.places.get((source, row), -1)

    def write(self, name: str, table: list[int], start: int, end: int, num_known: int) -> None:
        chain = self.chains[name]
        for position in range(start, end):
            place = table[position // self.block_size], position % self.block_size
            self.places[place] = chain[position + 1] if position < num_known else -1

    def check(self, name: str, table: list[int], start: int, end: int) -> None:
        chain = self.chains[name]
        for position in range(start, end):
            place = table[position // self.block_size], position % self.block_size
            assert self.places.get(place) == chain[position + 1], f"{name}: position {position} is wrong"


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
        scheduler = self.scheduler
        has_live = bool(scheduler.num_running or scheduler.num_waiting)
        out = scheduler.schedule()
        assert out.total_tokens <= scheduler._config.max_num_batched_tokens
        background = [name for name in out.num_scheduled_tokens if scheduler._requests[name].background]
        assert not background or (not has_live and len(background) == len(out.num_scheduled_tokens))
        assert sum(n for name, n in out.num_scheduled_tokens.items() if name in background and n > 1) <= 256
        assert len(out.num_scheduled_tokens) <= scheduler._config.max_num_seqs
        for name in out.finished_or_preempted_ids:
            self._write_ahead(name)
            del self.tables[name], self.cache.chains[name]
        self.cache.copy(out.block_copies)
        self.num_copies += len(out.block_copies)
        for new in out.new_requests:
            assert new.request_id not in self.tables
            self.cache.extend(new.request_id, new.token_ids, scheduler._requests[new.request_id].cache_salt)
            self.tables[new.request_id] = (list(new.block_ids[0]), list(new.block_ids[1]))
            self.lengths[new.request_id] = len(new.token_ids)
            self.computed[new.request_id] = new.num_computed_tokens
        for name, added in out.new_block_ids.items():
            for table, blocks in zip(self.tables[name], added, strict=True):
                table += blocks
        sampled: dict[str, int] = {}
        accepted: dict[str, list[int]] = {}
        writers: Counter[tuple[int, int]] = Counter()
        for name, count in out.num_scheduled_tokens.items():
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
            if end == self.lengths[name] + len(drafts):
                if right:
                    accepted[name] = right
                sampled[name] = STOP if self.rng.random() < self.stop_chance else 100 + self.rng.randrange(50)
                self.lengths[name] += len(right) + 1
                self.cache.extend(name, [*right, sampled[name]])
                for table in self.tables[name]:
                    self.cache.write(name, table, start, self.computed[name], self.lengths[name])
        assert all(n == 1 for n in writers.values()), "two requests write to one place"
        for output in scheduler.update_from_output(out, ModelRunnerOutput(sampled, {}, accepted=accepted)):
            self.outputs.setdefault(output.request_id, []).extend(output.token_ids)
            self.ended[output.request_id] += output.finish_reason is not None
        scheduler._kv.check_integrity()
        return out

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
        if self.scheduler._lookahead and places(self, name) > self.computed[name]:
            for table in self.tables[name]:
                self.cache.write(name, table, self.computed[name], self.computed[name] + 1, 0)

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_requests():
                return
            self.step()
        raise AssertionError("requests never ended")


def test_one_request_runs_to_its_length() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("a", 100, 5))
    runner = FakeRunner(scheduler)
    runner.run()
    assert len(runner.outputs["a"]) == 5
    assert runner.ended == {"a": 1}
    assert scheduler._kv.usage == 0


def test_decoding_goes_before_a_long_prompt() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("short", 10, 50))
    runner = FakeRunner(scheduler)
    runner.step()
    scheduler.add_request(make_request("long", 1000, 5))
    for _ in range(10):
        scheduler._live.running.reverse()  # preempted requests come back in any order
        out = runner.step()
        assert out.num_scheduled_tokens["short"] == 1
        assert out.num_scheduled_tokens["long"] == 63


def test_stop_tokens_end_unless_ignored_or_too_early() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("stops", 10, 20))
    scheduler.add_request(make_request("ignores", 10, 20, params={"ignore_eos": True}))
    scheduler.add_request(make_request("late", 10, 20, params={"min_tokens": 7}))
    scheduler.add_request(make_request("over", 10, 20, params={"min_tokens": 7, "grammar": "g"}))
    runner = FakeRunner(scheduler, stop_chance=1.0)
    runner.run()
    assert {name: len(tokens) for name, tokens in runner.outputs.items()} == {
        "stops": 1,
        "ignores": 20,
        "late": 7,
        "over": 1,
    }


def test_a_request_ends_where_the_positions_end() -> None:
    scheduler = make_scheduler(max_model_len=64)
    scheduler.add_request(make_request("a", 60, 100))
    runner = FakeRunner(scheduler)
    runner.run()
    assert len(runner.outputs["a"]) == 4


def test_equal_prompts_share_blocks_and_skip_work() -> None:
    scheduler = make_scheduler()
    runner = FakeRunner(scheduler)
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, 100, 1))
        runner.run()
    third = make_request("c", 100, 1)
    scheduler.add_request(third)
    out = runner.step()
    assert third.num_cached_tokens == 99
    assert out.num_scheduled_tokens == {"c": 1}
    assert scheduler._kv.num_hit_tokens == 2 * 99


def test_choices_of_one_prompt_share_it_although_they_arrive_together() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=512)
    runner = FakeRunner(scheduler)
    for i in range(4):
        scheduler.add_request(make_request(f"c{i}", 100, 5))
    assert list(runner.step().num_scheduled_tokens) == ["c0"]
    second = runner.step()
    assert second.num_scheduled_tokens == {"c0": 1, "c1": 1, "c2": 1, "c3": 1}
    owned = {b for owned in scheduler._kv._owned.values() for b in owned.groups[FULL_GROUP]}
    assert len(owned) == 6 + 4  # six full blocks once, and a last one for each
    runner.run()


def test_a_salt_separates_and_switching_off_disables() -> None:
    for options, salt in (({}, "x"), ({"enable_prefix_caching": False}, "")):
        scheduler = make_scheduler(**options)
        runner = FakeRunner(scheduler)
        scheduler.add_request(make_request("a", 100, 1))
        runner.run()
        other = make_request("b", 100, 1, cache_salt=salt)
        scheduler.add_request(other)
        runner.run()
        assert other.num_cached_tokens == 0


def test_a_long_history_hits_only_with_its_last_window() -> None:
    """The sliding group keeps 128 tokens: a prefix is found at its end, where the window's blocks still are."""
    scheduler = make_scheduler(num_blocks=400)
    runner = FakeRunner(scheduler)
    ids = list(range(1000, 1600))
    scheduler.add_request(make_request("a", ids, 1))
    runner.run()
    longer = make_request("b", [*ids, *range(100)], 1)
    scheduler.add_request(longer)
    runner.run()
    assert longer.num_cached_tokens == 600


def test_sliding_blocks_behind_the_window_are_given_back() -> None:
    scheduler = make_scheduler(num_blocks=400, max_num_batched_tokens=32)
    scheduler.add_request(make_request("a", 2000, 50))
    runner = FakeRunner(scheduler)
    for _ in range(70):
        runner.step()
    owned = scheduler._kv._owned["a"].groups
    assert sum(b != NULL_BLOCK for b in owned[FULL_GROUP]) == 126
    assert sum(b != NULL_BLOCK for b in owned[SLIDING_GROUP]) <= (WINDOW + 32) // 16 + 2


def places(runner: FakeRunner, name: str) -> int:
    """Tokens that the request's blocks hold."""
    return min(map(len, runner.tables[name])) * runner.scheduler._config.block_size


def test_a_token_has_its_place_before_it_is_asked_for() -> None:
    scheduler = make_scheduler(lookahead=1)
    for name, prompt in (("a", 16), ("b", 31), ("c", 100)):
        scheduler.add_request(make_request(name, prompt, 40))
    runner = FakeRunner(scheduler)
    for _ in range(30):
        runner.step()
        for name, length in runner.lengths.items():
            assert runner.computed[name] < length - 1 or places(runner, name) >= length
    assert runner.computed.keys() == {"a", "b", "c"}


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(4, 4096), (9, 33)])
def test_no_place_is_kept_for_a_token_that_never_comes(max_tokens: int, max_model_len: int) -> None:
    """The 33rd token is sampled and never computed: two blocks of 16 are enough."""
    scheduler = make_scheduler(lookahead=1, max_model_len=max_model_len)
    scheduler.add_request(make_request("a", 29, max_tokens))
    runner = FakeRunner(scheduler)
    for _ in range(4):
        runner.step()
        assert places(runner, "a") == 32
    assert not scheduler.has_requests() and len(runner.outputs["a"]) == 4


def test_a_request_starts_without_a_place_for_what_comes_after_where_there_is_none() -> None:
    """Six blocks: of two requests of 16 tokens the first gets two for each kind of layer, the second one."""
    scheduler = make_scheduler(num_blocks=7, lookahead=1, enable_prefix_caching=False)
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, 16, 9))
    runner = FakeRunner(scheduler)
    assert list(runner.step().num_scheduled_tokens) == ["a", "b"]
    assert (places(runner, "a"), places(runner, "b")) == (32, 16)
    runner.run()
    assert runner.ended == {"a": 1, "b": 1}


def test_preempted_requests_come_back_and_give_the_same_tokens() -> None:
    scheduler = make_scheduler(num_blocks=40, max_num_seqs=4)
    runner = FakeRunner(scheduler)
    for name in "abcd":
        scheduler.add_request(make_request(name, list(range(ord(name) * 1000, ord(name) * 1000 + 60)), 100))
    runner.run()
    assert scheduler.num_preemptions > 0
    assert runner.ended == dict.fromkeys("abcd", 1)
    assert all(len(tokens) == 100 for tokens in runner.outputs.values())


def test_priority_is_a_head_start_and_ageing_ends_it() -> None:
    scheduler = make_scheduler(max_num_seqs=1, priority_ageing_s=5.0)
    scheduler.add_request(make_request("old", arrival=0.0, priority=0))
    scheduler.add_request(make_request("urgent", arrival=4.0, priority=-1))
    scheduler.add_request(make_request("later", arrival=6.0, priority=-1))
    runner = FakeRunner(scheduler)
    order: list[str] = []
    while scheduler.has_requests():
        order += [n for n in runner.step().num_scheduled_tokens if n not in order]
    assert order == ["urgent", "old", "later"]


@pytest.mark.parametrize("steps", [0, 1, 3, 12])
def test_abort_at_any_moment_frees_everything(steps: int) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for name in "abc":
        scheduler.add_request(make_request(name, 200, 50))
    runner = FakeRunner(scheduler)
    for _ in range(steps):
        runner.step()
    assert {r.request_id for r in scheduler.finish_requests(["a", "b", "c", "unknown"])} == {"a", "b", "c"}
    assert scheduler.finish_requests(["a"]) == []
    assert not scheduler.has_requests()
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (0, 0, 0)
    scheduler._kv.check_integrity()
    assert scheduler._kv.usage == 0
    assert not runner.step().num_scheduled_tokens
    assert runner.tables == {}


def test_a_failed_request_leaves_the_others_alone() -> None:
    scheduler = make_scheduler()
    for name in "ab":
        scheduler.add_request(make_request(name, 10, 3))
    out = scheduler.schedule()
    outputs = scheduler.update_from_output(out, ModelRunnerOutput({"a": 100}, {}, {"b": "bad"}))
    assert [(o.request_id, o.finish_reason) for o in outputs] == [("a", None), ("b", FinishReason.ERROR)]
    assert "b" not in scheduler
    scheduler._kv.check_integrity()


@given(
    data=st.data(),
    num_blocks=st.integers(24, 80),
    seqs=st.integers(1, 6),
    batched=st.integers(8, 64),
    lookahead=st.integers(0, 1),
    tenants=st.sampled_from(["a", "ab", "aaab", "abcde"]),
    background=st.sampled_from([0.0, 0.5, 0.9]),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_arrives_every_request_ends_once(
    data: st.DataObject, num_blocks: int, seqs: int, batched: int, lookahead: int, tenants: str, background: float
) -> None:
    batched = max(batched, seqs)
    scheduler = make_scheduler(
        num_blocks=num_blocks, max_num_seqs=seqs, max_num_batched_tokens=batched, lookahead=lookahead
    )
    limit = min(400, scheduler._kv.max_request_tokens(batched))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    runner = FakeRunner(scheduler, rng, stop_chance=0.05)
    added: list[str] = []
    aborted: set[str] = set()
    for _ in range(data.draw(st.integers(1, 150))):
        action = rng.random()
        if action < 0.35:
            name = f"r{len(added)}"
            added.append(name)
            prompt = rng.randrange(1, max(2, limit - 1))
            shared = list(range(500, 500 + prompt)) if rng.random() < 0.5 else rng.choices(range(50, 90), k=prompt)
            room = max(1, min(60, limit - prompt))
            scheduler.add_request(
                make_request(
                    name,
                    shared,
                    rng.randrange(1, room + 1),
                    priority=rng.randrange(-3, 3),
                    tenant=rng.choice(tenants),
                    background=rng.random() < background,
                )
            )
        elif action < 0.45 and added:
            aborted |= {r.request_id for r in scheduler.finish_requests([rng.choice(added)])}
        else:
            runner.step()
    runner.run()
    assert {name: runner.ended[name] + (name in aborted) for name in added} == dict.fromkeys(added, 1)
    assert scheduler._kv.usage == 0
    runner.step()
    assert runner.tables == {}


# --- tenants ---


def _steps_to_the_end(runner: FakeRunner, name: str) -> int:
    for step in range(1, 2000):
        runner.step()
        if runner.ended[name]:
            return step
    raise AssertionError(f"{name} never ended")


def _many(scheduler: Scheduler, tenant: str, count: int, max_tokens: int = 50) -> None:
    for i in range(count):
        prompt = [1000 * i + k for k in range(40)]
        scheduler.add_request(make_request(f"{tenant}{i}", prompt, max_tokens, tenant=tenant))


def test_many_requests_of_one_tenant_do_not_hold_up_another() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    runner = FakeRunner(scheduler)
    _many(scheduler, "a", 32)
    for _ in range(10):
        runner.step()
    assert scheduler.num_running == 4
    scheduler.add_request(make_request("b", 10, 5, tenant="b"))
    assert _steps_to_the_end(runner, "b") <= 6
    assert scheduler.num_preemptions == 1
    runner.run()
    assert all(len(tokens) == 50 for name, tokens in runner.outputs.items() if name != "b")


def test_tenants_share_the_places_of_a_step_equally() -> None:
    scheduler = make_scheduler(max_num_seqs=6)
    runner = FakeRunner(scheduler)
    _many(scheduler, "a", 20)
    for _ in range(5):
        runner.step()
    _many(scheduler, "b", 20)
    _many(scheduler, "c", 1)
    for _ in range(20):
        runner.step()
    # c wants one place of its two: what it leaves goes by arrival
    assert scheduler._live.running_of == {"a": 3, "b": 2, "c": 1}
    preempted = scheduler.num_preemptions
    for _ in range(20):
        runner.step()
    assert scheduler.num_preemptions == preempted, "shares do not change, so nothing is preempted"
    runner.run()
    assert not scheduler._live.running_of


def test_priority_counts_within_a_share_and_between_tenants_below_theirs() -> None:
    scheduler = make_scheduler(max_num_seqs=1, priority_ageing_s=5.0)
    for name, tenant, priority in (("a0", "a", 0), ("a1", "a", -1), ("b0", "b", -2)):
        scheduler.add_request(make_request(name, 10, 2, arrival=0.0, tenant=tenant, priority=priority))
    runner = FakeRunner(scheduler)
    order: list[str] = []
    while scheduler.has_requests():
        order += [n for n in runner.step().num_scheduled_tokens if n not in order]
    assert order == ["b0", "a1", "a0"]


def test_one_tenant_alone_is_never_preempted_for_its_share() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    runner = FakeRunner(scheduler)
    _many(scheduler, "a", 12, max_tokens=9)
    runner.run()
    assert scheduler.num_preemptions == 0


def test_a_tenants_long_prompts_leave_another_its_part_of_the_step() -> None:
    scheduler = make_scheduler(max_num_seqs=8, max_num_batched_tokens=64)
    runner = FakeRunner(scheduler)
    for i in range(3):
        prompt = [5000 * i + k for k in range(900)]
        scheduler.add_request(make_request(f"a{i}", prompt, 2, tenant="a"))
    runner.step()
    scheduler.add_request(make_request("b", list(range(90_000, 90_100)), 1, tenant="b"))
    assert _steps_to_the_end(runner, "b") <= 8
    runner.run()


def test_requests_past_their_deadline_are_known() -> None:
    scheduler = make_scheduler()
    scheduler.add_request(make_request("late", deadline=10.0))
    scheduler.add_request(make_request("early", deadline=30.0))
    scheduler.add_request(make_request("patient"))
    assert [r.request_id for r in scheduler.expired(20.0)] == ["late"]


def test_status_follows_the_request() -> None:
    scheduler = make_scheduler()
    request = make_request("a", 10, 1)
    scheduler.add_request(request)
    assert request.status is RequestStatus.WAITING
    scheduler.schedule()
    assert request.status is RequestStatus.RUNNING
    scheduler.finish_requests(["a"])
    assert request.status is RequestStatus.FINISHED


# --- background requests ---


def test_background_requests_pause_while_a_live_one_runs_and_keep_their_blocks() -> None:
    scheduler = make_scheduler()
    runner = FakeRunner(scheduler)
    for name in ("b0", "b1"):
        scheduler.add_request(make_request(name, 40, 50, background=True))
    for _ in range(6):
        runner.step()
    computed, tables = dict(runner.computed), {name: runner.tables[name] for name in ("b0", "b1")}
    scheduler.add_request(make_request("live", [7] * 30, 5))
    for _ in range(5):
        assert list(runner.step().num_scheduled_tokens) == ["live"]
        assert (scheduler.num_running, scheduler.num_background_running) in ((1, 2), (0, 2))
    assert runner.ended == {"live": 1} | dict.fromkeys(["b0", "b1"], 0)
    assert {name: runner.computed[name] for name in ("b0", "b1")} == computed
    assert list(runner.step().num_scheduled_tokens) == ["b0", "b1"]
    assert {name: runner.tables[name] for name in ("b0", "b1")} == tables
    assert scheduler.num_background_preemptions == 0
    runner.run()
    assert all(len(tokens) == 50 for name, tokens in runner.outputs.items() if name != "live")


def test_a_live_request_takes_the_blocks_of_paused_ones_when_it_needs_them() -> None:
    scheduler = make_scheduler(num_blocks=40, enable_prefix_caching=False)
    runner = FakeRunner(scheduler)
    for i in range(4):
        scheduler.add_request(make_request(f"b{i}", [1000 * i + k for k in range(60)], 10, background=True))
    while scheduler.num_background_waiting:
        runner.step()
    scheduler.add_request(make_request("live", 60, 60))
    assert list(runner.step().num_scheduled_tokens) == ["live"]
    assert _steps_to_the_end(runner, "live") <= 60
    assert 0 < scheduler.num_background_preemptions < 4
    assert scheduler.num_preemptions == 0
    runner.run()
    assert runner.ended == dict.fromkeys(["live", "b0", "b1", "b2", "b3"], 1)
    assert {len(tokens) for name, tokens in runner.outputs.items() if name != "live"} == {10}


def test_paused_requests_take_no_place_of_live_ones() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    runner = FakeRunner(scheduler)
    for i in range(8):
        scheduler.add_request(make_request(f"b{i}", 20, 50, background=True))
    for _ in range(10):
        runner.step()
    _many(scheduler, "a", 4)
    for _ in range(5):
        out = runner.step()
    assert set(out.num_scheduled_tokens) == {"a0", "a1", "a2", "a3"}
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 0)
    assert (scheduler.num_background_running, scheduler.num_background_waiting) == (4, 4)


def test_a_step_of_background_requests_computes_few_prompt_tokens() -> None:
    scheduler = make_scheduler(max_num_batched_tokens=2048, num_blocks=2000)
    runner = FakeRunner(scheduler)
    scheduler.add_request(make_request("b0", 10, 50, background=True))
    runner.step()
    for i in range(2):
        scheduler.add_request(make_request(f"long{i}", [1000 * i + k for k in range(1000)], 2, background=True))
    out = runner.step()
    assert out.num_scheduled_tokens == {"b0": 1, "long0": 256}
    out = runner.step()
    assert out.num_scheduled_tokens == {"b0": 1, "long0": 256}
    scheduler.add_request(make_request("live", [7] * 1500, 1))
    assert runner.step().num_scheduled_tokens == {"live": 1500}
    runner.run()


def test_priority_and_age_do_not_lift_a_background_request() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add_request(make_request("b", 10, 3, background=True, priority=-100, arrival=-1e6))
    runner = FakeRunner(scheduler)
    for i in range(5):
        scheduler.add_request(make_request(f"live{i}", 10, 3, priority=100))
    order: list[str] = []
    while scheduler.has_requests():
        order += [n for n in runner.step().num_scheduled_tokens if n not in order]
    assert order == ["live0", "live1", "live2", "live3", "live4", "b"]
