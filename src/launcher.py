"""Start-up order, the app on uvicorn, draining and the end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from gptoss import __version__, logging_setup, port_manager
from gptoss.api.access.api_keys import Caller, load_callers
from gptoss.api.access.hosts import is_loopback
from gptoss.api.http.descriptors import allowed_connections
from gptoss.cached_files import CacheError, default_cache_folder
from gptoss.config.engine_keys import DeviceKeys, EngineKeys
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.config.sources import describe, load_config, service_variables
from gptoss.config.text import without_secrets
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import EngineError
from gptoss.engine.client.supervisor import RestartPolicy
from gptoss.engine.config import EngineConfig
from gptoss.engine.parallel.gpus import visible_gpus
from gptoss.harmony.special_tokens import SPECIAL_TOKENS, SPLIT_PATTERN, STOP_TOKEN_IDS
from gptoss.harmony.vocabulary import find_ranks
from gptoss.harmony.vocabulary_files import Vocabulary, VocabularyError, load_vocabulary
from gptoss.model_locator import LocatedModel, is_embedded, locate_model

if TYPE_CHECKING:
    from fastapi import FastAPI

    from gptoss.api.context import ServerContext

logger = logging.getLogger("server")
FINISH_S = 2  # for connections to close after the last answer


def choose_model(config: ServerConfig) -> str:
    """The model asked for; else the profile's on a machine with a GPU, else the embedded one."""
    if config.model is not None:
        return config.model
    if config.model_path is not None:
        return str(config.model_path)
    if visible_gpus():
        return config.active_profile.model
    logger.info("no GPU and no --model: serving the embedded model nano on the CPU")
    return "nano"


def check_access(config: ServerConfig, origin: Mapping[str, str]) -> list[Caller]:
    """Returns the callers that have a key. Warns of a server that is open to the network, and of a key that other
    users of this machine can see.

    Raises:
        ConfigError: the keys are wrong, or there are none although require_api_key is set.
    """
    callers = load_callers(config)
    if not callers:
        if config.require_api_key:
            raise ConfigError("require_api_key is set, but there is no key: set GPTOSS_API_KEY or api_keys_file")
        if not is_loopback(config.host):
            logger.warning(
                "no API key is set and host %s is not loopback: whoever reaches this port can use the server; "
                "set GPTOSS_API_KEY or api_keys_file (docs/security.md)",
                config.host,
            )
    if origin.get("api_key") == "flag":
        logger.warning("api_key is on the command line, which every user of this machine can read: use GPTOSS_API_KEY")
    return callers


def engine_config(config: ServerConfig, located: LocatedModel, vocabulary: Vocabulary) -> EngineConfig:
    """Returns the engine's groups of keys, and what follows from the profile, the model and the vocabulary."""
    keys = {key: config.resolved(key) for group in (DeviceKeys, EngineKeys) for key in group.__dataclass_fields__}
    keys["max_model_len"] = config.max_model_len or located.config.max_position
    return EngineConfig(
        located.config,
        located.folder,
        ranks_path=vocabulary.ranks_path,
        special_tokens=SPECIAL_TOKENS,
        split_pattern=SPLIT_PATTERN,
        eos_token_ids=STOP_TOKEN_IDS,
        **keys,
    )


class Server(uvicorn.Server):
    """uvicorn that drains: the first SIGTERM or SIGINT closes the door for new requests and lets the running ones
    finish, the second ends at once. The exit code is 0 either way. SIGHUP reads the keys again."""

    def __init__(self, config: uvicorn.Config, context: ServerContext) -> None:
        super().__init__(config)
        self._context = context
        self._draining: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_end)
        loop.add_signal_handler(signal.SIGHUP, self._context.access.reload)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _asked_to_end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
            return
        logger.warning("ending at once")
        self.should_exit = self.force_exit = True

    async def _drain(self) -> None:
        """Requests that do not finish in time end with an error event."""
        context = self._context
        context.access.draining = True
        timeout_s = context.config.drain_timeout_s
        logger.info("draining: %d requests are running, up to %g s", context.metrics.active, timeout_s)
        if not await self._wait_for_the_last(timeout_s):
            logger.warning("%d requests are cut off after %g s", context.metrics.active, timeout_s)
            context.engine.fail_requests("the server is shutting down")
            await self._wait_for_the_last(FINISH_S)
        self.should_exit = True

    async def _wait_for_the_last(self, timeout_s: float) -> bool:
        """-> whether nothing is running any more."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while self._context.metrics.active and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        return self._context.metrics.active == 0


async def serve(
    config: ServerConfig,
    engine_settings: EngineConfig,
    bound: socket.socket,
    located: LocatedModel,
    vocabulary: Vocabulary,
    callers: list[Caller],
) -> int:
    try:
        max_connections = allowed_connections(config.max_connections)
    except ConfigError as error:
        sys.stderr.write(f"error: {without_secrets(str(error))}\n")
        return 2
    policy = RestartPolicy(
        max_restarts=config.max_engine_restarts,
        max_resumes=config.max_request_resumes,
        step_timeout_s=config.engine_step_timeout_s,
        heartbeat_timeout_s=config.engine_heartbeat_timeout_s,
    )
    log = {"level": config.log_level, "log_format": config.log_format}
    model, cache = choose_model(config), default_cache_folder()

    def renewed() -> EngineConfig:
        folder = located.folder
        if is_embedded(model, config.model_path) and folder is not None:
            folder = locate_model(model, None, cache).folder
        ranks_path = find_ranks(folder, cache) or vocabulary.ranks_path
        return dataclasses.replace(engine_settings, model_path=folder, ranks_path=ranks_path)

    engine = EngineClient(engine_settings, policy, log, renewed)
    await engine.start()  # it loads while the app is imported and built
    name = config.served_model_name or located.name
    try:
        app = await _app(engine, config, vocabulary, callers, name, located)
    except BaseException as error:
        await engine.stop()
        if not isinstance(error, ConfigError):
            raise
        sys.stderr.write(f"error: {without_secrets(str(error))}\n")
        return 2
    from gptoss.api.http.uvicorn_server import ConnectionLimits, limited_protocol

    server = Server(
        uvicorn.Config(
            app,
            loop="uvloop",
            http=limited_protocol(
                ConnectionLimits(
                    header_timeout_s=config.header_timeout_s,
                    max_header_bytes=config.max_header_bytes,
                    send_timeout_s=config.send_timeout_s,
                    max_connections=max_connections,
                    max_connections_per_address=config.max_connections_per_address,
                )
            ),
            ws="none",  # else an upgrade leaves this protocol and its limits
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=FINISH_S,
            lifespan="on",
            server_header=False,
            proxy_headers=False,  # who connects is who connects
        ),
        app.state.context,
    )
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    failed = False
    try:
        announce = asyncio.create_task(_announce(engine, name, bound))
        await asyncio.wait({serving, announce}, return_when=asyncio.FIRST_COMPLETED)
        if announce.done() and not announce.result():
            failed = server.should_exit = True
        elif not announce.done():
            announce.cancel()
    finally:
        await serving
    return 1 if failed else 0


async def _app(
    engine: EngineClient,
    config: ServerConfig,
    vocabulary: Vocabulary,
    callers: list[Caller],
    name: str,
    located: LocatedModel,
) -> FastAPI:
    """Its lifespan stops the engine. Raises ConfigError."""
    size = located.size
    await asyncio.to_thread(importlib.import_module, "gptoss.api.app")  # the engine's start goes on
    from gptoss.api.app import create_app

    aliases = {size, f"gpt-oss-{size}", f"openai/gpt-oss-{size}", f"gpt-oss:{size}"} if size != "custom" else set()
    return create_app(
        engine,
        config,
        vocabulary,
        callers=callers,
        model_id=name,
        model_size=size,
        repetition_guard=located.repetition_guard,
        aliases=frozenset(aliases),
    )


async def _announce(engine: EngineClient, name: str, bound: socket.socket) -> bool:
    """Says so when the engine is ready. -> whether it ever was."""
    try:
        ready = await engine.wait_ready()
    except EngineError as error:
        logger.critical("cannot serve: %s", error)
        return False
    host, port = bound.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    logger.info(
        "ready: %s in %s on %s (%s kernels), %d KV blocks, up to %d tokens, at %s",
        name,
        ready.dtype,
        ready.device,
        ready.kernel_path,
        ready.num_blocks,
        ready.max_model_len,
        url,
    )
    return True


def main(argv: list[str] | None = None) -> int:
    """Loads the configuration, holds the port, finds model and vocabulary, serves. -> exit code"""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # CUDA's numbers are then the driver's
    try:
        config, origin, print_config = load_config(argv)
        if print_config:
            sys.stdout.write(describe(config, origin))
            return 0
        logging_setup.configure(config.log_level, config.log_format)
        logger.info("gpt-oss server %s", __version__)
        if ignored := service_variables():
            logger.info("ignoring Kubernetes service variables: %s", ", ".join(ignored))
        callers = check_access(config, origin)
        bound = port_manager.reserve(config.host, config.port, auto=config.auto_port, force=config.force_port)
        cache = default_cache_folder()
        located = locate_model(choose_model(config), config.model_path, cache, dummy=config.load_format == "dummy")
        vocabulary = load_vocabulary(located.folder, cache)
        engine_settings = engine_config(config, located, vocabulary)
    except (CacheError, ConfigError, VocabularyError, port_manager.PortError) as error:
        sys.stderr.write(f"error: {without_secrets(str(error))}\n")
        return 2
    with port_manager.recorded(bound):
        return uvloop.run(serve(config, engine_settings, bound, located, vocabulary, callers))
