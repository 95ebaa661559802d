"""Logprobs of content tokens, in the order of the text that they belong to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptoss.engine.messages import TokenLogprobs
from gptoss.harmony.deltas import SEPARATOR


@dataclass(slots=True)
class ContentLogprobs:
    """Entries of content tokens, handed out when the bytes before them have been sent."""

    bytes_of: Callable[[int], bytes]
    waiting: dict[int, tuple[int, TokenLogprobs]] = field(default_factory=dict)  # by position in the output
    queue: deque[tuple[bytes, dict[str, Any] | None]] = field(default_factory=deque)
    queued_bytes: int = 0

    def enqueue(self, positions: Sequence[int]) -> None:
        for position in positions:
            token_id, logprobs = self.waiting.pop(position)
            data = self.bytes_of(token_id)
            self.queue.append((data, self._entry(data, logprobs)))

    def enqueue_separator(self) -> None:
        """Adds the bytes of a separator, which has no token and so no entry."""
        self.queue.append((SEPARATOR.encode(), None))

    def take(self, num_bytes: int, *, last: bool = False) -> list[dict[str, Any]]:
        """The entries whose bytes begin within the next `num_bytes`; the last one is cut where the text was."""
        out, self.queued_bytes = [], self.queued_bytes + num_bytes
        while self.queue and self.queued_bytes > 0 and (last or self.queued_bytes >= len(self.queue[0][0])):
            data, entry = self.queue.popleft()
            if entry is not None and len(data) > self.queued_bytes:
                cut = data[: self.queued_bytes]
                entry |= {"token": cut.decode("utf-8", "replace"), "bytes": list(cut)}
            self.queued_bytes -= len(data)
            if entry is not None:
                out.append(entry)
        return out

    def _entry(self, data: bytes, logprobs: TokenLogprobs) -> dict[str, Any]:
        return {
            **_token(data, logprobs.logprob),
            "top_logprobs": [_token(self.bytes_of(t), logprob) for t, logprob in logprobs.alternatives],
        }


def _token(data: bytes, logprob: float) -> dict[str, Any]:
    return {"token": data.decode("utf-8", "replace"), "logprob": min(logprob, 0.0), "bytes": list(data)}
