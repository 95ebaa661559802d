"""Colours, only on a terminal. NO_COLOR (no-color.org) and TERM=dumb turn them off."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TextIO

CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


@dataclass(frozen=True, slots=True)
class Style:
    """How text is marked on one stream."""

    colours: bool

    @classmethod
    def of(cls, stream: TextIO) -> Style:
        return cls(stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")

    def __call__(self, text: str, *names: str) -> str:
        """Returns the text with the codes of `names` around it."""
        if not self.colours or not text:
            return text
        return f"\x1b[{';'.join(CODES[name] for name in names)}m{text}\x1b[0m"


def printable(text: str) -> str:
    """Returns the text with control characters shown instead of sent to the terminal.

    Line breaks and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
