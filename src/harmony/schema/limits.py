"""Limits the size of schemas.

The grammar compiler's time is not linear in it, and it cannot be interrupted. Measured on one core at these limits: 0.9
s for 5,000 properties of one object, 1 s for 5,000 values of an `enum` that are objects, 0.7 s for 10,000 properties of
schemas that `allOf` joins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptoss.harmony.schema.checks import SchemaError, walk
from gptoss.harmony.schema.references import References

MAX_PROPERTIES = 5_000
MAX_JOINED_PROPERTIES = 10_000  # properties of schemas joined by allOf or $ref count at each location
MAX_PATTERNS = 100  # of names; each is compared with all others
MAX_ENUM_VALUES = 5_000
MAX_ONE_OF_PAIRS = 100_000  # compared variants: 447 of one oneOf


def check_size(schema: Any, where: str) -> int:
    """Returns the number of properties. Raises SchemaError naming `where` if the schema is too large.

    References must not be circular.
    """
    references, known = References(schema), dict[int, int]()

    def joined(part: Any) -> int:
        """Counts the properties of a schema and of those that it joins."""
        if not isinstance(part, dict):
            return 0
        if id(part) not in known:
            target = references.find(part["$ref"]) if isinstance(part.get("$ref"), str) else None
            members = [*(part.get("allOf") or ()), *([target.schema] if target is not None else ())]
            known[id(part)] = len(part.get("properties") or ()) + sum(map(joined, members))
        return known[id(part)]

    num_properties = num_joined = num_patterns = num_values = 0
    for _, part in walk(schema, where):
        own = len(part.get("properties") or ())
        num_properties += own
        num_joined += joined(part) if _joins(part) else own
        num_patterns += len(part.get("patternProperties") or ())
        num_values += len(part.get("enum") or ())
    for number, limit, what in (
        (num_properties, MAX_PROPERTIES, "properties"),
        (num_joined, MAX_JOINED_PROPERTIES, "properties where it joins schemas"),
        (num_patterns, MAX_PATTERNS, "names in patternProperties"),
        (num_values, MAX_ENUM_VALUES, "values in enum"),
    ):
        if number > limit:
            raise SchemaError(f"{where} has {number} {what} in all; at most {limit} are allowed")
    return num_properties


def _joins(part: Mapping[str, Any]) -> bool:
    return "allOf" in part or ("$ref" in part and len(part) > 1)
