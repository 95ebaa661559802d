"""Finds the cached block that begins with given tokens, after a given block.

Blocks are known by the hash of the block before them (block_hash.py) and the tokens that they hold themselves. A full
block is also found by its own hash.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from gptoss.engine.core.request import Request

TOKEN_BYTES = array("I").itemsize
MAX_COMPARED = 32  # running requests that are compared with a new one, latest first


@dataclass(frozen=True, slots=True)
class CachedBlock:
    """What a block of one group of layers holds."""

    group: int
    parent: bytes  # hash of the block before it; of a first block, root_hash
    tokens: bytes  # its computed tokens (token_bytes)
    own_hash: bytes | None = None  # of a full block


class PrefixIndex:
    """The blocks of every group whose contents can be reused.

    Of two blocks of which one holds the other's tokens and more, only the longer one is kept.
    """

    def __init__(self, num_groups: int) -> None:
        self._full: list[dict[bytes, int]] = [{} for _ in range(num_groups)]
        # parent -> tokens and block, sorted: the longest match of any tokens is next to where they would be inserted
        self._children: list[dict[bytes, list[tuple[bytes, int]]]] = [{} for _ in range(num_groups)]
        self._contents: dict[int, CachedBlock] = {}

    def __contains__(self, block: int) -> bool:
        return block in self._contents

    def __len__(self) -> int:
        return len(self._contents)

    def full_block(self, group: int, own_hash: bytes) -> int | None:
        """The full block with that hash."""
        return self._full[group].get(own_hash)

    def add(self, block: int, content: CachedBlock) -> int | None:
        """Adds a block, unless another one holds its tokens; returns the shorter block that it replaces."""
        full = self._full[content.group]
        if content.own_hash in full or not content.tokens:
            return None
        children = self._children[content.group].setdefault(content.parent, [])
        at = bisect_left(children, (content.tokens,))
        if at < len(children) and children[at][0].startswith(content.tokens):
            return None
        replaced = None
        if at and content.tokens.startswith(children[at - 1][0]):
            at -= 1
            replaced = children[at][1]
            children[at] = (content.tokens, block)
            del self._contents[replaced]
        else:
            children.insert(at, (content.tokens, block))
        self._contents[block] = content
        if content.own_hash is not None:
            full[content.own_hash] = block
        return replaced

    def remove(self, block: int) -> None:
        content = self._contents.pop(block, None)
        if content is None:
            return
        siblings = self._children[content.group]
        children = siblings[content.parent]
        if len(children) == 1:
            del siblings[content.parent]
        else:
            del children[bisect_left(children, (content.tokens,))]
        if content.own_hash is not None:
            del self._full[content.group][content.own_hash]

    def has_children(self, group: int, parent: bytes) -> bool:
        return parent in self._children[group]

    def longest(self, group: int, parent: bytes, tokens: bytes) -> tuple[int, int]:
        """Returns the block that begins with most of `tokens`, and with how many; any block if none does."""
        children = self._children[group].get(parent, [])
        at = bisect_left(children, (tokens,))
        matches = [(common_tokens(held, tokens), block) for held, block in children[max(0, at - 1) : at + 1]]
        count, block = max(matches, default=(0, 0))
        return block, count

    def is_used_up(self, block: int, count: int) -> bool:
        """Whether no cached token is lost if those after the block's first `count` are overwritten."""
        content = self._contents.get(block)
        return content is None or (content.own_hash is None and len(content.tokens) <= count * TOKEN_BYTES)

    def check_integrity(self) -> None:
        """Raises AssertionError unless all tables hold the same blocks."""
        listed = {
            block: CachedBlock(group, parent, tokens, self._contents[block].own_hash)
            for group, siblings in enumerate(self._children)
            for parent, children in siblings.items()
            for tokens, block in children
        }
        assert listed == self._contents
        full = {block: c for block, c in self._contents.items() if c.own_hash is not None}
        assert sum(map(len, self._full)) == len(full)
        assert all(self._full[c.group][c.own_hash] == block for block, c in full.items() if c.own_hash is not None)
        for children in (c for siblings in self._children for c in siblings.values()):
            assert children and all(
                not b.startswith(a) and a < b for (a, _), (b, _) in zip(children, children[1:], strict=False)
            )


class OpenBlocks:
    """The running requests by the block before their unfinished one."""

    def __init__(self) -> None:
        self._requests: dict[bytes, dict[str, Request]] = {}

    def __contains__(self, parent: bytes) -> bool:
        return parent in self._requests

    def request_ids(self) -> set[str]:
        return {request_id for requests in self._requests.values() for request_id in requests}

    def move(self, request: Request, old: bytes | None, new: bytes | None) -> None:
        """Puts a request that was after the block `old` after `new`. None: nowhere."""
        if old is not None:
            requests = self._requests[old]
            del requests[request.request_id]
            if not requests:
                del self._requests[old]
        if new is not None:
            self._requests.setdefault(new, {})[request.request_id] = request

    def longest(self, parent: bytes, start: int, tokens: bytes) -> tuple[Request | None, int]:
        """Returns the request that has computed most of `tokens` from position `start`, and how many."""
        best, most, wanted = None, 0, len(tokens) // TOKEN_BYTES
        for request in islice(reversed(self._requests.get(parent, {}).values()), MAX_COMPARED):
            end = min(request.num_computed_tokens, start + wanted)
            count = common_tokens(token_bytes(request.token_ids[start:end]), tokens)
            if count > most:
                best, most = request, count
            if most == wanted:
                break
        return best, most


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """TOKEN_BYTES bytes a token."""
    return array("I", token_ids).tobytes()


def common_tokens(a: bytes, b: bytes) -> int:
    """How many tokens both begin with."""
    length = min(len(a), len(b))
    difference = int.from_bytes(a[:length], "big") ^ int.from_bytes(b[:length], "big")
    return (length - (difference.bit_length() + 7) // 8) // TOKEN_BYTES
