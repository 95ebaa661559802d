"""The identity of cached blocks."""

from __future__ import annotations

from gptoss.engine.block_hash import block_hash, extend_hashes


def chain(token_ids: list[int], salt: str = "", adapter: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, token_ids, len(token_ids) // 4, 4, salt, adapter)
    return hashes


def test_a_block_is_known_by_all_tokens_up_to_its_end() -> None:
    tokens = list(range(12))
    first, second, third = chain(tokens)
    assert chain(tokens[:8]) == [first, second]
    changed = chain([*tokens[:4], 99, *tokens[5:]])
    assert changed[0] == first and second != changed[1] and third != changed[2]
    assert block_hash(first, tokens[4:8]) == second


def test_salts_and_adapters_are_kept_apart() -> None:
    tokens, long = [1, 2, 3, 4], "x" * 96
    roots = [("", ""), ("a", ""), ("", "a"), ("ab", ""), ("a", "b"), ("", "ab"), (long + "1", ""), (long + "2", "")]
    assert len({chain(tokens, *root)[0] for root in roots}) == len(roots)


def test_hashes_are_the_same_in_every_process() -> None:
    """Engines of one server are routed to by these, and their processes have different seeds of hash()."""
    assert chain([1, 2, 3, 4], "salt", "adapter")[0].hex() == "63fe21441217cb0d11412ecc98a526f4"
