"""The one life of a request: admitted whole or not at all, streamed, closed once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from gptoss.config.profiles import PROFILES
from gptoss.engine.messages import AddRequest, FinishReason, TokenOutput
from gptoss.engine.sampling_params import SamplingParams
from gptoss.generation.errors import GenerationCancelledError, GenerationFailedError
from gptoss.generation.plan import Plan
from gptoss.generation.session import Generation, start
from gptoss.generation.text_output import TextChoice, TextDelta, text_choices
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
A, B = VOCABULARY.encode("a"), VOCABULARY.encode("b")
STOP, LENGTH, ERROR, ABORT = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR, FinishReason.ABORT


def output(index: int, ids: list[int], reason: FinishReason | None = None, **more: Any) -> TokenOutput:
    return TokenOutput(f"r-{index}", ids, reason, **more)


@dataclass
class FakeEngine:
    outputs: dict[str, list[TokenOutput]] = field(default_factory=dict)  # those of "r-0" and so on
    admitted: list[str] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)
    failure: Exception | None = None
    is_slow: bool = False  # to admit the last request

    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]:
        for request in requests:
            if request is requests[-1] and self.is_slow:
                await asyncio.Event().wait()
            if request is requests[-1] and self.failure is not None:
                raise self.failure
            self.admitted.append(request.request_id)
        return [self._stream(request.request_id) for request in requests]

    async def _stream(self, name: str) -> AsyncIterator[TokenOutput]:
        for one in self.outputs.get(name, []):
            yield one
        await asyncio.Event().wait()

    def discard(self, request_id: str) -> None:
        self.discarded.append(request_id)

    @property
    def alive(self) -> set[str]:
        return set(self.admitted) - set(self.discarded)


@dataclass
class FakeAccounting:
    is_cancelled: bool = False
    refusal: Exception | None = None
    calls: list[Any] = field(default_factory=list)

    def admit(self, plan: Plan) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.calls.append("admit")

    def begin(self, plan: Plan) -> None:
        self.calls.append("begin")

    def arrived(self, output: TokenOutput, num_tokens: int) -> None:
        self.calls.append(num_tokens)

    def shown(self, kind: str) -> None:
        self.calls.append(kind)

    def end(self, usage: Any, choices: Any, prompts: Any) -> None:
        self.calls.append("end")


def plan_of(num_choices: int = 1, prompts: Sequence[list[int]] = (A * 3,), stop: Sequence[str] = ()) -> Plan:
    ids = [ids for ids in prompts for _ in range(num_choices)]
    requests = [AddRequest(f"r-{i}", ids[i], SamplingParams(max_tokens=9, seed=i)) for i in range(len(ids))]
    profile = PROFILES["balanced"]
    return Plan(
        request_id="r", profile=profile, requests=requests, num_choices=num_choices, has_max_tokens=True, stop=stop
    )


async def begin(
    plan: Plan, engine: FakeEngine, accounting: FakeAccounting | None = None
) -> Generation[TextChoice, TextDelta]:
    return await start(plan, text_choices(plan, VOCABULARY), engine, accounting or FakeAccounting())


async def texts(generation: Generation[TextChoice, TextDelta]) -> list[str]:
    out = [""] * len(generation.choices)
    async for batch in generation.events():
        for choice, deltas in batch:
            out[choice.index] += "".join(delta.text for delta in deltas)
    return out


async def test_all_choices_are_admitted_streamed_and_closed_once() -> None:
    engine = FakeEngine({"r-0": [output(0, A), output(0, B, STOP)], "r-1": [output(1, B, LENGTH)]})
    accounting = FakeAccounting()
    generation = await begin(plan_of(2), engine, accounting)
    assert await texts(generation) == ["ab", "b"]
    generation.close()
    assert [choice.finish_reason for choice in generation.choices] == ["stop", "length"]
    assert accounting.calls[:2] == ["admit", "begin"] and accounting.calls.count("end") == 1
    assert accounting.calls[-1] == "end" and not engine.alive


@pytest.mark.parametrize("failure", [ValueError("full")])
async def test_a_refused_choice_leaves_none_behind(failure: Exception) -> None:
    engine, accounting = FakeEngine(failure=failure), FakeAccounting()
    with pytest.raises(ValueError, match="full"):
        await begin(plan_of(3), engine, accounting)
    assert engine.admitted == ["r-0", "r-1"] and not engine.alive
    assert "begin" not in accounting.calls


async def test_a_cancelled_admission_leaves_no_choice_behind() -> None:
    engine = FakeEngine(is_slow=True)
    task = asyncio.create_task(begin(plan_of(3), engine))
    await asyncio.sleep(0.01)
    assert engine.admitted == ["r-0", "r-1"]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not engine.alive


async def test_what_a_limit_refuses_never_reaches_the_engine() -> None:
    engine = FakeEngine()
    with pytest.raises(LookupError):
        await begin(plan_of(), engine, FakeAccounting(refusal=LookupError()))
    assert not engine.admitted


async def test_a_stop_string_discards_its_choice_at_once() -> None:
    engine = FakeEngine({"r-0": [output(0, [*A, *B, *A])], "r-1": []})
    generation = await begin(plan_of(2, stop=["b"]), engine)
    events = generation.events()
    ((choice, deltas),) = await anext(events)
    assert (choice.finish_reason, [delta.text for delta in deltas]) == ("stop", ["a"])
    assert engine.alive == {"r-1"}
    await events.aclose()
    assert not engine.alive


@pytest.mark.parametrize(
    ("reason", "is_cancelled", "error"),
    [(ERROR, False, GenerationFailedError), (ABORT, True, GenerationCancelledError)],
)
async def test_a_failure_is_raised_after_the_last_deltas(
    reason: FinishReason, is_cancelled: bool, error: type[Exception]
) -> None:
    engine = FakeEngine({"r-0": [output(0, A), output(0, B, reason, error="no memory")], "r-1": []})
    generation = await begin(plan_of(2), engine, FakeAccounting(is_cancelled))
    seen = ""
    with pytest.raises(error, match="cancelled" if is_cancelled else "no memory"):
        async for batch in generation.events():
            seen += "".join(delta.text for _, deltas in batch for delta in deltas)
    assert seen == "ab" and not engine.alive


async def test_usage_counts_each_prompt_once_and_every_choice() -> None:
    plan = plan_of(2, [A * 3, B * 5])
    cached = (1, 2, 9, 9)  # the second copy finds what the first computed; an engine that starts again may find all
    outputs = {f"r-{i}": [output(i, A * 2, STOP, num_cached_tokens=cached[i])] for i in range(4)}
    generation = await begin(plan, FakeEngine(outputs))
    await texts(generation)
    usage = generation.usage
    assert (usage.num_prompt_tokens, usage.num_completion_tokens) == (8, 8)
    assert (usage.num_cached_tokens, usage.num_reasoning_tokens) == (1 + 4, 0)
