"""A head that is fitted to the embedded model and served: the same answers in fewer steps."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptoss.kernels.cpu import native
from tests.support.server_process import ROOT, ServerProcess, running_server

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(native.library() is None, reason="no drafts: the CPU kernels do not run here"),
]
SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
BODIES: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": f"Spell the word {word}."}], "temperature": number % 2, "seed": number}
    for number, word in enumerate(("harbour", "planet", "window", "garden", "yellow", "mirror", "basket", "thunder"))
]
BODIES += [
    {"messages": [{"role": "user", "content": f"What is {a} + 4{a}?"}], "n": 3, "temperature": 1, "seed": a}
    for a in range(3, 7)
]
BODIES.append(
    {
        "messages": [{"role": "user", "content": "Anna is 31."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}},
    }
)
BODIES.append({"messages": [{"role": "user", "content": "Count to 9."}], "logprobs": True, "top_logprobs": 2})


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("head") / "nano"
    command = [sys.executable, "-m", "training.eagle3.fit", "--out", str(folder), "--steps", "250"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=900)
    first, *_ = (float(share.strip(" %\n")) for share in made.stdout.rpartition(":")[2].split(","))
    assert first > 40, made.stdout
    return folder


def answers(server: ServerProcess) -> list[Any]:
    """All at once, then one after the other."""

    def ask(body: dict[str, Any]) -> list[Any]:
        response = httpx.post(
            f"{server.url}/v1/chat/completions", json=body | {"model": "nano", "max_tokens": 120}, timeout=120
        )
        choices: list[Any] = response.raise_for_status().json()["choices"]
        return choices

    with ThreadPoolExecutor(8) as pool:
        return [*pool.map(ask, BODIES), *map(ask, BODIES)]


@pytest.fixture(scope="module")
def expected() -> Iterator[list[Any]]:
    with running_server("--model", "nano", "--num-speculative-tokens", "0") as plain:
        yield answers(plain)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("engines", [1, 2])
def test_answers_are_the_same_and_guesses_are_right(head: Path, expected: list[Any], engines: int) -> None:
    flags = ("--speculative-model", str(head), "--data-parallel-size", str(engines), "--num-threads", "1")
    with running_server("--model", "nano", *flags) as server:
        assert answers(server) == expected
        found = server.stats()["speculation"]
        assert found["speculative_model"] == "nano"
        assert found["head_draft_tokens"] > 50
        assert found["head_accepted_tokens"] > 0.2 * found["head_draft_tokens"]
        assert found["accepted_tokens"] >= found["head_accepted_tokens"]
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        counted = [line for line in lines if line.startswith("gptoss_spec_decode_num_head_accepted_tokens_total")]
        assert len(counted) == engines
        assert sum(float(line.split()[-1]) for line in counted) == found["head_accepted_tokens"]
