"""A response as events, or as one JSON body."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from gptoss.api.http.errors import Cancelled, from_generation
from gptoss.api.http.sse import encode_event
from gptoss.api.responses.output import OutputItems
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.responses.tools.calls import Event, ItemStatus
from gptoss.api.responses.tools.table import ToolTable
from gptoss.api.telemetry.relaxations import relaxations
from gptoss.generation.errors import GenerationFailedError
from gptoss.generation.round_reader import Answer


class ResponsesRenderer:
    """Writes the one choice of an answer as a response."""

    def __init__(
        self,
        request: ResponsesRequest,
        tools: ToolTable,
        generation: Answer,
        keep: Callable[[dict[str, Any]], bool] | None,
    ) -> None:
        """`keep` stores the finished response and returns whether it is stored; None: it is not to be stored."""
        self._request, self._tools, self._generation, self._keep = request, tools, generation, keep
        self._created = int(time.time())
        self._failure: GenerationFailedError | None = None
        self._output = OutputItems(
            tools.client_name,
            tools.kind_of,
            encodes_reasoning=request.encodes_reasoning,
            hosted=tools.hosted,
            include=request.include or (),
        )

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events, numbered; tokens that arrived together leave together."""
        number = 0

        def encode(events: list[Event]) -> bytes:
            nonlocal number
            parts = []
            for event in events:
                name = event["type"].encode()
                data = encode_event(event | {"sequence_number": number})
                parts.append(b"event: %b\ndata: %b\n\n" % (name, data))
                number += 1
            return b"".join(parts)

        begun = self._body("in_progress")
        yield encode([{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")])
        async with contextlib.aclosing(self._events()) as batches:
            async for events in batches:
                yield encode(events)

    async def collect(self) -> bytes:
        """All events of the answer as one body. Raises GenerationFailedError."""
        async with contextlib.aclosing(self._events()) as batches:
            async for events in batches:
                last = events[-1]
        if self._failure is not None:
            raise self._failure
        return encode_event(last["response"])

    async def _events(self) -> AsyncGenerator[list[Event], None]:
        """Batches of events, none of them empty; the last event of the last one holds the whole response."""
        output = self._output
        choice = self._generation.choices[0]
        begun = output.begin()
        if begun:
            yield begun
        try:
            async with contextlib.aclosing(self._generation.events()) as batches:
                async for batch in batches:
                    events = [e for _, deltas in batch for item in deltas for e in output.feed(item)]
                    if choice.finish_reason is not None and choice.error is None:
                        yield events + self._end(choice.finish_reason)
                    elif events:
                        yield events
        except GenerationFailedError as error:
            self._failure = error
            events = output.interrupt()
            yield [*events, {"type": "response.failed", "response": self._body("failed")}]

    def _end(self, finish_reason: str) -> list[Event]:
        status: ItemStatus = "completed" if finish_reason in ("stop", "tool_calls") else "incomplete"
        events = self._output.close(status)
        body = self._body(status)
        if self._keep is not None:
            body["store"] = self._keep(body)
        return [*events, {"type": f"response.{status}", "response": body}]

    def _body(self, status: str) -> dict[str, Any]:
        request, plan = self._request, self._generation.plan
        params = plan.params
        text = request.text.model_dump(by_alias=True, exclude_none=True) if request.text else {}
        body: dict[str, Any] = {
            "id": plan.request_id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": request.max_tool_calls,
            "metadata": request.metadata or {},
            "model": request.model,
            "output": self._output.items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "reasoning": {"effort": request.effort or plan.profile.effort, "summary": None},
            "safety_identifier": request.safety_identifier,
            "service_tier": "default",
            "store": self._keep is not None,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": request.tool_choice or "auto",
            "tools": self._tools.shown,
            "top_logprobs": request.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None,
            "user": request.user,
            **relaxations(plan.relaxed, request.include_relaxations),
        }
        if status == "incomplete":
            body["incomplete_details"] = {"reason": "max_output_tokens"}
        if self._failure is not None:
            failure = from_generation(self._failure)
            code = failure.code if isinstance(failure, Cancelled) else "server_error"
            body["error"] = {"code": code, "message": failure.message}
        if status != "in_progress":
            body["usage"] = self._usage()
        return body

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage
        return {
            "input_tokens": usage.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.num_completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
            "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        }
