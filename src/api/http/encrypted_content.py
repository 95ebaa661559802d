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


class ForeignContentError(ValueError):
    """The content was made by another server."""


def encode_text(text: str) -> str:
    """Returns the `encrypted_content` of a text."""
    return PREFIX + base64.urlsafe_b64encode(text.encode()).decode()


def decode_text(content: str) -> str:
    """Returns the text.

    Raises ForeignContentError if `encode_text` did not make it, ValueError if it is damaged.
    """
    if not content.startswith(PREFIX):
        raise ForeignContentError("it was not made by this server")
    try:
        data = base64.b64decode(content.removeprefix(PREFIX), altchars=b"-_", validate=True)
        return data.decode()
    except (binascii.Error, UnicodeError) as error:
        raise ValueError("it is damaged") from error
