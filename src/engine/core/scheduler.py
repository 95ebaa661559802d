"""Who computes how many tokens in the next step."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

from gptoss.engine.config import SCORED_ROWS, EngineConfig
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.kv_cache_manager import ComputedBlocks, KVCacheManager
from gptoss.engine.core.request import Request, RequestStatus
from gptoss.engine.core.waiting import Entry, WaitingQueue
from gptoss.engine.messages import (
    FinishReason,
    ModelRunnerOutput,
    NewRequest,
    SchedulerOutput,
    TokenLogprobs,
    TokenOutput,
)

MAX_PASSED = 64  # requests, in one step


class Scheduler:
    """Continuous batching by one rule.

    There is no prefill phase and no decode phase. A request has `num_tokens` known tokens, of which
    `num_computed_tokens` are in the cache; each step hands out a budget of tokens so that the second number catches
    up with the first. Chunked prefill, prefix hits, recompute after preemption and speculative tokens are all that
    one subtraction. (After vLLM's v1 scheduler.)
    """

    def __init__(
        self,
        config: EngineConfig,
        kv: KVCacheManager,
        *,
        max_in_flight: int = 1,
        drafter: Drafter | None = None,
        lookahead: int = 0,
    ) -> None:
        """`max_in_flight`: steps that may be scheduled before the first of them is accounted for, one for each stage
        of a pipeline. A request is in one of them at a time. `drafter` guesses what comes next. `lookahead`: tokens
        after a step's that have a place in the cache too, for the steps that workers start before they are asked to."""
        self._config = config
        self._drafter = drafter
        self._lookahead = lookahead
        self._max_in_flight = max_in_flight
        self._in_flight: set[str] = set()
        self._kv = kv
        self._requests: dict[str, Request] = {}
        self._running: list[Request] = []
        self._running_of: Counter[str] = Counter()  # by tenant, none of them 0
        self._waiting = WaitingQueue()
        self._known: set[str] = set()  # request ids that the workers hold state for
        self._gone: list[str] = []
        self._score_room = SCORED_ROWS  # of the step that is being made
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self.num_preemptions = 0
        self.num_drafts = 0
        self.num_accepted = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_waiting_tokens(self) -> int:
        return self._num_waiting_tokens

    def has_requests(self) -> bool:
        return bool(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add_request(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._enqueue(request)

    def finish_requests(self, request_ids: Iterable[str]) -> list[Request]:
        """Ends requests from outside, at any moment; frees their blocks at once. -> those that were alive."""
        ended = [r for r in map(self._requests.get, request_ids) if r is not None]
        for request in ended:
            self._finish(request)
        return ended

    def expired(self, now: float) -> list[Request]:
        """Requests past their deadline."""
        return [r for r in self._requests.values() if r.deadline is not None and r.deadline <= now]

    def schedule(self) -> SchedulerOutput:
        budget = self._config.max_num_batched_tokens
        out = SchedulerOutput([], {}, {}, [])
        self._make_way(out)
        preemptions_before = self.num_preemptions
        most_of_prompts, of_prompts = self._prompt_tokens_per_tenant(budget), Counter[str]()
        room = self._rows_for_one_step()
        self._score_room = SCORED_ROWS
        # Those that need one token go first, so a long prompt cannot starve them of the budget.
        for request in sorted(self._running, key=lambda r: r.num_new_tokens > 1):
            if budget == 0 or len(out.num_scheduled_tokens) == room:
                break
            running = request.status is RequestStatus.RUNNING  # or preempted by one before it
            if not running or request.request_id in self._in_flight:
                continue
            num_new = min(request.num_new_tokens, budget)
            if request.num_new_tokens > 1:
                num_new = min(num_new, most_of_prompts - of_prompts[request.tenant])
            num_new = self._within_score_room(request, num_new)
            if not num_new:
                continue
            added, given_back = self._allocate_or_preempt(request, num_new, out)
            budget += given_back
            if added is None:
                continue
            budget -= num_new
            if request.num_new_tokens > 1:
                of_prompts[request.tenant] += num_new
            self._score_room -= min(num_new, request.num_unscored_tokens)
            out.num_scheduled_tokens[request.request_id] = num_new
            if added[0] or added[1]:
                out.new_block_ids[request.request_id] = added
        if self.num_preemptions == preemptions_before:  # else the blocks just freed would be taken away again
            self._admit(budget, out, room)
        if self._drafter is not None:
            self._add_drafts(self._drafter, out)
        out.finished_or_preempted_ids, self._gone = self._gone, []
        if self._max_in_flight > 1:
            self._in_flight |= out.num_scheduled_tokens.keys()
        return out

    def _add_drafts(self, drafter: Drafter, out: SchedulerOutput) -> None:
        """Puts drafts behind the last known tokens, with what budget and which blocks nobody else needs.

        With more rows to sample than one request and its drafts a step is bound by arithmetic, and guesses cost.
        """
        budget = min(
            self._config.max_num_batched_tokens - out.total_tokens, 1 + drafter.most - len(out.num_scheduled_tokens)
        )
        block_ids = {new.request_id: new.block_ids for new in out.new_requests}
        for request_id, num_new in list(out.num_scheduled_tokens.items()):
            request = self._requests[request_id]
            if request.num_computed_tokens + num_new < request.num_tokens or request.params.logprobs is not None:
                continue
            most = min(
                budget,
                request.params.max_tokens - request.num_output_tokens - 1,
                self._config.max_model_len - request.num_tokens - 1,
            )
            drafts = drafter.propose(request, most) if most > 0 else []
            added = self._kv.allocate_slots(request, num_new + len(drafts)) if drafts else None
            if added is None:
                continue
            known = block_ids.get(request_id) or out.new_block_ids.setdefault(request_id, ([], []))
            for blocks, new in zip(known, added, strict=True):
                blocks += new
            out.num_scheduled_tokens[request_id] += len(drafts)
            out.draft_tokens[request_id] = drafts
            self.num_drafts += len(drafts)
            budget -= len(drafts)

    def can_schedule(self) -> bool:
        """Whether a step scheduled now might hold a request."""
        return self._num_waiting > 0 or len(self._running) > len(self._in_flight)

    def give_back(self, out: SchedulerOutput) -> None:
        """An empty step that is not executed: what it should have told the workers waits for the next."""
        assert not out.num_scheduled_tokens
        self._gone = out.finished_or_preempted_ids + self._gone

    def _rows_for_one_step(self) -> int:
        """Requests for one of the steps under way, so that every stage of a pipeline has its share."""
        if self._max_in_flight == 1:
            return self._config.max_num_seqs
        known = min(len(self._running) + self._num_waiting, self._config.max_num_seqs)
        return max(1, -(-known // self._max_in_flight))

    def update_from_output(self, scheduled: SchedulerOutput, result: ModelRunnerOutput) -> list[TokenOutput]:
        """Accounts for a finished step. -> one output for each request that got a token or ended."""
        outputs = []
        self._in_flight -= scheduled.num_scheduled_tokens.keys()
        for request_id, num_tokens in scheduled.num_scheduled_tokens.items():
            request = self._requests.get(request_id)
            if request is None or request.status is not RequestStatus.RUNNING:
                continue  # aborted while the step ran
            accepted = result.accepted.get(request_id, [])
            wrong = len(scheduled.draft_tokens.get(request_id, ())) - len(accepted)
            first = request.num_output_tokens == 0
            request.token_ids += accepted
            told = result.prompt_logprobs.get(request_id)
            scores = told and self._new_scores(request, told)
            request.num_computed_tokens += num_tokens - wrong
            self.num_accepted += len(accepted)
            self._kv.cache_blocks(request)
            if request_id in result.failed:
                self._finish(request)
                outputs.append(TokenOutput(request_id, [], FinishReason.ERROR, error=result.failed[request_id]))
            elif request_id in result.sampled:
                token_ids = [*accepted, result.sampled[request_id]]
                logprobs = result.logprobs.get(request_id)
                outputs.append(self._append(request, token_ids, logprobs, first=first))
                outputs[-1].prompt_logprobs = scores or None
            elif scores:
                outputs.append(TokenOutput(request_id, [], prompt_logprobs=scores))
        return outputs

    @staticmethod
    def _new_scores(request: Request, scores: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Of these, which are of the tokens behind the computed ones, those that did not go out before a preemption."""
        known = request.num_scored_tokens - request.num_computed_tokens
        request.num_scored_tokens = max(request.num_scored_tokens, request.num_computed_tokens + len(scores))
        return scores[known:] if known > 0 else scores

    def _append(
        self, request: Request, token_ids: list[int], logprobs: TokenLogprobs | None, *, first: bool
    ) -> TokenOutput:
        """`token_ids`: what the step brought; all but the last have joined the request's already."""
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

    def _admit(self, budget: int, out: SchedulerOutput, room: int) -> None:
        passed: list[Entry] = []
        self._admit_in_order(budget, out, room, passed)
        for entry in passed:
            self._waiting.push_back(entry)

    def _admit_in_order(self, budget: int, out: SchedulerOutput, room: int, passed: list[Entry]) -> None:
        """`passed` gets those that were passed over."""
        share = self._share()
        while budget > 0 and len(self._running) < self._config.max_num_seqs and len(out.num_scheduled_tokens) < room:
            request = self._waiting.first(lambda tenant: self._running_of[tenant] >= share)
            if request is None:
                return
            computed = self._kv.get_computed_blocks(request)
            if self._same_beginning_in(out, request, computed.num_tokens):
                return  # one step later its beginning is in the cache: computed once, stored once
            num_new = min(request.num_tokens - computed.num_tokens, budget)
            num_new = self._within_score_room(request, num_new)
            if not num_new:  # those whose prompts are not scored need not wait for those that are
                if len(passed) == MAX_PASSED:
                    return
                passed.append(self._waiting.pop(request))
                continue
            added = self._allocate(request, num_new, computed)
            if added is None:
                return  # nobody overtakes: a large request would wait for ever
            self._waiting.pop(request)
            self._num_waiting -= 1
            self._num_waiting_tokens -= request.num_tokens
            request.num_computed_tokens = computed.num_tokens
            if request.status is RequestStatus.WAITING:
                request.first_scheduled = time.monotonic()
                request.num_cached_tokens = min(computed.num_tokens, request.num_prompt_tokens)
                self._kv.num_queried_tokens += request.num_tokens
                self._kv.num_hit_tokens += computed.num_tokens
            request.status = RequestStatus.RUNNING
            self._running.append(request)
            self._running_of[request.tenant] += 1
            self._known.add(request.request_id)
            budget -= num_new
            self._score_room -= min(num_new, request.num_unscored_tokens)
            out.num_scheduled_tokens[request.request_id] = num_new
            out.new_requests.append(
                NewRequest(
                    request.request_id,
                    list(request.token_ids),
                    request.num_prompt_tokens,
                    request.params,
                    added,
                    computed.num_tokens,
                )
            )

    def _share(self) -> int:
        """Requests that each tenant may run at once while others wait."""
        tenants = {*self._running_of, *self._waiting.tenants()}
        return max(1, self._config.max_num_seqs // max(1, len(tenants)))

    def _make_way(self, out: SchedulerOutput) -> None:
        """Preempts a request of the tenant that runs most and more than its share, where one below its share waits."""
        if len(self._running) < self._config.max_num_seqs or not self._num_waiting:
            return
        share = self._share()
        tenant, most = max(self._running_of.items(), key=lambda item: item[1])
        if most <= share or all(self._running_of[t] >= share for t in self._waiting.tenants()):
            return
        mine = (r for r in self._running if r.tenant == tenant)
        idle = [r for r in mine if r.request_id not in self._in_flight]
        if idle:
            self._preempt(max(idle, key=self._key), out)

    def _prompt_tokens_per_tenant(self, budget: int) -> int:
        """Prompt tokens that each tenant may compute in this step, so that long prompts of one do not fill it."""
        tenants = {r.tenant for r in self._running if r.num_new_tokens > 1}
        if len(self._running) < self._config.max_num_seqs:
            tenants.update(self._waiting.tenants())
        return max(1, budget // max(1, len(tenants)))

    def _within_score_room(self, request: Request, num_new: int) -> int:
        """So many of the next tokens that this step has room for the logits of those of the prompt."""
        unscored = request.num_unscored_tokens
        return num_new if unscored <= self._score_room else min(num_new, self._score_room)

    def _same_beginning_in(self, out: SchedulerOutput, request: Request, num_cached: int) -> bool:
        """Whether a request admitted in this very step computes a block that `request` begins with as well."""
        if not self._config.enable_prefix_caching or request.params.prompt_logprobs is not None:
            return False
        start, end = num_cached, num_cached + self._config.block_size
        if request.num_tokens <= end:
            return False
        beginning = request.token_ids[:end]
        return any(
            new.num_computed_tokens <= start
            and new.token_ids[:end] == beginning
            and self._requests[new.request_id].cache_salt == request.cache_salt
            for new in out.new_requests
        )

    def _allocate(
        self, request: Request, num_new: int, computed: ComputedBlocks | None = None
    ) -> tuple[list[int], list[int]] | None:
        """As allocate_slots, and a place for what comes after, where the request goes on and there is room."""
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
        """Blocks for `request`, taken if need be from the running request that should run last.

        -> (blocks, or None if that was `request` itself; tokens that preempted requests gave back to the budget)
        """
        given_back = 0
        while (added := self._allocate(request, num_new)) is None:
            idle = [r for r in self._running if r.request_id not in self._in_flight]
            victim = max(idle, key=self._key)  # `request` at least is idle
            given_back += self._preempt(victim, out)
            if victim is request:
                return None, given_back
        return added, given_back

    def _preempt(self, request: Request, out: SchedulerOutput) -> int:
        self._stop_running(request)
        self._kv.free(request)
        self._forget(request)
        out.new_block_ids.pop(request.request_id, None)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(request)
        return out.num_scheduled_tokens.pop(request.request_id, 0)

    def _stop_running(self, request: Request) -> None:
        self._running.remove(request)
        self._running_of[request.tenant] -= 1
        if not self._running_of[request.tenant]:
            del self._running_of[request.tenant]

    def _finish(self, request: Request) -> None:
        if request.status is RequestStatus.RUNNING:
            self._stop_running(request)
            self._kv.free(request)
        else:
            self._num_waiting -= 1
            self._num_waiting_tokens -= request.num_tokens
        request.status = RequestStatus.FINISHED
        if self._drafter is not None:
            self._drafter.finish(request)
        del self._requests[request.request_id]
        self._forget(request)

    def _forget(self, request: Request) -> None:
        if request.request_id in self._known:
            self._known.remove(request.request_id)
            self._gone.append(request.request_id)

    def _enqueue(self, request: Request) -> None:
        self._waiting.push(self._key(request), request)
        self._num_waiting += 1
        self._num_waiting_tokens += request.num_tokens

    def _key(self, request: Request) -> float:
        """Lower runs sooner. Priority is a head start in seconds, so whoever waits long enough is first."""
        return request.arrival + request.priority * self._config.priority_ageing_s
