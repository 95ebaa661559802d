"""Stop strings, logprobs, penalties and biases act on the answer."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.contract import ANALYSIS, MODEL, VOCABULARY, ask, fold
from tests.support.server_process import ServerProcess


def content_of(client: openai.OpenAI, **options: Any) -> str:
    extra = {"reasoning_budget": 0, **options.pop("extra_body", {})}
    text: str = ask(client, extra_body=extra, temperature=0, **options).choices[0].message.content
    return text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_cuts_the_content_before_it(client: openai.OpenAI, stream: bool) -> None:
    whole = content_of(client)
    for start, end in ((5, 7), (10, 16), (len(whole) // 2, len(whole) // 2 + 3)):
        stop = whole[start:end]
        wanted = whole[: whole.index(stop)]
        answer = ask(client, temperature=0, stop=["never", stop], stream=stream, extra_body={"reasoning_budget": 0})
        if stream:
            folded = fold(list(answer))[0]
            assert (folded["content"], folded["finish"]) == (wanted, "stop")
        else:
            assert (answer.choices[0].message.content or "", answer.choices[0].finish_reason) == (wanted, "stop")


def test_several_choices_end_with_the_last_stop_string(client: openai.OpenAI, server: ServerProcess) -> None:
    """The engine knows of no stop strings: left alone it would go on for each choice."""
    before = server.wait_idle()["engine"]["num_steps_total"]
    whole = content_of(client)
    extra = {"reasoning_budget": 0}
    answer = ask(client, n=2, stop=whole[:3], max_tokens=3000, temperature=0, extra_body=extra)
    assert [c.finish_reason for c in answer.choices] == ["stop", "stop"]
    assert server.stats()["engine"]["num_steps_total"] - before < 1000


def test_a_choice_that_met_a_stop_string_runs_no_further(client: openai.OpenAI, server: ServerProcess) -> None:
    server.wait_idle()
    options: Any = {"model": MODEL, "prompt": ["one", "two"], "temperature": 0}
    extra = {"ignore_eos": True}
    first, second = client.completions.create(**options, max_tokens=60, extra_body=extra).choices
    stop = next(text for at in range(40) if (text := first.text[at : at + 8]) not in second.text and text)
    body = options | extra | {"max_tokens": 3000, "stop": stop, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        chunks = (json.loads(line[6:]) for line in response.iter_lines() if line[:7] == "data: {")
        ended = next(c for chunk in chunks for c in chunk["choices"] if c["finish_reason"])
        assert (ended["index"], ended["finish_reason"]) == (0, "stop")
        deadline = time.monotonic() + 10
        while server.stats()["engine"]["num_running"] == 2:
            assert time.monotonic() < deadline
        assert server.stats()["engine"]["num_running"] == 1


def test_stop_does_not_act_on_reasoning(client: openai.OpenAI) -> None:
    options: Any = {"max_tokens": 60, "logit_bias": {ANALYSIS: 13}, "extra_body": {"reasoning_budget": 20}}
    for seed in range(20):
        message = ask(client, seed=seed, **options).choices[0].message
        reasoning = getattr(message, "reasoning", None) or ""
        pieces = [reasoning[i : i + 4] for i in range(len(reasoning) - 4)]
        stop = next((piece for piece in pieces if piece not in message.content), None)
        if stop is not None:
            assert ask(client, seed=seed, stop=stop, **options).choices[0].message == message
            return
    raise AssertionError("no seed gave a usable stop string")


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_cover_the_content_tokens(client: openai.OpenAI, stream: bool) -> None:
    for seed in range(4):
        options: Any = {
            "seed": seed,
            "logprobs": True,
            "top_logprobs": 3,
            "extra_body": {"reasoning_budget": 5},
            "max_tokens": 60,
        }
        plain = ask(client, seed=seed, max_tokens=60, extra_body={"reasoning_budget": 5}).choices[0].message.content
        if stream:
            chunks = list(ask(client, stream=True, **options))
            content = "".join(c.choices[0].delta.content or "" for c in chunks)
            entries = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content]
        else:
            choice = ask(client, **options).choices[0]
            content, entries = choice.message.content, choice.logprobs.content
        assert content == plain, "logprobs must not change the text"
        assert b"".join(bytes(e.bytes) for e in entries).decode() == content
        for entry in entries:
            assert entry.logprob <= 0 and len(entry.top_logprobs) == 3
            falling = [t.logprob for t in entry.top_logprobs]
            assert falling == sorted(falling, reverse=True)


def test_logprobs_end_with_the_text_at_a_stop(client: openai.OpenAI) -> None:
    whole = content_of(client)
    stop = whole[12:15]
    choice = ask(client, temperature=0, stop=stop, logprobs=True, extra_body={"reasoning_budget": 0}).choices[0]
    joined = b"".join(bytes(e.bytes) for e in choice.logprobs.content)
    assert joined.decode("utf-8", "replace") == choice.message.content == whole[: whole.index(stop)]


def test_penalties_and_bias_change_the_answer(client: openai.OpenAI) -> None:
    plain = content_of(client)
    first = VOCABULARY.encode(plain)[0]
    assert content_of(client, logit_bias={str(first): -100}) != plain
    repeated = {str(VOCABULARY.encode(" again")[0]): 25}
    assert set(content_of(client, logit_bias=repeated).split()) == {"again"}
    mixed = content_of(client, logit_bias=repeated, max_tokens=80, frequency_penalty=2)
    assert mixed != content_of(client, logit_bias=repeated, max_tokens=80)
