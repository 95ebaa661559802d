"""Deltas as server-sent events, or as one JSON body."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from gptoss.api.chat.adapter import ChatPlan
from gptoss.api.chat.answer import Answer
from gptoss.api.context import ServerContext
from gptoss.api.http.errors import ApiError
from gptoss.api.http.sse import DONE, encode_event
from gptoss.api.relaxations import relaxations
from gptoss.generation.chat_output import Choice
from gptoss.harmony.deltas import Delta
from gptoss.harmony.layout import new_call_id


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
