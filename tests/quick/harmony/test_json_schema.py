"""What of a JSON schema is enforced: tables of each kind, then generated schemas through prompt, grammar and a
validator."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptoss.harmony.conversation import ToolDefinition
from gptoss.harmony.grammar import ToolSpec, TurnSpec, grammar_error, turn_grammar
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.enforce import Enforced, enforceable
from gptoss.harmony.tool_schema import render_tools
from tests.support.schemas import MCP_TOOLS, allows, errors_of, random_value, tool_schemas
from tests.support.tiers import sized
from tests.support.vocabulary import public_vocabulary

EXAMPLES = sized(40, nightly=500)  # how many schemas are generated
VOCABULARY = public_vocabulary()
S, N = {"type": "string"}, {"type": "integer"}


def o(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def of_tool(schema: Any, *, strict: bool = False) -> Enforced:
    return enforceable(schema, strict, arguments=True, where="parameters")


FREE = {"type": "object", "properties": {}}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        # an object that names no property takes any keys, below the root
        (o(p=FREE), '{"p":{"x":1}}', '{"q":1}'),
        (o(p=FREE | {"minProperties": 1}), '{"p":{"x":1}}', '{"p":{}}'),
        (o(p=FREE | {"required": []}), '{"p":{"x":{"y":[1]}}}', '{"p":1}'),
        (o(p={"type": ["object", "null"], "properties": {}}), '{"p":{"x":1}}', '{"p":1}'),
        (o(p={"type": "array", "items": FREE}), '{"p":[{"x":1}]}', '{"p":[1]}'),
        (o(p={"type": "array", "prefixItems": [FREE]}), '{"p":[{"x":1}]}', '{"p":[1]}'),
        (o(p={"anyOf": [FREE, {"type": "null"}]}), '{"p":{"x":1}}', '{"p":1}'),
        (o(p=FREE | {"nullable": True}), '{"p":{"x":1}}', '{"p":1}'),
        (o(p={"$ref": "#/$defs/F"}) | {"$defs": {"F": FREE}}, '{"p":{"x":1}}', '{"p":1}'),
        (FREE, "{}", '{"x":1}'),
        ({"type": "object"}, '{"x":1}', "1"),
        # arguments are an object
        ({"properties": {"a": S}}, '{"a":"x"}', '"x"'),
        ({}, "{}", "1"),
        ({"anyOf": [o("a", a=S), {"type": "null"}]}, '{"a":"x"}', "null"),
        ({"type": ["object", "null"], "properties": {"a": S}}, "{}", "null"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": S}}}}, "{}", "3"),
        ({"nullable": True, **o(a=S)}, "{}", "null"),
        # one rule of closing
        (o(a=S), '{"a":"x"}', '{"a":"x","b":1}'),
        (o(p={"$ref": "#/$defs/P"}) | {"$defs": {"P": o(a=S)}}, '{"p":{"a":"x"}}', '{"p":{"b":1}}'),
        (o(p={"prefixItems": [o(a=S)], "type": "array"}), '{"p":[{"a":"x"}]}', '{"p":[{"b":1}]}'),
        (o(a=S) | {"anyOf": [o("b", b=N), o("c", c=S)]}, '{"a":"x","b":1}', '{"a":"x","d":1,"b":1}'),
        (o(a=S) | {"allOf": [o(b=N)]}, '{"a":"x","b":1}', '{"c":1}'),
        ({"anyOf": [o("b", b=N), o("c", c=S)]}, '{"c":"x"}', '{"b":1,"c":"x"}'),
        ({"allOf": [o(a=S), {"anyOf": [o("b", b=N), o("c", c=N)]}]}, '{"a":"x","c":1}', '{"b":1,"d":1}'),
        ({"allOf": [o(a=S), o(b=S)]}, '{"a":"x","b":"y"}', '{"a":"x","c":"y"}'),
        (o(a=S) | {"required": ["b"]}, '{"a":"x","b":1}', '{"a":"x"}'),
        (o(a=S) | {"additionalProperties": N}, '{"b":1}', '{"b":"x"}'),
        (o(a=S) | {"patternProperties": {"^x-": N}}, '{"x-b":1}', '{"y":1}'),
        (o(a=S) | {"unevaluatedProperties": False}, '{"a":"x"}', '{"b":1}'),
        (o(a=S) | {"unevaluatedProperties": False, "allOf": [o(b=N)]}, '{"a":"x","b":1}', '{"c":1}'),
        (
            o(a=S) | {"unevaluatedProperties": False, "anyOf": [{"required": ["a"]}, {"minProperties": 1}]},
            '{"a":"x"}',
            '{"c":1}',
        ),
        (o(a=S) | {"unevaluatedProperties": N}, '{"b":1}', '{"b":"x"}'),
        # what says nothing is no reason to give up
        (o(a=S | {"format": "binary"}), '{"a":"x"}', '{"a":1}'),
        (o(a=S | {"format": "e164", "pattern": "^[+]"}), '{"a":"+x"}', '{"a":"x"}'),
        (o(a={"type": "array", "uniqueItems": False, "items": N}), '{"a":[1,1]}', '{"a":["x"]}'),
        (o(a={"type": "object", "propertyNames": S, "additionalProperties": N}), '{"a":{"b":1}}', '{"a":{"b":"x"}}'),
        (
            o(a={"type": ["integer", "null"], "minimum": -(2**63), "maximum": 2**63 - 1}),
            '{"a":null}',
            f'{{"a":{2**63}}}',
        ),
        (o(a={"type": "object", "propertyNames": {}, "additionalProperties": N}), '{"a":{"b":1}}', '{"a":{"b":"x"}}'),
        (o(a={"not": {"description": "nothing"}}, b=S), '{"b":"x"}', '{"a":1}'),
        (o(a={"not": {}}, b=S), '{"b":"x"}', '{"a":1}'),
        ({**o(a=S), "$schema": "https://json-schema.org/draft-07/schema#"}, '{"a":"x"}', '{"a":1}'),
        ({**o(a=S), "$schema": "http://json-schema.org/draft/2020-12/schema"}, '{"a":"x"}', '{"a":1}'),
        (o(a=N | {"minimum": -(2**63), "maximum": 2**63 - 1}), f'{{"a":{2**63 - 1}}}', f'{{"a":{2**63}}}'),
        (o(a=N | {"minimum": -(2**63), "maximum": 0}), '{"a":-9223372036854774784}', f'{{"a":{-(2**63) - 1}}}'),
        (
            o(a={"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308}),
            '{"a":1e20}',
            '{"a":"1"}',
        ),
        (o(a=N | {"exclusiveMaximum": 2**53 + 4}), f'{{"a":{2**53}}}', f'{{"a":{2**53 + 4}}}'),
        (o(a={"type": "number", "minimum": 5e-324}), '{"a":0.1}', '{"a":-1}'),
        (o(a={"type": "number", "minimum": 0, "exclusiveMinimum": True}), '{"a":0.5}', '{"a":0}'),
        (o(a={"type": "array", "items": [S, N], "additionalItems": False}), '{"a":["x",1]}', '{"a":["x",1,2]}'),
        # references
        (o(a={"$ref": "#/$defs/List[int]"}) | {"$defs": {"List[int]": N}}, '{"a":1}', '{"a":"x"}'),
        (o(a={"$ref": "#/$defs/List%5Bint%5D"}) | {"$defs": {"List[int]": N}}, '{"a":1}', '{"a":"x"}'),
        (o(a={"$ref": "#/$defs/Page%3CItem%3E"}) | {"$defs": {"Page<Item>": N}}, '{"a":1}', '{"a":"x"}'),
        (o(a={"$ref": "#/$defs/a~1b"}) | {"$defs": {"a/b": N}}, '{"a":1}', '{"a":"x"}'),
        (o(a={"$ref": "#/$defs/%25"}) | {"$defs": {"%": N}}, '{"a":1}', '{"a":"x"}'),
        (o(a=N, b={"$ref": "#/properties/a"}), '{"b":1}', '{"b":"x"}'),
        (o(a={"$ref": "#int"}) | {"$defs": {"x": N | {"$anchor": "int"}}}, '{"a":1}', '{"a":"x"}'),
        (o(v=N, next={"$ref": "#"}), '{"v":1,"next":{"v":2}}', '{"next":{"w":1}}'),
        # nullable
        (o(a=S | {"nullable": True}), '{"a":null}', '{"a":1}'),
        (o(a={"enum": ["x"], "nullable": True}), '{"a":null}', '{"a":1}'),
        (o(a={"$ref": "#/$defs/N", "nullable": True}) | {"$defs": {"N": N}}, '{"a":null}', '{"a":"x"}'),
        (o(a=N | {"nullable": False}), '{"a":1}', '{"a":null}'),
        (o(a=N | {"nullable": True, "minimum": 3}), '{"a":null}', '{"a":2}'),
        # variants that exclude one another
        (o(a={"oneOf": [S, N]}), '{"a":1}', '{"a":null}'),
        (o(a={"oneOf": [{"const": "x"}, {"const": "y"}], "enum": ["x", "y"]}), '{"a":"y"}', '{"a":"z"}'),
        (o(a={"oneOf": [o(k={"const": "a"}, v=N), o(k={"const": "b"})]}), '{"a":{"k":"a","v":1}}', '{"a":{"v":1}}'),
        (o(a={"oneOf": [o("x", x=N), o("y", y=N)]}), '{"a":{"y":1}}', '{"a":{"x":1,"y":1}}'),
        (o(a=S, b=S) | {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, '{"b":"x"}', '{"a":"x","b":"x"}'),
        (o(a={"oneOf": [N | {"maximum": 3}, N | {"minimum": 4}]}), '{"a":4}', '{"a":"x"}'),
        # names and counts
        (
            o(a={"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": N}),
            '{"a":{"b":1}}',
            '{"a":{"B":1}}',
        ),
        (o(a={"type": "object", "propertyNames": {"enum": ["x", "y"]}}), '{"a":{"y":1}}', '{"a":{"z":1}}'),
        (o(a={"type": "object", "propertyNames": {"minLength": 2}}), '{"a":{"xy":1}}', '{"a":{"x":1}}'),
        (o(a=S, b=S, c=S) | {"minProperties": 2}, '{"a":"x","c":"x"}', '{"c":"x"}'),
        (o(a=S, b=S, c=S) | {"maxProperties": 2}, '{"a":"x","c":"x"}', '{"a":"x","b":"x","c":"x"}'),
        (o(a=S, b=S) | {"dependentRequired": {"a": ["b"]}}, '{"b":"x"}', '{"a":"x"}'),
        (o(a=S) | {"not": {"required": ["z"]}}, '{"a":"x"}', '{"z":1}'),
        (o(a={"not": {"type": "null"}}), '{"a":1}', '{"a":null}'),
        # an escaped spelling of a declared name, and that name once more
        (o(p=o(a=S) | {"additionalProperties": True}), '{"p":{"a":"x","b":1}}', '{"p":{"a":"x","\\u0061":1}}'),
        (o(p=o(a=S) | {"additionalProperties": True}), '{"p":{"a":"x","b":1}}', '{"p":{"a":"x","a":1}}'),
        (o(p=o(a=S) | {"additionalProperties": N}), '{"p":{"a":"x","b":1}}', '{"p":{"\\u0061":1}}'),
        (
            o(p=o(ab=S, a=S, b=N) | {"additionalProperties": {}}),
            '{"p":{"ab":"x","abc":1,"":1,"ba":1}}',
            '{"p":{"a\\u0062":1}}',
        ),
        (o(p=o("né", né=S) | {"additionalProperties": N}), '{"p":{"né":"x","n":1}}', '{"p":{"n":1}}'),
        # what a class of characters means in JSON Schema
        (o(a=S | {"pattern": "^[a&&b]$"}), '{"a":"&"}', '{"a":"&&"}'),
        (o(a=S | {"pattern": "^[[a]$"}), '{"a":"["}', '{"a":"b"}'),
        (o(a=S | {"pattern": "^[+--]$"}), '{"a":","}', '{"a":"."}'),
        (o(a=S | {"pattern": "^[!--]$"}), '{"a":"#"}', '{"a":"."}'),
        (o(a=S | {"pattern": "^[^~~[]$"}), '{"a":"x"}', '{"a":"["}'),
        (o(a=S | {"pattern": r"^[\w-.]$"}), '{"a":"-"}', '{"a":"+"}'),
        (o(a=S | {"pattern": r"^[\b]$"}), '{"a":"\\b"}', '{"a":"b"}'),
        (o(a=S | {"pattern": "^[^]$"}), '{"a":"\\n"}', '{"a":"xy"}'),
        (o(a=S | {"pattern": r"^\uD83D\uDE00$"}), '{"a":"😀"}', '{"a":"x"}'),
        (o(a=S | {"pattern": r"^\cJ\/{a}$"}), '{"a":"\\n/{a}"}', '{"a":"aa"}'),
        (o(a=S | {"pattern": r"^a.b$"}), '{"a":"a b"}', '{"a":"a\\rb"}'),
        (o(a=S | {"pattern": "^(?=.*[A-Z])(?=.*[0-9]).{3,}$"}), '{"a":"aB3"}', '{"a":"ab3"}'),
        (o(a=S | {"pattern": r"\A[a-z]\Z"}), '{"a":"x"}', '{"a":"xy"}'),
        # dates and times that there are
        (o(a=S | {"format": "date"}), '{"a":"2024-02-29"}', '{"a":"2023-02-29"}'),
        (o(a=S | {"format": "date"}), '{"a":"2000-02-29"}', '{"a":"1900-02-29"}'),
        (o(a=S | {"format": "date"}), '{"a":"0001-01-31"}', '{"a":"0000-01-01"}'),
        (o(a=S | {"format": "time"}), '{"a":"23:59:59Z"}', '{"a":"23:59:60Z"}'),
        (o(a=S | {"format": "date-time"}), '{"a":"2024-02-29T00:00:00.5+01:00"}', '{"a":"2023-02-29T00:00:00Z"}'),
        (o(a=S | {"format": "date-time"}), '{"a":"2024-12-31T23:59:59Z"}', '{"a":"2024-12-31T23:59:60Z"}'),
        (o(a=S | {"format": "date", "pattern": "^2024"}), '{"a":"2024-02-29"}', '{"a":"2023-02-28"}'),
        # rest
        (o(a={"enum": ["x", 1, None], "type": ["string", "null"]}), '{"a":null}', '{"a":1}'),
        (o(a={"not": {"enum": ["x"]}, "enum": ["x", "y"]}), '{"a":"y"}', '{"a":"x"}'),
        (o(a=S | {"format": "uri", "pattern": "^/"}), '{"a":"/x"}', '{"a":"x"}'),
    ],
)
def test_enforced_in_full(schema: Any, right: str, wrong: str) -> None:
    enforced = of_tool(schema, strict=True)
    assert enforced.relaxed == ()
    assert allows(enforced.schema, right)
    assert not allows(enforced.schema, wrong)


@pytest.mark.parametrize(
    ("schema", "path", "right", "wrong"),
    [
        ({"type": "array", "items": N, "uniqueItems": True}, "uniqueItems", "[1,1]", '["x"]'),
        ({"oneOf": [S, S | {"maxLength": 3}]}, "oneOf", '"ab"', "1"),
        ({"oneOf": [N, {"type": "number"}]}, "oneOf", "1", '"x"'),
        (S | {"not": {"const": "x"}}, "not", '"x"', "1"),
        (S | {"pattern": "^(?!-)[a-z-]+$"}, "pattern", '"-a"', '"1"'),
        (S | {"pattern": r"\bfoo\b"}, "pattern", '"foo"', '"fo"'),
        (S | {"pattern": r"(a)\1"}, "pattern", '"x"', "1"),
        (S | {"pattern": "("}, "pattern", '"x"', "1"),
        (o(a=S, b=S) | {"if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if", '{"a":"x"}', '{"a":1}'),
        ({"type": "array", "contains": N}, "contains", "[]", "1"),
        ({"$ref": "https://elsewhere/schema"}, "$ref", "1", ""),
        ({"$ref": "#/$defs/nothing"}, "$ref", "1", ""),
        (
            {"type": "object", "minProperties": 2, "additionalProperties": N},
            "minProperties",
            '{"a":1,"b":1}',
            '{"a":"x"}',
        ),
        (
            {"type": "object", "propertyNames": {"not": {"const": "x"}}, "additionalProperties": N},
            "propertyNames",
            '{"x":1}',
            '{"x":"x"}',
        ),
        ({"patternProperties": {"^a": N, "b$": {"minimum": 3}}, "type": "object"}, "patternProperties", '{"a":1}', "1"),
        ({"enum": [2**70, "x"]}, "enum", "1", ""),
        (o(a=S) | {"minProperties": 2}, "minProperties", '{"a":"x","b":1}', "1"),
        (o(a=S) | {"if": {"required": ["a"]}, "then": o(b=N)}, "if", '{"a":"x","b":1}', '{"c":1}'),
        (S | {"minLength": 4, "maxLength": 3}, "maxLength", '"abcde"', '"abc"'),
        (N | {"minimum": 3, "maximum": 1}, "maximum", "4", "1"),
        ({"enum": []}, "enum", "1", ""),
        ({"allOf": [S, N]}, "allOf", "true", ""),
        (o(a=S) | {"additionalProperties": False, "required": ["a", "z"]}, "required", '{"a":"x"}', '{"z":1}'),
        (
            {"type": "object", "properties": {"v": N, "next": {"$ref": "#/properties/p"}}, "required": ["next"]},
            "required",
            '{"v":1}',
            '{"v":"x"}',
        ),
    ],
)
def test_relaxed_by_itself(schema: Any, path: str, right: str, wrong: str) -> None:
    """Other tools and other properties keep what they say; with `strict` it is an error that names the place."""
    whole = o("p", p=schema, q=N)
    enforced = of_tool(whole)
    assert [r.path for r in enforced.relaxed] == [f"parameters.properties.p.{path}"]
    assert allows(enforced.schema, f'{{"p":{right},"q":1}}')
    assert not allows(enforced.schema, f'{{"p":{right},"q":"x"}}')
    assert not wrong or not allows(enforced.schema, f'{{"p":{wrong}}}')
    with pytest.raises(SchemaError, match=r"^parameters\.properties\.p\."):
        of_tool(whole, strict=True)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "banana"}, "parameters.type must be one of"),
        (o(a={"type": ["string", "text"]}), "parameters.properties.a.type must be one of"),
        (o(a={"items": {"type": "any"}}), "parameters.properties.a.items.type"),
        ({"anyOf": [{"type": "str"}]}, r"parameters.anyOf\[0\].type"),
        ({"$defs": {"A": {"type": 5}}}, "parameters.\\$defs.A.type must be a string"),
        (o(a=N | {"minimum": "0"}), "parameters.properties.a.minimum must be a number"),
        (o(a=S | {"maxLength": -1}), "parameters.properties.a.maxLength"),
        (o(a=N | {"multipleOf": 0}), "parameters.properties.a.multipleOf"),
        (o(a={"$dynamicRef": 5}), "parameters.properties.a.\\$dynamicRef must be a string"),
        (o(a={"$recursiveRef": {}}), "parameters.properties.a.\\$recursiveRef must be a string"),
        (o(a=S | {"pattern": 5}), "parameters.properties.a.pattern must be a string"),
        ({"type": "string"}, "parameters.type must be 'object'"),
        ({"type": "object", "required": True}, "parameters.required must be a list"),
        ({"$ref": "#"}, "parameters.\\$ref refers to itself"),
        ({"allOf": [{"$ref": "#"}]}, r"parameters.allOf\[0\] refers to itself"),
        ({"anyOf": [{"$ref": "#"}, o(a=S)]}, r"parameters.anyOf\[0\] refers to itself"),
        (
            o(x={"$ref": "#/$defs/a"}) | {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
            "parameters.properties.x.\\$ref refers to itself",
        ),
        (o(x={"$ref": "#/properties/x"}), "parameters.properties.x.\\$ref refers to itself"),
        (o(x={"not": {"$ref": "#/properties/x"}}), "parameters.properties.x.not refers to itself"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_what_is_no_schema_is_an_error(schema: Any, message: str, strict: bool) -> None:
    with pytest.raises(SchemaError, match=f"^{message}"):
        of_tool(schema, strict=strict)


def test_a_response_format_is_left_open() -> None:
    enforced = enforceable(o(a=S), False).schema
    assert allows(enforced, '{"a":"x","more":1}')
    assert enforceable({"type": "string"}, True).schema == {"type": "string"}


@pytest.mark.parametrize(
    ("bounds", "inside", "narrowed_out"),
    [
        (N | {"minimum": 0, "maximum": 2**64 - 1}, 2**63 - 1, 2**64 - 1),
        (N | {"maximum": 0, "minimum": -(2**70)}, -(2**62), -(2**64)),
        ({"type": "number", "maximum": 1e22}, 10**18, 10**19),
    ],
)
def test_bounds_beyond_the_grammar_are_relaxed_or_narrowed_if_strict(
    bounds: Any, inside: int, narrowed_out: int
) -> None:
    relaxed, narrowed = enforceable(bounds, False), enforceable(bounds, True)
    assert [r.keyword in bounds for r in relaxed.relaxed] == [True] and narrowed.relaxed == ()
    assert allows(relaxed.schema, str(inside)) and allows(relaxed.schema, str(narrowed_out))
    assert allows(narrowed.schema, str(inside)) and not allows(narrowed.schema, str(narrowed_out))


@pytest.mark.parametrize(
    "schema",
    [
        N | {"minimum": 3, "maximum": 1},
        {"enum": []},
        {"type": []},
        {"not": {}},
        {"allOf": [S, N]},
        o("a", a={"enum": []}),
        {"type": "array", "items": S | {"minLength": 2, "maxLength": 1}, "minItems": 1},
        o("a", a={"$ref": "#"}),
        o("a", a=S | {"minLength": 2, "maxLength": 1}),
    ],
)
def test_a_response_format_that_nothing_matches_is_an_error(schema: Any) -> None:
    for strict in (False, True):
        with pytest.raises(SchemaError, match="^schema"):
            enforceable(schema, strict)
    optional = enforceable({"type": "array", "items": schema}, False)
    assert allows(optional.schema, "[]")


def test_deep_schemas_end_in_an_error_or_any_object() -> None:
    schema: Any = S
    for _ in range(100):
        schema = {"type": "object", "properties": {"a": schema}}
    enforced = of_tool(schema)
    assert enforced.schema == {"type": "object"} and [r.path for r in enforced.relaxed] == ["parameters"]
    with pytest.raises(SchemaError, match="nested too deeply"):
        of_tool(schema, strict=True)
    for _ in range(5000):
        schema = {"type": "object", "properties": {"a": schema}}
    with pytest.raises(SchemaError):
        of_tool(schema)


# --- whole schemas ---


MCP = [
    pytest.param(schema, id=f"{server}.{name}") for server, tools in MCP_TOOLS.items() for name, schema in tools.items()
]


@pytest.mark.parametrize("schema", MCP)
def test_public_mcp_servers_are_enforced_in_full(schema: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema({k: v for k, v in schema.items() if k != "$schema"})
    enforced = of_tool(schema, strict=True)
    assert values_are_right(schema, enforced)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(tool_schemas(), st.booleans())
@example(o(a=S, b=S) | {"additionalProperties": False, "if": {"required": ["b"]}, "then": {"required": ["a"]}}, True)
def test_generated_schemas(schema: dict[str, Any], arguments: bool) -> None:
    text = render_tools([ToolDefinition("odd", "A tool.", schema)])
    assert "type odd = (" in text
    try:
        enforced = enforceable(schema, False, arguments=arguments)
    except SchemaError as error:
        assert not arguments and str(error).startswith("schema.")
        return
    good = ToolSpec("good", of_tool(o("a", a=S)).schema, True)
    spec = TurnSpec([good, ToolSpec("odd", enforced.schema, True)], must_call=True, reasoning_budget=0)
    assert grammar_error(turn_grammar(spec, VOCABULARY)) is None
    values_are_right(schema, enforced)
    try:
        strict = enforceable(schema, True, arguments=arguments)
    except SchemaError:
        assert enforced.relaxed
    else:
        assert strict.relaxed == ()
        values_are_right(schema, strict)


def values_are_right(schema: dict[str, Any], enforced: Enforced) -> int:
    """Random values validate, but for the keywords that were relaxed. -> how many there were."""
    relaxed = {r.keyword for r in enforced.relaxed}
    count = 0
    for seed in range(4):
        text = random_value(enforced.schema, seed)
        if text is None:
            continue
        count += 1
        if "*" in relaxed:
            json.loads(text)
            continue
        for error in errors_of(schema, text):
            assert keywords_of(error) & relaxed, f"{text} {error.message} {dict(enforced.schema)} {enforced.relaxed}"
    return count


def keywords_of(error: jsonschema.ValidationError) -> set[str]:
    found = {str(error.validator)} | {str(part) for part in error.absolute_schema_path}
    if found & {"then", "else"}:  # jsonschema leaves `if` out of such a path
        found.add("if")
    for inner in error.context or ():
        found |= keywords_of(inner)
    return found
