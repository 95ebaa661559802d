"""Chooses the engine for a request: the one that has most of its prompt cached, unless it is too busy.

Engines do not report what they cache. The router remembers the block hashes of the prompts it sent to each, as many as
the engine has blocks for, and forgets the least recently used first, as the engine does.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Sequence

REQUEST_TOKENS = 2048  # what a running request weighs, in prompt tokens to compute: some 200 decode steps on a CPU
STICKY_TOKENS = 4 * REQUEST_TOKENS  # load above the least loaded engine's that a conversation stays for


class SentPrompts:
    """The block hashes of the prompts that were sent to one engine, least recently used first.

    A block is always used after those that follow it, so that the beginning of a prompt outlives its end.
    """

    def __init__(self) -> None:
        self.max_blocks = 1024
        self._last_user: OrderedDict[bytes, str] = OrderedDict()  # hash -> request id

    def __len__(self) -> int:
        return len(self._last_user)

    def count(self, hashes: Sequence[bytes]) -> int:
        """The number of leading blocks that were sent."""
        return bisect_left(hashes, True, key=lambda block: block not in self._last_user)

    def last_user(self, block: bytes) -> str:
        """The id of the last request whose prompt has the block."""
        return self._last_user[block]

    def add(self, hashes: Sequence[bytes], request_id: str) -> None:
        users = self._last_user
        for block in reversed(hashes):
            users[block] = request_id
            users.move_to_end(block)
        while len(users) > self.max_blocks:
            users.popitem(last=False)

    def clear(self) -> None:
        self._last_user.clear()


class Router:
    """Prompts by engine. Engines are numbered from 0."""

    def __init__(self, num_engines: int, block_size: int, is_open: Callable[[str], bool]) -> None:
        """`is_open`: whether the request with that id has not ended."""
        self.sent = [SentPrompts() for _ in range(num_engines)]
        self._block_size = block_size
        self._is_open = is_open

    def choose(self, hashes: Sequence[bytes], loads: dict[int, int]) -> tuple[int, int]:
        """Returns the engine for a prompt, and how many of its tokens that probably has in its cache.

        Args:
            hashes: of the prompt's full blocks.
            loads: engine -> tokens it still has to compute, of the engines that may be chosen; not empty.
        """
        cached = {engine: self.sent[engine].count(hashes) * self._block_size for engine in loads}

        def preference(engine: int) -> tuple[int, int]:
            return loads[engine], len(self.sent[engine])

        best = min(loads, key=lambda engine: (-cached[engine], *preference(engine)))
        least = min(loads, key=preference)
        advantage = cached[best] - cached[least]
        if loads[best] - loads[least] > self._patience(hashes, best, cached[best], advantage):
            best = least
        return best, cached[best]

    def _patience(self, hashes: Sequence[bytes], engine: int, num_cached: int, advantage: int) -> int:
        """The load above the least loaded engine's for which an engine with a longer cached prefix is chosen.

        If a running request has the same beginning, it is one that clients share, such as a system prompt: computing it
        on another engine too pays soon. Else it is a conversation's, which nothing but the conversation will ask for.
        """
        if advantage <= 0:
            return 0
        user = self.sent[engine].last_user(hashes[num_cached // self._block_size - 1])
        return advantage // 8 if self._is_open(user) else STICKY_TOKENS + advantage
