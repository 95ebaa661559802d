"""Writes values of a JSON schema, and comments for keywords that types cannot express."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

Schema = Mapping[str, Any]

_BOUNDS = (
    "format",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
    "minItems",
    "maxItems",
    "uniqueItems",
    "minProperties",
    "maxProperties",
    "not",
    "contains",
    "propertyNames",
    "dependentRequired",
    "if",
    "then",
    "else",
)
_BOUND_KEYS = frozenset(_BOUNDS)


def notes_on(schema: Any, kind: str) -> list[str]:
    """The parts of the comment on a schema whose type is written as `kind`."""
    if not isinstance(schema, Mapping):
        return []
    description = schema.get("description")
    shown = not isinstance(description, str) or f"// {description}\n" in kind
    return [n for n in ("" if shown else str(description), default_note(schema), bounds(schema)) if n]


def variant_notes(variant: Any, kind: str, written: Any) -> list[str]:
    """The notes on a variant of a union.

    A description equal to `written`, which is above the union, is omitted.
    """
    if written is not None and _description(variant) == written:
        variant = {key: value for key, value in variant.items() if key != "description"}
    return notes_on(variant, kind)


def _description(schema: Any) -> Any:
    return schema.get("description") if isinstance(schema, Mapping) else None


def comment_of(notes: Iterable[str]) -> str:
    """The comment at the end of a line; empty without notes."""
    text = ", ".join(filter(None, notes))
    return f" // {text}" if text else ""


def bounds(schema: Schema) -> str:
    """The keywords that types cannot express, and those of the schema's items."""
    notes: list[str] = []
    if not schema.keys().isdisjoint(_BOUND_KEYS):
        notes = [f"{key}: {literal(schema[key])}" for key in _BOUNDS if key in schema]
    items = schema.get("items")
    if items is not None and isinstance(items, Mapping) and not items.keys().isdisjoint(_BOUND_KEYS):
        notes += [f"items {key}: {literal(items[key])}" for key in _BOUNDS if key in items]
    return ", ".join(notes)


def default_note(schema: Schema) -> str:
    """The default value as a note; empty without one."""
    if "default" not in schema:
        return ""
    value = schema["default"]
    if isinstance(value, str) and schema.get("enum"):
        return f"default: {value}"
    return f"default: {quoted(value)}"


def quoted(value: Any) -> str:
    """A value as openai-harmony writes it: strings between quotes, without escapes."""
    return f'"{value}"' if isinstance(value, str) else literal(value)


def literal(value: Any) -> str:
    """JSON as Rust's serde_json writes it."""
    if value.__class__ is str:
        return _encode(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{literal(str(k))}:{literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, float) or _is_beyond_64_bits(value):
        return _float(float(value))
    return _encode(value)


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _is_beyond_64_bits(value: Any) -> bool:
    """An integer that serde_json parses as a float, if that does not change it."""
    if type(value) is not int or -(2**63) <= value < 2**64:
        return False
    try:
        return int(float(value)) == value
    except OverflowError:
        return False


def _float(value: float) -> str:
    """The shortest text, from 1e-5 to 1e16 without an exponent."""
    if 1e-5 <= abs(value) < 1e-4:
        digits, exponent = f"{value!r}".split("e-")
        sign, digits = ("-", digits[1:]) if value < 0 else ("", digits)
        return f"{sign}0.{'0' * (int(exponent) - 1)}{digits.replace('.', '')}"
    return re.sub(r"e([+-])0*", lambda found: "e" + found[1].strip("+"), repr(value))
