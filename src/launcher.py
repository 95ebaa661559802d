"""Starts a server: configuration, port, model, engine, app; then serves, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from gptoss import __version__, logging_setup, port_manager
from gptoss.api.access.api_keys import Caller
from gptoss.cached_files import CacheError
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.config.sources import describe, load_config, service_variables
from gptoss.config.text import without_secrets
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import EngineError
from gptoss.engine.client.pool import AnyEngine, EnginePool
from gptoss.engine.client.supervisor import RestartPolicy
from gptoss.engine.core.host_agent import HostAgent
from gptoss.harmony.vocabulary_files import VocabularyError
from gptoss.startup import ModelStartup, Startup, check_backend, prepare, prepare_model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from gptoss.api.context import ServerContext

logger = logging.getLogger("server")
FINISH_S = 2  # time for connections to close after the last answer


class Server(uvicorn.Server):
    """uvicorn that drains.

    The first SIGTERM or SIGINT refuses new requests and lets the running ones finish, the second ends at once; the exit
    code is 0 either way. SIGHUP reads the keys again.
    """

    def __init__(self, config: uvicorn.Config, context: ServerContext) -> None:
        super().__init__(config)
        self._context = context
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_end_signal)
        loop.add_signal_handler(signal.SIGHUP, self._context.access.keys.reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _on_end_signal(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
            return
        logger.warning("ending at once")
        self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        """Stops the server; requests that do not finish in time end with an error event."""
        context = self._context
        context.access.draining = True
        timeout_s = context.config.drain_timeout_s
        logger.info("draining: %d requests are running, up to %g s", context.metrics.active, timeout_s)
        if not await self._wait_until_idle(timeout_s):
            logger.warning("%d requests are cut off after %g s", context.metrics.active, timeout_s)
            context.engine.fail_requests("the server is shutting down")
            await self._wait_until_idle(FINISH_S)
        self.should_exit = True

    async def _wait_until_idle(self, timeout_s: float) -> bool:
        """Returns whether the last request ended in time."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._context.metrics.active and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return self._context.metrics.active == 0


async def serve(start: Startup) -> int:
    """Runs the engine and the HTTP server until a signal or the engine ends them. Returns the exit code."""
    engine = create_engine(start)
    await engine.start()  # it loads while the app is imported and built
    try:
        app = await _app(engine, start, start.callers)
    except BaseException as error:
        await engine.stop()
        if not isinstance(error, ConfigError):
            raise
        return _refuse(error)
    server = Server(_uvicorn_config(app, start), app.state.context)
    return await _serve_until_the_end(server, engine, start)


def create_engine(start: ModelStartup) -> AnyEngine:
    """Returns the engine, or the pool of several; none has been started."""
    policy, log, count = _restart_policy(start.config), _log_settings(start.config), len(start.engine_configs)
    engines = [
        EngineClient(
            config,
            policy,
            log,
            partial(start.renewed_engine_config, number),
            number if count > 1 else None,
            start.adapters,
        )
        for number, config in enumerate(start.engine_configs)
    ]
    return EnginePool(engines) if count > 1 else engines[0]


async def _serve_until_the_end(server: Server, engine: AnyEngine, start: Startup) -> int:
    """Returns 1 if the engine never became ready, else 0."""
    serving = asyncio.create_task(server.serve(sockets=[start.bound]))
    failed = False
    try:
        announce = asyncio.create_task(_announce(engine, start))
        await asyncio.wait({serving, announce}, return_when=asyncio.FIRST_COMPLETED)
        if announce.done() and not announce.result():
            failed = server.should_exit = True
        elif not announce.done():
            announce.cancel()
    finally:
        await serving
    return 1 if failed else 0


def _restart_policy(config: ServerConfig) -> RestartPolicy:
    return RestartPolicy(
        max_restarts=config.max_engine_restarts,
        max_resumes=config.max_request_resumes,
        step_timeout_s=config.engine_step_timeout_s,
        heartbeat_timeout_s=config.engine_heartbeat_timeout_s,
    )


def _log_settings(config: ServerConfig) -> dict[str, str]:
    return {"level": config.log_level, "log_format": config.log_format}


@contextlib.asynccontextmanager
async def local_app(config: ServerConfig, callers: list[Caller]) -> AsyncIterator[FastAPI]:
    """Yields an app without a port once its engine is ready; ends both.

    Raises:
        ConfigError, CacheError, VocabularyError, EngineError: it cannot start.
    """
    check_backend(config)
    start = await asyncio.to_thread(prepare_model, config)
    engine = create_engine(start)
    await engine.start()
    try:
        app = await _app(engine, start, callers)
    except BaseException:
        await engine.stop()
        raise
    async with app.router.lifespan_context(app):
        await engine.wait_ready()
        yield app


async def _app(engine: AnyEngine, start: ModelStartup, callers: list[Caller]) -> FastAPI:
    """Returns the app, whose lifespan stops the engine. Raises ConfigError."""
    await asyncio.to_thread(importlib.import_module, "gptoss.api.app")  # not on the loop, which is starting the engine
    from gptoss.api.app import create_app

    return create_app(
        engine,
        start.config,
        start.vocabulary,
        callers=callers,
        model_id=start.model_id,
        model_size=start.located.size,
        repetition_guard=start.located.repetition_guard,
        aliases=start.aliases,
    )


def _uvicorn_config(app: FastAPI, start: Startup) -> uvicorn.Config:
    from gptoss.api.http.uvicorn_server import ConnectionLimits, limited_protocol

    config = start.config
    limits = ConnectionLimits(
        header_timeout_s=config.header_timeout_s,
        max_header_bytes=config.max_header_bytes,
        send_timeout_s=config.send_timeout_s,
        max_connections=start.max_connections,
        max_connections_per_address=config.max_connections_per_address,
    )
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=limited_protocol(limits),
        ws="none",  # an upgrade would leave this protocol and its limits
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=FINISH_S,
        lifespan="on",
        server_header=False,
        proxy_headers=False,  # a client cannot choose its address by a header
    )


async def _announce(engine: AnyEngine, start: Startup) -> bool:
    """Logs the address once the engines are ready. Returns False if all of them gave up before."""
    try:
        ready = await engine.wait_started()
    except EngineError as error:
        logger.critical("cannot serve: %s", error)
        return False
    host, port = start.bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    count = sum(one.is_ready for one in engine.engines)
    logger.info(
        "ready: %s in %s on %s%s (%s kernels), %d KV blocks, up to %d tokens, at %s",
        start.model_id,
        ready.dtype,
        ready.device,
        f", {count} of {len(engine.engines)} engines" if len(engine.engines) > 1 else "",
        ready.kernel_path,
        ready.num_blocks,
        ready.max_model_len,
        url,
    )
    return True


def compute(config: ServerConfig) -> int:
    """Computes for the engine on host 0 until a signal; returns the exit code.

    Raises ConfigError, CacheError or VocabularyError.
    """
    check_backend(config)
    start = prepare_model(config)
    return HostAgent(partial(start.renewed_engine_config, 0), _log_settings(config)).run()


def _refuse(error: Exception) -> int:
    """Writes the error without secrets. Returns the exit code of a server that does not start."""
    sys.stderr.write(f"error: {without_secrets(str(error))}\n")
    return 2


def main(argv: list[str] | None = None) -> int:
    """Loads the configuration, reserves the port, finds the model, serves; returns the exit code."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # CUDA numbers the GPUs as the driver does
    try:
        config, origin, print_config = load_config(argv)
        if print_config:
            sys.stdout.write(describe(config, origin))
            return 0
        logging_setup.configure(config.log_level, config.log_format)
        logger.info("gpt-oss server %s", __version__)
        if ignored := service_variables():
            logger.info("ignoring Kubernetes service variables: %s", ", ".join(ignored))
        if config.node_rank > 0:
            return compute(config)
        start = prepare(config, origin)
    except (CacheError, ConfigError, VocabularyError, port_manager.PortError) as error:
        return _refuse(error)
    with port_manager.recorded(start.bound):
        return uvloop.run(serve(start))
