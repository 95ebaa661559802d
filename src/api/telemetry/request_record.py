"""The measurements of one request."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gptoss.api.access.api_keys import Caller
from gptoss.api.access.rate_limits import Allowance


@dataclass(frozen=True, slots=True)
class ToolCallRecord:
    """One call of a tool that the server ran. Times are monotonic seconds."""

    tool: str
    function: str
    ended: float
    seconds: float
    failure: str | None  # its kind


@dataclass(slots=True)
class RequestRecord:
    """One request from arrival to end. Times are monotonic seconds."""

    arrival: float = field(default_factory=time.monotonic)
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    num_reasoning_tokens: int = 0
    first_token: float | None = None
    first_reasoning: float | None = None
    first_content: float | None = None
    last_token: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    gaps: list[float] = field(default_factory=list)  # seconds per token between deliveries
    observe_gap: Callable[[float], None] | None = None  # called with each gap
    outcome: str = "cancelled"  # unless it ends otherwise
    completion_id: str = ""
    request_id: str = ""  # the x-request-id header
    endpoint: str = ""
    caller: Caller | None = None
    allowance: Allowance | None = None  # of its caller's limits
    profile: str = ""
    stream: bool = False
    cancelled: bool = False  # by POST /v1/cancel
    on_cancel: Callable[[], None] | None = None  # stops what runs outside the engine
    tool_calls: list[ToolCallRecord] = field(default_factory=list)  # of the server's tools
    trace_headers: tuple[tuple[str, str], ...] = ()  # traceparent, tracestate
    shown_prompt: str | None = None  # only with log_content
    shown_answer: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.seconds_to(self.first_token)

    def seconds_to(self, moment: float | None) -> float | None:
        """Seconds from arrival to `moment`; None if it has not come."""
        return None if moment is None else moment - self.arrival

    def tokens_arrived(self, count: int) -> None:
        now = time.monotonic()
        if self.first_token is None:
            self.first_token = now
        elif self.last_token is not None and count:
            gap = (now - self.last_token) / count
            self.gaps.append(gap)
            if self.observe_gap is not None:
                self.observe_gap(gap)
        self.last_token = now
        self.num_output_tokens += count
