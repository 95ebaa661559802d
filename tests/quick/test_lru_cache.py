"""The cache: what is kept, in which order it goes, and what it weighs."""

from __future__ import annotations

import pytest

from gptoss import lru_cache
from gptoss.lru_cache import LruCache


def test_the_least_recently_used_value_goes_first() -> None:
    cache: LruCache[str, int] = LruCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    assert cache.get("a") == 1
    cache.put("c", 3)
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)
    assert (len(cache), cache.weight, cache.evictions, list(cache)) == (2, 2, 1, ["a", "c"])


def test_weights_bound_the_cache() -> None:
    cache: LruCache[str, str] = LruCache(10, lambda key, value: len(key) + len(value))
    cache.put("a", "x" * 4)
    cache.put("a", "x" * 3)  # replaces
    assert cache.weight == 4
    cache.put("b", "x" * 8)
    assert (cache.get("a"), cache.weight) == (None, 9)
    cache.put("c", "x" * 10)  # heavier than the whole cache
    assert (cache.get("c"), cache.get("b"), cache.weight) == (None, "x" * 8, 9)
    cache.put("b", "x" * 10)  # nor is the value kept that it would have replaced
    assert (len(cache), cache.weight) == (0, 0)
    with pytest.raises(KeyError):
        cache.pop("b")


def test_values_expire_unless_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(lru_cache.time, "monotonic", lambda: now)
    cache: LruCache[str, int] = LruCache(10, ttl_s=5)
    cache.put("used", 1)
    cache.put("unused", 2)
    now = 4.0
    assert cache.get("used") == 1
    now = 6.0
    assert cache.get("unused") is None
    cache.put("new", 3)
    now = 10.0
    cache.expire()
    assert ("used" in cache, "new" in cache, cache.evictions) == (False, True, 2)


def test_a_cache_without_capacity_keeps_nothing() -> None:
    cache: LruCache[str, int] = LruCache(0)
    cache.put("a", 1)
    assert (cache.get("a"), len(cache), cache.weight) == (None, 0, 0)
