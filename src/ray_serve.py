"""The server on Ray Serve: an entry keeps each conversation with one of the replicas.

`serve run deploy/ray/app.yaml`, or `gptoss serve --ray`. docs/ray.md describes it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import secrets
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from gptoss import launcher, logging_setup, startup
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.config.sources import load_config
from gptoss.engine.client.supervisor import EngineState
from gptoss.engine.parallel.gpus import visible_gpus
from gptoss.lru_cache import LruCache

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"
POLICY = "gptoss.ray_serve:WaitingTokens"
SESSION_HEADERS = (b"x-session-id", b"x-claude-code-session-id")
SESSION_FIELDS = ("prompt_cache_key", "user")
MAX_SESSION_CHARS = 512
LOOK_BACK_S = 10.0
TRIES = 3  # of a request whose replica dies before it answers
KEPT_RESPONSES = 100_000  # ids of responses whose replica is known
RESPONSE_ID = b'"id":"resp_'
ID_CHARS = 128
BODY_OVERHEAD_BYTES = 1 << 18  # of a form with a file, without the file
WAITING_TOKENS = "waiting_tokens"
REPLICA_HEADER = b"x-replica"
UNLIMITED = 10_000  # requests: the engine's own limits answer with 429


@dataclass(frozen=True, slots=True)
class RayOptions:
    """The arguments of an application (`args` in app.yaml)."""

    flags: list[str] = field(default_factory=list)  # of each replica's server, as for `gptoss serve`
    min_replicas: int = 1
    max_replicas: int = 1
    gpus_per_replica: float = 0.0  # the engine's ranks share them: as many as tensor x pipeline
    cpus_per_replica: float = 1.0
    resources_per_replica: dict[str, float] = field(default_factory=dict)  # Ray's own resources
    drain_s: float = 300.0  # time for streams to end when a replica is replaced
    target_waiting_tokens: int = 8192  # prompt tokens that may wait for each replica before another one is started
    target_ongoing_requests: float = 32.0  # of each replica, below which one may be ended
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> RayOptions:
        """Returns the options in `args`. Raises ValueError for an unknown one."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(args) - known):
            raise ValueError(f"args.{unknown[0]} is unknown; known: {', '.join(sorted(known))}")
        options = cls(**args)
        if not 1 <= options.min_replicas <= options.max_replicas:
            raise ValueError(f"args.min_replicas ({options.min_replicas}) must be from 1 to args.max_replicas")
        return options


def build(args: dict[str, Any]) -> serve.Application:
    """Returns the application for `serve run`. Raises ValueError, ConfigError."""
    options = RayOptions.of(args)
    config = load_config(list(options.flags))[0]  # a wrong flag shows here, not in a replica's log
    check_batches(config, options.max_replicas)
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        max_ongoing_requests=UNLIMITED,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            initial_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            upscale_delay_s=options.upscale_delay_s,
            downscale_delay_s=options.downscale_delay_s,
            target_ongoing_requests=options.target_ongoing_requests,
            look_back_period_s=LOOK_BACK_S,
            policy=AutoscalingPolicy(policy_function=POLICY, policy_kwargs={"target": options.target_waiting_tokens}),
        ),
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        ray_actor_options={
            "num_cpus": options.cpus_per_replica,
            "num_gpus": options.gpus_per_replica,
            "resources": dict(options.resources_per_replica),
        },
        graceful_shutdown_timeout_s=options.drain_s,
        health_check_period_s=2.0,
    )
    entry = serve.deployment(
        serve.ingress()(Entry),
        name="entry",
        max_ongoing_requests=UNLIMITED,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.drain_s,
    )
    max_body_bytes = max(config.max_body_bytes, config.batch_max_file_bytes if config.batch_dir is not None else 0)
    return entry.bind(engine.bind(list(options.flags)), max_body_bytes)


def check_batches(config: ServerConfig, max_replicas: int) -> None:
    """Raises ConfigError if several replicas would share a folder of batches."""
    if config.batch_dir is not None and max_replicas > 1:
        raise ConfigError(
            f"batch_dir (--batch-dir) does not go with {max_replicas} replicas: one server alone can use the folder"
        )


def main(argv: list[str]) -> int:
    """Serves on Ray until a signal, and returns the exit code. Starts Ray here if there is no cluster.

    `argv`: --replicas MIN[:MAX], --gpus-per-replica N, then the flags of `gptoss serve`.
    """
    parser = argparse.ArgumentParser(prog="gptoss serve --ray", add_help=False, allow_abbrev=False)
    parser.add_argument("--replicas", type=_range, default=(1, 1))
    parser.add_argument("--gpus-per-replica", type=float)
    own, flags = parser.parse_known_args(argv)
    try:
        config, _, print_config = load_config(flags)
        check_batches(config, own.replicas[1])
    except ConfigError as error:
        parser.error(str(error))
    if print_config:
        parser.error("--print-config has no meaning with --ray")
    gpus = own.gpus_per_replica
    if gpus is None:
        gpus = max(1, config.tensor_parallel_size) * max(1, config.pipeline_parallel_size) if visible_gpus() else 0
    args = {"flags": flags, "min_replicas": own.replicas[0], "max_replicas": own.replicas[1], "gpus_per_replica": gpus}
    ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True)
    serve.start(http_options={"host": config.host, "port": config.port})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serve.run(build(args | {"drain_s": config.drain_timeout_s}), name="gptoss", route_prefix="/", blocking=True)
    finally:
        serve.shutdown()
    return 0


def _range(text: str) -> tuple[int, int]:
    """Returns MIN and MAX of `2` or `2:4`, for argparse."""
    low, _, high = text.partition(":")
    with contextlib.suppress(ValueError):
        found = int(low), int(high or low)
        if 1 <= found[0] <= found[1]:
            return found
    raise argparse.ArgumentTypeError(f"{text} is not MIN or MIN:MAX, with MIN at least 1")


class WaitingTokens:
    """The number of replicas that the waiting prompt tokens and the running requests ask for."""

    def __init__(self, target: int) -> None:
        """`target`: waiting tokens of each replica."""
        self._target = target

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Returns the number of replicas, and no state. Ray applies the delays."""
        waiting = sum((context.aggregated_metrics or {}).get(WAITING_TOKENS, {}).values())
        running = context.total_num_requests / context.config.target_ongoing_requests
        current = max(1, context.current_num_replicas)
        wanted = math.ceil(waiting / self._target) if waiting > self._target * current else current
        if not waiting:
            wanted = min(current, math.ceil(running))
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(high, max(low, wanted)), {}


class EngineReplica:
    """One server without a port: our app and its engine, whose ranks run on this replica's GPUs."""

    async def __init__(self, flags: list[str]) -> None:  # type: ignore[misc]
        """Returns once the engine is ready. Raises what a server's start raises."""
        config, origin, _ = load_config(flags)
        logging_setup.configure(config.log_level, config.log_format)
        callers = startup.check_access(config, origin)
        self._name = serve.get_replica_context().replica_id.unique_id.encode()
        self._stack = contextlib.AsyncExitStack()
        self._app = await self._stack.enter_async_context(launcher.local_app(config, callers))
        self._context = self._app.state.context

    async def check_health(self) -> None:
        """Raises RuntimeError once the engine has given up: Ray then starts another replica."""
        if self._context.engine.state is EngineState.DEAD:
            raise RuntimeError("the engine has ended and is not restarted")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the prompt tokens that wait to be computed."""
        return {WAITING_TOKENS: float(self._context.engine.stats.num_waiting_tokens)}

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """Yields the ASGI messages of the app's answer. Cancelling it disconnects the client from the app."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue(maxsize=64)
        gone = asyncio.Event()
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if parts:
                return parts.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(scope, receive, messages.put)
            finally:
                await messages.put(None)

        running = asyncio.create_task(run())
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (REPLICA_HEADER, self._name)]
                yield dict(message)
            await running
        finally:
            gone.set()
            while not running.done():  # the app may be waiting for room in the queue
                with contextlib.suppress(asyncio.QueueEmpty):
                    messages.get_nowait()
                await asyncio.sleep(0)

    async def __del__(self) -> None:
        await self._stack.aclose()


class Entry:
    """Passes each request to the replica that has its conversation, and the answer back."""

    def __init__(self, engine: DeploymentHandle, max_body_bytes: int) -> None:
        self._engine = engine
        self._max_body_bytes = max_body_bytes
        self._responses: LruCache[str, str] = LruCache(KEPT_RESPONSES)

    def __serve_build_asgi_app__(self) -> Any:
        async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:  # uvicorn takes no bound method
            if scope["type"] == "lifespan":
                await _lifespan(receive, send)
            elif scope["type"] == "http":
                await self._pass_on(scope, receive, send)

        return app

    async def _pass_on(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        body = await _read(receive, self._max_body_bytes + BODY_OVERHEAD_BYTES)
        session = self._session(scope, body)
        call = self._engine.options(stream=True, session_id=session).answer
        for left in reversed(range(TRIES)):
            stream = call.remote(_plain(scope), body)
            leaving = asyncio.create_task(_gone(receive, stream))
            begun = False
            try:
                async for message in _with_body(stream):
                    self._learn(message, session)
                    begun = True
                    await send(message)
                return
            except RayError:  # the replica has died
                if begun or not left or leaving.done():
                    raise
            finally:
                leaving.cancel()
                stream.cancel()

    def _session(self, scope: Mapping[str, Any], body: bytes) -> str:
        """Returns what is hashed to choose a replica: a name of the conversation, else one of chance."""
        headers = dict(scope["headers"])
        for header in SESSION_HEADERS:
            if value := headers.get(header):
                return bytes(value).decode("latin-1")[:MAX_SESSION_CHARS]
        try:
            found = json.loads(body) if body else {}
        except (ValueError, RecursionError):  # the app answers 400
            found = {}
        path = str(scope["path"]).partition("/v1/responses/")[2].partition("/")[0]
        earlier = found.get("previous_response_id") if isinstance(found, dict) else None
        for response_id in (earlier, path):
            if isinstance(response_id, str) and (known := self._responses.get(response_id)) is not None:
                return known
        if isinstance(found, dict):
            for name in SESSION_FIELDS:
                if isinstance(value := found.get(name), str) and value:
                    return value[:MAX_SESSION_CHARS].encode(errors="replace").decode()  # Ray's router hashes UTF-8
        return secrets.token_hex(16)

    def _learn(self, message: Mapping[str, Any], session: str) -> None:
        """Notes which conversation a response belongs to, from its first mention in an answer."""
        body = message.get("body") or b""
        at = body.find(RESPONSE_ID, 0, 4096)
        if at >= 0:
            start = at + len(b'"id":"')
            end = body.find(b'"', start, start + ID_CHARS)
            if end > 0:
                self._responses.put(body[start:end].decode(), session)


async def _with_body(stream: AsyncIterator[Message]) -> AsyncIterator[Message]:
    """Yields the messages, the first once the second is there: until then the request may be sent again."""
    held: Message | None = None
    async for message in stream:
        if held is None and message["type"] == "http.response.start":
            held = message
            continue
        if held:
            yield held
            held = {}
        yield message


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        kind = (await receive())["type"].removeprefix("lifespan.")
        await send({"type": f"lifespan.{kind}.complete"})
        if kind == "shutdown":
            return


async def _read(receive: Receive, max_bytes: int) -> bytes:
    """Returns the request's body, of a longer one the beginning: the app checks its key and then its size."""
    body, more = bytearray(), True
    while more and len(body) <= max_bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def _gone(receive: Receive, stream: Any) -> None:
    """Ends the answer when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


def _plain(scope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what another process needs of a scope."""
    names = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path")
    kept = {name: scope[name] for name in names if name in scope}
    return kept | {"headers": [(bytes(k), bytes(v)) for k, v in scope["headers"]], "client": scope.get("client")}
