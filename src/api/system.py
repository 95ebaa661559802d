"""Health, readiness, statistics and metrics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from gptoss import __version__
from gptoss.api.deps import Context, ServerContext, caller_of
from gptoss.api.errors import json_response
from gptoss.api.metrics import Live, LiveCollector
from gptoss.engine.client import EngineClient
from gptoss.engine.gpus import visible_gpus
from gptoss.engine.lifecycle import EngineState

router = APIRouter()

MAX_LISTED = 1000  # running requests of the caller in /stats


def health_report(context: ServerContext) -> dict[str, Any]:
    engine = context.engine
    reasons = []
    if engine.state is EngineState.DEAD:
        reasons.append(f"engine is dead: {engine.failure}")
    elif not engine.is_ready:
        reasons.append(f"engine is {engine.state}")
    elif (stalled := stall(context)) is not None:
        reasons.append(stalled)
    waiting = engine.num_waiting
    if waiting > context.engine.config.max_num_waiting * 0.9:
        reasons.append(f"{waiting} requests are waiting")
    if context.access.draining:
        reasons.append("the server is shutting down")
    dead = engine.state is EngineState.DEAD
    status = "unhealthy" if dead else "degraded" if reasons else "ok"
    return {
        "status": status,
        "reasons": reasons,
        "version": __version__,
        "engine": str(engine.state),
        **context.tags,
        "active_requests": context.metrics.active,
        "waiting_requests": waiting,
        "kv_usage": engine.stats.kv_usage,
        "uptime_s": time.monotonic() - context.metrics.started,
    }


def stall(context: ServerContext) -> str | None:
    """Why a request sent now is not served although the engine is ready; None if it is served."""
    engine, config = context.engine, context.config
    if engine.heartbeat_age_s > config.engine_heartbeat_timeout_s:
        return f"no heartbeat of the engine for {engine.heartbeat_age_s:.0f} s"
    if engine.num_active > 0 and engine.last_sign_age_s > config.engine_step_timeout_s / 2:
        return f"no step for {engine.last_sign_age_s:.0f} s while work is waiting"
    return None


@router.get("/health")
async def health(context: Context) -> Response:
    """503 only when nothing will ever be answered: a liveness probe should then restart the process."""
    report = health_report(context)
    return json_response(503 if report["status"] == "unhealthy" else 200, report)


@router.get("/ready")
async def ready(context: Context) -> Response:
    """200 only when a request sent now is served at once."""
    engine = context.engine
    draining, warm = context.access.draining, context.warm.is_set()
    serving = engine.is_ready and warm and not draining and stall(context) is None
    body = {"ready": serving, "engine": str(engine.state), "warm": warm, "draining": draining}
    return json_response(200 if serving else 503, body, {} if serving else {"retry-after": "5"})


@router.get("/stats")
async def stats(request: Request, context: Context) -> dict[str, Any]:
    engine, metrics, prompts = context.engine, context.metrics, context.prompt_builder.stats
    ended = {name: metrics.outcomes[name] for name in ("ok", "failed", "cancelled", "rejected")}
    live = engine.stats
    queried = live.num_prefix_queried_total
    return {
        **context.tags,
        "version": __version__,
        "uptime_s": time.monotonic() - metrics.started,
        "requests": {
            "total": sum(ended.values()) + metrics.active,
            **ended,
            "active": metrics.active,
            "waiting": engine.num_waiting,
        },
        "running": context.ledger.running_ids(caller_of(request))[:MAX_LISTED],
        "tokens": {
            "prompt": metrics.num_prompt_tokens,
            "output": metrics.num_output_tokens,
            "cached": metrics.num_cached_tokens,
        },
        "latency": metrics.window(),
        "prompt_cache": {
            "builds": prompts.builds,
            "hits": prompts.hits,
            "misses": prompts.misses,
            "evictions": prompts.evictions,
            "entries": prompts.entries,
            "size_bytes": prompts.size_bytes,
            "hit_rate": prompts.hit_rate,
        },
        "stored_responses": {"entries": len(context.responses), "size_bytes": context.responses.num_bytes},
        "prefix_cache": {
            "queried_tokens": queried,
            "hit_tokens": live.num_prefix_hit_total,
            "hit_rate": live.num_prefix_hit_total / queried if queried else 0.0,
        },
        "speculation": {
            "draft_tokens": live.num_draft_total,
            "accepted_tokens": live.num_accepted_total,
            "acceptance_rate": live.num_accepted_total / live.num_draft_total if live.num_draft_total else 0.0,
        },
        "harmony_recoveries": dict(metrics.recoveries),
        "access": context.access.report(),
        "gpus": await asyncio.to_thread(gpu_report),
        "engine": _engine_report(engine),
        "profile_settings": _profile_settings(context),
    }


def _engine_report(engine: EngineClient) -> dict[str, Any]:
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
    """What the profile and the operator's flags came to."""
    limits = ("max_num_seqs", "max_num_batched_tokens", "max_num_waiting", "batch_invariant")
    return {
        **{key: getattr(context.engine.config, key) for key in limits},
        **{key: getattr(context.profile, key) for key in PROFILE_FIELDS},
    }


def gpu_report() -> list[dict[str, Any]]:
    """The GPUs that the server may use, as the driver sees them; empty without a driver."""
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


@router.get("/metrics")
async def metrics(context: Context) -> Response:
    names = context.config.vllm_metric_names
    text = await asyncio.to_thread(  # milliseconds of work
        lambda: context.metrics.render(context.tags, vllm_names=names)
    )
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def register_live_metrics(context: ServerContext) -> None:
    engine, prompts = context.engine, context.prompt_builder

    def gpu_gauges() -> dict[str, list[tuple[dict[str, str], float]]]:
        gpus = gpu_report()

        def values(key: str) -> list[tuple[dict[str, str], float]]:
            return [({"gpu": str(g["index"])}, float(g[key])) for g in gpus if g[key] is not None]

        return {
            "gpu_memory_used_bytes": values("used_bytes"),
            "gpu_memory_total_bytes": values("total_bytes"),
            "gpu_utilization_ratio": values("utilization"),
            "gpu_temperature_celsius": values("temperature_c"),
        }

    values = [
        Live("num_requests_running", "Requests in the engine's batch.", lambda: engine.stats.num_running),
        Live("num_requests_waiting", "Requests waiting for the engine.", lambda: engine.num_waiting),
        Live("requests_active", "Requests not answered yet.", lambda: context.metrics.active),
        Live("kv_cache_usage_ratio", "Share of KV blocks in use.", lambda: engine.stats.kv_usage),
        Live("engine_ready", "1 while the engine serves.", lambda: float(engine.is_ready)),
        Live("engine_last_step_seconds", "Duration of the last step.", lambda: engine.stats.last_step_s),
        Live("uptime_seconds", "Since the server started.", lambda: time.monotonic() - context.metrics.started),
        Live("prompt_cache_bytes", "Size of the prompt cache.", lambda: prompts.stats.size_bytes),
        Live("stored_responses_bytes", "Size of the stored responses.", lambda: context.responses.num_bytes),
        Live("engine_restarts", "Restarts of the engine.", lambda: engine.num_restarts, counter=True),
        Live("requests_resumed", "Requests that went on in the next engine.", lambda: engine.num_resumed, counter=True),
        Live("prompt_tokens", "Prompt tokens.", lambda: context.metrics.num_prompt_tokens, counter=True),
        Live("generation_tokens", "Generated tokens.", lambda: context.metrics.num_output_tokens, counter=True),
        Live("prompt_cache_hits", "Prompts with a cached prefix.", lambda: prompts.stats.hits, counter=True),
        Live("prompt_cache_builds", "Prompts built.", lambda: prompts.stats.builds, counter=True),
        Live("preemptions", "Requests preempted.", lambda: engine.stats.num_preemptions_total, counter=True),
        Live(
            "prefix_cache_queries",
            "Prompt tokens looked up.",
            lambda: engine.stats.num_prefix_queried_total,
            counter=True,
        ),
        Live("prefix_cache_hits", "Prompt tokens found.", lambda: engine.stats.num_prefix_hit_total, counter=True),
        Live("spec_decode_num_draft_tokens", "Tokens guessed.", lambda: engine.stats.num_draft_total, counter=True),
        Live(
            "spec_decode_num_accepted_tokens",
            "Guessed tokens that were right.",
            lambda: engine.stats.num_accepted_total,
            counter=True,
        ),
        Live("engine_steps", "Steps of the engine.", lambda: engine.stats.num_steps_total, counter=True),
        Live("engine_step_seconds", "Time in steps.", lambda: engine.stats.step_s_total, counter=True),
        Live("engine_batch_size", "Requests in the last step.", lambda: engine.stats.last_step_seqs),
        Live("requests_refused", "Refused at the door.", lambda: sum(context.access.refused.values()), counter=True),
    ]
    context.metrics.registry.register(LiveCollector(values, gpu_gauges, lambda: context.tags))
