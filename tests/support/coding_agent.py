"""Requests of the keys, nesting, types and sizes of Claude Code 2.1.332's, in other words (compat/anonymise.py)."""

from __future__ import annotations

import itertools
import json
import random
import string
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


def first_turn(model: str, seed: int = 0, ask: str = "Say hi.") -> dict[str, Any]:
    """A request of 49 kB, of which 29 kB are 12 tools. `seed`: of the words and of the tools' names."""
    body: dict[str, Any] = _worded(json.loads(RECORDED.read_text()), itertools.count(1000 * seed))
    letters = list(string.ascii_lowercase)
    random.Random(seed).shuffle(letters)
    table = str.maketrans(string.ascii_lowercase, "".join(letters)) if seed else {}
    for tool in body["tools"]:
        tool |= {"name": tool["name"].translate(table), "input_schema": _renamed(tool["input_schema"], table)}
    billed = body["system"][0]
    billed["text"] = BILLING + billed["text"][len(BILLING) :].replace("\n", " ")
    body["messages"][0]["content"][-1]["text"] = ask
    return body | {"model": model}


def _worded(value: Any, seeds: Iterator[int]) -> Any:
    if isinstance(value, dict):
        return {key: _worded(inner, seeds) for key, inner in value.items()}
    if isinstance(value, list):
        return [_worded(inner, seeds) for inner in value]
    return prose(int(value[1:]), next(seeds)) if isinstance(value, str) and value.startswith("~") else value


def _renamed(schema: Any, table: dict[int, str]) -> Any:
    if isinstance(schema, list):
        return [_renamed(inner, table) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name.translate(table): _renamed(inner, table) for name, inner in value.items()}
        elif key in ("required", "enum"):
            out[key] = [one.translate(table) if isinstance(one, str) else one for one in value]
        else:
            out[key] = _renamed(value, table)
    return out


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
