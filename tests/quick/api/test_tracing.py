"""Attributes of spans, in the types of OpenTelemetry's GenAI conventions."""

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gptoss.api.telemetry.request_record import RequestRecord, ToolCallRecord
from gptoss.api.telemetry.tracing import Tracing


@pytest.mark.parametrize(
    ("endpoint", "operation"),
    [("/v1/chat/completions", "chat"), ("/v1/responses", "chat"), ("/v1/completions", "text_completion")],
)
@pytest.mark.parametrize("finish", ["stop", "stop,length", "tool_calls,gone"])
def test_a_span_has_a_list_of_reasons_and_the_operation(endpoint: str, operation: str, finish: str) -> None:
    spans = InMemorySpanExporter()
    tracing = Tracing("http://127.0.0.1:1", SimpleSpanProcessor(spans))
    fields: dict[str, Any] = {"id": "x", "finish": finish, "output_tokens": 3, "prompt": "secret"}
    tracing.finished(RequestRecord(endpoint=endpoint, request_id="r"), fields)
    (span,) = spans.get_finished_spans()
    assert span.attributes["gen_ai.response.finish_reasons"] == tuple(finish.split(","))
    assert span.attributes["gen_ai.operation.name"] == operation
    assert span.attributes["gen_ai.usage.output_tokens"] == 3
    assert "secret" not in str(dict(span.attributes))
    tracing.close()


def test_a_tool_call_is_a_span_within_the_requests() -> None:
    spans = InMemorySpanExporter()
    tracing = Tracing("http://127.0.0.1:1", SimpleSpanProcessor(spans))
    record = RequestRecord(endpoint="/v1/responses")
    record.tool_calls += [
        ToolCallRecord("mcp:docs", "search", record.arrival + 3.0, 2.0, None),
        ToolCallRecord("python", "python", record.arrival + 4.0, 0.5, "timeout"),
    ]
    tracing.finished(record, {"id": "x", "finish": "stop"})
    search, python, request = spans.get_finished_spans()
    assert [span.name for span in (search, python)] == ["execute_tool search", "execute_tool python"]
    assert all(span.parent.span_id == request.context.span_id for span in (search, python))
    assert search.attributes["gen_ai.tool.name"] == "search" and search.attributes["gptoss.tool"] == "mcp:docs"
    assert search.status.is_ok or search.status.is_unset
    assert python.attributes["error.type"] == "timeout" and not python.status.is_ok
    assert search.end_time - search.start_time == 2_000_000_000
    tracing.close()
