"""The body of /v1/messages: its blocks as a conversation, its tools, and the names of its fields in errors."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from pydantic import ValidationError

from gptoss.api.http.encrypted_content import encode_text
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.messages import conversation as blocks_read
from gptoss.api.messages.adapter import invalid
from gptoss.api.messages.conversation import num_rendered, read_conversation
from gptoss.api.messages.schema.request import CountTokensRequest, MessagesRequest
from gptoss.api.messages.tools import OfferedTools, read_tools
from gptoss.api.telemetry.unknown_fields import find_unknown
from gptoss.api.telemetry.warn_once import WarnOnce
from gptoss.generation.request import FunctionTool, Prefill
from gptoss.harmony.conversation import (
    AssistantMessage,
    DeveloperMessage,
    Message,
    ToolCall,
    ToolResult,
    UserMessage,
)
from gptoss.prompt_builder import PromptBuilder
from tests.support.coding_agent import first_turn, next_turn
from tests.support.vocabulary import public_vocabulary

SAID = {"type": "text", "text": "Look"}
CALLED = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1, "é": "🌦"}}
THOUGHT = {"type": "thinking", "thinking": "Hm.", "signature": "plain.v1."}
CALL = ToolCall("f", '{"a":1,"é":"🌦"}', "toolu_1", origin="messages.0.content.0")
RESULT: dict[str, Any] = {"type": "tool_result", "tool_use_id": "toolu_1"}
TOOL = {"name": "f", "description": "Does f.", "input_schema": {"type": "object"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def request(*messages: Any, **more: Any) -> CountTokensRequest:
    return CountTokensRequest.model_validate({"model": "m", "messages": list(messages)} | more)


def read(*messages: Any, **more: Any) -> list[Message]:
    conversation, prefill = read_conversation(request(*messages, **more))
    assert prefill is None
    return list(conversation.messages)


def text_block(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text} | more


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
@pytest.mark.parametrize("text", ["Hi\n there ", ""])
def test_a_string_is_a_list_of_one_text_block(role: str, text: str) -> None:
    cached = text_block(text, cache_control={"type": "ephemeral"})
    as_string, as_list = ({"role": role, "content": content} for content in (text, [cached]))
    assert read(as_string, user("x")) == read(as_list, user("x"))


def test_the_system_prompt() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1; cch=1f;"
    wanted = [DeveloperMessage("Be brief."), UserMessage("Hi")]
    assert read(user("Hi"), system="Be brief.") == wanted
    assert read(user("Hi"), system=[text_block("Be brief.")]) == wanted
    assert read(user("Hi"), system=[text_block(billing), text_block("Be brief.")]) == wanted
    assert read(user("Hi"), system=f"{billing}\nBe brief.") == wanted
    two = [text_block("Be brief."), text_block("And kind.")]
    assert read(user("Hi"), system=two)[:2] == [DeveloperMessage("Be brief."), DeveloperMessage("And kind.")]


def test_a_system_message_stays_where_it_is() -> None:
    later = system([text_block("x-anthropic-billing-header: a"), text_block("One."), text_block("Two.")])
    assert read(user("Hi"), later, user("Go")) == [
        UserMessage("Hi"),
        DeveloperMessage("One.\n\nTwo."),
        UserMessage("Go"),
    ]


@pytest.mark.parametrize(
    ("blocks", "messages"),
    [
        ([THOUGHT, SAID], [AssistantMessage("Hm.", "analysis"), AssistantMessage("Look")]),
        ([CALLED], [CALL]),
        ([THOUGHT | {"signature": "another's"}], [AssistantMessage("Hm.", "analysis")]),
        ([THOUGHT | {"thinking": "", "signature": encode_text("Hm, ü")}], [AssistantMessage("Hm, ü", "analysis")]),
        ([THOUGHT | {"thinking": ""}], [AssistantMessage("", "analysis")]),
        ([THOUGHT | {"thinking": "", "signature": "another's"}], []),
        ([THOUGHT | {"thinking": "", "signature": ""}], []),
        ([{"type": "redacted_thinking", "data": "another's"}], []),
        ([{"type": "redacted_thinking", "data": encode_text("Hm.")}], [AssistantMessage("Hm.", "analysis")]),
        ([SAID, THOUGHT, SAID], [AssistantMessage("Look", "commentary"), AssistantMessage("Hm.", "analysis")]),
        ([text_block("")], [AssistantMessage("", "final")]),
        ([text_block(""), CALLED], [AssistantMessage("", "commentary")]),
        ([{"type": "server_tool_use", "id": "x", "name": "web_search", "input": {"type": "function"}}], []),
        ([{"type": "web_search_tool_result", "tool_use_id": "x", "content": [{"secret": 1}]}], []),
    ],
)
def test_blocks_of_the_assistant(blocks: list[Any], messages: list[Any]) -> None:
    assert read(assistant(*blocks), user("Hi"))[: len(messages)] == messages
    if not messages:
        assert read(assistant(*blocks), user("Hi")) == [UserMessage("Hi")]


def test_foreign_signatures_are_reported_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    warn = WarnOnce(logging.getLogger("test"), "left out: %s")
    monkeypatch.setattr(blocks_read, "_warn_left_out", warn)
    for _ in range(2):
        read(assistant(THOUGHT | {"thinking": "", "signature": "another's"}), user("Hi"))
    assert [record.getMessage() for record in caplog.records] == ["left out: 'thinking of another server'"]


def test_damaged_thinking_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(user("Hi"), assistant(THOUGHT | {"thinking": "", "signature": "plain.v1.???"}), user("x"))
    assert caught.value.param == "messages.1.content.0.signature"


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (RESULT, ""),
        (RESULT | {"content": "sun", "is_error": False}, "sun"),
        (RESULT | {"content": "no such file", "is_error": True}, "Error: no such file"),
        (RESULT | {"content": [text_block("a"), text_block("b")]}, "a\n\nb"),
        (RESULT | {"content": [{"type": "tool_reference", "tool_name": "g"}]}, "The tool 'g' is available."),
        (
            RESULT | {"content": [{"type": "search_result", "source": "s", "title": "T", "content": [SAID]}]},
            "T (s)\nLook",
        ),
    ],
)
def test_results(block: dict[str, Any], text: str) -> None:
    told = read(assistant(CALLED), user([SAID, block]))[1:]
    # whatever the order: the model ends its message with the call
    assert told == [ToolResult(text, "toolu_1", origin="messages.1.content.1"), UserMessage("Look")]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"type": "text", "media_type": "text/plain", "data": "Words"}, "T\nAbout\nWords"),
        ({"type": "content", "content": "Words"}, "T\nAbout\nWords"),
        ({"type": "content", "content": [text_block("a"), text_block("b")]}, "T\nAbout\na\n\nb"),
    ],
)
def test_documents_are_text(source: dict[str, Any], text: str) -> None:
    document = {"type": "document", "source": source, "title": "T", "context": "About", "citations": {"enabled": False}}
    assert read(user([document])) == [UserMessage(text)]


def test_a_last_message_of_the_assistant_begins_the_answer() -> None:
    conversation, prefill = read_conversation(request(user("Hi"), assistant(THOUGHT, SAID)))
    assert conversation.messages == (UserMessage("Hi"),) and prefill == Prefill("Look", ["Hm."])
    assert read(user("Hi"), assistant(CALLED))[1].name == "f"  # type: ignore[union-attr]


def offered(**more: Any) -> OfferedTools:
    return read_tools(request(user("Hi"), **more))


@pytest.mark.parametrize(
    ("choice", "policy"),
    [
        (None, ("auto", None, None)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", None, 1)),
        ({"type": "any"}, ("required", None, None)),
        ({"type": "tool", "name": "f"}, ("required", ["f"], None)),
        ({"type": "none"}, ("none", None, None)),
    ],
)
def test_the_choice_of_a_tool(choice: Any, policy: tuple[Any, ...]) -> None:
    read = offered(tools=[TOOL], tool_choice=choice).policy
    assert read.tools == [FunctionTool("f", "Does f.", {"type": "object"})]
    assert (read.mode, read.allowed, read.max_calls) == policy


def test_tools_that_servers_run_are_left_out() -> None:
    kinds = ["web_search_20260209", "web_fetch_20250910", "code_execution_20260120", "bash_20250124"]
    kinds += ["text_editor_20250728", "computer_20251124", "memory_20250818", "tool_search_tool_regex_20251119"]
    given = offered(tools=[*({"type": kind, "name": "x", "max_uses": 3} for kind in kinds), TOOL])
    assert [tool.name for tool in given.policy.tools] == ["f"] and given.fields == [f"tools.{len(kinds)}"]


def change(kind: str, **tool: Any) -> dict[str, Any]:
    return {"type": kind, "tool": tool}


def test_tools_that_change_in_mid_conversation() -> None:
    added = change("tool_addition", type="tool_definition", definition=TOOL | {"name": "g"})
    removed = change("tool_removal", type="tool_reference", name="f")
    both = request(user("Hi"), system([added, removed]), user("Go"), tools=[TOOL])
    given = read_tools(both)
    assert [tool.name for tool in given.policy.tools] == ["f", "g"] and given.policy.allowed == ["g"]
    assert given.fields == ["tools.0", "messages.1.content.0.tool.definition"]
    assert read_conversation(both)[0].messages == (UserMessage("Hi"), UserMessage("Go"))
    again = change("tool_addition", type="tool_reference", name="f")
    assert read_tools(request(user("Hi"), system([removed, again]), user("Go"), tools=[TOOL])).policy.allowed is None
    with pytest.raises(InvalidRequest) as caught:
        read_tools(request(user("Hi"), system([removed]), tools=[TOOL], tool_choice={"type": "tool", "name": "f"}))
    assert caught.value.param == "tool_choice.name"
    with pytest.raises(InvalidRequest, match="every tool was removed") as caught:
        read_tools(request(user("Hi"), system([removed]), tools=[TOOL], tool_choice={"type": "any"}))
    assert caught.value.param == "tool_choice"


def wrong(**body: Any) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        MessagesRequest.model_validate({"model": "m", "max_tokens": 9, "messages": [user("Hi")]} | body)
    return invalid(caught.value)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [user([{"type": "image", "source": {}}])]}, "messages.0.content.0"),
        ({"messages": [user([RESULT | {"content": [{"type": "image"}]}])]}, "messages.0.content.0.content.0"),
        ({"messages": [user([{"type": "text"}])]}, "messages.0.content.0.text"),
        ({"messages": [user([{"type": "thinking", "thinking": "x"}])]}, "messages.0.content.0.type"),
        ({"messages": [assistant(RESULT)]}, "messages.0.content.0.type"),
        ({"messages": [user([5])]}, "messages.0.content.0"),
        ({"messages": [user(None)]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role"),
        ({"messages": [5]}, "messages.0"),
        ({"messages": []}, "messages"),
        (
            {"messages": [user([{"type": "document", "source": {"type": "base64", "data": "x"}}])]},
            "messages.0.content.0.source",
        ),
        ({"system": [text_block("a"), {"type": "text", "text": 3}]}, "system.1.text"),
        ({"tools": [TOOL, {"name": "x"}]}, "tools.1.input_schema"),
        ({"tools": [TOOL | {"type": "frobnicate_20260101"}]}, "tools.0.type"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools.0.name"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1023}}, "thinking.budget_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences.1"),
        ({"stop_sequences": ["a"], "stop": ["b"]}, "stop"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"n": 2}, "n"),
    ],
)
def test_errors_name_the_field(body: dict[str, Any], param: str) -> None:
    error = wrong(**body)
    assert error.param == param and "<" not in error.message and "foreign" not in error.message


def test_what_is_accepted_is_not_reported_as_unknown() -> None:
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    foreign = {"type": "web_search_tool_result", "content": [{"odd": 1}], "odd": 2}
    body = {
        "model": "m",
        "system": [text_block("Hi") | cached],
        "messages": [
            user([text_block("Hi") | cached]),
            assistant(THOUGHT | cached, CALLED | cached | {"input": {"odd": 1}}, foreign),
            user([RESULT | cached]),
        ],
        "tools": [TOOL | cached | {"input_examples": [{"x": 1}], "defer_loading": True}],
    }
    assert not list(find_unknown(body, CountTokensRequest.model_validate(body)))
    odd = body | {"messages": [user([text_block("Hi", odd=1)])], "odd": 1}
    assert list(find_unknown(odd, CountTokensRequest.model_validate(odd))) == ["odd", "messages[0].content[0].odd"]


def test_messages_are_counted_before_they_are_read() -> None:
    sent = [user("Hi"), user([SAID, SAID, RESULT]), assistant(SAID, CALLED), system("x"), 5, user([7])]
    assert num_rendered(sent) == 4


def test_the_second_turn_of_a_coding_agent_reads_nothing_of_the_first_again() -> None:
    builder = PromptBuilder(public_vocabulary())
    first = first_turn("m")
    called = {"type": "tool_use", "id": "toolu_1", "name": first["tools"][1]["name"], "input": {}}
    prompts = []
    for body in first, next_turn(first, [THOUGHT, called], "hi"):
        read = MessagesRequest.model_validate(body)
        prompts.append(builder.build(read_conversation(read)[0], tools=read_tools(read).policy.tools))
    one, two = prompts
    assert two.num_reused_messages == one.num_messages == 4 and two.num_messages == 7
    assert two.token_ids[: len(one.token_ids)] == one.token_ids and len(one.token_ids) > 9000
