"""Recognises plain schemas, which certainly compile.

Most tools have one, and a trial compilation would take most of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from gptoss.harmony.schema.rewrite import Rewriter

MAX_DEPTH = 60  # the compiler's limit is 128
_ALONE = frozenset({"anyOf"})
_KEYWORDS = frozenset(
    {
        "type",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "items",
        "enum",
        "minLength",
        "maxLength",
        "minItems",
        "maxItems",
        "minimum",
        "maximum",
    }
)
_PAIRS = (("minLength", "maxLength"), ("minItems", "maxItems"), ("minimum", "maximum"))
_LARGEST = 2**53


def is_plain(rewriter: Rewriter) -> bool:
    """Whether the rewritten schema certainly compiles and each part of it can match."""
    if rewriter.definitions or rewriter.demands_nothing or rewriter.where not in rewriter.nodes:
        return False
    return all(
        _is_plain(node, rewriter.name_patterns) and location.count(".") < MAX_DEPTH
        for location, node in rewriter.nodes.items()
    )


def _is_plain(node: Mapping[str, Any], name_patterns: Set[str]) -> bool:
    if node.keys() == _ALONE:
        return len(node["anyOf"]) > 0
    if not node.keys() <= _KEYWORDS:
        return False
    if "patternProperties" in node and not node["patternProperties"].keys() <= name_patterns:
        return False
    if "enum" in node and not node.keys() <= {"enum", "type"}:
        return False
    for lower, upper in _PAIRS:
        low, high = node.get(lower, 0), node.get(upper)
        if abs(low) > _LARGEST or (high is not None and (abs(high) > _LARGEST or (lower in node and low > high))):
            return False
    return all(inner is not False for inner in node.get("properties", {}).values())
