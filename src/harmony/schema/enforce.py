"""Finds the part of a JSON schema that the grammar can enforce.

`enforceable` returns the schema for the grammar compiler, and what was left out of it. In strict mode nothing may be
left out; otherwise a keyword that the grammar lacks, or that does not compile, is relaxed and the rest is enforced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llguidance import LLMatcher

from gptoss.harmony.digest_cache import DigestCache
from gptoss.harmony.schema.checks import SchemaError, check_references, check_schema_shape
from gptoss.harmony.schema.context import ALL, Relaxed
from gptoss.harmony.schema.limits import check_size
from gptoss.harmony.schema.plain import is_plain
from gptoss.harmony.schema.rewrite import Rewriter

MAX_CACHED, MAX_CACHED_CHARS = 10_000, 32 * 2**20
UNSATISFIABLE = "Unsatisfiable"  # prefix of the compiler's errors for schemas that match nothing
MAX_ATTEMPTS = 24  # keywords that are left out, one by one, before the whole schema is
# the order in which keywords are left out of a schema that does not compile: those that narrow least come first
_SUSPECTS = (
    "format",
    "pattern",
    "multipleOf",
    "exclusiveMaximum",
    "exclusiveMinimum",
    "maximum",
    "minimum",
    "maxLength",
    "minLength",
    "maxItems",
    "minItems",
    "maxProperties",
    "minProperties",
    "dependentRequired",
    "dependencies",
    "propertyNames",
    "patternProperties",
    "not",
    "const",
    "enum",
    "required",
    "additionalProperties",
    "oneOf",
    "anyOf",
    "allOf",
    "$ref",
    "prefixItems",
    "items",
    "type",
    "properties",
)


_RESTRICTIONS = frozenset(_SUSPECTS) - {"type", "properties", "required", "items", "prefixItems", "patternProperties"}


@dataclass(frozen=True, slots=True)
class Enforced:
    schema: Mapping[str, Any]  # for the grammar: it allows only valid values, except for what was relaxed
    relaxed: tuple[Relaxed, ...] = ()
    num_properties: int = 0  # in total


_found: DigestCache[Enforced] = DigestCache(MAX_CACHED, MAX_CACHED_CHARS)


def enforceable(
    schema: Mapping[str, Any] | bool, strict: bool, *, arguments: bool = False, where: str = "schema"
) -> Enforced:
    """Returns the enforceable form of a schema.

    Args:
        arguments: for arguments of a tool, which are objects and closed unless the schema says otherwise (closing.py).
        where: names the schema in messages.

    Raises:
        SchemaError: the schema is not valid, or in strict mode cannot be enforced in full.
    """
    try:
        text = json.dumps(schema)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"{where}: {error}") from error

    def compute() -> Enforced:
        try:
            return _enforce(schema, strict, arguments, where, has_references="$ref" in text)
        except RecursionError:
            raise SchemaError(f"{where} is nested too deeply") from None

    return _found.get(f"{strict:d}{arguments:d}{where} {text}", compute)


def compile_error(schema: Mapping[str, Any]) -> str | None:
    """Why the grammar compiler refuses a schema, in one line; None if it does not."""
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    except (ValueError, RecursionError) as error:
        return str(error)
    problem = LLMatcher.validate_grammar(grammar, None)
    lines = problem.splitlines()
    return lines[-1] if lines and lines[0].startswith("regex parse error") else "".join(lines[:1]) or None


def _enforce(schema: Any, strict: bool, arguments: bool, where: str, *, has_references: bool) -> Enforced:
    check_schema_shape(schema, where)
    if has_references:
        check_references(schema, where)
    num_properties = check_size(schema, where)
    if arguments:
        _check_arguments(schema, where)
    blocked: dict[tuple[str, str], Relaxed] = {}
    for attempt in range(MAX_ATTEMPTS + 1):
        rewriter = Rewriter(schema, where, blocked, strict=strict, arguments=arguments)
        node = rewriter.rewrite_root()
        found = None if is_plain(rewriter) else _fault(rewriter, node)
        if strict and (rewriter.relaxed or (found and found.keyword != "format")):
            raise SchemaError(str(next(iter(rewriter.relaxed.values()), found)))
        if not found:
            if not arguments:
                _check_possible(rewriter)
            return Enforced(node, tuple(rewriter.relaxed.values()), num_properties)
        if attempt == MAX_ATTEMPTS - 1:
            found = Relaxed(where, ALL, found.reason, found.contradiction)
        blocked[found.location, found.keyword] = found
    raise AssertionError("any value at all compiles")


def _check_possible(rewriter: Rewriter) -> None:
    """Raises SchemaError if a schema contradicts itself so that no value can match."""
    contradiction = next((r for r in rewriter.relaxed.values() if r.contradiction), None)
    if contradiction is None:
        return
    faithful = rewriter.faithfully()
    node = faithful.rewrite_root()
    if compile_error(node) is not None or _endless(faithful, node) is not None:
        raise SchemaError(str(contradiction))


def _check_arguments(schema: Any, where: str) -> None:
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind and "object" not in ([kind] if isinstance(kind, str) else kind):
        raise SchemaError(f"{where}.type must be 'object', not {kind!r}")


def _fault(rewriter: Rewriter, node: dict[str, Any]) -> Relaxed | None:
    """The next keyword to leave out; None if the schema can be enforced."""
    return _endless(rewriter, node) or _refused(rewriter, node) or _never(rewriter)


def _refused(rewriter: Rewriter, node: dict[str, Any]) -> Relaxed | None:
    """The keyword to leave out of the smallest part that does not compile; None if the schema compiles."""
    error = compile_error(node)
    if error is None:
        return None
    where = rewriter.where
    if "recursion" in error:
        return Relaxed(where, ALL, "nested too deeply")
    for location, part in _smallest_first(rewriter):
        reason = compile_error(_with_definitions(part, rewriter))
        if reason is not None:
            return _suspect(rewriter, location, reason)
    return Relaxed(where, ALL, error, error.startswith(UNSATISFIABLE))


def _never(rewriter: Rewriter) -> Relaxed | None:
    """The keyword to leave out of an optional part that matches nothing.

    The compiler would omit such a part entirely.
    """
    for location, part in _smallest_first(rewriter):
        if "allOf" in part or len(part.keys() & _RESTRICTIONS) > 1:
            reason = compile_error(_with_definitions(part, rewriter))
            if reason is not None:
                return _suspect(rewriter, location, reason)
    return None


def _smallest_first(rewriter: Rewriter) -> list[tuple[str, dict[str, Any]]]:
    return sorted(rewriter.nodes.items(), key=lambda item: len(str(item[1])))


def _suspect(rewriter: Rewriter, location: str, reason: str) -> Relaxed:
    """The first keyword at this location without which it compiles, else all of it."""
    contradiction = reason.startswith(UNSATISFIABLE)
    for keyword in _SUSPECTS:
        if keyword not in rewriter.sources[location]:
            continue
        found = Relaxed(location, keyword, reason, contradiction)
        other = rewriter.without(found)
        other.rewrite_root()
        node = other.nodes.get(location)
        if node is None or compile_error(_with_definitions(node, other)) is None:
            return found
    return Relaxed(location, ALL, reason, contradiction)


def _with_definitions(node: Mapping[str, Any], rewriter: Rewriter) -> Mapping[str, Any]:
    return {**node, "$defs": rewriter.definitions} if rewriter.definitions else node


def _endless(rewriter: Rewriter, root: dict[str, Any]) -> Relaxed | None:
    """The keyword that requires infinitely nested values, if there is one."""
    ending = dict.fromkeys(rewriter.definitions, False)
    for _ in range(len(ending) + 1):
        ending = {name: _ends(node, ending) for name, node in rewriter.definitions.items()}
    if all(ending.values()) and _ends(root, ending):
        return None
    reason = "no finite value meets it"
    for location, node in rewriter.nodes.items():
        properties = node.get("properties", {})
        if any(not _ends(properties.get(name, True), ending) for name in node.get("required", ())):
            return Relaxed(location, "required", reason, contradiction=True)
        if not _ends({k: v for k, v in node.items() if k in ("minItems", "items", "prefixItems")}, ending):
            return Relaxed(location, "minItems", reason, contradiction=True)
    return Relaxed(rewriter.where, ALL, reason, contradiction=True)


def _ends(node: Any, ending: Mapping[str, bool]) -> bool:
    """Whether a finite value may match, given which definitions have one."""
    if isinstance(node, bool):
        return node
    reference = node.get("$ref")
    if reference is not None and not ending[reference.rpartition("/")[2]]:
        return False
    if "anyOf" in node and not any(_ends(variant, ending) for variant in node["anyOf"]):
        return False
    if not all(_ends(member, ending) for member in node.get("allOf", ())):
        return False
    properties = node.get("properties", {})
    if not all(_ends(properties.get(name, True), ending) for name in node.get("required", ())):
        return False
    first, least = node.get("prefixItems", []), node.get("minItems", 0)
    return all(_ends(item, ending) for item in first[:least]) and (
        least <= len(first) or _ends(node.get("items", True), ending)
    )
