"""The text of a cell, bounded: its beginning and its end."""

from __future__ import annotations


class BoundedOutput:
    """Keeps the first and the last half of `limit` bytes, and counts the rest."""

    def __init__(self, limit: int) -> None:
        self._half = max(1, limit // 2)
        self._head, self._tail = bytearray(), bytearray()
        self.total = 0

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self._half - len(self._head)
        self._head += data[:room] if room > 0 else b""
        self._tail += data[room:] if room > 0 else data
        if len(self._tail) > 2 * self._half:
            del self._tail[: -self._half]

    def text(self) -> str:
        """What was kept, as UTF-8, with a note of what was left out."""
        left_out = self.total - len(self._head) - min(len(self._tail), self._half)
        tail = bytes(self._tail[-self._half :])
        if not left_out:
            return (bytes(self._head) + tail).decode(errors="replace")
        return (
            f"{self._head.decode(errors='ignore')}\n[... {left_out} bytes left out ...]\n{tail.decode(errors='ignore')}"
        )
