"""Text to Harmony token ids and back."""

from __future__ import annotations

from pathlib import Path

from gptoss.harmony.vocabulary_files import _find_ranks


def find_ranks(checkpoint: Path | None, cache: Path) -> Path | None:
    """The file of ranks in the cache, made again if it is damaged; None where only a download had them."""
    return _find_ranks(checkpoint, cache, [])[0]
