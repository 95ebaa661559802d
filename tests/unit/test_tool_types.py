"""Tool schemas as text: equal to openai-harmony's where it is lossless, and lossless where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai_harmony as oh
import pytest

from src.harmony.render import developer_message, render_message
from src.harmony.tool_types import render_tools
from src.harmony.vocabulary import load_vocabulary

PLAIN: dict[str, dict[str, Any] | None] = {
    "none": None,
    "empty": {"type": "object", "properties": {}},
    "weather": {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city"},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "days": {"type": "integer", "default": 3},
        },
        "required": ["location"],
    },
    "nested": {
        "type": "object",
        "description": "outer",
        "properties": {
            "list": {
                "type": "array",
                "items": {"type": "object", "properties": {"x": {"type": "number"}}},
            },
            "inner": {
                "type": "object",
                "description": "inner",
                "properties": {"k": {"type": "string", "title": "T", "examples": ["1", "2"]}},
                "required": ["k"],
            },
            "any": {"type": "array"},
            "both": {"type": ["string", "null"]},
            "flag": {"type": "boolean", "nullable": True, "default": True},
        },
    },
    "oneof": {
        "type": "object",
        "properties": {
            "d": {
                "oneOf": [{"type": "string", "default": "z"}, {"type": "number", "nullable": True}],
                "description": "dd",
                "default": "q",
            }
        },
    },
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("description", ["Does it.", "", "two\nlines\n"])
def test_plain_schemas_equal_openai_harmony(name: str, description: str) -> None:
    vocabulary = load_vocabulary()
    tool = {"name": "f", "description": description, "parameters": PLAIN[name]}
    theirs = (
        oh.DeveloperContent.new()
        .with_instructions("Be kind.")
        .with_function_tools([oh.ToolDescription.new("f", description, PLAIN[name])])
    )
    wanted = vocabulary.encoding.render(oh.Message.from_role_and_content(oh.Role.DEVELOPER, theirs))
    message = developer_message("Be kind.", [tool])
    assert message is not None
    assert vocabulary.decode(render_message(message, vocabulary)) == vocabulary.decode(wanted)
    assert render_message(message, vocabulary) == wanted


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "p?:\n | string\n | null\n,"),
        ({"$ref": "#/$defs/Color"}, 'p?: "red" | "blue",'),
        ({"const": 7}, "p?: 7,"),
        ({"enum": [1, "two", None]}, 'p?: 1 | "two" | null,'),
        ({"type": "integer", "minimum": 1, "maximum": 5}, "p?: number, // minimum: 1, maximum: 5"),
        (
            {"type": "string", "pattern": "^a+$", "default": "a"},
            'p?: string, // default: "a", pattern: "^a+$"',
        ),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "[key: string]: number,"),
        (
            {"allOf": [{"$ref": "#/$defs/Color"}, {"type": "string"}]},
            'p?: "red" | "blue" & string,',
        ),
        (
            {"type": "array", "items": {"type": "string"}, "minItems": 2},
            "p?: string[], // minItems: 2",
        ),
        ({"$ref": "#/$defs/Missing"}, "p?: any /* #/$defs/Missing */,"),
    ],
)
def test_nothing_is_lost(schema: dict[str, Any], expected: str) -> None:
    parameters = {
        "type": "object",
        "properties": {"p": schema},
        "$defs": {"Color": {"type": "string", "enum": ["red", "blue"]}},
    }
    assert expected in render_tools([{"name": "f", "parameters": parameters}])


def test_recursive_references_end() -> None:
    tree = {
        "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}},
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/Node"}},
    }
    assert "next?: Node /* recursive, as above */," in render_tools(
        [{"name": "f", "parameters": tree}]
    )


def _referring(names: list[str], to: Callable[[int], range]) -> dict[str, Any]:
    defs = {
        name: {"type": "object", "properties": {f"p{j}": {"$ref": f"#/$defs/{names[j]}"} for j in to(i)}, "required": [f"own_{name}"]}
        for i, name in enumerate(names)
    }  # fmt: skip
    for name, definition in defs.items():
        definition["properties"][f"own_{name}"] = {"type": "string"}
    return {"$defs": defs, "type": "object", "properties": {"x": {"$ref": f"#/$defs/{names[0]}"}}}


@pytest.mark.parametrize("count", [8, 30])
@pytest.mark.parametrize("kind", ["mutual", "chain"])
def test_types_that_refer_to_one_another_do_not_explode(count: int, kind: str) -> None:
    names = [f"T{i}" for i in range(count)]
    parameters = _referring(
        names, lambda i: range(count) if kind == "mutual" else range(i + 1, min(i + 3, count))
    )
    text = render_tools([{"name": "f", "parameters": parameters}])
    assert len(text) < 100_000
    assert all(f"own_{name}: string" in text for name in names), "each is written once at least"
    assert (kind, count) == ("chain", 8) or " as above */" in text


def test_references_are_written_out_where_that_is_short() -> None:
    parameters = _referring(["Order", "Item", "Price"], lambda i: range(i + 1, 3))
    text = render_tools([{"name": "f", "parameters": parameters}])
    assert text.count("own_Price: string") == 2 and "as above" not in text


def test_tools_keep_their_order() -> None:
    text = render_tools([{"name": n, "parameters": None} for n in ("zeta", "alpha", "mid")])
    assert text.index("zeta") < text.index("alpha") < text.index("mid")
