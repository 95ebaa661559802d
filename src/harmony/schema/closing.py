"""Decides which objects are closed: allow only declared names.

JSON Schema allows any additional properties unless it says otherwise, and a guided model would invent
some. An object is closed over the union of the names that it, its `allOf` and its variants declare. A variant is closed
by itself only where the object that holds the combinator declares no names. These stay open: an object that declares no
name (but for a tool's arguments with `properties: {}`), one whose `required` or `minProperties` could not be met if it
were closed, and one with additionalProperties of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gptoss.harmony.schema.references import References

_PARTS = frozenset({"$ref", "allOf", "anyOf", "oneOf", "if", "then", "else", "dependentSchemas"})
_SAYS_WHAT_ELSE = ("additionalProperties", "unevaluatedProperties")


@dataclass(slots=True)
class Declared:
    """The names that a schema, and those that apply with it, declare for an object."""

    names: dict[str, None] = field(default_factory=dict)  # in order
    patterns: dict[str, None] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    at_least: int = 0
    open: bool = False  # somewhere further properties are allowed explicitly

    def add(self, other: Declared) -> None:
        self.names |= other.names
        self.patterns |= other.patterns
        self.required |= other.required
        self.at_least = max(self.at_least, other.at_least)
        self.open = self.open or other.open

    def can_be_closed(self) -> bool:
        if self.open:
            return False
        return bool(self.patterns) or (self.required <= self.names.keys() and self.at_least <= len(self.names))


@dataclass(frozen=True, slots=True)
class Level:
    """One object: the schema that holds the combinators, and its parts."""

    closed_over: Declared | None = None
    close_parts: bool = False  # each part decides for itself


def level_of(schema: Mapping[str, Any], references: References, *, is_root: bool = False) -> Level:
    if any(keyword in schema for keyword in _SAYS_WHAT_ELSE):
        return Level()
    own = _own(schema)
    if not has_parts(schema):
        named = own.names or (is_root and "properties" in schema)
        return Level(own if named and own.can_be_closed() else None, close_parts=True)
    groups = [group for group in _groups(schema, references) if group.names]
    total = Declared()
    for declared in (own, *_groups(schema, references)):
        total.add(declared)
    if not total.names and not (is_root and "properties" in schema):
        return Level(close_parts=True)
    if not own.names and len(groups) == 1:
        met = Declared(total.names, total.patterns, own.required, own.at_least).can_be_closed()
        return Level(close_parts=met)
    return Level(total if total.can_be_closed() else None)


def sealed(schema: Mapping[str, Any], references: References) -> Level | None:
    """The level of an object with `unevaluatedProperties: false` and combined schemas."""
    if schema.get("unevaluatedProperties") is not False or "additionalProperties" in schema:
        return None
    total = declared_by({k: v for k, v in schema.items() if k != "unevaluatedProperties"}, references)
    return None if total.open else Level(total)


def has_parts(schema: Mapping[str, Any]) -> bool:
    return not _PARTS.isdisjoint(schema)


def has_names_of_variants(schema: Any, references: References) -> bool:
    """Whether some names are declared only by one of several variants."""
    if not isinstance(schema, dict):
        return False
    for keyword in ("anyOf", "oneOf", "if", "then", "else", "dependentSchemas"):
        if keyword in schema:
            declared = declared_by({keyword: schema[keyword]}, references)
            if declared.names or declared.patterns:
                return True
    found = references.find(schema["$ref"]) if isinstance(schema.get("$ref"), str) else None
    members = [*(schema.get("allOf") or ()), *([found.schema] if found is not None else ())]
    return any(has_names_of_variants(member, references) for member in members)


def _own(schema: Mapping[str, Any]) -> Declared:
    return Declared(
        names=dict.fromkeys(schema.get("properties") or ()),
        patterns=dict.fromkeys(schema.get("patternProperties") or ()),
        required=set(schema.get("required") or ()),
        at_least=int(schema.get("minProperties") or 0),
        open=any(schema.get(keyword, False) is not False for keyword in _SAYS_WHAT_ELSE),
    )


def _groups(schema: Mapping[str, Any], references: References) -> Iterator[Declared]:
    """The names that each part declares.

    A part is a reference, a member of allOf, or all variants of a combinator.
    """
    for parts in _parts(schema, references):
        group = Declared()
        for part in parts:
            group.add(declared_by(part, references))
        yield group


def _parts(schema: Mapping[str, Any], references: References) -> Iterator[list[Any]]:
    reference = schema.get("$ref")
    if isinstance(reference, str) and (found := references.find(reference)) is not None:
        yield [found.schema]
    for member in schema.get("allOf") or ():
        yield [member]
    for keyword in ("anyOf", "oneOf"):
        if schema.get(keyword):
            yield list(schema[keyword])
    yield [schema[keyword] for keyword in ("if", "then", "else") if keyword in schema]
    yield list((schema.get("dependentSchemas") or {}).values())


def declared_by(schema: Any, references: References) -> Declared:
    """The names that a schema declares. Circular references must have been refused (check_references)."""
    if not isinstance(schema, dict):
        return Declared()
    declared = _own(schema)
    for group in _groups(schema, references):
        declared.add(group)
    return declared
