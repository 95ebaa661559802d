"""What has arrived for one request and was not read yet."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from src.engine.messages import TokenOutput


@dataclass(slots=True)
class OutputStream:
    """Outputs that arrived and were not read yet."""

    num_prompt_tokens: int
    items: deque[TokenOutput] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    started: bool = False

    def put(self, output: TokenOutput) -> None:
        self.items.append(output)
        self.arrived.set()

    def take(self) -> TokenOutput:
        """The next output, joined with those that queued up behind it."""
        first = self.items.popleft()
        while self.items and first.finish_reason is None:
            output = self.items.popleft()
            first.token_ids += output.token_ids
            if output.logprobs is not None:
                first.logprobs = (first.logprobs or []) + output.logprobs
            first.finish_reason, first.error = output.finish_reason, output.error
        return first
