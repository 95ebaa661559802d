"""A cache of results by the digest of a text.

Texts may have megabytes, and clients repeat them in each request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

from gptoss.lru_cache import LruCache

T = TypeVar("T")


class DigestCache(Generic[T]):
    """The most recently used results. Thread-safe."""

    def __init__(self, max_entries: int, max_chars: int) -> None:
        """`max_chars`: total length of the texts; a result takes about as much memory as its text."""
        self._max_entries = max_entries
        self._results: LruCache[bytes, tuple[T, int]] = LruCache(max_chars, lambda _, result: result[1])
        self._lock = Lock()

    def get(self, text: str, compute: Callable[[], T]) -> T:
        """The result for a text, computed once. Exceptions of `compute` are not cached."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        with self._lock:
            known = self._results.get(digest)
        if known is not None:
            return known[0]
        value = compute()
        with self._lock:
            self._results.put(digest, (value, len(text)))
            while len(self._results) > self._max_entries:
                self._results.pop(next(iter(self._results)))
        return value
