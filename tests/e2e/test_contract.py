"""The rest of the contract: tools, structured output, budgets, stop, logprobs, raw completions."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import time
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest

from tests.e2e.test_chat import MODEL, USER, ask, error_of, fold
from tests.support.helpers import checkpoint
from tests.support.server_process import ServerProcess, running_server
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
# A random model always prefers the same channel; these biases make it take another where the grammar lets it choose.
ANALYSIS, COMMENTARY, FINAL = (str(VOCABULARY.encode(c)[0]) for c in ("analysis", "commentary", "final"))
THINK, CALL_TOOL, ANSWER = ({ANALYSIS: 30}, {COMMENTARY: 30}, {FINAL: 30})
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> Any:
    return {"type": "function", "function": {"name": name, "description": "Does it", "parameters": parameters, **more}}


TOOLS = [
    tool("get_weather", CITY),
    tool("get_time"),
    tool("search-web_2", {"type": "object", "properties": {"q": {"enum": ["a", "b"]}}, "required": ["q"]}),
]


class Step(pydantic.BaseModel):
    kind: str = pydantic.Field(max_length=5)
    value: int | None


class Plan(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(min_length=1, max_length=2)
    done: bool


# --- tools ---


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("stream", [False, True])
def test_required_always_calls(client: openai.OpenAI, seed: int, stream: bool) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": "required", "seed": seed, "max_tokens": 200, "stream": stream}
    if stream:
        folded = fold(list(ask(client, **options)))[0]
        calls, finish = [tuple(c) for c in folded["calls"]], folded["finish"]
    else:
        choice = ask(client, **options).choices[0]
        calls, finish = (
            [(c.id, c.function.name, c.function.arguments) for c in choice.message.tool_calls],
            choice.finish_reason,
        )
    assert len(calls) == 1
    call_id, name, arguments = calls[0]
    assert call_id.startswith("call_")
    schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == name)
    if finish == "tool_calls":
        jsonschema.validate(json.loads(arguments), schema or {"type": "object"})
    else:
        assert finish == "length"


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "function": {"name": "get_weather"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
        },
    ],
)
def test_a_named_choice_calls_that_function(client: openai.OpenAI, choice: Any) -> None:
    for seed in range(4):
        answer = ask(client, tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=200).choices[0]
        assert [c.function.name for c in answer.message.tool_calls] == ["get_weather"]
        jsonschema.validate(json.loads(answer.message.tool_calls[0].function.arguments), CITY)


def test_none_never_calls_and_keeps_the_instructions(client: openai.OpenAI, server: ServerProcess) -> None:
    messages: Any = [{"role": "system", "content": "KEEP THIS"}, USER]
    for seed in range(5):
        answer = ask(client, messages=messages, tools=TOOLS, tool_choice="none", seed=seed)
        assert answer.choices[0].message.tool_calls is None
    body = {"model": MODEL, "messages": messages, "tools": TOOLS, "tool_choice": "none"}
    prompt = httpx.post(f"{server.url}/v1/chat/completions/render", json=body).json()["prompt"]
    assert "KEEP THIS" in prompt and "get_weather" not in prompt


@pytest.mark.parametrize("more", [{"strict": True}, {}], ids=["strict", "guided"])
def test_tools_follow_their_schema_under_auto(client: openai.OpenAI, more: dict[str, bool]) -> None:
    offered = [tool("get_weather", CITY, **more)]
    ended = 0
    for seed in range(10):
        bias = {**CALL_TOOL, str(VOCABULARY.encode(" to")[0]): 60}
        options: Any = {"logit_bias": bias, "seed": seed, "max_tokens": 150, "extra_body": {"reasoning_budget": 0}}
        answer = ask(client, tools=offered, **options).choices[0]
        for call in answer.message.tool_calls or []:
            if answer.finish_reason == "tool_calls":
                ended += 1
                jsonschema.validate(json.loads(call.function.arguments), CITY)
    assert ended > 0


def test_ids_are_unique_and_results_find_their_call(client: openai.OpenAI) -> None:
    answer = ask(client, tools=TOOLS, tool_choice="required", max_tokens=200, n=4)
    ids = [call.id for choice in answer.choices for call in choice.message.tool_calls]
    assert len(ids) == len(set(ids)) == 4
    message = answer.choices[0].message
    history = [USER, message.model_dump(), {"role": "tool", "tool_call_id": ids[0], "content": "42", "name": "x"}]
    after = ask(client, messages=history, tools=TOOLS)
    assert after.usage.prompt_tokens_details.cached_tokens > 0


def test_legacy_functions_are_answered_in_their_form(client: openai.OpenAI) -> None:
    functions: Any = [TOOLS[0]["function"]]
    answer = ask(client, functions=functions, function_call={"name": "get_weather"}, max_tokens=200).choices[0]
    assert answer.finish_reason == "function_call"
    assert answer.message.function_call.name == "get_weather"
    assert answer.message.tool_calls is None
    history: Any = [
        USER,
        answer.message.model_dump(exclude_none=True),
        {"role": "function", "name": "get_weather", "content": "4"},
    ]
    assert ask(client, messages=history, functions=functions).usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools[3].function.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        (
            {"tools": [tool("f", {"type": "object", "properties": {"a": {"uniqueItems": True}}}, strict=True)]},
            "tools[0].function.parameters",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strin"}}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"min_tokens": 50, "max_tokens": 10}, "min_tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused_before_anything_runs(
    server: ServerProcess, change: dict[str, Any], param: str
) -> None:
    status, error = error_of(server, {"model": MODEL, "messages": [USER], "tools": TOOLS} | change)
    assert (status, error["param"]) == (400, param), error


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": 5},
        {"type": 5},
        {"anyOf": 5},
        {"anyOf": [5]},
        {"items": [1]},
        {"required": 5},
        {"required": [5]},
        {"properties": {"a": {"enum": 5}}},
        {"$ref": 5},
        {"$defs": []},
        {"properties": {"a": 5}},
        {"oneOf": [True], "type": [1]},
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_parameters_that_are_no_schema_are_refused(server: ServerProcess, parameters: Any, choice: str) -> None:
    body = {"model": MODEL, "messages": [USER], "tools": [tool("f", parameters)], "tool_choice": choice}
    status, error = error_of(server, body)
    assert (status, error["param"], error["code"]) == (
        400,
        "tools[0].function.parameters",
        "invalid_function_parameters",
    )


def test_odd_but_valid_schemas_are_rendered(server: ServerProcess) -> None:
    for parameters in (
        {},
        {"properties": {"a": True, "b": {}}},
        {"type": "object", "oneOf": [True, {"type": "null"}]},
        {"type": []},
        {"title": 5, "properties": {"a": {"title": 5, "description": 6, "examples": [1]}}},
    ):
        body = {"model": MODEL, "messages": [USER], "tools": [tool("f", parameters)]}
        assert httpx.post(f"{server.url}/v1/chat/completions/render", json=body).status_code == 200, parameters


# --- structured output ---


@pytest.mark.parametrize("effort", ["low", "high"])
@pytest.mark.parametrize("stream", [False, True])
def test_every_finished_answer_validates(client: openai.OpenAI, effort: str, stream: bool) -> None:
    fmt = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY, "strict": True}}
    for seed in range(5):
        answer = ask(client, response_format=fmt, seed=seed, max_tokens=150, reasoning_effort=effort, stream=stream)
        if stream:
            folded = fold(list(answer))[0]
            content, finish = folded["content"], folded["finish"]
        else:
            content, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert finish == "stop"
        jsonschema.validate(json.loads(content), CITY)


def test_pydantic_models_parse(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=[USER], response_format=Plan, max_tokens=400, seed=3)
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, Plan) and len(parsed.steps) in (1, 2)


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    for seed in range(4):
        choice = ask(client, response_format={"type": "json_object"}, seed=seed, max_tokens=200).choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.startswith("{")


@pytest.mark.parametrize("kind", ["call", "answer"])
def test_tools_and_a_schema_together(client: openai.OpenAI, kind: str) -> None:
    fmt = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    bias = ANSWER if kind == "answer" else {**CALL_TOOL, str(VOCABULARY.encode(" to")[0]): 60}
    finished = 0
    for seed in range(5):
        options: Any = {"tools": [tool("f", CITY, strict=True)], "seed": seed, "max_tokens": 200, "logit_bias": bias}
        choice = ask(client, response_format=fmt, **options).choices[0]
        if choice.finish_reason == "length":
            continue
        finished += 1
        if kind == "call":
            jsonschema.validate(json.loads(choice.message.tool_calls[0].function.arguments), CITY)
        else:
            jsonschema.validate(json.loads(choice.message.content), CITY)
    assert finished > 0


def test_the_schema_is_shown_to_the_model(server: ServerProcess) -> None:
    fmt = {"type": "json_schema", "json_schema": {"name": "city", "description": "A city", "schema": CITY}}
    body = {"model": MODEL, "messages": [USER], "response_format": fmt}
    prompt = httpx.post(f"{server.url}/v1/chat/completions/render", json=body).json()["prompt"]
    assert "# Response Formats\n\n## city\n\n// A city\n" in prompt


# --- budgets and lengths ---


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


# --- stop and logprobs ---


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


# --- raw completions and tokens ---


def test_completions_of_every_prompt_form_agree(client: openai.OpenAI) -> None:
    ids = VOCABULARY.encode("Once upon a time")
    texts = []
    for prompt in ("Once upon a time", ["Once upon a time"], ids, [ids]):
        answer = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=12)
        assert answer.usage.prompt_tokens == len(ids)
        texts.append(answer.choices[0].text)
    assert len(set(texts)) == 1


def test_completions_number_their_choices_and_stream_alike(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 10}
    whole = client.completions.create(**options)
    assert [c.index for c in whole.choices] == [0, 1, 2, 3]
    texts: dict[int, str] = {}
    with httpx.stream(
        "POST", str(client.base_url) + "completions", json={**options, "stream": True}, timeout=60
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert texts == {c.index: c.text for c in whole.choices}


def test_completions_default_to_sixteen_tokens_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hi", echo=True, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].text.startswith("Hi")


def test_completion_logprobs(client: openai.OpenAI) -> None:
    choice = client.completions.create(
        model=MODEL, prompt="Hi", logprobs=2, max_tokens=5, temperature=0, extra_body={"ignore_eos": True}
    ).choices[0]
    numbers = choice.logprobs
    assert (
        len(numbers.tokens) == len(numbers.token_logprobs) == len(numbers.top_logprobs) == len(numbers.text_offset) == 5
    )
    assert all(
        len(top) == 2 and max(top.values()) == pytest.approx(lp)
        for top, lp in zip(numbers.top_logprobs, numbers.token_logprobs, strict=True)
    )


def test_completions_offsets_count_what_a_stop_string_holds_back(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "prompt": "Hi", "logprobs": 0, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**options, extra_body={"ignore_eos": True}).choices[0]
    stop = whole.text[3:20] + "never"
    held = client.completions.create(**options, stop=stop, extra_body={"ignore_eos": True}).choices[0]
    assert held.text == whole.text
    assert held.logprobs.text_offset == whole.logprobs.text_offset


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [201_088]}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 6}, "logprobs"),
        ({"prompt": [True]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_completions_are_named(server: ServerProcess, change: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": "x"} | change)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_an_empty_prompt_is_called_empty(server: ServerProcess) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": ["x", ""]})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "prompt", "invalid_value")
    assert "empty" in error["message"]


def test_completions_count_what_each_prompt_had_cached(client: openai.OpenAI) -> None:
    prompts = ["one two three four " * 20, "five six seven eight " * 20]
    options: Any = {"model": MODEL, "prompt": prompts, "max_tokens": 1}
    client.completions.create(**options)
    usage = client.completions.create(**options).usage
    assert usage.prompt_tokens_details.cached_tokens > usage.prompt_tokens / 2


def test_raw_prompts_without_a_break_are_no_trap(server: ServerProcess) -> None:
    """The library alone would need minutes for each."""
    long = "a" * 400_000
    body = {"model": MODEL, "prompt": [long, *"b" * 128], "max_tokens": 1}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.json()["error"]["code"] == "array_above_max_length"
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": long, "parse_special": True}, timeout=60).json()
    assert tokens["count"] == 50_000


@pytest.mark.parametrize("keyword", ["allOf", "prefixItems", "items", "properties"])
@pytest.mark.parametrize("depth", [30, 330, 420])
def test_schemas_in_schemas_are_taken_or_refused(server: ServerProcess, keyword: str, depth: int) -> None:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        inner = {"items": schema, "properties": {"a": schema}}.get(keyword, [schema])
        schema = {"type": "object" if keyword == "properties" else "array", keyword: inner}
    tools = [tool("f", {"type": "object", "properties": {"p": schema}})]
    body = {"messages": [USER], "tools": tools}
    response = httpx.post(f"{server.url}/tokenize", json=body, timeout=60)
    assert response.status_code in ((200,) if depth == 30 else (200, 400)), response.text
    if response.status_code == 400:
        assert "nested too deeply" in response.json()["error"]["message"]


def test_tokenize_and_back(server: ServerProcess) -> None:
    text = "Hello <|start|> 日本"
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": text}).json()
    assert tokens["tokens"] == VOCABULARY.encode(text) and tokens["count"] == len(tokens["tokens"])
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"] == text
    special = httpx.post(f"{server.url}/tokenize", json={"prompt": text, "parse_special": True}).json()["tokens"]
    assert 200_006 in special
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": [-1]}).status_code == 400


def test_the_tokenizer_is_described_as_vllm_does(server: ServerProcess) -> None:
    """lm-evaluation-harness (`tokenizer_backend=remote`) reads it first, then encodes the names of special tokens."""
    info = httpx.get(f"{server.url}/tokenizer_info").json()
    assert info["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = {"bos_token": 199_998, "eos_token": 200_002, "pad_token": 199_999}
    for name, token_id in ids.items():
        body = {"prompt": info[name], "add_special_tokens": False}
        tokens = httpx.post(f"{server.url}/tokenize", json=body).json()["tokens"]
        assert tokens == [token_id]
        back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()
        assert back["prompt"] == info[name]
    as_text = {"prompt": "<|return|>", "add_special_tokens": True, "parse_special": False}
    assert len(httpx.post(f"{server.url}/tokenize", json=as_text).json()["tokens"]) > 1


# --- what clients send besides ---


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


# --- vLLM's and llama.cpp's fields ---


ANSWERS = ["in the morning", "in the evening, late"]
ONE_OF: list[dict[str, Any]] = [
    {"guided_choice": ANSWERS},
    {"structured_outputs": {"choice": ANSWERS}},
    {"guided_regex": "in the (morning|evening, late)"},
    {"structured_outputs": {"regex": "^in the (morning|evening, late)$"}},
]
ASK = {"temperature": 1, "seed": 3}


@pytest.mark.parametrize("fields", ONE_OF)
def test_choices_and_patterns_hold_on_every_endpoint(server: ServerProcess, fields: dict[str, Any]) -> None:
    body = ASK | {"model": MODEL, "reasoning_budget": 3} | fields
    post = functools.partial(httpx.post, timeout=60)
    chat = post(f"{server.url}/v1/chat/completions", json=body | {"messages": [USER]}).json()
    assert chat["choices"][0]["message"]["content"] in ANSWERS
    tools = {"messages": [USER], "tools": TOOLS, "max_tokens": 300}
    choice = post(f"{server.url}/v1/chat/completions", json=body | tools).json()["choices"][0]
    assert choice["message"]["content"] in (*ANSWERS, None) or choice["finish_reason"] == "length"
    response = post(f"{server.url}/v1/responses", json=body | {"input": "x"}).json()
    texts = [item["content"][0]["text"] for item in response["output"] if item["type"] == "message"]
    assert len(texts) == 1 and texts[0] in ANSWERS
    raw = {"model": MODEL, "prompt": "When?", "max_tokens": 40} | ASK | fields
    text = post(f"{server.url}/v1/completions", json=raw).json()["choices"][0]
    assert text["text"] in ANSWERS and text["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": CITY},
        {"structured_outputs": {"json": json.dumps(CITY)}},
        {"response_format": {"type": "json_object", "schema": CITY}},
    ],
)
def test_schemas_hold_on_every_endpoint(server: ServerProcess, fields: dict[str, Any]) -> None:
    post = functools.partial(httpx.post, timeout=60)
    body = ASK | {"model": MODEL, "max_tokens": 200} | fields
    chat = post(f"{server.url}/v1/chat/completions", json=body | {"messages": [USER]}).json()
    jsonschema.validate(json.loads(chat["choices"][0]["message"]["content"]), CITY)
    raw = post(f"{server.url}/v1/completions", json=body | {"prompt": "A city:"}).json()
    jsonschema.validate(json.loads(raw["choices"][0]["text"]), CITY)
    in_responses = {key: value for key, value in body.items() if key != "response_format"}
    if "response_format" in fields:
        in_responses["text"] = {"format": fields["response_format"]}
    in_responses["max_output_tokens"] = in_responses.pop("max_tokens")
    response = post(f"{server.url}/v1/responses", json=in_responses | {"input": "x"}).json()
    jsonschema.validate(json.loads(response["output"][-1]["content"][0]["text"]), CITY)


def test_a_final_message_is_continued(client: openai.OpenAI, server: ServerProcess) -> None:
    messages: Any = [USER, {"role": "assistant", "content": "The answer is"}]
    for stream in (False, True):
        answer = ask(
            client,
            messages=messages,
            stream=stream,
            max_tokens=8,
            extra_body={"continue_final_message": True, "add_generation_prompt": False},
        )
        if stream:
            folded = fold(list(answer))[0]
            assert folded["content"] and not folded["reasoning"]
        else:
            message = answer.choices[0].message
            assert message.content and not getattr(message, "reasoning_content", None)
    tool = {"type": "function", "function": {"name": "f"}}
    several = ask(
        client,
        messages=messages,
        n=2,
        max_tokens=8,
        logprobs=True,
        stop=["never"],
        tools=[tool],
        extra_body={"continue_final_message": True},
    )
    assert [bool(choice.logprobs.content) for choice in several.choices] == [True, True]
    body = {"model": MODEL, "messages": messages, "add_generation_prompt": False}
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(f"{url}/render", json=body).json()["prompt"].endswith("<|end|>")
    told = httpx.post(url, json=body | {"max_tokens": 30}, timeout=60).json()["choices"][0]
    assert told["message"]["content"] or told["message"]["reasoning_content"]
    more = {"continue_final_message": True, "add_generation_prompt": False, "guided_regex": "a"}
    status, error = error_of(server, body | more)
    assert (status, error["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize("path", ["chat/completions", "responses"])
def test_the_templates_effort_is_read(server: ServerProcess, path: str) -> None:
    def reads(**more: Any) -> Any:
        messages = {"messages": [USER]} if path.startswith("chat") else {"input": "x"}
        body = {"model": MODEL} | messages | more
        if path.startswith("chat"):
            return httpx.post(f"{server.url}/v1/{path}/render", json=body)
        return httpx.post(f"{server.url}/v1/{path}", json=body | {"max_output_tokens": 16})

    for effort in ("low", "high"):
        answer = reads(chat_template_kwargs={"reasoning_effort": effort, "other": 1})
        assert answer.status_code == 200, answer.text
        if path.startswith("chat"):
            assert f"Reasoning: {effort}" in answer.json()["prompt"]
    wrong = reads(chat_template_kwargs={"reasoning_effort": "huge"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "chat_template_kwargs.reasoning_effort")
