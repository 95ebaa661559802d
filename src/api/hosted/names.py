"""Names of functions that stand for a tool within something else, and ids of the browser's calls."""

from __future__ import annotations

import hashlib
import re
import secrets

_VALID_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HASH_CHARS = 8
_SESSION = "brws_"  # begins the id of a browser's session


def joined_name(within: str, name: str) -> str:
    """`<within>__<name>`; a hash stands for what does not fit in a function's name."""
    joined = f"{within}__{name}"
    return joined if _VALID_NAME.fullmatch(joined) else hashed_name(within, name)


def hashed_name(within: str, name: str) -> str:
    """The name with a hash, which no other pair has."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", f"{within}__{name}")
    digest = hashlib.sha256(f"{within}\0{name}".encode()).hexdigest()[:_HASH_CHARS]
    return f"{readable[: 63 - _HASH_CHARS]}_{digest}"


def browser_call_id(prefix: str, session_id: str) -> str:
    """A new id of a browser's call, by which a later request finds its open pages."""
    session = session_id.removeprefix(_SESSION) if session_id.startswith(_SESSION) else ""
    return prefix + (session + secrets.token_hex(8) if session else secrets.token_hex(24))


def browser_session(prefix: str, call_id: object) -> str | None:
    """The id of the session that a call's id names, if it names one."""
    found = re.fullmatch(f"{prefix}([0-9a-f]{{32}})[0-9a-f]{{16}}", call_id) if isinstance(call_id, str) else None
    return None if found is None else _SESSION + found[1]
