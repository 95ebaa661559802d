"""Answers in several rounds: generate, run the tools that were called, append their results, continue.

A ToolLoop is what a Generation is to a renderer, with ToolEvents among its deltas. Each round's prompt is the one
before, what was generated after it, and the results, token by token, so that the prefix cache holds all but the last
block of it. The rounds know no wire format; tools are reached through tool_types.ToolRunner.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from gptoss.engine.client.errors import EngineError
from gptoss.generation.call_runner import CallRunner
from gptoss.generation.chat_output import ChatChoice, ChatDelta, make_choice
from gptoss.generation.errors import GenerationCancelledError, GenerationError, GenerationFailedError
from gptoss.generation.hosted import Approved, HostedCall, HostedTools, ToolEvent
from gptoss.generation.plan import Plan, Round
from gptoss.generation.planner import derived_seed
from gptoss.generation.round_prompt import Answered, next_prompt
from gptoss.generation.round_reader import AnswerDelta, LoopChoice, RoundReader
from gptoss.generation.session import EndedChoice, Engine, Generation, LoopAccounting, Remember, Usage, start
from gptoss.generation.tool_run import text_for_model
from gptoss.generation.tool_types import AnswerFilter
from gptoss.harmony.vocabulary_files import Vocabulary

Batch = list[tuple[LoopChoice, Sequence[AnswerDelta]]]
# Plans the request again with the results of approved calls, by their origin
Replan = Callable[[Mapping[str, str]], Awaitable[Plan]]
NO_USAGE = Usage(0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class Runtime:
    """What every round is run with."""

    vocabulary: Vocabulary
    engine: Engine
    accounting: LoopAccounting
    remember: Remember
    max_model_len: int
    joins_messages: bool = True  # see ChatChoice


class ToolLoop:
    """An admitted request whose answer may take several rounds. Close it, or read `events` to the end."""

    def __init__(self, plan: Plan, tools: HostedTools, runtime: Runtime, replan: Replan | None = None) -> None:
        self.plan, self.choices = plan, [LoopChoice()]
        self._tools, self._runtime, self._replan = tools, runtime, replan
        self._choice = self.choices[0]
        self._reader = RoundReader(self._choice, tools.by_name, self._new_filters)
        self._generation: Generation[ChatChoice, ChatDelta] | None = None
        self._usage = NO_USAGE  # of the rounds before
        self._calls = CallRunner(tools, runtime.accounting)
        self._approved: Sequence[Approved] = ()
        self._closed = False

    @property
    def usage(self) -> Usage:
        """The sum over all rounds: a prompt counts again in each, with what the cache held of it."""
        return self._usage if self._generation is None else _sum(self._usage, self._generation.usage)

    async def begin(self, approved: Sequence[Approved] = ()) -> None:
        """Admits the request, and starts the first round unless approved calls come before it.

        Raises EngineError, or what a limit raises.
        """
        if not approved:
            await self._start(self.plan, is_first=True)
            return
        self._approved = approved
        self._runtime.accounting.admit(self.plan)
        self._runtime.accounting.begin(self.plan)

    async def events(self) -> AsyncGenerator[Batch, None]:
        """Deltas as they come. Closing it stops what runs.

        Raises GenerationFailedError or GenerationCancelledError, after the last deltas.
        """
        try:
            async with contextlib.aclosing(self._events()) as batches:
                async for batch in batches:
                    yield batch
        except GenerationFailedError as error:
            self._choice.fail(str(error))
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Ends the round that runs, the sessions and the accounting. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._generation is not None:
            self._generation.close()
        tools = self._tools
        tools.chain.finish(self.plan.request_id if tools.keeps_sessions else None, tools.named)
        prompts = self.plan.prompts if self._generation is None else self._generation.plan.prompts
        self._runtime.accounting.end(self.usage, self.choices, prompts)

    async def _events(self) -> AsyncGenerator[Batch, None]:
        if self._approved:
            async with contextlib.aclosing(self._run_approved()) as events:
                async for event in events:
                    yield [(self._choice, [event])]
        while self._choice.finish_reason is None:
            async with contextlib.aclosing(self._round()) as batches:
                async for batch in batches:
                    yield batch

    async def _round(self) -> AsyncGenerator[Batch, None]:
        """One round: what is generated, then what it called."""
        choice, reader, generation = self._choice, self._reader, self._generation
        assert generation is not None
        inner = generation.choices[0]
        async with contextlib.aclosing(generation.events()) as batches:
            async for batch in batches:
                read = [event for _, deltas in batch for event in reader.read(inner, deltas)]
                if inner.finish_reason is not None and inner.error is None:
                    read += reader.end_round(is_whole=inner.finish_reason in ("stop", "tool_calls"))
                    choice.finish_reason = self._finish_reason(inner)
                if read or choice.finish_reason is not None:
                    yield [(choice, read)]
        if choice.finish_reason is not None:
            return
        calls = [call for call in reader.calls if not call.needs_approval]
        async with contextlib.aclosing(self._calls.run(calls)) as events:
            async for event in events:
                yield [(choice, [event])]
        if reader.num_client_calls or any(call.needs_approval for call in reader.calls):
            choice.finish_reason = "tool_calls"
        else:
            await self._continue(generation)
        if choice.finish_reason is not None:
            yield [(choice, ())]

    def _finish_reason(self, inner: ChatChoice) -> str | None:
        """How the answer ends with this round; None if it continues."""
        runs = any(not call.needs_approval for call in self._reader.calls)
        return None if inner.finish_reason == "tool_calls" and runs else inner.finish_reason

    async def _continue(self, before: Generation[ChatChoice, ChatDelta]) -> None:
        """Starts the next round, or ends the answer if no token is left for it."""
        plan, inner = before.plan, before.choices[0]
        assert plan.prompt is not None
        ids = await asyncio.to_thread(
            next_prompt,
            plan.prompts[0],
            inner.token_ids,
            [_answered(call) for call in self._reader.calls],
            self._runtime.vocabulary,
            self._runtime.max_model_len,
        )
        this = self._next_round()
        max_tokens = min(this.params.max_tokens - self._choice.num_tokens, self._runtime.max_model_len - len(ids))
        if max_tokens < 1:
            self._choice.finish_reason = "length"
            return
        number, first = len(self._choice.rounds), self.plan.requests[0]
        params = msgspec.structs.replace(
            this.params, max_tokens=max_tokens, seed=derived_seed(self.plan.params.seed, number)
        )
        request = msgspec.structs.replace(
            first, request_id=f"{self.plan.request_id}-r{number}", token_ids=ids, params=params
        )
        await self._start(
            replace(
                plan,
                requests=[request],
                prompt=replace(plan.prompt, token_ids=ids),
                begins="message",
                tool_names=this.tool_names,
                custom_names=this.custom_names,
            ),
            inner,
        )

    def _next_round(self) -> Round:
        rounds = self.plan.rounds
        assert rounds is not None
        return rounds.answering if self._calls.are_over else rounds.calling

    async def _start(self, plan: Plan, after: ChatChoice | None = None, *, is_first: bool = False) -> None:
        """Starts a round. `after`: the one before."""
        runtime = self._runtime
        begun = after.parser.kinds_with_text if after is not None else ()
        choice = make_choice(plan, 0, runtime.vocabulary, joins_messages=runtime.joins_messages, begun=begun)
        accounting = _RoundAccounting(runtime.accounting, is_first=is_first)
        if not is_first and runtime.accounting.is_cancelled:
            raise GenerationCancelledError
        try:
            generation: Generation[ChatChoice, ChatDelta] = await start(
                plan, [choice], runtime.engine, accounting, runtime.remember
            )
        except EngineError as error:
            if is_first:
                raise
            raise GenerationFailedError(str(error)) from error
        self._usage = self.usage
        self._generation = generation
        self._choice.rounds.append(choice)
        self._reader.begin_round()

    async def _run_approved(self) -> AsyncGenerator[ToolEvent, None]:
        """Runs the calls of an earlier answer, and plans this one with their results."""
        calls: list[HostedCall] = []
        for one in self._approved:
            call = self._reader.new_call(one.name)
            call.text, call.approval_id = one.text, one.approval_id
            calls.append(call)
            yield ToolEvent(call, "begun")
            yield ToolEvent(call, "text", one.text)
            yield ToolEvent(call, "whole")
        async with contextlib.aclosing(self._calls.run(calls)) as events:
            async for event in events:
                yield event
        texts = {one.origin: _answered(call).text for one, call in zip(self._approved, calls, strict=True)}
        assert self._replan is not None
        try:
            plan = await self._replan(texts)
        except GenerationError as error:
            raise GenerationFailedError(error.message) from error
        await self._start(plan)

    def _new_filters(self) -> list[AnswerFilter]:
        tools = self._tools.by_name.values()
        runners = {tool.runner.name: tool.runner for tool in tools}
        named = {tool.runner.name: tool.session_id for tool in tools if tool.session_id is not None}
        return self._tools.chain.answer_filters(runners.values(), named)


async def start_loop(
    plan: Plan,
    tools: HostedTools,
    runtime: Runtime,
    approved: Sequence[Approved] = (),
    replan: Replan | None = None,
) -> ToolLoop:
    """Admits a request and starts its first round, or the calls that have been approved.

    `replan`: with `approved`. Raises EngineError, or what a limit raises; nothing is left open then.
    """
    loop = ToolLoop(plan, tools, runtime, replan)
    try:
        await loop.begin(approved)
    except BaseException:
        tools.chain.finish(None)
        raise
    return loop


def _answered(call: HostedCall) -> Answered:
    assert call.result is not None
    is_builtin = call.tool.runner.namespace is not None
    return Answered(call.name, is_builtin, text_for_model(call.result))


def _sum(one: Usage, other: Usage) -> Usage:
    return Usage(
        one.num_prompt_tokens + other.num_prompt_tokens,
        one.num_cached_tokens + other.num_cached_tokens,
        one.num_completion_tokens + other.num_completion_tokens,
        one.num_reasoning_tokens + other.num_reasoning_tokens,
    )


class _RoundAccounting:
    """The accounting of one round: the loop begins and ends that of the request."""

    def __init__(self, whole: LoopAccounting, *, is_first: bool) -> None:
        self._whole, self._is_first = whole, is_first
        self.arrived, self.shown = whole.arrived, whole.shown

    @property
    def is_cancelled(self) -> bool:
        return self._whole.is_cancelled

    def admit(self, plan: Plan) -> None:
        if self._is_first:
            self._whole.admit(plan)

    def begin(self, plan: Plan) -> None:
        if self._is_first:
            self._whole.begin(plan)
        else:
            self._whole.follow([request.request_id for request in plan.requests])

    def end(self, usage: Usage, choices: Sequence[EndedChoice], prompts: Sequence[list[int]]) -> None:
        """Does nothing: the loop ends the accounting."""
