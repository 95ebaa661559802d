"""Health and readiness."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from gptoss import __version__
from gptoss.api.context import Context, ServerContext
from gptoss.api.http.error_responses import json_response
from gptoss.engine.client.pool import AnyEngine
from gptoss.engine.client.supervisor import EngineState

router = APIRouter()
# a 503 has the same report as a 200
UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: {"content": {"application/json": {"schema": {"type": "object"}}}}}


def health_report(context: ServerContext) -> dict[str, Any]:
    """The status, and the reasons why it is not "ok"."""
    engine = context.engine
    reasons = engine_problems(engine)
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


def engine_problems(engine: AnyEngine) -> list[str]:
    """Why engines do not serve, one line for each that does not; with its number if there are several."""
    problems = []
    for number, one in enumerate(engine.engines):
        several = len(engine.engines) > 1
        name = f"engine {number}" if several else "engine"
        if one.state is EngineState.DEAD:
            problems.append(f"{name} is dead: {one.failure}")
        elif not one.is_ready:
            problems.append(f"{name} is {one.state}")
        elif one.stall is not None:
            problems.append(f"{name}: {one.stall}" if several else one.stall)
    return problems


@router.get("/health", responses=UNAVAILABLE)
async def health(context: Context) -> Response:
    """Liveness: 503 only if every engine is dead, when the process should be restarted."""
    report = health_report(context)
    return json_response(503 if report["status"] == "unhealthy" else 200, report)


@router.get("/ready", responses=UNAVAILABLE)
async def ready(context: Context) -> Response:
    """Readiness: 200 only if a request sent now would be served immediately."""
    engine = context.engine
    draining, warm = context.access.draining, context.warm.is_set()
    serving = engine.serves and warm and not draining
    body = {"ready": serving, "engine": str(engine.state), "warm": warm, "draining": draining}
    return json_response(200 if serving else 503, body, {} if serving else {"retry-after": "5"})
