"""What the person on call relies on: keys, limits, draining, cancelling, logs, true figures."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gzip
import hashlib
import http.server
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess, running_server
from tests.support.waiting import wait_until

FLAGS = ("--model", str(checkpoint()), "--cpu-kv-cache-gib", "0.1", "--max-model-len", "8192")
BODY: dict[str, Any] = {
    "model": "gpt-oss-nano",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 8,
    "seed": 1,
}
ENDLESS = {**BODY, "max_tokens": 7000, "ignore_eos": True}


def post(
    server: ServerProcess, key: str | None = None, path: str = "/v1/chat/completions", **more: Any
) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}{path}", json=BODY | more, headers=headers, timeout=60)


def wait_running(server: ServerProcess, count: int = 1, **headers: str) -> None:
    wait_until(lambda: httpx.get(f"{server.url}/stats", headers=headers).json()["engine"]["num_running"] >= count)


# --- keys ---


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    digest = hashlib.sha256(b"key-of-bob").hexdigest()
    file.write_text(
        f"- {{name: alice, key: key-of-alice}}\n- {{name: bob, sha256: {digest}, max_concurrent_requests: 1}}\n"
        "- {name: carol, key: key-of-carol, requests_per_minute: 3}\n"
        "- {name: dave, key: key-of-dave, tokens_per_minute: 150}\n"
    )
    env = {"GPTOSS_API_KEY": "key-of-the-operator"}
    with running_server(*FLAGS, "--api-keys-file", str(file), "--log-format", "json", env=env) as server:
        server.keys_file = file  # type: ignore[attr-defined]
        yield server


PATHS = (
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/x"),
    ("DELETE", "/v1/responses/x"),
    ("GET", "/v1/responses/x/input_items"),
    ("GET", "/v1/models"),
    ("GET", "/stats"),
    ("GET", "/metrics"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("POST", "/v1/cancel/x"),
    ("POST", "/cancel/x"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/nowhere"),
)


@pytest.mark.parametrize(("method", "path"), PATHS)
@pytest.mark.parametrize("key", [None, "wrong", "key-of-alice-and-more"])
def test_every_route_wants_a_key(keyed: ServerProcess, method: str, path: str, key: str | None) -> None:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    response = httpx.request(method, keyed.url + path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert key is None or not key or key not in response.text


def test_probes_and_the_page_are_open(keyed: ServerProcess) -> None:
    for path in ("/health", "/ready", "/", "/page/page.js"):
        assert httpx.get(keyed.url + path).status_code == 200, path


@pytest.mark.parametrize("key", ["key-of-alice", "key-of-bob", "key-of-the-operator"])
def test_right_keys_are_let_in(keyed: ServerProcess, key: str) -> None:
    assert post(keyed, key).status_code == 200
    assert httpx.get(f"{keyed.url}/v1/models", headers={"x-api-key": key}).status_code == 200
    with openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key) as client:
        assert client.models.list().data
    wrong = openai.OpenAI(base_url=f"{keyed.url}/v1", api_key=key + "x", max_retries=0)
    with wrong as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_requests_per_minute(keyed: ServerProcess) -> None:
    left = [post(keyed, "key-of-carol").headers["x-ratelimit-remaining-requests"] for _ in range(3)]
    assert left == ["2", "1", "0"]
    refused = post(keyed, "key-of-carol")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert post(keyed, "key-of-alice").status_code == 200, "of that key alone"
    assert httpx.get(f"{keyed.url}/stats", headers={"authorization": "Bearer key-of-carol"}).status_code == 200


def test_tokens_per_minute(keyed: ServerProcess) -> None:
    first = post(keyed, "key-of-dave")
    assert first.headers["x-ratelimit-limit-tokens"] == "150"
    spent = first.json()["usage"]["total_tokens"]
    second = post(keyed, "key-of-dave")
    assert int(second.headers["x-ratelimit-remaining-tokens"]) == 150 - spent
    third = post(keyed, "key-of-dave")
    assert int(third.headers["x-ratelimit-remaining-tokens"]) == 150 - spent - second.json()["usage"]["total_tokens"]
    codes = [post(keyed, "key-of-dave").status_code for _ in range(2)]
    assert codes[-1] == 429
    message = post(keyed, "key-of-dave").json()["error"]["message"]
    assert message.startswith("Limit of 150 tokens per minute reached")


def test_requests_at_once(keyed: ServerProcess) -> None:
    headers = {"authorization": "Bearer key-of-bob"}
    with httpx.stream(
        "POST", f"{keyed.url}/v1/chat/completions", json=ENDLESS | {"stream": True}, headers=headers, timeout=60
    ) as response:
        lines = response.iter_lines()  # kept: the stream ends with its iterator
        next(lines)
        refused = post(keyed, "key-of-bob")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_exceeded")
    wait_until(lambda: post(keyed, "key-of-bob").status_code == 200)


def test_keys_are_read_again_on_sighup(keyed: ServerProcess) -> None:
    file: Path = keyed.keys_file  # type: ignore[attr-defined]
    before = file.read_text()
    assert post(keyed, "key-of-erin").status_code == 401
    file.write_text(before + "- {name: erin, key: key-of-erin}\n")
    keyed.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert post(keyed, "key-of-erin").status_code == 200
    file.write_text("- {name: broken}\n")
    keyed.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert post(keyed, "key-of-erin").status_code == 200, "a wrong file changes nothing"
    assert "exactly one of key and sha256" in keyed.log
    file.write_text(before)
    keyed.process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert post(keyed, "key-of-erin").status_code == 401


def test_one_line_in_the_log_for_each_request_and_no_secret(keyed: ServerProcess) -> None:
    secret = "my cat is called Minou"
    answer = post(keyed, "key-of-alice", messages=[{"role": "user", "content": secret}])
    request_id, completion_id = answer.headers["x-request-id"], answer.json()["id"]
    wait_until(lambda: completion_id in keyed.log)
    lines = [json.loads(line) for line in keyed.log.splitlines()]
    (line,) = [entry for entry in lines if entry.get("id") == completion_id]
    usage = answer.json()["usage"]
    assert line["request_id"] == request_id
    assert (line["key"], line["event"], line["finish"]) == ("alice", "ok", answer.json()["choices"][0]["finish_reason"])
    assert (line["prompt_tokens"], line["output_tokens"]) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert line["model_id"] == "gpt-oss-nano" and line["profile"] == "balanced"
    assert 0 <= line["ttft_ms"] <= line["e2e_ms"]
    for hidden in (secret, "key-of-alice", "key-of-the-operator", "Minou"):
        assert hidden not in keyed.log


def test_only_its_owner_cancels_a_request(keyed: ServerProcess) -> None:
    headers = {"authorization": "Bearer key-of-alice"}
    with httpx.stream(
        "POST", f"{keyed.url}/v1/chat/completions", json=ENDLESS | {"stream": True}, headers=headers, timeout=60
    ) as response:
        lines = response.iter_lines()
        completion_id = json.loads(next(lines)[6:])["id"]
        assert post(keyed, "key-of-the-operator", f"/v1/cancel/{completion_id}").status_code == 404
        assert post(keyed, "key-of-alice", f"/v1/cancel/{completion_id}").status_code == 200
        assert any("request_cancelled" in line for line in lines)


def test_only_its_owner_reads_a_stored_response(keyed: ServerProcess) -> None:
    alice, other = ({"authorization": f"Bearer key-of-{who}"} for who in ("alice", "the-operator"))
    url = f"{keyed.url}/v1/responses"
    body = {"model": "gpt-oss-nano", "input": "Hello", "max_output_tokens": 3}
    name = httpx.post(url, json=body, headers=alice, timeout=60).json()["id"]
    on = body | {"previous_response_id": name}
    assert httpx.get(f"{url}/{name}", headers=other).status_code == 404
    assert httpx.delete(f"{url}/{name}", headers=other).status_code == 404
    assert httpx.post(url, json=on, headers=other, timeout=60).status_code == 400
    assert httpx.get(f"{url}/{name}", headers=alice).json()["id"] == name
    assert httpx.post(url, json=on, headers=alice, timeout=60).status_code == 200


# --- cancel, limits of size and time, figures ---


@pytest.mark.parametrize("prefix", ["/v1/cancel/", "/cancel/"])
@pytest.mark.parametrize("by", ["completion id", "x-request-id"])
def test_cancelling_a_stream(server: ServerProcess, prefix: str, by: str) -> None:
    before = server.wait_idle()["requests"]
    with httpx.stream(
        "POST", f"{server.url}/v1/chat/completions", json=ENDLESS | {"stream": True}, timeout=60
    ) as response:
        lines = response.iter_lines()
        name = json.loads(next(lines)[6:])["id"] if by == "completion id" else response.headers["x-request-id"]
        cancelled = httpx.post(f"{server.url}{prefix}{name}")
        assert cancelled.json() == {"id": name, "object": "request.cancelled", "cancelled": True}
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2][6:])["error"]["code"] == "request_cancelled"
    after = server.wait_idle()["requests"]
    assert after["cancelled"] == before["cancelled"] + 1 and after["failed"] == before["failed"]
    assert httpx.post(f"{server.url}{prefix}{name}").status_code == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_cancelling_a_json_request(keyed: ServerProcess, path: str) -> None:
    headers = {"authorization": "Bearer key-of-alice"}
    body = (
        ENDLESS if "chat" in path else {"model": "gpt-oss-nano", "prompt": "a", "max_tokens": 7000, "ignore_eos": True}
    )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(httpx.post, keyed.url + path, json=body, headers=headers, timeout=60)
        wait_running(keyed, authorization="Bearer key-of-alice")
        line = ""
        while not line:  # the id is in no header yet: a client that wants to cancel streams
            stats = httpx.get(f"{keyed.url}/stats", headers=headers).json()
            line = next(iter(stats["running"]), "")
        assert httpx.post(f"{keyed.url}/cancel/{line}", headers=headers).status_code == 200
        assert (answer.result().status_code, answer.result().json()["error"]["code"]) == (409, "request_cancelled")


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
