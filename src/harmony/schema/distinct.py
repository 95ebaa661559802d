"""Decides whether no value can match two schemas, which makes a `oneOf` equivalent to an `anyOf`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Definitions = Mapping[str, Any]
_TYPES = frozenset({"string", "number", "boolean", "null", "object", "array"})


def all_distinct(variants: Sequence[Any], definitions: Definitions) -> bool:
    return all(distinct(one, other, definitions) for index, one in enumerate(variants) for other in variants[:index])


def distinct(one: Any, other: Any, definitions: Definitions, depth: int = 0) -> bool:
    """Whether two rewritten schemas, with `$ref` to `definitions`, exclude each other.

    False if that is unknown.
    """
    if one is False or other is False:
        return True
    if depth > 8 or not isinstance(one, dict) or not isinstance(other, dict):
        return False
    one, other = merged(one, definitions), merged(other, definitions)
    for a, b in ((one, other), (other, one)):
        for variants in a.get("anyOfs", ()):
            if all(distinct(variant, b, definitions, depth + 1) for variant in variants):
                return True
    if _values_differ(one, other) or not _types(one) & _types(other):
        return True
    if _types(one) & _types(other) == {"object"}:
        return _objects_differ(one, other, definitions, depth)
    return _types(one) | _types(other) == {"number"} and (
        _ends(one)[1] < _ends(other)[0] or _ends(other)[1] < _ends(one)[0]
    )


def merged(schema: Mapping[str, Any], definitions: Definitions) -> dict[str, Any]:
    """A schema merged with its references and its allOf; its variants become a list of lists, `anyOfs`."""
    out: dict[str, Any] = {"anyOfs": []}
    parts: list[Any] = [schema]
    for _ in range(100):
        if not parts:
            break
        part = parts.pop()
        if not isinstance(part, dict):
            continue
        if isinstance(part.get("$ref"), str):
            parts.append(definitions.get(part["$ref"].rpartition("/")[2]))
        parts += part.get("allOf") or ()
        for keyword, value in part.items():
            if keyword == "anyOf":
                out["anyOfs"].append(value)
            elif keyword == "properties":
                out[keyword] = {**value, **{k: v for k, v in out.get(keyword, {}).items() if v is not True}}
            elif keyword == "required":
                out[keyword] = [*out.get(keyword, ()), *value]
            else:
                out.setdefault(keyword, value)
    return out


def tag_of(variants: Sequence[Any], definitions: Definitions, named: Any = None) -> str | None:
    """A property that has different values in each variant. `named`: the one that the schema names."""
    views = [merged(v, definitions) if isinstance(v, dict) else {} for v in variants]
    if not views or any(_types(view) != {"object"} and "properties" not in view for view in views):
        return None
    candidates = [named] if isinstance(named, str) else []
    for name in [*candidates, *views[0].get("properties", ())]:
        tags = [view.get("properties", {}).get(name) for view in views]
        if all(_values(tag, definitions) is not None for tag in tags) and all_distinct(tags, definitions):
            return str(name)
    return None


def value_key(value: Any) -> str:
    """A key that is equal for values that are equal in JSON Schema: 1 and 1.0, but not True."""
    if isinstance(value, float) and value.is_integer() and not math.isinf(value):
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(value_key, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{json.dumps(k)}:{value_key(value[k])}' for k in sorted(value))}}}"
    return json.dumps(value)


def type_of(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    kinds = {str: "string", int: "number", float: "number", type(None): "null", list: "array"}
    return kinds.get(type(value), "object")


def _values(schema: Any, definitions: Definitions) -> set[str] | None:
    if not isinstance(schema, dict):
        return None
    view = merged(schema, definitions)
    if "const" in view:
        return {value_key(view["const"])}
    return {value_key(v) for v in view["enum"]} if "enum" in view else None


def _values_differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    first, second = _values(one, {}), _values(other, {})
    if first is not None and second is not None:
        return not first & second
    return False


def _types(view: Mapping[str, Any]) -> set[str]:
    if "const" in view:
        return {type_of(view["const"])}
    if "enum" in view:
        return {type_of(value) for value in view["enum"]}
    kind = view.get("type")
    if kind is None:
        return set(_TYPES)
    return {"number" if k == "integer" else k for k in ([kind] if isinstance(kind, str) else kind)}


def _objects_differ(one: Mapping[str, Any], other: Mapping[str, Any], definitions: Definitions, depth: int) -> bool:
    for a, b in ((one, other), (other, one)):
        others = b.get("properties", {})
        for name in a.get("required", ()):
            if others.get(name) is False:
                return True
            if name not in others:
                if b.get("additionalProperties") is False and not b.get("patternProperties"):
                    return True
            elif name in b.get("required", ()) and distinct(
                a.get("properties", {}).get(name), others[name], definitions, depth + 1
            ):
                return True
    return False


def _ends(view: Mapping[str, Any]) -> tuple[float, float]:
    """The (lowest, highest) number."""
    low = max(view.get("minimum", -math.inf), view.get("exclusiveMinimum", -math.inf))
    return low, min(view.get("maximum", math.inf), view.get("exclusiveMaximum", math.inf))
