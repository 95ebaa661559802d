"""Decides how many tokens each request computes in the next step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from gptoss.engine.config import EngineConfig
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.draft_steps import add_drafts, limit_head
from gptoss.engine.core.kv_cache_manager import ComputedBlocks, KVCacheManager
from gptoss.engine.core.request import Request, RequestStatus
from gptoss.engine.core.request_group import RequestGroup
from gptoss.engine.core.step_builder import Blocks, StepBuilder
from gptoss.engine.core.waiting import Entry
from gptoss.engine.messages import (
    FinishReason,
    ModelRunnerOutput,
    SchedulerOutput,
    TokenLogprobs,
    TokenOutput,
)

MAX_SKIPPED = 64  # waiting requests, in one step
# Prompt tokens in a step of background requests, for whose end a live request waits; on a CPU they take longer
BACKGROUND_PROMPT_TOKENS, BACKGROUND_PROMPT_TOKENS_CPU = 256, 64


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

    def can_schedule(self) -> bool:
        """Whether a step scheduled now might hold a request."""
        group = self._scheduled_group()
        return group.num_waiting > 0 or any(r.request_id not in self._in_flight for r in group.running)

    def schedule(self) -> SchedulerOutput:
        """Chooses the requests and tokens of the next step: running requests first, then waiting ones."""
        group = self._scheduled_group()
        if (over := group.over_share(self._in_flight)) is not None:
            self._preempt(over)
        step = StepBuilder(self._budget(group), self._max_requests_per_step(group))
        self._schedule_running(group, step)
        if not step.has_preempted:  # otherwise admission would take what was freed
            self._admit(group, step)
        out = step.out
        if self._drafter is not None:
            self.num_drafts += add_drafts(self._drafter, out, self._requests, self._kv, self._config)
            if self._drafter.has_head:
                limit_head(self._drafter, out, self._requests, self._config)
        out.finished_or_preempted_ids, self._finished_or_preempted = self._finished_or_preempted, []
        out.block_copies = self._kv.take_copies()
        if self._max_in_flight > 1:
            self._in_flight |= out.num_scheduled_tokens.keys()
        return out

    def take_back(self, out: SchedulerOutput) -> None:
        """Undoes an empty step that is not executed: its finished_or_preempted_ids go into the next one."""
        assert not out.num_scheduled_tokens
        self._finished_or_preempted = out.finished_or_preempted_ids + self._finished_or_preempted

    def update_from_output(self, scheduled: SchedulerOutput, result: ModelRunnerOutput) -> list[TokenOutput]:
        """Accounts for a finished step; returns one output for each request that got a token or ended."""
        outputs = []
        self._in_flight -= scheduled.num_scheduled_tokens.keys()
        for request_id in scheduled.num_scheduled_tokens:
            request = self._requests.get(request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue  # aborted during the step
            if request_id in result.failed:  # what it computed is not to be reused
                self._finish(request)
                outputs.append(TokenOutput(request_id, [], FinishReason.ERROR, error=result.failed[request_id]))
            elif (output := self._update(request, scheduled, result)) is not None:
                outputs.append(output)
        return outputs

    # --- choosing ---

    def _scheduled_group(self) -> RequestGroup:
        """The requests that the next step may hold."""
        return self._live or self._background

    def _group_of(self, request: Request) -> RequestGroup:
        return self._background if request.background else self._live

    def _budget(self, group: RequestGroup) -> int:
        """Tokens of the next step.

        For background requests: one for each that decodes, and a short chunk of prompts.
        """
        if group is self._live:
            return self._config.max_num_batched_tokens
        num_decoding = sum(r.num_new_tokens == 1 and r.request_id not in self._in_flight for r in group.running)
        return min(self._config.max_num_batched_tokens, num_decoding + self._background_prompt_tokens)

    def _max_requests_per_step(self, group: RequestGroup) -> int:
        """Requests in one of the steps in flight, so that every stage of a pipeline has an equal share."""
        if self._max_in_flight == 1:
            return self._config.max_num_seqs
        return max(1, -(-group.num_known() // self._max_in_flight))

    def _schedule_running(self, group: RequestGroup, step: StepBuilder) -> None:
        """Adds tokens of running requests to the step."""
        max_prompt_tokens, num_prompt_tokens = group.prompt_tokens_per_tenant(step.budget), Counter[str]()
        # Requests that need one token come first, so that a long prompt cannot starve them of the budget.
        for request in sorted(group.running, key=lambda r: r.num_new_tokens > 1):
            if step.is_full:
                break
            running = request.status is RequestStatus.RUNNING  # an earlier one may have preempted it
            if not running or request.request_id in self._in_flight:
                continue
            num_new = request.num_new_tokens
            is_prefill = num_new > 1
            if is_prefill:
                num_new = min(num_new, max_prompt_tokens - num_prompt_tokens[request.tenant])
            num_new = step.limit(request, num_new)
            blocks = self._allocate_or_preempt(request, num_new, step) if num_new else None
            if blocks is None:
                continue
            if is_prefill:
                num_prompt_tokens[request.tenant] += num_new
            step.add_running(request, num_new, blocks)

    def _admit(self, group: RequestGroup, step: StepBuilder) -> None:
        """Adds waiting requests to the step, in order, while there are budget and blocks for them."""
        skipped: list[Entry] = []
        while not step.is_full and not group.is_full:
            request = group.first_waiting()
            if request is None:
                break
            computed = self._kv.get_computed_blocks(request)
            if self._waits_for_beginning(request, computed.num_tokens, step):
                break  # one step later its beginning is in the cache: computed once, stored once
            num_new = step.limit(request, request.num_tokens - computed.num_tokens)
            if not num_new:  # requests without prompt logprobs need not wait for those with them
                if len(skipped) == MAX_SKIPPED:
                    break
                skipped.append(group.waiting.pop(request))
                continue
            blocks = self._allocate(request, num_new, computed)
            while blocks is None and group is self._live and self._preempt_background():
                blocks = self._allocate(request, num_new, computed)
            if blocks is None:
                break  # no request overtakes: a large one would wait forever
            group.waiting.pop(request)
            self._start(request, computed.num_tokens)
            step.admit(request, num_new, blocks)
        for entry in skipped:
            group.waiting.push_back(entry)

    def _waits_for_beginning(self, request: Request, num_cached: int, step: StepBuilder) -> bool:
        """Whether another request of the step computes tokens that this one could then find in the cache."""
        if not self._config.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return False
        return step.computes_beginning_of(request, num_cached, self._config.block_size)

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

    def _allocate(self, request: Request, num_new: int, computed: ComputedBlocks | None = None) -> Blocks | None:
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

    def _allocate_or_preempt(self, request: Request, num_new: int, step: StepBuilder) -> Blocks | None:
        """Allocates blocks for `request`, preempting the running requests that should run last if necessary.

        None: `request` itself was preempted.
        """
        while (blocks := self._allocate(request, num_new)) is None:
            if not request.background and self._preempt_background():
                continue
            victim = self._group_of(request).last_idle(self._in_flight)
            assert victim is not None  # `request` at least is idle
            self._preempt(victim)
            step.preempt(victim)
            if victim is request:
                return None
        return blocks

    def _preempt_background(self) -> bool:
        """Preempts the background request that should run last; returns whether there was one."""
        victim = self._background.last_idle(self._in_flight)
        if victim is not None:
            self._preempt(victim)
        return victim is not None

    def _preempt(self, request: Request) -> None:
        """Puts a running request back into the queue."""
        group = self._group_of(request)
        group.stop(request)
        self._kv.free(request)
        self._forget(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        if request.background:
            self.num_background_preemptions += 1
        else:
            self.num_preemptions += 1
        group.enqueue(request)

    # --- results ---

    def _update(self, request: Request, scheduled: SchedulerOutput, result: ModelRunnerOutput) -> TokenOutput | None:
        """Accounts for one request's part of a finished step; returns what it sends, None if that is nothing."""
        request_id, is_first = request.request_id, request.num_output_tokens == 0
        accepted = result.accepted.get(request_id, [])
        num_drafts = len(scheduled.draft_tokens.get(request_id, ()))
        if num_drafts and self._drafter is not None:
            self._drafter.observe(request_id, num_drafts, len(accepted))
        self.num_accepted += len(accepted)
        request.token_ids += accepted
        prompt_logprobs = self._unsent_prompt_logprobs(request, result.prompt_logprobs.get(request_id, []))
        request.num_computed_tokens += scheduled.num_scheduled_tokens[request_id] - (num_drafts - len(accepted))
        self._kv.cache_blocks(request)
        if request_id not in result.sampled:
            return TokenOutput(request_id, [], prompt_logprobs=prompt_logprobs) if prompt_logprobs else None
        token_ids = [*accepted, result.sampled[request_id]]
        output = self._append(request, token_ids, result.logprobs.get(request_id), is_first=is_first)
        output.prompt_logprobs = prompt_logprobs or None
        if self._drafter is not None and request_id in result.drafts and request_id in self._requests:
            self._drafter.receive(request, result.drafts[request_id])
        return output

    @staticmethod
    def _unsent_prompt_logprobs(request: Request, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Drops logprobs that were sent before a preemption."""
        if not logprobs:
            return logprobs
        num_sent = request.num_scored_tokens - request.num_computed_tokens
        request.num_scored_tokens = max(request.num_scored_tokens, request.num_computed_tokens + len(logprobs))
        return logprobs[num_sent:] if num_sent > 0 else logprobs

    def _append(
        self, request: Request, token_ids: list[int], logprobs: TokenLogprobs | None, *, is_first: bool
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
        if is_first and request.first_scheduled is not None:
            output.queue_s = request.first_scheduled - request.arrival
            output.prefill_s = time.monotonic() - request.first_scheduled
        if reason is not None:
            self._finish(request)
        return output

    def _finish(self, request: Request) -> None:
        """Ends a request, which runs or waits, and frees its blocks."""
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
        """Lets the workers drop the request's state, with the next step."""
        if request.request_id in self._known:
            self._known.remove(request.request_id)
            self._finished_or_preempted.append(request.request_id)
