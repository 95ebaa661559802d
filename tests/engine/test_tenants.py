"""How the scheduler shares steps and capacity among tenants, and orders requests by priority and age."""

from __future__ import annotations

from tests.support.fake_runner import FakeRunner, add_requests, make_request, make_scheduler


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


def test_many_requests_of_one_tenant_do_not_hold_up_another() -> None:
    scheduler = make_scheduler(max_num_seqs=4)
    runner = FakeRunner(scheduler)
    add_requests(scheduler, "a", 32)
    for _ in range(10):
        runner.step()
    assert scheduler.num_running == 4
    scheduler.add_request(make_request("b", 10, 5, tenant="b"))
    assert runner.steps_to_the_end("b") <= 6
    assert scheduler.num_preemptions == 1
    runner.run()
    assert all(len(tokens) == 50 for name, tokens in runner.outputs.items() if name != "b")


def test_tenants_share_the_requests_of_a_step_equally() -> None:
    scheduler = make_scheduler(max_num_seqs=6)
    runner = FakeRunner(scheduler)
    add_requests(scheduler, "a", 20)
    for _ in range(5):
        runner.step()
    add_requests(scheduler, "b", 20)
    add_requests(scheduler, "c", 1)
    for _ in range(20):
        runner.step()
    # c uses one of its two: the other one goes by arrival
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
    add_requests(scheduler, "a", 12, max_tokens=9)
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
    assert runner.steps_to_the_end("b") <= 8
    runner.run()
