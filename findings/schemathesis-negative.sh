#!/usr/bin/env bash
# schemathesis 4.32.5: asking for invalid requests of an operation that has none is an error of Hypothesis.
#
# One would guess: where nothing can be invalid (no parameter, or one string in the path), the negative strategy is
# empty, the operation says so, or the strategy cannot be made.
# Behaviour: as_strategy(generation_mode=NEGATIVE) returns a strategy; the test that uses it fails with
# hypothesis.errors.Unsatisfiable, which reads like filters that are too strict. In one_of(positive, negative) the
# negative half yields nothing, without a word. With an integer in the path it works.
# Source: schemathesis, generation/modes.py (GenerationMode), specs/openapi/_hypothesis.py.
#
# Output seen:
#   no parameter     positive: cases   negative: Unsatisfiable  either: cases
#   string in path   positive: cases   negative: Unsatisfiable  either: cases
#   integer in path  positive: cases   negative: cases          either: cases
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q schemathesis==4.32.5 hypothesis==6.170.15
cat >"$dir/show.py" <<'PY'
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode


def operation(path, *parameters):
    get = {"parameters": list(parameters), "responses": {"200": {"description": "ok"}}}
    document = {"openapi": "3.1.0", "info": {"title": "t", "version": "1"}, "paths": {path: {"get": get}}}
    return schemathesis.openapi.from_dict(document)[path]["get"]


def parameter(kind):
    return {"name": "id", "in": "path", "required": True, "schema": {"type": kind}}


def attempt(strategy):
    count = 0

    @settings(max_examples=20, phases=[Phase.generate], database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def collect(case):
        nonlocal count
        count += 1

    try:
        collect()
    except Unsatisfiable:
        return "Unsatisfiable"
    return "cases" if count else "nothing"


seen = {}
for name, op in {
    "no parameter": operation("/none"),
    "string in path": operation("/s/{id}", parameter("string")),
    "integer in path": operation("/i/{id}", parameter("integer")),
}.items():
    positive, negative = (op.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE))
    seen[name] = [attempt(positive), attempt(negative), attempt(st.one_of(positive, negative))]
    print(f"{name:<16} positive: {seen[name][0]:<7} negative: {seen[name][1]:<14} either: {seen[name][2]}")
expected = [["cases", "Unsatisfiable", "cases"]] * 2 + [["cases", "cases", "cases"]]
raise SystemExit(0 if list(seen.values()) == expected else "the behaviour changed")
PY
"$dir/venv/bin/python" "$dir/show.py"
