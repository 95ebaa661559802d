"""A request of /v1/messages without its words: keys, nesting, types and sizes stay, text and names do not.

    python compat/anonymise.py recorded.json > tests/support/coding_agent.json

A text becomes "~N", N characters long; names of tools, of their properties and values of enums become other names of
the same length. `tests/support/coding_agent.py` makes a request of it again.
"""

from __future__ import annotations

import json
import string
import sys
from pathlib import Path
from typing import Any

# whose values are the protocol's
KEPT = frozenset({"type", "role", "format", "$schema", "model", "effort", "display", "keep"})
PATTERN = "^[a-z0-9_-]{6,99}$"
LETTERS = string.ascii_lowercase


def main() -> None:
    body = json.loads(Path(sys.argv[1]).read_text())
    json.dump(Anonymiser().request(body), sys.stdout, separators=(",", ":"))


class Anonymiser:
    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def request(self, body: Any) -> Any:
        return {key: self._tools(value) if key == "tools" else self._plain(key, value) for key, value in body.items()}

    def _tools(self, tools: list[Any]) -> list[Any]:
        made = []
        for tool in tools:
            named = {"name": self._name(tool["name"]), "input_schema": self._schema(tool["input_schema"])}
            made.append({key: named.get(key, self._plain(key, value)) for key, value in tool.items()})
        return made

    def _plain(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._plain(name, inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._plain(key, inner) for inner in value]
        return f"~{len(value)}" if isinstance(value, str) and key not in KEPT else value

    def _schema(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self._schema(inner) for inner in schema]
        if not isinstance(schema, dict):
            return schema
        return {key: self._keyword(key, value) for key, value in schema.items()}

    def _keyword(self, key: str, value: Any) -> Any:
        if key in ("properties", "$defs", "patternProperties"):
            return {self._name(name): self._schema(inner) for name, inner in value.items()}
        if key in ("required", "enum"):
            return [self._name(one) if isinstance(one, str) else one for one in value]
        if key in ("const", "default") and isinstance(value, str):
            return self._name(value)
        if key == "pattern":
            return PATTERN
        if isinstance(value, str):
            return value if key in KEPT else f"~{len(value)}"
        return self._schema(value)

    def _name(self, name: str) -> str:
        """Another one of the same length, always the same for one name."""
        if name not in self._names:
            number, taken = 0, set(self._names.values())
            while (made := _spelled(number, len(name))) in taken:
                number += 1
            self._names[name] = made
        return self._names[name]


def _spelled(number: int, length: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, len(LETTERS))
        digits = LETTERS[digit] + digits
    return (LETTERS * (length // len(LETTERS) + 1))[: length - len(digits)] + digits


if __name__ == "__main__":
    main()
