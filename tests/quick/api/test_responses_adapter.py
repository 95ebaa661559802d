"""Items of a Responses request as chat messages: what the assistant did in a row is one message."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import ValidationError

from gptoss.api.http.errors import InvalidRequest, from_validation
from gptoss.api.responses import items as responses_items
from gptoss.api.responses.adapter import chat_body
from gptoss.api.responses.encrypted_content import seal
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.telemetry.warn_once import WarnOnce

ASK = {"role": "user", "content": "Weather?"}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
SAID = {"role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]}


def call(number: int) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}


def output(number: int) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": "sun"}


def made(number: int) -> dict[str, Any]:
    return {"id": f"c{number}", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def told(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": "sun"}


def body_of(*items: Any, **more: Any) -> Any:
    request = ResponsesRequest.model_validate({"model": "m", "input": list(items)} | more)
    return chat_body(request, request.placed())


@pytest.mark.parametrize(
    ("items", "messages", "begun_by"),
    [
        ([ASK, SAID], [ASK, {"role": "assistant", "content": "Looking."}], [0, 1]),
        (
            [ASK, THOUGHT, SAID, call(1), call(2), output(1), output(2)],
            [
                ASK,
                {
                    "role": "assistant",
                    "reasoning_content": "Hm.",
                    "content": "Looking.",
                    "tool_calls": [made(1), made(2)],
                },
                told(1),
                told(2),
            ],
            [0, 1, 5, 6],
        ),
        (
            [ASK, call(1), output(1), THOUGHT, call(2), output(2)],
            [
                ASK,
                {"role": "assistant", "tool_calls": [made(1)]},
                told(1),
                {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [made(2)]},
                told(2),
            ],
            [0, 1, 2, 3, 5],
        ),
        (
            [call(1), SAID, THOUGHT, THOUGHT],
            [
                {"role": "assistant", "tool_calls": [made(1)]},
                {"role": "assistant", "content": "Looking."},
                {"role": "assistant", "reasoning_content": "Hm."},
                {"role": "assistant", "reasoning_content": "Hm."},
            ],
            [0, 1, 2, 3],
        ),
    ],
)
def test_items_become_messages(items: list[Any], messages: list[Any], begun_by: list[int]) -> None:
    chat = body_of(*items)
    assert chat.body["messages"] == messages
    assert chat.places == [f"input[{index}]" for index in begun_by]


def test_sealed_reasoning_is_read_where_there_is_no_content() -> None:
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": seal("Hm, ü 🌦")}
    assert body_of(ASK, sealed).body["messages"][1]["reasoning_content"] == "Hm, ü 🌦"
    assert body_of(sealed | {"content": None}).body == body_of(sealed | {"content": []}).body
    assert body_of(THOUGHT | {"encrypted_content": "?"}).body == body_of(THOUGHT).body


@pytest.mark.parametrize("sealed", ["plain.v1.####", "plain.v1._w==", "plain.v1.YQ"])
def test_damaged_reasoning_is_refused(sealed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        body_of(ASK, {"type": "reasoning", "encrypted_content": sealed})
    assert caught.value.param == "input[1].encrypted_content"
    assert caught.value.code == "invalid_encrypted_content"


@pytest.mark.parametrize("sealed", ["", "gAAAAABo", "PLAIN.v1.SG0u"])
def test_what_another_server_sealed_is_left_out(sealed: str) -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    assert body_of(ASK, item, SAID).body == body_of(ASK, SAID).body
    summary = [{"type": "summary_text", "text": "Hm."}]
    assert body_of(ASK, item | {"summary": summary}).body == body_of(ASK, THOUGHT).body


def test_a_summary_alone_is_the_reasoning() -> None:
    summary = [{"type": "summary_text", "text": text} for text in ("One.", "Two.")]
    chat = body_of(ASK, {"type": "reasoning", "summary": summary})
    assert chat.body["messages"][1] == {"role": "assistant", "reasoning_content": "One.\n\nTwo."}
    assert body_of(ASK, THOUGHT | {"summary": summary}).body == body_of(ASK, THOUGHT).body


FOREIGN = (
    "compaction",
    "context_compaction",
    "web_search_call",
    "local_shell_call",
    "local_shell_call_output",
    "tool_search_call",
    "tool_search_output",
    "computer_call_output",
    "mcp_list_tools",
    "image_generation_call",
)


@pytest.mark.parametrize("kind", FOREIGN)
def test_items_of_other_servers_are_left_out(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatched = WarnOnce(logging.getLogger("test"), "%s")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses_items, "_warn_left_out", monkeypatched)
        chat = body_of(ASK, {"type": kind, "id": "x", "action": {}, "tools": 1}, THOUGHT, call(1))
    assert chat.body == body_of(ASK, THOUGHT, call(1)).body
    assert chat.places == ["input[0]", "input[2]"]
    assert repr(kind) in caplog.text


@pytest.mark.parametrize(
    "made",
    [
        {"type": "local_shell_call", "call_id": "c1", "id": "lsh_1", "action": {}},
        {"type": "web_search_call", "id": "c1"},
        {"type": "tool_search_call", "call_id": "c1", "arguments": {}},
    ],
)
def test_results_of_calls_that_are_left_out_are_left_out_too(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses_items, "_warn_left_out", WarnOnce(logging.getLogger("test"), "%s"))
        chat = body_of(ASK, made, call(2), output(1), output(2), SAID)
    assert chat.body == body_of(ASK, call(2), output(2), SAID).body
    assert "function_call_output" in caplog.text
    assert body_of(made, call(1), output(1)).body == body_of(call(1), output(1)).body
    assert told(3) in body_of(ASK, made, call(2), output(3)).body["messages"]  # an error of the client


@pytest.mark.parametrize("kind", ["banana", "function_cal", "messages", "", 5])
def test_items_of_no_known_kind_are_refused(kind: Any) -> None:
    if kind == "":  # as if there were none
        assert body_of(ASK | {"type": ""}).body == body_of(ASK).body
        return
    with pytest.raises(InvalidRequest) as caught:
        body_of(ASK, {"type": kind})
    assert caught.value.param == "input[1].type"


def test_calls_of_custom_tools_are_read() -> None:
    items = [
        {"type": "custom_tool_call", "id": "ctc_1", "call_id": "c1", "name": "patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    custom = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
    assert body_of(ASK, *items).body["messages"] == [ASK, {"role": "assistant", "tool_calls": [custom]}, told(1)]


def test_an_empty_array_is_an_empty_result() -> None:
    messages = body_of(call(1), output(1) | {"output": []}).body["messages"]
    assert messages[1] == told(1) | {"content": ""}


@pytest.mark.parametrize("between", [[], [SAID], [THOUGHT, call(2)], [SAID, THOUGHT, SAID]])
def test_two_calls_with_one_id_are_refused(between: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match=r"'input\[0\]' and .* call_id 'c1'") as caught:
        body_of(call(1), *between, call(1), output(1))
    assert caught.value.param == f"input[{len(between) + 1}].call_id"
    body_of(call(1), output(1), *between, call(1), output(1))  # the id is free again


def test_a_part_that_is_not_allowed_here_gets_the_true_reason() -> None:
    with pytest.raises(InvalidRequest, match="'output_text' are not allowed here; use 'input_text'"):
        body_of({"role": "user", "content": [{"type": "output_text", "text": "x"}]})
    with pytest.raises(InvalidRequest, match="'input_image' are not supported: this model reads"):
        body_of({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]})


@pytest.mark.parametrize(
    ("items", "phases"),
    [
        ([THOUGHT, SAID, THOUGHT, SAID], ["commentary", None]),
        ([SAID, THOUGHT, SAID, THOUGHT, SAID], ["commentary", "commentary", None]),
        ([SAID, SAID], [None, None]),
        ([SAID, ASK, THOUGHT, SAID], [None, None]),
        ([SAID, THOUGHT], [None]),
        ([SAID | {"phase": "final_answer"}, THOUGHT, SAID], ["final_answer", None]),
        ([SAID | {"phase": "commentary"}, SAID], ["commentary", None]),
    ],
)
def test_words_before_more_reasoning_and_words_are_a_preamble(items: list[Any], phases: list[str | None]) -> None:
    words = [m for m in body_of(ASK, *items).body["messages"] if m.get("content") == "Looking."]
    assert [message.get("phase") for message in words] == phases


def test_instructions_come_first_and_are_no_item() -> None:
    chat = body_of(ASK, instructions="Be kind.")
    assert chat.body["messages"] == [{"role": "developer", "content": "Be kind."}, ASK]
    assert chat.places == ["instructions", "input[0]"]


def test_tools_and_formats_are_nested_as_chat_has_them() -> None:
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    schema = {"type": "object", "properties": {}}
    chat = body_of(
        ASK,
        tools=[{"type": "mcp"}, {"type": "function", **function}],
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
        text={"format": {"type": "json_schema", "name": "s", "schema": schema}, "verbosity": "low"},
        reasoning={"effort": "high", "summary": "auto"},
        max_output_tokens=9,
        temperature=0.5,
        store=True,
    )
    assert chat.body == {
        "model": "m",
        "messages": [ASK],
        "tools": [{"type": "function", "function": function}],
        "tool_choice": {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        "verbosity": "low",
        "reasoning_effort": "high",
        "max_completion_tokens": 9,
        "temperature": 0.5,
    }


@pytest.mark.parametrize(
    ("chats", "ours"),
    [
        ("messages[0].content", "instructions"),
        ("messages[2].tool_call_id", "input[3].call_id"),
        ("tools[0].function.parameters", "tools[1].parameters"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("max_completion_tokens", "max_output_tokens"),
        ("temperature", "temperature"),
    ],
)
def test_errors_name_the_field_that_was_sent(chats: str, ours: str) -> None:
    tools = [{"type": "web_search"}, {"type": "function", "name": "f"}]
    chat = body_of(THOUGHT, SAID, call(1), output(1), instructions="x", tools=tools)
    error = chat.in_words_of_responses(InvalidRequest("no", chats, "some_code"))
    assert (error.param, error.code, error.message) == (ours, "some_code", "no")


@pytest.mark.parametrize(
    ("said", "ours"),
    [
        ("Invalid schema for function 'n__g': 'n__h'", "Invalid schema for function 'g' of namespace 'n': 'n__h'"),
        ("Missing 'tools[1].function.parameters'.", "Missing 'tools[1].tools[0].parameters'."),
        ("'messages[0]' and 'messages[2].name'", "'instructions' and 'messages[2].name'"),
        ("'tools[7]' is 'x y'", "'tools[7]' is 'x y'"),
        ("'max_tokens' is odd", "'max_output_tokens' is odd"),
    ],
)
def test_errors_are_in_words_of_the_client(said: str, ours: str) -> None:
    inner = [{"type": "function", "name": "g"}]
    tools = [{"type": "function", "name": "f"}, {"type": "namespace", "name": "n", "tools": inner}]
    chat = body_of(ASK, instructions="x", tools=tools)
    assert chat.in_words_of_responses(InvalidRequest(said, "max_tokens")).message == ours


@pytest.mark.parametrize(
    ("field", "harmless", "wrong"),
    [
        ("response_format", None, [{"type": "json_object"}, {"type": "text"}, "x"]),
        ("continue_final_message", False, [True, "yes"]),
        ("add_generation_prompt", True, [False, "no"]),
    ],
)
def test_chats_fields_that_would_change_the_answer_are_refused(field: str, harmless: Any, wrong: list[Any]) -> None:
    body_of(ASK, **{field: harmless})
    for value in wrong:
        with pytest.raises(ValidationError) as caught:
            body_of(ASK, **{field: value})
        assert from_validation(caught.value).param == field
