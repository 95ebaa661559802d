"""One OpenTelemetry span per request, sent over OTLP/HTTP. Used only if an endpoint is configured.

The SDK and the exporter are an extra: pip install -r requirements-tracing.txt.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from gptoss.api.telemetry.request_record import RequestRecord, ToolCallRecord
from gptoss.config.errors import ConfigError


class Tracing:
    """Creates spans with the fields of the request's log line.

    They continue the client's trace (W3C trace context). Fields have the names of the GenAI conventions if these have
    one (OpenTelemetry semantic conventions 1.38, gen-ai).
    """

    def __init__(self, endpoint: str, processor: Any = None) -> None:
        """`processor` replaces the exporter, for tests. Raises ConfigError if the extra is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigError(
                f"otlp_endpoint is set, but {error.name} is not installed: pip install -r requirements-tracing.txt"
            ) from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "gpt-oss-server"}))
        self._provider.add_span_processor(
            processor or BatchSpanProcessor(OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces"))
        )
        self._tracer = self._provider.get_tracer("gpt-oss-server")

    def finished(self, record: RequestRecord, fields: Mapping[str, Any]) -> None:
        """Creates the span at the request's end, with its actual start time."""
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        now = time.time_ns()
        start = now - int((time.monotonic() - record.arrival) * 1e9)
        span = self._tracer.start_span(
            f"{record.endpoint}",
            context=extract(dict(record.trace_headers)),
            kind=SpanKind.SERVER,
            start_time=start,
            attributes=_attributes(record.endpoint, fields),
        )
        if record.ttft_s is not None:
            span.add_event("first token", timestamp=start + int(record.ttft_s * 1e9))
        if record.outcome == "failed":
            span.set_status(Status(StatusCode.ERROR, str(fields.get("error", ""))))
        for call in record.tool_calls:
            self._tool_span(call, span, start + int((call.ended - record.arrival) * 1e9))
        span.end(now)

    def _tool_span(self, call: ToolCallRecord, parent: Any, end: int) -> None:
        """Creates the span of a tool call. `end`: nanoseconds since the epoch."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        span = self._tracer.start_span(
            f"execute_tool {call.function}",
            context=set_span_in_context(parent),
            kind=SpanKind.INTERNAL,
            start_time=end - int(call.seconds * 1e9),
            attributes={
                "gen_ai.operation.name": "execute_tool",
                "gen_ai.tool.name": call.function,
                "gen_ai.tool.type": "extension",
                "gptoss.tool": call.tool,
            },
        )
        if call.failure is not None:
            span.set_attribute("error.type", call.failure)
            span.set_status(Status(StatusCode.ERROR, call.failure))
        span.end(end)

    def close(self) -> None:
        """Sends the remaining spans."""
        self._provider.shutdown()


_GENAI = {
    "model_id": "gen_ai.response.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "finish": "gen_ai.response.finish_reasons",
    "id": "gen_ai.response.id",
}
_HIDDEN = ("prompt", "answer")


_OPERATIONS = {"/v1/completions": "text_completion"}


def _attributes(endpoint: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    shown = {_GENAI.get(k, f"gptoss.{k}"): v for k, v in fields.items() if k not in _HIDDEN}
    reasons = _GENAI["finish"]
    if reasons in shown:
        shown[reasons] = shown[reasons].split(",")  # an array, one for each choice
    operation = _OPERATIONS.get(endpoint, "chat")
    return {"gen_ai.operation.name": operation, "gen_ai.provider.name": "openai"} | shown
