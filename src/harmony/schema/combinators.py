"""Splits a JSON schema into its own keywords, its references and its combinators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

ANNOTATIONS = frozenset(
    (
        "title",
        "description",
        "default",
        "example",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "nullable",
        "discriminator",
        "$schema",
        "$id",
        "$anchor",
        "$dynamicAnchor",
        "$recursiveAnchor",
        "$comment",
        "$defs",
        "definitions",
    )
)
COMBINATORS = frozenset(("allOf", "anyOf", "oneOf"))
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
REFERENCE_KEYS = frozenset(_REFERENCES)
# keywords that determine a schema's type
_TYPED = frozenset(
    ("type", "properties", "patternProperties", "required", "items", "prefixItems", "const", "enum")
).union(COMBINATORS, _REFERENCES)


def reference_of(schema: Schema) -> str:
    """The first reference of a schema."""
    return str(next(schema[key] for key in _REFERENCES if key in schema))


def merged(target: Any, schema: Schema) -> Any:
    """A reference's target merged with the keywords next to `$ref`; an intersection if they disagree."""
    siblings = {k: v for k, v in schema.items() if k not in REFERENCE_KEYS}
    if not isinstance(target, Mapping):
        return target
    both = siblings.keys() & target.keys() - ANNOTATIONS
    if all(siblings[key] == target[key] for key in both):
        return {**target, **siblings}
    if both == {"required"}:
        required = dict.fromkeys([*target["required"], *siblings["required"]])
        return {**target, **siblings, "required": list(required)}
    shown = {k: v for k, v in siblings.items() if k in ANNOTATIONS}
    own = {k: v for k, v in siblings.items() if k not in ANNOTATIONS}
    return {"allOf": [target, own], **shown}


def split(schema: Schema, target: Any) -> tuple[Schema | None, list[Any], list[list[Any]]]:
    """Splits a schema into its own keywords, the schemas of `allOf` and the variants of each union.

    The keywords are None if they constrain nothing.

    Keywords that constrain nothing by themselves are handed down: the type to variants that have none, and required
    names to the variants that declare them. `target` resolves a reference.
    """
    parts = list(schema.get("allOf") or ())
    unions = [list(schema[key]) for key in ("oneOf", "anyOf") if schema.get(key)]
    if not parts and not unions:
        return schema, [], []
    base = {k: v for k, v in schema.items() if k not in COMBINATORS}
    kind = base.get("type")
    missing = [n for n in base.get("required") or () if n not in (base.get("properties") or {})]
    if kind is not None or missing:
        declared = _declared(missing, parts, unions, target)
        if declared:
            base["required"] = [n for n in base["required"] if n not in declared]
        parts = [_handed_down(v, kind, missing, target) for v in parts]
        unions = [[_handed_down(v, kind, missing, target) for v in group] for group in unions]
    says = has_structure(base) or _has_values(base) or bool(base.get("required"))
    return (base if says else None), parts, unions


def _declared(names: Sequence[str], parts: Sequence[Any], unions: Sequence[Sequence[Any]], target: Any) -> set[str]:
    """The names that a schema of `allOf`, or every variant of a union, declares."""
    return {
        name
        for name in names
        if any(_declares(target(part), name) for part in parts)
        or any(all(_declares(target(v), name) for v in variants) for variants in unions)
    }


def only_union(schema: Schema, target: Any) -> list[Any]:
    """The variants of a schema that is only a union."""
    base, parts, unions = split(schema, target)
    return unions[0] if base is None and not parts and len(unions) == 1 else []


def _handed_down(schema: Any, kind: Any, missing: Sequence[str], target: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    more: dict[str, Any] = {}
    if kind is not None and not schema.keys() & _TYPED:
        more["type"] = kind
    names = [name for name in missing if _declares(target(schema), name)]
    if names:
        more["required"] = list(dict.fromkeys([*(schema.get("required") or ()), *names]))
    return {**schema, **more} if more else schema


def _declares(schema: Any, name: str) -> bool:
    return isinstance(schema, Mapping) and name in (schema.get("properties") or {})


def has_structure(schema: Schema) -> bool:
    """Whether a schema describes the content of an object or an array."""
    keys = ("properties", "patternProperties", "prefixItems", "items", "additionalProperties")
    return any(schema.get(key) for key in keys)


def _has_values(schema: Schema) -> bool:
    """Whether a schema lists its allowed values."""
    return "const" in schema or bool(schema.get("enum"))
