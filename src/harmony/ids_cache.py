"""A cache of token ids, bounded by bytes and by age."""

from __future__ import annotations

from array import array

from gptoss.lru_cache import LruCache

_ENTRY_OVERHEAD_BYTES = 200


def _num_bytes(_key: bytes, ids: array[int]) -> int:
    return ids.itemsize * len(ids) + _ENTRY_OVERHEAD_BYTES


def ids_cache(max_bytes: int, ttl_s: float) -> LruCache[bytes, array[int]]:
    """An empty cache; its weight is in bytes."""
    return LruCache(max_bytes, _num_bytes, ttl_s=ttl_s)
