"""Token ids by key, bounded by bytes and by age."""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass

_ENTRY_OVERHEAD_BYTES = 200


@dataclass(slots=True)
class _Entry:
    ids: array[int]
    expires: float  # monotonic seconds

    @property
    def size_bytes(self) -> int:
        return self.ids.itemsize * len(self.ids) + _ENTRY_OVERHEAD_BYTES


class IdsCache:
    """Not thread-safe. The least recently used entries make room for new ones."""

    def __init__(self, max_bytes: int, ttl_s: float) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.size_bytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> array[int] | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        now = time.monotonic()
        if entry.expires <= now:
            self._drop(key)
            return None
        entry.expires = now + self._ttl_s
        self._entries.move_to_end(key)
        return entry.ids

    def put(self, key: bytes, ids: array[int]) -> None:
        """Replaces what is there."""
        if key in self._entries:
            self.size_bytes -= self._entries.pop(key).size_bytes
        entry = _Entry(ids, time.monotonic() + self._ttl_s)
        if entry.size_bytes > self._max_bytes:
            return
        self._entries[key] = entry
        self.size_bytes += entry.size_bytes
        while self.size_bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))
        self.expire()

    def expire(self) -> None:
        """Drops what has outlived its time; entries are in order of last use, so of expiry."""
        now = time.monotonic()
        while self._entries and next(iter(self._entries.values())).expires <= now:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: bytes) -> None:
        self.size_bytes -= self._entries.pop(key).size_bytes
        self.evictions += 1
