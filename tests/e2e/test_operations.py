"""What the person on call relies on: limits of connections, draining, start, logs, true figures."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.operations import BODY, ENDLESS, FLAGS, post, wait_running
from tests.support.server_process import ServerProcess, running_server


def _said(server: ServerProcess, *parts: bytes, pause_s: float = 0.0) -> tuple[bytes, bytes]:
    """What the server says to these bytes until it closes the connection. -> (status line, body)."""
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(10)
        for part in parts:
            connection.sendall(part)
            time.sleep(pause_s)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0], body


def test_headers_and_bodies_that_never_end_are_given_up() -> None:
    limits = ("--body-timeout-s", "0.5", "--header-timeout-s", "0.5", "--max-header-bytes", "2048")
    with running_server(*FLAGS, *limits) as server:
        begun = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(begun + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
            slow.settimeout(10)
            assert b" 408 " in slow.recv(4096).splitlines()[0]
        status, body = _said(server, begun)
        assert b" 408 " in status and "headers" in json.loads(body)["error"]["message"]
        assert _said(server) == (b"", b""), "who says nothing is not answered"
        status, body = _said(server, begun, *[b"x-a: " + b"a" * 900] * 3, pause_s=0.05)
        assert b" 431 " in status and json.loads(body)["error"]["type"] == "invalid_request_error"
        status, body = _said(server, b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b" 400 " in status and "HTTP" in json.loads(body)["error"]["message"]
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        status, _ = _said(server, whole, b"", whole, begun, pause_s=0.4)
        assert b" 200 " in status, "an idle connection may go on; its next headers must end too"
        response = httpx.get(f"{server.url}/v1/models", headers={"x-padding": "a" * 3000})
        assert response.status_code == 431
        assert httpx.get(f"{server.url}/v1/chat/completions/render").status_code in (403, 405)
        refused = httpx.post(f"{server.url}/v1/chat/completions/render", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "debug_endpoint")
        assert (
            "access-control-allow-origin"
            not in httpx.get(f"{server.url}/health", headers={"origin": "http://a.b"}).headers
        )


def test_cors_only_for_the_origins_that_are_named_and_connections_up_to_a_number() -> None:
    flags = ("--cors-origins", "[http://a.example]", "--max-connections-per-address", "3")
    with running_server(*FLAGS, *flags, env={"GPTOSS_API_KEY": "secret-key"}) as server:
        ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
        allowed = httpx.options(f"{server.url}/v1/chat/completions", headers={"origin": "http://a.example", **ask})
        assert allowed.headers["access-control-allow-origin"] == "http://a.example"
        other = httpx.options(f"{server.url}/v1/chat/completions", headers={"origin": "http://b.example", **ask})
        assert "access-control-allow-origin" not in other.headers
        refused = httpx.get(f"{server.url}/v1/models", headers={"origin": "http://a.example"})
        assert refused.status_code == 401
        with contextlib.ExitStack() as held:
            for _ in range(3):
                held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            status, body = _said(server)
            assert b" 429 " in status
            assert json.loads(body)["error"]["type"] == "rate_limit_error"
            assert server.log.count("refusing more") == 1
        assert httpx.get(f"{server.url}/health").status_code == 200, "those that ended count no more"


@pytest.fixture(scope="module")
def fresh() -> Iterator[tuple[ServerProcess, dict[str, Any]]]:
    """A server to which no other test sends requests, and its /stats before any."""
    with running_server(*FLAGS) as server:
        yield server, server.stats()


@pytest.fixture(scope="module")
def plain() -> Iterator[ServerProcess]:
    """A server without what can be turned off."""
    with running_server(*FLAGS, "--no-vllm-metric-names", "--no-warm-up") as server:
        yield server


def test_the_figures_are_what_a_client_measures(fresh: tuple[ServerProcess, dict[str, Any]]) -> None:
    server, _ = fresh
    before = _samples(server)
    ttft, e2e, tokens = [], [], 0
    for number in range(12):
        started, first = time.monotonic(), None
        body = BODY | {"stream": True, "max_tokens": 30, "seed": number, "stream_options": {"include_usage": True}}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
                    if first is None and (delta.get("content") or delta.get("reasoning_content")):
                        first = time.monotonic() - started
                    tokens += (chunk.get("usage") or {}).get("completion_tokens", 0)
        e2e.append(time.monotonic() - started)
        ttft.append(first or e2e[-1])
    stats, after = server.wait_idle(), _samples(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown("gptoss_requests_total ok") == stats["requests"]["ok"] == 12
    assert grown("gptoss_generation_tokens_total") == stats["tokens"]["output"] == tokens
    assert grown("gptoss_e2e_request_latency_seconds_count") == 12
    assert grown("gptoss_e2e_request_latency_seconds_sum") <= sum(e2e)
    assert grown("gptoss_e2e_request_latency_seconds_sum") > 0.5 * sum(e2e)
    assert 0 < grown("gptoss_time_to_first_token_seconds_sum") <= sum(ttft)
    assert stats["latency"]["e2e_s"]["p50"] <= sorted(e2e)[6]
    steps = grown("gptoss_engine_steps_total")
    accepted = grown("gptoss_spec_decode_num_accepted_tokens_total")
    assert tokens - 12 <= steps + accepted <= tokens + 60
    assert grown("gptoss_spec_decode_num_head_draft_tokens_total") == stats["speculation"]["head_draft_tokens"] == 0
    assert stats["speculation"]["speculative_model"] is None
    assert grown("gptoss_engine_step_seconds_total") <= sum(e2e)
    assert grown("gptoss_engine_step_duration_seconds_count") == steps
    assert grown("gptoss_engine_step_duration_seconds_sum") == pytest.approx(grown("gptoss_engine_step_seconds_total"))
    for name in (
        "num_requests_running",
        "prompt_tokens_total",
        "time_to_first_token_seconds_count",
        "kv_cache_usage_perc",
    ):
        assert f"vllm:{name}" in after, name
    assert after["vllm:generation_tokens_total"] == after["gptoss_generation_tokens_total"]


def test_the_names_of_vllms_metrics_can_be_left_out(plain: ServerProcess) -> None:
    assert not [name for name in _samples(plain) if name.startswith("vllm")]


def _samples(server: ServerProcess) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            if "le" not in sample.labels:
                found[" ".join(filter(None, (sample.name, sample.labels.get("outcome"))))] = sample.value
    return found


# --- the end ---


def test_draining_lets_running_requests_finish_and_takes_no_new_ones() -> None:
    with running_server(*FLAGS, "--drain-timeout-s", "60", "--no-warm-up") as server:
        results: dict[str, Any] = {}

        def run() -> None:
            results["answer"] = post(server, max_tokens=400, ignore_eos=True)

        runner = threading.Thread(target=run)
        runner.start()
        wait_running(server)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        refused = post(server)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        ready = httpx.get(f"{server.url}/ready")
        assert ready.status_code == 503 and ready.json()["draining"] is True
        assert httpx.get(f"{server.url}/health").json()["status"] == "degraded"
        runner.join(70)
        assert results["answer"].status_code == 200
        assert results["answer"].json()["usage"]["completion_tokens"] == 400
        assert server.process.wait(10) == 0


def test_what_does_not_finish_in_time_ends_with_an_error_event() -> None:
    with running_server(*FLAGS, "--drain-timeout-s", "0.5", "--no-warm-up") as server:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=ENDLESS | {"stream": True}, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert "shutting down" in json.loads(rest[-2][6:])["error"]["message"]
        assert server.process.wait(10) == 0


def test_the_second_signal_ends_at_once() -> None:
    with running_server(*FLAGS, "--drain-timeout-s", "60", "--no-warm-up") as server:
        with (
            pytest.raises(httpx.HTTPError),
            httpx.stream("POST", f"{server.url}/v1/chat/completions", json=ENDLESS | {"stream": True}, timeout=60) as r,
        ):
            lines = r.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
            server.process.send_signal(signal.SIGTERM)
            for line in lines:
                assert not line.startswith("data: [DONE]")
        assert server.process.wait(10) == 0


def test_ready_waits_for_the_warm_up(fresh: tuple[ServerProcess, dict[str, Any]], plain: ServerProcess) -> None:
    server, first_stats = fresh
    assert "warmed up in" in server.log
    assert httpx.get(f"{server.url}/ready").json() == {
        "ready": True,
        "engine": "ready",
        "warm": True,
        "draining": False,
    }
    assert first_stats["requests"]["total"] == 0, "the warm-up is not a request"
    assert "warmed up" not in plain.log


# --- traces ---


class _Collector(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.received.append((self.path, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def test_a_span_for_each_request_continues_the_clients_trace() -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    collector.received = []  # type: ignore[attr-defined]
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    with running_server(*FLAGS, "--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}") as server:
        headers = {"traceparent": f"00-{trace_id}-b7ad6b7169203331-01"}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=BODY, headers=headers).json()
        assert server.stop() == 0
    collector.shutdown()
    collector.server_close()
    ((path, body),) = collector.received  # type: ignore[attr-defined]
    assert path == "/v1/traces"
    exported = ExportTraceServiceRequest.FromString(gzip.decompress(body) if body[:2] == b"\x1f\x8b" else body)
    (span,) = exported.resource_spans[0].scope_spans[0].spans
    assert span.trace_id.hex() == trace_id and span.parent_span_id.hex() == "b7ad6b7169203331"
    attributes = {a.key: a.value for a in span.attributes}
    assert attributes["gen_ai.response.id"].string_value == answer["id"]
    assert attributes["gen_ai.usage.output_tokens"].int_value == answer["usage"]["completion_tokens"]
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    assert "gptoss.prompt" not in attributes
