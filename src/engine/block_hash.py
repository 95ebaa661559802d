"""The hash that identifies a block of the KV cache, for the prefix cache and for routing requests."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

HASH_BYTES = 16


def block_hash(parent: bytes | None, token_ids: Sequence[int], cache_salt: str = "", adapter: str = "") -> bytes:
    """The hash of a full block, chained over all blocks before it.

    Args:
        parent: hash of the block before it; None for the first one.
        token_ids: the block's tokens, below 2**32.
        cache_salt: blocks of other salts are never equal.
        adapter: name of the LoRA adapter; blocks of other adapters are never equal.

    Returns:
        HASH_BYTES bytes, equal in every process.
    """
    key = parent if parent is not None else _root(cache_salt, adapter)
    return hashlib.blake2b(array("I", token_ids).tobytes(), digest_size=HASH_BYTES, key=key).digest()


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], count: int, block_size: int, cache_salt: str = "", adapter: str = ""
) -> None:
    """Extends `hashes`, those of the first blocks, to `count` of them."""
    for index in range(len(hashes), count):
        tokens = token_ids[index * block_size : (index + 1) * block_size]
        hashes.append(block_hash(hashes[-1] if hashes else None, tokens, cache_salt, adapter))


def _root(cache_salt: str, adapter: str) -> bytes:
    """The parent of first blocks. The length separates salt and adapter."""
    salt, name = cache_salt.encode(), adapter.encode()
    if not salt and not name:
        return b""
    return hashlib.blake2b(b"%d %b%b" % (len(salt), salt, name), digest_size=HASH_BYTES).digest()
