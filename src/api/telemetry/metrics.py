"""The server's Prometheus metrics, and the sliding window for /stats."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from gptoss.api.telemetry.request_record import RequestRecord, ToolCallRecord
from gptoss.api.telemetry.scrape import RelabelledRegistry
from gptoss.engine.messages import EngineStats

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
ITL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
STEP_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKEN_BUCKETS = (1, 10, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
WINDOW_S = 300.0
# limits of the window: requests, and evenly spaced gaps of each
WINDOW_REQUESTS, WINDOW_GAPS = 10_000, 32


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    ttft_s: float | None
    e2e_s: float
    gaps: tuple[float, ...]
    num_prompt_tokens: int
    num_output_tokens: int


class Metrics:
    """The metrics of one app, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.started = time.monotonic()
        self.active = 0
        self.outcomes: Tally[str] = Tally()
        self.recoveries: Tally[str] = Tally()
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self._window: deque[_Sample] = deque(maxlen=WINDOW_REQUESTS)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"gptoss_{name}", text, buckets=buckets, registry=self.registry)

        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self._ttf_reasoning = histogram(
            "time_to_first_reasoning_token_seconds", "Arrival to first reasoning text.", TTFT_BUCKETS
        )
        self._ttf_content = histogram(
            "time_to_first_content_token_seconds", "Arrival to first content text.", TTFT_BUCKETS
        )
        self._itl = histogram("inter_token_latency_seconds", "Time between tokens of a stream.", ITL_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to last token.", LATENCY_BUCKETS)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first scheduled.", LATENCY_BUCKETS)
        self._prefill = histogram("request_prefill_time_seconds", "First scheduled to first token.", LATENCY_BUCKETS)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BUCKETS)
        self._output = histogram("request_generation_tokens", "Generated tokens of a request.", TOKEN_BUCKETS)
        self._step = histogram("engine_step_duration_seconds", "Time of an engine step.", STEP_BUCKETS)
        self._step_requests = histogram("engine_step_requests", "Requests in an engine step.", BATCH_BUCKETS)
        self._requests = Counter("gptoss_requests", "Requests by how they ended.", ["outcome"], registry=self.registry)
        self._recovered = Counter(
            "gptoss_harmony_recoveries", "Repairs of malformed model output, by kind.", ["kind"], registry=self.registry
        )
        self._tool_calls = Counter(
            "gptoss_tool_calls",
            "Calls of tools that the server ran; outcome: ok, or the kind of failure.",
            ["tool", "outcome"],
            registry=self.registry,
        )
        self._tool_seconds = Histogram(
            "gptoss_tool_call_duration_seconds",
            "Time of a tool call.",
            ["tool"],
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        for outcome in ("ok", "failed", "cancelled", "rejected"):
            self._requests.labels(outcome)

    def begin(self, record: RequestRecord) -> None:
        self.active += 1
        record.observe_gap = self._itl.observe

    def finish(self, record: RequestRecord, finish_reasons: Sequence[str | None]) -> None:
        """Counts a request when it ends; `finish_reasons` of its choices are None if the client disconnected."""
        if record.cancelled:
            record.outcome = "cancelled"
        elif "error" in finish_reasons:
            record.outcome = "failed"
        elif None not in finish_reasons:
            record.outcome = "ok"
        self.active -= 1
        now = time.monotonic()
        self._count(record.outcome)
        self.num_prompt_tokens += record.num_prompt_tokens
        self.num_output_tokens += record.num_output_tokens
        self.num_cached_tokens += record.num_cached_tokens
        self._prompt.observe(record.num_prompt_tokens)
        self._output.observe(record.num_output_tokens)
        e2e_s = now - record.arrival
        for metric, seconds in (
            (self._ttft, record.ttft_s),
            (self._ttf_reasoning, record.seconds_to(record.first_reasoning)),
            (self._ttf_content, record.seconds_to(record.first_content)),
            (self._queue, record.queue_s),
            (self._prefill, record.prefill_s),
            (self._e2e, e2e_s if record.outcome == "ok" else None),
        ):
            if seconds is not None:
                metric.observe(seconds)
        self._forget_before(now - WINDOW_S)
        self._window.append(
            _Sample(
                now,
                record.ttft_s,
                e2e_s,
                tuple(record.gaps[:: -(-len(record.gaps) // WINDOW_GAPS) or 1]),
                record.num_prompt_tokens,
                record.num_output_tokens,
            )
        )

    def tool_ended(self, call: ToolCallRecord) -> None:
        """Counts a call of a tool."""
        self._tool_calls.labels(call.tool, call.failure or "ok").inc()
        self._tool_seconds.labels(call.tool).observe(call.seconds)

    def step(self, stats: EngineStats) -> None:
        self._step.observe(stats.last_step_s)
        self._step_requests.observe(stats.last_step_seqs)

    def reject(self) -> None:
        self._count("rejected")

    def fail(self) -> None:
        """Counts a request that a bug ended before it ran."""
        self._count("failed")

    def _count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self._requests.labels(outcome).inc()

    def recovered(self, kinds: Tally[str]) -> None:
        self.recoveries.update(kinds)
        for kind, count in kinds.items():
            self._recovered.labels(kind).inc(count)

    def window(self) -> dict[str, object]:
        """Percentiles and rates over the last five minutes, or the last 10,000 requests if there were more."""
        now = time.monotonic()
        self._forget_before(now - WINDOW_S)
        samples = list(self._window)
        since = samples[0].at if len(samples) == WINDOW_REQUESTS else self.started
        span = min(WINDOW_S, max(now - since, 0.001))
        return {
            "window_s": WINDOW_S,
            "requests": len(samples),
            "ttft_s": percentiles([s.ttft_s for s in samples if s.ttft_s is not None]),
            "e2e_s": percentiles([s.e2e_s for s in samples]),
            "inter_token_s": percentiles([gap for s in samples for gap in s.gaps]),
            "prompt_tokens_per_s": sum(s.num_prompt_tokens for s in samples) / span,
            "output_tokens_per_s": sum(s.num_output_tokens for s in samples) / span,
        }

    def _forget_before(self, moment: float) -> None:
        while self._window and self._window[0].at < moment:
            self._window.popleft()

    def render(self, tags: Mapping[str, str], *, vllm_names: bool) -> bytes:
        """Prometheus' text format; every sample has `tags` as labels."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(RelabelledRegistry(self.registry, tags, vllm_names))
        text: bytes = generate_latest(registry)
        return text


def percentiles(values: list[float]) -> dict[str, float | None]:
    """Nearest-rank p50, p95 and p99; None without values."""
    ordered = sorted(values)

    def at(share: float) -> float | None:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

    return {"p50": at(0.50), "p95": at(0.95), "p99": at(0.99)}
