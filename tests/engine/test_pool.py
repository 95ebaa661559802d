"""Several engines as the API process holds them. Their processes are in tests/e2e/test_data_parallel.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
import pytest

from gptoss.engine.block_hash import extend_hashes
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import EngineDeadError, EngineError, QueueFullError
from gptoss.engine.client.pool import EnginePool
from gptoss.engine.client.router import REQUEST_TOKENS
from gptoss.engine.client.supervisor import EngineState, RestartPolicy
from gptoss.engine.client.totals import added_ready, added_stats
from gptoss.engine.messages import (
    AbortRequests,
    AddRequest,
    AddRequests,
    EngineStats,
    FinishReason,
    Outputs,
    Ready,
    ToEngine,
    TokenOutput,
)
from gptoss.engine.sampling_params import LogitBias, SamplingParams
from tests.support.helpers import checkpoint, engine_config

READY = Ready("float32", "cpu", 1000, 1, 1, 4096, "reference", 0.1, 1)
PARAMS = SamplingParams(max_tokens=5, seed=0)


class FakeEngine(EngineClient):
    """An engine without a process: a test sends what the process would, and reads what it would get."""

    def __init__(self, number: int, policy: RestartPolicy, **settings: Any) -> None:
        super().__init__(engine_config(checkpoint(), **settings), policy, number=number)
        self._link.close()
        self.sent: list[ToEngine] = []
        self._link.send = self._record  # type: ignore[method-assign]

    def _record(self, message: ToEngine) -> None:
        self.sent.append(msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToEngine))

    def added(self) -> list[AddRequest]:
        """The requests it got since the last call."""
        found = [m for m in self.sent if isinstance(m, AddRequest)]
        found += [r for m in self.sent if isinstance(m, AddRequests) for r in m.requests]
        self.sent.clear()
        return found

    def becomes_ready(self) -> None:
        self._link.has_ended = False
        self._handle(READY)

    def dies(self, *, finally_: bool = False) -> None:
        self.state = EngineState.DEAD if finally_ else EngineState.RESTARTING
        self.failure = "exit code -9"
        self._ready_event.clear()
        self._hand_over("the engine died: exit code -9")
        if finally_:
            self._ready_event.set()

    def says(self, request_id: str, *token_ids: int, reason: FinishReason | None = None, **stats: int) -> None:
        self._handle(Outputs([TokenOutput(request_id, list(token_ids), reason)], EngineStats(**stats)))


def run(test: Callable[[EnginePool, list[FakeEngine]], Awaitable[None]], count: int = 2, **settings: Any) -> None:
    """Runs a test with ready engines that let a request continue twice."""

    async def inner() -> None:
        policy = RestartPolicy(max_resumes=2, ready_wait_s=0.05)
        fakes = [FakeEngine(number, policy, **settings) for number in range(count)]
        pool = EnginePool(fakes)
        for fake in fakes:
            fake.becomes_ready()
        await test(pool, fakes)

    asyncio.run(inner())


def request(name: str, token_ids: list[int] | None = None, **fields: Any) -> AddRequest:
    return AddRequest(name, token_ids or [1, 2], PARAMS, **fields)


async def rest_of(outputs: AsyncIterator[TokenOutput]) -> tuple[list[int], TokenOutput]:
    """-> all token ids, the last output."""
    ids: list[int] = []
    async for output in outputs:
        ids += output.token_ids
    return ids, output


def test_hashes_are_computed_once_and_are_those_of_the_kv_cache_manager() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        ids = list(range(150))
        await pool.add_requests([request(f"r{i}", ids, cache_salt="s") for i in range(2)])
        added = [r for fake in fakes for r in fake.added()]
        expected: list[bytes] = []
        extend_hashes(expected, ids, 150 // pool.config.block_size, pool.config.block_size, "s")
        assert len(added) == 2 and all(r.block_hashes == expected for r in added)

    run(test)


def test_without_a_prefix_cache_there_are_no_hashes() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        await pool.add_requests([request(str(i), list(range(150))) for i in range(4)])
        added = [fake.added() for fake in fakes]
        assert [len(requests) for requests in added] == [2, 2] and not added[0][0].block_hashes

    run(test, enable_prefix_caching=False)


def test_requests_are_spread_by_load_and_follow_their_prefix() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        first, second = list(range(200)), list(range(500, 700))
        await pool.add_request(request("a1", first))
        await pool.add_request(request("b1", second))
        assert [r.request_id for r in fakes[0].added()] == ["a1"]
        assert [r.request_id for r in fakes[1].added()] == ["b1"]
        for fake, name in zip(fakes, ("a1", "b1"), strict=True):
            fake.says(name, 5, reason=FinishReason.STOP)
        for turn in range(2, 5):
            await pool.add_request(request(f"b{turn}", [*second, turn]))
            await pool.add_request(request(f"a{turn}", [*first, turn]))
            fakes[0].says(f"a{turn}", 5, reason=FinishReason.STOP)
            fakes[1].says(f"b{turn}", 5, reason=FinishReason.STOP)
        assert [r.request_id for r in fakes[0].added()] == ["a2", "a3", "a4"]
        assert [r.request_id for r in fakes[1].added()] == ["b2", "b3", "b4"]

    run(test)


def test_choices_with_one_bias_share_it_on_each_engine() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        params = msgspec.structs.replace(PARAMS, logit_bias=LogitBias.of({7: 1.0}))
        await pool.add_requests([AddRequest(f"r{i}", [1, 2], params) for i in range(4)])
        for fake in fakes:
            (group,) = fake.sent
            assert isinstance(group, AddRequests) and len(group.requests) == 2

    run(test)


def test_all_are_admitted_or_none_and_the_limits_are_for_all_engines() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        with pytest.raises(QueueFullError, match="1 requests are waiting already"):
            await pool.add_requests([request(str(i)) for i in range(6)])
        assert not pool.num_active and not any(fake.sent for fake in fakes)
        await pool.add_requests([request(str(i)) for i in range(5)])
        assert sorted(fake.num_active for fake in fakes) == [2, 3]
        with pytest.raises(QueueFullError):
            await pool.add_request(request("one more"))
        await pool.add_request(request("another tenant's", tenant="b"))
        fakes[0].dies(finally_=True)
        with pytest.raises(QueueFullError):
            await pool.add_request(request("b2", tenant="b"))

    run(test, max_num_seqs=2, max_num_waiting=1)


def test_requests_of_a_dead_engine_continue_on_another_where_they_were() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        ids = list(range(200))
        outputs = await pool.add_request(request("a", ids))
        fakes[0].says("a", 11, 12)
        fakes[0].sent.clear()
        fakes[0].dies()
        assert fakes[1].streams.num_unstarted == 0, "it has begun"
        (moved,) = fakes[1].added()
        assert moved.token_ids == ids and moved.output_ids == [11, 12] and len(moved.block_hashes) == 200 // 16
        fakes[0].says("a", 99)  # what the dead one had still sent
        fakes[1].says("a", 13, reason=FinishReason.STOP)
        assert (await rest_of(outputs))[0] == [11, 12, 13]
        assert pool.num_resumed == 1 and pool.num_active == 0
        fakes[0].becomes_ready()
        assert not fakes[0].added(), "nothing is answered twice"
        await pool.add_request(request("next turn", [*ids, 7]))
        assert fakes[1].num_active == 1, "the first engine's cache is gone"
        assert [fake.streams.num_unstarted for fake in fakes] == [0, 1]

    run(test)


def test_requests_wait_for_the_first_engine_that_is_back() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        await pool.add_requests([request(str(i)) for i in range(4)])
        for fake in fakes:
            fake.dies()
        assert pool.num_active == 4 and pool.state is EngineState.RESTARTING and not pool.is_ready
        with pytest.raises(EngineError, match="none was ready within"):
            await pool.add_request(request("new"))
        for fake in fakes:
            fake.added()
        assert [fake.num_active for fake in fakes] == [0, 4]
        fakes[0].becomes_ready()
        assert sorted(r.request_id for r in fakes[0].added()) == ["0", "1", "2", "3"]
        fakes[1].becomes_ready()
        assert not fakes[1].added()

    run(test)


def test_a_request_may_survive_only_so_many_deaths() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        outputs = await pool.add_request(request("a"))
        for number in (0, 1, 0):
            fakes[number].dies()
            fakes[number].becomes_ready()
        last = (await rest_of(outputs))[1]
        assert last.finish_reason is FinishReason.ERROR and last.error == "the engine died: exit code -9"

    run(test)


def test_an_engine_that_was_given_up_leaves_its_requests_to_the_others() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        first, second = await pool.add_requests([request("a"), request("b")])
        fakes[0].dies(finally_=True)
        assert pool.state is EngineState.READY and pool.serves
        assert sorted(r.request_id for r in fakes[1].added()) == ["a", "b"]
        await pool.wait_ready()
        fakes[1].dies(finally_=True)
        assert pool.state is EngineState.DEAD
        for outputs in (first, second):
            assert (await rest_of(outputs))[1].finish_reason is FinishReason.ERROR
        with pytest.raises(EngineDeadError, match="engine 0: exit code -9; engine 1: exit code -9"):
            await pool.add_request(request("c"))

    run(test)


def test_requests_of_an_engine_that_was_given_up_wait_for_one_that_restarts() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        outputs = await pool.add_request(request("a"))
        [home] = [number for number, fake in enumerate(fakes) if fake.num_active]
        fakes[home].says("a", 5)
        fakes[1 - home].dies()
        fakes[home].dies(finally_=True)
        assert [fakes[home].num_active, fakes[1 - home].num_active] == [0, 1]
        assert not fakes[1 - home].added(), "sent when it is ready"
        fakes[1 - home].becomes_ready()
        assert [r.output_ids for r in fakes[1 - home].added()] == [[5]]
        fakes[1 - home].says("a", 6, reason=FinishReason.STOP)
        assert (await rest_of(outputs))[0] == [5, 6]

    run(test)


def test_new_requests_avoid_an_engine_that_is_silent() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        fakes[0]._watch._last_message -= 60
        await pool.add_requests([request(str(i)) for i in range(4)])
        assert [fake.num_active for fake in fakes] == [0, 4]
        assert pool.serves and pool.stall is None and fakes[0].stall is not None
        fakes[1]._watch._last_message -= 60
        assert not pool.serves and pool.stall is not None
        await pool.add_request(request("no better"))

    run(test)


def test_cancelling_and_leaving_find_the_engine_after_a_move() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        first, second = await pool.add_requests([request("a"), request("b")])
        fakes[0].dies()
        fakes[1].added()
        assert pool.abort("a") and not pool.abort("unknown")
        assert fakes[1].sent == [AbortRequests(["a"])]
        fakes[1].says("a", reason=FinishReason.ABORT)
        assert (await rest_of(first))[1].finish_reason is FinishReason.ABORT
        fakes[1].says("b", 5)
        async for _ in second:
            break
        await second.aclose()  # type: ignore[attr-defined]
        assert fakes[1].sent[-1] == AbortRequests(["b"]) and not pool.num_active

    run(test)


def test_a_waiting_request_moves_to_an_engine_with_room() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        outputs = await pool.add_requests([request(str(i)) for i in range(6)])
        mine = [[r.request_id for r in fake.added()] for fake in fakes]
        assert [len(names) for names in mine] == [3, 3]
        for name in mine[0][:2]:
            fakes[0].says(name, 7, num_running=2, num_waiting=1)
        for name in mine[1][:2]:
            fakes[1].says(name, 7, num_running=2, num_waiting=1)
        assert not fakes[0].sent and not fakes[1].sent, "neither has room"
        for name in mine[1]:
            fakes[1].says(name, 8, reason=FinishReason.STOP)
        assert fakes[0].sent == [AbortRequests([mine[0][2]])]
        (moved,) = fakes[1].added()
        assert moved.request_id == mine[0][2]
        fakes[0].says(moved.request_id, reason=FinishReason.ABORT)  # the first engine's last word on it
        fakes[1].says(moved.request_id, 9, reason=FinishReason.STOP)
        assert await rest_of(outputs[int(moved.request_id)]) == (
            [9],
            TokenOutput(moved.request_id, [9], FinishReason.STOP),
        )

    run(test, max_num_seqs=2)


def test_a_background_request_moves_to_an_engine_without_live_ones() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        await pool.add_requests([request(f"b{i}", background=True) for i in range(4)])
        assert [fake.streams.num_background for fake in fakes] == [2, 2]
        await pool.add_requests([request("live")])
        assert [fake.streams.num_live for fake in fakes] == [1, 0], "background requests weigh nothing for live ones"
        for fake in fakes:
            fake.sent.clear()
        fakes[0].says("live", 7, num_running=1, num_background_waiting=2)
        assert fakes[0].sent == [AbortRequests(["b2"])]
        assert [r.request_id for r in fakes[1].added()] == ["b2"]
        await pool.add_request(request("live too"))
        fakes[0].says("live", 7, num_running=1, num_background_waiting=1)
        assert [r.request_id for r in fakes[1].added()] == ["live too"], "both have live requests now"

    run(test)


def test_a_cached_prompt_is_light() -> None:
    async def test(pool: EnginePool, fakes: list[FakeEngine]) -> None:
        long, other = list(range(3000)), list(range(5000, 5100))
        await pool.add_request(request("warm", long))
        fakes[0].says("warm", 5, reason=FinishReason.STOP)
        await pool.add_request(request("again", [*long, 7]))
        assert fakes[0].streams.num_uncached_tokens < 100 < REQUEST_TOKENS
        await pool.add_request(request("other", other))
        await pool.add_request(request("third", [9] * 100))
        assert [fake.num_active for fake in fakes] == [2, 1]

    run(test)


def test_figures_of_several_engines() -> None:
    first = EngineStats(num_running=1, num_free_blocks=50, num_blocks=100, kv_usage=0.5, last_step_s=0.2)
    second = EngineStats(num_running=2, num_free_blocks=100, num_blocks=100, kv_usage=0.0, last_step_s=0.1)
    both = added_stats([first, second])
    assert (both.num_running, both.num_blocks, both.kv_usage, both.last_step_s) == (3, 200, 0.25, 0.2)
    assert added_stats([EngineStats(), EngineStats()]).kv_usage == 0
    shorter = msgspec.structs.replace(READY, max_model_len=128, load_s=3.0)
    ready = added_ready([READY, shorter])
    assert (ready.num_blocks, ready.max_model_len, ready.load_s) == (2000, 128, 3.0)
