"""What an outsider can do to a server: only what docs/security.md says.

Tests share two servers: `server`, which is open (with debug endpoints), and `keyed`, which asks for a key. A test that
needs another configuration should check it without a server (tests/quick/api/test_access.py) where it can.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gptoss.cached_files import default_cache_folder
from gptoss.harmony.vocabulary_files import RANKS_NAME
from tests.support.helpers import checkpoint
from tests.support.server_process import PYTHON, ROOT, ServerProcess, running_server
from tests.support.waiting import wait_until

FLAGS = ("--model", str(checkpoint()), "--cpu-kv-cache-gib", "0.1", "--max-model-len", "8192")
BODY: dict[str, Any] = {
    "model": "gpt-oss-nano",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 4,
    "seed": 1,
}
KEYS = "- {name: alice, key: key-of-alice}\n- {name: bob, key: key-of-bob}\n"
ALICE, BOB = ({"authorization": f"Bearer key-of-{name}"} for name in ("alice", "bob"))


@dataclass(frozen=True)
class Keyed:
    """A server that knows alice and bob, and its keys file."""

    server: ServerProcess
    keys_file: Path

    @property
    def url(self) -> str:
        return self.server.url

    def reload(self, text: str, logged: str) -> None:
        """Writes the keys file, sends SIGHUP and waits for a new line in the log."""
        before = self.server.log.count(logged)
        self.keys_file.write_text(text)
        self.server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: self.server.log.count(logged) > before)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(KEYS)
    with running_server(*FLAGS, "--api-keys-file", str(file)) as server:
        yield Keyed(server, file)


def said(server: ServerProcess, *head: bytes) -> bytes:
    """What the server answers to a request of these headers, which no HTTP client would send, until it closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"".join(head) + b"\r\nconnection: close\r\n\r\n")
        return b"".join(iter(lambda: connection.recv(65536), b""))


def failed_start(*flags: str, **environment: str) -> str:
    """What a server that refuses to start writes; fails if it starts or shows a traceback."""
    done = subprocess.run(
        [os.environ.get(PYTHON, sys.executable), "src/server.py", "--port", "0", *flags],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


class TestKeys:
    """Keys that are configured are asked for, whatever becomes of them."""

    def test_a_server_does_not_start_with_keys_that_come_out_empty(self, tmp_path: Path) -> None:
        file = tmp_path / "keys.yaml"
        file.write_text("[]")
        assert "holds no key" in failed_start("--api-keys-file", str(file))
        assert "GPTOSS_API_KEY): an empty or blank key" in failed_start(GPTOSS_API_KEY="")

    @pytest.mark.parametrize("text", ["[]", "", "{}", "- {name: alice, key: '        '}", "- ["])
    def test_keys_that_come_out_empty_at_a_reload_change_nothing(self, keyed: Keyed, text: str) -> None:
        keyed.reload(text, "keys not reloaded")
        assert httpx.get(f"{keyed.url}/v1/models").status_code == 401
        assert httpx.get(f"{keyed.url}/v1/models", headers=ALICE).status_code == 200
        keyed.reload(KEYS, "keys reloaded: 2")

    @pytest.mark.parametrize("key", [b"\xa0", b"\xa0 \xa0", b"\x85", b" \t ", b""])
    @pytest.mark.parametrize("header", [b"authorization: Bearer ", b"x-api-key: ", b"api-key: "])
    def test_a_blank_key_is_no_key(self, keyed: Keyed, header: bytes, key: bytes) -> None:
        answer = said(keyed.server, b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n", header + key)
        assert b" 401 " in answer.partition(b"\r\n")[0]


class TestBrowsers:
    """What a page of another site can make a browser do to a server on this machine."""

    @pytest.mark.parametrize(
        "host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "localhost."]
    )
    def test_names_of_this_machine_are_answered(self, server: ServerProcess, host: str) -> None:
        assert httpx.get(f"{server.url}/stats", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "host",
        [
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil@localhost",
            "192.0.2.1",
            "[::2]",
            "",
            "localhost:80:80",
            "evil.example/localhost",
            "0.0.0.0",
        ],
    )
    @pytest.mark.parametrize("path", ["/stats", "/", "/health/", "/nowhere"])
    def test_other_names_are_not(self, server: ServerProcess, host: str, path: str) -> None:
        response = httpx.get(server.url + path, headers={"host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")

    def test_one_of_two_host_headers_is_enough(self, server: ServerProcess) -> None:
        head = b"GET /stats HTTP/1.1\r\nhost: localhost\r\nhost: evil.example"
        assert b" 403 " in said(server, head).partition(b"\r\n")[0]

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/responses",
            "/v1/responses/input_tokens",
            "/tokenize",
            "/detokenize",
            "/v1/chat/completions/render",
        ],
    )
    @pytest.mark.parametrize(
        "content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", "json"]
    )
    def test_a_body_must_say_that_it_is_json(self, server: ServerProcess, path: str, content_type: str | None) -> None:
        headers = {} if content_type is None else {"content-type": content_type}
        response = httpx.post(server.url + path, content=b"{}", headers=headers)
        assert response.status_code == 415
        assert "'Content-Type: application/json'" in response.json()["error"]["message"]

    @pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "a/b+json"])
    def test_any_spelling_of_json_is_taken(self, server: ServerProcess, content_type: str) -> None:
        body = b'{"prompt": "a"}'
        response = httpx.post(f"{server.url}/tokenize", content=body, headers={"content-type": content_type})
        assert response.status_code == 200

    @pytest.mark.parametrize("path", ["/health", "/stats", "/docs"])
    def test_a_redirect_stays_on_this_host(self, server: ServerProcess, path: str) -> None:
        response = httpx.get(f"{server.url}{path}/?a=1", headers={"host": "localhost:1"})
        assert (response.status_code, response.headers["location"]) == (307, f"{path}?a=1")
        assert httpx.get(f"{server.url}//evil.example/").status_code == 404


class TestKeysApart:
    """What one key learns of another."""

    def test_stats_show_a_key_its_own_requests(self, keyed: Keyed, server: ServerProcess) -> None:
        body = BODY | {"max_tokens": 7000, "ignore_eos": True, "stream": True}

        def running(url: str, headers: dict[str, str]) -> list[str]:
            found: list[str] = httpx.get(f"{url}/stats", headers=headers).json()["running"]
            return found

        for url, headers in ((keyed.url, ALICE), (server.url, {})):
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as r:
                lines = r.iter_lines()  # kept: the stream ends with its iterator
                completion_id = json.loads(next(lines)[6:])["id"]
                own = running(url, headers)
                assert own == ([completion_id] if headers else []), "without keys the id is all that protects it"
                assert not headers or running(url, BOB) == []

    def test_cached_tokens_tell_a_key_of_its_own_requests_alone(self, keyed: Keyed) -> None:
        text = "A prompt that only alice has sent so far. " * 12
        chat = BODY | {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
        raw = {"model": "gpt-oss-nano", "prompt": text, "max_tokens": 1}

        def cached(path: str, body: dict[str, Any], headers: dict[str, str]) -> int:
            url = f"{keyed.url}/v1/{path}"
            usage = httpx.post(url, json=body, headers=headers, timeout=60).json()["usage"]
            count: int = usage["prompt_tokens_details"]["cached_tokens"]
            return count

        for sent in (("chat/completions", chat), ("completions", raw), ("completions", raw | {"cache_salt": "s"})):
            first = [cached(*sent, ALICE), cached(*sent, BOB)]
            assert max(first) < 64, f"{sent}: no more than Harmony's beginning, of earlier requests of the same key"
            assert min(cached(*sent, ALICE), cached(*sent, BOB)) >= max(first) + 64, sent


class TestDebugEndpoints:
    PATHS = ("/docs", "/docs/", "/docs/oauth2-redirect", "/redoc", "/openapi.json", "/v1/chat/completions/render")

    @pytest.mark.parametrize("path", PATHS)
    def test_one_switch_for_all(self, keyed: Keyed, server: ServerProcess, path: str) -> None:
        method = "POST" if path.endswith("render") else "GET"

        def status(url: str, headers: dict[str, str]) -> int:
            return httpx.request(method, url + path, json=BODY, headers=headers, follow_redirects=True).status_code

        assert (status(keyed.url, {}), status(keyed.url, ALICE)) == (401, 403)
        assert status(server.url, {}) == 200


class TestStart:
    def test_an_open_server_on_the_network_warns_and_survives_an_early_sighup(self) -> None:
        server = ServerProcess(*FLAGS, "--host", "0.0.0.0", "--no-warm-up")
        try:
            wait_until(lambda: "gpt-oss server" in server.log, 30)
            for _ in range(5):
                server.process.send_signal(signal.SIGHUP)
                time.sleep(0.05)
            server.wait_ready()
            assert "no API key is set and host 0.0.0.0 is not loopback" in server.log
            assert "keys reloaded: 0" in server.log, "held back, not lost"
            os.kill(server.stats()["engine"]["pid"], signal.SIGHUP)  # as when a terminal closes
            assert httpx.post(f"{server.url}/v1/chat/completions", json=BODY, timeout=60).is_success
            assert server.stats()["engine"]["restarts"] == 0
            anywhere = httpx.get(f"{server.url}/stats/", headers={"host": "some.example"})
            assert anywhere.headers["location"] == "/stats"
        finally:
            server.stop()

    def test_a_key_can_be_required(self) -> None:
        assert "there is no key" in failed_start("--require-api-key", "--host", "0.0.0.0")


LIMITED = ("--engine-heartbeat-timeout-s", "1.5", "--send-timeout-s", "1", "--max-connections", "8")


@dataclass(frozen=True)
class Worn:
    """A server with small limits that was started with a damaged cache, and what was left of an earlier one."""

    server: ServerProcess
    damaged: tuple[Path, ...]
    abandoned: tuple[Path, ...]

    @property
    def url(self) -> str:
        return self.server.url


@pytest.fixture(scope="module")
def worn(server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worn]:
    """`server` runs already, so that the cache that is copied and damaged is whole."""
    folder = tmp_path_factory.mktemp("worn")
    cache = folder / "gpt-oss-server"
    for name in ("native", "vocabulary"):
        with contextlib.suppress(FileNotFoundError):  # no compiler, no compiled kernels
            shutil.copytree(default_cache_folder() / name, cache / name)
    ranks = cache / "vocabulary" / RANKS_NAME
    damaged = (ranks, *(cache / "native").glob("*.so"))
    for path in damaged:
        os.truncate(path, 5000)
    ranks.with_suffix(".sources").write_bytes(b"\xff\n")
    abandoned = (folder / "gpt-oss-run-abcdefgh", cache / "vocabulary" / ".making-abcdefgh")
    for path in abandoned:
        path.mkdir()
    env = {"XDG_CACHE_HOME": str(folder), "TMPDIR": str(folder)}
    with running_server(*FLAGS, *LIMITED, env=env) as running:
        yield Worn(running, damaged, abandoned)


class TestMachine:
    """A damaged disk, and what runs short."""

    def test_a_damaged_cache_is_made_again_and_named(self, worn: Worn, server: ServerProcess) -> None:
        engine = worn.server.stats()["engine"]
        assert engine["kernel_path"] == server.stats()["engine"]["kernel_path"]
        remade = [path for path in worn.damaged if path.stat().st_size > 5000]
        suffixes = {".tiktoken", ".so"} if engine["kernel_path"] == "native" else {".tiktoken"}
        assert {path.suffix for path in remade} == suffixes
        for path in remade:
            assert f"damaged cache: {path} has " in worn.server.log
        assert engine["restarts"] == 0
        assert "Traceback" not in worn.server.log

    def test_temporary_folders_of_a_killed_start_are_removed(self, worn: Worn) -> None:
        assert not [path for path in worn.abandoned if path.exists()]

    def test_a_cache_that_cannot_be_written_is_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "home").write_bytes(b"")
        code = "from gptoss.harmony.vocabulary_files import load_vocabulary; print(load_vocabulary().source)"
        env = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "bundled" in done.stdout
        assert done.stderr.count("\n") == 1 and "set XDG_CACHE_HOME to" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["home"]

    def test_ready_is_red_while_the_engine_is_stopped(self, worn: Worn) -> None:
        def status() -> int:
            return httpx.get(f"{worn.url}/ready").status_code

        assert status() == 200
        pid = worn.server.stats()["engine"]["pid"]
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_until(lambda: status() == 503)
            report = httpx.get(f"{worn.url}/health")
            assert report.status_code == 200 and report.json()["status"] == "degraded"
            assert "no heartbeat of the engine" in report.json()["reasons"][0]
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: status() == 200)
        assert httpx.post(f"{worn.url}/v1/chat/completions", json=BODY).status_code == 200
        assert worn.server.stats()["engine"]["restarts"] == 0

    def test_json_answers_that_are_not_read_are_given_up(self, worn: Worn) -> None:
        process = psutil.Process(worn.server.process.pid)
        before = process.num_fds()
        body = json.dumps({"model": "gpt-oss-nano", "prompt": "a b " * 4_000}).encode()
        head = f"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
        request = head.encode() + b"content-type: application/json\r\n\r\n" + body
        with socket.create_connection(("127.0.0.1", worn.server.port), timeout=2) as connection:
            with contextlib.suppress(TimeoutError, ConnectionError):
                for _ in range(300):  # answers of 50 kB, more than the kernel's buffers take
                    connection.sendall(request)
            wait_until(lambda: "did not read its answer for 1 s" in worn.server.log)
            wait_until(lambda: process.num_fds() <= before)
        assert httpx.get(f"{worn.url}/health").status_code == 200

    def test_health_is_answered_when_no_connection_is_left(self, worn: Worn) -> None:
        with contextlib.ExitStack() as held:
            for _ in range(8):
                held.enter_context(socket.create_connection(("127.0.0.1", worn.server.port)))
            refused = httpx.get(f"{worn.url}/v1/models")
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "overloaded"
            assert httpx.get(f"{worn.url}/health").status_code == 200
            assert httpx.get(f"{worn.url}/ready").status_code == 200
            assert "8 connections are open (max_connections)" in worn.server.log
        wait_until(lambda: httpx.get(f"{worn.url}/v1/models").status_code == 200)


class TestWork:
    """Requests that ask for much work."""

    LONG = "".join(random.Random(1).choices("etaoinshr", k=4_000_000))

    @pytest.mark.parametrize(
        ("path", "body", "param"),
        [
            ("/tokenize", {"prompt": LONG}, "prompt"),
            ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
            ("/detokenize", {"tokens": [1] * 400_000}, "tokens"),
            ("/v1/responses/input_tokens", {"input": LONG}, "input"),
            ("/v1/responses", {"model": "gpt-oss-nano", "input": LONG}, "input"),
            ("/v1/completions", {"model": "gpt-oss-nano", "prompt": LONG}, "prompt"),
            ("/v1/chat/completions", {**BODY, "messages": [{"role": "user", "content": LONG}]}, "messages"),
        ],
    )
    def test_text_without_a_break_is_counted_up_to_the_limit(
        self, keyed: Keyed, path: str, body: dict[str, Any], param: str
    ) -> None:
        answer = httpx.post(f"{keyed.url}{path}", json=body, headers=ALICE, timeout=60)
        error = answer.json()["error"]
        assert answer.status_code == 400, error
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")

    def test_bodies_of_many_small_things_are_refused(self, keyed: Keyed) -> None:
        for data in (b'{"messages": [' + b"[]," * 300_000 + b"1]}", b'{"tokens": [' + b"1," * 1_100_000 + b"1]}"):
            headers = ALICE | {"content-type": "application/json"}
            url = f"{keyed.url}/v1/chat/completions"
            answer = httpx.post(url, content=data, headers=headers, timeout=60)
            assert answer.status_code == 413
            assert "The body contains more than" in answer.json()["error"]["message"]

    def test_a_full_bias_of_many_choices_is_kept_once(self, keyed: Keyed) -> None:
        bias = {str(token): 1.5 for token in range(201_088)}
        children = psutil.Process(keyed.server.process.pid).children(recursive=True)
        before = sum(child.memory_info().rss for child in children)
        answer = httpx.post(
            f"{keyed.url}/v1/chat/completions",
            json={**BODY, "n": 32, "logit_bias": bias, "max_tokens": 1},
            headers=ALICE,
            timeout=120,
        )
        assert answer.status_code == 200 and len(answer.json()["choices"]) == 32
        grown = sum(child.memory_info().rss for child in children) - before
        assert grown < 200 * 2**20  # 32 copies as objects would take 600 MB

    def test_limits_hold_for_every_route_that_works_and_count_choices(self, keyed: Keyed) -> None:
        limited = "- {name: carol, key: key-of-carol, requests_per_minute: 6, tokens_per_minute: 200}\n"
        keyed.reload(KEYS + limited, "keys reloaded: 3")
        try:
            carol = {"authorization": "Bearer key-of-carol"}

            def post(path: str, body: dict[str, Any]) -> httpx.Response:
                return httpx.post(keyed.url + path, json=body, headers=carol, timeout=60)

            too_much = post("/v1/chat/completions", {**BODY, "max_tokens": 1000})
            assert too_much.status_code == 429
            assert "This request may use 1" in too_much.json()["error"]["message"]
            assert post("/tokenize", {"prompt": "a"}).status_code == 200
            assert post("/detokenize", {"tokens": [1]}).status_code == 200
            counted = post("/v1/responses/input_tokens", {"input": "Hi"})
            assert counted.headers["x-ratelimit-remaining-requests"] == "2"
            many = post("/v1/chat/completions", {**BODY, "n": 3})
            assert many.status_code == 429
            assert "counts as 3, one for each choice" in many.json()["error"]["message"]
            assert post("/v1/completions", {"model": "gpt-oss-nano", "prompt": ["a"], "n": 1}).status_code == 200
            assert post("/tokenize", {"prompt": "a"}).status_code == 429
        finally:
            keyed.reload(KEYS, "keys reloaded: 2")
