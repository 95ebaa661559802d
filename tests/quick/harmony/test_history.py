"""Turns of the assistant that arrive in pieces, as the prompt has them."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.http.errors import from_validation
from gptoss.harmony.conversation import AssistantMessage, Message, PromptError, ToolCall, ToolResult, UserMessage
from gptoss.harmony.history import render_history
from gptoss.harmony.render import HarmonyMessage
from tests.support.conversations import conversation

USER = {"role": "user", "content": "U"}
NOTE = {"role": "developer", "content": "N"}
SHORT = {"analysis": "a", "commentary": "p", "final": "f"}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more


def thought(text: str) -> dict[str, Any]:
    return {"role": "assistant", "reasoning": text}


def calls(*ids: str, name: str = "f", **more: Any) -> dict[str, Any]:
    made = [{"id": i, "type": "function", "function": {"name": name, "arguments": i}} for i in ids]
    return {"role": "assistant", "tool_calls": made} | more


def result(call_id: str, text: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text or f"r{call_id}"}


def shape(messages: list[dict[str, Any]]) -> str:
    """One word a message: a, p and f are the assistant's channels, c a call, r a result."""

    def word(message: HarmonyMessage) -> str:
        if message.recipient is not None:
            return f"c:{message.text}"
        if message.header == "assistant":
            return f"{SHORT[message.channel or '']}:{message.text}"
        return message.text

    return " ".join(word(message) for message in rendered(*messages))


def rendered(*messages: dict[str, Any]) -> list[HarmonyMessage]:
    return list(render_history(conversation(messages).messages))


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([said("W", reasoning="R"), calls("1"), result("1")], "a:R p:W c:1 r1"),
        ([said("W", reasoning="R"), calls("1", reasoning="S"), result("1")], "a:R p:W a:S c:1 r1"),
        ([thought("R"), calls("1"), result("1"), said("W"), calls("2"), result("2")], "a:R c:1 r1 p:W c:2 r2"),
        ([thought("R"), calls("1"), result("1"), said("W"), said("V"), calls("2")], "a:R c:1 r1 p:W p:V c:2"),
        ([thought("R"), calls("1"), said("W"), result("1")], "a:R p:W c:1 r1"),
        ([calls("1"), thought("R"), said("W"), result("1")], "a:R p:W c:1 r1"),
        ([calls("1"), said("W"), calls("2"), said("V"), result("1"), result("2")], "c:1 p:W p:V c:2 r1 r2"),
        ([calls("1", "2"), result("1"), said("W"), result("2")], "c:1 c:2 r1 p:W r2"),
        ([said("W"), NOTE, calls("1")], "p:W # Instructions\n\nN c:1"),
        ([thought("R"), said("W", phase="commentary")], "a:R p:W"),
        ([thought("R"), said("W", phase="final_answer"), calls("1")], "f:W c:1"),
        ([thought("R"), said("W"), USER, calls("1")], "f:W U c:1"),
        ([thought("R"), calls("1"), result("1"), said("W")], "c:1 r1 f:W"),
        ([said("W"), said("V")], "f:W f:V"),
        (
            [calls("1", content="W"), result("1"), said("A"), USER, said("V", reasoning="R"), calls("2")],
            "p:W c:1 r1 f:A U a:R p:V c:2",
        ),
    ],
)
def test_words_before_a_call_are_commentary(messages: list[Any], wanted: str) -> None:
    assert shape([USER, *messages]) == f"U {wanted}"


@pytest.mark.parametrize("order", ["123", "321", "213", "312"])
@pytest.mark.parametrize("ids", ["123", "cba", "b1a"])
def test_results_stand_in_the_order_of_their_calls(order: str, ids: str) -> None:
    results = [result(ids[int(n) - 1], f"r{n}") for n in order]
    wanted = "c:{} c:{} c:{}".format(*ids)
    assert shape([calls(*ids), *results]) == f"{wanted} r1 r2 r3"
    assert shape([*(calls(i) for i in ids), *results]) == f"{wanted} r1 r2 r3"
    later = [calls(*ids), *results[:2], NOTE, results[2]]
    assert re.sub(" # Instructions\n\nN", "", shape(later)) == f"{wanted} r1 r2 r3"


def test_results_stay_with_their_step_when_ids_come_again() -> None:
    step = [calls("1", "2"), result("2"), result("1")]
    assert shape([*step, *step]) == "c:1 c:2 r1 r2 c:1 c:2 r1 r2"


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([calls("1"), USER, calls("2"), result("1"), result("2")], "c:1 r1 U c:2 r2"),
        ([calls("1", "2"), result("2"), calls("3"), result("3"), result("1")], "c:1 c:2 r1 r2 c:3 r3"),
        ([calls("1", "2"), result("2"), said("W"), calls("3"), result("1"), result("3")], "c:1 c:2 r1 r2 p:W c:3 r3"),
        (
            [calls("1"), USER, calls("2"), USER, calls("3"), result("3"), result("2"), result("1")],
            "c:1 r1 U c:2 r2 U c:3 r3",
        ),
        ([calls("1", "2"), result("2"), calls("3"), result("3")], "c:1 c:2 r2 c:3 r3"),
        ([calls("1"), thought("R"), calls("2"), result("2"), result("1")], "c:1 a:R c:2 r1 r2"),
        ([calls("1"), USER, result("1")], "c:1 U r1"),
    ],
)
def test_a_late_result_goes_to_the_calls_of_its_step(messages: list[Any], wanted: str) -> None:
    assert shape(messages) == wanted


@pytest.mark.parametrize("between", [[], [result("y")], [USER], [said("W"), calls("z")]])
def test_two_results_of_one_call_are_refused(between: list[Any]) -> None:
    messages = [calls("x", "y"), result("x"), *between, result("x", "again")]
    with pytest.raises(PromptError, match="of id 'x'") as caught:
        shape(messages)
    assert (caught.value.origin, caught.value.field) == (f"messages[{len(messages) - 1}]", "call_id")


@pytest.mark.parametrize("phase", ["commentary", "final_answer"])
def test_a_phase_without_words_is_no_message(phase: str) -> None:
    assert shape([thought("R"), calls("1", phase=phase), result("1")]) == "a:R c:1 r1"
    assert shape([calls("1", content="", phase="commentary")]) == "p: c:1"
    assert shape([thought("R"), said("W"), USER, said("")]) == "f:W U"
    assert shape([thought("R"), calls("1"), said(""), result("1")]) == "a:R c:1 r1"


def test_two_calls_with_one_id_are_refused() -> None:
    for messages in [calls("x", "y", "x")], [calls("x", "y"), said("W"), calls("x")]:
        with pytest.raises(PromptError, match="have the same id 'x'") as caught:
            shape([USER, *messages, result("x")])
        assert caught.value.origin in ("messages[1].tool_calls[2]", "messages[3].tool_calls[0]")
        assert caught.value.field == "id"
        assert "'messages[1].tool_calls[0]'" in str(caught.value)
    assert shape([calls("x"), USER, calls("x"), result("x")]) == "c:x U c:x rx"


def test_a_custom_call_is_text() -> None:
    call = {"id": "1", "type": "custom", "custom": {"name": "patch", "input": "***"}}
    message, told = rendered({"role": "assistant", "tool_calls": [call]}, result("1"))
    assert (message.recipient, message.content_type, message.text) == ("functions.patch", None, "***")
    assert told.header == "functions.patch to=assistant"


def problem(*messages: Any) -> Any:
    from pydantic import ValidationError

    try:
        ChatCompletionRequest.model_validate({"model": "m", "messages": list(messages)})
    except ValidationError as error:
        return from_validation(error)
    return None


def test_the_name_of_a_user_reaches_the_model_as_openai_harmony_writes_it() -> None:
    (message,) = rendered(USER | {"name": "alice"})
    assert (message.header, message.text) == ("user:alice", "U")
    assert problem(USER | {"name": "Zoë-1.x"}) is None
    assert problem(USER | {"name": ""}) is None


@pytest.mark.parametrize("name", ["a b", "a\n", "a<|end|>", "a to=functions.f", "x" * 65, "a/b", "\u2028"])
def test_a_name_that_a_header_cannot_have_is_refused(name: str) -> None:
    assert problem(USER, USER | {"name": name}).param == "messages[1].name"


def test_parts_of_a_chat_message() -> None:
    empty: dict[str, Any] = {"role": "tool", "tool_call_id": "1", "content": []}
    assert problem(calls("1"), empty) is None
    assert shape([calls("1"), empty]).strip() == "c:1"
    assert problem(USER | {"content": []}).code == "empty_array"
    wrong = problem(USER | {"content": [{"type": "output_text", "text": "x"}]})
    assert "not allowed here; use 'text'" in str(wrong)
    call: dict[str, Any] = {"id": "1", "type": "custom"}
    missing = problem({"role": "assistant", "tool_calls": [call]})
    assert (missing.param, missing.code) == ("messages[0].tool_calls[0].custom", "missing_required_parameter")


def test_calls_of_builtin_tools_are_part_of_the_analysis() -> None:
    def turn(number: int) -> list[Message]:
        search, found = f"search {number}", f"found {number}"
        return [
            UserMessage("U"),
            AssistantMessage("R", "analysis"),
            ToolCall("browser.search", search, f"s{number}", is_builtin=True),
            ToolResult(found, f"s{number}"),
            ToolCall("f", "{}", f"f{number}"),
            ToolResult("r", f"f{number}"),
        ]

    call = HarmonyMessage("assistant", "search 2", "analysis", "browser.search code", ends_with_call=True)
    read = HarmonyMessage("browser.search to=assistant", "found 2", "analysis")
    made = list(render_history([*turn(1), AssistantMessage("F"), *turn(2)]))
    assert [message.text for message in made] == ["U", "{}", "r", "F", "U", "R", "search 2", "found 2", "{}", "r"]
    assert made[6:8] == [call, read]
