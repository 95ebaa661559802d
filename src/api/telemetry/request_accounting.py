"""Rate limits, metrics, log line and trace of one generation."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from gptoss.api.access.rate_limits import RateLimits, Work
from gptoss.api.http.errors import ApiError, from_engine
from gptoss.api.telemetry.metrics import Metrics
from gptoss.api.telemetry.relaxations import warn_relaxed
from gptoss.api.telemetry.request_record import RequestRecord, ToolCallRecord
from gptoss.api.telemetry.request_tracker import RequestTracker
from gptoss.engine.client.errors import EngineError
from gptoss.engine.messages import TokenOutput
from gptoss.generation.plan import Plan
from gptoss.generation.session import EndedChoice, Usage
from gptoss.harmony.deltas import Kind

tool_logger = logging.getLogger("tool")


class RequestAccounting:
    """Receives the events of one generation from generation/session.py."""

    def __init__(
        self,
        record: RequestRecord,
        limits: RateLimits,
        tracker: RequestTracker,
        metrics: Metrics,
        tags: Callable[[], Mapping[str, str]],
        shown_text: Callable[[list[int]], str] | None,
    ) -> None:
        """`shown_text` decodes prompts and answers for the log; None: they are not logged."""
        self.record, self._limits, self._tracker, self._metrics = record, limits, tracker, metrics
        self._tags, self._shown_text = tags, shown_text

    @property
    def is_cancelled(self) -> bool:
        return self.record.cancelled

    @contextlib.contextmanager
    def counted_rejections(self) -> Iterator[None]:
        """Counts what ends the request before it runs; refusals of the engine become errors of the API."""
        try:
            yield
        except (ApiError, ValueError):
            self._metrics.reject()
            raise
        except EngineError as error:
            self._metrics.reject()
            raise from_engine(error) from error
        except Exception:  # a bug, which becomes a 500
            self._metrics.fail()
            raise

    def admit(self, plan: Plan) -> None:
        """Counts a planned request against the caller's limits. Raises RateLimited."""
        if self.record.allowance is None:
            return
        work = Work(
            num_choices=len(plan.requests),
            num_prompt_tokens=sum(map(len, plan.prompts)),
            max_tokens=sum(request.params.max_tokens for request in plan.requests),
            has_max_tokens=plan.has_max_tokens,
        )
        self._limits.admit(self.record.allowance, work)

    def begin(self, plan: Plan) -> None:
        record = self.record
        record.completion_id, record.profile, record.stream = plan.request_id, plan.profile.name, plan.stream
        warn_relaxed(plan.relaxed)
        self._tracker.begin(record, [request.request_id for request in plan.requests])

    def arrived(self, output: TokenOutput, num_tokens: int) -> None:
        record = self.record
        if num_tokens:
            record.tokens_arrived(num_tokens)
        if output.queue_s is not None and record.queue_s is None:
            record.queue_s, record.prefill_s = output.queue_s, output.prefill_s

    def shown(self, kind: Kind) -> None:
        record = self.record
        if kind == "reasoning":
            record.first_reasoning = record.first_reasoning or record.last_token
        else:
            record.first_content = record.first_content or record.last_token

    def follow(self, request_ids: Sequence[str]) -> None:
        self.record.last_token = None  # the time of the tools is not a gap between tokens
        self._tracker.follow(self.record, request_ids)

    def on_cancel(self, stop: Callable[[], None] | None) -> None:
        self.record.on_cancel = stop

    def take_tool_call(self) -> str | None:
        allowance = self.record.allowance
        return None if allowance is None else self._limits.take_tool_call(allowance.caller)

    def tool_ended(self, tool: str, function: str, seconds: float, failure: str | None) -> None:
        call = ToolCallRecord(tool, function, time.monotonic(), seconds, failure)
        self.record.tool_calls.append(call)
        self._metrics.tool_ended(call)
        fields = {"tool": tool, "function": function, "ms": round(seconds * 1000), "id": self.record.completion_id}
        tool_logger.info(failure or "ok", extra=fields)

    def end(self, usage: Usage, choices: Sequence[EndedChoice], prompts: Sequence[list[int]]) -> None:
        record, show = self.record, self._shown_text
        record.num_prompt_tokens = usage.num_prompt_tokens
        record.num_cached_tokens = usage.num_cached_tokens
        record.num_reasoning_tokens = usage.num_reasoning_tokens
        if show is not None:
            record.shown_prompt = "\n".join(map(show, prompts))
            record.shown_answer = "\n".join(show(choice.token_ids) for choice in choices)
        error = next((choice.error for choice in choices if choice.error is not None), None)
        self._tracker.end(record, [choice.finish_reason for choice in choices], self._tags(), error)
        for choice in choices:
            self._metrics.recovered(choice.recoveries)
