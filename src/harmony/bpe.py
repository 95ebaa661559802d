"""Byte-pair encoding of one piece of text of any length, in bounded memory.

A sequence of tokens is the encoding of its bytes if each pair of neighbours is the encoding of theirs: merges happen in
the order of (rank, position), so the first merge across a boundary would also happen between these two tokens alone. A
long piece is therefore encoded in windows, and only the pair of tokens where two windows meet has to be checked.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

WINDOW = 512  # bytes; the library takes quadratic time for a window
TAIL = 64  # bytes at a window's end that are encoded again with the next window


class TooManyTokensError(ValueError):
    """The text has more tokens than `Limits.max_tokens`."""


class EncodingStoppedError(Exception):
    """`Limits.stopped` returned true."""


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Limits:
    """Ends encoding early: beyond `max_tokens`, or once `stopped` returns true."""

    max_tokens: int = sys.maxsize
    stopped: Callable[[], bool] = _never

    def less(self, num_tokens: int) -> Limits:
        """The limits that are left after `num_tokens`. Raises as `check` does."""
        if self is UNLIMITED:
            return self
        self.check(num_tokens)
        return Limits(self.max_tokens - num_tokens, self.stopped)

    def check(self, num_tokens: int = 0) -> None:
        """Raises TooManyTokensError or EncodingStoppedError if encoding must end here."""
        if num_tokens > self.max_tokens:
            raise TooManyTokensError
        if self.stopped():
            raise EncodingStoppedError


UNLIMITED = Limits()


@dataclass(frozen=True)
class BytePairs:
    """The encoder.

    `encode_text` returns the tokens of a text, or None if it would split the text into pieces.
    """

    token_bytes: Sequence[bytes]
    rank_of: Mapping[bytes, int]
    longest: int  # bytes of the longest token
    encode_text: Callable[[str], list[int] | None]
    _pairs: dict[tuple[int, int], bool] = field(default_factory=dict)

    def encode(self, data: bytes, limits: Limits = UNLIMITED, num_before: int = 0) -> list[int]:
        """Encodes one piece. `num_before`: tokens that already count towards the limit.

        Raises:
            TooManyTokensError: as soon as the piece certainly has more tokens than allowed.
            EncodingStoppedError
        """
        ids: list[int] = []
        start, end = 0, min(WINDOW, len(data))
        check_at = limits.max_tokens + self.longest  # the exact check costs a few milliseconds
        while True:
            limits.check()
            window = self._encode_window(data[start:end])
            if ids and not self._joins(ids[-1], window[0]):
                start -= len(self.token_bytes[ids.pop()])
                continue
            if end == len(data):
                limits.check(num_before + len(ids) + len(window))
                return ids + window
            count, size = self._settled(window, data, start)
            ids += window[:count]
            start += size
            if num_before + len(ids) > check_at:
                if self._certainly_more(ids, data, start, limits.max_tokens - num_before):
                    raise TooManyTokensError
                check_at += 8 * self.longest
            end = min(start + WINDOW, len(data))

    def _encode_window(self, data: bytes) -> list[int]:
        try:
            ids = self.encode_text(data.decode()) if len(data) > self.longest else None
        except UnicodeDecodeError:  # a window may begin or end within a character
            ids = None
        return merge_bytes(data, self.rank_of) if ids is None else ids

    def _joins(self, left: int, right: int) -> bool:
        known = self._pairs.get((left, right))
        if known is None:
            if len(self._pairs) > 100_000:
                self._pairs.clear()
            both = self.token_bytes[left] + self.token_bytes[right]
            known = merge_bytes(both, self.rank_of) == [left, right]
            self._pairs[left, right] = known
        return known

    def _settled(self, window: list[int], data: bytes, start: int) -> tuple[int, int]:
        """Returns how many of the window's tokens to keep, at least one, and their number of bytes.

        They end TAIL bytes before the window does, at the beginning of a character if possible.
        """
        sizes = [len(self.token_bytes[token]) for token in window]
        count, size, left_over = len(window), sum(sizes), 0
        while count > 1 and left_over < TAIL:
            count -= 1
            size -= sizes[count]
            left_over += sizes[count]
        fallback = count, size
        while count > 1 and data[start + size] & 0xC0 == 0x80:
            count -= 1
            size -= sizes[count]
        return fallback if data[start + size] & 0xC0 == 0x80 else (count, size)

    def _certainly_more(self, ids: list[int], data: bytes, end: int, max_tokens: int) -> bool:
        """Whether the whole piece has more than `max_tokens` tokens, if `ids` are those of data[:end].

        Some token of the whole piece begins at most `longest` - 1 bytes before `end`, and the tokens before it are the
        encoding of the bytes before it. So the whole piece has at least the lowest count over all these beginnings.
        """
        count, base = len(ids), end
        while count > 1 and base > end - 2 * self.longest:
            count -= 1
            base -= len(self.token_bytes[ids[count]])
        for begin in range(end - self.longest + 1, end + 1):
            rest = merge_bytes(data[base:begin], self.rank_of)
            if not self._joins(ids[count - 1], rest[0]) or count + len(rest) <= max_tokens:
                return False
        return True


def merge_bytes(data: bytes, rank_of: Mapping[bytes, int]) -> list[int]:
    """Encodes one piece: merges the pair of lowest rank first, the leftmost of equals. O(n log n)."""
    size = len(data)
    # the token that starts at i ends at end_of[i]; 0 once it is merged into another
    end_of = list(range(1, size + 1))
    start_before = list(range(-1, size))  # start of the token that ends at i
    heap: list[tuple[int, int, int]] = []

    def offer(start: int) -> None:
        middle = end_of[start]
        if middle < size:
            end = end_of[middle]
            rank = rank_of.get(data[start:end])
            if rank is not None:
                heapq.heappush(heap, (rank, start, end))

    for start in range(size - 1):
        offer(start)
    while heap:
        _, start, end = heapq.heappop(heap)
        middle = end_of[start]
        if middle == 0 or middle >= size or end_of[middle] != end or middle == end:
            continue  # one of the two has been merged already
        end_of[start], end_of[middle] = end, 0
        if end < size:
            start_before[end] = start
        offer(start)
        if start > 0:
            offer(start_before[start])
    ids, start = [], 0
    while start < size:
        ids.append(rank_of[data[start : end_of[start]]])
        start = end_of[start]
    return ids
