"""The keywords of a schema that hold no schemas that would have to be rewritten, and `not`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from gptoss.harmony.schema.context import NOT_SUPPORTED, Context
from gptoss.harmony.schema.distinct import value_key
from gptoss.harmony.schema.numbers import bounds
from gptoss.harmony.schema.patterns import KNOWN_FORMATS, NARROWED_FORMATS, PatternError, translate
from gptoss.harmony.schema.reading import (
    ANNOTATIONS,
    beyond_json,
    has_type,
    listed,
    only_integers,
    only_required,
    says_only,
)

MAX_COMBINATIONS = 20  # of names that are enumerated
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_ABSENT = object()
_ALL_TYPES = ("string", "number", "boolean", "null", "object", "array")


def values(context: Context, node: dict[str, Any], schema: Mapping[str, Any], location: str) -> None:
    """Adds type, enum and const to `node`."""
    kind = context.get(schema, "type", location)
    if kind == []:
        context.relax(location, "type", "no value has no type", contradiction=True)
    elif kind is not None:
        node["type"] = kind[0] if isinstance(kind, list) and len(kind) == 1 else kind
    kinds = {kind} if isinstance(kind, str) else set(kind or ())
    for keyword in ("enum", "const"):
        given = context.get(schema, keyword, location, _ABSENT)
        if given is _ABSENT:
            continue
        kept = {value_key(v): v for v in (given if keyword == "enum" else [given]) if not kinds or has_type(v, kinds)}
        if not kept:
            context.relax(location, keyword, "no value is left", contradiction=True)
        elif any(beyond_json(v) for v in kept.values()):
            context.relax(location, keyword, "numbers beyond 64 bits cannot be written exactly")
        else:
            node[keyword] = list(kept.values()) if keyword == "enum" else given


def strings(context: Context, node: dict[str, Any], schema: Mapping[str, Any], location: str) -> None:
    """Adds the keywords of strings to `node`."""
    for keyword in ("minLength", "maxLength"):
        length = context.get(schema, keyword, location)
        if length is not None and not (keyword == "minLength" and length == 0):
            node[keyword] = int(length)
    patterns = _pattern(context, schema, location)
    name = context.get(schema, "format", location)
    if "enum" not in node and "const" not in node:
        if name in NARROWED_FORMATS:
            patterns.append(NARROWED_FORMATS[name])
        elif name in KNOWN_FORMATS:
            node["format"] = name
    if patterns:
        node["pattern"] = patterns[0]
    if len(patterns) > 1:
        add_all(node, [{"pattern": pattern} for pattern in patterns[1:]])


def _pattern(context: Context, schema: Mapping[str, Any], location: str) -> list[str]:
    pattern = context.get(schema, "pattern", location)
    if pattern is None or pattern in ("", ".*", "^.*$", "^"):
        return []
    try:
        translated = translate(pattern)
    except PatternError as error:
        context.relax(location, "pattern", f"the grammar has no such expression ({error})")
        return []
    if not translated.exact:
        context.relax(location, "pattern", "its look-around and word boundaries are left out")
    return translated.patterns


def numbers(context: Context, node: dict[str, Any], schema: Mapping[str, Any], location: str) -> None:
    """Adds the keywords of numbers to `node`."""
    asked = {key: context.get(schema, key, location) for key in BOUNDS if key in schema}
    known = {key: value for key, value in asked.items() if value is not None}
    found = bounds(known, integer=only_integers(node.get("type")), strict=context.strict)
    node.update(found.keywords)
    for keyword in found.relaxed:
        context.relax(location, keyword, "the bound is out of the grammar's reach")
    multiple = context.get(schema, "multipleOf", location)
    if multiple is not None:
        node["multipleOf"] = multiple


def property_counts(context: Context, node: dict[str, Any], schema: Mapping[str, Any], location: str) -> None:
    """Adds minProperties and maxProperties, spelled out where names can be listed, to `node`."""
    least = int(context.get(schema, "minProperties", location) or 0)
    limit = context.get(schema, "maxProperties", location)
    required, names = set(node.get("required", ())), node.get("properties", {})
    optional = [n for n in names if n not in required and names[n] is not False]
    closed = node.get("additionalProperties") is False and "patternProperties" not in node
    missing = least - len(required)
    if missing > 0:
        if closed and 0 < missing <= len(optional) and math.comb(len(optional), missing) <= MAX_COMBINATIONS:
            add_all(node, [{"anyOf": [{"required": [*some]} for some in combinations(optional, missing)]}])
        elif not closed and missing == 1 and not optional:
            node["minProperties"] = least
        else:
            if not optional or (closed and missing == 1):
                node["minProperties"] = least
            if not closed or missing > 1:
                context.relax(location, "minProperties", "a name that is written twice counts twice")
    if limit is None or (closed and limit >= len(names)):
        return
    spare = int(limit) - len(required)
    if closed and optional and spare >= 0 and math.comb(len(optional), spare) <= MAX_COMBINATIONS:
        choices = [set(kept) for kept in combinations(optional, spare)]
        add_all(node, [{"anyOf": [{"properties": {n: False for n in optional if n not in kept}} for kept in choices]}])
    elif not optional:
        node["maxProperties"] = int(limit)
    else:
        context.relax(location, "maxProperties", "there are too many optional properties to count")


def dependent_required(context: Context, node: dict[str, Any], schema: Mapping[str, Any], location: str) -> None:
    """Adds names that others demand to `node`."""
    for keyword in ("dependentRequired", "dependencies"):
        given = context.get(schema, keyword, location)
        if not isinstance(given, dict) or not given:
            continue
        if len(given) > 3 or not all(isinstance(needed, list) for needed in given.values()):
            context.relax(location, keyword, NOT_SUPPORTED)
            continue
        for name, needed in given.items():
            if needed:
                add_all(node, [{"anyOf": [{"properties": {name: False}}, {"required": list(needed)}]}])


def negation(context: Context, node: dict[str, Any], schema: Mapping[str, Any], location: str) -> bool:
    """Adds `not` to `node`; returns False if no value matches."""
    given = context.get(schema, "not", location, False)
    if given is False:
        return True
    if given is True or not given.keys() - ANNOTATIONS:
        return False
    kinds = given.get("type")
    if says_only(given, {"type"}) and not {"integer", "number"} & set(listed(kinds)):
        left = [k for k in listed(node.get("type", list(_ALL_TYPES))) if k not in listed(kinds)]
        if not left:
            return False
        node["type"] = left
    elif says_only(given, {"enum", "const"}) and "enum" in node:
        excluded = {value_key(v) for v in [*given.get("enum", ()), *([given["const"]] if "const" in given else ())]}
        node["enum"] = [v for v in node["enum"] if value_key(v) not in excluded]
        return bool(node["enum"])
    elif node.get("type") == "object" and only_required(given) is not None:
        add_all(node, [{"properties": {only_required(given): False}}])
    else:
        context.relax(location, "not", NOT_SUPPORTED)
    return True


def add_all(node: dict[str, Any], parts: list[Any]) -> None:
    """Adds conditions to a node: a first anyOf to the node itself, others to its allOf."""
    for part in parts:
        if set(part) == {"anyOf"} and "anyOf" not in node:
            node["anyOf"] = part["anyOf"]
        else:
            node.setdefault("allOf", []).append(part)
