"""Fields that clients send besides, and a full queue."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import httpx
import openai

from tests.e2e.contract import MODEL, USER, ask
from tests.support.helpers import checkpoint
from tests.support.server_process import running_server


def test_nulls_unknown_fields_and_harmless_ones_are_accepted(client: openai.OpenAI) -> None:
    nulls = dict.fromkeys(
        [
            "stop",
            "seed",
            "n",
            "tools",
            "tool_choice",
            "response_format",
            "logit_bias",
            "stream_options",
            "user",
            "audio",
            "functions",
            "reasoning_effort",
        ]
    )
    harmless: Any = {
        "user": "u",
        "store": False,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "verbosity": "low",
        "prompt_cache_key": "k",
        "chat_template_kwargs": {"x": 1},
        "top_k": 5,
        "stop": [],
        "tools": [],
        "safety_identifier": "s",
        "modalities": ["text"],
    }
    assert ask(client, extra_body=nulls, seed=None).choices
    answer = ask(client, extra_body=harmless)
    assert answer.service_tier == "default"


def test_one_text_part_renders_like_the_string(client: openai.OpenAI) -> None:
    parts: Any = [
        {"role": "user", "content": [{"type": "text", "text": USER["content"], "cache_control": {"type": "ephemeral"}}]}
    ]
    assert ask(client, messages=parts).usage.prompt_tokens == ask(client).usage.prompt_tokens
    empty: Any = [{"role": "user", "content": ""}]
    assert ask(client, messages=empty).choices


def test_a_full_queue_is_a_429_at_once() -> None:
    flags = ("--model", str(checkpoint()), "--max-num-seqs", "1", "--max-num-waiting", "2", "--cpu-kv-cache-gib", "0.1")
    with running_server(*flags) as small:
        url = f"{small.url}/v1/chat/completions"
        body = {"model": MODEL, "messages": [USER], "max_tokens": 100, "ignore_eos": True}
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            many = list(pool.map(lambda _: httpx.post(url, json=body, timeout=120), range(8)))
        assert sorted(r.status_code for r in many) == [200] * 3 + [429] * 5
        for response in many:
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.elapsed.total_seconds() < min(
                    r.elapsed.total_seconds() for r in many if r.status_code == 200
                )
                assert response.json()["error"]["code"] == "rate_limit_exceeded"
        stats = small.wait_idle()
        assert (stats["requests"]["ok"], stats["requests"]["rejected"]) == (3, 5)
