"""The service level under a repeating load: time to the first token, whole answers, errors, cache, memory.

The limits are the profile's own, told by /stats. What was measured goes into the report.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
REQUESTS, CONCURRENCY = 48, 4
MIN_HIT_RATE = 0.3
MAX_120B_GPU_BYTES = 15 * 10**9
QUESTIONS = (
    "What is 12 + 30?",
    "Count to 7.",
    "Spell the word lamp.",
    "How do I stream?",
    "Hello!",
    "List three fruits.",
)


@dataclass
class Answer:
    ok: bool
    ttft_s: float | None  # to the first reasoning or content token
    e2e_s: float
    tokens: int


def ask(url: str, model: str, number: int) -> Answer:
    """A stream in a conversation that grows: the second half of each pair repeats the first and goes on."""
    question = QUESTIONS[number // 2 % len(QUESTIONS)]
    messages = [{"role": "system", "content": "You are a helpful assistant."}, {"role": "user", "content": question}]
    if number % 2:
        messages += [{"role": "assistant", "content": "I see."}, {"role": "user", "content": "And then?"}]
    body = {
        "model": model,
        "messages": messages,
        "stream": True,
        "max_tokens": 128,
        "reasoning_effort": "low",
        "stream_options": {"include_usage": True},
    }
    started, first, tokens, done = time.monotonic(), None, 0, False
    try:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
            for line in response.iter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return Answer(False, first, time.monotonic() - started, tokens)
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                delta = chunk["choices"][0]["delta"] if chunk["choices"] else {}
                if first is None and (delta.get("content") or delta.get("reasoning_content")):
                    first = time.monotonic() - started
            ok = response.status_code == 200 and done
    except httpx.HTTPError:
        ok = False
    return Answer(ok, first, time.monotonic() - started, tokens)


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)]


@dataclass
class Load:
    answers: list[Answer]
    seconds: float
    before: dict[str, Any]
    after: dict[str, Any]


@pytest.fixture(scope="module")
def load(url: str, model: str, http: httpx.Client) -> Load:
    ask(url, model, 0)  # the first request of a process compiles and caches
    before = http.get("/stats").json()
    started = time.monotonic()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        answers = list(pool.map(lambda n: ask(url, model, n), range(REQUESTS)))
    return Load(answers, time.monotonic() - started, before, http.get("/stats").json())


def test_percentiles_are_right() -> None:
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3
    assert percentile([5.0], 0.5) == 5


def test_time_to_first_token(load: Load, record_property: Any) -> None:
    times = [a.ttft_s for a in load.answers if a.ttft_s is not None]
    assert len(times) >= 0.9 * REQUESTS, "nearly every answer has a token"
    measured, limit = percentile(times, 0.95), load.after["profile_settings"]["ttft_p95_s"]
    record_property("ttft_p50_s", round(percentile(times, 0.5), 4))
    record_property("ttft_p95_s", round(measured, 4))
    assert measured <= limit


def test_whole_answers(load: Load, record_property: Any) -> None:
    times = [a.e2e_s for a in load.answers]
    measured, limit = percentile(times, 0.95), load.after["profile_settings"]["e2e_p95_s"]
    record_property("e2e_p50_s", round(percentile(times, 0.5), 4))
    record_property("e2e_p95_s", round(measured, 4))
    record_property("output_tokens_per_s", round(sum(a.tokens for a in load.answers) / load.seconds, 1))
    assert measured <= limit


def test_errors(load: Load, record_property: Any) -> None:
    failed = sum(not a.ok for a in load.answers)
    record_property("error_ratio", failed / REQUESTS)
    assert failed / REQUESTS < load.after["profile_settings"]["max_error_ratio"]
    counted = load.after["requests"]["ok"] - load.before["requests"]["ok"]
    assert counted == REQUESTS - failed, "the server counts what its clients see"


def test_prompt_cache_hits(load: Load, record_property: Any) -> None:
    before, after = load.before["prompt_cache"], load.after["prompt_cache"]
    rate = (after["hits"] - before["hits"]) / (after["builds"] - before["builds"])
    record_property("prompt_cache_hit_rate", round(rate, 3))
    assert rate >= MIN_HIT_RATE


def test_memory(load: Load, record_property: Any) -> None:
    """On GPUs: what the plan gave each rank is what it holds, and 120b on four and more stays below 15 GB of weights
    each, or the plan has said why not."""
    ranks = load.after["engine"]["ranks"]
    for rank in ranks:
        record_property(f"rank_{rank['rank']}_weight_bytes", rank["weight_bytes"])
        record_property(f"rank_{rank['rank']}_kv_cache_bytes", rank["kv_cache_bytes"])
        assert rank["weight_bytes"] > 0 and rank["kv_cache_bytes"] > 0
    for gpu in load.after.get("gpus", []):
        record_property(f"gpu_{gpu['index']}_used_bytes", gpu["used_bytes"])
        assert gpu["used_bytes"] <= gpu["total_bytes"]
    if load.after["model_size"] == "120b" and len(ranks) >= 4:
        total = sum(rank["weight_bytes"] for rank in ranks)
        worst = max(rank["weight_bytes"] for rank in ranks)
        assert worst < max(MAX_120B_GPU_BYTES, 1.05 * total / len(ranks))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.p0.script import run

    run(__file__)
