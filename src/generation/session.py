"""The life of one request in the engine: admitted whole or not at all, streamed, closed once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from gptoss.engine.messages import AddRequest, TokenOutput
from gptoss.generation.errors import GenerationCancelledError, GenerationFailedError
from gptoss.generation.plan import Plan
from gptoss.harmony.deltas import Kind
from gptoss.prompt_builder import PromptTokens


class VisibleDelta(Protocol):
    @property
    def visible_kind(self) -> Kind | None:
        """What the client sees of it; None: nothing."""


D_co = TypeVar("D_co", bound=VisibleDelta, covariant=True)


class Choice(Protocol[D_co]):
    """Folds the outputs of one engine request. `finish_reason` is set with the last delta."""

    index: int
    finish_reason: str | None
    error: str | None
    num_tokens: int
    num_cached_tokens: int
    token_ids: list[int]

    @property
    def num_reasoning_tokens(self) -> int: ...

    @property
    def recoveries(self) -> Counter[str]: ...

    def feed(self, output: TokenOutput) -> Sequence[D_co]: ...


class EndedChoice(Protocol):
    """What the accounting reads of a choice."""

    @property
    def finish_reason(self) -> str | None: ...

    @property
    def error(self) -> str | None: ...

    @property
    def token_ids(self) -> list[int]: ...

    @property
    def recoveries(self) -> Counter[str]: ...


class Engine(Protocol):
    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]: ...

    def discard(self, request_id: str) -> None: ...


class Accounting(Protocol):
    """Rate limits, metrics and log of one request."""

    @property
    def is_cancelled(self) -> bool: ...

    def admit(self, plan: Plan) -> None:
        """Admits the plan, or raises if a limit refuses it."""

    def begin(self, plan: Plan) -> None: ...

    def arrived(self, output: TokenOutput, num_tokens: int) -> None: ...

    def shown(self, kind: Kind) -> None: ...

    def end(self, usage: Usage, choices: Sequence[EndedChoice], prompts: Sequence[list[int]]) -> None: ...


class LoopAccounting(Accounting, Protocol):
    """The accounting of an answer in several rounds."""

    def follow(self, request_ids: Sequence[str]) -> None:
        """Adds the engine requests of a later round."""

    def on_cancel(self, stop: Callable[[], None] | None) -> None:
        """Has `stop` called when the request is cancelled; None: no longer."""

    def take_tool_call(self) -> str | None:
        """Counts a tool call against the caller's limits; returns what refuses it, or None."""

    def tool_ended(self, tool: str, function: str, seconds: float, failure: str | None) -> None:
        """Counts, logs and traces a call of a tool. `failure`: its kind; None: it succeeded."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of all prompts and choices."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    num_reasoning_tokens: int


C = TypeVar("C", bound=Choice[VisibleDelta])
D = TypeVar("D", bound=VisibleDelta)
# Keeps the ids of an answer for when it comes back as history: the ids, the cache scope, the prompt before them
Remember = Callable[[Sequence[int], str, PromptTokens], None]


class Generation(Generic[C, D]):
    """An admitted request. Close it, or read `events` to the end; both may be done."""

    def __init__(
        self,
        plan: Plan,
        choices: Sequence[C],
        streams: Sequence[AsyncIterator[TokenOutput]],
        engine: Engine,
        accounting: Accounting,
        remember: Remember | None = None,
    ) -> None:
        self.plan, self.choices = plan, choices
        self._streams, self._engine = streams, engine
        self._accounting, self._remember = accounting, remember
        self._closed = False

    @property
    def usage(self) -> Usage:
        plan, choices = self.plan, self.choices
        cached = 0
        for index, ids in enumerate(plan.prompts):
            copies = choices[index * plan.num_choices : (index + 1) * plan.num_choices]
            # what one copy computes the others find: the prompt was computed by the one that found least
            cached += min(*(c.num_cached_tokens for c in copies), len(ids) - 1)
        return Usage(
            sum(map(len, plan.prompts)),
            cached,
            sum(c.num_tokens for c in choices),
            sum(c.num_reasoning_tokens for c in choices),
        )

    async def events(self) -> AsyncGenerator[list[tuple[C, Sequence[D]]], None]:
        """Deltas as they come, with all that is there already in one list. Closing it aborts what still runs.

        Raises GenerationFailedError or GenerationCancelledError, after the last deltas.
        """
        choices = self.choices
        try:
            async with contextlib.aclosing(interleave(self._streams)) as batches:
                async for batch in batches:
                    yield [
                        (choices[index], self._feed(choices[index], output))
                        for index, output in batch
                        if choices[index].finish_reason is None
                    ]
                    for choice in choices:
                        if choice.error is not None:
                            raise self._failure(choice.error)
                    if all(choice.finish_reason is not None for choice in choices):
                        return
        finally:
            self.close()

    def close(self) -> None:
        """Ends what still runs, and the accounting. Idempotent."""
        if self._closed:
            return
        self._closed = True
        plan, choices = self.plan, self.choices
        for request in plan.requests:
            self._engine.discard(request.request_id)
        self._accounting.end(self.usage, choices, plan.prompts)
        is_whole = all(choice.finish_reason not in (None, "error") for choice in choices)
        if self._remember is None or plan.prompt is None or plan.begins != "message" or not is_whole:
            return
        for choice in choices:
            self._remember(choice.token_ids, plan.cache_scope, plan.prompt)

    def _failure(self, error: str) -> GenerationFailedError:
        return GenerationCancelledError() if self._accounting.is_cancelled else GenerationFailedError(error)

    def _feed(self, choice: C, output: TokenOutput) -> Sequence[D]:
        before = choice.num_tokens
        deltas: Sequence[D] = choice.feed(output)  # type: ignore[assignment]
        self._accounting.arrived(output, choice.num_tokens - before)
        if choice.finish_reason is not None:  # by a stop string: the engine does not know
            self._engine.discard(self.plan.requests[choice.index].request_id)
        for delta in deltas:
            if delta.visible_kind is not None:
                self._accounting.shown(delta.visible_kind)
        return deltas


async def start(
    plan: Plan,
    choices: Sequence[C],
    engine: Engine,
    accounting: Accounting,
    remember: Remember | None = None,
) -> Generation[C, D]:
    """Admits every choice, or none. Raises EngineError, or what a limit raises."""
    accounting.admit(plan)
    try:
        streams = await engine.add_requests(plan.requests)
        accounting.begin(plan)
    except BaseException:  # also a cancellation
        for request in plan.requests:
            engine.discard(request.request_id)
        raise
    return Generation(plan, choices, streams, engine, accounting, remember)


Batch = list[tuple[int, TokenOutput]]


async def interleave(streams: Sequence[AsyncIterator[TokenOutput]]) -> AsyncGenerator[Batch, None]:
    """Outputs of several requests in order of arrival, all that wait at once."""
    if len(streams) == 1:
        async with contextlib.aclosing(streams[0]) as only:  # type: ignore[type-var]
            async for output in only:
                yield [(0, output)]
        return
    queue: asyncio.Queue[tuple[int, TokenOutput | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[TokenOutput]) -> None:
        try:
            async with contextlib.aclosing(stream):  # type: ignore[type-var]
                async for output in stream:
                    queue.put_nowait((index, output))
        finally:
            queue.put_nowait((index, None))

    tasks = [asyncio.create_task(pump(i, s)) for i, s in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            items = [await queue.get()]
            while not queue.empty():
                items.append(queue.get_nowait())
            running -= sum(output is None for _, output in items)
            batch = [(index, output) for index, output in items if output is not None]
            if batch:
                yield batch
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
