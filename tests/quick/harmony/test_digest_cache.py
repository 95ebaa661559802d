"""Results by digest: computed once, the latest kept, failures not."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gptoss.harmony.digest_cache import DigestCache


@pytest.mark.parametrize(("max_entries", "max_chars"), [(2, 1000), (1000, 2)])
def test_the_latest_results_are_kept(max_entries: int, max_chars: int) -> None:
    computed: list[str] = []

    def compute(text: str) -> Callable[[], str]:
        def run() -> str:
            computed.append(text)
            if text == "!":
                raise ValueError(text)
            return text.upper()

        return run

    cache: DigestCache[str] = DigestCache(max_entries, max_chars)
    assert [cache.get(text, compute(text)) for text in "abacab"] == list("ABACAB")
    for _ in range(2):
        with pytest.raises(ValueError, match="!"):
            cache.get("!", compute("!"))
    assert computed == ["a", "b", "c", "b", "!", "!"]
