"""How large a schema may be before it is a clear error."""

from __future__ import annotations

from typing import Any

import pytest

from gptoss.harmony.schema import limits, rewrite
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.schema.enforce import enforceable


def with_properties(count: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(count)}}


def nested(count: int) -> dict[str, Any]:
    """In objects of 99 each, which are properties too, of the root and of array items."""
    parts = {f"o{i}": {"type": "array", "items": with_properties(99)} for i in range(count // 100)}
    return {"type": "object", "properties": parts}


def with_values(count: int) -> dict[str, Any]:
    halves = {"a": {"enum": list(range(count // 2))}, "b": {"anyOf": [{"enum": list(range(count - count // 2))}]}}
    return {"type": "object", "properties": halves}


def with_patterns(count: int) -> dict[str, Any]:
    return {"type": "object", "patternProperties": {f"^x{i}_": {"type": "string"} for i in range(count)}}


def joined(count: int) -> dict[str, Any]:
    """A schema of 100 properties that is joined with others, by a chain of references; they count in each place."""
    chain = {"base": with_properties(99), "x": {"allOf": [{"$ref": "#/$defs/base"}], "properties": {"more": {}}}}
    uses = [{"$ref": "#/$defs/x", "properties": {}} for _ in range(count // 100)]
    return {"$defs": chain, "type": "array", "prefixItems": uses}


@pytest.mark.parametrize(
    ("make", "limit", "slack", "what"),
    [
        (with_properties, "MAX_PROPERTIES", 0, "properties in all"),
        (nested, "MAX_PROPERTIES", 0, "properties in all"),
        (with_values, "MAX_ENUM_VALUES", 0, "values in enum in all"),
        (with_patterns, "MAX_PATTERNS", 0, "names in patternProperties in all"),
        (joined, "MAX_JOINED_PROPERTIES", 200, "properties where it joins schemas in all"),
    ],
)
def test_the_largest_schema_is_taken_and_a_larger_one_is_an_error(
    make: Any, limit: str, slack: int, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`slack`: properties of the definitions themselves."""
    most = 600
    monkeypatch.setattr(limits, limit, most)
    if make is with_patterns:
        limits.check_size(make(most), "schema")
    else:
        enforceable(make(most - slack), strict=False)
    with pytest.raises(SchemaError, match=rf"^parameters.* has \d+ {what}; at most {most} are allowed$"):
        enforceable(make(most + 100), strict=False, where="parameters")


def test_what_openai_takes_is_taken() -> None:
    for schema in (with_properties(5_000), nested(5_000), with_values(1_000)):
        assert not enforceable(schema, strict=False).relaxed


def test_a_oneof_of_many_variants_is_enforced_as_anyof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "MAX_ONE_OF_PAIRS", 90)
    few: Any = {"oneOf": [{"const": i} for i in range(10)]}
    twice = {"type": "object", "properties": {"a": few, "b": few}}
    assert not enforceable(twice, strict=False).relaxed
    third = {"type": "object", "properties": {"a": few, "b": few, "c": few}}
    (relaxed,) = enforceable(third, strict=False).relaxed
    assert relaxed.path == "schema.properties.c.oneOf" and "too many variants" in relaxed.reason
    with pytest.raises(SchemaError, match=r"properties\.c\.oneOf: there are too many variants"):
        enforceable(third, strict=True)
