"""An answer as a message: server-sent events, or one JSON body."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json

from gptoss.api.hosted.names import browser_call_id
from gptoss.api.hosted.service import Prepared
from gptoss.api.http.anthropic_errors import anthropic_error
from gptoss.api.http.encrypted_content import encode_text
from gptoss.api.http.errors import from_generation
from gptoss.api.http.sse import encode_event
from gptoss.api.messages.schema.request import MessagesRequest
from gptoss.api.messages.server_tools import USE, citation_of, input_of, name_of, result_of
from gptoss.api.telemetry.relaxations import relaxations
from gptoss.generation.errors import GenerationFailedError
from gptoss.generation.hosted import HostedCall, ToolEvent
from gptoss.generation.plan import Plan
from gptoss.generation.round_reader import Answer, AnswerDelta
from gptoss.generation.tool_run import text_for_model
from gptoss.generation.tool_types import Citation
from gptoss.harmony.deltas import Delta

Event = dict[str, Any]
SHOWN = ""  # what the signature of thinking holds that the client has as text


@dataclass(frozen=True, slots=True)
class MessagePlan:
    """A request's plan, and how its answer is to be written."""

    plan: Plan
    request: MessagesRequest
    hosted: Prepared | None = None  # what the server runs of its tools


class MessageContent:
    """Content blocks in the order in which the model wrote its messages, and the events that build them."""

    def __init__(self, *, hides_thinking: bool, holds_arguments: bool, hosted: Prepared | None = None) -> None:
        """`holds_arguments`: until they are whole, as they may not be JSON. `hosted`: what the server runs."""
        self._hosted = hosted
        self._ids: dict[HostedCall, str] = {}  # of the blocks of calls
        self.blocks: list[Event] = []
        self._hides_thinking, self._holds_arguments = hides_thinking, holds_arguments
        self._kind: str | None = None  # of the block that is open
        self._text = ""  # hidden thinking, or arguments
        self._num_chars = 0  # of the message's text, citations included
        self.uses: Counter[str] = Counter()  # calls of built-in tools that did not fail, by Anthropic's name

    def feed(self, item: AnswerDelta) -> list[Event]:
        """The events of a delta."""
        if isinstance(item, ToolEvent):
            return self._hosted_call(item)
        delta, events = item.delta, list[Event]()
        begins = delta.channel is not None or delta.tool_name is not None
        if begins or delta.kind != self._kind:
            events += [*self.close(), self._begin(delta)]
            self._num_chars = 0
        if delta.kind == "content" and self._hosted is not None:
            events += self._add_cited(delta.text, item.citations)
        elif delta.text:
            events += self._add(delta.text)
        return events

    def _add_cited(self, text: str, citations: Sequence[Citation]) -> list[Event]:
        """The events of a text with links, which become citations of the text before them."""
        events, at, start = list[Event](), 0, self._num_chars
        self._num_chars += len(text)
        for one in citations:
            events += self._add_after_citation(text[at : one.start - one.num_blanks - start])
            citation = citation_of(one)
            self.blocks[-1].setdefault("citations", []).append(citation)
            events.append(self._delta("citations_delta", citation=citation))
            at = one.end - start
        return events + self._add_after_citation(text[at:])

    def _add_after_citation(self, text: str) -> list[Event]:
        """The events of a text; a block that has a citation ends where the next word begins."""
        events = list[Event]()
        if text and "citations" in self.blocks[-1]:
            blanks, text = text[: len(text) - len(text.lstrip())], text.lstrip()
            events += self._add(blanks) if blanks else []
            if text:
                events += [self._stop(), self._start({"type": "text", "text": ""})]
        return events + self._add(text) if text else events

    def _hosted_call(self, event: ToolEvent) -> list[Event]:
        """The events of a call that the server runs: a block of the call, and one of its result."""
        call = event.call
        assert self._hosted is not None
        if call.name not in self._hosted.labels:
            return self._server_tool(event)
        match event.state:
            case "begun":
                events, self._kind, self._text = self.close(), "tool_call", ""
                server, name = self._hosted.labels[call.name]
                self._ids[call] = f"mcptoolu_{secrets.token_hex(12)}"
                use = {"type": "mcp_tool_use", "id": self._ids[call], "name": name, "server_name": server, "input": {}}
                return [*events, self._start(use)]
            case "text":
                return self._add(event.text)
            case "whole" | "cut":
                return self.close(is_cut=event.state == "cut")
            case "finished":
                assert call.result is not None
                text = [{"type": "text", "text": text_for_model(call.result)}]
                result = {"type": "mcp_tool_result", "tool_use_id": self._ids[call], "content": text}
                started = self._start(result | {"is_error": not call.result.ok})
                return [started, {"type": "content_block_stop", "index": len(self.blocks) - 1}]
        return []

    def _server_tool(self, event: ToolEvent) -> list[Event]:
        """The events of a call of a built-in tool: its block comes when its session is known."""
        call = event.call
        if event.state == "begun":
            return self.close()
        if event.state == "running":
            use_id = self._ids[call] = browser_call_id(USE, call.session_id)
            use = {"type": "server_tool_use", "id": use_id, "name": name_of(call), "input": {}}
            started = self._start(use)
            self.blocks[-1]["input"] = input_of(call)
            delta = self._delta("input_json_delta", partial_json=json.dumps(input_of(call), ensure_ascii=False))
            return [started, delta, self._stop()]
        if event.state == "finished" and call.result is not None:
            self.uses[name_of(call)] += call.result.ok
            return [self._start(result_of(call, call.result) | {"tool_use_id": self._ids[call]}), self._stop()]
        return []

    def _stop(self) -> Event:
        return {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def close(self, *, is_cut: bool = False) -> list[Event]:
        """Ends the block that is open, if one is. `is_cut`: its text is not whole."""
        if self._kind is None:
            return []
        events = self._end(is_cut=is_cut)
        self._kind = None
        return [*events, {"type": "content_block_stop", "index": len(self.blocks) - 1}]

    def _begin(self, delta: Delta) -> Event:
        self._kind, self._text = delta.kind, ""
        block: Event
        if delta.kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        elif delta.kind == "content":
            block = {"type": "text", "text": ""}
        else:
            block = {"type": "tool_use", "id": f"toolu_{secrets.token_hex(12)}", "name": delta.tool_name, "input": {}}
        return self._start(block)

    def _start(self, block: Event) -> Event:
        self.blocks.append(block)
        return {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _add(self, text: str) -> list[Event]:
        block = self.blocks[-1]
        if self._kind == "content":
            block["text"] += text
            return [self._delta("text_delta", text=text)]
        if self._kind == "tool_call":
            return self._add_arguments(text)
        self._text += text
        if self._hides_thinking:
            return []
        block["thinking"] += text
        return [self._delta("thinking_delta", thinking=text)]

    def _add_arguments(self, text: str) -> list[Event]:
        """The events of a piece of the arguments, without blanks at the beginning.

        Anthropic's SDK raises an error while the arguments are only blanks.
        """
        added = text if self._text else text.lstrip()
        self._text += added
        return [self._delta("input_json_delta", partial_json=added)] if added and not self._holds_arguments else []

    def _end(self, *, is_cut: bool) -> list[Event]:
        block = self.blocks[-1]
        if self._kind == "reasoning":
            block["signature"] = encode_text(self._text if self._hides_thinking else SHOWN)
            return [self._delta("signature_delta", signature=block["signature"])]
        if self._kind == "content":
            return []
        if not self._holds_arguments:
            block["input"] = read_arguments(self._text, is_cut=is_cut)
            return []
        block["input"] = read_arguments(self._text, is_cut=False)
        return [self._delta("input_json_delta", partial_json=json.dumps(block["input"], ensure_ascii=False))]

    def _delta(self, kind: str, **fields: Any) -> Event:
        delta = {"type": kind, **fields}
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}


def read_arguments(text: str, *, is_cut: bool) -> dict[str, Any]:
    """The object. `is_cut`: what is whole of it. What is not JSON is kept as `arguments`."""
    if not text.strip():
        return {}
    try:
        value = from_json(text, allow_partial=is_cut)
    except ValueError:
        return {"arguments": text}
    return value if isinstance(value, dict) else {"arguments": value}


class MessageRenderer:
    """Writes the one choice of an answer as a message."""

    def __init__(self, plan: MessagePlan, generation: Answer, request_id: str) -> None:
        self._plan, self._generation, self._request_id = plan, generation, request_id
        self._content = MessageContent(
            hides_thinking=plan.request.hides_thinking,
            holds_arguments=plan.plan.params.grammar is None,
            hosted=plan.hosted,
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events; tokens that arrived together leave together."""
        yield _encode([{"type": "message_start", "message": self._message(None)}, {"type": "ping"}])
        try:
            async with contextlib.aclosing(self._events()) as batches:
                async for events in batches:
                    yield _encode(events)
        except GenerationFailedError as error:
            known = from_generation(error)
            yield _encode([anthropic_error(known.status, known.message, known.param, self._request_id)])
            return
        reason, stop_string = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": stop_string}
        yield _encode([{"type": "message_delta", "delta": delta, "usage": self._usage()}, {"type": "message_stop"}])

    async def collect(self) -> bytes:
        """All events of the answer as one body. Raises GenerationFailedError."""
        async with contextlib.aclosing(self._events()) as batches:
            async for _ in batches:
                pass
        reason, stop_string = self._stop()
        return encode_event(self._message(reason, stop_string))

    async def _events(self) -> AsyncGenerator[list[Event], None]:
        content, choice = self._content, self._generation.choices[0]
        async with contextlib.aclosing(self._generation.events()) as batches:
            async for batch in batches:
                events = [e for _, deltas in batch for item in deltas for e in content.feed(item)]
                if choice.finish_reason is not None and choice.error is None:
                    events += content.close(is_cut=choice.finish_reason == "length")
                if events:
                    yield events

    def _stop(self) -> tuple[str, str | None]:
        """Returns the stop reason and the stop sequence."""
        choice = self._generation.choices[0]
        if choice.finish_reason == "length":
            return "max_tokens", None
        if choice.num_calls:
            return "tool_use", None
        return ("end_turn", None) if choice.stop_string is None else ("stop_sequence", choice.stop_string)

    def _message(self, stop_reason: str | None, stop_string: str | None = None) -> Event:
        return {
            "id": self._plan.plan.request_id,
            "type": "message",
            "role": "assistant",
            "model": self._plan.request.model,
            "content": self._content.blocks,
            "stop_reason": stop_reason,
            "stop_sequence": stop_string,
            "usage": self._usage(),
            **relaxations(self._plan.plan.relaxed, self._plan.request.include_relaxations),
        }

    def _usage(self) -> dict[str, Any]:
        """Cached tokens are counted apart; how many there are is known with the first token."""
        usage = self._generation.usage
        return {
            "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.num_cached_tokens,
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.num_reasoning_tokens},
            **self._server_tool_use(),
        }

    def _server_tool_use(self) -> dict[str, Any]:
        hosted, uses = self._plan.hosted, self._content.uses
        if hosted is None or "web_search" not in hosted.recipients:
            return {}
        counts = {f"{name}_requests": uses[name] for name in ("web_search", "web_fetch")}
        return {"server_tool_use": counts}


def _encode(events: list[Event]) -> bytes:
    return b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), encode_event(event)) for event in events)
