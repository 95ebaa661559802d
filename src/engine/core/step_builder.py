"""The step that is being scheduled: what it holds so far, and what it can still hold."""

from __future__ import annotations

from gptoss.engine.config import SCORED_ROWS
from gptoss.engine.core.request import Request
from gptoss.engine.messages import NewRequest, SchedulerOutput

MIN_SHARED_TOKENS = 16  # for which a request waits a step, so that they are computed once
Blocks = tuple[list[int], list[int]]  # new block ids of a request, for each of the two groups of layers


class StepBuilder:
    """A SchedulerOutput in the making, with the budgets that its requests share."""

    def __init__(self, budget: int, max_requests: int) -> None:
        """`budget`: most tokens of the step."""
        self.out = SchedulerOutput([], {}, {}, [])
        self.budget = budget
        self.has_preempted = False  # whether a request lost its blocks to another one of this step
        self._max_requests = max_requests
        self._num_scored_rows_left = SCORED_ROWS
        self._admitted: list[Request] = []

    @property
    def is_full(self) -> bool:
        return self.budget == 0 or len(self.out.num_scheduled_tokens) >= self._max_requests

    def limit(self, request: Request, num_tokens: int) -> int:
        """How many of the request's next `num_tokens` fit: by the budget, and by the rows of prompt logits."""
        num_tokens = min(num_tokens, self.budget)
        if request.num_unscored_tokens <= self._num_scored_rows_left:
            return num_tokens
        return min(num_tokens, self._num_scored_rows_left)

    def add_running(self, request: Request, num_tokens: int, blocks: Blocks) -> None:
        """Adds the next tokens of a running request, and the blocks allocated for them."""
        self._add(request, num_tokens)
        if blocks[0] or blocks[1]:
            self.out.new_block_ids[request.request_id] = blocks

    def admit(self, request: Request, num_tokens: int, blocks: Blocks) -> None:
        """Adds the first tokens that a request computes since it was started, and all its blocks."""
        self._add(request, num_tokens)
        self._admitted.append(request)
        self.out.new_requests.append(
            NewRequest(
                request.request_id,
                list(request.token_ids),
                request.num_prompt_tokens,
                request.params,
                blocks,
                request.num_computed_tokens,
                request.adapter,
            )
        )

    def preempt(self, request: Request) -> None:
        """Removes a preempted request; its tokens go back to the budget."""
        self.has_preempted = True
        self.out.new_block_ids.pop(request.request_id, None)
        self.budget += self.out.num_scheduled_tokens.pop(request.request_id, 0)

    def computes_beginning_of(self, request: Request, num_cached: int, block_size: int) -> bool:
        """Whether an admitted request computes the first block of `request` that is not cached.

        If less than a block is left, but MIN_SHARED_TOKENS, as with choices of one prompt: all that is left.
        """
        end = min(num_cached + block_size, request.num_tokens - 1)
        if end - num_cached < min(MIN_SHARED_TOKENS, block_size):
            return False
        beginning = request.token_ids[:end]
        return any(
            admitted.num_computed_tokens <= num_cached
            and admitted.token_ids[:end] == beginning
            and admitted.cache_salt == request.cache_salt
            and admitted.adapter == request.adapter
            for admitted in self._admitted
        )

    def _add(self, request: Request, num_tokens: int) -> None:
        self.budget -= num_tokens
        self._num_scored_rows_left -= min(num_tokens, request.num_unscored_tokens)
        self.out.num_scheduled_tokens[request.request_id] = num_tokens
