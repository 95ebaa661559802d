"""Whether a value is a JSON schema at all: keywords with values of the right type, references that lead somewhere."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from src.harmony.schema.references import References

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
SCHEMAS_IN_MAP = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
SCHEMAS_IN_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMAS = (
    "items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties",
    "propertyNames", "not", "if", "then", "else",
)  # fmt: skip
IN_PLACE = (
    "not",
    "if",
    "then",
    "else",
)  # apply to the value itself, as the lists but prefixItems do
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_STRINGS = ("$ref", "pattern", "format")


class SchemaError(ValueError):
    """A JSON schema that is not valid, or that cannot be enforced though it has to be. The message names the place."""


def check_schema_shape(schema: Any, where: str) -> None:
    """Raises SchemaError naming the place where `schema` is not a JSON schema."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise SchemaError(f"{where} must be an object or a boolean")
    _check_type(schema.get("type", "object"), where)
    for key in SCHEMAS_IN_MAP:
        inner = schema.get(key, {})
        if not isinstance(inner, Mapping):
            raise SchemaError(f"{where}.{key} must be an object")
        for name, value in inner.items():
            check_schema_shape(value, f"{where}.{key}.{name}")
    for key in SCHEMAS_IN_LIST:
        inner = schema.get(key, [])
        if not isinstance(inner, list):
            raise SchemaError(f"{where}.{key} must be a list")
        for index, value in enumerate(inner):
            check_schema_shape(value, f"{where}.{key}[{index}]")
    for key in SCHEMAS:
        if key not in schema:
            continue
        if key == "items" and isinstance(schema[key], list):  # a tuple, before draft 2020-12
            for index, value in enumerate(schema[key]):
                check_schema_shape(value, f"{where}.items[{index}]")
        else:
            check_schema_shape(schema[key], f"{where}.{key}")
    _check_values(schema, where)


def _check_type(kind: Any, where: str) -> None:
    kinds = [kind] if isinstance(kind, str) else kind
    if not isinstance(kinds, list) or not all(isinstance(k, str) for k in kinds):
        raise SchemaError(f"{where}.type must be a string or a list of strings")
    for name in kinds:
        if name not in TYPES:
            raise SchemaError(
                f"{where}.type must be one of {', '.join(sorted(TYPES))}, not {name!r}"
            )


def _check_values(schema: Mapping[str, Any], where: str) -> None:
    for key in ("enum", "required", "examples"):
        if not isinstance(schema.get(key, []), list):
            raise SchemaError(f"{where}.{key} must be a list")
    if not all(isinstance(name, str) for name in schema.get("required", [])):
        raise SchemaError(f"{where}.required must hold strings")
    for key in _STRINGS:
        if not isinstance(schema.get(key, ""), str):
            raise SchemaError(f"{where}.{key} must be a string")
    for key in _COUNTS:
        count = schema.get(key, 0)
        if isinstance(count, bool) or not isinstance(count, int | float) or count < 0 or count % 1:
            raise SchemaError(f"{where}.{key} must be a whole number that is not negative")
    for key in _BOUNDS:
        bound = schema.get(key, 1)
        draft_4 = key.startswith("exclusive") and isinstance(bound, bool)
        if not draft_4 and (
            isinstance(bound, bool) or not isinstance(bound, int | float) or bound != bound
        ):
            raise SchemaError(f"{where}.{key} must be a number")
    if schema.get("multipleOf", 1) <= 0 or math.isinf(schema.get("multipleOf", 1)):
        raise SchemaError(f"{where}.multipleOf must be above 0")
    for name, needed in (
        schema.get("dependentRequired", {}).items()
        if isinstance(schema.get("dependentRequired", {}), Mapping)
        else [("", None)]
    ):
        if not isinstance(needed, list) or not all(isinstance(n, str) for n in needed):
            raise SchemaError(f"{where}.dependentRequired.{name} must be a list of strings")


def check_references(root: Any, where: str) -> None:
    """Raises SchemaError naming a reference that leads back to itself without anything in between."""
    references = References(root)
    done: set[int] = set()

    def follow(schema: Any, place: str, above: tuple[int, ...]) -> None:
        if not isinstance(schema, Mapping) or id(schema) in done:
            return
        if id(schema) in above:
            raise SchemaError(f"{place} refers to itself")
        chain = (*above, id(schema))
        reference = schema.get("$ref")
        if isinstance(reference, str):
            found = references.find(reference)
            if found is not None:
                follow(found.schema, f"{place}.$ref" if not above else place, chain)
        for key, inner in in_place(schema):
            follow(inner, f"{place}.{key}" if not above else place, chain)
        done.add(id(schema))

    for place, schema in walk(root, where):
        follow(schema, place, ())


def in_place(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas inside that apply to the same value."""
    for key in ("anyOf", "oneOf", "allOf"):
        for index, inner in enumerate(schema.get(key) or ()):
            yield f"{key}[{index}]", inner
    for key in IN_PLACE:
        if key in schema:
            yield key, schema[key]


def walk(schema: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema in `schema`, itself first, with its place."""
    if not isinstance(schema, Mapping):
        return
    yield where, schema
    for key in SCHEMAS_IN_MAP:
        for name, inner in (schema.get(key) or {}).items():
            yield from walk(inner, f"{where}.{key}.{name}")
    for key in (*SCHEMAS_IN_LIST, "items"):
        value = schema.get(key)
        for index, inner in enumerate(value if isinstance(value, list) else ()):
            yield from walk(inner, f"{where}.{key}[{index}]")
    for key in SCHEMAS:
        if isinstance(schema.get(key), Mapping):
            yield from walk(schema[key], f"{where}.{key}")
