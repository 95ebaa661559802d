"""Several engines with the interface of one: each request runs on one of them.

The router chooses it by cached prefixes and load. When an engine dies, its requests that may continue do so on another
one. A request that waits moves to an engine that has room.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence

import msgspec

from gptoss.engine.block_hash import extend_hashes
from gptoss.engine.client.adapters import Adapters
from gptoss.engine.client.admission import check_capacity
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import EngineDeadError, EngineError
from gptoss.engine.client.rebalance import Move, background_move, live_move
from gptoss.engine.client.router import REQUEST_TOKENS, Router
from gptoss.engine.client.streams import OutputStream
from gptoss.engine.client.supervisor import EngineState
from gptoss.engine.client.totals import added_ready, added_stats
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import Adapter, AddRequest, EngineStats, Ready, TokenOutput

# The pool's state is the first of these that an engine is in
STATES = (EngineState.READY, EngineState.RESTARTING, EngineState.LOADING, EngineState.STOPPED, EngineState.DEAD)
UNLOAD_POLL_S = 0.02


class EnginePool:
    """Engines of one model. Belongs to the event loop that `start` was called on."""

    def __init__(self, engines: Sequence[EngineClient]) -> None:
        """`engines`: at least one; not started, and used by nothing else."""
        self.engines = engines
        self.router = Router(len(engines), self.config.block_size, self._is_open)
        self._ready: Ready | None = None
        for number, engine in enumerate(engines):
            engine.on_ready = lambda number=number: self._engine_ready(number)
            engine.on_death = lambda number=number: self._engine_died(number)
            engine.on_outputs = self._rebalance

    # --- start and stop ---

    async def start(self) -> None:
        """Starts the engines in the background; a second call does nothing."""
        for engine in self.engines:
            await engine.start()

    async def wait_ready(self, timeout_s: float | None = None) -> Ready:
        """Returns once one engine is ready.

        Raises EngineDeadError if none can start, EngineError if none is ready in time.
        """
        waiting = {asyncio.create_task(engine.wait_ready()) for engine in self.engines}
        try:
            async with asyncio.timeout(timeout_s):
                while waiting:
                    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    if any(task.exception() is None for task in done) and self.ready is not None:
                        return self.ready
        except TimeoutError:
            raise EngineError(f"the engines are {self.state} and none was ready within {timeout_s:g} s") from None
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        raise EngineDeadError(self.failure or f"the engines are {self.state}")

    async def wait_started(self) -> Ready:
        """Returns once one engine is ready, and each has been ready, or has died, for the first time.

        Raises EngineDeadError if none can start.
        """
        await asyncio.gather(*(engine.wait_settled() for engine in self.engines))
        return await self.wait_ready()

    async def stop(self) -> None:
        """Ends all requests with an error, then the engine processes."""
        await asyncio.gather(*(engine.stop() for engine in self.engines))

    # --- what the engines report ---

    @property
    def config(self) -> EngineConfig:
        """The first engine's; the others differ in their devices only."""
        return self.engines[0].config

    @property
    def state(self) -> EngineState:
        states = {engine.state for engine in self.engines}
        return next(state for state in STATES if state in states)

    @property
    def ready(self) -> Ready | None:
        """What runs on the engines together, of those that have been ready."""
        return self._ready

    @property
    def stats(self) -> EngineStats:
        """The engines' figures added up; of the last steps the longest one's duration."""
        return added_stats([engine.stats for engine in self.engines])

    @property
    def on_step(self) -> Callable[[EngineStats], None] | None:
        return self.engines[0].on_step

    @on_step.setter
    def on_step(self, call: Callable[[EngineStats], None] | None) -> None:
        for engine in self.engines:
            engine.on_step = call

    @property
    def failure(self) -> str | None:
        failures = [f"engine {i}: {e.failure}" for i, e in enumerate(self.engines) if e.failure is not None]
        return "; ".join(failures) or None

    @property
    def num_restarts(self) -> int:
        return sum(engine.num_restarts for engine in self.engines)

    @property
    def num_resumed(self) -> int:
        return sum(engine.num_resumed for engine in self.engines)

    @property
    def started(self) -> bool:
        return all(engine.started for engine in self.engines)

    @property
    def is_ready(self) -> bool:
        return any(engine.is_ready for engine in self.engines)

    @property
    def serves(self) -> bool:
        return any(engine.serves for engine in self.engines)

    @property
    def pid(self) -> int | None:
        """Of the first engine that is ready; None without one."""
        return next((engine.pid for engine in self.engines if engine.is_ready), None)

    @property
    def num_active(self) -> int:
        return sum(engine.num_active for engine in self.engines)

    @property
    def num_waiting(self) -> int:
        return sum(engine.num_waiting for engine in self.engines)

    @property
    def heartbeat_age_s(self) -> float:
        """Of the ready engine that has been silent for longest."""
        return max(engine.heartbeat_age_s for engine in self._ready_engines() or self.engines)

    @property
    def last_sign_age_s(self) -> float:
        return max(engine.last_sign_age_s for engine in self._ready_engines() or self.engines)

    @property
    def stall(self) -> str | None:
        """Why no ready engine serves; None if one does, or none is ready."""
        stalls = [engine.stall for engine in self._ready_engines()]
        return None if not stalls or None in stalls else stalls[0]

    # --- requests ---

    def check_capacity(self, num_tokens: int, num_requests: int = 1, tenant: str = "") -> None:
        """Raises QueueFullError if this many more requests or prompt tokens may not wait."""
        engines = [engine for engine in self.engines if engine.state is not EngineState.DEAD]
        check_capacity(
            [engine.streams for engine in engines],
            self.config,
            [engine.finish_rate for engine in engines],
            tenant=tenant,
            num_requests=num_requests,
            num_tokens=num_tokens,
        )

    async def add_request(self, request: AddRequest) -> AsyncIterator[TokenOutput]:
        """Admits one request, as `add_requests` does."""
        return (await self.add_requests([request]))[0]

    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]:
        """Admits all requests or none; returns an iterator over the outputs of each.

        Closing an iterator before its end aborts its request. Raises EngineError, EngineDeadError, QueueFullError.
        """
        if not self.is_ready:
            await self.wait_ready(self.engines[0].policy.ready_wait_s)
        self.adapters.check(requests)
        num_tokens = sum(len(r.token_ids) for r in requests)
        if not requests[0].background:
            self.check_capacity(num_tokens, len(requests), requests[0].tenant)
        streams = [OutputStream(request) for request in self._with_hashes(requests)]
        for engine, routed in self._routed(streams):
            engine.submit(routed)
        return [self._outputs(stream) for stream in streams]

    @property
    def adapters(self) -> Adapters:
        """The list that all engines share."""
        return self.engines[0].adapters

    async def load_adapter(self, adapter: Adapter) -> None:
        """Loads an adapter of `adapters` on the engines that are ready; the others get it when they are.

        Raises EngineError if one cannot load it, EngineDeadError if one dies.
        """
        results = await asyncio.gather(
            *(engine.load_adapter(adapter) for engine in self.engines), return_exceptions=True
        )
        for problem in results:
            if problem is not None:
                await self.unload_adapter(adapter.id)
                raise problem

    async def unload_adapter(self, adapter_id: int) -> None:
        """Returns when the last request of an adapter that is ending has ended, and it is unloaded."""
        while any(adapter_id in ids for ids in self.adapters_in_use()):  # a request may move to another engine
            await asyncio.sleep(UNLOAD_POLL_S)
        await asyncio.gather(*(engine.unload_adapter(adapter_id) for engine in self.engines))

    def adapters_in_use(self) -> tuple[set[int], set[int]]:
        """The ids of the adapters that running requests use, and those that waiting ones do."""
        running, waiting = zip(*(engine.adapters_in_use() for engine in self.engines), strict=True)
        return set().union(*running), set().union(*waiting)

    def fail_requests(self, reason: str) -> None:
        """Ends every request with an error immediately."""
        for engine in self.engines:
            engine.fail_requests(reason)

    def abort(self, request_id: str) -> bool:
        """Aborts a request: its iterator gets a terminal output. Returns whether it was running or waiting."""
        return any(engine.abort(request_id) for engine in self.engines)

    def discard(self, request_id: str) -> None:
        """Ends a request whose outputs are no longer read, if it has not ended. Idempotent."""
        for engine in self.engines:
            engine.discard(request_id)

    async def _outputs(self, stream: OutputStream) -> AsyncIterator[TokenOutput]:
        try:
            async for output in stream.read():
                yield output
        finally:
            self.discard(stream.request.request_id)

    # --- which engine ---

    def _with_hashes(self, requests: Sequence[AddRequest]) -> Iterator[AddRequest]:
        """The requests with the hashes of their prompts' blocks; choices of one prompt share them."""
        if not self.config.enable_prefix_caching:
            yield from requests
            return
        known: dict[tuple[int, str, str], list[bytes]] = {}
        for request in requests:
            key = id(request.token_ids), request.cache_salt, request.adapter_key
            if key not in known:
                known[key] = self._hashes(request)
            yield msgspec.structs.replace(request, block_hashes=known[key])

    def _hashes(self, request: AddRequest) -> list[bytes]:
        hashes: list[bytes] = []
        size = self.config.block_size
        count = len(request.token_ids) // size
        extend_hashes(hashes, request.token_ids, count, size, request.cache_salt, request.adapter_key)
        return hashes

    def _routed(self, streams: Iterable[OutputStream]) -> Iterable[tuple[EngineClient, list[OutputStream]]]:
        """Each engine with those of the streams that it gets."""
        candidates = self._candidates()
        live = {number: load_of(self.engines[number]) for number in candidates}
        whole = {number: live[number] + REQUEST_TOKENS * self.engines[number].streams.num_background for number in live}
        routed: dict[int, list[OutputStream]] = {}
        sent: set[tuple[int, int]] = set()
        for stream in streams:
            hashes = stream.request.block_hashes
            number, num_cached = self.router.choose(hashes, whole if stream.request.background else live)
            stream.num_cached_tokens = min(num_cached, stream.num_prompt_tokens)
            load = REQUEST_TOKENS + stream.num_prompt_tokens - stream.num_cached_tokens
            whole[number] += load
            if not stream.request.background:
                live[number] += load
            if (number, id(hashes)) not in sent:
                sent.add((number, id(hashes)))
                self.router.sent[number].add(hashes, stream.request.request_id)
            routed.setdefault(number, []).append(stream)
        return [(self.engines[number], mine) for number, mine in routed.items()]

    def _candidates(self) -> list[int]:
        """The engines that serve; if none does, those that are ready; if none is, those that are not dead."""
        engines = list(enumerate(self.engines))
        return (
            [i for i, engine in engines if engine.serves]
            or [i for i, engine in engines if engine.is_ready]
            or [i for i, engine in engines if engine.state is not EngineState.DEAD]
            or [0]
        )

    def _ready_engines(self) -> list[EngineClient]:
        return [engine for engine in self.engines if engine.is_ready]

    def _is_open(self, request_id: str) -> bool:
        return any(engine.streams.get(request_id) is not None for engine in self.engines)

    # --- what moves ---

    def _engine_ready(self, number: int) -> None:
        """Gives the engine the requests of engines that are not ready."""
        self._ready = added_ready([engine.ready for engine in self.engines if engine.ready is not None])
        engine = self.engines[number]
        if engine.ready is not None:
            # two groups of layers share the blocks
            self.router.sent[number].max_blocks = max(1, engine.ready.num_blocks // 2)
        for other in self.engines:
            if not other.is_ready:
                self._move(other)

    def _engine_died(self, number: int) -> None:
        """Gives the engine's requests to the others, if one of them serves, or if it alone was given up."""
        self.router.sent[number].clear()
        given_up = self.engines[number].state is EngineState.DEAD and self.state is not EngineState.DEAD
        if given_up or any(engine.serves for engine in self.engines):
            self._move(self.engines[number])

    def _move(self, source: EngineClient) -> None:
        """Moves all requests of an engine that is not ready."""
        released = [source.release(stream.request.request_id) for stream in source.streams]
        for engine, streams in self._routed(stream for stream in released if stream is not None):
            (engine.resume if engine.is_ready else engine.keep)(streams)

    def _rebalance(self) -> None:
        """Moves requests that wait to engines that have room for them."""
        if not any(engine.stats.num_waiting or engine.stats.num_background_waiting for engine in self.engines):
            return
        serving = [engine for engine in self.engines if engine.serves]
        if len(serving) > 1:
            self._apply(live_move(serving, self.config))
            self._apply(background_move(serving, self.config))

    def _apply(self, move: Move | None) -> None:
        stream = move.source.release(move.request_id) if move is not None else None
        if move is not None and stream is not None:
            sent, hashes = self.router.sent[self.engines.index(move.target)], stream.request.block_hashes
            stream.num_cached_tokens = sent.count(hashes) * self.config.block_size
            sent.add(hashes, stream.request.request_id)
            move.target.resume([stream])


def load_of(engine: EngineClient) -> int:
    """What an engine has to do for live requests, in prompt tokens to compute."""
    return REQUEST_TOKENS * engine.streams.num_live + engine.streams.num_uncached_tokens


AnyEngine = EngineClient | EnginePool
