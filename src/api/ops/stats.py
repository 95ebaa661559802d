"""GET /stats."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request

from gptoss import __version__
from gptoss.api.context import Context, ServerContext, caller_of
from gptoss.engine.client.pool import AnyEngine
from gptoss.engine.parallel.gpus import visible_gpus

router = APIRouter()
MAX_LISTED = 1000  # running requests of the caller in /stats


@router.get("/stats")
async def stats(request: Request, context: Context) -> dict[str, Any]:
    engine, metrics = context.engine, context.metrics
    ended = {name: metrics.outcomes[name] for name in ("ok", "failed", "cancelled", "rejected")}
    live = engine.stats
    return {
        **context.tags,
        "dense_dtype": context.dense_dtype,
        "kv_cache_dtype": context.kv_cache_dtype,
        "lm_head_dtype": context.lm_head_dtype,
        "version": __version__,
        "uptime_s": time.monotonic() - metrics.started,
        "requests": {
            "total": sum(ended.values()) + metrics.active,
            **ended,
            "active": metrics.active,
            "waiting": engine.num_waiting,
        },
        "running": context.tracker.running_ids(caller_of(request))[:MAX_LISTED],
        "tokens": {
            "prompt": metrics.num_prompt_tokens,
            "output": metrics.num_output_tokens,
            "cached": metrics.num_cached_tokens,
        },
        "latency": metrics.window(),
        "prompt_cache": _prompt_cache_report(context),
        "stored_responses": {
            "entries": len(context.stored_responses),
            "size_bytes": context.stored_responses.num_bytes,
        },
        "prefix_cache": {
            "queried_tokens": live.num_prefix_queried_total,
            "hit_tokens": live.num_prefix_hit_total,
            "hit_rate": _ratio(live.num_prefix_hit_total, live.num_prefix_queried_total),
        },
        "speculation": _speculation_report(engine),
        "harmony_recoveries": dict(metrics.recoveries),
        "access": context.access.report(),
        "gpus": await asyncio.to_thread(gpu_report),
        "engine": _engine_report(engine),
        "engines": [_engine_report(one) | {"gpus": one.config.gpus} for one in engine.engines],
        "profile_settings": _profile_settings(context),
    }


def _prompt_cache_report(context: ServerContext) -> dict[str, Any]:
    prompts = context.prompt_builder.stats
    return {
        "builds": prompts.builds,
        "hits": prompts.hits,
        "misses": prompts.misses,
        "evictions": prompts.evictions,
        "entries": prompts.entries,
        "size_bytes": prompts.size_bytes,
        "hit_rate": prompts.hit_rate,
    }


def _speculation_report(engine: AnyEngine) -> dict[str, Any]:
    """Drafts of all sources, and those of the draft head among them."""
    live, head = engine.stats, engine.config.speculative_model
    return {
        "draft_tokens": live.num_draft_total,
        "accepted_tokens": live.num_accepted_total,
        "acceptance_rate": _ratio(live.num_accepted_total, live.num_draft_total),
        "speculative_model": None if head is None else head.name,
        "head_draft_tokens": live.num_head_draft_total,
        "head_accepted_tokens": live.num_head_accepted_total,
    }


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def gpu_report() -> list[dict[str, Any]]:
    """The driver's figures for the GPUs that the server may use; empty without a driver."""
    return [
        {
            "index": gpu.index,
            "name": gpu.name,
            "total_bytes": gpu.total_bytes,
            "used_bytes": gpu.total_bytes - gpu.free_bytes,
            "utilization": gpu.utilization,
            "temperature_c": gpu.temperature_c,
        }
        for gpu in visible_gpus()
    ]


def _engine_report(engine: AnyEngine) -> dict[str, Any]:
    """The state and the figures of one engine, or of all of them added up."""
    return {
        "state": str(engine.state),
        "pid": engine.pid,
        "restarts": engine.num_restarts,
        "resumed_requests": engine.num_resumed,
        "last_failure": engine.failure,
        "heartbeat_age_s": engine.heartbeat_age_s,
        **msgspec.to_builtins(engine.stats),
        **(msgspec.to_builtins(engine.ready) if engine.ready is not None else {}),
    }


PROFILE_FIELDS = (
    "effort",
    "temperature",
    "top_p",
    "max_output_tokens",
    "reasoning_budget",
    "priority",
    "deadline_s",
    "expected_answer_s",
    "ttft_p95_s",
    "e2e_p95_s",
    "max_error_ratio",
)


def _profile_settings(context: ServerContext) -> dict[str, Any]:
    """The settings in effect, from the profile and the configuration."""
    limits = ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "batch_invariant")
    return {
        **{key: getattr(context.engine.config, key) for key in limits},
        **{key: getattr(context.profile, key) for key in PROFILE_FIELDS},
    }
