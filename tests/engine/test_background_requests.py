"""Requests of batches run only while no live request runs or waits."""

from __future__ import annotations

from tests.support.fake_runner import FakeRunner, add_requests, make_request, make_scheduler


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
    assert runner.steps_to_the_end("live") <= 60
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
    add_requests(scheduler, "a", 4)
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
