"""Measures the cost of guided Harmony and JSON schemas on one server: time per token with and without; compile times.

python bench/guided.py --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.harmony.grammar import TurnSpec, grammar_error, turn_grammar
from gptoss.harmony.schema.enforce import compile_error
from gptoss.harmony.vocabulary_files import load_vocabulary

TEXT: dict[str, Any] = {"type": "string"}
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather tool": {
        "type": "object",
        "properties": {"city": TEXT, "unit": {"enum": ["c", "f"]}},
        "required": ["city"],
    },
    "steps and answer": {"type": "object", "properties": {"steps": {"type": "array", "items": TEXT}, "answer": TEXT}},
    "recursive tree": {
        "$defs": {
            "n": {"type": "object", "properties": {"v": TEXT, "c": {"type": "array", "items": {"$ref": "#/$defs/n"}}}}
        },
        "$ref": "#/$defs/n",
    },
    "bounds": {
        "type": "object",
        "properties": {
            "n": {"type": "integer", "minimum": 1, "maximum": 10_000},
            "x": {"type": "number", "minimum": 0},
        },
    },
    "formats": {
        "type": "object",
        "properties": {
            "when": {"type": "string", "format": "date-time"},
            "mail": {"type": "string", "format": "email"},
        },
    },
    "pattern": {"type": "object", "properties": {"id": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4}$"}}},
    "enum of 500": {"enum": [f"value-{i}" for i in range(500)]},
    "60 fields": {
        "type": "object",
        "properties": {f"field_{i}": TEXT for i in range(60)},
        "required": [f"field_{i}" for i in range(60)],
    },
    "nullable union": {
        "anyOf": [{"type": "null"}, {"type": "object", "properties": {"a": {"anyOf": [TEXT, {"type": "integer"}]}}}]
    },
    "any object": {"type": "object"},
}


def per_token_us(url: str, **options: Any) -> float:
    body = {
        "model": httpx.get(f"{url}/v1/models").json()["data"][0]["id"],
        "max_tokens": 200,
        "temperature": 1,
        "seed": 1,
        "messages": [{"role": "user", "content": f"Hi {time.time_ns()}"}],
        **options,
    }
    started = time.perf_counter()
    usage = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()["usage"]
    return 1e6 * (time.perf_counter() - started) / usage["completion_tokens"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    long_text = {"type": "object", "properties": {"t": {"type": "string", "minLength": 2000}}, "required": ["t"]}
    modes: dict[str, dict[str, Any]] = {
        # ignore_eos switches every grammar off
        "free": {"ignore_eos": True},
        "guided Harmony": {"reasoning_budget": 0, "min_tokens": 200},
        "JSON schema": {
            "reasoning_budget": 0,
            "response_format": {"type": "json_schema", "json_schema": {"name": "t", "schema": long_text}},
        },
    }
    samples: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(args.repeat):
        for name, options in modes.items():
            samples[name].append(per_token_us(args.url, **options))
    free = statistics.median(samples["free"])
    for name, values in samples.items():
        middle = statistics.median(values)
        print(f"{name:16} {middle:8.0f} us/token  {middle - free:+7.0f} us  {middle / free:5.2f}x")
    vocabulary = load_vocabulary()
    for name, schema in SCHEMAS.items():
        times = []
        for _ in range(5):
            started = time.perf_counter()
            problem = compile_error(schema) or grammar_error(turn_grammar(TurnSpec(final_schema=schema), vocabulary))
            assert problem is None, problem
            times.append(1e3 * (time.perf_counter() - started))
        print(f"compile {name:16} {statistics.median(times):6.2f} ms")


if __name__ == "__main__":
    main()
