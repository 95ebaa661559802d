"""Open requests of the API process, with the outputs that have arrived."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from gptoss.engine.messages import AddRequest, FinishReason, TokenOutput


@dataclass(slots=True)
class OutputStream:
    request: AddRequest
    num_cached_tokens: int = 0  # of the prompt, expected in the engine's prefix cache
    added: float = field(default_factory=time.monotonic)
    items: deque[TokenOutput] = field(default_factory=deque)  # not read yet
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    output_ids: list[int] = field(default_factory=list)  # all tokens that have arrived
    num_scored_tokens: int = 0  # prompt tokens whose successor's logprobs have arrived
    started: bool = False
    aborted: bool = False
    num_resumes: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.token_ids)

    async def read(self) -> AsyncIterator[TokenOutput]:
        """Iterates over the outputs up to the terminal one."""
        while True:
            if not self.items:
                self.arrived.clear()
                await self.arrived.wait()
            output = self.take()
            yield output
            if output.finish_reason is not None:
                return

    def put(self, output: TokenOutput) -> None:
        self.output_ids += output.token_ids
        self.num_scored_tokens += len(output.prompt_logprobs or ())
        self.items.append(output)
        self.arrived.set()

    def take(self) -> TokenOutput:
        """The next output, joined with those that are queued after it."""
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
        """The request as the next engine has to continue it."""
        timeout_s = self.request.timeout_s
        if timeout_s is not None:
            timeout_s -= time.monotonic() - self.added
        return msgspec.structs.replace(
            self.request, output_ids=self.output_ids, num_scored_tokens=self.num_scored_tokens, timeout_s=timeout_s
        )


class OpenStreams:
    """The requests that have not ended, with the counts that admission needs."""

    def __init__(self) -> None:
        self._streams: dict[str, OutputStream] = {}
        self.of_tenant: Counter[str] = Counter()  # without zeros
        self.unstarted_tokens_of: Counter[str] = Counter()  # prompt tokens by tenant, without zeros
        self.num_unstarted = 0  # requests without a token
        self.num_unstarted_tokens = 0  # of their prompts
        self.num_background = 0  # which no limit and no other count here includes
        self.num_uncached_tokens = 0  # of these, what no cached prefix holds

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[OutputStream]:
        """Iterates over a copy, so that streams may be removed meanwhile."""
        return iter(list(self._streams.values()))

    def get(self, request_id: str) -> OutputStream | None:
        return self._streams.get(request_id)

    def add(self, stream: OutputStream) -> None:
        self._streams[stream.request.request_id] = stream
        if stream.request.background:
            self.num_background += 1
            stream.started = True
            return
        self.of_tenant[stream.request.tenant] += 1
        if not stream.started:
            self._count_unstarted(stream, 1)

    def mark_started(self, stream: OutputStream) -> None:
        if not stream.started:
            self._count_unstarted(stream, -1)
            stream.started = True

    def remove(self, request_id: str) -> OutputStream | None:
        """Removes and returns a stream; None if it is not open."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            if stream.request.background:
                self.num_background -= 1
                return stream
            if not stream.started:
                self._count_unstarted(stream, -1)
            _add(self.of_tenant, stream.request.tenant, -1)
        return stream

    def end(self, stream: OutputStream, reason: FinishReason, error: str | None = None) -> None:
        """Removes a stream and gives it its terminal output."""
        request_id = stream.request.request_id
        self.remove(request_id)
        stream.put(TokenOutput(request_id, [], reason, error=error))

    def fail_all(self, error: str) -> None:
        for stream in self:
            self.end(stream, FinishReason.ERROR, error)

    def resume_or_end(self, max_resumes: int, error: str) -> int:
        """After the engine's death: ends the requests that may not continue; returns how many may.

        `max_resumes`: how many deaths a request may survive.
        """
        for stream in self:
            if stream.aborted:
                self.end(stream, FinishReason.ABORT)
            elif stream.num_resumes >= max_resumes:
                self.end(stream, FinishReason.ERROR, error)
            else:
                stream.num_resumes += 1
        return len(self)

    def adapters_in_use(self) -> tuple[set[int], set[int]]:
        """The ids of the adapters that running requests use, and those that waiting ones do."""
        streams = [stream for stream in self if stream.request.adapter]
        running = {stream.request.adapter for stream in streams if stream.started}
        return running, {stream.request.adapter for stream in streams if not stream.started}

    @property
    def num_live(self) -> int:
        """Requests that are not background ones."""
        return len(self._streams) - self.num_background

    def _count_unstarted(self, stream: OutputStream, sign: int) -> None:
        num_tokens = sign * stream.num_prompt_tokens
        self.num_unstarted += sign
        self.num_unstarted_tokens += num_tokens
        self.num_uncached_tokens += num_tokens - sign * stream.num_cached_tokens
        _add(self.unstarted_tokens_of, stream.request.tenant, num_tokens)


def refusal(
    streams: Sequence[OpenStreams],
    tenant: str,
    num_requests: int,
    num_tokens: int,
    max_requests: int,
    max_unstarted_tokens: int,
) -> Literal["requests", "tokens"] | None:
    """Which limit more requests of a tenant would exceed; None if they may be added.

    A tenant with less than an equal share of all requests, or of the unstarted prompts, may exceed the limits.
    `streams`: of each engine; the limits are for all of them together.
    """
    if sum(s.num_live for s in streams) + num_requests > max_requests:
        requests_of = sum((s.of_tenant for s in streams), Counter[str]())
        if not _is_within_share(requests_of[tenant] + num_requests, max_requests, requests_of, tenant):
            return "requests"
    num_unstarted_tokens = sum(s.num_unstarted_tokens for s in streams)
    if any(s.num_unstarted for s in streams) and num_unstarted_tokens + num_tokens > max_unstarted_tokens:
        tokens_of = sum((s.unstarted_tokens_of for s in streams), Counter[str]())
        if not _is_within_share(tokens_of[tenant] + num_tokens, max_unstarted_tokens, tokens_of, tenant):
            return "tokens"
    return None


def _is_within_share(count: int, limit: int, counts: Mapping[str, int], tenant: str) -> bool:
    """Whether a tenant's `count` is at most an equal share of `limit`."""
    return count <= limit // len({*counts, tenant})


def _add(counts: Counter[str], name: str, number: int) -> None:
    counts[name] += number
    if not counts[name]:
        del counts[name]
