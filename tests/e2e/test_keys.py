"""Keys, their limits, and what one key sees and cancels of another's requests."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.operations import ENDLESS, FLAGS, post, wait_running
from tests.support.server_process import ServerProcess, running_server
from tests.support.waiting import wait_until

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


# --- cancelling ---


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
