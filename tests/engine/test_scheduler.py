"""The control plane without a model: a fake runner samples, the invariants are checked after every step."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss.engine.core.kv_cache_manager import FULL_GROUP, NULL_BLOCK, SLIDING_GROUP
from gptoss.engine.core.request import RequestStatus
from gptoss.engine.messages import FinishReason, ModelRunnerOutput
from tests.support.fake_runner import WINDOW, FakeRunner, make_request, make_scheduler


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


def test_a_token_has_its_place_before_it_is_asked_for() -> None:
    scheduler = make_scheduler(lookahead=1)
    for name, prompt in (("a", 16), ("b", 31), ("c", 100)):
        scheduler.add_request(make_request(name, prompt, 40))
    runner = FakeRunner(scheduler)
    for _ in range(30):
        runner.step()
        for name, length in runner.lengths.items():
            assert runner.computed[name] < length - 1 or runner.num_slots(name) >= length
    assert runner.computed.keys() == {"a", "b", "c"}


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(4, 4096), (9, 33)])
def test_no_place_is_kept_for_a_token_that_never_comes(max_tokens: int, max_model_len: int) -> None:
    """The 33rd token is sampled and never computed: two blocks of 16 are enough."""
    scheduler = make_scheduler(lookahead=1, max_model_len=max_model_len)
    scheduler.add_request(make_request("a", 29, max_tokens))
    runner = FakeRunner(scheduler)
    for _ in range(4):
        runner.step()
        assert runner.num_slots("a") == 32
    assert not scheduler.has_requests() and len(runner.outputs["a"]) == 4


def test_a_request_starts_without_a_place_for_what_comes_after_where_there_is_none() -> None:
    """Six blocks: of two requests of 16 tokens the first gets two for each kind of layer, the second one."""
    scheduler = make_scheduler(num_blocks=7, lookahead=1, enable_prefix_caching=False)
    for name in ("a", "b"):
        scheduler.add_request(make_request(name, 16, 9))
    runner = FakeRunner(scheduler)
    assert list(runner.step().num_scheduled_tokens) == ["a", "b"]
    assert (runner.num_slots("a"), runner.num_slots("b")) == (32, 16)
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
