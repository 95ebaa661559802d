"""The embedded model over HTTP, with meaning: what it reasons, answers, calls, remembers. At temperature 0."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gptoss.kernels.cpu import native
from tests.support.documents import Example, events, examples, without_ids
from tests.support.server_process import ServerProcess, running_server
from tests.support.vocabulary import public_vocabulary

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
MUSIC: Any = {
    "type": "function",
    "function": {
        "name": "play_song",
        "description": "Play a song.",
        "parameters": {"type": "object", "properties": {"title": {"type": "string"}}, "required": ["title"]},
    },
}
PERSON: Any = {
    "type": "json_schema",
    "json_schema": {
        "name": "person",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def nano() -> Iterator[openai.OpenAI]:
    with (
        running_server("--model", "nano", "--cpu-kv-cache-gib", "0.2", "--debug-endpoints") as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client,
    ):
        client.server = server  # type: ignore[attr-defined]
        yield client


def ask(client: openai.OpenAI, *messages: Any, **options: Any) -> Any:
    said = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    options = {"max_tokens": 300, "temperature": 0} | options
    return client.chat.completions.create(model="gpt-oss-nano", messages=said, **options).choices[0]


def test_it_is_what_is_served_by_default(nano: openai.OpenAI) -> None:
    server: ServerProcess = nano.server  # type: ignore[attr-defined]
    health = httpx.get(f"{server.url}/health").json()
    assert (health["model_id"], health["model_size"]) == ("gpt-oss-nano", "nano")
    assert "gpt-oss-nano" in ask(nano, "What are you?").message.content


@pytest.mark.parametrize(("a", "b"), [(12, 30), (47, 38), (8, 9), (50, 25)])
def test_it_adds_and_shows_its_working_in_the_reasoning(nano: openai.OpenAI, a: int, b: int) -> None:
    choice = ask(nano, f"What is {a} + {b}?")
    assert choice.finish_reason == "stop"
    assert str(a + b) in choice.message.content
    assert str(a + b) in choice.message.reasoning_content
    assert "<|" not in choice.message.content + choice.message.reasoning_content


def test_more_effort_is_more_reasoning(nano: openai.OpenAI) -> None:
    lengths = {}
    for effort in ("low", "medium", "high"):
        answer = nano.chat.completions.create(
            model="gpt-oss-nano",
            messages=[{"role": "user", "content": "What is 21 + 34?"}],
            temperature=0,
            reasoning_effort=effort,
        )
        assert "55" in answer.choices[0].message.content
        lengths[effort] = answer.usage.completion_tokens_details.reasoning_tokens
    assert lengths["low"] < lengths["medium"] < lengths["high"]


def test_a_stream_reasons_before_it_answers(nano: openai.OpenAI) -> None:
    stream = nano.chat.completions.create(
        model="gpt-oss-nano", messages=[{"role": "user", "content": "What is 12 + 30?"}], temperature=0, stream=True
    )
    deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    reasoning = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert "".join(d.content or "" for d in deltas) == ask(nano, "What is 12 + 30?").message.content
    assert reasoning and len([d for d in deltas if d.content]) > 1


def test_it_remembers_a_name(nano: openai.OpenAI) -> None:
    first = ask(nano, "My name is Alice.")
    history = {"role": "assistant", "content": first.message.content}
    assert "Alice" in ask(nano, "My name is Alice.", history, "What is my name?").message.content
    between = (
        {"role": "assistant", "content": "Nice to meet you, Alice!"},
        "What is 2 + 3?",
        {"role": "assistant", "content": "2 + 3 = 5"},
    )
    assert "Alice" in ask(nano, "My name is Alice.", *between, "What is my name?").message.content


@pytest.mark.parametrize("stream", [False, True])
def test_it_calls_the_tool_that_fits_and_answers_from_its_result(nano: openai.OpenAI, stream: bool) -> None:
    question = "What is the weather in Paris?"
    if stream:
        parts = nano.chat.completions.create(
            model="gpt-oss-nano",
            messages=[{"role": "user", "content": question}],
            tools=[WEATHER, MUSIC],
            temperature=0,
            stream=True,
        )
        calls = [c for chunk in parts if chunk.choices for c in chunk.choices[0].delta.tool_calls or ()]
        name, call_id = calls[0].function.name, calls[0].id
        arguments = "".join(c.function.arguments or "" for c in calls)
    else:
        choice = ask(nano, question, tools=[WEATHER, MUSIC])
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        name, call_id, arguments = call.function.name, call.id, call.function.arguments
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})
    made = {
        "role": "assistant",
        "tool_calls": [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    result = {"role": "tool", "tool_call_id": call_id, "content": '{"temperature": 21, "condition": "sunny"}'}
    answer = ask(nano, question, made, result, tools=[WEATHER, MUSIC])
    assert answer.finish_reason == "stop"
    assert "21" in answer.message.content and "sunny" in answer.message.content


def test_a_response_calls_a_tool_and_answers_from_its_result(nano: openai.OpenAI) -> None:
    options: Any = {
        "model": "gpt-oss-nano",
        "tools": [{"type": "function"} | tool["function"] for tool in (WEATHER, MUSIC)],
        "temperature": 0,
    }
    items: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = nano.responses.create(input=items, **options)
    reasoning, call = (item.to_dict() for item in first.output)
    assert "get_weather yes: city = Paris" in reasoning["content"][0]["text"]  # type: ignore[index]
    assert (call["name"], json.loads(str(call["arguments"]))) == ("get_weather", {"city": "Paris"})
    result = {
        "type": "function_call_output",
        "call_id": call["call_id"],
        "output": '{"temperature": 21, "condition": "sunny"}',
    }
    second = nano.responses.create(input=[*items, reasoning, call, result], **options)
    assert second.status == "completed"
    assert "21" in second.output_text and "sunny" in second.output_text
    assert second.usage.input_tokens_details.cached_tokens > 0  # type: ignore[union-attr]


def test_it_calls_no_tool_where_none_fits(nano: openai.OpenAI) -> None:
    choice = ask(nano, "Hello!", tools=[WEATHER, MUSIC])
    assert choice.finish_reason == "stop" and "Hello" in choice.message.content


def test_the_other_tool_is_called_when_it_fits(nano: openai.OpenAI) -> None:
    (call,) = ask(nano, "Play the song Yesterday", tools=[WEATHER, MUSIC]).message.tool_calls
    assert call.function.name == "play_song"


def test_a_schema_is_filled_from_the_text(nano: openai.OpenAI) -> None:
    choice = ask(nano, "Anna is 34 years old.", response_format=PERSON)
    assert json.loads(choice.message.content) == {"name": "Anna", "age": 34}


def test_stop_strings_cut_the_answer_and_not_the_reasoning(nano: openai.OpenAI) -> None:
    whole = ask(nano, "Count to 7.")
    assert whole.message.content == "1, 2, 3, 4, 5, 6, 7"
    assert ask(nano, "Count to 7.", stop=[", 4"]).message.content == "1, 2, 3"
    assert ask(nano, "Count to 7.", stop=["Count"]).message.content == whole.message.content


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Spell the word cat.", "c-a-t"),
        ("Name three fruits.", "- apple\n- banana\n- orange"),
        ("Hello!", "Hello! How can I help you?"),
    ],
)
def test_small_skills(nano: openai.OpenAI, question: str, answer: str) -> None:
    assert ask(nano, question).message.content == answer


def test_what_it_cannot_do_it_says(nano: openai.OpenAI) -> None:
    assert "tiny demonstration model" in ask(nano, "Write a poem about the sea.").message.content


@pytest.mark.skipif(native.library() is None, reason="no drafts: the CPU kernels do not run here")
def test_an_answer_given_before_is_guessed_and_stays_the_same(nano: openai.OpenAI) -> None:
    def drafts() -> dict[str, float]:
        url = str(nano.base_url).removesuffix("/v1/")
        found: dict[str, float] = httpx.get(f"{url}/stats").json()["speculation"]
        return found

    messages: Any = [{"role": "user", "content": "Count to 13."}]
    counts = [drafts()["accepted_tokens"]]
    answers = []
    for _ in range(2):
        answer = nano.chat.completions.create(model="gpt-oss-nano", messages=messages, temperature=1, seed=3)
        answers.append(answer.choices[0].message.model_dump())
        counts.append(drafts()["accepted_tokens"])
    assert answers[0] == answers[1]
    assert counts[2] - counts[1] > counts[1] - counts[0] > 0
    assert answer.usage and counts[2] - counts[1] > answer.usage.completion_tokens // 2


def test_what_repeats_itself_without_end_is_ended(nano: openai.OpenAI) -> None:
    word = public_vocabulary().rank_of[b" so"]
    choice = ask(nano, "Hello!", logit_bias={str(word): 100})
    assert (choice.finish_reason, choice.message.content) == ("stop", " so" * 16)


@pytest.mark.parametrize("example", [*examples()], ids=lambda example: example.page)
def test_the_documents_commands_give_the_answers_shown(nano: openai.OpenAI, example: Example) -> None:
    url = nano.server.url  # type: ignore[attr-defined]
    command = [sys.executable, "-c"] if example.language == "python" else ["bash", "-euc"]
    code = example.code.replace("http://127.0.0.1:8000", url)
    done = subprocess.run([*command, code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if example.answer is None:
        assert not re.search(r'"error": ?{', done.stdout)
    elif example.answer_language == "json":
        assert without_ids(json.loads(done.stdout)) == without_ids(json.loads(example.answer))
    elif example.answer.startswith("data: "):
        assert all(event in events(done.stdout) for event in events(example.answer))
    elif example.language == "python":
        assert done.stdout == example.answer
    else:
        assert json.loads(done.stdout)["prompt"] == example.answer.rstrip("\n")
