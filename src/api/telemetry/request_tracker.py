"""Tracks the running requests: metrics, log line, trace and cancellation."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from gptoss.api.access.access import Access
from gptoss.api.access.api_keys import Caller
from gptoss.api.http.sender import ANONYMOUS
from gptoss.api.telemetry.metrics import Metrics
from gptoss.api.telemetry.request_record import RequestRecord
from gptoss.api.telemetry.tracing import Tracing
from gptoss.engine.client.pool import AnyEngine

logger = logging.getLogger("request")


class RequestTracker:
    """The running requests of one app."""

    def __init__(self, engine: AnyEngine, metrics: Metrics, access: Access, tracing: Tracing | None = None) -> None:
        self._engine, self._metrics, self._access = engine, metrics, access
        self._tracing = tracing
        self._running: dict[str, tuple[RequestRecord, list[str]]] = {}

    def running_ids(self, caller: Caller | None) -> list[str]:
        """Completion ids of the caller's requests, oldest first; none for callers without a key.

        An id is enough to cancel such a request and to read its stored response.
        """
        if caller is None or caller.name == ANONYMOUS:
            return []
        return [
            name
            for name, (record, _) in self._running.items()
            if name == record.completion_id and record.caller is not None and record.caller.name == caller.name
        ]

    def begin(self, record: RequestRecord, engine_ids: Sequence[str]) -> None:
        """Starts tracking a request."""
        self._metrics.begin(record)
        entry = (record, list(engine_ids))
        self._running[record.completion_id] = entry
        if record.request_id:
            self._running[record.request_id] = entry

    def follow(self, record: RequestRecord, engine_ids: Sequence[str]) -> None:
        """Replaces the engine requests of a running request: a round of its answer has ended."""
        for name in (record.completion_id, record.request_id):
            entry = self._running.get(name)
            if entry is not None:
                entry[1][:] = engine_ids

    def end(
        self, record: RequestRecord, finish_reasons: Sequence[str | None], tags: Mapping[str, str], error: str | None
    ) -> None:
        """Counts, charges, logs and traces a request that has ended.

        `finish_reasons` of its choices are None if the client disconnected.
        """
        self._running.pop(record.completion_id, None)
        self._running.pop(record.request_id, None)
        self._metrics.finish(record, finish_reasons)
        if record.allowance is not None:
            num_tokens = record.num_prompt_tokens + record.num_output_tokens
            self._access.limits.settle(record.allowance, num_tokens)
        fields = self._fields(record, finish_reasons, tags, error)
        logger.info(record.outcome, extra=fields)
        if self._tracing is not None:
            self._tracing.finished(record, fields)

    def cancel(self, request_id: str, caller: Caller | None) -> bool:
        """Cancels a request by its completion id or x-request-id; returns whether it was running.

        A key can cancel only its own requests.
        """
        entry = self._running.get(request_id)
        if entry is None:
            return False
        record, engine_ids = entry
        owner = record.caller.name if record.caller is not None else None
        if caller is not None and owner is not None and caller.name != owner:
            return False
        record.cancelled = True
        for engine_id in engine_ids:
            self._engine.abort(engine_id)
        if record.on_cancel is not None:
            record.on_cancel()
        return True

    @staticmethod
    def _fields(
        record: RequestRecord, finish_reasons: Sequence[str | None], tags: Mapping[str, str], error: str | None
    ) -> dict[str, Any]:
        def ms(seconds: float | None) -> int | None:
            return None if seconds is None else round(seconds * 1000)

        fields: dict[str, Any] = {
            "id": record.completion_id,
            "request_id": record.request_id,
            "key": record.caller.name if record.caller is not None else None,
            "endpoint": record.endpoint,
            "stream": record.stream,
            "prompt_tokens": record.num_prompt_tokens,
            "cached_tokens": record.num_cached_tokens,
            "output_tokens": record.num_output_tokens,
            "reasoning_tokens": record.num_reasoning_tokens,
            "queue_ms": ms(record.queue_s),
            "ttft_ms": ms(record.ttft_s),
            "e2e_ms": ms(record.seconds_to(time.monotonic())),
            "tool_calls": len(record.tool_calls) or None,
            "tool_failures": sum(call.failure is not None for call in record.tool_calls) or None,
            "tool_ms": ms(sum(call.seconds for call in record.tool_calls)) if record.tool_calls else None,
            "finish": ",".join(reason or "gone" for reason in finish_reasons),
            "error": error,
            **tags,
            "profile": record.profile or tags.get("profile"),
            "prompt": record.shown_prompt,
            "answer": record.shown_answer,
        }
        return {key: value for key, value in fields.items() if value is not None}
