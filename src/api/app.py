"""The app factory. Nothing global: two apps in one process do not know each other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from gptoss import __version__
from gptoss.api.access.access import Access
from gptoss.api.access.api_keys import Caller
from gptoss.api.chat.routes import router as chat_router
from gptoss.api.completions.routes import router as completions_router
from gptoss.api.context import ServerContext
from gptoss.api.http import errors
from gptoss.api.middleware.auth import AuthMiddleware
from gptoss.api.middleware.head_as_get import HeadAsGet
from gptoss.api.middleware.request_id import RequestIdMiddleware
from gptoss.api.ops.cancel import router as cancel_router
from gptoss.api.ops.dashboard import router as dashboard_router
from gptoss.api.ops.health import router as health_router
from gptoss.api.ops.metrics import register_live_metrics
from gptoss.api.ops.metrics import router as metrics_router
from gptoss.api.ops.models import router as models_router
from gptoss.api.ops.stats import router as stats_router
from gptoss.api.ops.tokenize import router as tokenize_router
from gptoss.api.ops.warm_up import warm_up
from gptoss.api.responses.routes import router as responses_router
from gptoss.api.responses.store import ResponseStore
from gptoss.api.telemetry.metrics import Metrics
from gptoss.api.telemetry.request_tracker import RequestTracker
from gptoss.api.telemetry.tracing import Tracing
from gptoss.api.telemetry.unknown_fields import UnknownFields
from gptoss.config.schema import ServerConfig
from gptoss.engine.client.client import EngineClient
from gptoss.harmony.vocabulary_files import Vocabulary
from gptoss.prompt_builder import PromptBuilder


def create_app(
    engine: EngineClient,
    config: ServerConfig,
    vocabulary: Vocabulary,
    *,
    callers: list[Caller] | None = None,
    model_id: str,
    model_size: str,
    repetition_guard: int = 0,
    aliases: frozenset[str] = frozenset(),
) -> FastAPI:
    """`engine` is started and stopped by the app's lifespan. `callers`: where the keys were read already."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        warming = asyncio.create_task(warm_up(context))
        try:
            yield
        finally:
            warming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await warming
            context.pool.close()
            await engine.stop()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(title="gpt-oss server", version=__version__, lifespan=lifespan)
    tracing = Tracing(config.otlp_endpoint) if config.otlp_endpoint else None
    metrics, access = Metrics(), Access(config, callers)
    context = ServerContext(
        config=config,
        engine=engine,
        prompt_builder=_prompt_builder(vocabulary, config),
        vocabulary=vocabulary,
        metrics=metrics,
        model_id=model_id,
        model_size=model_size,
        model_repetition_guard=repetition_guard,
        model_names=aliases | {model_id},
        profiles=config.all_profiles(),
        access=access,
        tracker=RequestTracker(engine, metrics, access, tracing),
        responses=ResponseStore(config.response_store_bytes),
        unknown_fields=UnknownFields(config.unknown_fields),
    )
    engine.on_step = metrics.step
    app.state.context = context
    register_live_metrics(context)
    errors.install(app)
    for router in (
        cancel_router,
        chat_router,
        completions_router,
        models_router,
        dashboard_router,
        responses_router,
        health_router,
        stats_router,
        metrics_router,
        tokenize_router,
    ):
        app.include_router(router)
    app.add_middleware(HeadAsGet)
    app.add_middleware(AuthMiddleware, access=access)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(RequestIdMiddleware)  # the last one added is the outermost
    return app


def _prompt_builder(vocabulary: Vocabulary, config: ServerConfig) -> PromptBuilder:
    return PromptBuilder(
        vocabulary,
        current_date=config.current_date,
        cache_bytes=config.prompt_cache_bytes,
        cache_ttl_s=config.prompt_cache_ttl_s,
        replay_generated_ids=(
            not config.resolved("batch_invariant")
            if config.replay_generated_ids is None
            else config.replay_generated_ids
        ),
    )
