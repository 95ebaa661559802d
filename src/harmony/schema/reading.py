"""Reads properties of schemas and values, for the modules that rewrite schemas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any

from gptoss.harmony.schema.distinct import type_of
from gptoss.harmony.schema.patterns import NARROWED_FORMATS, PatternError, translate


def only_integers(kind: Any) -> bool:
    return "integer" in listed(kind) and "number" not in listed(kind)


def has_type(value: Any, kinds: Set[str]) -> bool:
    kind = type_of(value)
    if kind == "number":
        return "number" in kinds or ("integer" in kinds and float(value).is_integer())
    return kind in kinds


def beyond_json(value: Any) -> bool:
    """Whether the compiler would change the value: it stores numbers in 64 bits."""
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return False
    if isinstance(value, int):
        return not -(2**63) <= value < 2**64
    if isinstance(value, float):
        return math.isinf(value) or math.isnan(value)
    return any(beyond_json(v) for v in (value.values() if isinstance(value, dict) else value))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"}
)


def says_only(schema: Mapping[str, Any], keywords: Set[str]) -> bool:
    return schema.keys() - ANNOTATIONS <= keywords


def only_required(schema: Any) -> str | None:
    """The name that the schema requires, if that is all it does."""
    if not isinstance(schema, dict) or not says_only(schema, {"required"}):
        return None
    names = schema.get("required") or []
    return names[0] if len(names) == 1 else None


def one_pattern(pattern: str) -> str | None:
    try:
        translated = translate(pattern)
    except PatternError:
        return None
    return translated.patterns[0] if translated.exact and len(translated.patterns) == 1 else None


def name_pattern(rule: Mapping[str, Any]) -> str | None:
    """A pattern for the names that match `rule`; None if there is none."""
    if "pattern" in rule and says_only(rule, {"type", "pattern", "format"}):
        return one_pattern(rule["pattern"])
    if rule.get("format") in NARROWED_FORMATS and says_only(rule, {"type", "format"}):
        return NARROWED_FORMATS[rule["format"]]
    if ("minLength" in rule or "maxLength" in rule) and says_only(rule, {"type", "minLength", "maxLength"}):
        least, limit = int(rule.get("minLength", 0)), rule.get("maxLength")
        return rf"^[\s\S]{{{least},{'' if limit is None else int(limit)}}}$"
    return None
