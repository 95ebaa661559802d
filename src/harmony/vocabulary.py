"""Finds the ranks of the vocabulary."""

from __future__ import annotations

from pathlib import Path

from gptoss.harmony.vocabulary_files import _find_ranks


def find_ranks(checkpoint: Path | None, cache: Path) -> Path | None:
    """The ranks file in the cache, created again if damaged; None if only a download could provide it."""
    return _find_ranks(checkpoint, cache, [])[0]
