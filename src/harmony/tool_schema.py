"""JSON Schemas of tools as the TypeScript-like text that gpt-oss was trained on.

Where openai-harmony's own renderer knows a keyword, the text is the same to the letter. Where it would drop something
or write `any` ($ref, anyOf, allOf, const, enums of other types, additionalProperties, bounds, patterns, keywords next
to a combinator), the meaning is written out instead: as a type where TypeScript has one, else as a trailing comment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from gptoss.harmony.conversation import FreeText, ToolDefinition, ToolNamespace
from gptoss.harmony.schema.combinators import (
    ANNOTATIONS,
    COMBINATORS,
    REFERENCE_KEYS,
    Schema,
    has_structure,
    merged,
    only_union,
    reference_of,
    split,
)
from gptoss.harmony.schema.references import References, Target
from gptoss.harmony.schema.text import bounds, comment_of, default_note, literal, notes_on, quoted, variant_notes

_PRIMITIVES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean", "null": "null"}
_NOT_PLAIN = COMBINATORS | REFERENCE_KEYS
_MAX_DEPTH = 32
# maximum characters of repeated references; later ones only name the type above: eight types that refer to each other
# would take seven million
_MOST_REPEATED = 8000


def render_tools(tools: Sequence[ToolDefinition]) -> str:
    """The `# Tools` section of the developer message."""
    return "# Tools\n\n" + render_namespace(ToolNamespace("functions", functions=tuple(tools)))


def render_namespace(space: ToolNamespace) -> str:
    """One namespace of a `# Tools` section."""
    lines = [f"## {space.name}\n"]
    if space.description:
        comment = "// " if space.functions else ""
        lines += [f"{comment}{line}" for line in space.description.split("\n")]
    if not space.functions:
        return "\n".join(lines)
    lines.append(f"namespace {space.name} {{\n")
    for tool in space.functions:
        lines += [f"// {line}" for line in _lines(tool.description or "")]
        if tool.free_text is not None:
            lines += [f"// {line}" for line in _definition(tool.free_text)]
            lines.append(f"type {tool.name} = (_: string) => any; // plain text, not JSON\n")
        elif tool.parameters:
            lines.append(f"type {tool.name} = {_Renderer(tool.parameters).signature()}\n")
        else:
            lines.append(f"type {tool.name} = () => any;\n")
    lines.append(f"}} // namespace {space.name}")
    return "\n".join(lines)


def _definition(wanted: FreeText) -> list[str]:
    """What the text of a custom tool must follow."""
    if wanted.syntax is None:
        return []
    kind = "Lark grammar" if wanted.syntax == "lark" else "regular expression"
    return [f"The text follows this {kind}:", *_lines(wanted.definition)]


def _lines(text: str) -> list[str]:
    """Splits lines as Rust's str::lines does: at newlines only; an empty text has none."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


class _Compound(str):
    """A type with an operator at the top level, which needs parentheses before `[]` and `&`."""


class _Renderer:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._references = References(root)
        self._open_refs: list[str] = []  # pointers
        self._written_refs: set[str] = set()  # pointers to types written in full
        self._ref_chars = 0
        self._notes: list[str] = []  # comments for the end of the line on which the type ends

    def signature(self) -> str:
        """The function's type, without its name."""
        kind = self.type_of(self._root, "")
        description = self._root.get("description")
        notes = [bounds(self._root), *self._notes]
        if isinstance(description, str) and f"// {description}\n" not in kind:
            notes.insert(0, description)
        return f"(_: {kind}{_newline_after_comment(kind)}) => any;{comment_of(notes)}"

    def type_of(self, schema: Any, indent: str, *, inline: bool = False) -> str:
        """The type of a schema.

        `inline`: on one line if possible, with comments of variants at the end of the line.
        """
        if schema is True or schema == {}:
            return "any"
        if schema is False:
            return "never"
        if len(indent) > 4 * _MAX_DEPTH:
            return f"any /* {literal(schema)} */"
        if schema.keys().isdisjoint(_NOT_PLAIN):
            kind = self._plain(schema, indent)
        elif not schema.keys().isdisjoint(REFERENCE_KEYS):
            return self._reference(schema, indent, inline)
        else:
            kind = self._combined(schema, indent, inline)
        return _with_null(schema, kind, indent) if "nullable" in schema else kind

    def _combined(self, schema: Schema, indent: str, inline: bool) -> str:
        """The intersection of the schema's own keywords and its combinators."""
        base, parts, unions = split(schema, self._target)
        if not inline and len(unions) == 1 and not parts and base is None:
            return self._union_on_lines(unions[0], indent, None)
        operands = [] if base is None else [self._plain(base, indent)]
        for part in parts:
            operands.append(self.type_of(part, indent, inline=True))
            self._notes += notes_on(part, operands[-1])
        operands += [self._union_inline(variants, indent) for variants in unions]
        said = list(dict.fromkeys(o for o in operands if o != "any"))
        if len(said) < 2:
            return said[0] if said else "any"
        return _Compound(" & ".join(map(_parenthesized, said)))

    def _union_inline(self, variants: Sequence[Any], indent: str) -> str:
        kinds = []
        for variant in variants:
            kinds.append(self.type_of(variant, indent, inline=True))
            notes = ", ".join(notes_on(variant, kinds[-1]))
            if notes:
                label = kinds[-1] if len(kinds[-1]) <= 40 and "\n" not in kinds[-1] else "object"
                self._notes.append(f"{label}: {notes}")
        return _union(kinds)

    def _union_on_lines(self, variants: Sequence[Any], indent: str, written: Any) -> str:
        """The union of variants. `written`: the description above it, which variants do not repeat."""
        lines = []
        for variant in variants:
            outer, self._notes = self._notes, []
            kind = self.type_of(variant, indent + "   ")
            notes = variant_notes(variant, kind, written) + self._notes
            lines.append(f"\n{indent} | {kind}{' // ' if notes else ''}{' '.join(notes)}")
            self._notes = outer
        return _Compound("".join(lines))

    def _plain(self, schema: Schema, indent: str) -> str:
        """The type of a schema without combinators."""
        literals = _literals(schema) if "enum" in schema or "const" in schema else None
        if literals is None:
            return self._by_type(schema, indent)
        if not has_structure(schema):
            return literals
        return _Compound(f"{_parenthesized(self._by_type(schema, indent))} & ({literals})")

    def _by_type(self, schema: Schema, indent: str) -> str:
        kind = schema.get("type")
        if kind.__class__ is str and kind in _PRIMITIVES:
            return _PRIMITIVES[kind]
        if isinstance(kind, list):
            return _union([self._by_type({**schema, "type": k}, indent) for k in kind])
        if kind is None and _is_object(schema):
            kind = "object"
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array" or (kind is None and ("items" in schema or "prefixItems" in schema)):
            return self._array(schema, indent)
        return "any"

    def _array(self, schema: Schema, indent: str) -> str:
        first, rest = _tuple(schema)
        if first:
            items = [self.type_of(item, indent, inline=True) for item in first]
            if rest is not None and rest is not False:
                items.append(f"...{self._array_of(rest, indent)}")
            return f"[{', '.join(items)}]"
        return "Array<any>" if rest is None else self._array_of(rest, indent)

    def _array_of(self, items: Any, indent: str) -> str:
        kind = self.type_of(items, indent, inline=True)
        return f"{kind}[]" if _is_string_enum(items) else f"{_parenthesized(kind)}[]"

    def _object(self, schema: Schema, indent: str) -> str:
        out = [f"{indent}// {schema['description']}\n"] if isinstance(schema.get("description"), str) else []
        out.append("{\n")
        properties = schema.get("properties") or {}
        required = list(schema.get("required") or ())
        names = set(required)
        for key, value in properties.items():
            out.append(self._property(key, value, key in names, indent))
        out += [f"{indent}{key}: any,\n" for key in required if key not in properties]
        extra = schema.get("additionalProperties")
        if extra is True or (isinstance(extra, Mapping)):
            out.append(self._more_properties(extra, indent))
        for pattern, value in (schema.get("patternProperties") or {}).items():
            out.append(self._more_properties(value, indent, [f"keys match {pattern}"]))
        out.append(f"{indent}}}")
        return "".join(out)

    def _more_properties(self, value: Any, indent: str, notes: Sequence[str] = ()) -> str:
        outer, self._notes = self._notes, []
        kind = self.type_of(value, indent + "    ", inline=True)
        comment = comment_of([*notes, *notes_on(value, kind), *self._notes])
        self._notes = outer
        return f"{indent}[key: string]: {kind},{comment}\n"

    def _property(self, key: str, value: Any, required: bool, indent: str) -> str:
        mark = "" if required else "?"
        if not isinstance(value, Mapping):
            return f"{indent}{key}{mark}: {self.type_of(value, indent)},\n"
        keys = value.keys()
        plain = keys.isdisjoint(COMBINATORS) or not keys.isdisjoint(REFERENCE_KEYS)
        alone = [] if plain else only_union(value, self._target)
        out = []
        if isinstance(value.get("title"), str):
            out.append(f"{indent}// {value['title']}\n{indent}//\n")
        description = value.get("description")
        above = f"{indent}// {description}\n" if isinstance(description, str) else ""
        if not alone:
            out.append(above)
        if value.get("examples"):
            out.append(f"{indent}// Examples:\n")
            out += [f"{indent}// - {quoted(example)}\n" for example in value["examples"]]
        outer, self._notes = self._notes, []
        if alone:
            out.append(above)
            if "default" in value:
                out.append(f"{indent}// {default_note(value)}\n")
            kind = self._union_on_lines(alone, indent, description)
            kind = f"{_with_null(value, kind, indent)}\n{indent}"
            notes = [bounds(value), *self._notes]
        else:
            kind = self.type_of(value, indent + "    ")
            kind = f"{kind}\n{indent}" if kind.startswith("\n") else f" {kind}"
            notes = [default_note(value), bounds(value), *self._notes]
        self._notes = outer
        out.append(f"{indent}{key}{mark}:{kind},{comment_of(notes)}\n")
        return "".join(out)

    def _reference(self, schema: Schema, indent: str, inline: bool) -> str:
        reference = reference_of(schema)
        name = unquote(reference.rsplit("/", 1)[-1])
        name = name.removeprefix("#") or name
        found = self._references.find(reference)
        if found is None:
            return _with_null(schema, f"any /* {reference} */", indent)
        if found.pointer in self._open_refs:
            return _with_null(schema, f"{name} /* recursive, as above */", indent)
        if found.pointer in self._written_refs and self._ref_chars > _MOST_REPEATED:
            return _with_null(schema, f"{name} /* as above */", indent)
        return self._written_out(schema, found, indent, inline)

    def _written_out(self, schema: Schema, found: Target, indent: str, inline: bool) -> str:
        before = self._ref_chars
        self._open_refs.append(found.pointer)
        text = self.type_of(merged(found.schema, schema), indent, inline=inline)
        if isinstance(found.schema, Mapping):
            known = [bounds(schema), *self._notes]
            self._notes += [note for note in [bounds(found.schema)] if note and note not in known]
        self._open_refs.pop()
        self._written_refs.add(found.pointer)
        self._ref_chars = before + len(text)
        return text

    def _target(self, schema: Any) -> Any:
        """The target of a reference, or the schema itself."""
        if not isinstance(schema, Mapping) or schema.keys().isdisjoint(REFERENCE_KEYS):
            return schema
        found = self._references.find(reference_of(schema))
        return found.schema if found is not None else None


def _tuple(schema: Schema) -> tuple[Sequence[Any], Any]:
    """Returns (schemas of an array's first items, schema of the others or None)."""
    items = schema.get("items")
    if isinstance(items, list):  # before draft 2020-12
        return items, schema.get("additionalItems")
    return schema.get("prefixItems") or (), items


def _is_string_enum(schema: Any) -> bool:
    """Whether openai-harmony supports the schema as items, which it writes without parentheses."""
    if not isinstance(schema, Mapping) or schema.keys() - ANNOTATIONS != {"type", "enum"}:
        return False
    values = schema["enum"]
    return schema["type"] == "string" and "nullable" not in schema and all(isinstance(v, str) for v in values)


def _is_object(schema: Schema) -> bool:
    return any(schema.get(key) for key in ("patternProperties", "required")) or "properties" in schema


def _literals(schema: Schema) -> str | None:
    """The values that a schema allows, if it lists them."""
    if "const" in schema:
        return literal(schema["const"])
    values = schema.get("enum")
    if not values:
        return None
    only_strings = all(isinstance(value, str) for value in values)
    return _union([quoted(value) if only_strings else literal(value) for value in values])


def _union(kinds: Sequence[str]) -> str:
    if len(kinds) < 2:
        return kinds[0] if kinds else "any"
    return _Compound(" | ".join(kinds))


def _parenthesized(kind: str) -> str:
    return f"({kind})" if isinstance(kind, _Compound) else kind


def _with_null(schema: Schema, kind: str, indent: str) -> str:
    if schema.get("nullable") is not True or _allows_null(schema):
        return kind
    return _Compound(f"{kind}\n{indent} | null" if kind.startswith("\n") else f"{kind} | null")


def _allows_null(schema: Any) -> bool:
    if not isinstance(schema, Mapping):
        return schema is True
    kind = schema.get("type")
    if kind == "null" or (isinstance(kind, list) and "null" in kind):
        return True
    if None in (schema.get("enum") or ()) or schema.get("const", ...) is None:
        return True
    variants = [*(schema.get("anyOf") or ()), *(schema.get("oneOf") or ())]
    return any(_allows_null(variant) for variant in variants)


def _newline_after_comment(kind: str) -> str:
    """The text that must follow a type whose last line ends in a comment."""
    return "\n" if kind.startswith("\n") and "//" in kind.rsplit("\n", 1)[-1] else ""
