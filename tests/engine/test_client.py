"""The engine process as the API process holds it. What is served through it is in tests/e2e."""

from __future__ import annotations

import asyncio
import multiprocessing

from src.engine.client import EngineClient
from tests.helpers import checkpoint, engine_config


def test_stopping_while_the_engine_process_starts_leaves_none_behind() -> None:
    async def start_and_stop() -> None:
        client = EngineClient(engine_config(checkpoint()))
        await client.start()
        await asyncio.sleep(0.001)  # a thread has begun to start the process
        await client.stop()
        await asyncio.sleep(0.5)

    asyncio.run(start_and_stop())
    assert not multiprocessing.active_children()
