"""A cache that is bounded by weight and by age."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


def _one(_key: object, _value: object) -> int:
    return 1


class LruCache(Generic[K, V]):
    """Keeps the most recently used values. Not thread-safe."""

    def __init__(self, max_weight: float, weigh: Callable[[K, V], int] = _one, *, ttl_s: float = math.inf) -> None:
        """`max_weight`: total, in the unit of `weigh`. `ttl_s`: seconds for which an unused value is kept."""
        self._max_weight = max_weight
        self._weigh = weigh
        self._ttl_s = ttl_s
        self._entries: OrderedDict[K, tuple[V, int, float]] = OrderedDict()  # value, weight, when it expires
        self.weight = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[K]:
        """The keys, the least recently used first."""
        return iter(self._entries)

    def __contains__(self, key: K) -> bool:
        return key in self._entries

    def get(self, key: K) -> V | None:
        """The value, which becomes the most recently used one; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, weight, expires = entry
        if self._ttl_s < math.inf:
            now = time.monotonic()
            if expires <= now:
                self._evict(key)
                return None
            self._entries[key] = value, weight, now + self._ttl_s
        self._entries.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> None:
        """Replaces what is there. A value heavier than `max_weight` is not kept."""
        if key in self._entries:
            self.weight -= self._entries.pop(key)[1]
        weight = self._weigh(key, value)
        if weight > self._max_weight:
            return
        expires = time.monotonic() + self._ttl_s if self._ttl_s < math.inf else math.inf
        self._entries[key] = value, weight, expires
        self.weight += weight
        while self.weight > self._max_weight:
            self._evict(next(iter(self._entries)))
        self.expire()

    def pop(self, key: K) -> V:
        """Removes the value and returns it. Raises KeyError."""
        value, weight, _ = self._entries.pop(key)
        self.weight -= weight
        return value

    def expire(self) -> None:
        """Drops values older than `ttl_s`; they are in order of last use, so of expiry."""
        if self._ttl_s == math.inf:
            return
        now = time.monotonic()
        while self._entries and next(iter(self._entries.values()))[2] <= now:
            self._evict(next(iter(self._entries)))

    def _evict(self, key: K) -> None:
        self.pop(key)
        self.evictions += 1
