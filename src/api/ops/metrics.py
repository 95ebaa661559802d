"""GET /metrics, in Prometheus' format."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from gptoss.api.context import Context, ServerContext
from gptoss.api.ops.stats import gpu_report
from gptoss.api.telemetry.scrape import Labelled, ScrapeCollector, ScrapedValue
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.pool import AnyEngine

router = APIRouter()
gauge, counter = ScrapedValue, partial(ScrapedValue, counter=True)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(context: Context) -> Response:
    names = context.config.vllm_metric_names
    text = await asyncio.to_thread(  # takes milliseconds
        lambda: context.metrics.render(context.tags, vllm_names=names)
    )
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def register_live_metrics(context: ServerContext) -> None:
    """Registers the figures that are read at each scrape."""
    engine = context.engine

    def gauges() -> dict[str, Labelled]:
        return cache_gauges(context) | gpu_gauges() | (lora_gauges(context) if engine.config.has_lora else {})

    values = [*engine_values(engine), *server_values(context)]
    context.metrics.registry.register(ScrapeCollector(values, gauges, lambda: context.tags))


def engine_values(engine: AnyEngine) -> list[ScrapedValue]:
    """The figures of the engine; of several, one for each with its number."""

    def each(read: Callable[[EngineClient], float]) -> Callable[[], float | Labelled]:
        if len(engine.engines) == 1:
            return lambda: read(engine.engines[0])
        return lambda: [({"engine": str(number)}, read(one)) for number, one in enumerate(engine.engines)]

    return [
        gauge("num_requests_running", "Requests in the engine's batch.", each(lambda e: e.stats.num_running)),
        gauge("num_requests_waiting", "Requests waiting for the engine.", each(lambda e: e.num_waiting)),
        gauge(
            "batch_requests_running",
            "Requests of batches that hold KV blocks, in a step or paused.",
            each(lambda e: e.stats.num_background_running),
        ),
        gauge(
            "batch_requests_waiting",
            "Requests of batches that wait in the engine.",
            each(lambda e: e.stats.num_background_waiting),
        ),
        gauge("kv_cache_usage_ratio", "Share of KV blocks in use.", each(lambda e: e.stats.kv_usage)),
        gauge("engine_ready", "1 while the engine serves.", each(lambda e: float(e.is_ready))),
        gauge("engine_last_step_seconds", "Duration of the last step.", each(lambda e: e.stats.last_step_s)),
        counter("engine_restarts", "Restarts of the engine.", each(lambda e: e.num_restarts)),
        counter("requests_resumed", "Requests that continued in the next engine.", each(lambda e: e.num_resumed)),
        counter("preemptions", "Requests preempted.", each(lambda e: e.stats.num_preemptions_total)),
        counter("prefix_cache_queries", "Prompt tokens looked up.", each(lambda e: e.stats.num_prefix_queried_total)),
        counter("prefix_cache_hits", "Prompt tokens found.", each(lambda e: e.stats.num_prefix_hit_total)),
        counter("spec_decode_num_draft_tokens", "Draft tokens.", each(lambda e: e.stats.num_draft_total)),
        counter(
            "spec_decode_num_accepted_tokens", "Accepted draft tokens.", each(lambda e: e.stats.num_accepted_total)
        ),
        counter(
            "spec_decode_num_head_draft_tokens",
            "Draft tokens of the draft head.",
            each(lambda e: e.stats.num_head_draft_total),
        ),
        counter(
            "spec_decode_num_head_accepted_tokens",
            "Accepted draft tokens of the draft head.",
            each(lambda e: e.stats.num_head_accepted_total),
        ),
        counter("engine_steps", "Steps of the engine.", each(lambda e: e.stats.num_steps_total)),
        counter("engine_step_seconds", "Time in steps.", each(lambda e: e.stats.step_s_total)),
        gauge("engine_batch_size", "Requests in the last step.", each(lambda e: e.stats.last_step_seqs)),
        counter(
            "batch_preemptions",
            "Requests of batches whose KV blocks a live request or another one took.",
            each(lambda e: e.stats.num_background_preemptions_total),
        ),
    ]


def server_values(context: ServerContext) -> list[ScrapedValue]:
    """The figures of the API process."""
    prompts = context.prompt_builder
    return [
        gauge("requests_active", "Requests not answered yet.", lambda: context.metrics.active),
        gauge("uptime_seconds", "Since the server started.", lambda: time.monotonic() - context.metrics.started),
        gauge("prompt_cache_bytes", "Size of the prompt cache.", lambda: prompts.stats.size_bytes),
        gauge("stored_responses_bytes", "Size of the stored responses.", lambda: context.stored_responses.num_bytes),
        counter("prompt_tokens", "Prompt tokens.", lambda: context.metrics.num_prompt_tokens),
        counter("generation_tokens", "Generated tokens.", lambda: context.metrics.num_output_tokens),
        counter("prompt_cache_hits", "Prompts with a cached prefix.", lambda: prompts.stats.hits),
        counter("prompt_cache_builds", "Prompts built.", lambda: prompts.stats.builds),
        counter(
            "requests_refused", "Requests refused by the auth middleware.", lambda: sum(context.access.refused.values())
        ),
    ]


def gpu_gauges() -> dict[str, Labelled]:
    """Memory, utilization and temperature of each GPU."""
    gpus = gpu_report()

    def values(key: str) -> Labelled:
        return [({"gpu": str(g["index"])}, float(g[key])) for g in gpus if g[key] is not None]

    return {
        "gpu_memory_used_bytes": values("used_bytes"),
        "gpu_memory_total_bytes": values("total_bytes"),
        "gpu_utilization_ratio": values("utilization"),
        "gpu_temperature_celsius": values("temperature_c"),
    }


def cache_gauges(context: ServerContext) -> dict[str, Labelled]:
    """vLLM's metric of the KV cache's size, in its labels; the value is 1."""
    engines = context.engine.engines
    found = []
    for number, engine in enumerate(engines):
        if engine.ready is not None:
            labels = {"block_size": str(engine.config.block_size), "num_gpu_blocks": str(engine.ready.num_blocks)}
            labels["enable_prefix_caching"] = str(engine.config.enable_prefix_caching)
            labels["cache_dtype"] = engine.config.kv_cache_dtype
            found.append((labels | ({"engine": str(number)} if len(engines) > 1 else {}), 1.0))
    return {"cache_config_info": found}


def lora_gauges(context: ServerContext) -> dict[str, Labelled]:
    """vLLM's metric of the adapters in use, whose value is the time."""
    engine = context.engine
    running, waiting = engine.adapters_in_use()

    def names(ids: set[int]) -> str:
        return ",".join(sorted(engine.adapters.name_of(adapter_id) for adapter_id in ids))

    labels = {
        "max_lora": str(engine.config.max_loras),
        "running_lora_adapters": names(running),
        "waiting_lora_adapters": names(waiting),
    }
    return {"lora_requests_info": [(labels, time.time())]}
