"""The same request is the same prompt, in this process, in another, tomorrow; and the same answer where it is asked
for."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
        },
    },
}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "user", "content": "Hello!"}]},
    "low effort": {"messages": [{"role": "user", "content": "Hello!"}], "reasoning_effort": "low"},
    "system": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]},
    "tools": {"messages": [{"role": "user", "content": "Weather in Oslo?"}], "tools": [TOOL]},
    "turns": {
        "messages": [
            {"role": "user", "content": "My name is Ada."},
            {"role": "assistant", "content": "Hello Ada."},
            {"role": "user", "content": "What is my name?"},
        ]
    },
    "unicode": {"messages": [{"role": "user", "content": "Zürich 東京 🙂 <|start|>"}]},
}
# sha256 over the ids as 4-byte little-endian numbers, first 16 digits: prompts of version harmony-v1
GOLDEN = {
    "plain": "97a1deaa2ac7e50b",
    "low effort": "26cf73d6ad01c5e5",
    "system": "e87fc04803913245",
    "tools": "08a6eecac5d2fd81",
    "turns": "10196d5bcff7cb5d",
    "unicode": "b6df962860233f86",
}


def prompt_ids(http: httpx.Client, body: dict[str, Any]) -> list[int]:
    response = http.post("/tokenize", json={"reasoning_effort": "medium"} | body)
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["tokens"]
    return ids


def digest(ids: list[int]) -> str:
    return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids)).hexdigest()[:16]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_prompt_never_changes(http: httpx.Client, name: str) -> None:
    seen = {tuple(prompt_ids(http, REQUESTS[name])) for _ in range(20)}
    assert len(seen) == 1
    assert digest(list(seen.pop())) == GOLDEN[name]


def test_another_process_builds_the_same_prompt(http: httpx.Client) -> None:
    code = """
import json, sys
from gptoss.harmony.vocabulary_files import load_vocabulary
from gptoss.prompt_builder import PromptBuilder
from tests.support.conversations import conversation, definitions
builder = PromptBuilder(load_vocabulary())
for body in json.load(sys.stdin):
    said = conversation(body["messages"])
    tools = definitions([t["function"] for t in body.get("tools", ())])
    print(json.dumps(builder.build(said, tools=tools, effort=body.get("reasoning_effort", "medium")).token_ids))
"""
    for seed in ("0", "12345"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(list(REQUESTS.values())),
            text=True,
            cwd=ROOT,
            capture_output=True,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
            check=True,
        )
        built = [json.loads(line) for line in done.stdout.splitlines()]
        assert built == [prompt_ids(http, body) for body in REQUESTS.values()]


def test_the_effort_is_in_the_prompt_and_nothing_else_changes(http: httpx.Client) -> None:
    medium, low = prompt_ids(http, REQUESTS["plain"]), prompt_ids(http, REQUESTS["low effort"])
    assert len(medium) == len(low)
    assert sum(a != b for a, b in zip(medium, low, strict=True)) == 1


def test_usage_counts_the_prompt_that_was_built(http: httpx.Client, model: str) -> None:
    for body in REQUESTS.values():
        asked = {"model": model, "max_tokens": 1, "reasoning_effort": "medium"} | body
        usage = http.post("/v1/chat/completions", json=asked).json()["usage"]
        assert usage["prompt_tokens"] == len(prompt_ids(http, body))


def test_the_version_is_told(http: httpx.Client) -> None:
    told = http.post("/tokenize", json=REQUESTS["plain"]).json()["prompt_version"]
    assert told == http.get("/health").json()["prompt_version"] == "harmony-v1"


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 7}], ids=["greedy", "seeded"])
def test_the_same_request_gets_the_same_answer(http: httpx.Client, model: str, sampling: dict[str, Any]) -> None:
    body = {"model": model, "max_tokens": 48, **REQUESTS["plain"], **sampling}
    answers = {
        json.dumps(http.post("/v1/chat/completions", json=body).json()["choices"], sort_keys=True) for _ in range(5)
    }
    assert len(answers) == 1


def test_another_seed_gets_another_answer(http: httpx.Client, model: str) -> None:
    """On a raw prompt that no model is sure about: a trained one may be sure of its answer to a question."""
    body = {"model": model, "prompt": "a", "max_tokens": 24, "temperature": 2}
    texts = [http.post("/v1/completions", json=body | {"seed": seed}).json()["choices"][0]["text"] for seed in range(5)]
    assert len(set(texts)) > 1
    again = http.post("/v1/completions", json=body | {"seed": 0}).json()["choices"][0]["text"]
    assert again == texts[0]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.p0.script import run

    run(__file__)
