"""An answer as chat completions: server-sent events, or one JSON body."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss.api.context import ServerContext
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.errors import from_generation
from gptoss.api.http.sse import DONE, encode_event
from gptoss.api.telemetry.relaxations import relaxations
from gptoss.generation.chat_output import ChatDelta
from gptoss.generation.errors import GenerationFailedError
from gptoss.generation.hosted import ToolEvent
from gptoss.generation.plan import Plan
from gptoss.generation.round_reader import Answer, AnswerChoice, AnswerDelta
from gptoss.generation.tool_run import text_for_model
from gptoss.harmony.deltas import Delta
from gptoss.harmony.layout import new_call_id


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A request's plan, and how its answer is to be written."""

    plan: Plan
    created: int
    model: str  # as the client wrote it
    include_usage: bool
    include_reasoning: bool
    include_relaxations: bool
    is_legacy: bool  # asked for with `functions`: answered with `function_call`
    service_tier: str | None
    hosted: Prepared | None = None  # what the server runs of its tools
    parallel: bool = True  # whether calls of one round run at the same time


class ChatRenderer:
    """Writes one answer. `delta` and `finish_reason` are shared by the stream's chunks and the JSON body."""

    def __init__(self, chat: ChatPlan, generation: Answer, context: ServerContext) -> None:
        self._chat, self._generation, self._context = chat, generation, context
        self._reasoning_fields = reasoning_fields(context.config.reasoning_fields)
        self._num_chars = 0  # of the content so far, where the server runs tools
        self._text_start = 0  # of the text of it that is open

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, ready to send; tokens that arrived together leave together."""
        chat, generation = self._chat, self._generation
        head, tail = self._chunk_frame()
        unfinished = {choice.index for choice in generation.choices}
        opening: dict[str, Any] = {"role": "assistant", "content": ""}
        try:
            yield b"".join(_chunk(head, tail, choice.index, opening) for choice in generation.choices)
            async with contextlib.aclosing(generation.events()) as events:
                async for batch in events:
                    parts = []
                    for choice, deltas in batch:
                        parts += self._chunks(choice, deltas, head, tail)
                        if choice.finish_reason is not None and choice.error is None:
                            unfinished.discard(choice.index)
                            if not unfinished:  # the answer's last chunk
                                tail = b"," + encode_event(self._closing())[1:-1] + tail
                            parts.append(_chunk(head, tail, choice.index, {}, finish_reason=self._reason(choice)))
                    if parts:
                        yield b"".join(parts)
            if chat.include_usage:
                yield head + b'],"usage":' + encode_event(self._usage()) + b"}\n\n"
        except GenerationFailedError as error:
            yield b"data: " + encode_event(from_generation(error).body) + b"\n\n"
        finally:
            generation.close()
        yield DONE

    async def collect(self) -> bytes:
        """All deltas of the answer as one body. Raises GenerationFailedError."""
        generation, has_logprobs = self._generation, self._chat.plan.params.logprobs is not None
        messages: list[dict[str, Any]] = [
            {"role": "assistant", "content": None, "refusal": None} for _ in generation.choices
        ]
        logprobs: list[list[dict[str, Any]]] = [[] for _ in generation.choices]
        async with contextlib.aclosing(generation.events()) as events:
            async for batch in events:
                for choice, deltas in batch:
                    for item in deltas:
                        fold(messages[choice.index], self._delta(choice, item))
                        logprobs[choice.index] += item.logprobs or [] if isinstance(item, ChatDelta) else []
        choices = [
            {
                "index": choice.index,
                "message": messages[choice.index],
                "logprobs": {"content": logprobs[choice.index], "refusal": None} if has_logprobs else None,
                "finish_reason": self._reason(choice),
            }
            for choice in generation.choices
        ]
        head = self._head("chat.completion")
        return encode_event(head | {"choices": choices, "usage": self._usage()} | self._closing())

    def _head(self, kind: str) -> dict[str, Any]:
        chat = self._chat
        head = {
            "id": chat.plan.request_id,
            "object": kind,
            "created": chat.created,
            "model": chat.model,
            "system_fingerprint": self._context.system_fingerprint,
        }
        return head if chat.service_tier is None else head | {"service_tier": chat.service_tier}

    def _closing(self) -> dict[str, Any]:
        """What is loaded, the profile that the request ran under, and what of its schemas was not enforced."""
        plan = self._chat.plan
        metadata = self._context.tags | {"profile": plan.profile.name}
        return {"metadata": metadata, **relaxations(plan.relaxed, self._chat.include_relaxations)}

    def _chunk_frame(self) -> tuple[bytes, bytes]:
        tail = b',"usage":null}\n\n' if self._chat.include_usage else b"}\n\n"
        return b"data: " + encode_event(self._head("chat.completion.chunk"))[:-1] + b',"choices":[', tail

    def _chunks(self, choice: AnswerChoice, deltas: Sequence[AnswerDelta], head: bytes, tail: bytes) -> list[bytes]:
        written = [
            (self._delta(choice, item), item.logprobs if isinstance(item, ChatDelta) else None) for item in deltas
        ]
        return [_chunk(head, tail, choice.index, delta, logprobs) for delta, logprobs in written if delta is not None]

    def _delta(self, choice: AnswerChoice, item: AnswerDelta) -> dict[str, Any] | None:
        if isinstance(item, ToolEvent):
            return self._hosted_call(item)
        fields = self._reasoning_fields if self._chat.include_reasoning else ()
        written = write_delta(choice, item.delta, fields, self._chat.is_legacy)
        return written if self._chat.hosted is None else self._cited(item, written)

    def _cited(self, item: ChatDelta, written: dict[str, Any] | None) -> dict[str, Any] | None:
        """The `delta` object with the citations of its text; positions count from the content's start."""
        if item.delta.channel is not None:
            self._text_start = self._num_chars
        elif item.delta.kind == "content":
            self._num_chars += len(item.delta.text)
        if not item.citations:
            return written
        start = self._text_start
        annotations = [
            {
                "type": "url_citation",
                "url_citation": {
                    "start_index": start + one.start,
                    "end_index": start + one.end,
                    "title": one.title,
                    "url": one.url,
                },
            }
            for one in item.citations
        ]
        return {**(written or {}), "annotations": annotations}

    def _hosted_call(self, event: ToolEvent) -> dict[str, Any] | None:
        """A call that the server has run, once it has; an extension of this server."""
        hosted, call = self._chat.hosted, event.call
        if event.state != "finished" or hosted is None or call.result is None:
            return None
        failure = call.result.failure
        error = None if failure is None else {"type": failure.kind, "message": failure.message}
        if call.tool.runner.name == "browser":
            action = call.result.extras.get("action")
            shown = {"id": call.call_id, "type": "web_search", "action": action, "error": error}
            return {"hosted_tool_calls": [shown]}
        if call.name not in hosted.labels:
            outputs = list(call.result.extras.get("outputs", ()))
            ran = {"code": call.text, "container_id": call.session_id, "outputs": outputs}
            shown = {"id": call.call_id, "type": "code_interpreter", **ran, "error": error}
            return {"hosted_tool_calls": [shown]}
        label, name = hosted.labels[call.name]
        shown = {
            "id": call.call_id,
            "type": "mcp",
            "server_label": label,
            "name": name,
            "arguments": call.text,
            "output": text_for_model(call.result) if failure is None else None,
            "error": error,
        }
        return {"hosted_tool_calls": [shown]}

    def _reason(self, choice: AnswerChoice) -> str | None:
        reason = choice.finish_reason
        return "function_call" if reason == "tool_calls" and self._chat.is_legacy else reason

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "prompt_tokens": usage.num_prompt_tokens,
            "completion_tokens": usage.num_completion_tokens,
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": usage.num_reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }


def reasoning_fields(setting: str) -> tuple[str, ...]:
    return ("reasoning_content", "reasoning") if setting == "both" else (setting,)


def write_delta(
    choice: AnswerChoice, delta: Delta, reasoning_fields: Sequence[str], is_legacy: bool = False
) -> dict[str, Any] | None:
    """The `delta` object; None where the client is shown nothing of it."""
    if delta.channel is not None:
        return None
    if delta.kind == "content":
        return {"content": delta.text}
    if delta.kind == "reasoning":
        return dict.fromkeys(reasoning_fields, delta.text) or None
    if is_legacy:
        name = {"name": delta.tool_name} if delta.tool_name is not None else {}
        return {"function_call": {**name, "arguments": delta.text}}
    kind, text = ("custom", "input") if delta.tool_index in choice.custom_calls else ("function", "arguments")
    call: dict[str, Any] = {"index": delta.tool_index}
    if delta.tool_name is not None:
        before = choice.messages if delta.tool_index == 0 else ()
        call |= {"id": new_call_id(before), "type": kind, kind: {"name": delta.tool_name, text: delta.text}}
    else:
        call[kind] = {text: delta.text}
    return {"tool_calls": [call]}


def fold(message: dict[str, Any], delta: dict[str, Any] | None) -> None:
    """Adds a `delta` object to the message."""
    for key, value in (delta or {}).items():
        if key == "tool_calls":
            for call in value:
                if "id" in call:
                    message.setdefault("tool_calls", []).append({k: v for k, v in call.items() if k != "index"})
                else:
                    _append(message["tool_calls"][call["index"]], call)
        elif key in ("hosted_tool_calls", "annotations"):
            message[key] = [*message.get(key, ()), *value]
        elif key == "function_call":
            known = message.setdefault("function_call", {"name": "", "arguments": ""})
            for name, text in value.items():
                known[name] += text
        else:
            message[key] = (message.get(key) or "") + value


def _append(call: dict[str, Any], delta: dict[str, Any]) -> None:
    """Adds the text of a `tool_calls` delta to its call."""
    for kind, text in ("function", "arguments"), ("custom", "input"):
        if kind in delta:
            call[kind][text] += delta[kind][text]


def _chunk(
    head: bytes,
    tail: bytes,
    index: int,
    delta: dict[str, Any],
    logprobs: list[dict[str, Any]] | None = None,
    finish_reason: str | None = None,
) -> bytes:
    entries = encode_event({"content": logprobs, "refusal": None}) if logprobs else b"null"
    reason = b'"%b"' % finish_reason.encode() if finish_reason is not None else b"null"
    middle = (index, encode_event(delta), entries, reason)
    return head + b'{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]' % middle + tail
