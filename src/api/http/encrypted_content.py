"""Encodes reasoning as `encrypted_content`, which clients return unread.

Agents that store nothing request it, and some drop an item's `content` (earlier versions of Codex did, in
protocol/src/models.rs): without it the model would lose its reasoning before a tool's result.

Nothing is encrypted: this server also returns reasoning as `content`. The form is PREFIX and the UTF-8 text in
base64url.
"""

from __future__ import annotations

import base64
import binascii

PREFIX = "plain.v1."


class ForeignSeal(ValueError):
    """Another server made it."""


def seal(text: str) -> str:
    return PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def unseal(sealed: str) -> str:
    """Raises ForeignSeal for what `seal` did not make, ValueError for what is damaged."""
    if not sealed.startswith(PREFIX):
        raise ForeignSeal("it was not made by this server")
    try:
        data = base64.b64decode(sealed.removeprefix(PREFIX), altchars=b"-_", validate=True)
        return data.decode()
    except (binascii.Error, UnicodeError) as error:
        raise ValueError("it is damaged") from error
