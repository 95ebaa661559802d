"""Items of a Responses request as a conversation, its options, and the names of its fields in errors."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from gptoss.api.http.encrypted_content import encode_text
from gptoss.api.http.errors import InvalidRequest, field_names, from_validation
from gptoss.api.http.profiles import Profiles
from gptoss.api.http.sender import Sender
from gptoss.api.responses.adapter import ReadRequest, read_request
from gptoss.api.responses.input import conversation as responses_conversation
from gptoss.api.responses.input import items as responses_items
from gptoss.api.responses.input.items import placed_items
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.config.profiles import PROFILES
from gptoss.generation.errors import GenerationError
from gptoss.generation.planner import PlanLimits
from gptoss.generation.request import FunctionTool, OutputFormat, ToolPolicy
from gptoss.generation.tool_plan import plan_tools
from gptoss.harmony.conversation import (
    AssistantMessage,
    Conversation,
    DeveloperMessage,
    Message,
    PromptError,
    ToolCall,
    ToolResult,
    UserMessage,
)
from gptoss.harmony.history import render_history
from gptoss.harmony.render import HarmonyMessage

ASK = {"role": "user", "content": "Weather?"}
THOUGHT = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
SAID = {"role": "assistant", "content": [{"type": "output_text", "text": "Looking."}]}


def call(number: int) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}


def output(number: int) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": "sun"}


def made(number: int, origin: int) -> ToolCall:
    return ToolCall("f", "{}", f"c{number}", origin=f"input[{origin}]")


def told(number: int, origin: int) -> ToolResult:
    return ToolResult("sun", f"c{number}", origin=f"input[{origin}]")


def body_of(*items: Any, **more: Any) -> ReadRequest:
    request = ResponsesRequest.model_validate({"model": "m", "input": list(items)} | more)
    return read_request(request, placed_items(request.input))


def messages_of(*items: Any, **more: Any) -> list[Message]:
    return list(body_of(*items, **more).conversation().messages)


def texts_of(*items: Any) -> list[HarmonyMessage]:
    """As the prompt has them: without the items that they came by."""
    return list(render_history(messages_of(*items)))


ASKED = UserMessage("Weather?")
THINKING = AssistantMessage("Hm.", "analysis")
LOOKING = AssistantMessage("Looking.")


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ([ASK, SAID], [ASKED, LOOKING]),
        (
            [ASK, THOUGHT, SAID, call(1), call(2), output(1), output(2)],
            [ASKED, THINKING, LOOKING, made(1, 3), made(2, 4), told(1, 5), told(2, 6)],
        ),
        (
            [ASK, call(1), output(1), THOUGHT, call(2), output(2)],
            [ASKED, made(1, 1), told(1, 2), THINKING, made(2, 4), told(2, 5)],
        ),
        ([call(1), SAID, THOUGHT, THOUGHT], [made(1, 0), LOOKING, THINKING, THINKING]),
        ([ASK, SAID | {"content": ""}, call(1)], [ASKED, AssistantMessage(""), made(1, 2)]),
        ([ASK, SAID | {"content": "", "phase": "commentary"}], [ASKED, AssistantMessage("", "commentary")]),
    ],
)
def test_items_become_messages(items: list[Any], messages: list[Any]) -> None:
    assert messages_of(*items) == messages


PARTED = [AssistantMessage("Look", "commentary"), AssistantMessage("Hm.", "analysis")]
PARTED_ID = "call_" + "0" * 24 + "_P4A3"


@pytest.mark.parametrize(
    ("before", "parted"),
    [
        ([THOUGHT, SAID | {"content": "Look"}], PARTED),
        ([SAID, THOUGHT, SAID | {"content": "Look"}], [AssistantMessage("Looking.", "commentary"), *PARTED]),
        ([THOUGHT, SAID], [THINKING, LOOKING]),  # other texts than the id speaks of
        ([THOUGHT, SAID | {"content": "Look", "phase": "commentary"}], [THINKING, PARTED[0]]),
        ([THOUGHT, call(1)], [THINKING, made(1, 1)]),  # not the first call after the texts
    ],
)
def test_texts_that_a_client_joined_are_parted_by_the_id_of_the_call(before: list[Any], parted: list[Any]) -> None:
    last = ToolCall("f", "{}", PARTED_ID, origin=f"input[{len(before)}]")
    assert messages_of(*before, call(1) | {"call_id": PARTED_ID}) == [*parted, last]


def test_an_id_of_empty_messages_adds_them() -> None:
    empty = "call_" + "0" * 24 + "_A0"
    answer = SAID | {"phase": "final_answer"}
    for before, read in ([], []), ([answer], [AssistantMessage("Looking.", "final")]):
        assert messages_of(*before, call(1) | {"call_id": empty})[:-1] == [*read, AssistantMessage("", "analysis")]
    nothing = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": ""}]}
    assert messages_of(nothing, call(1) | {"call_id": f"{empty}A0"})[:-1] == [AssistantMessage("", "analysis")]
    assert len(messages_of(call(1), call(1) | {"call_id": empty})) == 2  # the id of the first call counts


def test_sealed_reasoning_is_read_where_there_is_no_content() -> None:
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": encode_text("Hm, ü 🌦")}
    assert messages_of(ASK, sealed)[1] == AssistantMessage("Hm, ü 🌦", "analysis")
    assert messages_of(sealed | {"content": None}) == messages_of(sealed | {"content": []})
    assert messages_of(THOUGHT | {"encrypted_content": "?"}) == messages_of(THOUGHT)


@pytest.mark.parametrize("sealed", ["plain.v1.####", "plain.v1._w==", "plain.v1.YQ"])
def test_damaged_reasoning_is_refused(sealed: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        body_of(ASK, {"type": "reasoning", "encrypted_content": sealed})
    assert caught.value.param == "input[1].encrypted_content"
    assert caught.value.code == "invalid_encrypted_content"


@pytest.mark.parametrize("sealed", ["", "gAAAAABo", "PLAIN.v1.SG0u"])
def test_what_another_server_sealed_is_left_out(sealed: str) -> None:
    item = {"type": "reasoning", "summary": [], "encrypted_content": sealed}
    assert messages_of(ASK, item, SAID) == messages_of(ASK, SAID)
    summary = [{"type": "summary_text", "text": "Hm."}]
    assert messages_of(ASK, item | {"summary": summary}) == messages_of(ASK, THOUGHT)


def test_a_summary_alone_is_the_reasoning() -> None:
    summary = [{"type": "summary_text", "text": text} for text in ("One.", "Two.")]
    read = messages_of(ASK, {"type": "reasoning", "summary": summary})
    assert read[1] == AssistantMessage("One.\n\nTwo.", "analysis")
    assert messages_of(ASK, THOUGHT | {"summary": summary}) == messages_of(ASK, THOUGHT)


FOREIGN = (
    "compaction",
    "context_compaction",
    "web_search_call",
    "code_interpreter_call",
    "program_output",
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
        patch.setattr(responses_conversation, "_warn_left_out", monkeypatched)
        chat = body_of(ASK, {"type": kind, "id": "x", "action": {}, "tools": 1}, THOUGHT, call(1))
    assert list(chat.conversation().messages) == [ASKED, THINKING, made(1, 3)]
    assert chat.policy == body_of(ASK, THOUGHT, call(1)).policy
    assert repr(kind) in caplog.text


@pytest.mark.parametrize(
    "made",
    [
        {"type": "computer_call", "call_id": "c1", "id": "cu_1", "action": {}},
        {"type": "web_search_call", "id": "c1"},
        {"type": "tool_search_call", "call_id": "c1", "arguments": {}},
    ],
)
def test_results_of_calls_that_are_left_out_are_left_out_too(made: Any, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(responses_conversation, "_warn_left_out", WarnOnce(logging.getLogger("test"), "%s"))
        read = texts_of(ASK, made, call(2), output(1), output(2), SAID)
    assert read == texts_of(ASK, call(2), output(2), SAID)
    assert "function_call_output" in caplog.text
    assert texts_of(made, call(1), output(1)) == texts_of(call(1), output(1))
    assert told(3, 3) in messages_of(ASK, made, call(2), output(3))  # an error of the client


@pytest.mark.parametrize("kind", ["banana", "function_cal", "messages", "", 5, ["message"], {"a": 1}])
def test_items_of_no_known_kind_are_refused(kind: Any) -> None:
    if kind == "":  # as if there were none
        assert messages_of(ASK | {"type": ""}) == messages_of(ASK)
        return
    with pytest.raises(InvalidRequest) as caught:
        body_of(ASK, {"type": kind})
    assert caught.value.param == "input[1].type"
    assert responses_items.num_rendered([{"type": kind}]) == 0


def test_calls_of_custom_tools_are_read() -> None:
    items = [
        {"type": "custom_tool_call", "id": "ctc_1", "call_id": "c1", "name": "patch", "input": "*** Begin"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sun"}]},
    ]
    custom = ToolCall("patch", "*** Begin", "c1", is_json=False, origin="input[1]")
    assert messages_of(ASK, *items) == [ASKED, custom, told(1, 2)]


def test_an_empty_array_is_an_empty_result() -> None:
    messages = messages_of(call(1), output(1) | {"output": []})
    assert messages[1] == ToolResult("", "c1", origin="input[1]")


@pytest.mark.parametrize("between", [[], [SAID], [THOUGHT, call(2)], [SAID, THOUGHT, SAID]])
def test_two_calls_with_one_id_are_refused(between: list[Any]) -> None:
    with pytest.raises(PromptError, match=r"'input\[0\]' and .* id 'c1'") as caught:
        texts_of(call(1), *between, call(1), output(1))
    assert (caught.value.origin, caught.value.field) == (f"input[{len(between) + 1}]", "id")
    texts_of(call(1), output(1), *between, call(1), output(1))  # the id is free again


def test_a_result_names_a_call() -> None:
    with pytest.raises(InvalidRequest) as caught:
        body_of(ASK, call(1), output(1) | {"call_id": ""})
    assert (caught.value.param, caught.value.code) == ("input[2].call_id", "missing_required_parameter")
    with pytest.raises(PromptError) as unknown:
        texts_of(call(1), output(2))
    assert (unknown.value.origin, unknown.value.field) == ("input[1]", "call_id")


def test_a_name_that_a_header_cannot_have_is_refused() -> None:
    assert messages_of(ASK | {"name": "Zoë"}) == [UserMessage("Weather?", "Zoë")]
    with pytest.raises(InvalidRequest) as caught:
        body_of(SAID, ASK | {"name": "a b"})
    assert (caught.value.param, caught.value.code) == ("input[1].name", "invalid_value")


def test_a_part_that_is_not_allowed_here_gets_the_true_reason() -> None:
    with pytest.raises(InvalidRequest, match="'output_text' are not allowed here; use 'input_text'"):
        body_of({"role": "user", "content": [{"type": "output_text", "text": "x"}]})
    with pytest.raises(InvalidRequest, match="'input_image' are not supported: this model reads"):
        body_of({"role": "user", "content": [{"type": "input_image", "image_url": "x"}]})


@pytest.mark.parametrize(
    ("items", "channels"),
    [
        ([THOUGHT, SAID, THOUGHT, SAID], ["commentary", None]),
        ([SAID, THOUGHT, SAID | {"content": ""}], ["commentary"]),
        ([SAID, THOUGHT, SAID, THOUGHT, SAID], ["commentary", "commentary", None]),
        ([SAID, SAID], [None, None]),
        ([SAID, ASK, THOUGHT, SAID], [None, None]),
        ([SAID, THOUGHT], [None]),
        ([SAID | {"phase": "final_answer"}, THOUGHT, SAID], ["final", None]),
        ([SAID | {"phase": "commentary"}, SAID], ["commentary", None]),
    ],
)
def test_words_before_more_reasoning_and_words_are_a_preamble(items: list[Any], channels: list[Any]) -> None:
    words = [message for message in messages_of(ASK, *items) if message.text == "Looking."]  # type: ignore[union-attr]
    assert words == [AssistantMessage("Looking.", channel) for channel in channels]


def test_instructions_come_first_and_are_no_item() -> None:
    assert messages_of(ASK, instructions="Be kind.") == [DeveloperMessage("Be kind."), ASKED]


def test_tools_formats_and_limits_are_those_of_every_endpoint() -> None:
    schema = {"type": "object", "properties": {}}
    read = body_of(
        ASK,
        tools=[
            {"type": "mcp"},
            {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
        ],
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]},
        parallel_tool_calls=False,
        text={"format": {"type": "json_schema", "name": "s", "schema": schema}, "verbosity": "low"},
        reasoning={"effort": "high", "summary": "auto"},
        max_output_tokens=9,
        temperature=0.5,
        store=True,
    )
    incoming: Any = SimpleNamespace(
        planner=SimpleNamespace(limits=PlanLimits(4096)),
        profiles=Profiles(PROFILES, PROFILES["balanced"], "m", frozenset({"m"})),
        sender=Sender(""),
    )
    asked = read.generation_request(incoming)
    assert (asked.sampling.temperature, asked.prompt) == (0.5, Conversation((ASKED,)))
    assert asked.tools == ToolPolicy(
        [FunctionTool("f", "d", {"type": "object"}, strict=True, label="'f'")], "required", ["f"], max_calls=1
    )
    assert asked.output_format == OutputFormat("json", schema, "text.format.schema", ("response_format", "s"), "s")
    assert (asked.effort, asked.max_tokens, asked.sampling.logprobs) == ("high", 9, None)


@pytest.mark.parametrize(
    ("path", "field"),
    [
        (("prompt",), "input"),
        (("prompt", "input[3]", "id"), "input[3].call_id"),
        (("tools", 0, "parameters"), "tools[1].parameters"),
        (("tools", 1, "parameters"), "tools[2].tools[0].parameters"),
        (("tool_choice",), "tool_choice"),
        (("output_format", "text.format.schema"), "text.format.schema"),
        (("output_format", "response_format"), "text.format"),
        (("output_format", "guided_json"), "guided_json"),
        (("sampling", "min_tokens"), "min_tokens"),
        ((), None),
    ],
)
def test_errors_name_the_field_that_was_sent(path: Any, field: str | None) -> None:
    inner = [{"type": "function", "name": "g"}]
    tools = [{"type": "web_search"}, {"type": "function", "name": "f"}]
    read = body_of(THOUGHT, SAID, instructions="x", tools=[*tools, {"type": "namespace", "name": "n", "tools": inner}])
    with pytest.raises(InvalidRequest) as caught, field_names(read.field_name):
        raise GenerationError("no", path, "some_code")
    assert (caught.value.param, caught.value.code, caught.value.message) == (field, "some_code", "no")


def test_errors_name_functions_as_the_client_does() -> None:
    broken = {"type": "function", "name": "g", "parameters": {"type": "banana"}}
    read = body_of(ASK, tools=[{"type": "namespace", "name": "n", "tools": [broken]}])
    problem = pytest.raises(InvalidRequest, match="for function 'g' of namespace 'n': ")
    with problem as caught, field_names(read.field_name):
        plan_tools(read.policy)
    assert caught.value.param == "tools[0].tools[0].parameters"


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
