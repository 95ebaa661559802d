"""The API process's handle on the engine process: starts it, feeds it, restarts it.

Every request that was accepted ends in exactly one terminal event: stop, length, abort or error. Where the policy says
so, one whose engine died goes on in the next.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import multiprocessing
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from gptoss.engine.client.errors import EngineDeadError, EngineError, QueueFullError
from gptoss.engine.client.streams import OpenStreams, OutputStream
from gptoss.engine.client.supervisor import EngineState, RestartPolicy, start_process
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import (
    AbortRequests,
    AddRequest,
    AddRequests,
    EngineStats,
    Failed,
    FinishReason,
    FromEngine,
    Heartbeat,
    Outputs,
    Ready,
    Shutdown,
    ToEngine,
    TokenOutput,
)
from gptoss.run_folder import RunFolder

logger = logging.getLogger(__name__)


class EngineClient:
    """One engine process at a time. Belongs to the event loop that `start` was called on."""

    def __init__(
        self,
        config: EngineConfig,
        policy: RestartPolicy | None = None,
        log: dict[str, Any] | None = None,
        renewed: Callable[[], EngineConfig] | None = None,
    ):
        """`renewed` returns the config, its files made again if they are damaged; called before each restart."""
        self.config = config
        self.policy = policy or RestartPolicy()
        self.state = EngineState.LOADING
        self.ready: Ready | None = None
        self.stats = EngineStats()
        self.on_step: Callable[[EngineStats], None] | None = None  # called for each step that is reported
        self.num_restarts = 0
        self.num_resumed = 0
        self.failure: str | None = None
        self._renewed = renewed
        self._log = log or {"level": "info", "log_format": "text"}
        self._streams = OpenStreams()
        self._finished_recently: deque[float] = deque(maxlen=64)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)
        self._ready_event = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._process: BaseProcess | None = None
        self._send_socket: zmq.Socket[bytes] | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._last_sign = time.monotonic()
        self._last_heartbeat = time.monotonic()
        self._attempts = 0
        self._warned_of_silence = False

    # --- life ---

    async def start(self) -> None:
        """Starts the engine in the background; `wait_ready` tells when it serves. Once: a second call does nothing."""
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

    async def stop(self) -> None:
        self.state = EngineState.STOPPED
        self._fail_all("the server is shutting down")
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        process = self._process
        if process is not None and process.is_alive():
            with contextlib.suppress(zmq.ZMQError):
                self._send(Shutdown())
            await asyncio.to_thread(process.join, 3)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join, 5)
        self._close_socket()
        self._context.destroy(linger=200)

    @property
    def started(self) -> bool:
        return self._supervisor is not None

    @property
    def is_ready(self) -> bool:
        return self.state is EngineState.READY

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def num_active(self) -> int:
        return len(self._streams)

    @property
    def num_waiting(self) -> int:
        """Requests that have no token yet and are not among those the engine runs."""
        return max(0, self._streams.num_unstarted - self.stats.num_running)

    @property
    def last_sign_age_s(self) -> float:
        return time.monotonic() - self._last_sign

    @property
    def heartbeat_age_s(self) -> float:
        """Of the last message of the engine process, which sends one a second at least while it is ready."""
        return time.monotonic() - self._last_heartbeat

    # --- requests ---

    def check_capacity(self, num_tokens: int, num_requests: int = 1, tenant: str = "") -> None:
        """Raises QueueFullError if that many more requests would wait beyond the bounds.

        A tenant that holds less than an equal share of all requests, or of the waiting prompts, is let in beyond them.
        """
        streams, most = self._streams, self.config.max_num_waiting
        room = self.config.max_num_seqs + most
        of_tenant = streams.of_tenant[tenant] + num_requests
        if len(streams) + num_requests > room and not _is_within_share(of_tenant, room, streams.of_tenant, tenant):
            raise QueueFullError(f"{most} requests are waiting already (max_num_waiting)", self._retry_after())
        held, room = streams.num_unstarted_tokens, self.config.max_num_waiting_tokens
        of_tenant = streams.unstarted_tokens_of[tenant] + num_tokens
        if (
            streams.num_unstarted
            and held + num_tokens > room
            and not _is_within_share(of_tenant, room, streams.unstarted_tokens_of, tenant)
        ):
            raise QueueFullError(
                f"the waiting requests hold {held} tokens already (max_num_waiting_tokens)", self._retry_after()
            )

    async def add_request(self, request: AddRequest) -> AsyncIterator[TokenOutput]:
        """As add_requests, for one."""
        return (await self.add_requests([request]))[0]

    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]:
        """Admits all of the requests now, or none, and returns an iterator over the outputs of each.

        Closing an iterator before its end aborts its request. Raises EngineError, EngineDeadError, QueueFullError.
        """
        if not self.is_ready:
            await self.wait_ready(self.policy.ready_wait_s)
        num_tokens = sum(len(r.token_ids) for r in requests)
        self.check_capacity(num_tokens, len(requests), requests[0].tenant)
        if not len(self._streams):
            self._last_sign = time.monotonic()
        streams = [OutputStream(request) for request in requests]
        for stream in streams:
            self._streams.add(stream)
        self._send_requests(requests)
        return [self._outputs(stream.request.request_id, stream) for stream in streams]

    def fail_requests(self, reason: str) -> None:
        """Ends every request with an error, at once."""
        running = [stream.request.request_id for stream in self._streams]
        self._fail_all(reason)
        with contextlib.suppress(zmq.ZMQError):
            self._send(AbortRequests(running))

    def abort(self, request_id: str) -> bool:
        """Ends a request from outside; its iterator gets a terminal output. -> whether it was alive."""
        stream = self._streams.get(request_id)
        if stream is None:
            return False
        stream.aborted = True  # the engine may die before it reads of it
        if self.is_ready:
            self._send(AbortRequests([request_id]))
        else:
            self._end(stream, FinishReason.ABORT)
        return True

    async def _outputs(self, request_id: str, stream: OutputStream) -> AsyncIterator[TokenOutput]:
        try:
            while True:
                if not stream.items:
                    stream.arrived.clear()
                    await stream.arrived.wait()
                output = stream.take()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            self.discard(request_id)

    def discard(self, request_id: str) -> None:
        """Nobody reads this request any more: ends it if it is still alive. Idempotent."""
        if self._streams.remove(request_id):
            with contextlib.suppress(zmq.ZMQError):
                self._send(AbortRequests([request_id]))

    def _retry_after(self) -> float:
        """Seconds until a place should be free, from the rate at which requests ended lately."""
        if len(self._finished_recently) < 2:
            return 1.0
        span = time.monotonic() - self._finished_recently[0]
        per_second = len(self._finished_recently) / max(span, 0.001)
        return min(60.0, max(1.0, self.config.max_num_seqs / max(per_second, 0.01) / 4))

    # --- the process line ---

    def _send(self, message: ToEngine) -> None:
        """Does nothing where no engine takes it: requests go on in the next one, or end, once its death shows."""
        if self._send_socket is not None:
            with contextlib.suppress(zmq.Again):  # it has died a moment ago
                self._send_socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def _send_requests(self, requests: Iterable[AddRequest]) -> None:
        """A logit_bias that several of them share goes over the wire once."""
        biased: dict[int, list[AddRequest]] = {}
        for request in requests:
            if request.params.logit_bias is None:
                self._send(request)
            else:
                biased.setdefault(id(request.params.logit_bias), []).append(request)
        for group in biased.values():
            bias = group[0].params.logit_bias
            assert bias is not None
            self._send(AddRequests([_without_bias(request) for request in group], bias))

    def _close_socket(self) -> None:
        if self._send_socket is not None:
            self._send_socket.close(linger=200)
            self._send_socket = None

    async def _supervise(self) -> None:
        while True:
            try:
                await self._run_once()
            except Exception:  # a bug here must not leave requests hanging
                logger.exception("engine supervisor")
                self.failure = self.failure or "internal error in the engine supervisor"
            died_ready = self.state is EngineState.READY
            self._ready_event.clear()
            fatal = self.state is EngineState.DEAD
            self._attempts = 1 if died_ready and self._finished_recently else self._attempts + 1
            self._finished_recently.clear()
            if fatal or self._attempts > self.policy.max_restarts:
                self.state = EngineState.DEAD
                self._fail_all(f"the engine is dead: {self.failure}")
                self._ready_event.set()
                logger.critical("engine given up: %s", self.failure)
                return
            self.state = EngineState.RESTARTING
            self.stats = EngineStats()
            self._end_or_keep(f"the engine died: {self.failure}")
            delay = min(self.policy.max_backoff_s, self.policy.backoff_s * 2 ** (self._attempts - 1))
            logger.error(
                "engine died (%s), restart %d in %.1f s; requests that go on then: %d",
                self.failure,
                self._attempts,
                delay,
                len(self._streams),
            )
            self.num_restarts += 1
            await asyncio.sleep(delay)
            await self._renew()

    async def _renew(self) -> None:
        """Files of the cache may have been damaged or removed since the first start."""
        if self._renewed is not None:
            try:
                self.config = await asyncio.to_thread(self._renewed)
            except Exception as error:  # whatever is wrong: the engine says what it cannot read
                logger.error("the engine's files cannot be checked: %s", error)

    async def _run_once(self) -> None:
        """One engine process from start to death."""
        context = self._context
        loop = asyncio.get_running_loop()
        with RunFolder() as folder:
            receive = context.socket(zmq.PULL)
            receive.bind(output_address := f"ipc://{folder / 'out'}")
            plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(context.underlying)
            self._send_socket = plain.socket(zmq.PUSH)
            self._send_socket.set_hwm(0)
            self._send_socket.bind(input_address := f"ipc://{folder / 'in'}")
            process = multiprocessing.get_context("spawn").Process(
                target=_child,
                args=(self.config, input_address, output_address, os.getpid(), self._log),
                name="gpt-oss-engine",
                daemon=False,  # it may start ranks of its own; it ends by itself when this process does
            )
            gone = asyncio.Event()
            try:
                await start_process(process)
                atexit.register(process.kill)  # Python waits for it otherwise, when this process ends badly
                self._process = process
                self._last_sign = time.monotonic()
                loop.add_reader(process.sentinel, gone.set)
                try:
                    await self._read(receive, gone)
                finally:
                    loop.remove_reader(process.sentinel)
            finally:
                if self.state is not EngineState.STOPPED and process.pid is not None:
                    process.kill()
                    await asyncio.to_thread(process.join, 10)
                    self.failure = self.failure or f"exit code {process.exitcode}"
                atexit.unregister(process.kill)
                receive.close(linger=0)
                if self.state is not EngineState.STOPPED:
                    self._close_socket()

    async def _read(self, receive: zmq.asyncio.Socket, gone: asyncio.Event) -> None:
        gone_task = asyncio.create_task(gone.wait())
        suspicious = False
        try:
            while True:
                message_task = asyncio.ensure_future(receive.recv())
                await asyncio.wait(
                    {message_task, gone_task}, timeout=self._check_interval_s, return_when=asyncio.FIRST_COMPLETED
                )
                if message_task.done():
                    self._handle(self._decoder.decode(message_task.result()))
                    if self._silence() is None:
                        suspicious = False
                        continue
                else:
                    message_task.cancel()
                    if gone_task.done():
                        return
                self._warn_of_silence()
                silence = self._silence()
                if silence is not None and suspicious:
                    self.failure = silence
                    return
                suspicious = silence is not None  # this process may have been stopped: look again
        finally:
            gone_task.cancel()

    @property
    def _check_interval_s(self) -> float:
        return min(1.0, max(0.05, self.policy.step_timeout_s / 10))

    def _silence(self) -> str | None:
        """Why a ready engine counts as dead although its process is there, None if it does not."""
        policy = self.policy
        if not self.is_ready:
            return None
        if self._streams and self.last_sign_age_s >= policy.step_timeout_s:
            return f"no step within {policy.step_timeout_s:g} s while work was waiting"
        limit_s = max(policy.step_timeout_s, policy.heartbeat_timeout_s)
        if self.heartbeat_age_s >= limit_s:
            return f"no heartbeat within {limit_s:g} s"
        return None

    def _warn_of_silence(self) -> None:
        """Logs once that heartbeats do not arrive."""
        is_silent = self.is_ready and self.heartbeat_age_s >= self.policy.heartbeat_timeout_s
        if is_silent and not self._warned_of_silence:
            logger.error(
                "no heartbeat of the engine (pid %s) for %.0f s: is it stopped?", self.pid, self.heartbeat_age_s
            )
        self._warned_of_silence = is_silent

    def _handle(self, message: FromEngine) -> None:
        self._last_heartbeat = time.monotonic()
        if isinstance(message, Heartbeat):
            return  # a step may hang in a process that runs
        self._last_sign = self._last_heartbeat
        if isinstance(message, Outputs):
            stepped = message.stats.num_steps_total != self.stats.num_steps_total
            self.stats = message.stats
            if stepped and self.on_step is not None:
                self.on_step(message.stats)
            for output in message.outputs:
                self._deliver(output)
        elif isinstance(message, Ready):
            self.ready, self.failure = message, None
            self.state = EngineState.READY
            # none, if no engine died before
            self._send_requests(stream.rest() for stream in self._streams)
            self._ready_event.set()
        elif isinstance(message, Failed):
            self.failure = message.message
            if message.fatal:
                self.state = EngineState.DEAD

    def _deliver(self, output: TokenOutput) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # the client went away while the step ran
        self._streams.mark_started(stream)
        if output.finish_reason is not None:
            self._finished_recently.append(time.monotonic())
            self._streams.remove(output.request_id)
        stream.put(output)

    def _fail_all(self, reason: str) -> None:
        for stream in self._streams:
            self._end(stream, FinishReason.ERROR, reason)

    def _end_or_keep(self, reason: str) -> None:
        """Ends the requests that may not go on in the next engine."""
        for stream in self._streams:
            if stream.aborted:
                self._end(stream, FinishReason.ABORT)
            elif stream.num_resumes >= self.policy.max_resumes:
                self._end(stream, FinishReason.ERROR, reason)
            else:
                stream.num_resumes += 1
                self.num_resumed += 1

    def _end(self, stream: OutputStream, why: FinishReason, error: str | None = None) -> None:
        request_id = stream.request.request_id
        self._streams.remove(request_id)
        stream.put(TokenOutput(request_id, [], why, error=error))


def _is_within_share(count: int, room: int, counts: Mapping[str, int], tenant: str) -> bool:
    return count <= room // len({*counts, tenant})


def _without_bias(request: AddRequest) -> AddRequest:
    params = msgspec.structs.replace(request.params, logit_bias=None)
    return msgspec.structs.replace(request, params=params)


def _child(config: EngineConfig, input_address: str, output_address: str, parent_pid: int, log: dict[str, Any]) -> None:
    """Runs in the engine process; torch is loaded only there."""
    if config.backend == "native":
        # torch's OpenMP threads otherwise spin for a millisecond after each parallel operation, on the cores that the
        # CPU kernels' own threads need; read when the library is loaded, by ranks too
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    from gptoss.engine.core.process import run_engine

    run_engine(config, input_address, output_address, parent_pid, log)
