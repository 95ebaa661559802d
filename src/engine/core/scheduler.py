"""Decides how many tokens each request computes in the next step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from gptoss.engine.config import SCORED_ROWS, EngineConfig
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.draft_steps import add_drafts, limit_head
from gptoss.engine.core.kv_cache_manager import ComputedBlocks, KVCacheManager
from gptoss.engine.core.request import Request, RequestStatus
from gptoss.engine.core.request_group import RequestGroup
from gptoss.engine.core.waiting import Entry
from gptoss.engine.messages import (
    FinishReason,
    ModelRunnerOutput,
    NewRequest,
    SchedulerOutput,
    TokenLogprobs,
    TokenOutput,
)

MAX_SKIPPED = 64  # waiting requests, in one step
# Prompt tokens in a step of background requests, for whose end a live request waits; on a CPU they take longer
BACKGROUND_PROMPT_TOKENS, BACKGROUND_PROMPT_TOKENS_CPU = 256, 64
MIN_SHARED_TOKENS = 16  # for which a request waits a step, so that they are computed once


class Scheduler:
    """Continuous batching by one rule.

    There is no prefill phase and no decode phase. A request has `num_tokens` known tokens, of which
    `num_computed_tokens` are in the cache; each step hands out a budget of tokens so that the second number catches
    up with the first. Chunked prefill, prefix hits, recompute after preemption and speculative tokens are all that
    one subtraction. (After vLLM's v1 scheduler.)

    A step holds background requests only while no live request runs or waits. Until then those that run keep their
    blocks, unless a live request needs them.
    """

    def __init__(
        self,
        config: EngineConfig,
        kv: KVCacheManager,
        *,
        max_in_flight: int = 1,
        drafter: Drafter | None = None,
        lookahead: int = 0,
        background_prompt_tokens: int = BACKGROUND_PROMPT_TOKENS,
    ) -> None:
        """
        Args:
            max_in_flight: steps that may be scheduled before the first one's result is known, one per pipeline stage;
                a request is in one of them at a time.
            drafter: proposes draft tokens.
            lookahead: additional tokens that get a slot in the cache, for steps that workers prelaunch.
            background_prompt_tokens: most prompt tokens of a step of background requests.
        """
        self._config = config
        self._drafter = drafter
        self._lookahead, self._background_prompt_tokens = lookahead, background_prompt_tokens
        self._max_in_flight = max_in_flight
        self._in_flight: set[str] = set()
        self._kv = kv
        self._requests: dict[str, Request] = {}
        self._live, self._background = RequestGroup(config), RequestGroup(config)
        self._known: set[str] = set()  # request ids that the workers hold state for
        self._finished_or_preempted: list[str] = []  # since the last step
        self._scored_rows_left = SCORED_ROWS  # of the step being scheduled
        self.num_preemptions = 0  # of live requests
        self.num_background_preemptions = 0
        self.num_drafts = 0
        self.num_accepted = 0

    @property
    def num_running(self) -> int:
        """Live requests that run."""
        return len(self._live.running)

    @property
    def num_waiting(self) -> int:
        """Live requests that wait."""
        return self._live.num_waiting

    @property
    def num_waiting_tokens(self) -> int:
        return self._live.num_waiting_tokens

    @property
    def num_background_running(self) -> int:
        """Background requests that hold blocks, in a step or not."""
        return len(self._background.running)

    @property
    def num_background_waiting(self) -> int:
        return self._background.num_waiting

    @property
    def num_head_drafts(self) -> tuple[int, int]:
        """Drafts of the draft head, and how many of them were accepted."""
        drafter = self._drafter
        return (0, 0) if drafter is None else (drafter.num_head_drafts, drafter.num_head_accepted)

    def has_requests(self) -> bool:
        return bool(self._requests)

    def uses_adapter(self, adapter: int) -> bool:
        return any(request.adapter == adapter for request in self._requests.values())

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add_request(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._group_of(request).enqueue(request)

    def finish_requests(self, request_ids: Iterable[str]) -> list[Request]:
        """Ends requests at any time and frees their blocks immediately; returns those that had not ended."""
        ended = [r for r in map(self._requests.get, request_ids) if r is not None]
        for request in ended:
            self._finish(request)
        return ended

    def expired(self, now: float) -> list[Request]:
        """Requests past their deadline."""
        return [r for r in self._requests.values() if r.deadline is not None and r.deadline <= now]

    def schedule(self) -> SchedulerOutput:
        """Chooses the requests and tokens of the next step: running requests first, then waiting ones."""
        out, group = SchedulerOutput([], {}, {}, []), self._scheduled_group()
        if (over := group.over_share(self._in_flight)) is not None:
            self._preempt(over, out)
        preemptions_before = self._num_preemptions_of(group)
        max_requests = self._max_requests_per_step(group)
        self._scored_rows_left = SCORED_ROWS
        budget = self._schedule_running(group, self._budget(group), out, max_requests)
        if self._num_preemptions_of(group) == preemptions_before:  # otherwise admission would take what was freed
            self._admit(group, budget, out, max_requests)
        if self._drafter is not None:
            self.num_drafts += add_drafts(self._drafter, out, self._requests, self._kv, self._config)
            if self._drafter.has_head:
                limit_head(self._drafter, out, self._requests, self._config)
        out.finished_or_preempted_ids, self._finished_or_preempted = self._finished_or_preempted, []
        out.block_copies = self._kv.take_copies()
        if self._max_in_flight > 1:
            self._in_flight |= out.num_scheduled_tokens.keys()
        return out

    def _scheduled_group(self) -> RequestGroup:
        """The requests that the next step may hold."""
        return self._live or self._background

    def _group_of(self, request: Request) -> RequestGroup:
        return self._background if request.background else self._live

    def _num_preemptions_of(self, group: RequestGroup) -> int:
        return self.num_preemptions if group is self._live else self.num_background_preemptions

    def _budget(self, group: RequestGroup) -> int:
        """Tokens of the next step.

        For background requests: one for each that decodes, and a short chunk of prompts.
        """
        if group is self._live:
            return self._config.max_num_batched_tokens
        num_decoding = sum(r.num_new_tokens == 1 and r.request_id not in self._in_flight for r in group.running)
        return min(self._config.max_num_batched_tokens, num_decoding + self._background_prompt_tokens)

    def _schedule_running(self, group: RequestGroup, budget: int, out: SchedulerOutput, max_requests: int) -> int:
        """Adds tokens of running requests to `out`; returns what is left of the budget."""
        max_prompt_tokens, num_prompt_tokens = group.prompt_tokens_per_tenant(budget), Counter[str]()
        # Requests that need one token come first, so that a long prompt cannot starve them of the budget.
        for request in sorted(group.running, key=lambda r: r.num_new_tokens > 1):
            if budget == 0 or len(out.num_scheduled_tokens) == max_requests:
                break
            running = request.status is RequestStatus.RUNNING  # an earlier one may have preempted it
            if not running or request.request_id in self._in_flight:
                continue
            num_new = min(request.num_new_tokens, budget)
            if request.num_new_tokens > 1:
                num_new = min(num_new, max_prompt_tokens - num_prompt_tokens[request.tenant])
            num_new = self._limit_scored(request, num_new)
            if not num_new:
                continue
            added, num_released = self._allocate_or_preempt(request, num_new, out)
            budget += num_released
            if added is None:
                continue
            budget -= num_new
            if request.num_new_tokens > 1:
                num_prompt_tokens[request.tenant] += num_new
            self._scored_rows_left -= min(num_new, request.num_unscored_tokens)
            out.num_scheduled_tokens[request.request_id] = num_new
            if added[0] or added[1]:
                out.new_block_ids[request.request_id] = added
        return budget

    def can_schedule(self) -> bool:
        """Whether a step scheduled now might hold a request."""
        group = self._scheduled_group()
        return group.num_waiting > 0 or any(r.request_id not in self._in_flight for r in group.running)

    def take_back(self, out: SchedulerOutput) -> None:
        """Undoes an empty step that is not executed: its finished_or_preempted_ids go into the next one."""
        assert not out.num_scheduled_tokens
        self._finished_or_preempted = out.finished_or_preempted_ids + self._finished_or_preempted

    def _max_requests_per_step(self, group: RequestGroup) -> int:
        """Requests in one of the steps in flight, so that every stage of a pipeline has an equal share."""
        if self._max_in_flight == 1:
            return self._config.max_num_seqs
        return max(1, -(-group.num_known() // self._max_in_flight))

    def update_from_output(self, scheduled: SchedulerOutput, result: ModelRunnerOutput) -> list[TokenOutput]:
        """Accounts for a finished step; returns one output for each request that got a token or ended."""
        outputs = []
        self._in_flight -= scheduled.num_scheduled_tokens.keys()
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue  # aborted during the step
            if request_id in result.failed:  # what it computed is not to be reused
                self._finish(request)
                outputs.append(TokenOutput(request_id, [], FinishReason.ERROR, error=result.failed[request_id]))
                continue
            accepted = result.accepted.get(request_id, [])
            num_drafts = len(scheduled.draft_tokens.get(request_id, ()))
            num_rejected = num_drafts - len(accepted)
            if num_drafts and self._drafter is not None:
                self._drafter.observe(request_id, num_drafts, len(accepted))
            first = request.num_output_tokens == 0
            request.token_ids += accepted
            prompt_logprobs = self._unsent_prompt_logprobs(request, result.prompt_logprobs.get(request_id, []))
            request.num_computed_tokens += num_tokens - num_rejected
            self.num_accepted += len(accepted)
            self._kv.cache_blocks(request)
            if request_id in result.sampled:
                token_ids = [*accepted, result.sampled[request_id]]
                logprobs = result.logprobs.get(request_id)
                outputs.append(self._append(request, token_ids, logprobs, first=first))
                if self._drafter is not None and request_id in result.drafts and request_id in self._requests:
                    self._drafter.receive(request, result.drafts[request_id])
                outputs[-1].prompt_logprobs = prompt_logprobs or None
            elif prompt_logprobs:
                outputs.append(TokenOutput(request_id, [], prompt_logprobs=prompt_logprobs))
        return outputs

    @staticmethod
    def _unsent_prompt_logprobs(request: Request, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Drops logprobs that were sent before a preemption."""
        if not logprobs:
            return logprobs
        num_sent = request.num_scored_tokens - request.num_computed_tokens
        request.num_scored_tokens = max(request.num_scored_tokens, request.num_computed_tokens + len(logprobs))
        return logprobs[num_sent:] if num_sent > 0 else logprobs

    def _append(
        self, request: Request, token_ids: list[int], logprobs: TokenLogprobs | None, *, first: bool
    ) -> TokenOutput:
        """Appends the last of a step's `token_ids`; the accepted drafts before it are appended already."""
        request.token_ids.append(token_ids[-1])
        reason = request.finish_reason_at(token_ids[-1], self._config.max_model_len)
        output = TokenOutput(
            request.request_id,
            token_ids,
            reason,
            logprobs=[logprobs] if logprobs is not None else None,
            num_cached_tokens=request.num_cached_tokens,
        )
        if first and request.first_scheduled is not None:
            output.queue_s = request.first_scheduled - request.arrival
            output.prefill_s = time.monotonic() - request.first_scheduled
        if reason is not None:
            self._finish(request)
        return output

    def _admit(self, group: RequestGroup, budget: int, out: SchedulerOutput, max_requests: int) -> None:
        """Adds waiting requests to `out`, in order, while budget, blocks and `max_requests` allow."""
        skipped: list[Entry] = []
        while budget > 0 and not group.is_full and len(out.num_scheduled_tokens) < max_requests:
            request = group.first_waiting()
            if request is None:
                break
            computed = self._kv.get_computed_blocks(request)
            if self._shares_beginning(out, request, computed.num_tokens):
                break  # one step later its beginning is in the cache: computed once, stored once
            num_new = min(request.num_tokens - computed.num_tokens, budget)
            num_new = self._limit_scored(request, num_new)
            if not num_new:  # requests without prompt logprobs need not wait for those with them
                if len(skipped) == MAX_SKIPPED:
                    break
                skipped.append(group.waiting.pop(request))
                continue
            added = self._allocate(request, num_new, computed)
            while added is None and group is self._live and self._preempt_background(out):
                added = self._allocate(request, num_new, computed)
            if added is None:
                break  # no request overtakes: a large one would wait forever
            group.waiting.pop(request)
            self._start(request, computed.num_tokens)
            budget -= num_new
            self._scored_rows_left -= min(num_new, request.num_unscored_tokens)
            out.num_scheduled_tokens[request.request_id] = num_new
            out.new_requests.append(
                NewRequest(
                    request.request_id,
                    list(request.token_ids),
                    request.num_prompt_tokens,
                    request.params,
                    added,
                    computed.num_tokens,
                    request.adapter,
                )
            )
        for entry in skipped:
            group.waiting.push_back(entry)

    def _start(self, request: Request, num_cached: int) -> None:
        """Makes a waiting request a running one; `num_cached` of its tokens are in the prefix cache."""
        self._group_of(request).start(request)
        request.num_computed_tokens = num_cached
        if request.status is RequestStatus.WAITING:
            request.first_scheduled = time.monotonic()
            request.num_cached_tokens = min(num_cached, request.num_prompt_tokens)
            self._kv.num_queried_tokens += request.num_tokens
            self._kv.num_hit_tokens += num_cached
        request.status = RequestStatus.RUNNING
        self._known.add(request.request_id)

    def _limit_scored(self, request: Request, num_new: int) -> int:
        """Limits the next tokens so that the prompt logits of a step stay within SCORED_ROWS."""
        unscored = request.num_unscored_tokens
        return num_new if unscored <= self._scored_rows_left else min(num_new, self._scored_rows_left)

    def _shares_beginning(self, out: SchedulerOutput, request: Request, num_cached: int) -> bool:
        """Whether a request admitted in this step computes a block's worth of tokens of `request`.

        Where fewer are left but MIN_SHARED_TOKENS, as with choices of one prompt, all of them.
        """
        if not self._config.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return False
        size = self._config.block_size
        start, end = num_cached, min(num_cached + size, request.num_tokens - 1)
        if end - start < min(MIN_SHARED_TOKENS, size):
            return False
        beginning = request.token_ids[:end]
        return any(
            new.num_computed_tokens <= start
            and new.token_ids[:end] == beginning
            and self._requests[new.request_id].cache_salt == request.cache_salt
            and new.adapter == request.adapter
            for new in out.new_requests
        )

    def _allocate(
        self, request: Request, num_new: int, computed: ComputedBlocks | None = None
    ) -> tuple[list[int], list[int]] | None:
        """Allocates slots for the new tokens.

        Includes the lookahead if the request may continue and blocks are free.
        """
        start = request.num_computed_tokens if computed is None else computed.num_tokens
        end = min(request.num_prompt_tokens + request.params.max_tokens, self._config.max_model_len)
        more = min(self._lookahead, end - 1 - request.num_tokens)
        if more > 0 and start + num_new == request.num_tokens:
            added = self._kv.allocate_slots(request, num_new + more, computed)
            if added is not None:
                return added
        return self._kv.allocate_slots(request, num_new, computed)

    def _allocate_or_preempt(
        self, request: Request, num_new: int, out: SchedulerOutput
    ) -> tuple[tuple[list[int], list[int]] | None, int]:
        """Allocates blocks for `request`, preempting the running requests that should run last if necessary.

        Returns (blocks, or None if `request` itself was preempted; budget that preempted requests released).
        """
        num_released = 0
        while (added := self._allocate(request, num_new)) is None:
            if not request.background and self._preempt_background(out):
                continue
            victim = self._group_of(request).last_idle(self._in_flight)
            assert victim is not None  # `request` at least is idle
            num_released += self._preempt(victim, out)
            if victim is request:
                return None, num_released
        return added, num_released

    def _preempt_background(self, out: SchedulerOutput) -> bool:
        """Preempts the background request that should run last; returns whether there was one."""
        victim = self._background.last_idle(self._in_flight)
        if victim is not None:
            self._preempt(victim, out)
        return victim is not None

    def _preempt(self, request: Request, out: SchedulerOutput) -> int:
        """Puts a running request back into the queue; returns its tokens in this step."""
        group = self._group_of(request)
        group.stop(request)
        self._kv.free(request)
        self._forget(request)
        out.new_block_ids.pop(request.request_id, None)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        if request.background:
            self.num_background_preemptions += 1
        else:
            self.num_preemptions += 1
        group.enqueue(request)
        return out.num_scheduled_tokens.pop(request.request_id, 0)

    def _finish(self, request: Request) -> None:
        group = self._group_of(request)
        if request.status is RequestStatus.RUNNING:
            group.stop(request)
            self._kv.free(request)
        else:
            group.leave_queue(request)
        request.status = RequestStatus.FINISHED
        if self._drafter is not None:
            self._drafter.finish(request)
        del self._requests[request.request_id]
        self._forget(request)

    def _forget(self, request: Request) -> None:
        if request.request_id in self._known:
            self._known.remove(request.request_id)
            self._finished_or_preempted.append(request.request_id)
