"""JSON schemas as pydantic, zod and MCP servers write them, and random values that a schema's grammar allows."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

MCP_TOOLS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "data" / "mcp_tools.json").read_text())
NAMES = ("id", "name", "tags", "limit", "kind", "note", "when")
ANNOTATIONS: list[dict[str, Any]] = [
    {},
    {},
    {},
    {"description": "What it is."},
    {"title": "Title"},
    {"default": None},
    {"examples": ["a"]},
    {"deprecated": True},
]
STRINGS: list[dict[str, Any]] = [
    {},
    {},
    {},
    {"minLength": 1},
    {"maxLength": 8},
    {"minLength": 2, "maxLength": 5},
    {"pattern": "^[a-z][a-z0-9_-]*$"},
    {"pattern": r"^\d{3}-[A-F]+$"},
    {"pattern": "[[&&--~]"},
    {"pattern": "^(?=.*[A-Z])(?=.*[0-9]).{4,9}$"},
    {"pattern": "^a|b$"},
    {"format": "date"},
    {"format": "date-time"},
    {"format": "time"},
    {"format": "uuid"},
    {"format": "email"},
    {"format": "uri"},
    {"format": "binary"},
    {"format": "path"},
    {"format": "e164", "pattern": r"^\+[1-9]\d{6,14}$"},
    {"contentEncoding": "base64"},
]
INTEGERS: list[dict[str, Any]] = [
    {},
    {},
    {"minimum": 0},
    {"minimum": 1, "maximum": 100},
    {"exclusiveMinimum": 0},
    {"multipleOf": 5},
    {"format": "int64"},
    {"minimum": -9007199254740991, "maximum": 9007199254740991},
    {"minimum": -(2**63), "maximum": 2**63 - 1},
    {"format": "uint64", "minimum": 0},
    {"minimum": 0, "maximum": 2**64 - 1},
    {"exclusiveMaximum": 4.5},
]
NUMBERS: list[dict[str, Any]] = [
    {},
    {},
    {"minimum": 0, "maximum": 1},
    {"exclusiveMinimum": 0, "exclusiveMaximum": 10},
    {"multipleOf": 0.5},
    {"minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
    {"maximum": 1e22},
    {"minimum": -90, "maximum": 90},
]


def _typed(kind: str, restrictions: list[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda r, a: {"type": kind, **r, **a}, st.sampled_from(restrictions), st.sampled_from(ANNOTATIONS))


LEAVES = st.one_of(
    _typed("string", STRINGS),
    _typed("string", STRINGS),
    _typed("integer", INTEGERS),
    _typed("number", NUMBERS),
    st.just({"type": "boolean"}),
    st.sampled_from(
        [
            {"enum": ["a", "b", "c"], "type": "string"},
            {"const": "x"},
            {"enum": [1, 2, None]},
            {"type": ["string", "null"]},
            {"type": "string", "nullable": True},
            {},
            True,
            {"not": {}},
            {"type": "null"},
            {"type": "object"},
            {"$ref": "#/$defs/Point"},
            {"$ref": "#/$defs/List%5Bint%5D"},
            {"$ref": "#/$defs/Page<Item>"},
            {"$ref": "#/$defs/Node"},
            {"type": "object", "properties": {}},
            {"type": "object", "additionalProperties": {"type": "string"}},
            {"type": "string", "enum": ["x", "y"], "oneOf": [{"const": "x"}, {"const": "y"}]},
        ]
    ),
)
DEFINITIONS: dict[str, Any] = {
    "Point": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x"]},
    "List[int]": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3},
    "Page<Item>": {"properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/Point"}}}, "type": "object"},
    "Node": {
        "type": "object",
        "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
    },
}


@st.composite
def _object(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    names = draw(st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw(inner) for name in names}}
    if names and draw(st.booleans()):
        schema["required"] = draw(st.lists(st.sampled_from(names), unique=True))
    if draw(st.integers(0, 2)) == 0:
        schema["additionalProperties"] = draw(st.sampled_from([False, False, True, {"type": "string"}]))
    more = [{}] * 8 + [
        {"minProperties": 1},
        {"minProperties": 2},
        {"maxProperties": 2},
        {"propertyNames": {"type": "string"}},
        {"required": ["undeclared"]},
        {"dependentRequired": {"id": ["name"]}},
        {"not": {"required": ["zip"]}},
        {"anyOf": [{"required": ["id"]}, {"required": ["name"]}]},
        {"oneOf": [{"required": ["id"]}, {"required": ["name"]}]},
        {"if": {"required": ["id"]}, "then": {"required": ["name"]}},
        {"patternProperties": {"^x-": {"type": "integer"}}},
        {"unevaluatedProperties": False},
    ]
    return schema | draw(st.sampled_from(more))


@st.composite
def _array(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    more = [
        {},
        {},
        {"minItems": 1},
        {"maxItems": 2},
        {"minItems": 1, "maxItems": 3},
        {"uniqueItems": False},
        {"uniqueItems": True},
        {"contains": {"type": "string"}},
    ]
    schema = {"type": "array", "items": draw(inner)} | draw(st.sampled_from(more))
    if draw(st.integers(0, 7)) == 0:
        schema["prefixItems"] = [draw(inner)]
    return schema


@st.composite
def _union(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    kind = draw(st.sampled_from(["nullable", "nullable", "anyOf", "oneOf", "tagged", "allOf"]))
    if kind == "nullable":
        return {"anyOf": [draw(inner), {"type": "null"}], "default": None}
    if kind == "tagged":
        variants = []
        for tag in ("cat", "dog"):
            variant = draw(_object(inner))
            variants.append(
                {**variant, "properties": {"kind": {"const": tag, "default": tag}, **variant["properties"]}}
            )
            variants[-1]["properties"]["kind"] = {"const": tag, "default": tag}
        return {"oneOf": variants, "discriminator": {"propertyName": "kind"}}
    return {kind: draw(st.lists(inner, min_size=1, max_size=2 if kind == "allOf" else 3))}


def _deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(_object(inner), _object(inner), _array(inner), _union(inner))


@st.composite
def tool_schemas(draw: st.DrawFn) -> dict[str, Any]:
    schema = draw(_object(st.recursive(LEAVES, _deeper, max_leaves=6)))
    meta = draw(
        st.sampled_from(
            [
                {},
                {"$schema": "https://json-schema.org/draft-07/schema#"},
                {"$schema": "http://json-schema.org/draft/2020-12/schema"},
            ]
        )
    )
    return {**meta, **schema, "$defs": DEFINITIONS}


@lru_cache(1)
def _bytes() -> LLTokenizer:
    return LLTokenizer("byte")


def matcher(schema: Mapping[str, Any]) -> LLMatcher:
    """For the value alone, a byte a token."""
    spaced = {**schema, "x-guidance": {"whitespace_pattern": "( )?"}}
    out = LLMatcher(_bytes(), LLMatcher.grammar_from_json_schema(json.dumps(spaced)), log_level=0)
    assert not out.is_error(), out.get_error()
    return out


def allows(schema: Mapping[str, Any], text: str) -> bool:
    """Whether the grammar of the schema, as it was enforced, takes this text as a whole."""
    found, tokens = matcher(schema), list(text.encode())
    return found.validate_tokens(tokens) == len(tokens) and bool(found.consume_tokens(tokens)) and found.is_accepting()


def random_value(schema: Mapping[str, Any], seed: int, limit: int = 400) -> str | None:
    """Text that the grammar allows, None where it did not come to an end."""
    found, rng, out = matcher(schema), random.Random(seed), bytearray()
    mask = allocate_token_bitmask(1, _bytes().vocab_size)
    while len(out) < limit:
        if found.is_accepting() and (found.is_stopped() or rng.random() < 0.3):
            return out.decode()
        fill_next_token_bitmask(found, mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:256])
        if not len(allowed):
            return out.decode() if found.is_accepting() else None
        closing = [b for b in allowed if b in b'"]}']
        plain = [b for b in allowed if 32 < b < 127 and b != 92]
        pool = closing if closing and rng.random() < (0.25 if len(out) < limit / 2 else 0.9) else (plain or allowed)
        if rng.random() < 0.05:
            pool = allowed
        byte = int(rng.choice(pool))
        assert found.consume_token(byte), "a byte of the mask"
        out.append(byte)
    return None


def errors_of(schema: Mapping[str, Any], text: str) -> list[jsonschema.ValidationError]:
    plain = _without_extensions(schema)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of Python's: "[[" may change its meaning
        try:
            return list(jsonschema.Draft202012Validator(plain, format_checker=checker).iter_errors(json.loads(text)))
        except OverflowError:  # of the validator's multipleOf, at numbers of some 300 digits
            return []


def _without_extensions(schema: Any) -> Any:
    """For the validator: nullable written out, without $schema, and without the limits of float64, which 1E+999
    exceeds."""
    if isinstance(schema, list):
        return [_without_extensions(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {
        k: _without_extensions(v)
        for k, v in schema.items()
        if k not in ("$schema", "nullable") and not (isinstance(v, float) and abs(v) > 1e300)
    }
    if plain.get("$ref") == "#/$defs/Page<Item>":
        plain["$ref"] = "#/$defs/Page%3CItem%3E"
    return {"anyOf": [plain, {"type": "null"}]} if schema.get("nullable") is True else plain
