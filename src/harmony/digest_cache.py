"""Results by the digest of a text: texts may have megabytes, and the same ones come again with each request."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

T = TypeVar("T")


class DigestCache(Generic[T]):
    """The latest results. For several threads."""

    def __init__(self, max_entries: int, max_chars: int) -> None:
        """`max_chars`: of the texts together, for results that take about as much memory."""
        self._max_entries, self._max_chars = max_entries, max_chars
        self._found: OrderedDict[bytes, tuple[T, int]] = OrderedDict()
        self._chars = 0
        self._lock = Lock()

    def get(self, text: str, compute: Callable[[], T]) -> T:
        """Computed once for each text; what `compute` raises is raised and not remembered."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        with self._lock:
            known = self._found.get(digest)
            if known is not None:
                self._found.move_to_end(digest)
                return known[0]
        value = compute()
        with self._lock:
            if digest not in self._found:
                self._found[digest] = value, len(text)
                self._chars += len(text)
            while len(self._found) > self._max_entries or self._chars > self._max_chars:
                self._chars -= self._found.popitem(last=False)[1][1]
        return value
