"""Resolves `$ref` within one schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote


@dataclass(frozen=True, slots=True)
class Target:
    pointer: str  # decoded, "" for the root: one spelling for each target
    schema: Any


class References:
    def __init__(self, root: Any) -> None:
        self._root = root
        self._base = _base(root)
        self._named: dict[str, Target] | None = None

    def find(self, reference: str) -> Target | None:
        """The target of a reference; None if it is outside this schema or does not exist."""
        if self._base and reference.startswith(self._base):
            reference = reference[len(self._base) :] or "#"
        if reference == "#":
            return Target("", self._root)
        if reference.startswith("#/"):
            parts = [unquote(part).replace("/", "~1") for part in reference[2:].split("/")]
            spellings = (unquote(reference[1:]), reference[1:], "/" + "/".join(parts))
            return next(filter(None, map(self._at, spellings)), None)
        if self._named is None:
            self._named = dict(_named(self._root, ""))
        return self._named.get(reference.removeprefix("#"))

    def _at(self, pointer: str) -> Target | None:
        node: Any = self._root
        for part in pointer[1:].split("/"):
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(node, dict) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isascii() and part.isdigit() and int(part) < len(node):
                node = node[int(part)]
            else:
                return None
        return Target(pointer, node) if isinstance(node, dict | bool) else None


def _base(root: Any) -> str:
    base = root.get("$id") if isinstance(root, dict) else None
    return base.removesuffix("#") if isinstance(base, str) else ""


def _named(node: Any, pointer: str) -> list[tuple[str, Target]]:
    """The schemas with an `$anchor` or an `$id`."""
    found = []
    if isinstance(node, dict):
        for key in ("$anchor", "$dynamicAnchor", "$id"):
            if pointer and isinstance(node.get(key), str):
                found.append((node[key].removeprefix("#"), Target(pointer, node)))
        for key, inner in node.items():
            if key not in ("enum", "const", "default", "examples"):
                found += _named(inner, f"{pointer}/{key.replace('~', '~0').replace('/', '~1')}")
    elif isinstance(node, list):
        for index, inner in enumerate(node):
            found += _named(inner, f"{pointer}/{index}")
    return found
