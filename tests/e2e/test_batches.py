"""A batch on a server that is killed: each request has exactly one answer."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

NUM_LINES, KILLS = 2000, (500, 1200)  # answers at which the server is killed
LIMIT_S = 600


def start(folder: Path) -> ServerProcess:
    flags = ("--cpu-kv-cache-gib", "0.1", "--no-warm-up", "--batch-dir", str(folder))
    server = ServerProcess("--model", str(checkpoint()), "--served-model-name", "nano", *flags)
    server.wait_ready()
    return server


def client_of(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, _strict_response_validation=True
    )


def requests() -> bytes:
    def line(number: int) -> dict[str, Any]:
        body = {"model": "nano", "prompt": f"{number} and {number % 7}", "max_tokens": 4 + number % 9, "seed": number}
        return {"custom_id": f"r{number}", "method": "POST", "url": "/v1/completions", "body": body}

    return "".join(json.dumps(line(number)) + "\n" for number in range(NUM_LINES)).encode()


@pytest.mark.nightly
def test_a_killed_server_continues_where_it_was(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = start(tmp_path)
        stack.callback(lambda: server.end())
        with client_of(server) as client:
            file = client.files.create(file=("in.jsonl", requests()), purpose="batch")
            batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")

        def num_completed() -> int:
            found = httpx.get(f"{server.url}/v1/batches/{batch.id}").json()
            return int(found["request_counts"]["completed"])

        for num_answers in KILLS:
            wait_until(lambda least=num_answers: num_completed() >= least, LIMIT_S)  # type: ignore[misc]
            before = num_completed()
            server.process.kill()
            server.process.wait()
            server = start(tmp_path)
            assert before <= num_completed() < NUM_LINES, "killed too late"
        wait_until(lambda: num_completed() == NUM_LINES, LIMIT_S)
        with client_of(server) as client:
            wait_until(lambda: client.batches.retrieve(batch.id).status == "completed")
            done = client.batches.retrieve(batch.id)
            assert done.error_file_id is None and done.output_file_id is not None
            answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
        assert sorted(answer["custom_id"] for answer in answers) == sorted(f"r{i}" for i in range(NUM_LINES))
        assert done.usage is not None
        tokens = [answer["response"]["body"]["usage"]["total_tokens"] for answer in answers]
        assert done.usage.total_tokens == sum(tokens)
        assert server.wait_idle()["requests"]["total"] == 0, "figures of requests are those of live ones"
