"""The engine that a request goes to."""

from __future__ import annotations

from gptoss.engine.block_hash import extend_hashes
from gptoss.engine.client.router import REQUEST_TOKENS, STICKY_TOKENS, Router

BLOCK = 4


def hashes(*parts: int, salt: str = "") -> list[bytes]:
    """Of a prompt; each part is a block of that token."""
    found: list[bytes] = []
    extend_hashes(found, [part for part in parts for _ in range(BLOCK)], len(parts), BLOCK, salt)
    return found


def router(num_engines: int = 2, open_requests: tuple[str, ...] = ()) -> Router:
    return Router(num_engines, BLOCK, lambda name: name in open_requests)


def test_a_prompt_goes_where_most_of_its_beginning_was_sent() -> None:
    r = router(3)
    r.sent[1].add(hashes(1, 2, 3), "a")
    r.sent[2].add(hashes(1, 2), "b")
    loads = {0: 0, 1: 500, 2: 0}
    assert r.choose(hashes(1, 2, 3, 4), loads) == (1, 3 * BLOCK)
    assert r.choose(hashes(1, 2, 9), loads) == (2, 2 * BLOCK), "as much is cached on both: the least loaded"
    assert r.choose(hashes(9), loads) == (0, 0)
    assert r.choose([], loads) == (0, 0), "shorter than a block"
    assert r.choose(hashes(1, 2, 3, salt="other"), loads)[1] == 0


def test_only_engines_that_may_be_chosen_are() -> None:
    r = router(3)
    r.sent[1].add(hashes(1, 2, 3), "a")
    assert r.choose(hashes(1, 2, 3), {0: 10**9, 2: 10**9 + 1}) == (0, 0)


def test_a_conversation_leaves_an_engine_that_is_much_busier() -> None:
    r = router()
    r.sent[0].add(hashes(1, 2, 3), "the turn before")
    most = STICKY_TOKENS + 3 * BLOCK
    assert r.choose(hashes(1, 2, 3), {0: most + 7, 1: 7}) == (0, 3 * BLOCK)
    assert r.choose(hashes(1, 2, 3), {0: most + 8, 1: 7}) == (1, 0)


def test_a_beginning_that_clients_share_is_computed_on_an_idle_engine_too() -> None:
    system = tuple(range(100))
    r = router(2, open_requests=("first",))
    r.sent[0].add(hashes(*system), "first")
    assert r.choose(hashes(*system, 7), {0: REQUEST_TOKENS, 1: 0}) == (1, 0)
    assert r.choose(hashes(*system, 7), {0: len(system) * BLOCK // 8, 1: 0})[0] == 0
    r.sent[1].add(hashes(*system, 7), "second")
    assert r.choose(hashes(*system, 8), {0: REQUEST_TOKENS, 1: REQUEST_TOKENS + 1}) == (0, len(system) * BLOCK)
    ended = router(2)
    ended.sent[0].add(hashes(*system), "first")
    assert ended.choose(hashes(*system, 7), {0: REQUEST_TOKENS, 1: 0})[0] == 0, "nobody shares it now"


def test_idle_engines_fill_their_caches_evenly() -> None:
    r = router()
    chosen = []
    for number in range(6):
        prompt = hashes(100 + number, 200)
        engine, _ = r.choose(prompt, {0: 0, 1: 0})
        r.sent[engine].add(prompt, str(number))
        chosen.append(engine)
    assert sorted(chosen) == [0, 0, 0, 1, 1, 1]


def test_what_was_used_longest_ago_is_forgotten_and_ends_before_beginnings() -> None:
    sent = router().sent[0]
    sent.max_blocks = 5
    sent.add(hashes(1, 2, 3), "a")
    sent.add(hashes(4, 5), "b")
    sent.add(hashes(1, 2, 6), "c")
    assert len(sent) == 5
    assert sent.count(hashes(1, 2, 6)) == 3 and sent.count(hashes(1, 2, 3)) == 2
    assert sent.count(hashes(4, 5)) == 2
    sent.add(hashes(7), "d")
    assert sent.count(hashes(4, 5)) == 1
    sent.clear()
    assert not len(sent) and sent.count(hashes(1)) == 0
