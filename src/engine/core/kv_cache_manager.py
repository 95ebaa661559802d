"""Allocates the blocks of the KV cache to requests, and finds cached prefixes.

Layers form two groups. Full layers keep a request's whole history; sliding layers only what the window still
reaches. Both groups take blocks from one pool: block b of the pool is row b of every layer's cache tensor, and the
i-th full layer and the i-th sliding layer share a tensor, so a block costs the same bytes in either group.

A block that holds `block_size` computed tokens gets a hash chained over all tokens before it (block_hash.py). Freed
blocks keep their hash until they are reused, oldest first: they are the prefix cache.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from gptoss.engine.block_hash import extend_hashes
from gptoss.engine.core.request import Request
from gptoss.engine.messages import NULL_BLOCK

FULL_GROUP, SLIDING_GROUP = 0, 1


@dataclass(slots=True)
class _Block:
    refs: int = 0
    key: tuple[int, bytes] | None = None  # (group, chained hash) while its content can be reused


@dataclass(slots=True)
class RequestBlocks:
    """The blocks of one request by group, in the order of the sequence."""

    groups: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    num_hashed: int = 0  # leading blocks already offered to the prefix cache
    first_live_sliding: int = 0


@dataclass(frozen=True, slots=True)
class ComputedBlocks:
    """A prefix found in the cache."""

    num_tokens: int
    blocks: tuple[tuple[int, ...], tuple[int, ...]]  # by group, null blocks included


class KVCacheManager:
    """Allocation, prefix cache and eviction. Integers only: the tensors live with the worker."""

    def __init__(
        self, num_blocks: int, block_size: int, sliding_window: int, *, enable_prefix_caching: bool = True
    ) -> None:
        """`num_blocks` counts the null block, which is never handed out."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._window = sliding_window
        self._caching = enable_prefix_caching
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # first is reused first
        self._cached: dict[tuple[int, bytes], int] = {}
        self._owned: dict[str, RequestBlocks] = {}
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of blocks that live requests own, 0..1."""
        return 1.0 - len(self._free) / max(1, self.num_blocks - 1)

    def max_request_tokens(self, max_num_batched_tokens: int) -> int:
        """The longest request that fits into the pool alone, in chunks of at most `max_num_batched_tokens`.

        While a chunk runs, the sliding group owns the chunk's blocks and the window before it.
        """
        usable = self.num_blocks - 1
        sliding = -(-(self._window + max_num_batched_tokens) // self.block_size) + 1
        return max(usable // 2, usable - sliding) * self.block_size

    def get_computed_blocks(self, request: Request) -> ComputedBlocks:
        """The longest cached prefix: its full-group blocks, and the sliding blocks its next token sees.

        At least one token is left to compute, because its logits are needed; with prompt logprobs all are.
        """
        if not self._caching or request.params.prompt_logprobs is not None:
            return ComputedBlocks(0, ((), ()))
        hashes = self._hashes(request, (request.num_tokens - 1) // self.block_size)
        full: list[int] = []
        for block_hash in hashes:
            block = self._cached.get((FULL_GROUP, block_hash))
            if block is None:
                break
            full.append(block)
        for length in range(len(full), 0, -1):
            first = self._first_visible(length * self.block_size) // self.block_size
            sliding = [self._cached.get((SLIDING_GROUP, h)) for h in hashes[first:length]]
            if None not in sliding:
                found = [b for b in sliding if b is not None]
                return ComputedBlocks(length * self.block_size, (tuple(full[:length]), (*[NULL_BLOCK] * first, *found)))
        return ComputedBlocks(0, ((), ()))

    def allocate_slots(
        self, request: Request, num_new_tokens: int, computed: ComputedBlocks | None = None
    ) -> tuple[list[int], list[int]] | None:
        """Allocates the blocks for the next `num_new_tokens` tokens of `request`.

        `computed` is the prefix hit of a request without blocks. Returns the block ids by group that are new to the
        worker (including the hit's), or None, with nothing changed, if too few blocks are free.
        """
        owned = self._owned.get(request.request_id)
        new_request = owned is None
        if owned is None:
            owned = RequestBlocks()
        hit = computed.blocks if computed is not None else ((), ())
        start = request.num_computed_tokens if computed is None else computed.num_tokens
        self._drop_out_of_window(owned, start)
        wanted = -(-(start + num_new_tokens) // self.block_size)
        if wanted <= len(owned.groups[FULL_GROUP]):  # as in most decode steps
            return [], []
        missing = [max(0, wanted - len(owned.groups[g]) - len(hit[g])) for g in (FULL_GROUP, SLIDING_GROUP)]
        revived = sum(1 for group in hit for b in group if b != NULL_BLOCK and self._blocks[b].refs == 0)
        if sum(missing) > len(self._free) - revived:
            return None
        if new_request:
            self._owned[request.request_id] = owned
        added: tuple[list[int], list[int]] = ([], [])
        for group in (FULL_GROUP, SLIDING_GROUP):  # every hit is taken before any free block is reused
            for block in hit[group]:
                if block != NULL_BLOCK:
                    self._take(block)
                added[group].append(block)
        for group in (FULL_GROUP, SLIDING_GROUP):
            added[group].extend(self._allocate() for _ in range(missing[group]))
            owned.groups[group].extend(added[group])
        if computed is not None:
            owned.num_hashed = computed.num_tokens // self.block_size
            owned.first_live_sliding = self._first_visible(computed.num_tokens) // self.block_size
        return added

    def cache_blocks(self, request: Request) -> None:
        """Offers the blocks that `request` has filled so far to the prefix cache."""
        if not self._caching:
            return
        owned = self._owned[request.request_id]
        num_full = request.num_computed_tokens // self.block_size
        if num_full <= owned.num_hashed:
            return
        hashes = self._hashes(request, num_full)
        for index in range(owned.num_hashed, num_full):
            for group in (FULL_GROUP, SLIDING_GROUP):
                block, key = owned.groups[group][index], (group, hashes[index])
                if block != NULL_BLOCK and key not in self._cached:
                    self._blocks[block].key = key
                    self._cached[key] = block
        owned.num_hashed = num_full

    def free(self, request: Request) -> None:
        """Gives the request's blocks back. Later blocks are evicted before earlier ones. Idempotent."""
        owned = self._owned.pop(request.request_id, None)
        if owned is None:
            return
        for group in (SLIDING_GROUP, FULL_GROUP):
            for block in reversed(owned.groups[group]):
                self._release(block)

    def check_integrity(self) -> None:
        """Raises AssertionError unless free + owned == total and every reference count equals its owners."""
        owners: Counter[int] = Counter()
        for owned in self._owned.values():
            owners.update(b for group in owned.groups for b in group if b != NULL_BLOCK)
        for block_id, block in enumerate(self._blocks):
            assert block.refs == owners[block_id], f"block {block_id}: {block.refs} refs, {owners[block_id]} owners"
            assert (block_id in self._free) == (block.refs == 0 and block_id != NULL_BLOCK), f"block {block_id}"
            assert block.key is None or self._cached[block.key] == block_id, f"block {block_id}: stale hash"
        assert len(self._free) + len(owners) + 1 == self.num_blocks
        assert all(self._blocks[block].key == key for key, block in self._cached.items())

    def _first_visible(self, position: int) -> int:
        """First position that the token at `position` sees through the sliding window."""
        return max(0, position - self._window + 1)

    def _drop_out_of_window(self, owned: RequestBlocks, num_computed: int) -> None:
        sliding = owned.groups[SLIDING_GROUP]
        first = min(self._first_visible(num_computed) // self.block_size, len(sliding))
        for index in range(owned.first_live_sliding, first):
            self._release(sliding[index])
            sliding[index] = NULL_BLOCK
        owned.first_live_sliding = max(owned.first_live_sliding, first)

    def _take(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.refs == 0:
            del self._free[block_id]
        block.refs += 1

    def _allocate(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        block = self._blocks[block_id]
        if block.key is not None:
            del self._cached[block.key]
            block.key = None
        block.refs = 1
        return block_id

    def _release(self, block_id: int) -> None:
        if block_id == NULL_BLOCK:
            return
        block = self._blocks[block_id]
        block.refs -= 1
        if block.refs == 0:
            self._free[block_id] = None
            if block.key is None:  # nothing to keep: reuse it before any cached block
                self._free.move_to_end(block_id, last=False)

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        extend_hashes(
            request.block_hashes, request.token_ids, count, self.block_size, request.cache_salt, request.adapter_key
        )
        return request.block_hashes[:count]
