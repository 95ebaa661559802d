"""JSON Schemas of tools as the TypeScript-like text that gpt-oss was trained on.

Where openai-harmony's own renderer knows a keyword, the text is the same to the letter. Where it would drop something
or write `any` ($ref, anyOf, allOf, const, enums of other types, additionalProperties, bounds, patterns), the meaning
is written out instead: as a type where TypeScript has one, else as a trailing comment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Schema = Mapping[str, Any]

_PRIMITIVES = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
}
_BOUNDS = (
    "format", "pattern", "minLength", "maxLength", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum",
    "multipleOf", "minItems", "maxItems", "uniqueItems", "minProperties", "maxProperties",
)  # fmt: skip
_MAX_DEPTH = 32
# characters that references may write again and again before they only name what stands above: eight types that refer
# to one another would be seven million
_MOST_REPEATED = 8000


def render_tools(tools: Sequence[Mapping[str, Any]]) -> str:
    """OpenAI function definitions ({name, description, parameters}) -> the `# Tools` section."""
    lines = ["## functions\n", "namespace functions {\n"]
    for tool in tools:
        lines += [f"// {line}" for line in _lines(tool.get("description") or "")]
        parameters = tool.get("parameters")
        if parameters:
            lines.append(
                f"type {tool['name']} = (_: {_Renderer(parameters).type_of(parameters, '')}) => any;\n"
            )
        else:
            lines.append(f"type {tool['name']} = () => any;\n")
    lines.append("} // namespace functions")
    return "# Tools\n\n" + "\n".join(lines)


_SCHEMAS_IN_MAP = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS_IN_LIST = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA = ("items", "additionalProperties", "not")


def check_shape(schema: Any, where: str) -> None:
    """Raises ValueError naming the place where `schema` is no JSON schema: a keyword with a value of the wrong type."""
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} must be an object or a boolean")
    kind = schema.get("type", "object")
    if not isinstance(kind, str) and not (
        isinstance(kind, list) and all(isinstance(k, str) for k in kind)
    ):
        raise ValueError(f"{where}.type must be a string or a list of strings")
    for key in _SCHEMAS_IN_MAP:
        if not isinstance(schema.get(key, {}), Mapping):
            raise ValueError(f"{where}.{key} must be an object")
        for name, inner in schema.get(key, {}).items():
            check_shape(inner, f"{where}.{key}.{name}")
    for key in _SCHEMAS_IN_LIST:
        if not isinstance(schema.get(key, []), list):
            raise ValueError(f"{where}.{key} must be a list")
        for index, inner in enumerate(schema.get(key, [])):
            check_shape(inner, f"{where}.{key}[{index}]")
    for key in _SCHEMA:
        if key in schema:
            check_shape(schema[key], f"{where}.{key}")
    for key in ("enum", "required", "examples"):
        if not isinstance(schema.get(key, []), list):
            raise ValueError(f"{where}.{key} must be a list")
    if not all(isinstance(name, str) for name in schema.get("required", [])):
        raise ValueError(f"{where}.required must hold strings")
    if not isinstance(schema.get("$ref", ""), str):
        raise ValueError(f"{where}.$ref must be a string")


def _lines(text: str) -> list[str]:
    """Splits like Rust's str::lines: at newlines only, none for an empty text."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class _Renderer:
    def __init__(self, root: Schema) -> None:
        self._root = root
        self._open_refs: list[str] = []
        self._written_refs: set[str] = set()  # in full
        self._ref_chars = 0

    def type_of(self, schema: Any, indent: str) -> str:
        if schema is True or schema == {}:
            return "any"
        if schema is False:
            return "never"
        if len(indent) > 4 * _MAX_DEPTH:
            return f"any /* {_literal(schema)} */"
        if "$ref" in schema:
            return self._reference(schema, indent)
        variants = schema.get("oneOf") or schema.get("anyOf")
        if variants:
            return "".join(
                f"\n{indent} | {self._variant(v, indent)}{_trailing(v, with_description=True)}"
                for v in variants
            )
        if "allOf" in schema:
            return self._intersection(schema, indent)
        if "const" in schema:
            return _literal(schema["const"])
        if schema.get("enum"):
            return " | ".join(map(_literal, schema["enum"]))
        return self._by_type(schema, indent)

    def _by_type(self, schema: Schema, indent: str) -> str:
        kind = schema.get("type")
        if isinstance(kind, list):
            return " | ".join(self._by_type({**schema, "type": k}, indent) for k in kind) or "any"
        if kind is None:
            kind = "object" if "properties" in schema else "array" if "items" in schema else None
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array":
            if schema.get("prefixItems"):
                return (
                    "["
                    + ", ".join(self.type_of(item, indent) for item in schema["prefixItems"])
                    + "]"
                )
            return (
                f"{self.type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
            )
        return _PRIMITIVES.get(str(kind), "any")

    def _object(self, schema: Schema, indent: str) -> str:
        out = (
            [f"{indent}// {schema['description']}\n"]
            if isinstance(schema.get("description"), str)
            else []
        )
        out.append("{\n")
        required = set(schema.get("required") or ())
        for key, value in (schema.get("properties") or {}).items():
            out.append(self._property(key, value, key in required, indent))
        extra = schema.get("additionalProperties")
        if extra is True or (isinstance(extra, Mapping)):
            out.append(f"{indent}[key: string]: {self.type_of(extra, indent + '    ')},\n")
        for pattern, value in (schema.get("patternProperties") or {}).items():
            out.append(
                f"{indent}[key: string]: {self.type_of(value, indent + '    ')}, // keys match {pattern}\n"
            )
        out.append(f"{indent}}}")
        return "".join(out)

    def _property(self, key: str, value: Any, required: bool, indent: str) -> str:
        mark = "" if required else "?"
        if not isinstance(value, Mapping):
            return f"{indent}{key}{mark}: {self.type_of(value, indent)},\n"
        variants = value.get("oneOf") or value.get("anyOf")
        out = []
        if isinstance(value.get("title"), str):
            out.append(f"{indent}// {value['title']}\n{indent}//\n")
        description = value.get("description")
        if isinstance(description, str) and not variants:
            out.append(f"{indent}// {description}\n")
        examples = [e for e in value.get("examples") or () if isinstance(e, str)]
        if value.get("examples"):
            out.append(
                f"{indent}// Examples:\n" + "".join(f'{indent}// - "{e}"\n' for e in examples)
            )
        if variants:
            if isinstance(description, str):
                out.append(f"{indent}// {description}\n")
            if "default" in value:
                out.append(f"{indent}// {_default(value)}\n")
            out.append(f"{indent}{key}{mark}:\n")
            for variant in variants:
                comment = _trailing(variant, with_description=_description(variant) != description)
                out.append(f"{indent} | {self._variant(variant, indent)}{comment}\n")
            out.append(f"{indent},\n")
            return "".join(out)
        kind = _nullable(value, self.type_of(value, indent + "    "))
        out.append(f"{indent}{key}{mark}: {kind},{_trailing(value)}\n")
        return "".join(out)

    def _variant(self, variant: Any, indent: str) -> str:
        kind = self.type_of(variant, indent + "   ")
        return _nullable(variant, kind) if isinstance(variant, Mapping) else kind

    def _reference(self, schema: Schema, indent: str) -> str:
        reference = schema["$ref"]
        name = str(reference).rsplit("/", 1)[-1]
        target = self._resolve(str(reference))
        if target is None:
            return f"any /* {reference} */"
        if reference in self._open_refs:
            return f"{name} /* recursive, as above */"
        if reference in self._written_refs and self._ref_chars > _MOST_REPEATED:
            return f"{name} /* as above */"
        before = self._ref_chars
        self._open_refs.append(str(reference))
        siblings = {k: v for k, v in schema.items() if k != "$ref"}
        merged = {**target, **siblings} if isinstance(target, Mapping) else target
        text = self.type_of(merged, indent)
        self._open_refs.pop()
        self._written_refs.add(str(reference))
        self._ref_chars = before + len(text)
        return text

    def _resolve(self, reference: str) -> Any:
        if reference == "#":
            return self._root
        if not reference.startswith("#/"):
            return None
        node: Any = self._root
        for part in reference[2:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(node, Mapping) or part not in node:
                return None
            node = node[part]
        return node

    def _intersection(self, schema: Schema, indent: str) -> str:
        rest = {
            k: v for k, v in schema.items() if k not in ("allOf", "description", "title", "default")
        }
        parts = [*schema["allOf"], *([rest] if rest else [])]
        return " & ".join(self.type_of(part, indent) for part in parts)


def _description(schema: Any) -> Any:
    return schema.get("description") if isinstance(schema, Mapping) else None


def _nullable(schema: Schema, kind: str) -> str:
    return f"{kind} | null" if schema.get("nullable") is True and "null" not in kind else kind


def _default(schema: Schema) -> str:
    value = schema["default"]
    if isinstance(value, str) and schema.get("enum"):
        return f"default: {value}"
    return f"default: {_literal(value)}"


def _trailing(schema: Any, *, with_description: bool = False) -> str:
    if not isinstance(schema, Mapping):
        return ""
    notes = []
    if with_description and isinstance(schema.get("description"), str):
        notes.append(schema["description"])
    if "default" in schema:
        notes.append(_default(schema))
    notes += [f"{key}: {_literal(schema[key])}" for key in _BOUNDS if key in schema]
    items = schema.get("items")
    if isinstance(items, Mapping):
        notes += [f"items {key}: {_literal(items[key])}" for key in _BOUNDS if key in items]
    return f" // {' '.join(notes) if with_description else ', '.join(notes)}" if notes else ""
