"""What clients send with every request is told once."""

from __future__ import annotations

import logging
from collections.abc import Iterable


class WarnOnce:
    """A line in the log for names that were not told before."""

    def __init__(self, logger: logging.Logger, message: str, *, limit: int = 1000, max_chars: int = 64) -> None:
        """`message` has one %s for the names; `limit`: how many are logged, and kept; `max_chars`: of each."""
        self._logger, self._message, self._limit = logger, message, limit
        self._max_chars = max_chars
        self._told: set[str] = set()

    def __call__(self, names: Iterable[str]) -> None:
        new = sorted(set(names) - self._told)[: self._limit - len(self._told)]
        if new:
            self._told.update(new)
            # quoted: a client's line break must not begin a line of the log
            self._logger.warning(self._message, ", ".join(repr(name[: self._max_chars]) for name in new))
