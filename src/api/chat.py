"""POST /v1/chat/completions: one generator of deltas, two renderers."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from gptoss.api.body import read_json_object
from gptoss.api.chat_plan import ChatPlan, plan_chat
from gptoss.api.choice import Choice, ChoiceDelta
from gptoss.api.continuation import start_parser
from gptoss.api.deps import Context, ServerContext, caller_of, counted_rejections, new_record, sender_of
from gptoss.api.errors import ApiError, Cancelled, EngineFailure
from gptoss.api.metrics import RequestRecord
from gptoss.api.openapi import json_body
from gptoss.api.protocol import ChatCompletionRequest
from gptoss.api.relaxations import relaxations
from gptoss.api.streaming import DONE, EventStream, JsonWhenDone, encode_event, interleave
from gptoss.api.unknown_fields import client_of
from gptoss.api.usage import Work
from gptoss.engine.messages import TokenOutput
from gptoss.harmony.deltas import Delta
from gptoss.harmony.layout import new_call_id
from gptoss.harmony.parser import ResponseParser

router = APIRouter()


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
        context.ledger.end(record, [c.finish_reason for c in self.choices], context.tags, error)
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
    context.ledger.begin(record, [request.request_id for request in plan.requests])
    return Answer(plan, context, choices, streams, record)


class DeltaWriter:
    """Deltas of one answer as the wire's objects: shared by the stream's chunks and the JSON body."""

    def __init__(self, plan: ChatPlan, reasoning_fields: tuple[str, ...]) -> None:
        self._plan = plan
        self._reasoning_fields = reasoning_fields

    def write(self, choice: Choice, delta: Delta) -> dict[str, Any] | None:
        """-> the `delta` object, None if there is nothing that the client wants."""
        if delta.channel is not None:
            return None
        if delta.kind == "content":
            return {"content": delta.text}
        if delta.kind == "reasoning":
            if not self._plan.include_reasoning:
                return None
            return dict.fromkeys(self._reasoning_fields, delta.text)
        if self._plan.tools.legacy:
            name = {"name": delta.tool_name} if delta.tool_name is not None else {}
            return {"function_call": {**name, "arguments": delta.text}}
        call: dict[str, Any] = {"index": delta.tool_index}
        if delta.tool_name is not None:
            before = choice.messages if delta.tool_index == 0 else ()
            call |= {"id": new_call_id(before), "type": "function"}
            call["function"] = {"name": delta.tool_name, "arguments": delta.text}
        else:
            call["function"] = {"arguments": delta.text}
        return {"tool_calls": [call]}

    def finish_reason(self, choice: Choice) -> str:
        reason = choice.finish_reason or "error"
        return "function_call" if reason == "tool_calls" and self._plan.tools.legacy else reason


def reasoning_fields(context: ServerContext) -> tuple[str, ...]:
    wanted = context.config.reasoning_fields
    return ("reasoning_content", "reasoning") if wanted == "both" else (wanted,)


# --- the stream ---


async def stream_events(answer: Answer) -> AsyncGenerator[bytes, None]:
    """Server-sent events, ready to send; tokens that arrived together leave together."""
    plan, context = answer.plan, answer.context
    writer = DeltaWriter(plan, reasoning_fields(context))
    head, tail = _chunk_frame(plan, context)
    finished: set[int] = set()
    try:
        yield b"".join(
            _chunk(head, tail, choice.index, {"role": "assistant", "content": ""}) for choice in answer.choices
        )
        async with contextlib.aclosing(answer.events()) as events:
            async for batch in events:
                parts = []
                for choice, deltas in batch:
                    for item in deltas:
                        written = writer.write(choice, item.delta)
                        if written is not None:
                            parts.append(_chunk(head, tail, choice.index, written, item.logprobs))
                    if choice.finish_reason == "error":
                        yield (b"".join(parts) + _error_event(answer.failure(choice)) + DONE)
                        return
                    if choice.finish_reason is not None and choice.index not in finished:
                        finished.add(choice.index)
                        reason = writer.finish_reason(choice)
                        if len(finished) == len(answer.choices):  # the answer's last chunk
                            closing = {"metadata": _metadata(plan, context), **relaxations(plan.relaxed)}
                            tail = b"," + encode_event(closing)[1:-1] + tail
                        parts.append(_chunk(head, tail, choice.index, {}, finish_reason=reason))
                if parts:
                    yield b"".join(parts)
        if plan.include_usage:
            yield head + b'],"usage":' + encode_event(answer.usage) + b"}\n\n"
        yield DONE
    finally:
        answer.close()


def _chunk_frame(plan: ChatPlan, context: ServerContext) -> tuple[bytes, bytes]:
    head: dict[str, Any] = {
        "id": plan.completion_id,
        "object": "chat.completion.chunk",
        "created": plan.created,
        "model": plan.model,
        "system_fingerprint": context.system_fingerprint,
    }
    if plan.service_tier is not None:
        head["service_tier"] = plan.service_tier
    tail = b',"usage":null}\n\n' if plan.include_usage else b"}\n\n"
    return b"data: " + encode_event(head)[:-1] + b',"choices":[', tail


def _chunk(
    head: bytes,
    tail: bytes,
    index: int,
    delta: dict[str, Any],
    logprobs: list[dict[str, Any]] | None = None,
    finish_reason: str | None = None,
) -> bytes:
    numbers = b"null" if not logprobs else encode_event({"content": logprobs, "refusal": None})
    reason = b"null" if finish_reason is None else b'"' + finish_reason.encode() + b'"'
    middle = b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]' % (
        index,
        encode_event(delta),
        numbers,
        reason,
    )
    return head + middle + tail


def _error_event(error: ApiError) -> bytes:
    return b"data: " + encode_event(error.body) + b"\n\n"


# --- the JSON body ---


async def collect(answer: Answer) -> bytes:
    """The same deltas, folded into one body. Raises EngineFailure."""
    plan, context = answer.plan, answer.context
    writer = DeltaWriter(plan, reasoning_fields(context))
    messages: list[dict[str, Any]] = [{"role": "assistant", "content": None, "refusal": None} for _ in answer.choices]
    logprobs: list[list[dict[str, Any]]] = [[] for _ in answer.choices]
    try:
        async with contextlib.aclosing(answer.events()) as events:
            async for batch in events:
                for choice, deltas in batch:
                    for item in deltas:
                        _fold(messages[choice.index], writer.write(choice, item.delta))
                        logprobs[choice.index] += item.logprobs or []
                    if choice.finish_reason == "error":
                        raise answer.failure(choice)
    finally:
        answer.close()
    body = {
        "id": plan.completion_id,
        "object": "chat.completion",
        "created": plan.created,
        "model": plan.model,
        "system_fingerprint": context.system_fingerprint,
        **({"service_tier": plan.service_tier} if plan.service_tier is not None else {}),
        "choices": [
            {
                "index": choice.index,
                "message": messages[choice.index],
                "logprobs": {"content": logprobs[choice.index], "refusal": None} if plan.logprobs else None,
                "finish_reason": writer.finish_reason(choice),
            }
            for choice in answer.choices
        ],
        "usage": answer.usage,
        "metadata": _metadata(plan, context),
        **relaxations(plan.relaxed),
    }
    return encode_event(body)


def _metadata(plan: ChatPlan, context: ServerContext) -> dict[str, str]:
    """What is loaded, and the profile that this request ran under."""
    return context.tags | {"profile": plan.profile.name}


def _fold(message: dict[str, Any], delta: dict[str, Any] | None) -> None:
    for key, value in (delta or {}).items():
        if key == "tool_calls":
            for call in value:
                if "id" in call:
                    message.setdefault("tool_calls", []).append({k: v for k, v in call.items() if k != "index"})
                else:
                    message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        elif key == "function_call":
            known = message.setdefault("function_call", {"name": "", "arguments": ""})
            for name, text in value.items():
                known[name] += text
        else:
            message[key] = (message.get(key) or "") + value


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest))
async def chat_completions(request: Request, context: Context) -> Response:
    record = new_record(request)
    with counted_rejections(context):
        body = await read_json_object(request, context)
        plan = await plan_chat(body, context, record.caller, sender_of(request), client=client_of(request))
        answer = await start_answer(plan, context, record)
    if plan.stream:
        return EventStream(stream_events(answer), answer.close, context.config)
    return JsonWhenDone(lambda: collect(answer), answer.close)


@router.post(
    "/v1/chat/completions/render", openapi_extra=json_body(ChatCompletionRequest)
)  # with debug_endpoints only: access.DEBUG
async def render(request: Request, context: Context) -> dict[str, Any]:
    """The prompt that a chat request becomes, for debugging: ids and text."""
    body = await read_json_object(request, context)
    plan = await plan_chat(body, context, caller_of(request), sender_of(request), client=client_of(request))
    ids = plan.prompt.token_ids
    return {
        "prompt": context.vocabulary.decode(ids),
        "prompt_token_ids": ids,
        "num_tokens": len(ids),
        "prompt_version": plan.prompt.version,
        "grammar": plan.requests[0].params.grammar,
    }
