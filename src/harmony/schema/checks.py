"""Checks that a value is a JSON schema.

Values of keywords must have the right type, and references must not be circular.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gptoss.harmony.schema.references import References

TYPES = frozenset({"string", "number", "integer", "boolean", "null", "object", "array"})
SCHEMAS_IN_MAP = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
SCHEMAS_IN_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMAS = (
    "additionalItems",
    "unevaluatedItems",
    "contains",
    "additionalProperties",
    "unevaluatedProperties",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
)
IN_PLACE = ("not", "if", "then", "else")  # apply to the value itself, as the lists but prefixItems do
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


class SchemaError(ValueError):
    """A JSON schema is not valid, or cannot be enforced although it must be.

    The message names the location.
    """


def check_schema_shape(schema: Any, where: str) -> None:
    """Raises SchemaError naming the location where `schema` is not a JSON schema."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise SchemaError(f"{where} must be an object or a boolean")
    for key, value in schema.items():
        check = _CHECKS.get(key)
        if check is not None:
            check(value, f"{where}.{key}")


def _type(kind: Any, where: str) -> None:
    kinds = [kind] if isinstance(kind, str) else kind
    if not isinstance(kinds, list) or not all(isinstance(k, str) for k in kinds):
        raise SchemaError(f"{where} must be a string or a list of strings")
    for name in kinds:
        if name not in TYPES:
            raise SchemaError(f"{where} must be one of {', '.join(sorted(TYPES))}, not {name!r}")


def _schemas_by_name(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise SchemaError(f"{where} must be an object")
    for name, inner in value.items():
        check_schema_shape(inner, f"{where}.{name}")


def _schemas(value: Any, where: str) -> None:
    _list(value, where)
    for index, inner in enumerate(value):
        check_schema_shape(inner, f"{where}[{index}]")


def _items(value: Any, where: str) -> None:
    """Checks `items`; before draft 2020-12 a list of schemas describes a tuple."""
    (_schemas if isinstance(value, list) else check_schema_shape)(value, where)


def _list(value: Any, where: str) -> None:
    if not isinstance(value, list):
        raise SchemaError(f"{where} must be a list")


def _names(value: Any, where: str) -> None:
    _list(value, where)
    if not all(isinstance(name, str) for name in value):
        raise SchemaError(f"{where} must hold strings")


def _lists_of_names(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise SchemaError(f"{where} must be an object")
    for name, needed in value.items():
        _names(needed, f"{where}.{name}")


def _string(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise SchemaError(f"{where} must be a string")


def _count(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value % 1:
        raise SchemaError(f"{where} must be a whole number that is not negative")


def _bound(value: Any, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise SchemaError(f"{where} must be a number")


def _exclusive(value: Any, where: str) -> None:
    if not isinstance(value, bool):  # as in draft 4
        _bound(value, where)


def _multiple(value: Any, where: str) -> None:
    _bound(value, where)
    if value <= 0 or math.isinf(value):
        raise SchemaError(f"{where} must be above 0")


_CHECKS: dict[str, Callable[[Any, str], None]] = {
    "type": _type,
    "items": _items,
    "enum": _list,
    "examples": _list,
    "required": _names,
    "dependentRequired": _lists_of_names,
    "multipleOf": _multiple,
    **dict.fromkeys(SCHEMAS_IN_MAP, _schemas_by_name),
    **dict.fromkeys(SCHEMAS_IN_LIST, _schemas),
    **dict.fromkeys(SCHEMAS, check_schema_shape),
    **dict.fromkeys(("$ref", "$dynamicRef", "$recursiveRef", "pattern", "format"), _string),
    **dict.fromkeys(COUNTS, _count),
    **dict.fromkeys(("minimum", "maximum"), _bound),
    **dict.fromkeys(("exclusiveMinimum", "exclusiveMaximum"), _exclusive),
}


def check_references(root: Any, where: str) -> None:
    """Raises SchemaError naming a reference that leads directly back to itself."""
    references = References(root)
    done: set[int] = set()

    def follow(schema: Any, location: str, above: tuple[int, ...]) -> None:
        if not isinstance(schema, dict) or id(schema) in done:
            return
        if id(schema) in above:
            raise SchemaError(f"{location} refers to itself")
        chain = (*above, id(schema))
        reference = schema.get("$ref")
        if isinstance(reference, str):
            found = references.find(reference)
            if found is not None:
                follow(found.schema, f"{location}.$ref" if not above else location, chain)
        for key, inner in in_place(schema):
            follow(inner, f"{location}.{key}" if not above else location, chain)
        done.add(id(schema))

    for location, schema in walk(root, where):
        follow(schema, location, ())


def in_place(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The subschemas that apply to the same value."""
    for key in ("anyOf", "oneOf", "allOf"):
        for index, inner in enumerate(schema.get(key) or ()):
            yield f"{key}[{index}]", inner
    for key in IN_PLACE:
        if key in schema:
            yield key, schema[key]


def walk(schema: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every schema in `schema`, itself first, with its location."""
    if not isinstance(schema, dict):
        return
    yield where, schema
    for key in SCHEMAS_IN_MAP:
        for name, inner in (schema.get(key) or {}).items():
            yield from walk(inner, f"{where}.{key}.{name}")
    for key in (*SCHEMAS_IN_LIST, "items"):
        value = schema.get(key)
        for index, inner in enumerate(value if isinstance(value, list) else ()):
            yield from walk(inner, f"{where}.{key}[{index}]")
    for key in (*SCHEMAS, "items"):
        if isinstance(schema.get(key), dict):
            yield from walk(schema[key], f"{where}.{key}")
