"""Functions inside namespaces: joined names for the model, the client's own names in what comes back."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gptoss.api.http.errors import InvalidRequest
from gptoss.api.responses.adapter import read_request
from gptoss.api.responses.input.items import placed_items
from gptoss.api.responses.output import OutputItems
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.responses.tools.table import joined_name, read_choice, read_tools
from gptoss.generation.chat_output import ChatDelta
from gptoss.harmony.conversation import ToolCall
from gptoss.harmony.deltas import Delta


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "name": name} | more


def namespace(name: str, *tools: Any, **more: Any) -> dict[str, Any]:
    return {"type": "namespace", "name": name, "tools": list(tools)} | more


def names(*tools: Any) -> list[str]:
    return [tool.name for tool in read_tools(tools).functions()]


def test_functions_of_namespaces_are_offered_after_the_others() -> None:
    tools = [
        namespace("a", function("f", strict=True, parameters={"type": "object"}), description="All of a."),
        function("g"),
        namespace(
            "b", function("f"), {"type": "custom", "name": "c"}, {"type": "tool_search"}, function("g", description="d")
        ),
    ]
    table = read_tools(tools)
    assert names(*tools) == ["g", "a__f", "b__f", "b__c", "b__g"]
    assert [table.where(i) for i in range(5)] == [
        "tools[1]",
        "tools[0].tools[0]",
        "tools[2].tools[0]",
        "tools[2].tools[1]",
        "tools[2].tools[3]",
    ]
    of_a = table.functions()[1]
    assert (of_a.description, of_a.strict, of_a.label) == ("All of a.", True, "'f' of namespace 'a'")
    assert [tool["type"] for tool in table.shown] == ["namespace", "function", "namespace"]
    assert [tool["name"] for tool in table.shown[2]["tools"]] == ["f", "c", "g"]


@pytest.mark.parametrize(
    ("tools", "namespace_of_f"),
    [
        ([namespace("a", function("f"))], "a"),
        ([namespace("mcp__weather__", function("f"))], "mcp__weather__"),
        ([namespace("a" * 62, function("f"))], "a" * 62),
        ([namespace("a/b.c é", function("f"))], "a/b.c é"),
        ([function("a__f"), namespace("a", function("f"))], "a"),
        ([namespace("b", function("a__f")), namespace("b__a", function("f"))], "b__a"),
        ([namespace("x" * 200 + y, function("f")) for y in "01"], "x" * 200 + "1"),
    ],
)
def test_a_call_comes_back_under_the_names_that_the_client_uses(tools: list[Any], namespace_of_f: str) -> None:
    table = read_tools(tools)
    offered = names(*tools)
    assert len(set(offered)) == len(offered)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in offered)
    model_name = table.model_name(namespace_of_f, "f")
    assert model_name == offered[-1]
    assert table.client_name(model_name) == {"name": "f", "namespace": namespace_of_f}
    items = OutputItems(table.client_name, encodes_reasoning=False)
    events = items.feed(ChatDelta(Delta("tool_call", "", 0, model_name)))
    events += items.feed(ChatDelta(Delta("tool_call", "{}", 0))) + items.close("completed")
    assert events[0]["item"]["namespace"] == namespace_of_f
    assert events[2]["name"] == "f"  # function_call_arguments.done
    assert events[-1]["item"] == items.items[0] | {"name": "f", "namespace": namespace_of_f}


def test_functions_outside_namespaces_keep_their_names() -> None:
    table = read_tools([function("f"), namespace("a", function("f"))])
    assert (table.model_name(None, "f"), table.client_name("f")) == ("f", {"name": "f"})
    assert table.client_name("unknown") == {"name": "unknown"}


def test_history_keeps_the_namespace_of_tools_that_are_gone() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "f", "namespace": "a", "arguments": "{}"}
    for tools in [], [namespace("a", function("f"))], [namespace("b", function("f"))]:
        request = ResponsesRequest.model_validate({"model": "m", "input": [call], "tools": tools})
        (message,) = read_request(request, placed_items(request.input)).conversation().messages
        assert isinstance(message, ToolCall)
        assert message.name == joined_name("a", "f") == "a__f"


def test_two_functions_of_one_name_in_a_namespace_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="named 'f' in namespace 'a'") as caught:
        read_tools([namespace("a", function("f")), namespace("a", function("g"), function("f"))])
    assert caught.value.param == "tools[1].tools[1].name"


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        (namespace("a", 5), "tools[0].tools[0]"),
        (namespace("a", {"type": "function"}), "tools[0].tools[0].name"),
        (namespace("a", function("x y")), "tools[0].tools[0].name"),
        (namespace("a", function("f", parameters=[])), "tools[0].tools[0].parameters"),
        ({"type": "namespace", "tools": []}, "tools[0].name"),
        ({"type": "namespace", "name": "a"}, "tools[0].tools"),
        (namespace(""), "tools[0].name"),
    ],
)
def test_a_broken_namespace_is_refused_by_its_field(tool: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_tools([tool])
    assert caught.value.param == param


def chosen(choice: Any, *tools: Any) -> Any:
    return read_choice(choice, read_tools(tools))


def test_tool_choice_names_functions_of_namespaces() -> None:
    tools = [namespace("a", function("f"), function("g")), namespace("b", function("f"))]
    f, g = ({"type": "function", "function": {"name": name}} for name in ("a__f", "a__g"))
    assert chosen({"type": "function", "name": "f", "namespace": "a"}, *tools) == f
    assert chosen({"type": "function", "name": "a__f"}, *tools) == f
    assert chosen({"type": "function", "name": "g"}, *tools) == g  # there is one alone
    with pytest.raises(InvalidRequest, match="'f'.* namespaces 'a', 'b' .*'namespace'") as caught:
        chosen({"type": "function", "name": "f"}, *tools)
    assert caught.value.param == "tool_choice"
    for unknown in ({"name": "h"}, {"name": "g", "namespace": "b"}, {"name": "f", "namespace": "c"}):
        with pytest.raises(InvalidRequest, match="not in 'tools'") as caught:
            chosen({"type": "function"} | unknown, *tools)
        assert "__" not in caught.value.message
    everything = {"type": "allowed_tools", "mode": "required", "tools": [f, g]}
    assert chosen({"type": "namespace", "name": "a"}, *tools) == everything
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "namespace", "name": "a"}]}
    assert chosen(allowed, *tools) == everything | {"mode": "auto"}
    with pytest.raises(InvalidRequest):
        chosen({"type": "namespace", "name": "c"}, *tools)


@pytest.mark.parametrize("nested", [True, False])
def test_allowed_tools_that_are_not_offered_are_left_out(nested: bool) -> None:
    def allow(mode: str | None, *tools: Any) -> Any:
        inner = {"tools": list(tools)} | ({"mode": mode} if mode else {})
        whole = {"allowed_tools": inner} if nested else inner
        return chosen({"type": "allowed_tools"} | whole, function("f"), {"type": "web_search"})

    search, custom = {"type": "web_search"}, {"type": "mcp", "server_label": "c"}
    named = {"type": "function", "function": {"name": "f"}}
    for mode in ("auto", "required"):
        allowed = {"type": "allowed_tools", "mode": mode, "tools": [named]}
        assert allow(mode, search, function("f"), custom) == allowed
    assert allow("auto", search) == allow(None, search, custom) == "none"
    with pytest.raises(InvalidRequest) as caught:
        allow("required", search)
    assert caught.value.param == "tool_choice"
