"""The app factory. Nothing global: two apps in one process do not know each other."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptoss import __version__
from gptoss.api import cancel, chat, completions, errors, models, page, responses, system, tokens
from gptoss.api.access import Access, Door
from gptoss.api.deps import ServerContext
from gptoss.api.keys import Caller
from gptoss.api.ledger import Ledger
from gptoss.api.metrics import Metrics
from gptoss.api.response_store import ResponseStore
from gptoss.api.tracing import Tracing
from gptoss.api.unknown_fields import UnknownFields
from gptoss.api.warm_up import warm_up
from gptoss.config import ServerConfig
from gptoss.engine.client import EngineClient
from gptoss.harmony.vocabulary import Vocabulary
from gptoss.prompt_builder import PromptBuilder

logger = logging.getLogger(__name__)


class Frame:
    """Around every answer: x-request-id and openai-processing-ms, and a plain 500 for what nobody caught. Pure ASGI:
    Starlette's BaseHTTPMiddleware would hide a client's disconnect from the routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        request_id = f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                elapsed_ms = int((time.monotonic() - started) * 1000)
                headers = message["headers"]
                if message["status"] == 307:
                    headers = [
                        (name, _redirect_path(scope) if name == b"location" else value) for name, value in headers
                    ]
                message["headers"] = [
                    *headers,
                    (b"x-request-id", request_id.encode()),
                    (b"openai-processing-ms", str(elapsed_ms).encode()),
                    (b"openai-version", b"2020-10-01"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            logger.exception("unhandled error in %s (%s)", scope["path"], request_id)
            if begun:
                raise
            await errors.internal_error()(scope, receive, send_with_headers)


class HeadAsGet:
    """Answers HEAD as GET is answered (RFC 9110, 9.3.2); the HTTP protocol leaves the body out."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


def _redirect_path(scope: Scope) -> bytes:
    """Where Starlette's router redirects to, with or without the last slash, as a path: its own location names the
    host that the client sent."""
    path = scope["path"]
    path = path.rstrip("/") if path.endswith("/") else path + "/"
    location = "/" + quote(path.lstrip("/"))
    query = scope["query_string"].decode("latin-1")
    return f"{location}?{query}".encode("latin-1") if query else location.encode()


def create_app(
    engine: EngineClient,
    config: ServerConfig,
    vocabulary: Vocabulary,
    *,
    callers: list[Caller] | None = None,
    model_id: str,
    model_size: str,
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
        model_names=aliases | {model_id},
        profiles=config.all_profiles(),
        access=access,
        ledger=Ledger(engine, metrics, access, tracing),
        responses=ResponseStore(config.response_store_bytes),
        unknown_fields=UnknownFields(config.unknown_fields),
    )
    engine.on_step = metrics.step
    app.state.context = context
    system.register_live_metrics(context)
    errors.install(app)
    modules: list[Any] = [cancel, chat, completions, models, page, responses, system, tokens]
    for module in modules:
        app.include_router(module.router)
    app.add_middleware(HeadAsGet)
    app.add_middleware(Door, access=access)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Frame)  # the last one added is the outermost
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
