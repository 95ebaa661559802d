"""Starts a server: configuration, port, model, engine, app; then serves, drains and ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import importlib.util
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from gptoss import __version__, logging_setup, port_manager
from gptoss.api.access.api_keys import Caller, load_callers
from gptoss.api.access.hosts import is_loopback
from gptoss.api.http.descriptors import allowed_connections
from gptoss.cached_files import CacheError, default_cache_folder
from gptoss.config.engine_keys import DeviceKeys, EngineKeys, LoraKeys
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.config.sources import describe, load_config, service_variables
from gptoss.config.text import without_secrets
from gptoss.engine.client.adapters import Adapters
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import EngineError
from gptoss.engine.client.pool import AnyEngine, EnginePool
from gptoss.engine.client.supervisor import RestartPolicy
from gptoss.engine.config import EngineConfig
from gptoss.engine.core.host_agent import HostAgent
from gptoss.engine.parallel.device_placement import place_engines
from gptoss.engine.parallel.gpus import visible_gpus
from gptoss.harmony.special_tokens import PROBE_TOKEN_IDS, SPECIAL_TOKENS, SPLIT_PATTERN, STOP_TOKEN_IDS
from gptoss.harmony.vocabulary import find_ranks
from gptoss.harmony.vocabulary_files import Vocabulary, VocabularyError, load_vocabulary
from gptoss.model_locator import LocatedModel, is_embedded, locate_model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from gptoss.api.context import ServerContext

logger = logging.getLogger("server")
FINISH_S = 2  # time for connections to close after the last answer


@dataclass(frozen=True, slots=True)
class ModelStartup:
    """What an engine needs to start, with or without a server."""

    config: ServerConfig
    engine_configs: list[EngineConfig]  # of each engine
    model: str  # a size, a folder or a Hub id
    located: LocatedModel
    vocabulary: Vocabulary
    adapters: Adapters

    @property
    def model_id(self) -> str:
        """The name in /v1/models."""
        return model_id(self.config, self.located)

    @property
    def aliases(self) -> frozenset[str]:
        """Other names that requests may use."""
        return model_aliases(self.located)

    def renewed_engine_config(self, number: int) -> EngineConfig:
        """Returns the configuration for an engine that is started again, with intact cached files."""
        folder, cache = self.located.folder, default_cache_folder()
        if is_embedded(self.model, self.config.model_path) and folder is not None:
            folder = locate_model(self.model, None, cache).folder
        ranks_path = find_ranks(folder, cache) or self.vocabulary.ranks_path
        return dataclasses.replace(self.engine_configs[number], model_path=folder, ranks_path=ranks_path)


@dataclass(frozen=True, slots=True)
class Startup(ModelStartup):
    """What is known before the server's engine starts."""

    callers: list[Caller]
    bound: socket.socket
    max_connections: int


def prepare(config: ServerConfig, origin: Mapping[str, str]) -> Startup:
    """Returns all that a server needs to start its engine, with the port reserved.

    Raises:
        ConfigError, CacheError, VocabularyError, PortError: the server cannot start.
    """
    check_backend(config)
    check_batches(config)
    callers = check_access(config, origin)
    max_connections = allowed_connections(config.max_connections)
    bound = port_manager.reserve(config.host, config.port, auto=config.auto_port, force=config.force_port)
    model = prepare_model(config)
    known = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelStartup)}
    return Startup(**known, callers=callers, bound=bound, max_connections=max_connections)


def prepare_model(config: ServerConfig) -> ModelStartup:
    """Returns what an engine needs to start. Raises ConfigError, CacheError or VocabularyError."""
    cache, model = default_cache_folder(), choose_model(config)
    located = locate_model(model, config.model_path, cache, dummy=config.load_format == "dummy")
    vocabulary = load_vocabulary(located.folder, cache)
    settings = engine_config(config, located, vocabulary)
    names = {model_id(config, located), *model_aliases(located), *config.all_profiles()}
    adapters = Adapters.of_config(settings, lambda: names)
    settings = dataclasses.replace(settings, max_lora_bytes=adapters.max_bytes or None)
    return ModelStartup(config, place_engines(settings), model, located, vocabulary, adapters)


def model_id(config: ServerConfig, located: LocatedModel) -> str:
    """Returns the model's name in /v1/models."""
    return config.served_model_name or located.name


def model_aliases(located: LocatedModel) -> frozenset[str]:
    """Returns the other names by which requests may ask for the model."""
    size = located.size
    names = {size, f"gpt-oss-{size}", f"openai/gpt-oss-{size}", f"gpt-oss:{size}"}
    return frozenset(names) if size != "custom" else frozenset()


def check_backend(config: ServerConfig) -> None:
    """Raises ConfigError if a package that the backend needs is not installed."""
    packages = ("transformers", "accelerate") if config.backend == "transformers" else ()
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"backend 'transformers' requires {' and '.join(missing)}; install the package's extra 'transformers', or "
            f"run: pip install {' '.join(packages)}"
        )


def check_batches(config: ServerConfig) -> None:
    """Raises ConfigError if the package that reads uploads is not installed."""
    if config.batch_dir is not None and importlib.util.find_spec("python_multipart") is None:
        raise ConfigError(
            "batch_dir requires python-multipart; install the package's extra 'batches', or run: pip install "
            "python-multipart"
        )


def choose_model(config: ServerConfig) -> str:
    """Returns the configured model, else the profile's with a GPU and the embedded one without."""
    if config.model is not None:
        return config.model
    if config.model_path is not None:
        return str(config.model_path)
    if visible_gpus():
        return config.active_profile.model
    logger.info("no GPU and no --model: serving the embedded model nano on the CPU")
    return "nano"


def check_access(config: ServerConfig, origin: Mapping[str, str]) -> list[Caller]:
    """Returns the callers that have a key.

    Warns if the network or other users of this machine have access.

    Raises:
        ConfigError: a key is invalid, or require_api_key is set and there is none.
    """
    callers = load_callers(config)
    if not callers:
        if config.require_api_key:
            raise ConfigError("require_api_key is set, but there is no key: set GPTOSS_API_KEY or api_keys_file")
        if not is_loopback(config.host):
            logger.warning(
                "no API key is set and host %s is not loopback: anyone who reaches this port can use the server; "
                "set GPTOSS_API_KEY or api_keys_file (docs/security.md)",
                config.host,
            )
    if origin.get("api_key") == "flag":
        logger.warning("api_key is on the command line, which every user of this machine can read: use GPTOSS_API_KEY")
    return callers


def engine_config(config: ServerConfig, located: LocatedModel, vocabulary: Vocabulary) -> EngineConfig:
    """Returns the engine's configuration: its keys, and what profile, model and vocabulary imply."""
    keys = {
        key: config.resolved(key) for group in (DeviceKeys, EngineKeys, LoraKeys) for key in group.__dataclass_fields__
    }
    keys["weights_cache_dir"] = config.weights_cache_dir or default_cache_folder() / "weights"
    keys["max_model_len"] = config.max_model_len or located.config.max_position
    return EngineConfig(
        located.config,
        located.folder,
        ranks_path=vocabulary.ranks_path,
        special_tokens=SPECIAL_TOKENS,
        split_pattern=SPLIT_PATTERN,
        eos_token_ids=STOP_TOKEN_IDS,
        probe_token_ids=PROBE_TOKEN_IDS,
        **keys,
    )


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
