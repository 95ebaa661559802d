"""Logs each name once."""

from __future__ import annotations

import logging
from collections.abc import Iterable


class WarnOnce:
    """Logs names that have not been logged before."""

    def __init__(self, logger: logging.Logger, message: str, *, limit: int = 1000, max_chars: int = 64) -> None:
        """
        Args:
            message: has one %s for the names.
            limit: maximum number of names that are logged and remembered.
            max_chars: maximum length of a name.
        """
        self._logger, self._message, self._limit = logger, message, limit
        self._max_chars = max_chars
        self._logged: set[str] = set()

    def __call__(self, names: Iterable[str]) -> None:
        new = sorted(set(names) - self._logged)[: self._limit - len(self._logged)]
        if new:
            self._logged.update(new)
            # quoted, so that a line break from the client does not start a new log line
            self._logger.warning(self._message, ", ".join(repr(name[: self._max_chars]) for name in new))
