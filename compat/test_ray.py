"""The server on Ray Serve, with real Ray on this machine and the embedded model."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve

from gptoss.config.errors import ConfigError
from gptoss.ray_serve import RayOptions, _read, build, main

PORT = 18_941
URL = f"http://127.0.0.1:{PORT}"
CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
ARGS = {"flags": ["--model", "nano", "--num-threads", "1", "--cpu-kv-cache-gib", "0.2"], "drain_s": 60.0}
ARGS |= {"min_replicas": 2, "max_replicas": 2}
WORDS = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima " * 12


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    os.environ |= {f"RAY_SERVE_{name}_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1" for name in ("REPLICA", "HANDLE")}
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    deploy(ARGS)
    yield
    serve.shutdown()
    ray.shutdown()


def deploy(args: dict[str, Any]) -> None:
    serve.run(build(args), name="gptoss", route_prefix="/")


def client() -> httpx.Client:
    return httpx.Client(base_url=URL, timeout=120, trust_env=False)


def chat(messages: list[dict[str, str]], **more: Any) -> dict[str, Any]:
    return {"model": "gpt-oss-nano", "messages": messages, "temperature": 0, "max_tokens": 24, **more}


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def replicas() -> list[psutil.Process]:
    """The processes of the engine's replicas."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ray::ServeReplica:gptoss:engine" in " ".join(process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_conversations_stay_with_their_replica() -> None:
    """Twelve of them, four turns each, named in the four ways that clients have."""
    names: list[Callable[[int], tuple[dict[str, str], dict[str, str]]]] = [
        lambda i: ({"x-session-id": f"s{i}"}, {}),
        lambda i: ({"X-Claude-Code-Session-Id": f"c{i}"}, {}),
        lambda i: ({}, {"prompt_cache_key": f"p{i}"}),
        lambda i: ({}, {"user": f"u{i}"}),
    ]
    used: dict[int, set[str]] = {}
    with client() as http:
        for conversation in range(12):
            headers, fields = names[conversation % 4](conversation)
            messages = [{"role": "user", "content": f"{conversation} {WORDS}. What is 12 + 30?"}]
            for turn in range(4):
                answer = http.post(CHAT, json=chat(messages, **fields), headers=headers)
                assert answer.status_code == 200, answer.text
                used.setdefault(conversation, set()).add(answer.headers["x-replica"])
                cached = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
                assert (cached >= 64) == (turn > 0), (conversation, turn, cached)
                messages += [answer.json()["choices"][0]["message"], {"role": "user", "content": f"And {turn} + 5?"}]
    assert all(len(found) == 1 for found in used.values())
    assert len(set.union(*used.values())) == 2  # both are used


def test_a_response_is_continued_where_it_is_stored() -> None:
    with client() as http:
        for number in range(6):
            first = http.post(RESPONSES, json={"model": "gpt-oss-nano", "input": f"My name is Ada {number}."}).json()
            body = {"model": "gpt-oss-nano", "input": "What is my name?", "previous_response_id": first["id"]}
            second = http.post(RESPONSES, json=body)
            assert second.status_code == 200, second.text
            assert http.get(f"{RESPONSES}/{first['id']}").json()["id"] == first["id"]
            assert http.delete(f"{RESPONSES}/{second.json()['id']}").status_code == 200


def test_an_answer_is_streamed_and_a_client_that_leaves_frees_its_replica() -> None:
    body = chat([{"role": "user", "content": "Count from 1 to 90."}], max_tokens=3000, ignore_eos=True, stream=True)
    named = {"x-session-id": "leaving"}

    def running() -> int:
        with client() as http:
            found: int = http.get("/stats", headers=named).json()["engine"]["num_running"]
        return found

    with client() as http, http.stream("POST", CHAT, json=body, headers=named) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        started = time.monotonic()
        first = [json.loads(next(lines)[6:]) for _ in range(5)]
        assert len({chunk["id"] for chunk in first}) == 1 and time.monotonic() - started < 20
        assert running() == 1
    until(lambda: running() == 0, 20)


def test_errors_are_the_servers_own() -> None:
    with client() as http:
        half = json.dumps(chat([{"role": "user", "content": "Hi."}], user="\ud800")).encode()
        for body in (b"{", b"[" * 100_000, half):
            answer = http.post(CHAT, content=body, headers={"content-type": "application/json"}, timeout=20)
            assert answer.status_code == 400 and "body" in answer.json()["error"]["message"]
        wrong = http.post(CHAT, json=chat([], model="nix"))
        assert wrong.status_code in (400, 404) and "error" in wrong.json()
        assert http.get("/nowhere").status_code == 404
    with pytest.raises(ValueError, match=r"args\.min_replica is unknown"):
        RayOptions.of({"min_replica": 1})
    with pytest.raises(ValueError, match="min_replicas"):
        RayOptions.of({"min_replicas": 3, "max_replicas": 2})
    with pytest.raises(ConfigError, match="batch_dir .* 2 replicas"):
        build(ARGS | {"flags": ["--model", "nano", "--batch-dir", "batches"]})


def test_wrong_flags_are_named_before_ray_starts(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, wanted in (
        (["--replicas", "two"], "two is not MIN"),
        (["--replicas", "1:2", "--batch-dir", "x"], "batch_dir"),
    ):
        with pytest.raises(SystemExit):
            main(flags)
        assert wanted in capsys.readouterr().err


def test_no_more_of_a_body_is_read_than_its_limit() -> None:
    asked = 0

    async def receive() -> dict[str, Any]:
        nonlocal asked
        asked += 1
        assert asked < 100
        return {"type": "http.request", "body": b"a" * 1000, "more_body": True}

    assert len(asyncio.run(_read(receive, 5000))) == 6000
    chunks = (b"a" * 1_000_000 for _ in range(30))
    with client() as http:
        assert http.post(CHAT, content=chunks, headers={"content-type": "application/json"}).status_code == 413


def test_a_killed_replica_costs_its_own_streams_alone() -> None:
    """And another one takes its place, with its engine's process."""
    results: list[tuple[bool, bool]] = []  # had begun, failed
    end = threading.Event()

    def ask(number: int) -> None:
        with client() as http:
            while not end.is_set():
                lines = [""]
                body = chat([{"role": "user", "content": f"What is {number} + 30?"}], stream=True)
                try:
                    with http.stream("POST", CHAT, json=body) as answer:
                        lines += (line for line in answer.iter_lines() if line)
                except httpx.HTTPError as error:
                    lines.append(f"failed: {error!r}")
                results.append((lines[1].startswith("data: {"), lines[-1] != "data: [DONE]"))

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for number in range(6):
            pool.submit(ask, number)
        until(lambda: len(results) > 20)
        victim = replicas()[0]
        children = victim.children(recursive=True)
        assert any("multiprocessing" in " ".join(child.cmdline()) for child in children)  # its engine
        os.kill(victim.pid, signal.SIGKILL)
        until(lambda: len(replicas()) == 2 and victim.pid not in {p.pid for p in replicas()}, 90)
        seen = len(results)
        until(lambda: len(results) > seen + 20)
        end.set()
    failures = [begun for begun, failed in results if failed]
    assert len(failures) <= 6 and all(failures), (len(failures), len(results))
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children), 30)


def test_a_rolling_update_loses_no_stream() -> None:
    body = chat([{"role": "user", "content": "Count."}], max_tokens=1500, ignore_eos=True, stream=True)
    with client() as http, http.stream("POST", CHAT, json=body) as answer:
        lines = answer.iter_lines()
        next(line for line in lines if line.startswith("data: {"))
        deploy(ARGS | {"flags": [*ARGS["flags"], "--seed", "1"]})
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]" and len(rest) > 100


def test_it_grows_with_waiting_tokens_and_shrinks() -> None:
    scaled = {"min_replicas": 1, "max_replicas": 2, "target_waiting_tokens": 500}
    deploy(ARGS | scaled | {"upscale_delay_s": 1.0, "downscale_delay_s": 3.0})
    until(lambda: len(replicas()) == 1, 90)
    end = threading.Event()

    def ask(number: int) -> None:
        with client() as http:
            while not end.is_set():
                http.post(CHAT, json=chat([{"role": "user", "content": f"{number} {time.monotonic()} {WORDS * 4}"}]))

    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        for number in range(40):
            pool.submit(ask, number)
        until(lambda: len(replicas()) == 2, 90)
        end.set()
    until(lambda: len(replicas()) == 1, 90)
