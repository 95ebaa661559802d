"""The hash that identifies a block of the KV cache, for the prefix cache and for routing requests."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def block_hash(parent: bytes | None, token_ids: Sequence[int], cache_salt: str = "", adapter: str = "") -> bytes:
    """The hash of a full block, chained over all blocks before it.

    Args:
        parent: hash of the block before it; None for the first one.
        token_ids: the block's tokens, below 2**32.
        cache_salt: blocks of other salts are never equal.
        adapter: the LoRA adapter's `adapter_key`; blocks of other adapters are never equal.

    Returns:
        HASH_BYTES bytes, equal in every process.
    """
    key = parent if parent is not None else root_hash(cache_salt, adapter)
    return blake2b(array("I", token_ids), digest_size=HASH_BYTES, key=key).digest()


def adapter_key(name: str, digest: str) -> str:
    """Distinguishes an adapter's blocks from those of an earlier adapter of the same name."""
    return f"{name}@{digest}"


def extend_hashes(
    hashes: list[bytes], token_ids: Sequence[int], count: int, block_size: int, cache_salt: str = "", adapter: str = ""
) -> None:
    """Extends `hashes`, those of the first blocks, to `count` of them."""
    first = len(hashes)
    if count <= first:
        return
    words = array("I", token_ids[first * block_size : count * block_size])
    parent = hashes[-1] if hashes else root_hash(cache_salt, adapter)
    for start in range(0, (count - first) * block_size, block_size):
        block = words[start : start + block_size]
        parent = blake2b(block, digest_size=HASH_BYTES, key=parent).digest()
        hashes.append(parent)


def root_hash(cache_salt: str, adapter: str) -> bytes:
    """The parent of first blocks.

    The length separates salt and adapter.
    """
    salt, name = cache_salt.encode(), adapter.encode()
    if not salt and not name:
        return b""
    return blake2b(b"%d %b%b" % (len(salt), salt, name), digest_size=HASH_BYTES).digest()
