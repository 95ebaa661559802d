"""Puts draft tokens into a step that is scheduled, and limits what a draft head guesses after it."""

from __future__ import annotations

from collections.abc import Mapping

from gptoss.engine.config import EngineConfig
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.kv_cache_manager import KVCacheManager
from gptoss.engine.core.request import Request
from gptoss.engine.messages import SchedulerOutput


def add_drafts(
    drafter: Drafter, out: SchedulerOutput, requests: Mapping[str, Request], kv: KVCacheManager, config: EngineConfig
) -> int:
    """Adds drafts after the last known tokens, from the budget and blocks that are left; returns how many.

    If a step samples more rows than one request and its drafts it is compute-bound, and drafts cost time.
    """
    budget = min(
        config.max_num_batched_tokens - out.total_tokens,
        1 + drafter.max_tokens - len(out.num_scheduled_tokens),
    )
    block_ids = {new.request_id: new.block_ids for new in out.new_requests}
    for request_id, num_new in list(out.num_scheduled_tokens.items()):
        request = requests[request_id]
        if request.num_computed_tokens + num_new < request.num_tokens or request.params.logprobs is not None:
            continue
        max_drafts = min(
            budget,
            request.params.max_tokens - request.num_output_tokens - 1,
            config.max_model_len - request.num_tokens - 1,
        )
        drafts = drafter.propose(request, max_drafts) if max_drafts > 0 else []
        added = kv.allocate_slots(request, num_new + len(drafts)) if drafts else None
        if added is None:
            continue
        known = block_ids.get(request_id) or out.new_block_ids.setdefault(request_id, ([], []))
        for blocks, new in zip(known, added, strict=True):
            blocks += new
        out.num_scheduled_tokens[request_id] += len(drafts)
        out.draft_tokens[request_id] = drafts
        budget -= len(drafts)
    return sum(map(len, out.draft_tokens.values()))


def limit_head(drafter: Drafter, out: SchedulerOutput, requests: Mapping[str, Request], config: EngineConfig) -> None:
    """Sets how many tokens the draft head guesses after this step: what the next one may add as drafts."""
    num_requests = len(out.num_scheduled_tokens)
    budget = 1 + drafter.max_tokens - num_requests
    share = max(1, budget // max(1, num_requests))
    for request_id, num_new in out.num_scheduled_tokens.items():
        request, num_drafts = requests[request_id], len(out.draft_tokens.get(request_id, ()))
        known = request.num_computed_tokens + num_new - num_drafts
        if known < request.num_tokens or request.params.logprobs is not None or request.adapter:
            continue
        left = request.params.max_tokens - request.num_output_tokens
        max_guesses = min(budget, share, left - 2, config.max_model_len - known - 2)
        limit = drafter.head_limit(request, max_guesses, num_drafts)
        if limit:
            out.draft_limits[request_id] = limit
            budget -= limit
