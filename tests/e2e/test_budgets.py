"""Budgets of reasoning, lengths, effort and profiles."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.e2e.contract import MODEL, THINK, USER, ask
from tests.support.server_process import ServerProcess


def test_a_budget_closes_the_analysis_and_an_answer_follows(client: openai.OpenAI) -> None:
    for seed in range(5):
        answer = ask(client, seed=seed, max_tokens=60, logit_bias=THINK, extra_body={"reasoning_budget": 10})
        details = answer.usage.completion_tokens_details
        assert 10 <= details.reasoning_tokens <= 10 + 6  # and its header
        assert answer.choices[0].message.content


def test_without_a_budget_analysis_may_take_everything(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=30, logit_bias=THINK)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == (None, "length")
    assert message.reasoning_content == message.reasoning
    assert answer.usage.completion_tokens_details.reasoning_tokens == answer.usage.completion_tokens == 30


def test_max_tokens_is_exact(client: openai.OpenAI) -> None:
    for limit in (1, 2, 7):
        for name in ("max_tokens", "max_completion_tokens"):
            answer = client.chat.completions.create(
                model=MODEL, messages=[USER], seed=1, extra_body={name: limit, "ignore_eos": True}
            )
            assert answer.usage.completion_tokens == limit
            assert answer.choices[0].finish_reason == "length"


def test_min_tokens_holds_the_end_back(client: openai.OpenAI) -> None:
    answer = ask(client, max_tokens=60, extra_body={"min_tokens": 50})
    assert answer.usage.completion_tokens >= 50


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_the_end_of_a_grammar_beats_min_tokens(server: ServerProcess, path: str) -> None:
    said = {"messages": [USER]} if path.startswith("chat") else {"prompt": "x"}
    more = {"guided_choice": ["yes", "no"], "min_tokens": 50, "max_tokens": 60}
    if path.startswith("chat"):
        more["reasoning_budget"] = 0
    answer = httpx.post(f"{server.url}/v1/{path}", json={"model": MODEL} | said | more, timeout=60)
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    assert (choice["message"]["content"] if "message" in choice else choice["text"]) in more["guided_choice"]


def test_effort_is_visible_in_the_prompt(server: ServerProcess) -> None:
    for asked, shown in (("none", "low"), ("minimal", "low"), ("medium", "medium"), ("xhigh", "high"), ("max", "high")):
        for body in ({"reasoning_effort": asked}, {"reasoning": {"effort": asked}}):
            response = httpx.post(
                f"{server.url}/v1/chat/completions/render", json={"model": MODEL, "messages": [USER], **body}
            )
            assert f"Reasoning: {shown}\n" in response.json()["prompt"]


def test_a_profile_changes_what_it_should(server: ServerProcess, client: openai.OpenAI) -> None:
    for body in ({"model": f"{MODEL}:latency_first"}, {"model": MODEL, "profile": "latency_first"}):
        rendered = httpx.post(f"{server.url}/v1/chat/completions/render", json={"messages": [USER], **body}).json()
        assert "Reasoning: low\n" in rendered["prompt"]
        assert "max_tokens=2048" in rendered["grammar"]
    answer = ask(client, model=f"{MODEL}:quality_first")
    assert answer.metadata["profile"] == "quality_first"
    assert answer.metadata["model_id"] == MODEL


def test_reasoning_can_be_left_out(client: openai.OpenAI) -> None:
    for body in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        for seed in range(5):
            answer = ask(client, seed=seed, max_tokens=60, extra_body={**body, "reasoning_budget": 10})
            assert not hasattr(answer.choices[0].message, "reasoning")
            assert answer.choices[0].message.content
