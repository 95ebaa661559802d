#!/usr/bin/env bash
# llguidance 1.9.1: JSON schemas whose grammar differs from the schema without an error, or fails on a harmless keyword.
#
# One would guess: the grammar allows what the schema allows, or compiling it fails (docs/json_schema.md: "either produce
# a grammar conformant to the JSON schema semantics, or give an error"). In particular:
#   1. bounds and constants that are integers are exact;
#   2. "minimum" reaches as far down as "maximum" reaches up;
#   3. a bound on a number says nothing about its notation;
#   4. a contradiction is an error wherever it stands, and so is a schema that no finite value meets;
#   5. a keyword that restricts nothing ("uniqueItems": false) is accepted.
# Behaviour:
#   1. Bounds and constants pass through a float64, and integer bounds end at the int64 limits: "maximum": 2**53+1 refuses
#      2**53+1, "maximum": 2**64-1 refuses everything above 2**63-1, "const": 2**53+1 allows 2**53 alone.
#   2. "maximum": 2**63-1 compiles and is exact, "minimum": -(2**63)+1 is an error.
#   3. A number without bounds may be written 1e3, one with a bound may not.
#   4. A contradictory property is an error if it is required; an optional one is dropped. {"$ref": "#"} compiles and
#      its first mask is empty.
#   5. "Unimplemented keys".
# Source: guidance-ai/llguidance, parser/src/json/schema.rs (as_f64), parser/src/json/compiler.rs (UnsatisfiableSchemaError).
#
# Output seen:
#   1. maximum 2**53+1:   2**53 allowed, 2**53+1 refused
#   1. maximum 2**64-1:   2**63-1 allowed, 2**63 refused
#   1. const 2**53+1:     2**53 allowed, 2**53+1 refused
#   2. maximum 2**63-1:   2**63-1 allowed, 2**63 refused
#   2. minimum -2**63+1:  Failed to generate regex for integer range: min=Some(-9223372036854775808), max=None
#   3. number:            1000 allowed, 1e3 allowed
#   3. number <= 5000:    1000 allowed, 1e3 refused
#   4. required property: Unsatisfiable schema: required property 'a' is unsatisfiable
#   4. optional property: {} allowed, {"a" refused
#   4. reference to self: compiles, 0 of 256 bytes allowed
#   5. uniqueItems false: Unimplemented keys: ["uniqueItems"]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q llguidance==1.9.1
cat >"$dir/show.py" <<'PY'
import json

from llguidance import LLMatcher, LLTokenizer

TOKENIZER = LLTokenizer("byte")


def matcher(schema):
    return LLMatcher(TOKENIZER, LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)


def error(schema):
    return LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(json.dumps(schema)), TOKENIZER)


def allowed(schema, text):
    return matcher(schema).validate_tokens(list(text.encode())) == len(text)


def words(schema, **texts):
    return ", ".join(
        f"{name} {'allowed' if allowed(schema, text) else 'refused'}" for name, text in texts.items()
    )


def integers(schema, *names):
    return words(schema, **{name: str(eval(name)) for name in names})


contradiction = {"type": "integer", "minimum": 3, "maximum": 2}
optional = {"type": "object", "properties": {"a": contradiction}}
mask = matcher({"$ref": "#"}).compute_logit_bias()
seen = {
    "1. maximum 2**53+1": integers({"type": "integer", "maximum": 2**53 + 1}, "2**53", "2**53+1"),
    "1. maximum 2**64-1": integers({"type": "integer", "maximum": 2**64 - 1}, "2**63-1", "2**63"),
    "1. const 2**53+1": integers({"const": 2**53 + 1}, "2**53", "2**53+1"),
    "2. maximum 2**63-1": integers({"type": "integer", "maximum": 2**63 - 1}, "2**63-1", "2**63"),
    "2. minimum -2**63+1": error({"type": "integer", "minimum": -(2**63) + 1}),
    "3. number": words({"type": "number"}, **{"1000": "1000", "1e3": "1e3"}),
    "3. number <= 5000": words({"type": "number", "maximum": 5000}, **{"1000": "1000", "1e3": "1e3"}),
    "4. required property": error({**optional, "required": ["a"]}),
    "4. optional property": words(optional, **{"{}": "{}", '{"a"': '{"a"'}),
    "4. reference to self": (error({"$ref": "#"}) or "compiles") + f", {sum(map(bool, mask[:256]))} of 256 bytes allowed",
    "5. uniqueItems false": error({"type": "array", "uniqueItems": False}),
}
for name, value in seen.items():
    print(f"{name + ':':<21} {value}")
expected = [
    "2**53 allowed, 2**53+1 refused",
    "2**63-1 allowed, 2**63 refused",
    "2**53 allowed, 2**53+1 refused",
    "2**63-1 allowed, 2**63 refused",
    "Failed to generate regex for integer range: min=Some(-9223372036854775808), max=None",
    "1000 allowed, 1e3 allowed",
    "1000 allowed, 1e3 refused",
    "Unsatisfiable schema: required property 'a' is unsatisfiable",
    '{} allowed, {"a" refused',
    "compiles, 0 of 256 bytes allowed",
    'Unimplemented keys: ["uniqueItems"]',
]
raise SystemExit(0 if list(seen.values()) == expected else "the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
