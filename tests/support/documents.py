"""The commands in the documents that are marked `<!-- run -->`, and the answers printed after them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^(<!-- run -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_OF_A_RUN = {"id", "created", "created_at", "completed_at", "system_fingerprint", "metadata", "cached_tokens"}


@dataclass(frozen=True, slots=True)
class Example:
    page: str
    language: str  # sh or python
    code: str
    answer: str | None  # what is printed next, if that is an answer
    answer_language: str


def examples() -> Iterator[Example]:
    for page in PAGES:
        blocks = _BLOCK.findall(page.read_text())
        for (marked, language, code), (next_marked, kind, text) in pairwise([*blocks, ("", "", "")]):
            if marked:
                shown = text if kind in ("json", "text") and not next_marked else None
                yield Example(page.name, language, code, shown, kind)


def without_ids(value: Any) -> Any:
    """A JSON value without what differs from run to run; tokens found in the cache count as others do."""
    if isinstance(value, dict):
        kept = {key: without_ids(item) for key, item in value.items() if key not in _OF_A_RUN}
        if "cache_read_input_tokens" in kept:
            kept["input_tokens"] += kept.pop("cache_read_input_tokens")
        return kept
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def events(text: str) -> list[Any]:
    """The data of server-sent events."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [without_ids(json.loads(line)) for line in lines]
