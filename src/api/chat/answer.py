"""One chat request that runs: all of its choices, from admission to the end."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from gptoss.api.access.usage import Work
from gptoss.api.chat.adapter import ChatPlan
from gptoss.api.chat.continuation import start_parser
from gptoss.api.context import ServerContext
from gptoss.api.http.errors import ApiError, Cancelled, EngineFailure
from gptoss.api.http.sse import interleave
from gptoss.api.telemetry.request_record import RequestRecord
from gptoss.engine.messages import TokenOutput
from gptoss.generation.chat_output import Choice, ChoiceDelta
from gptoss.harmony.parser import ResponseParser


@dataclass(slots=True)
class Answer:
    """A chat request on its way through the engine."""

    plan: ChatPlan
    context: ServerContext
    choices: list[Choice]
    streams: list[AsyncIterator[TokenOutput]]
    record: RequestRecord
    closed: bool = field(default=False)

    @property
    def usage(self) -> dict[str, Any]:
        prompt = len(self.plan.prompt.token_ids)
        completion = sum(c.num_completion_tokens for c in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {
                "cached_tokens": min(max(c.num_cached_tokens for c in self.choices), prompt - 1),
                "audio_tokens": 0,
            },
            "completion_tokens_details": {
                "reasoning_tokens": sum(c.parser.num_reasoning_tokens for c in self.choices),
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    async def events(self) -> AsyncGenerator[list[tuple[Choice, list[ChoiceDelta]]], None]:
        """Deltas as they come, with all that is there already in one list. Closing it aborts what still runs."""
        try:
            if len(self.streams) == 1:
                async with contextlib.aclosing(self.streams[0]) as stream:  # type: ignore[type-var]
                    async for output in stream:
                        yield [self._feed(self.choices[0], output)]
                        if self.choices[0].finish_reason is not None:
                            return
            else:
                async with contextlib.aclosing(interleave(self.streams)) as batches:
                    async for batch in batches:
                        yield [
                            self._feed(self.choices[i], output)
                            for i, output in batch
                            if self.choices[i].finish_reason is None
                        ]
                        if all(choice.finish_reason is not None for choice in self.choices):
                            return
        finally:
            self.close()

    def close(self) -> None:
        """Ends what still runs and closes the books on this request. Idempotent."""
        if self.closed:
            return
        self.closed = True
        for request in self.plan.requests:
            self.context.engine.discard(request.request_id)
        record = self.record
        record.num_prompt_tokens = len(self.plan.prompt.token_ids)
        record.num_reasoning_tokens = sum(c.parser.num_reasoning_tokens for c in self.choices)
        record.num_cached_tokens = max(c.num_cached_tokens for c in self.choices)
        context = self.context
        if context.config.log_content:
            decode = context.vocabulary.decode
            record.shown_prompt = decode(self.plan.prompt.token_ids)
            record.shown_answer = "\n".join(decode(c.token_ids) for c in self.choices)
        error = next((c.error for c in self.choices if c.error is not None), None)
        context.tracker.end(record, [c.finish_reason for c in self.choices], context.tags, error)
        for choice in self.choices:
            if record.outcome == "ok" and self.plan.begins == "message":
                plan = self.plan
                context.prompt_builder.remember(choice.token_ids, plan.cache_scope, after=plan.prompt)
            context.metrics.recovered(choice.parser.recoveries)

    def failure(self, choice: Choice) -> ApiError:
        if self.record.cancelled:
            return Cancelled()
        return EngineFailure(choice.error or "the engine failed")

    def _feed(self, choice: Choice, output: TokenOutput) -> tuple[Choice, list[ChoiceDelta]]:
        record = self.record
        if output.token_ids:
            record.tokens_arrived(len(output.token_ids))
        if output.queue_s is not None and record.queue_s is None:
            record.queue_s, record.prefill_s = output.queue_s, output.prefill_s
        deltas = choice.feed(output)
        if choice.finish_reason is not None:
            # by a stop string: the engine knows of none
            self.context.engine.discard(self.plan.requests[choice.index].request_id)
        for item in deltas:
            if not item.delta.text and item.delta.tool_name is None:
                continue
            if item.delta.kind == "reasoning":
                record.first_reasoning = record.first_reasoning or record.last_token
            else:
                record.first_content = record.first_content or record.last_token
        return choice, deltas


async def start_answer(
    plan: ChatPlan, context: ServerContext, record: RequestRecord, *, joins_messages: bool = True
) -> Answer:
    """Admits every choice, or none. `joins_messages`: see Choice. Raises EngineError or RateLimited."""
    if record.allowance is not None:
        work = Work(
            num_choices=len(plan.requests),
            num_prompt_tokens=len(plan.prompt.token_ids),
            max_tokens=sum(request.params.max_tokens for request in plan.requests),
            names_max_tokens=plan.names_max_tokens,
        )
        context.access.usage.admit(record.allowance, work)
    streams = await context.engine.add_requests(plan.requests)
    bytes_of = context.vocabulary.bytes_of if plan.logprobs else None
    choices = [
        Choice(
            index,
            start_parser(ResponseParser(context.vocabulary, plan.tool_names), plan.begins),
            plan.stop,
            bytes_of,
            stop_on_calls_after=plan.max_calls,
            joins_messages=joins_messages,
        )
        for index in range(len(plan.requests))
    ]
    record.completion_id, record.profile, record.stream = (plan.completion_id, plan.profile.name, plan.stream)
    context.tracker.begin(record, [request.request_id for request in plan.requests])
    return Answer(plan, context, choices, streams, record)
