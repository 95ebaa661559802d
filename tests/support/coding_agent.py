"""Requests of the keys, nesting, types and sizes of Claude Code 2.1.332's, in other words (compat/anonymise.py)."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_suffix(".json")
CACHED = {"cache_control": {"type": "ephemeral"}}
WORDS = "the file of a project is read before any line in it changes and every test runs again after that"
BILLING = "x-anthropic-billing-header: version=1;"


def prose(size: int, seed: int) -> str:
    """Words of `size` characters."""
    source, out, words = random.Random(seed), "", WORDS.split()
    while len(out) < size:
        out += source.choice(words) + source.choice([" ", " ", " ", ".\n", ", "])
    return out[:size]


def first_turn(model: str, seed: int = 0) -> dict[str, Any]:
    """A request of 49 kB, of which 29 kB are 12 tools. `seed`: of the words."""
    body: dict[str, Any] = _worded(json.loads(RECORDED.read_text()), itertools.count(1000 * seed))
    billed = body["system"][0]
    billed["text"] = BILLING + billed["text"][len(BILLING) :].replace("\n", " ")
    return body | {"model": model}


def _worded(value: Any, seeds: Iterator[int]) -> Any:
    if isinstance(value, dict):
        return {key: _worded(inner, seeds) for key, inner in value.items()}
    if isinstance(value, list):
        return [_worded(inner, seeds) for inner in value]
    return prose(int(value[1:]), next(seeds)) if isinstance(value, str) and value.startswith("~") else value


def next_turn(body: dict[str, Any], content: list[dict[str, Any]], result: str) -> dict[str, Any]:
    """After an answer that ends with a call. The system message, a list of one block before, is a string now."""
    before = [
        message | {"content": message["content"][0]["text"]} if message["role"] == "system" else message
        for message in body["messages"]
    ]
    told = {"tool_use_id": content[-1]["id"], "type": "tool_result", "content": result, "is_error": False, **CACHED}
    return body | {
        "messages": [*before, {"role": "assistant", "content": content}, {"role": "user", "content": [told]}]
    }
