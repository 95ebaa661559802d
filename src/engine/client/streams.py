"""Requests as the API process holds them: what they ask for, and what has arrived for them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from gptoss.engine.messages import AddRequest, TokenOutput


@dataclass(slots=True)
class OutputStream:
    request: AddRequest
    added: float = field(default_factory=time.monotonic)
    items: deque[TokenOutput] = field(default_factory=deque)  # that were not read yet
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    output_ids: list[int] = field(default_factory=list)  # all tokens that arrived
    num_scored_tokens: int = 0  # of the prompt: those behind them have had their logprobs
    started: bool = False
    aborted: bool = False
    num_resumes: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    def put(self, output: TokenOutput) -> None:
        self.output_ids += output.token_ids
        self.num_scored_tokens += len(output.prompt_logprobs or ())
        self.items.append(output)
        self.arrived.set()

    def take(self) -> TokenOutput:
        """The next output, joined with those that queued up behind it."""
        first = self.items.popleft()
        while self.items and first.finish_reason is None:
            output = self.items.popleft()
            first.token_ids += output.token_ids
            if output.prompt_logprobs is not None:
                first.prompt_logprobs = (first.prompt_logprobs or []) + output.prompt_logprobs
            if output.queue_s is not None:
                first.queue_s, first.prefill_s = output.queue_s, output.prefill_s
            first.num_cached_tokens = max(first.num_cached_tokens, output.num_cached_tokens)
            if output.logprobs is not None:
                first.logprobs = (first.logprobs or []) + output.logprobs
            first.finish_reason, first.error = output.finish_reason, output.error
        return first

    def rest(self) -> AddRequest:
        """What is left of the request for an engine that knows nothing of it."""
        timeout_s = self.request.timeout_s
        if timeout_s is not None:
            timeout_s -= time.monotonic() - self.added
        return msgspec.structs.replace(
            self.request, output_ids=self.output_ids, num_scored_tokens=self.num_scored_tokens, timeout_s=timeout_s
        )


class OpenStreams:
    """The requests that have not ended. `num_unstarted` of them have no token yet."""

    def __init__(self) -> None:
        self._streams: dict[str, OutputStream] = {}
        self.of_tenant: Counter[str] = Counter()  # none of them 0
        self.unstarted_tokens_of: Counter[str] = Counter()  # of their prompts, by tenant; none of them 0
        self.num_unstarted = 0
        self.num_unstarted_tokens = 0  # of their prompts

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[OutputStream]:
        """Those of now: what is removed meanwhile does no harm."""
        return iter(list(self._streams.values()))

    def get(self, request_id: str) -> OutputStream | None:
        return self._streams.get(request_id)

    def add(self, stream: OutputStream) -> None:
        self._streams[stream.request.request_id] = stream
        self.of_tenant[stream.request.tenant] += 1
        self.unstarted_tokens_of[stream.request.tenant] += stream.num_prompt_tokens
        self.num_unstarted += 1
        self.num_unstarted_tokens += stream.num_prompt_tokens

    def mark_started(self, stream: OutputStream) -> None:
        if not stream.started:
            stream.started = True
            self.num_unstarted -= 1
            self.num_unstarted_tokens -= stream.num_prompt_tokens
            _take(self.unstarted_tokens_of, stream.request.tenant, stream.num_prompt_tokens)

    def remove(self, request_id: str) -> bool:
        """Whether it was there."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            self.mark_started(stream)
            _take(self.of_tenant, stream.request.tenant, 1)
        return stream is not None


def _take(counts: Counter[str], name: str, number: int) -> None:
    counts[name] -= number
    if not counts[name]:
        del counts[name]
