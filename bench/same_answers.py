"""Checks that two versions of the server give equal answers: records 305 requests on each and compares them.

    python bench/same_answers.py record http://127.0.0.1:8000 old.json     (the old version, freshly started)
    python bench/same_answers.py record http://127.0.0.1:8000 new.json     (the new one)
    python bench/same_answers.py compare old.json new.json

Start each server with `--debug-endpoints` on the same model and machine; requests are sent one at a time. The status,
the headers, every JSON field, and in streams the events after joining adjacent deltas of one field, must be equal.
Ids, times, the version (and the fingerprint, which holds it) and the text of `error.message` may differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["city"],
        },
    },
}
EMAIL = {
    "type": "function",
    "function": {
        "name": "send_email",
        "description": "Send an email.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"to": {"type": "string"}, "subject": {"type": "string"}, "urgent": {"type": "boolean"}},
            "required": ["to", "subject", "urgent"],
            "additionalProperties": False,
        },
    },
}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
QUESTIONS = ("What is 17 plus 25?", "What is the weather in Paris?", "My name is Anna. What is my name?")
VOLATILE_HEADERS = frozenset({"date", "x-request-id", "openai-processing-ms", "server", "content-length"})
VOLATILE_FIELDS = frozenset(
    {
        "created",
        "created_at",
        "completed_at",
        "obfuscation",
        "sequence_number",
        "uptime_s",
        "version",
        "system_fingerprint",
    }
)
ID = re.compile(r"\b(chatcmpl|cmpl|resp|msg|rs|fc|call|req|item|call_)[-_][0-9a-zA-Z]{8,}(-\d+)?")

Call = tuple[str, str, Any]  # method, path, body


def chat(question: str, **more: Any) -> Call:
    body = {"model": "MODEL", "messages": [{"role": "user", "content": question}], "max_tokens": 60, "temperature": 0}
    return "POST", "/v1/chat/completions", {**body, **more}


def responses(question: Any, **more: Any) -> Call:
    body = {"model": "MODEL", "input": question, "max_output_tokens": 60, "temperature": 0}
    return "POST", "/v1/responses", {**body, **more}


def completion(prompt: Any, **more: Any) -> Call:
    return ("POST", "/v1/completions", {"model": "MODEL", "prompt": prompt, "max_tokens": 12, "temperature": 0, **more})


def chat_calls() -> Iterator[Call]:
    variants: list[dict[str, Any]] = [
        {},
        {"temperature": 1, "seed": 7},
        {"temperature": 0.7, "top_p": 0.5, "top_k": 20, "min_p": 0.02, "seed": 3},
        {"n": 2, "temperature": 1, "seed": 1},
        {"stop": ["4", "sunny"]},
        {"logprobs": True, "top_logprobs": 3},
        {"reasoning_effort": "low"},
        {"reasoning_effort": "high", "max_tokens": 20},
        {"reasoning_budget": 0},
        {"include_reasoning": False},
        {"tools": [WEATHER, EMAIL]},
        {"tools": [WEATHER, EMAIL], "tool_choice": "none"},
        {"tools": [WEATHER, EMAIL], "tool_choice": "required"},
        {"tools": [EMAIL], "tool_choice": {"type": "function", "function": {"name": "send_email"}}},
        {"tools": [WEATHER], "parallel_tool_calls": False},
        {"functions": [WEATHER["function"]], "function_call": "auto"},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}}},
        {"profile": "latency_first"},
        {"profile": "quality_first"},
        {"metadata": {"run": "7"}, "user": "somebody", "service_tier": "auto", "store": False},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        {"logit_bias": {"17": -100, "25": 5}},
        {"max_completion_tokens": 1},
    ]
    for question, variant in itertools.product(QUESTIONS, variants):
        yield chat(question, **variant)
    for variant in variants:
        yield chat(QUESTIONS[0], **variant, stream=True)
        yield chat(QUESTIONS[1], **variant, stream=True, stream_options={"include_usage": True})
    for variant in ({}, {"tools": [WEATHER]}, {"response_format": {"type": "json_object"}}, {"profile": "balanced"}):
        _, _, body = chat(QUESTIONS[2], **variant)
        yield "POST", "/v1/chat/completions/render", body


def histories() -> Iterator[Call]:
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    turns = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": None, "reasoning_content": "I need the tool.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny, 21 degrees"},
        {"role": "assistant", "content": "It is sunny in Paris."},
        {"role": "user", "content": [{"type": "text", "text": "And in Rome?"}]},
    ]
    for length, stream in itertools.product(range(2, len(turns) + 1), (False, True)):
        yield chat("", messages=turns[:length], tools=[WEATHER], stream=stream)
    for message in (
        {"role": "developer", "content": "Use metric units."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]},
        {"role": "nobody", "content": "x"},
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"content": "x"},
        "x",
        None,
    ):
        yield chat("", messages=[message])


def refused_chats() -> Iterator[Call]:
    wrong: dict[str, list[Any]] = {
        "temperature": [-1, 3, "hot", None],
        "top_p": [0, 1.5, "x"],
        "n": [0, 1000, "2"],
        "max_tokens": [0, -5, "many", 1e9],
        "stop": [[""], 5],
        "logprobs": ["yes"],
        "top_logprobs": [50, -1],
        "tools": [[{}], "x", [WEATHER, WEATHER]],
        "tool_choice": ["sometimes", {"type": "function", "function": {"name": "absent"}}],
        "response_format": [{"type": "xml"}, {"type": "json_schema"}],
        "seed": ["x", 2**70],
        "logit_bias": [{"x": 1}, {"1": 500}],
        "model": ["absent", 5, ""],
        "reasoning_effort": ["enormous"],
        "profile": ["absent"],
        "stream": ["maybe"],
        "messages": [[], {}, "x", None],
        "metadata": [{"a": 1}],
        "min_tokens": [-1, 10**6],
        "priority": ["high"],
    }
    for field, values in wrong.items():
        for value in values:
            yield chat(QUESTIONS[0], **{field: value})


def completion_calls() -> Iterator[Call]:
    variants: list[dict[str, Any]] = [
        {},
        {"stream": True},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"logprobs": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1, "max_tokens": 0},
        {"n": 2, "temperature": 1, "seed": 5},
        {"stop": [" the"]},
        {"ignore_eos": True, "min_tokens": 12},
        {"suffix": "x"},
        {"best_of": 3},
    ]
    prompts: list[Any] = ["Once upon a time", ["One", "Two"], [1, 2, 3], [[10, 11], [12]]]
    for prompt, variant in itertools.product(prompts, variants):
        yield completion(prompt, **variant)
    for prompt in ([], [[]], [-1], [10**9], 5, {"a": 1}, ["a", 1]):
        yield completion(prompt)


def responses_calls() -> Iterator[Call]:
    function = {"type": "function", **WEATHER["function"]}
    schema = {"format": {"type": "json_schema", "name": "p", "strict": True, "schema": PERSON}}
    variants: list[dict[str, Any]] = [
        {},
        {"instructions": "Answer briefly."},
        {"tools": [function]},
        {"tools": [function], "tool_choice": "required"},
        {"tools": [function], "tool_choice": {"type": "function", "name": "get_weather"}},
        {"text": schema},
        {"text": {"format": {"type": "json_object"}}},
        {"reasoning": {"effort": "low"}},
        {"include": ["reasoning.encrypted_content"], "store": False},
        {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        {"max_output_tokens": 16},
        {"temperature": 1, "top_p": 0.9},
    ]
    for variant, stream in itertools.product(variants, (False, True)):
        seeded = {**variant, "temperature": 0, "stream": stream}
        yield responses(QUESTIONS[1], **seeded)
    output = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
    call = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
    yield responses([{"role": "user", "content": "Weather in Paris?"}, call, output], tools=[function])
    for wrong in ([], [{}], 5, [{"type": "banana"}], [output], [{"role": "user", "content": 5}]):
        yield responses(wrong)
    for field, value in (("previous_response_id", "resp_absent"), ("n", 2), ("truncation", "x"), ("background", True)):
        yield responses(QUESTIONS[0], **{field: value})
    yield "POST", "/v1/responses/input_tokens", {"model": "MODEL", "input": QUESTIONS[0]}


def other_calls() -> Iterator[Call]:
    for path in ("/health", "/ready", "/v1/models", "/v1/models/MODEL", "/v1/models/absent", "/v1/responses/absent"):
        yield "GET", path, None
    for path in ("/absent", "/v1/absent", "/v1/chat/completions", "/page/absent"):
        yield "GET", path, None
    yield "DELETE", "/v1/responses/absent", None
    yield "POST", "/v1/cancel/absent", None
    for body in ({"prompt": "a b c"}, {"messages": [{"role": "user", "content": "hello"}]}, {}, {"prompt": 5}):
        yield "POST", "/tokenize", {"model": "MODEL", **body}
    for tokens in ([1, 2, 3], [-1], "x", []):
        yield "POST", "/detokenize", {"model": "MODEL", "tokens": tokens}
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"):
        for body in ([], "text", {}):
            yield "POST", path, body


def calls() -> list[Call]:
    made = [chat_calls(), histories(), refused_chats(), completion_calls(), responses_calls(), other_calls()]
    return list(itertools.chain.from_iterable(made))


def without_volatile(value: Any, field: str = "") -> Any:
    """The JSON value with ids and times replaced, and without the text of error messages."""
    if isinstance(value, dict):
        kept = {k: without_volatile(v, k) for k, v in value.items() if k not in VOLATILE_FIELDS}
        if field == "error":
            kept.pop("message", None)
        return kept
    if isinstance(value, list):
        return [without_volatile(v) for v in value]
    return ID.sub(r"\1-ID", value) if isinstance(value, str) else value


def events(text: str) -> list[Any]:
    """SSE text -> its events, choice by choice, adjacent deltas of one field and item joined."""
    parsed = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if not lines:
            continue
        data = "\n".join(line[6:] for line in lines if line.startswith("data: "))
        name = next((line[7:] for line in lines if line.startswith("event: ")), "")
        parsed.append({"event": name, "data": without_volatile(json.loads(data)) if data.startswith("{") else data})
    found: list[Any] = []
    for event in sorted(parsed, key=_choice):
        if found and (joined := _joined(found[-1], event)) is not None:
            found[-1] = joined
        else:
            found.append(event)
    return found


def _choice(event: Any) -> float:
    """The index of the choice that an event belongs to; infinity for usage and the end."""
    choices = event["data"].get("choices") if isinstance(event["data"], dict) else None
    if choices is None:
        return 0 if event["event"] else math.inf
    return choices[0]["index"] if choices else math.inf


def _joined(first: Any, second: Any) -> Any:
    """The two events as one, None where they are not deltas of one field and item."""
    where, longer = _delta(first), _delta(second)
    if where is None or longer is None or where[0] != longer[0]:
        return None
    joined = json.loads(json.dumps(first))
    holder, key = _holder(joined)
    holder[key] = where[1] + longer[1]
    return joined


def _holder(event: Any) -> tuple[Any, str]:
    """Where an event's text stands; (None, "") for an event without one text."""
    data = event["data"]
    if not isinstance(data, dict):
        return None, ""
    if isinstance(data.get("delta"), str):
        return data, "delta"
    choices = data.get("choices") or []
    if len(choices) == 1 and choices[0].get("logprobs") is None and isinstance(choices[0].get("text"), str):
        return choices[0], "text"
    delta = choices[0].get("delta") or {} if len(choices) == 1 else {}
    texts = [key for key in delta if isinstance(delta[key], str) and key != "role"]
    return (delta, texts[0]) if len(delta) == len(texts) == 1 else (None, "")


def _delta(event: Any) -> tuple[str, str] | None:
    """(the event without its text, its text)."""
    holder, key = _holder(event)
    if holder is None:
        return None
    text = holder[key]
    holder[key] = ""
    rest = json.dumps(event, sort_keys=True)
    holder[key] = text
    return rest, text


def record(url: str, path: Path) -> None:
    with httpx.Client(base_url=url, timeout=120) as client:
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        answers = [_answer(client, call, model) for call in calls()]
    path.write_text(json.dumps(answers, indent=1))
    print(f"{len(answers)} answers in {path}")


def _answer(client: httpx.Client, call: Call, model: str) -> dict[str, Any]:
    method, path, body = call
    sent = None if body is None else json.loads(json.dumps(body).replace('"MODEL"', json.dumps(model)))
    response = client.request(method, path.replace("MODEL", model), json=sent)
    headers = {k: v for k, v in response.headers.items() if k not in VOLATILE_HEADERS and "ratelimit" not in k}
    streamed = response.headers.get("content-type", "").startswith("text/event-stream")
    if streamed:
        answer: Any = events(response.text)
    else:
        answer = without_volatile(response.json()) if response.text[:1] in ("{", "[") else response.text
    return {"call": [method, path, body], "status": response.status_code, "headers": headers, "answer": answer}


def compare(first: Path, second: Path) -> int:
    """Prints each request that was answered differently; -> how many."""
    old, new = (json.loads(path.read_text()) for path in (first, second))
    if [a["call"] for a in old] != [a["call"] for a in new]:
        sys.exit("The recordings are of different requests.")
    different = 0
    for before, after in zip(old, new, strict=True):
        fields = [key for key in ("status", "headers", "answer") if before[key] != after[key]]
        if fields:
            different += 1
            print(json.dumps(before["call"])[:300])
            for key in fields:
                print(f"  {key}: {json.dumps(before[key])[:1500]}\n  {' ' * len(key)}  {json.dumps(after[key])[:1500]}")
    print(f"{len(old)} requests, {different} answered differently")
    return different


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("url")
    recording.add_argument("file", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        record(args.url, args.file)
    else:
        sys.exit(bool(compare(args.first, args.second)))


if __name__ == "__main__":
    main()
