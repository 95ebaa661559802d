"""Types of command-line arguments, for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def whole(lowest: int, highest: int) -> Callable[[str], int]:
    """A type that takes whole numbers within these limits."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {lowest} to {highest}")
        return value

    return number


def new_file(text: str) -> Path:
    """A file that can be written, as far as its folder shows."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, or in a folder that does not exist")
    return path
