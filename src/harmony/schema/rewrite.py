"""Rewrites a JSON schema so that the grammar compiler enforces it in full, and lists what is left out.

Only keywords that restrict values are kept. Those that the compiler lacks are rewritten if nothing is lost (`oneOf` of
variants that exclude each other, `nullable`, propertyNames, tuples of older drafts); the others are relaxed one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptoss.harmony.schema import closing, leaves
from gptoss.harmony.schema.closing import Level
from gptoss.harmony.schema.context import ALL, NOT_SUPPORTED, Context, Relaxed
from gptoss.harmony.schema.distinct import all_distinct, tag_of
from gptoss.harmony.schema.leaves import BOUNDS, add_all
from gptoss.harmony.schema.limits import MAX_ONE_OF_PAIRS
from gptoss.harmony.schema.patterns import any_name_but
from gptoss.harmony.schema.reading import (
    listed,
    name_pattern,
    one_pattern,
    only_required,
    says_only,
)
from gptoss.harmony.schema.references import References

Node = dict[str, Any] | bool
_JUST_RELAXED = ("if", "dependentSchemas", "contains", "unevaluatedItems")
_OF_STRINGS = frozenset({"minLength", "maxLength", "pattern", "format"})
_OF_ARRAYS = frozenset(
    {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "unevaluatedItems"}
)
_OF_OBJECTS = frozenset(
    {
        "properties",
        "patternProperties",
        "additionalProperties",
        "unevaluatedProperties",
        "propertyNames",
        "required",
        "minProperties",
        "maxProperties",
    }
)
_OF_NUMBERS = frozenset({*BOUNDS, "multipleOf"})
_COMBINED = frozenset(
    {
        *_JUST_RELAXED,
        "not",
        "$ref",
        "$recursiveRef",
        "$dynamicRef",
        "allOf",
        "anyOf",
        "oneOf",
        "dependentRequired",
        "dependencies",
    }
)
_ALONE = frozenset({"$ref", "allOf", "anyOf", "oneOf", "discriminator", "$schema", "$defs", "definitions"})


class Rewriter(Context):
    """Rewrites one schema.

    `blocked`: (location, keyword) -> why it is left out, known from an earlier attempt.
    """

    def __init__(
        self,
        root: Any,
        where: str,
        blocked: Mapping[tuple[str, str], Relaxed],
        *,
        strict: bool,
        arguments: bool,
        faithful: bool = False,
    ) -> None:
        """`arguments`: see enforceable.

        `faithful`: a schema that contradicts itself matches nothing, instead of being relaxed.
        """
        super().__init__(blocked, strict=strict)
        self.where, self._root, self._close, self._faithful = where, root, arguments, faithful
        self._references = References(root)
        self.definitions: dict[str, Node] = {}
        self.nodes: dict[str, dict[str, Any]] = {}  # by location
        self.sources: dict[str, Mapping[str, Any]] = {}
        self.name_patterns: set[str] = set()  # of undeclared names
        self.demands_nothing = False  # whether something required is impossible
        self._names: dict[tuple[str, bool, bool], str] = {}
        self._num_pairs = 0  # of compared variants

    def rewrite_root(self) -> dict[str, Any]:
        arguments = self._close
        node = self._rewrite(self._root, self.where, self._close, is_root=arguments)
        if isinstance(node, bool):
            node = {} if node else {"anyOf": []}
        if arguments:
            node = {**node, "type": "object"}
        return {**node, "$defs": self.definitions} if self.definitions else node

    def without(self, also: Relaxed) -> Rewriter:
        """A rewriter for another attempt, which also leaves out `also`."""
        blocked = {**self.blocked, (also.location, also.keyword): also}
        return self._again(blocked)

    def faithfully(self) -> Rewriter:
        return self._again(self.blocked, faithful=True)

    def _again(self, blocked: Mapping[tuple[str, str], Relaxed], *, faithful: bool = False) -> Rewriter:
        return Rewriter(self._root, self.where, blocked, strict=self.strict, arguments=self._close, faithful=faithful)

    def _rewrite(self, schema: Any, location: str, close: bool, *, part: bool = False, is_root: bool = False) -> Node:
        """Rewrites a schema.

        `close`: it alone decides which names are allowed; `part`: others apply to its value.
        """
        if isinstance(schema, bool):
            return schema
        known = self.blocked.get((location, ALL))
        if known is not None:
            self.leave_out(known)
            return not (self._faithful and known.contradiction)
        level = closing.sealed(schema, self._references)
        if close and level is None:
            level = closing.level_of(schema, self._references, is_root=is_root)
        level = level or Level()
        node: dict[str, Any] = {}
        leaves.values(self, node, schema, location)
        if not _OF_STRINGS.isdisjoint(schema):
            leaves.strings(self, node, schema, location)
        if not _OF_NUMBERS.isdisjoint(schema):
            leaves.numbers(self, node, schema, location)
        if not _OF_ARRAYS.isdisjoint(schema):
            self._arrays(node, schema, location)
        if not _OF_OBJECTS.isdisjoint(schema) or level.closed_over is not None:
            self._objects(node, schema, location, level, part=part)
        if not _COMBINED.isdisjoint(schema) and not self._combined(node, schema, location, level, part=part):
            return False
        if self._faithful and location in self.impossible:
            return False
        if schema.get("nullable") is True and not is_root:
            node = {"anyOf": [node, {"type": "null"}]}
        self.nodes[location], self.sources[location] = node, schema
        return node

    def _combined(
        self, node: dict[str, Any], schema: Mapping[str, Any], location: str, level: Level, *, part: bool
    ) -> bool:
        """Adds references, combinators and negation to `node`; returns False if no value matches."""
        for keyword in _JUST_RELAXED:
            says_nothing = {
                "if": schema.keys().isdisjoint(("then", "else")),
                "unevaluatedItems": schema.get(keyword) in (True, {}),
            }
            if keyword in schema and not says_nothing.get(keyword):
                self.relax(location, keyword, NOT_SUPPORTED)
        close = level.close_parts and self._close
        part = part or not (says_only(schema, _ALONE) and len(schema.keys() & _COMBINED) == 1)
        return leaves.negation(self, node, schema, location) and self._combinators(
            node, schema, location, close=close, part=part
        )

    def _arrays(self, node: dict[str, Any], schema: Mapping[str, Any], location: str) -> None:
        items = self.get(schema, "items", location)
        first, rest, rest_at = self.get(schema, "prefixItems", location), items, "items"
        if isinstance(items, list):  # before draft 2020-12
            first, rest, rest_at = (items, self.get(schema, "additionalItems", location), "additionalItems")
        first_at = "items" if isinstance(items, list) else "prefixItems"
        if first:
            node["prefixItems"] = [
                self._rewrite(inner, f"{location}.{first_at}[{index}]", self._close)
                for index, inner in enumerate(first)
            ]
        if rest is not None:
            node["items"] = self._rewrite(rest, f"{location}.{rest_at}", self._close)
            self.demands_nothing |= node["items"] is False
        elif first and schema.get("unevaluatedItems") is False:
            node["items"] = False
        for keyword in ("minItems", "maxItems"):
            count = self.get(schema, keyword, location)
            if count is not None and not (keyword == "minItems" and count == 0):
                node[keyword] = int(count)
        if schema.get("uniqueItems") is True and schema.get("maxItems", 2) > 1:
            self.relax(location, "uniqueItems", NOT_SUPPORTED)

    # --- objects ---

    def _objects(
        self, node: dict[str, Any], schema: Mapping[str, Any], location: str, level: Level, *, part: bool
    ) -> None:
        properties = {
            name: self._rewrite(inner, f"{location}.properties.{name}", self._close)
            for name, inner in (self.get(schema, "properties", location) or {}).items()
        }
        patterns, more = self._pattern_properties(schema, location), self._more(schema, location)
        if patterns is None:
            patterns, more = {}, True
        required = list(dict.fromkeys(self.get(schema, "required", location) or ()))
        if level.closed_over is not None:
            more, foreign = False, self._foreign_patterns(level, schema)
            properties |= {name: True for name in level.closed_over.names if name not in properties}
            if foreign is None:
                more = True
            else:
                patterns |= foreign
        properties, patterns, more = self._property_names(schema, location, properties, patterns, more)
        simple = not closing.has_parts(schema)
        if simple and more is False and not patterns:
            undeclared = [name for name in required if name not in properties]
            if undeclared:
                self.relax(location, "required", f"{undeclared[0]!r} may not be written", contradiction=True)
                required = [name for name in required if name in properties]
        if simple and not part and properties and more is not False and not patterns:
            # a declared name with escapes would be a second value for it
            other = any_name_but(properties)
            if other is not None:
                self.name_patterns.add(other)
                patterns, more = {other: more}, False
        if properties:
            node["properties"] = properties
        if required:
            node["required"] = required
        if patterns:
            node["patternProperties"] = patterns
        if more is not True:
            node["additionalProperties"] = more
        self.demands_nothing |= any(properties.get(name) is False for name in required)
        leaves.property_counts(self, node, schema, location)

    def _more(self, schema: Mapping[str, Any], location: str) -> Node:
        """The schema of undeclared properties."""
        keyword = "additionalProperties"
        more = self.get(schema, keyword, location, True)
        if more is True and "unevaluatedProperties" in schema:
            keyword = "unevaluatedProperties"
            more = self.get(schema, keyword, location, True)
            if more is False and closing.has_names_of_variants(schema, self._references):
                self.relax(location, keyword, "the names of other variants may be written")
            elif more not in (True, False, {}) and closing.has_parts(schema):
                self.relax(location, keyword, "not enforced next to schemas that are combined")
                return True
        return self._rewrite(more, f"{location}.{keyword}", self._close)

    def _pattern_properties(self, schema: Mapping[str, Any], location: str) -> dict[str, Node] | None:
        """The rewritten patternProperties; None if their names cannot be distinguished from others."""
        given = self.get(schema, "patternProperties", location)
        if given is None:
            return None if "patternProperties" in schema else {}
        out: dict[str, Node] = {}
        for pattern, inner in given.items():
            translated = one_pattern(pattern)
            if translated is None:
                self.relax(location, "patternProperties", f"the grammar has no expression for {pattern!r}")
                return None
            out[translated] = self._rewrite(inner, f"{location}.patternProperties.{pattern}", self._close)
        return out

    def _foreign_patterns(self, level: Level, schema: Mapping[str, Any]) -> dict[str, Node] | None:
        """The patterns that parts of a closed level declare, to be allowed; None if one cannot be translated."""
        assert level.closed_over is not None
        out: dict[str, Node] = {}
        for pattern in level.closed_over.patterns:
            if pattern not in (schema.get("patternProperties") or {}):
                translated = one_pattern(pattern)
                if translated is None:
                    return None
                out[translated] = True
        return out

    def _property_names(
        self,
        schema: Mapping[str, Any],
        location: str,
        properties: dict[str, Node],
        patterns: dict[str, Node],
        more: Node,
    ) -> tuple[dict[str, Node], dict[str, Node], Node]:
        """Applies propertyNames: listed names become properties, a pattern of names becomes a patternProperty."""
        rule = self.get(schema, "propertyNames", location)
        rule = self._follow(rule)
        if not isinstance(rule, dict) or says_only(rule, {"type"}) and "string" in listed(rule.get("type", "string")):
            if rule is False:
                return dict.fromkeys(properties, False), {}, False
            return properties, patterns, more
        names = [rule["const"]] if "const" in rule else rule.get("enum")
        if names is not None and says_only(rule, {"type", "const", "enum"}) and not patterns:
            kept: dict[str, Node] = {name: properties.get(name, more) for name in names if isinstance(name, str)}
            dropped: dict[str, Node] = {name: False for name in properties if name not in kept}
            return ({n: s for n, s in (kept | dropped).items() if s is not False or n in properties}, {}, False)
        pattern = name_pattern(rule)
        if pattern is not None and not patterns and not properties:
            return {}, {pattern: more} if more is not False else {}, False
        self.relax(location, "propertyNames", NOT_SUPPORTED)
        return properties, patterns, more

    def _follow(self, schema: Any) -> Any:
        for _ in range(8):
            if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
                break
            found = self._references.find(schema["$ref"])
            if found is None:
                break
            schema = found.schema
        return schema

    # --- combinations ---

    def _combinators(
        self, node: dict[str, Any], schema: Mapping[str, Any], location: str, *, close: bool, part: bool
    ) -> bool:
        """Adds references, allOf, anyOf and oneOf to `node`; returns False if no value matches."""
        self._reference(node, schema, location, close=close, part=part)
        members = self.get(schema, "allOf", location) or []
        several = part or len(members) > 1
        parts = [self._rewrite(m, f"{location}.allOf[{i}]", close, part=several) for i, m in enumerate(members)]
        if False in parts:
            return False
        add_all(node, [part for part in parts if part not in (True, {})])
        for keyword in ("anyOf", "oneOf"):
            given = self.get(schema, keyword, location)
            if given is None:
                continue
            if not given:
                self.relax(location, keyword, "there is no variant", contradiction=True)
                continue
            variants = [self._rewrite(v, f"{location}.{keyword}[{i}]", close, part=part) for i, v in enumerate(given)]
            if keyword == "oneOf":
                variants = self._exclusive(variants, schema, location)
            variants = [variant for variant in variants if variant is not False]
            if not variants:
                return False
            if not any(variant in (True, {}) for variant in variants):
                add_all(node, [{"anyOf": variants}])
        leaves.dependent_required(self, node, schema, location)
        return True

    def _reference(
        self, node: dict[str, Any], schema: Mapping[str, Any], location: str, *, close: bool, part: bool
    ) -> None:
        keyword = next((k for k in ("$ref", "$recursiveRef", "$dynamicRef") if k in schema), None)
        reference = None if keyword is None else self.get(schema, keyword, location)
        if keyword is None or reference is None:
            return
        target = self._references.find(reference)
        if target is None:
            self.relax(location, keyword, f"{reference!r} leads to nothing in this schema")
            return
        key = (target.pointer, close, part)
        if key not in self._names:
            name = self._names[key] = f"d{len(self._names)}"
            self.definitions[name] = True
            where = self.where + target.pointer.replace("/", ".")
            self.definitions[name] = self._rewrite(target.schema, where, close, part=part)
        node["$ref"] = f"#/$defs/{self._names[key]}"

    def _exclusive(self, variants: list[Node], schema: Mapping[str, Any], location: str) -> list[Node]:
        """The variants of a oneOf, changed if possible so that no value can match two of them."""
        self._num_pairs += len(variants) * (len(variants) - 1) // 2
        if self._num_pairs > MAX_ONE_OF_PAIRS:
            self.relax(location, "oneOf", "there are too many variants to compare: enforced as anyOf")
            return variants
        names = [only_required(variant) for variant in schema["oneOf"]]
        if len(set(names)) == len(names) > 1 and None not in names:
            return [
                {"required": [name], "properties": {other: False for other in names if other != name}} for name in names
            ]
        kept: list[Node] = [variant for variant in variants if variant is not False]
        if all_distinct(kept, self.definitions):
            return kept
        discriminator = schema.get("discriminator")
        named = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        tag = tag_of(kept, self.definitions, named)
        if tag is not None:
            return [_with_required(variant, tag) for variant in kept]
        self.relax(location, "oneOf", "its variants may overlap: enforced as anyOf")
        return kept


def _with_required(node: Node, name: str) -> Node:
    if isinstance(node, bool) or name in node.get("required", ()):
        return node
    return {**node, "required": [*node.get("required", ()), name]}
