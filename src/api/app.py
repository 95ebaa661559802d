"""The app factory. There is no global state: two apps in one process are independent."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from gptoss import __version__
from gptoss.api.access.access import Access
from gptoss.api.access.api_keys import Caller
from gptoss.api.batches.service import BatchService, create_batches
from gptoss.api.context import ServerContext, create_context
from gptoss.api.http.error_responses import install as install_error_handlers
from gptoss.api.http.limited_paths import LimitedPaths
from gptoss.api.http.openapi import OPENAI_ERROR, DocumentedApi, error_responses
from gptoss.api.middleware.auth import AuthMiddleware
from gptoss.api.middleware.head_as_get import HeadAsGet
from gptoss.api.middleware.request_id import RequestIdMiddleware
from gptoss.api.ops.metrics import register_live_metrics
from gptoss.api.ops.warm_up import warm_up
from gptoss.api.responses.store import ResponseStore
from gptoss.api.telemetry.tracing import Tracing
from gptoss.config.schema import ServerConfig
from gptoss.engine.client.pool import AnyEngine
from gptoss.harmony.vocabulary_files import Vocabulary

# Modules of gptoss.api with routes; each has a `router`
ENDPOINTS = (
    "batches.routes",
    "chat.routes",
    "completions.routes",
    "messages.routes",
    "responses.routes",
    "ops.cancel",
    "ops.dashboard",
    "ops.health",
    "ops.lora",
    "ops.metrics",
    "ops.models",
    "ops.stats",
    "ops.tokenize",
)
ROUTERS: list[APIRouter] = [importlib.import_module(f"gptoss.api.{name}").router for name in ENDPOINTS]
LIMITED_PATHS = LimitedPaths.of(route for router in ROUTERS for route in router.routes)


def create_app(
    engine: AnyEngine,
    config: ServerConfig,
    vocabulary: Vocabulary,
    *,
    callers: list[Caller] | None = None,
    model_id: str,
    model_size: str,
    repetition_guard: int = 0,
    aliases: frozenset[str] = frozenset(),
) -> FastAPI:
    """Returns the app; its lifespan starts and stops `engine`.

    `callers`: the keys, if they have been read already.
    """
    tracing = Tracing(config.otlp_endpoint) if config.otlp_endpoint else None
    store = ResponseStore(config.response_store_bytes)
    context = create_context(
        engine,
        config,
        vocabulary,
        store,
        callers=callers,
        model_id=model_id,
        model_size=model_size,
        repetition_guard=repetition_guard,
        aliases=aliases,
        tracing=tracing,
    )
    engine.on_step = context.metrics.step
    batches = create_batches(context) if config.batch_dir is not None else None
    app = DocumentedApi(
        title="gpt-oss server",
        version=__version__,
        lifespan=lambda _: _running(context, tracing, batches),
        responses=error_responses(OPENAI_ERROR),
    )
    app.state.context, app.state.response_store, app.state.batches = context, store, batches
    register_live_metrics(context)
    install_error_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    _add_middleware(app, config, context.access)
    return app


@contextlib.asynccontextmanager
async def _running(
    context: ServerContext, tracing: Tracing | None, batches: BatchService | None
) -> AsyncIterator[None]:
    """Starts engine, warm-up and batches, and ends them."""
    await context.engine.start()
    context.tools.start()
    warming = asyncio.create_task(warm_up(context))
    if batches is not None:
        batches.start()
    try:
        yield
    finally:
        if batches is not None:
            await batches.stop()
        warming.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await warming
        context.pool.close()
        await context.tools.close()
        await context.engine.stop()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)


def _add_middleware(app: FastAPI, config: ServerConfig, access: Access) -> None:
    """Adds the layers from the inside out."""
    app.add_middleware(HeadAsGet)
    app.add_middleware(AuthMiddleware, config=config, access=access, limited=LIMITED_PATHS)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", "retry-after"],
        )
    app.add_middleware(RequestIdMiddleware)
