"""Tool schemas as text: equal to openai-harmony's where it is lossless, and lossless where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai_harmony as oh
import pytest

from gptoss.harmony.conversation import ToolDefinition
from gptoss.harmony.render import developer_message, render_message
from gptoss.harmony.tool_schema import render_tools
from tests.support.vocabulary import public_vocabulary

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
            "list": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}},
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
    "defaults": {
        "type": "object",
        "properties": {
            "list": {"type": "array", "items": {"type": "string"}, "default": ["a", 'é\n"', 1e22, None]},
            "object": {"type": "object", "default": {"z": 1, "a": [2.5, {}], "c": False}},
            "numbers": {
                "default": [
                    1e22,
                    1e-7,
                    1e-5,
                    -1.5e-5,
                    0.0001,
                    1.0,
                    1e15,
                    1e16,
                    -0.0,
                    1.5e300,
                    10**22,
                    12345678901234567890,
                ]
            },
            "large": {"type": "number", "default": 1e22},
            "text": {"type": "string", "default": 'say "no"\tor\nyes'},
            "choice": {"type": "string", "enum": ["a", 'b"c'], "default": "a"},
            "null": {"type": "string", "default": None},
        },
    },
    "enums": {
        "type": "object",
        "properties": {"many": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}},
    },
    "described variants": {
        "type": "object",
        "properties": {
            "u": {
                "description": "either",
                "oneOf": [
                    {"type": "object", "description": "an object", "properties": {"x": {"type": "string"}}},
                    {"type": "array", "description": "a list", "items": {"type": "string"}},
                    {"type": "number", "description": "a number", "default": 3},
                    {"type": "string", "description": "either"},
                ],
            }
        },
    },
    "deep": {
        "type": "object",
        "properties": {
            "a": {
                "type": "array",
                "items": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "description": "I",
                        "properties": {"x": {"oneOf": [{"type": "string"}]}},
                    },
                },
            }
        },
    },
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("description", ["Does it.", "", "two\nlines\n"])
def test_plain_schemas_equal_openai_harmony(name: str, description: str) -> None:
    vocabulary = public_vocabulary()
    tool = ToolDefinition("f", description, PLAIN[name])
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
        ({"type": "string", "pattern": "^a+$", "default": "a"}, 'p?: string, // default: "a", pattern: "^a+$"'),
        ({"type": "object", "additionalProperties": {"type": "integer"}}, "[key: string]: number,"),
        ({"allOf": [{"$ref": "#/$defs/Color"}, {"type": "string"}]}, 'p?: ("red" | "blue") & string,'),
        ({"type": "array", "items": {"type": "string"}, "minItems": 2}, "p?: string[], // minItems: 2"),
        ({"type": "array", "items": [{"type": "string"}, {"type": "number"}]}, "p?: [string, number],"),
        (
            {"items": [{"type": "string"}], "additionalItems": {"type": ["number", "null"]}},
            "p?: [string, ...(number | null)[]],",
        ),
        ({"items": [{"type": "string"}], "additionalItems": False}, "p?: [string],"),
        ({"prefixItems": [{"type": "string"}], "items": {"type": "number"}}, "p?: [string, ...number[]],"),
        ({"items": [{"items": [{"type": "null"}]}, True]}, "p?: [[null], any],"),
        ({"type": "array", "items": []}, "p?: Array<any>,"),
        ({"type": "array", "items": [], "additionalItems": {"type": "string"}}, "p?: string[],"),
        ({"type": "array", "items": True}, "p?: any[],"),
        (
            {"anyOf": [{"items": [{"type": "string"}], "minItems": 1}, {"type": "null"}], "type": ["array", "null"]},
            "p?:\n | [string] // minItems: 1\n | null\n,",
        ),
        ({"$ref": "#shade"}, 'p?: "dark" | "light",'),
        ({"$dynamicRef": "#shade"}, 'p?: "dark" | "light",'),
        ({"$ref": "https://example.com/shade.json"}, 'p?: "dark" | "light",'),
        ({"type": "array", "items": {"$ref": "#shade"}}, 'p?: ("dark" | "light")[],'),
        ({"allOf": [{"$ref": "#shade"}], "description": "d"}, '// d\np?: "dark" | "light",'),
        ({"$dynamicRef": "#missing"}, "p?: any /* #missing */,"),
        ({"type": "object", "properties": {"q": {"$recursiveRef": "#"}}}, "q?: # /* recursive, as above */"),
        ({"$ref": "#/$defs/Missing"}, "p?: any /* #/$defs/Missing */,"),
        ({"$ref": "#/$defs/Page%3CItem%3E"}, 'p?: "first" | "last",'),
        ({"$ref": "#/$defs/List[int]"}, "p?: number[],"),
        ({"$ref": "#/$defs/100%25"}, "p?: boolean,"),
        ({"$ref": "#/$defs/a~1b"}, "p?: null,"),
        ({"$ref": "#/$defs/a%2Fb"}, "p?: null,"),
        ({"$ref": "#/$defs/Either/anyOf/1"}, "p?: number,"),
        ({"$ref": "#/$defs/Small"}, "p?: number, // maximum: 9"),
        ({"$ref": "#/$defs/Either"}, "p?:\n     | string // a name\n     | number\n,"),
        ({"type": "integer", "examples": [1, 2]}, "// Examples:\n// - 1\n// - 2\np?: number,"),
        ({"examples": ["a", {"k": [1e22, None]}]}, '// Examples:\n// - "a"\n// - {"k":[1e22,null]}\np?: any,'),
        ({"type": "array", "items": {"type": ["string", "number"]}}, "p?: (string | number)[],"),
        (
            {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "number", "description": "I"}]}},
            "p?: (string | number)[], // number: I",
        ),
        (
            {
                "type": "array",
                "minItems": 1,
                "items": {"oneOf": [{"type": "string", "default": "x"}, {"enum": [1, 2]}]},
            },
            'p?: (string | 1 | 2)[], // minItems: 1, string: default: "x"',
        ),
        ({"type": "array", "items": {"$ref": "#/$defs/Either"}}, "p?: (string | number)[], // string: a name"),
        (
            {
                "type": "object",
                "additionalProperties": {"anyOf": [{"type": "string", "description": "s"}, {"type": "null"}]},
            },
            "[key: string]: string | null, // string: s",
        ),
        (
            {"oneOf": [{"type": "object", "description": "O", "properties": {"x": {}}}, {"type": "string"}]},
            "p?:\n |    // O\n{\n   x?: any,\n   }\n | string\n,",
        ),
        ({"type": "array", "items": {"type": "string", "nullable": True}}, "p?: (string | null)[],"),
        ({"oneOf": [{"type": "string"}], "nullable": True}, "p?:\n | string\n | null\n,"),
        ({"type": "string", "enum": ["null"], "nullable": True}, 'p?: "null" | null,'),
        ({"$ref": "#/$defs/Color", "nullable": True}, 'p?: "red" | "blue" | null,'),
        ({"type": ["string", "null"], "nullable": True}, "p?: string | null,"),
    ],
)
def test_nothing_is_lost(schema: dict[str, Any], expected: str) -> None:
    parameters = {
        "type": "object",
        "properties": {"p": schema},
        "$defs": {
            "Color": {"type": "string", "enum": ["red", "blue"]},
            "Page<Item>": {"enum": ["first", "last"]},
            "List[int]": {"type": "array", "items": {"type": "integer"}},
            "100%": {"type": "boolean"},
            "a/b": {"type": "null"},
            "Small": {"type": "integer", "maximum": 9},
            "Shade": {"$id": "https://example.com/shade.json", "$anchor": "shade", "enum": ["dark", "light"]},
            "Either": {"anyOf": [{"type": "string", "description": "a name"}, {"type": "number"}]},
        },
    }
    assert expected in render_tools([ToolDefinition("f", parameters=parameters)])


STRING = {"type": "string"}
BOTH = {"type": "object", "properties": {"id": STRING, "title": STRING}}
ONE_OF_BOTH = [{"required": ["id"]}, {"required": ["title"]}]
BOTH_TEXT = "{ id?: string, title?: string, } & ({ id: any, } | { title: any, })"


@pytest.mark.parametrize("combinator", ["anyOf", "oneOf"])
@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda s: s, f"(_: {BOTH_TEXT}) => any;"),
        (lambda s: {"type": "object", "properties": {"p": s}}, f"p?: {BOTH_TEXT},"),
        (lambda s: {"properties": {"p": {"type": "array", "items": s}}}, f"p?: ({BOTH_TEXT})[],"),
        (lambda s: {"properties": {"p": {"anyOf": [s, {"type": "null"}]}}}, f"p?: | {BOTH_TEXT} | null ,"),
        (lambda s: {"properties": {"p": {"$ref": "#/$defs/S"}}, "$defs": {"S": s}}, f"p?: {BOTH_TEXT},"),
        (lambda s: {"additionalProperties": s, "type": "object"}, f"[key: string]: {BOTH_TEXT},"),
        (lambda s: {"properties": {"p": {"prefixItems": [s]}}}, f"p?: [{BOTH_TEXT}],"),
        (
            lambda s: {"properties": {"p": {"allOf": [s, {"properties": {"x": {}}}]}}},
            f"p?: ({BOTH_TEXT}) & {{ x?: any, }},",
        ),
    ],
)
def test_what_stands_beside_a_combinator_is_written(combinator: str, wrap: Callable[[Any], Any], expected: str) -> None:
    text = render_tools([ToolDefinition("f", parameters=wrap(BOTH | {combinator: ONE_OF_BOTH}))])
    assert expected in " ".join(text.split())


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (
            {"type": "string", "enum": ["x", "y"], "anyOf": [{"minLength": 1}, {"pattern": "^a"}]},
            'p?: ("x" | "y") & (string | string), // string: minLength: 1, string: pattern: "^a"',
        ),
        ({"type": "object", "properties": {"a": {}}, "enum": [{"a": 1}]}, 'p?: { a?: any, } & ({"a":1}),'),
        ({"type": "object", "properties": {"a": {}}, "const": {"a": 1}}, 'p?: { a?: any, } & ({"a":1}),'),
        (
            {
                "oneOf": [{"type": "string"}, {"type": "number"}],
                "anyOf": [{"const": 1}, {"const": "b"}],
                "maxLength": 4,
            },
            'p?: (string | number) & (1 | "b"), // maxLength: 4',
        ),
        ({"type": "string", "oneOf": [{"const": "a", "description": "A"}, {"const": "b"}]}, 'p?: | "a" // A | "b" ,'),
        (
            {"type": "integer", "anyOf": [{"minimum": 9}, {"maximum": 1}]},
            "p?: | number // minimum: 9 | number // maximum: 1 ,",
        ),
        (
            {
                "type": "object",
                "required": ["kind"],
                "oneOf": [{"properties": {"kind": {"const": "a"}}}, {"$ref": "#/$defs/B"}],
            },
            'p?: | { kind: "a", } | { kind: "b", } ,',
        ),
        (
            {"type": "object", "required": ["x"], "anyOf": [{"properties": {"x": {}}}, {"properties": {"y": {}}}]},
            "p?: { x: any, } & ({ x: any, } | { y?: any, }),",
        ),
        ({"$ref": "#/$defs/B", "properties": {"more": {}}}, 'p?: { kind?: "b", } & { more?: any, },'),
        ({"$ref": "#/$defs/B", "required": ["kind"]}, 'p?: { kind: "b", },'),
        ({"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}, "p?: { a: any, b: any, },"),
        ({"properties": {"a": {}}, "if": {"required": ["a"]}, "then": {"required": ["b"]}}, 'then: {"required":["b"]}'),
        ({"anyOf": [{"type": "string"}, {"type": "null"}], "maxLength": 3}, "p?: | string | null , // maxLength: 3"),
    ],
)
def test_neighbours_of_combinators_are_written(schema: dict[str, Any], expected: str) -> None:
    b = {"type": "object", "properties": {"kind": {"const": "b"}}}
    parameters = {"type": "object", "properties": {"p": schema}, "$defs": {"B": b}}
    text = render_tools([ToolDefinition("f", parameters=parameters)])
    assert expected in " ".join(text.split())


def test_the_whole_functions_comments_follow_its_type() -> None:
    union = {"description": "D", "anyOf": [{"type": "object", "description": "O"}, STRING]}
    parameters = union | {"minProperties": 2}
    text = render_tools([ToolDefinition("f", parameters=parameters)])
    assert "// O\n" in text and text.count("// O") == 1
    assert " | string) => any; // D, minProperties: 2\n" in text
    text = render_tools([ToolDefinition("f", parameters={"anyOf": [STRING | {"description": "last"}]})])
    assert " | string // last\n) => any;" in text


def test_recursive_references_end() -> None:
    tree = {
        "$defs": {"Node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}},
        "type": "object",
        "properties": {"root": {"$ref": "#/$defs/Node"}},
    }
    assert "next?: Node /* recursive, as above */," in render_tools([ToolDefinition("f", parameters=tree)])


def _referring(names: list[str], to: Callable[[int], range]) -> dict[str, Any]:
    defs = {
        name: {
            "type": "object",
            "properties": {f"p{j}": {"$ref": f"#/$defs/{names[j]}"} for j in to(i)},
            "required": [f"own_{name}"],
        }
        for i, name in enumerate(names)
    }
    for name, definition in defs.items():
        definition["properties"][f"own_{name}"] = {"type": "string"}
    return {"$defs": defs, "type": "object", "properties": {"x": {"$ref": f"#/$defs/{names[0]}"}}}


@pytest.mark.parametrize("count", [8, 30])
@pytest.mark.parametrize("kind", ["mutual", "chain"])
def test_types_that_refer_to_one_another_do_not_explode(count: int, kind: str) -> None:
    names = [f"T{i}" for i in range(count)]
    parameters = _referring(names, lambda i: range(count) if kind == "mutual" else range(i + 1, min(i + 3, count)))
    text = render_tools([ToolDefinition("f", parameters=parameters)])
    assert len(text) < 100_000
    assert all(f"own_{name}: string" in text for name in names), "each is written once at least"
    assert (kind, count) == ("chain", 8) or " as above */" in text


def test_references_are_written_out_where_that_is_short() -> None:
    parameters = _referring(["Order", "Item", "Price"], lambda i: range(i + 1, 3))
    text = render_tools([ToolDefinition("f", parameters=parameters)])
    assert text.count("own_Price: string") == 2 and "as above" not in text


def test_tools_keep_their_order() -> None:
    text = render_tools([ToolDefinition(n) for n in ("zeta", "alpha", "mid")])
    assert text.index("zeta") < text.index("alpha") < text.index("mid")
