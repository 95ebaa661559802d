"""POST /v1/responses through the real openai client, which checks every object and event against its types."""

from __future__ import annotations

import itertools
import json
import threading
from typing import Any

import httpx
import jsonschema
import openai
import pytest

from tests.e2e.contract import ANSWER, CALL_TOOL, CITY, MODEL, THINK, Plan
from tests.support.server_process import ServerProcess

TOOLS: Any = [
    {"type": "function", "name": "get_weather", "description": "Does it", "parameters": CITY},
    {"type": "function", "name": "get_time"},
]
HOSTED: Any = {"type": "web_search", "external_web_access": False}  # what OpenAI would run
PLAN: Any = {"type": "json_schema", "name": "plan", "schema": CITY, "strict": True}


def respond(client: openai.OpenAI, **options: Any) -> Any:
    """`bias` and `seed` are this server's extensions."""
    extra = {"seed": options.pop("seed", 7), "logit_bias": options.pop("bias", None)}
    return client.responses.create(
        **{"model": MODEL, "input": "Hello there", "max_output_tokens": 60, "extra_body": extra} | options
    )


def post(server: ServerProcess, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/responses", json={"model": MODEL} | body, timeout=60)


def stripped(output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without ids, which are new every time."""
    return [{k: v for k, v in item.items() if k not in ("id", "call_id")} for item in output]


def test_a_response_has_openais_shape(client: openai.OpenAI) -> None:
    answer = respond(client, instructions="Be brief.", metadata={"a": "b"}, user="me")
    assert answer.object == "response" and answer.id.startswith("resp_")
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.model, answer.instructions, answer.metadata) == (MODEL, "Be brief.", {"a": "b"})
    assert answer.store is True and answer.error is None
    assert client.responses.retrieve(answer.id) == answer
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens == 60
    assert answer.output[-1].status == "incomplete"
    assert {item.status for item in answer.output[:-1]} <= {"completed"}


@pytest.mark.parametrize(
    "options",
    [
        {"bias": THINK},
        {"bias": ANSWER, "include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"bias": CALL_TOOL, "tools": TOOLS, "max_output_tokens": 200},
        {"tools": TOOLS, "tool_choice": "required", "max_output_tokens": 200},
        {"text": {"format": PLAN}, "max_output_tokens": 200},
    ],
)
def test_the_events_tell_of_the_whole_response(client: openai.OpenAI, options: dict[str, Any]) -> None:
    events = [event.to_dict() for event in respond(client, stream=True, **options)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:2] == ["created", "in_progress"]
    assert all(event["response"]["status"] == "in_progress" for event in events[:2])
    final: Any = events[-1]["response"]
    assert kinds[-1] == final["status"]
    for index, item in enumerate(final["output"]):
        own = [e for e in events if e.get("output_index") == index]
        of_item = [e["type"].removeprefix("response.") for e in own]
        shape = [kind for kind, _ in itertools.groupby(of_item)]
        deltas = "".join(str(e["delta"]) for e in own if e["type"].endswith(".delta"))
        if item["type"] == "function_call":
            text = item["arguments"]
            within = ["function_call_arguments.delta", "function_call_arguments.done"]
        else:
            name = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            text = item["content"][0]["text"]
            delta = [f"{name}.delta"] if text else []
            within = ["content_part.added", *delta, f"{name}.done", "content_part.done"]
        assert shape == ["output_item.added", *within, "output_item.done"]
        assert deltas == text
        assert own[-1]["item"] == item, "the item that is done is the item of the response"
        assert {e.get("item_id", item["id"]) for e in own} == {item["id"]}
        assert own[0]["item"]["status"] == "in_progress" and not own[0]["item"].get("content")
    whole = respond(client, **options).to_dict()
    assert stripped(final["output"]) == stripped(whole["output"])
    assert final["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_required_calls_and_a_schema_binds(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "name": "get_weather"}
    for choice, tools in ("required", TOOLS[:1]), (named, TOOLS):
        answer = respond(client, tools=tools, tool_choice=choice, max_output_tokens=200)
        call = answer.output[-1]
        assert (answer.status, call.type, call.name) == ("completed", "function_call", "get_weather")
        jsonschema.validate(json.loads(call.arguments), CITY)
    answer = respond(client, text={"format": PLAN}, max_output_tokens=200)
    jsonschema.validate(json.loads(answer.output_text), CITY)


def test_the_sdks_own_helpers_follow_it(client: openai.OpenAI) -> None:
    options: Any = {"model": MODEL, "input": "Plan it", "text_format": Plan, "max_output_tokens": 400}
    extra: Any = {"seed": 3}
    parsed = client.responses.parse(**options, extra_body=extra).output_parsed
    assert isinstance(parsed, Plan) and len(parsed.steps) in (1, 2)
    with client.responses.stream(**options, extra_body=extra) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_parsed == parsed


def test_tools_that_the_server_cannot_run_are_left_out(client: openai.OpenAI) -> None:
    with_it, without = (respond(client, tools=tools, temperature=0) for tools in ([HOSTED, *TOOLS], TOOLS))
    assert [tool.type for tool in with_it.tools] == ["function", "function"]
    assert with_it.usage.input_tokens == without.usage.input_tokens
    assert stripped(with_it.to_dict()["output"]) == stripped(without.to_dict()["output"])


def test_logprobs_are_of_the_text(client: openai.OpenAI) -> None:
    answer = respond(client, bias=ANSWER, include=["message.output_text.logprobs"], top_logprobs=2)
    part = next(item for item in answer.output if item.type == "message").content[0]
    assert b"".join(bytes(entry.bytes) for entry in part.logprobs).decode() == part.text
    assert all(len(entry.top_logprobs) == 2 for entry in part.logprobs)
    assert respond(client, bias=ANSWER).output[-1].content[0].logprobs == []


def test_items_become_the_prompt_that_chat_makes_of_messages(server: ServerProcess, client: openai.OpenAI) -> None:
    call = {"name": "get_weather", "arguments": '{"city":"Rome","days":2}'}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather in Rome?"},
        {
            "role": "assistant",
            "reasoning_content": "I should look.",
            "content": "Let me look.",
            "tool_calls": [{"id": "call_1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Weather in Rome?"}]},
        {
            "type": "reasoning",
            "id": "rs_1",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "I should look."}],
        },
        {
            "type": "message",
            "id": "msg_1",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "Let me look.", "annotations": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "call_1", **call},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ]
    tools = [{"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}} for tool in TOOLS]
    chat = client.chat.completions.create(model=MODEL, messages=messages, tools=tools, max_tokens=30, temperature=0)  # type: ignore[call-overload]
    answer = respond(client, instructions="Be kind.", input=items, tools=TOOLS, max_output_tokens=30, temperature=0)
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    reasoning = next(item for item in answer.output if item.type == "reasoning")
    assert reasoning.content[0].text == chat.choices[0].message.reasoning_content


def test_reasoning_comes_back_without_its_content(client: openai.OpenAI) -> None:
    """Agents such as Codex keep `encrypted_content` alone."""
    thought = respond(client, tools=TOOLS, bias=THINK).output[0].to_dict()
    function = {"name": "get_weather", "arguments": '{"city":"Rome","days":2}'}
    call = {"type": "function_call", "call_id": "call_1"} | function
    told = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    sealed = {k: v for k, v in thought.items() if k != "content"}
    readable = {k: v for k, v in thought.items() if k != "encrypted_content"}
    ask = {"role": "user", "content": "Hello there"}
    with_text, without_text, without_either = (
        respond(client, input=[ask, *items, call, told], tools=TOOLS, max_output_tokens=20).usage
        for items in ([readable], [sealed], [])
    )
    assert with_text.input_tokens == without_text.input_tokens > without_either.input_tokens


@pytest.mark.parametrize(
    ("options", "sealed"), [({}, False), ({"include": ["reasoning.encrypted_content"]}, True), ({"tools": TOOLS}, True)]
)
def test_reasoning_is_sealed_where_it_may_have_to_come_back(
    client: openai.OpenAI, options: dict[str, Any], sealed: bool
) -> None:
    thought = respond(client, bias=THINK, **options).output[0]
    assert thought.type == "reasoning"
    assert (thought.encrypted_content is not None) == sealed


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "input", "missing_required_parameter"),
        ({"input": []}, "input", "empty_array"),
        ({"input": 5}, "input", "invalid_type"),
        ({"input": ["hi"]}, "input[0]", "invalid_type"),
        ({"input": [{"type": "web_search_call"}]}, "input", "empty_array"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id", "item_not_found"),
        ({"input": [{"type": "banana"}]}, "input[0].type", "unsupported_value"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "unsupported_value",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_text"}]}]},
            "input[0].content[0].text",
            "invalid_type",
        ),
        (
            {
                "instructions": "x",
                "input": [
                    {"role": "user", "content": "hi"},
                    {"type": "function_call_output", "call_id": "nobody", "output": "x"},
                ],
            },
            "input[1].call_id",
            "invalid_value",
        ),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "plain.v1.#"}]},
            "input[0].encrypted_content",
            "invalid_encrypted_content",
        ),
        (
            {"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]},
            "input[0].call_id",
            "missing_required_parameter",
        ),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id", "previous_response_not_found"),
        ({"input": "x", "previous_response_id": 5}, "previous_response_id", "invalid_type"),
        ({"input": "x", "conversation": "conv_1"}, "conversation", "unsupported_parameter"),
        ({"input": "x", "background": True}, "background", "unsupported_parameter"),
        ({"input": "x", "tools": ["f"]}, "tools[0]", "invalid_type"),
        ({"input": "x", "tools": [{"type": "function"}]}, "tools[0].name", "missing_required_parameter"),
        ({"input": "x", "tools": [HOSTED, *TOOLS, TOOLS[1]]}, "tools[3].name", "invalid_value"),
        ({"input": "x", "tools": [HOSTED, *TOOLS], "tool_choice": HOSTED}, "tool_choice", "invalid_value"),
        (
            {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": {"type": 5}}]},
            "tools[0].parameters",
            "invalid_function_parameters",
        ),
        (
            {"input": "x", "tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}},
            "tool_choice",
            "invalid_value",
        ),
        (
            {"input": "x", "tools": TOOLS, "tool_choice": {"type": "function"}},
            "tool_choice.name",
            "missing_required_parameter",
        ),
        (
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "s"}}},
            "text.format.schema",
            "missing_required_parameter",
        ),
        (
            {"input": "x", "text": {"format": PLAN | {"schema": {"type": "nothing"}}}},
            "text.format.schema",
            "invalid_json_schema",
        ),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens", "integer_below_min_value"),
        ({"input": "word " * 200_000}, "input", "context_length_exceeded"),
        ({"input": [1, *[{"role": "user"}] * 40_000]}, "input", "context_length_exceeded"),
        ({"input": [*[{"role": "user", "content": "a"}] * 400, {}]}, "input[400].role", "missing_required_parameter"),
        ({"input": "x", "model": "gpt-9"}, "model", "model_not_found"),
        (
            {"instructions": "x", "input": [{"role": "user", "name": "bob x", "content": "hi"}]},
            "input[0].name",
            "invalid_value",
        ),
        (
            {
                "input": [
                    {"role": "user", "content": "hi"},
                    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                    *[{"type": "function_call_output", "call_id": "c", "output": "x"}] * 2,
                ]
            },
            "input[3].call_id",
            "invalid_value",
        ),
        ({"input": "x", "response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ],
)
def test_what_cannot_be_read_is_named_as_it_was_sent(
    server: ServerProcess, body: dict[str, Any], param: str, code: str
) -> None:
    response = post(server, **body)
    error = response.json()["error"]
    assert response.status_code in (400, 404)
    assert (error["param"], error["code"]) == (param, code), error
    assert "messages[" not in error["message"]


@pytest.mark.parametrize(
    "given", ["word " * 200_000, [{"role": "user", "content": c} for c in ("a", "word " * 200_000)]]
)
def test_a_cut_that_does_not_suffice_says_what_stays(server: ServerProcess, given: Any) -> None:
    response = post(server, input=given, truncation="auto")
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "never cut" in error["message"] and error["param"] == "input"


def test_a_response_can_be_gone_on_from(server: ServerProcess, client: openai.OpenAI) -> None:
    """By its id, by references to its items, or by the items themselves: the model reads the same."""
    first = respond(client, tools=TOOLS, bias=CALL_TOOL, max_output_tokens=200)
    call = first.output[-1]
    assert call.type == "function_call"
    told: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    ask: Any = {"role": "user", "content": "Hello there"}
    whole = [ask, *(item.to_dict() for item in first.output), told]
    by_reference = [ask, *({"type": "item_reference", "id": item.id} for item in first.output), told]
    options: Any = {"tools": TOOLS, "temperature": 0, "max_output_tokens": 20}
    by_id = respond(client, previous_response_id=first.id, input=[told], **options)
    others = [respond(client, input=items, **options) for items in (whole, by_reference)]
    assert by_id.previous_response_id == first.id
    counted = client.responses.input_tokens.count(previous_response_id=first.id, input=[told], tools=TOOLS)
    assert counted.input_tokens == by_id.usage.input_tokens
    for answer in others:
        assert answer.usage.input_tokens == by_id.usage.input_tokens > first.usage.input_tokens
        assert stripped(answer.to_dict()["output"]) == stripped(by_id.to_dict()["output"])

    *_, last = respond(client, input="Go on", previous_response_id=by_id.id, max_output_tokens=5, stream=True)
    third = last.response
    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    kinds = [ask["role"], *(i.type for i in first.output), told["type"]]
    kinds += [*(i.type for i in by_id.output), "user"]
    assert [getattr(item, "role", item.type) for item in items] == [
        "assistant" if kind == "message" else kind for kind in kinds
    ]
    assert [i.id for i in client.responses.input_items.list(third.id)] == [i.id for i in items[::-1]]


def test_a_stored_response_can_be_read_and_deleted(server: ServerProcess, client: openai.OpenAI) -> None:
    kept, unkept = (respond(client, store=store, max_output_tokens=5) for store in (None, False))
    assert (kept.store, unkept.store) == (True, False)
    assert client.responses.retrieve(kept.id).to_dict() == kept.to_dict()
    client.responses.delete(kept.id)
    for name in kept.id, unkept.id:
        for ask in client.responses.retrieve, client.responses.delete:
            with pytest.raises(openai.NotFoundError, match=f"'{name}' not found"):
                ask(name)
    url = f"{server.url}/v1/responses/{unkept.id}"
    for path, param in ("?stream=true", "stream"), ("/input_items?limit=0", "limit"):
        refused = httpx.get(url + path)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


def test_a_cancelled_response_fails_aloud(server: ServerProcess) -> None:
    body = {"model": MODEL, "input": "Hello", "max_output_tokens": 2000, "logit_bias": THINK}
    events: list[dict[str, Any]] = []
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body | {"stream": True}, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: "):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 5:
                    name = events[0]["response"]["id"]
                    cancel = f"{server.url}/v1/cancel/{name}"
                    threading.Thread(target=httpx.post, args=(cancel,)).start()
    assert events[-1]["type"] == "response.failed"
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "request_cancelled")
    assert failed["output"][-1]["status"] == "incomplete"
    assert httpx.get(f"{server.url}/v1/responses/{failed['id']}").status_code == 404


def test_what_is_not_enforced_is_reported_on_request(server: ServerProcess) -> None:
    parameters = {"type": "object", "properties": {"tags": {"type": "array", "uniqueItems": True}}}
    function = {"name": "odd", "parameters": parameters}
    path = "parameters.properties.tags.uniqueItems"
    expected = [{"kind": "function", "name": "odd", "path": path, "reason": "the grammar has no such keyword"}]
    more = {"tool_choice": "required", "include_relaxations": True, "max_output_tokens": 8}
    flat = [{"type": "function"} | function]
    assert post(server, input="x", tools=flat, **more).json()["relaxations"] == expected
    assert "relaxations" not in post(server, input="x", max_output_tokens=4).json()
    chat = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 8,
        "tool_choice": "required",
        "tools": [{"type": "function", "function": function}],
        "include_relaxations": True,
    }
    url = f"{server.url}/v1/chat/completions"
    assert httpx.post(url, json=chat, timeout=60).json()["relaxations"] == expected
    streamed = httpx.post(url, json=chat | {"stream": True}, timeout=60).text
    chunks = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert [chunk["relaxations"] for chunk in chunks if "relaxations" in chunk] == [expected]
    chat["tools"][0]["function"] = function | {"strict": True}
    error = httpx.post(url, json=chat, timeout=60).json()["error"]
    assert error["param"] == "tools[0].function.parameters" and path in error["message"]
