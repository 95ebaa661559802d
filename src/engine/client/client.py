"""The API process's client of the engine process: starts it, sends it requests, restarts it.

Every accepted request ends in exactly one terminal event: stop, length, abort or error. If the policy allows it, a
request whose engine died continues in the next engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio

from gptoss.engine.client.adapters import AdapterLink, Adapters
from gptoss.engine.client.admission import FinishRate, check_capacity
from gptoss.engine.client.engine_link import EngineLink
from gptoss.engine.client.errors import EngineDeadError, EngineError
from gptoss.engine.client.streams import OpenStreams, OutputStream
from gptoss.engine.client.supervisor import EngineState, RestartPolicy, Restarts, SilenceWatch
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import (
    AbortRequests,
    Adapter,
    AdapterChanged,
    AddRequest,
    EngineStats,
    Failed,
    FinishReason,
    FromEngine,
    Heartbeat,
    Outputs,
    Ready,
    TokenOutput,
)

logger = logging.getLogger(__name__)


class EngineClient:
    """One engine process at a time. Belongs to the event loop that `start` was called on.

    EnginePool (pool.py) has the same interface for several engines, and sets what begins with `on_`.
    """

    def __init__(
        self,
        config: EngineConfig,
        policy: RestartPolicy | None = None,
        log: dict[str, Any] | None = None,
        renewed: Callable[[], EngineConfig] | None = None,
        number: int | None = None,
        adapters: Adapters | None = None,
    ):
        """
        Args:
            renewed: called before each restart; returns the config after repairing damaged cache files.
            number: of this engine if there are several; the log has it.
            adapters: the server's, which each engine process is sent when it is ready.
        """
        self.config = config
        self.adapters = Adapters(config) if adapters is None else adapters
        self._adapter_link = AdapterLink(self.adapters, lambda message: self._link.send(message))
        self.policy = policy or RestartPolicy()
        self.state = EngineState.LOADING
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self.on_step: Callable[[EngineStats], None] | None = None  # called for each reported step
        self.on_outputs: Callable[[], None] | None = None  # called after a message with outputs
        self.on_ready: Callable[[], None] | None = None
        self.on_death: Callable[[], None] | None = None  # called when the requests that may not continue have ended
        self.num_restarts = 0
        self.num_resumed = 0
        self.failure: str | None = None
        self._renewed = renewed
        self._log = {"level": "info", "log_format": "text", **(log or {})}
        self._log_fields: dict[str, Any] = {}
        if number is not None:
            self._log["engine"] = self._log_fields["engine"] = number
        self.streams = OpenStreams()
        self.finish_rate = FinishRate()
        self._ready_event = asyncio.Event()
        self._settled_event = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._watch = SilenceWatch(self.policy)
        self._link = EngineLink(self._log, self._watch)
        self._restarts = Restarts(self.policy)

    # --- start and stop ---

    async def start(self) -> None:
        """Starts the engine in the background; a second call does nothing.

        `wait_ready` returns when it serves.
        """
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")

    async def wait_ready(self, timeout_s: float | None = None) -> Ready:
        """Raises EngineDeadError if it cannot start, EngineError if it is not ready in time."""
        try:
            await asyncio.wait_for(self._ready_event.wait(), timeout_s)
        except TimeoutError:
            raise EngineError(f"the engine is {self.state} and was not ready within {timeout_s:g} s") from None
        if self.state in (EngineState.DEAD, EngineState.STOPPED) or self.ready is None:
            raise EngineDeadError(self.failure or f"the engine is {self.state}")
        return self.ready

    async def wait_started(self) -> Ready:
        """Returns once the engine is ready. Raises EngineDeadError if it cannot start."""
        return await self.wait_ready()

    async def wait_settled(self) -> None:
        """Returns once the engine has been ready, or has died, for the first time."""
        await self._settled_event.wait()

    async def stop(self) -> None:
        """Ends all requests with an error, then the engine process."""
        self.state = EngineState.STOPPED
        self._link.is_stopping = True
        self.streams.fail_all("the server is shutting down")
        self._adapter_link.engine_is_dead("the server is shutting down")
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._link.stop()

    @property
    def engines(self) -> Sequence[EngineClient]:
        """Each engine."""
        return (self,)

    @property
    def started(self) -> bool:
        return self._supervisor is not None

    @property
    def is_ready(self) -> bool:
        return self.state is EngineState.READY

    @property
    def serves(self) -> bool:
        """Whether a request sent now would be served."""
        return self.is_ready and not self._link.has_ended and self.stall is None

    @property
    def pid(self) -> int | None:
        return self._link.pid

    @property
    def num_active(self) -> int:
        return len(self.streams)

    @property
    def num_waiting(self) -> int:
        """Requests without a token that the engine is not running yet."""
        return max(0, self.streams.num_unstarted - self.stats.num_running)

    @property
    def last_sign_age_s(self) -> float:
        """Seconds since the engine last reported progress."""
        return self._watch.step_age_s

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the last message of the engine process.

        When ready it sends at least one per second.
        """
        return self._watch.message_age_s

    @property
    def stall(self) -> str | None:
        """Why a request sent now would not be served although the engine is ready; None if it would."""
        return self._watch.stall(has_work=self.num_active > 0)

    # --- requests ---

    def check_capacity(self, num_tokens: int, num_requests: int = 1, tenant: str = "") -> None:
        """Raises QueueFullError if this many more requests or prompt tokens may not wait."""
        check_capacity(
            [self.streams],
            self.config,
            [self.finish_rate],
            tenant=tenant,
            num_requests=num_requests,
            num_tokens=num_tokens,
        )

    async def add_request(self, request: AddRequest) -> AsyncIterator[TokenOutput]:
        """Admits one request, as `add_requests` does."""
        return (await self.add_requests([request]))[0]

    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]:
        """Admits all requests or none; returns an iterator over the outputs of each.

        Closing an iterator before its end aborts its request. Raises EngineError, EngineDeadError, QueueFullError,
        AdapterGoneError.
        """
        if not self.is_ready:
            await self.wait_ready(self.policy.ready_wait_s)
        self.adapters.check(requests)
        num_tokens = sum(len(r.token_ids) for r in requests)
        if not requests[0].background:
            self.check_capacity(num_tokens, len(requests), requests[0].tenant)
        streams = [OutputStream(request) for request in requests]
        self.submit(streams)
        return [self._outputs(stream.request.request_id, stream) for stream in streams]

    def submit(self, streams: Sequence[OutputStream]) -> None:
        """Sends requests to the engine without checking capacity."""
        self.keep(streams)
        self._link.send_requests([stream.request for stream in streams])

    def resume(self, streams: Sequence[OutputStream]) -> None:
        """Sends what is left of requests that another engine does not continue."""
        self.keep(streams)
        self._link.send_requests([stream.rest() for stream in streams])

    def keep(self, streams: Sequence[OutputStream]) -> None:
        """Holds requests, which are sent when the engine is ready, if it is not."""
        if not len(self.streams):
            self._watch.work_begins()
        for stream in streams:
            self.streams.add(stream)

    def release(self, request_id: str) -> OutputStream | None:
        """Takes a request back, for another engine; None if it has ended."""
        stream = self.streams.remove(request_id)
        if stream is not None and self.is_ready:
            self._link.send(AbortRequests([request_id]))
        return stream

    async def load_adapter(self, adapter: Adapter) -> None:
        """Loads an adapter of `adapters` while requests run. Raises EngineError, EngineDeadError."""
        if self.is_ready:
            await self._adapter_link.load(adapter)

    async def unload_adapter(self, adapter_id: int) -> None:
        """Returns when the last request of an adapter that is ending has ended, and it is unloaded."""
        if self.state not in (EngineState.DEAD, EngineState.STOPPED):
            await self._adapter_link.unload(adapter_id, is_ready=self.is_ready)

    def adapters_in_use(self) -> tuple[set[int], set[int]]:
        """The ids of the adapters that running requests use, and those that waiting ones do."""
        return self.streams.adapters_in_use()

    def fail_requests(self, reason: str) -> None:
        """Ends every request with an error immediately."""
        running = [stream.request.request_id for stream in self.streams]
        self.streams.fail_all(reason)
        with contextlib.suppress(zmq.ZMQError):
            self._link.send(AbortRequests(running))

    def abort(self, request_id: str) -> bool:
        """Aborts a request: its iterator gets a terminal output. Returns whether it was running or waiting."""
        stream = self.streams.get(request_id)
        if stream is None:
            return False
        stream.aborted = True  # the engine may die before it reads the message
        if self.is_ready:
            self._link.send(AbortRequests([request_id]))
        else:
            self.streams.end(stream, FinishReason.ABORT)
        return True

    async def _outputs(self, request_id: str, stream: OutputStream) -> AsyncIterator[TokenOutput]:
        try:
            async for output in stream.read():
                yield output
        finally:
            self.discard(request_id)

    def discard(self, request_id: str) -> None:
        """Ends a request whose outputs are no longer read, if it has not ended. Idempotent."""
        if self.streams.remove(request_id):
            with contextlib.suppress(zmq.ZMQError):
                self._link.send(AbortRequests([request_id]))

    # --- the engine process ---

    async def _supervise(self) -> None:
        """Runs engine processes one after another until one cannot start or too many have died."""
        while True:
            await self._run_process()
            died_ready = self.state is EngineState.READY
            self._ready_event.clear()
            self._settled_event.set()
            self._restarts.count_death(has_served=died_ready and bool(self.finish_rate))
            self.finish_rate.clear()
            self.stats = EngineStats()
            if self.state is EngineState.DEAD or self._restarts.are_used_up:
                self._give_up()
                return
            await self._prepare_restart()

    async def _run_process(self) -> None:
        """Returns when the process has ended; `failure` says why."""
        try:
            ended = await self._link.run(self.config, self._handle, self._silence)
            self.failure = self.failure or ended
        except Exception:  # a bug here must not leave requests hanging
            logger.exception("engine supervisor")
            self.failure = self.failure or "internal error in the engine supervisor"

    def _give_up(self) -> None:
        self.state = EngineState.DEAD
        self._hand_over(f"the engine is dead: {self.failure}")
        self._adapter_link.engine_is_dead(f"the engine is dead: {self.failure}")
        self._ready_event.set()
        logger.critical("giving up on the engine: %s", self.failure, extra=self._log_fields)

    async def _prepare_restart(self) -> None:
        """Ends or keeps the requests of the engine that died, and waits the back-off."""
        self.state = EngineState.RESTARTING
        num_continued = self._hand_over(f"the engine died: {self.failure}")
        self._adapter_link.engine_died(f"{self.failure}")
        logger.error(
            "engine died (%s), restart %d in %.1f s; %d requests will continue",
            self.failure,
            self._restarts.num_deaths,
            self._restarts.delay_s,
            num_continued,
            extra=self._log_fields,
        )
        self.num_restarts += 1
        await asyncio.sleep(self._restarts.delay_s)
        await self._renew()

    async def _renew(self) -> None:
        """Checks the cached files, which may have been damaged or removed since the first start."""
        if self._renewed is not None:
            try:
                self.config = await asyncio.to_thread(self._renewed)
            except Exception as error:  # if a file is unreadable, the engine's own error names it
                logger.error("cannot check the engine's files: %s", error)

    def _silence(self) -> str | None:
        """Why a ready engine counts as dead although its process exists; None if it does not."""
        self._watch.warn(self.pid, is_ready=self.is_ready)
        return self._watch.problem(has_work=bool(self.streams)) if self.is_ready else None

    def _handle(self, message: FromEngine) -> None:
        self._watch.message_arrived(is_heartbeat=isinstance(message, Heartbeat))
        match message:
            case Outputs():
                self._take_outputs(message)
            case Ready():
                self._becomes_ready(message)
            case AdapterChanged():
                self._adapter_link.changed(message)
            case Failed():
                self.failure = message.message
                if message.fatal:
                    self.state = EngineState.DEAD

    def _take_outputs(self, message: Outputs) -> None:
        stepped = message.stats.num_steps_total != self.stats.num_steps_total
        self.stats = message.stats
        if stepped and self.on_step is not None:
            self.on_step(message.stats)
        for output in message.outputs:
            self._deliver(output)
        if self.on_outputs is not None:
            self.on_outputs()

    def _becomes_ready(self, message: Ready) -> None:
        self.ready, self.failure = message, None
        self.state = EngineState.READY
        self._adapter_link.send_all()
        self._link.send_requests(stream.rest() for stream in self.streams)  # of an engine that died
        self._adapter_link.end_all()
        self._ready_event.set()
        self._settled_event.set()
        if self.on_ready is not None:
            self.on_ready()

    def _deliver(self, output: TokenOutput) -> None:
        stream = self.streams.get(output.request_id)
        if stream is None:
            return  # the client disconnected during the step
        self.streams.mark_started(stream)
        if output.finish_reason is not None:
            self.finish_rate.count()
            self.streams.remove(output.request_id)
        stream.put(output)

    def _hand_over(self, reason: str) -> int:
        """Ends the requests that no engine continues, and lets `on_death` move the others.

        Returns how many continue.
        """
        if self.on_death is None and self.state is EngineState.DEAD:
            self.streams.fail_all(reason)
            return 0
        num_continued = self.streams.resume_or_end(self.policy.max_resumes, reason)
        self.num_resumed += num_continued
        if self.on_death is not None:
            self.on_death()
        if self.state is EngineState.DEAD:
            num_continued -= len(self.streams)
            self.streams.fail_all(reason)
        return num_continued
