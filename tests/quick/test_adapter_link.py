"""Loading an adapter, as the server sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from gptoss.engine.client.adapters import AdapterLink, Adapters
from gptoss.engine.client.errors import EngineDeadError, EngineError
from gptoss.engine.messages import Adapter, AdapterChanged, LoadAdapter, UnloadAdapter


class Names:
    def name_of(self, adapter_id: int) -> str:
        return f"adapter-{adapter_id}"


async def problem_of(event: Callable[[AdapterLink], None]) -> EngineError:
    """What `load` raises when `event` happens to the engine meanwhile."""
    sent: list[LoadAdapter | UnloadAdapter] = []
    link = AdapterLink(cast(Adapters, Names()), sent.append)
    load = asyncio.create_task(link.load(Adapter(1, "a", "/a", "digest")))
    await asyncio.sleep(0)
    assert len(sent) == 1
    event(link)
    with pytest.raises(EngineError) as raised:
        await load
    return raised.value


async def test_a_load_tells_a_bad_adapter_from_an_engine_that_died() -> None:
    """The first is the client's fault, a 400; the second is not, a 503."""
    bad = await problem_of(lambda link: link.changed(AdapterChanged(1, True, "a NaN")))
    assert type(bad) is EngineError and str(bad) == "a NaN"
    died = await problem_of(lambda link: link.engine_died("exit code -9"))
    assert type(died) is EngineDeadError and str(died) == "the engine died: exit code -9"
    dead = await problem_of(lambda link: link.engine_is_dead("the engine is dead"))
    assert type(dead) is EngineDeadError
