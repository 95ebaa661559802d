"""Open requests of the API process, with the outputs that have arrived."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from gptoss.engine.messages import AddRequest, TokenOutput


@dataclass(slots=True)
class OutputStream:
    request: AddRequest
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
        self.unstarted_tokens_of[stream.request.tenant] += stream.num_prompt_tokens
        self.num_unstarted += 1
        self.num_unstarted_tokens += stream.num_prompt_tokens

    def mark_started(self, stream: OutputStream) -> None:
        if not stream.started:
            stream.started = True
            self.num_unstarted -= 1
            self.num_unstarted_tokens -= stream.num_prompt_tokens
            _take(self.unstarted_tokens_of, stream.request.tenant, stream.num_prompt_tokens)

    def refusal(
        self, tenant: str, num_requests: int, num_tokens: int, max_requests: int, max_unstarted_tokens: int
    ) -> Literal["requests", "tokens"] | None:
        """Which limit more requests of a tenant would exceed; None if they may be added.

        A tenant with less than an equal share of all requests, or of the unstarted prompts, may exceed the limits.
        """
        of_tenant = self.of_tenant[tenant] + num_requests
        num_live = len(self) - self.num_background
        if num_live + num_requests > max_requests and not _is_within_share(
            of_tenant, max_requests, self.of_tenant, tenant
        ):
            return "requests"
        tokens_of_tenant = self.unstarted_tokens_of[tenant] + num_tokens
        if (
            self.num_unstarted
            and self.num_unstarted_tokens + num_tokens > max_unstarted_tokens
            and not _is_within_share(tokens_of_tenant, max_unstarted_tokens, self.unstarted_tokens_of, tenant)
        ):
            return "tokens"
        return None

    def remove(self, request_id: str) -> bool:
        """Removes a stream; returns whether it was open."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            if stream.request.background:
                self.num_background -= 1
            else:
                self.mark_started(stream)
                _take(self.of_tenant, stream.request.tenant, 1)
        return stream is not None


def _is_within_share(count: int, limit: int, counts: Mapping[str, int], tenant: str) -> bool:
    """Whether a tenant's `count` is at most an equal share of `limit`."""
    return count <= limit // len({*counts, tenant})


def _take(counts: Counter[str], name: str, number: int) -> None:
    counts[name] -= number
    if not counts[name]:
        del counts[name]
