"""Names of functions that stand for a tool within something else: a namespace, an MCP server."""

from __future__ import annotations

import hashlib
import re

_VALID_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH_CHARS = 8


def joined_name(within: str, name: str) -> str:
    """`<within>__<name>`; a hash stands for what does not fit in a function's name."""
    joined = f"{within}__{name}"
    return joined if _VALID_NAME.fullmatch(joined) else hashed_name(within, name)


def hashed_name(within: str, name: str) -> str:
    """The name with a hash, which no other pair has."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", f"{within}__{name}")
    digest = hashlib.sha256(f"{within}\0{name}".encode()).hexdigest()[:_HASH_CHARS]
    return f"{readable[: 63 - _HASH_CHARS]}_{digest}"
