"""Threads for long work, shared out among callers, and left when the client has gone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from gptoss.api.http.errors import RateLimited
from gptoss.api.http.sender import Sender
from gptoss.api.http.work_pool import MAX_WAITING, ClientGone, WorkPool


class Gate:
    """Work that begins, and ends when it may."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.open = threading.Event()

    def work(self, name: str) -> Callable[[Callable[[], bool]], str]:
        def run(stopped: Callable[[], bool]) -> str:
            self.begun.append(name)
            while not self.open.is_set() and not stopped():
                time.sleep(0.001)
            self.ended.append(name)
            return name

        return run

    async def wait_begun(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.begun) < count:
                await asyncio.sleep(0.001)


def test_results_and_errors_come_back() -> None:
    async def scenario() -> None:
        pool = WorkPool()
        assert await pool.run(Sender("a"), lambda _: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await pool.run(Sender("a"), lambda _: 1 // 0)
        pool.close()

    asyncio.run(scenario())


def test_no_owner_takes_all_threads_and_owners_take_turns() -> None:
    async def scenario() -> None:
        pool, gate = WorkPool(num_threads=3, share=2), Gate()
        tasks = [asyncio.create_task(pool.run(Sender("a"), gate.work(f"a{i}"))) for i in range(5)]
        await gate.wait_begun(2)
        await asyncio.sleep(0.02)
        assert sorted(gate.begun) == ["a0", "a1"]
        tasks += [asyncio.create_task(pool.run(Sender("b"), gate.work(f"b{i}"))) for i in range(3)]
        await gate.wait_begun(3)
        assert gate.begun[-1] == "b0"
        gate.open.set()
        assert await asyncio.gather(*tasks) == [*(f"a{i}" for i in range(5)), "b0", "b1", "b2"]
        assert gate.begun.index("b1") < gate.begun.index("a4")
        pool.close()

    asyncio.run(scenario())


def _leaving(after: asyncio.Event) -> Any:
    async def receive() -> dict[str, str]:
        await after.wait()
        return {"type": "http.disconnect"}

    return receive


def test_a_client_that_leaves_ends_its_work_whether_it_runs_or_waits() -> None:
    async def scenario() -> None:
        pool, gate, leaves = WorkPool(num_threads=1, share=1), Gate(), asyncio.Event()
        tasks = [
            asyncio.create_task(pool.run(Sender("a", 0, _leaving(leaves)), gate.work(name)))
            for name in ("runs", "waits")
        ]
        stays = asyncio.create_task(pool.run(Sender("a"), gate.work("stays")))
        await gate.wait_begun(1)
        leaves.set()
        for task in tasks:
            with pytest.raises(ClientGone):
                await task
        await gate.wait_begun(2)
        assert gate.begun == ["runs", "stays"] and gate.ended == ["runs"]
        stays.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stays
        async with asyncio.timeout(5):
            while len(gate.ended) < 2:
                await asyncio.sleep(0.001)
        assert await pool.run(Sender("a"), lambda _: 1) == 1, "its thread is free again"
        pool.close()

    asyncio.run(scenario())


def test_an_owner_has_only_so_many_jobs_waiting() -> None:
    async def scenario() -> None:
        pool, gate = WorkPool(num_threads=2, share=1), Gate()
        many = [asyncio.create_task(pool.run(Sender("a"), gate.work("a"))) for _ in range(MAX_WAITING + 1)]
        await asyncio.sleep(0)
        with pytest.raises(RateLimited, match="long inputs of this key"):
            await pool.run(Sender("a"), gate.work("one too many"))
        gate.open.set()
        assert await pool.run(Sender("b"), gate.work("b")) == "b"
        await asyncio.gather(*many)
        pool.close()

    asyncio.run(scenario())
