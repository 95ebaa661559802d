"""Allocates the blocks of the KV cache to requests, and finds cached prefixes.

Layers form two groups. Full layers keep a request's whole history; sliding layers only what the window still
reaches. Both groups take blocks from one pool: block b of the pool is row b of every layer's cache tensor, and the
i-th full layer and the i-th sliding layer share a tensor, so a block costs the same bytes in either group.

A block that holds `block_size` computed tokens gets a hash chained over all tokens before it (block_hash.py). Freed
blocks keep their hash, and the last one of a request its tokens, until they are reused, oldest first: they are the
prefix cache (prefix_index.py).

A new request shares the full blocks that its tokens begin with. Of the block that has most of the tokens after those it
gets a copy, which the workers make before they compute the step. A free block whose other tokens no prefix needs
becomes its own.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from gptoss.engine.block_hash import extend_hashes, root_hash
from gptoss.engine.core.prefix_index import CachedBlock, OpenBlocks, PrefixIndex, token_bytes
from gptoss.engine.core.request import Request
from gptoss.engine.messages import NULL_BLOCK

FULL_GROUP, SLIDING_GROUP = 0, 1


@dataclass(slots=True)
class RequestBlocks:
    """The blocks of one request by group, in the order of the sequence."""

    groups: tuple[list[int], list[int]] = field(default_factory=lambda: ([], []))
    num_hashed: int = 0  # leading blocks already offered to the prefix cache
    first_live_sliding: int = 0
    parent: bytes | None = None  # hash of the block before the unfinished one, once a step has computed any


@dataclass(frozen=True, slots=True)
class ComputedBlocks:
    """A prefix found in the cache."""

    num_tokens: int = 0
    blocks: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # by group, null blocks included
    # by group: a block that has the tokens after those of `blocks`; empty if there are none
    sources: tuple[int, ...] = ()


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
        self._refs = [0] * num_blocks  # requests that own each block, and copies of it that are not made yet
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))  # first is reused first
        self._index = PrefixIndex(num_groups=2)
        self._open = OpenBlocks()
        self._copies: list[tuple[int, int]] = []
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
            return ComputedBlocks()
        hashes = self._hashes(request, (request.num_tokens - 1) // self.block_size)
        full: list[int] = []
        for block_hash in hashes:
            block = self._index.full_block(FULL_GROUP, block_hash)
            if block is None:
                break
            full.append(block)
        for length in range(len(full), -1, -1):
            parent = hashes[length - 1] if length else _root(request)
            sources, count = self._find_sources(request, parent, length * self.block_size)
            num_tokens = length * self.block_size + count
            # the more tokens of the next block are there, the fewer blocks before it are needed
            first = min(self._first_visible(num_tokens) // self.block_size, length)
            sliding = self._find_sliding(hashes[first:length])
            if sliding is not None:
                return ComputedBlocks(num_tokens, (tuple(full[:length]), (*[NULL_BLOCK] * first, *sliding)), sources)
        raise AssertionError("a prefix of no tokens is always there")

    def _find_sliding(self, hashes: list[bytes]) -> list[int] | None:
        """The sliding blocks with these hashes, if all are cached."""
        found = []
        for block_hash in reversed(hashes):
            block = self._index.full_block(SLIDING_GROUP, block_hash)
            if block is None:
                return None
            found.append(block)
        return found[::-1]

    def _find_sources(self, request: Request, parent: bytes, start: int) -> tuple[tuple[int, ...], int]:
        """The blocks after `parent` that share most tokens from `start` on, and how many both share."""
        if parent not in self._open and not self._index.has_children(SLIDING_GROUP, parent):
            return (), 0
        tokens = token_bytes(request.token_ids[start : min(start + self.block_size, request.num_tokens - 1)])
        running, num_running = self._open.longest(parent, start, tokens)
        sources, counts = [], []
        for group in (FULL_GROUP, SLIDING_GROUP):
            block, count = self._index.longest(group, parent, tokens)
            if running is not None and num_running > count:
                block, count = self._owned[running.request_id].groups[group][start // self.block_size], num_running
            sources.append(block)
            counts.append(count)
        return (tuple(sources), min(counts)) if min(counts) else ((), 0)

    def allocate_slots(
        self, request: Request, num_new_tokens: int, computed: ComputedBlocks | None = None
    ) -> tuple[list[int], list[int]] | None:
        """Allocates the blocks for the next `num_new_tokens` tokens of `request`.

        `computed` is the prefix hit of a request without blocks. Returns the block ids by group that are new to the
        worker (including the hit's), or None, with nothing changed, if too few blocks are free.
        """
        owned = self._owned.get(request.request_id) or RequestBlocks()
        start = request.num_computed_tokens if computed is None else computed.num_tokens
        self._drop_out_of_window(owned, start)
        wanted = -(-(start + num_new_tokens) // self.block_size)
        if wanted <= len(owned.groups[FULL_GROUP]):  # as in most decode steps
            return [], []
        hit, sources = (computed.blocks, computed.sources) if computed is not None else (((), ()), ())
        missing = [max(0, wanted - len(owned.groups[g]) - len(hit[g])) for g in (FULL_GROUP, SLIDING_GROUP)]
        revived = sum(1 for group in hit for b in group if b != NULL_BLOCK and self._refs[b] == 0)
        num_spare = len(self._free) - revived - sum(missing)
        if num_spare < 0:
            return None
        for block in (*hit[FULL_GROUP], *hit[SLIDING_GROUP]):  # every hit is taken before any free block is reused
            if block != NULL_BLOCK:
                self._take(block)
        begun = self._begin_blocks(sources, start % self.block_size, num_spare)
        added: tuple[list[int], list[int]] = ([], [])
        for group in (FULL_GROUP, SLIDING_GROUP):
            added[group].extend((*hit[group], *begun[group]))
            added[group].extend(self._allocate() for _ in range(missing[group] - len(begun[group])))
            owned.groups[group].extend(added[group])
        self._owned[request.request_id] = owned
        if computed is not None:
            owned.num_hashed = start // self.block_size
            owned.first_live_sliding = self._first_visible(start) // self.block_size
        return added

    def _begin_blocks(self, sources: tuple[int, ...], count: int, num_spare: int) -> list[list[int]]:
        """Takes a block for each source, which will have the source's first `count` tokens.

        A source that no request owns becomes that block itself if its other tokens are not needed, or if too few blocks
        are free to keep it; otherwise a copy is listed. Returns the blocks by group.
        """
        free = [self._refs[source] == 0 for source in sources]
        is_short = num_spare < sum(free)
        kept = [not f or not (is_short or self._index.is_used_up(s, count)) for s, f in zip(sources, free, strict=True)]
        for source in sources:
            self._take(source)
        begun: list[list[int]] = []
        for source, is_kept in zip(sources, kept, strict=True):
            if is_kept:
                block = self._allocate()
                self._copies.append((source, block))
            else:
                block = source
                self._index.remove(source)
            begun.append([block])
        return begun or [[], []]

    def take_copies(self) -> list[tuple[int, int]]:
        """The blocks (from, to) that the step being scheduled copies before it computes.

        The sources are released: blocks allocated from now on are written by later steps, after these copies.
        """
        copies, self._copies = self._copies, []
        for source, _ in copies:
            self._release(source)
        return copies

    def cache_blocks(self, request: Request) -> None:
        """Offers what `request` has computed so far to the prefix cache."""
        if not self._caching:
            return
        owned, size = self._owned[request.request_id], self.block_size
        num_full = request.num_computed_tokens // size
        if num_full <= owned.num_hashed and owned.parent is not None:
            return
        hashes = self._hashes(request, num_full)
        for index in range(owned.num_hashed, num_full):
            tokens = token_bytes(request.token_ids[index * size : (index + 1) * size])
            parent = hashes[index - 1] if index else _root(request)
            for group in (FULL_GROUP, SLIDING_GROUP):
                self._offer(owned.groups[group][index], CachedBlock(group, parent, tokens, hashes[index]))
        owned.num_hashed = num_full
        parent = hashes[-1] if num_full else _root(request)
        self._open.move(request, owned.parent, parent)
        owned.parent = parent

    def _offer(self, block: int, content: CachedBlock) -> None:
        if block == NULL_BLOCK or block in self._index:
            return
        replaced = self._index.add(block, content)
        if replaced is not None and self._refs[replaced] == 0:
            self._free.move_to_end(replaced, last=False)

    def _offer_unfinished(self, request: Request, owned: RequestBlocks) -> None:
        """Offers the computed tokens of a request's last block, from which other requests may continue."""
        if owned.parent is None:
            return
        self._open.move(request, owned.parent, None)
        start = owned.num_hashed * self.block_size
        tokens = token_bytes(request.token_ids[start : request.num_computed_tokens])
        for group in (FULL_GROUP, SLIDING_GROUP):
            if tokens:
                self._offer(owned.groups[group][owned.num_hashed], CachedBlock(group, owned.parent, tokens))

    def free(self, request: Request) -> None:
        """Gives the request's blocks back. Later blocks are evicted before earlier ones. Idempotent."""
        owned = self._owned.pop(request.request_id, None)
        if owned is None:
            return
        self._offer_unfinished(request, owned)
        for group in (SLIDING_GROUP, FULL_GROUP):
            for block in reversed(owned.groups[group]):
                self._release(block)

    def check_integrity(self) -> None:
        """Raises AssertionError unless free + owned == total and every reference count equals its owners."""
        owners: Counter[int] = Counter(source for source, _ in self._copies)
        for owned in self._owned.values():
            owners.update(b for group in owned.groups for b in group if b != NULL_BLOCK)
        for block, refs in enumerate(self._refs):
            assert refs == owners[block], f"block {block}: {refs} refs, {owners[block]} owners"
            assert (block in self._free) == (refs == 0 and block != NULL_BLOCK), f"block {block}"
        assert len(self._free) + len(owners) + 1 == self.num_blocks
        assert NULL_BLOCK not in self._index
        self._index.check_integrity()
        assert self._open.request_ids() == {name for name, owned in self._owned.items() if owned.parent is not None}

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

    def _take(self, block: int) -> None:
        if self._refs[block] == 0:
            del self._free[block]
        self._refs[block] += 1

    def _allocate(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._index.remove(block)
        self._refs[block] = 1
        return block

    def _release(self, block: int) -> None:
        if block == NULL_BLOCK:
            return
        self._refs[block] -= 1
        if self._refs[block] == 0:
            self._free[block] = None
            if block not in self._index:  # nothing to keep: reuse it before any cached block
                self._free.move_to_end(block, last=False)

    def _hashes(self, request: Request, count: int) -> list[bytes]:
        extend_hashes(
            request.block_hashes, request.token_ids, count, self.block_size, request.cache_salt, request.adapter_key
        )
        return request.block_hashes[:count]


def _root(request: Request) -> bytes:
    return root_hash(request.cache_salt, request.adapter_key)
