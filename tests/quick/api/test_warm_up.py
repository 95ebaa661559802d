"""The warm-up ends in time, and a slow model gets short prompts only."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss.api.ops import warm_up


def context() -> Any:
    async def wait_started() -> None:
        pass

    engine = SimpleNamespace(engines=[SimpleNamespace(is_ready=True)], wait_started=wait_started)
    return SimpleNamespace(engine=engine, config=SimpleNamespace(warm_up=True), warm=asyncio.Event())


async def test_it_is_over_in_time_whatever_the_engine_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def stuck(*_: Any, **__: Any) -> None:
        await asyncio.Event().wait()

    caplog.set_level("INFO")
    monkeypatch.setattr(warm_up, "_run", stuck)
    monkeypatch.setattr(warm_up, "LIMIT_S", 0.01)
    running = context()
    await warm_up.warm_up(running)
    assert running.warm.is_set() and "warmed up in part" in caplog.text


@pytest.mark.parametrize(("quick_s", "tokens"), [(-1.0, [4, 4]), (60.0, [4, 0, 0])])
async def test_a_slow_model_gets_short_prompts_only(
    monkeypatch: pytest.MonkeyPatch, quick_s: float, tokens: list[int]
) -> None:
    asked: list[tuple[int, int]] = []

    async def run(_: Any, engine: Any, tools: Any, num_tokens: int = 0, max_tokens: int = 4) -> None:
        asked.append((num_tokens, len(tools.tools)))

    monkeypatch.setattr(warm_up, "_run", run)
    monkeypatch.setattr(warm_up, "QUICK_S", quick_s)
    await warm_up.warm_up(context())
    assert [num_tokens for num_tokens, _ in asked] == tokens
    assert asked[-1][1] == 1, "the grammar compiler has run"
