"""What MCP servers return and how they fail, as results; tools that they describe badly."""

from __future__ import annotations

import base64
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss.config.tool_keys import McpServerEntry, mcp_entries
from gptoss.generation.tool_run import bounded
from gptoss.generation.tool_types import ImagePart, McpTool, TextPart, ToolResult
from gptoss.tools.mcp.connection import MAX_DESCRIPTION, Connection
from gptoss.tools.mcp.results import read_result
from gptoss.tools.mcp.servers import target_of


def returned(*content: Any, is_error: bool = False, structured: Any = None) -> Any:
    return SimpleNamespace(content=list(content), is_error=is_error, structured_content=structured)


def block(kind: str, **fields: Any) -> Any:
    return SimpleNamespace(type=kind, **fields)


def test_parts_of_every_kind_are_read() -> None:
    png = base64.b64encode(b"png").decode()
    resource = SimpleNamespace(text="inside", uri="file:///a")
    result = read_result(
        returned(
            block("text", text="one"),
            block("image", data=png, mime_type="image/png"),
            block("image", data="?", mime_type="image/png"),
            block("audio", mime_type="audio/wav"),
            block("resource_link", name="a", uri="https://a"),
            block("resource", resource=resource),
            block("odd"),
        )
    )
    assert result.ok and result.content == (
        TextPart("one"),
        ImagePart(b"png", "image/png"),
        TextPart("[an image that cannot be read]"),
        TextPart("[audio, audio/wav]"),
        TextPart("[a](https://a)"),
        TextPart("inside"),
    )


def test_structured_content_stands_for_text() -> None:
    assert read_result(returned(structured={"a": [1]})).content == (TextPart('{"a": [1]}'),)


def test_an_error_has_a_short_message_and_its_whole_text() -> None:
    result = read_result(returned(block("text", text="x" * 2000), is_error=True))
    assert result.failure is not None and result.failure.kind == "execution"
    assert (len(result.failure.message), len(result.content[0].text)) == (500, 2000)  # type: ignore[union-attr]


def test_text_that_is_no_unicode_can_be_sent() -> None:
    result = bounded(ToolResult.failed("execution", "a\ud800b"), 100)
    assert result.failure is not None and (result.failure.message, result.content[0]) == ("a?b", TextPart("a?b"))


async def test_tools_of_one_name_are_one_and_long_descriptions_are_cut() -> None:
    def tool(name: str, description: str = "") -> Any:
        return SimpleNamespace(name=name, description=description, input_schema={"type": "object"}, annotations=None)

    pages = iter([[tool("a"), tool("a", "second")], [tool("b", "x" * 20_000)]])

    class Client:
        async def list_tools(self, cursor: str | None, cache_mode: str) -> Any:
            page = next(pages)
            return SimpleNamespace(tools=page, next_cursor="more" if page[0].name == "a" else None)

    connection = Connection(target_of(McpServerEntry(url="http://a/")))
    connection._client = Client()  # type: ignore[assignment]
    tools = await connection.list_tools()
    assert [one.name for one in tools] == ["a", "b"]
    assert tools[1] == McpTool("b", "x" * MAX_DESCRIPTION, {"type": "object"})


def test_variables_of_the_environment_are_filled_in() -> None:
    entry = McpServerEntry(url="http://a/", headers={"Authorization": "Bearer ${TOKEN}"})
    assert target_of(entry, {"TOKEN": "t"}).headers == {"Authorization": "Bearer t"}
    with pytest.raises(ValueError, match="TOKEN is not set"):
        target_of(entry, {})


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({}, "exactly one of url and command"),
        ({"url": "http://a", "command": ["b"]}, "exactly one of url and command"),
        ({"url": "ftp://a"}, "http"),
        ({"command": []}, "docs.command"),
        ({"command": ["a"], "headers": {"a": "secret"}}, "headers need a url"),
        ({"url": "http://a", "odd": "secret"}, "docs.odd"),
    ],
)
def test_an_entry_that_is_not_valid_is_named(entry: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        mcp_entries({"docs": entry})
    assert "secret" not in str(error.value)


def test_a_label_is_short_and_plain() -> None:
    with pytest.raises(ValueError, match="not a label"):
        mcp_entries({"a b": {"url": "http://a"}})


@pytest.mark.parametrize("schema", [{"type": "nope"}, {"type": "object", "properties": 3}])
def test_a_schema_that_is_none_is_that_of_any_object(schema: Any) -> None:
    from gptoss.api.hosted.service import _usable

    assert _usable(schema) == {"type": "object"}
    assert _usable({"type": "object", "properties": {"a": {"type": "string"}}})["properties"]
