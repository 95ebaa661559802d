"""The link to an engine process: its start, the sockets to it, its end."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from gptoss.engine.client.supervisor import SilenceWatch, start_process
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import AddRequest, AddRequests, FromEngine, Shutdown, ToEngine
from gptoss.run_folder import RunFolder


class EngineLink:
    """One engine process at a time. Belongs to one event loop."""

    def __init__(self, log: dict[str, Any], watch: SilenceWatch) -> None:
        """`log`: the process's logging settings. `watch` hears when a process starts."""
        self.has_ended = False  # before `run` has returned
        self.is_stopping = False
        self._log = log
        self._watch = watch
        self._process: BaseProcess | None = None
        self._context = zmq.asyncio.Context()
        self._send_socket: zmq.Socket[bytes] | None = None
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def send(self, message: ToEngine) -> None:
        """Sends a message if an engine is connected. Else its requests continue in the next engine, or end."""
        if self._send_socket is not None:
            with contextlib.suppress(zmq.Again):  # the engine has just died
                self._send_socket.send(self._encoder.encode(message), zmq.NOBLOCK)

    def send_requests(self, requests: Iterable[AddRequest]) -> None:
        """Sends the requests; a logit_bias that several of them share is sent once."""
        biased: dict[int, list[AddRequest]] = {}
        for request in requests:
            if request.params.logit_bias is None:
                self.send(request)
            else:
                biased.setdefault(id(request.params.logit_bias), []).append(request)
        for group in biased.values():
            bias = group[0].params.logit_bias
            assert bias is not None
            self.send(AddRequests([_without_bias(request) for request in group], bias))

    async def run(
        self, config: EngineConfig, handle: Callable[[FromEngine], None], silence: Callable[[], str | None]
    ) -> str:
        """Runs one process from its start to its death; returns why it ended.

        Args:
            handle: called with each message.
            silence: why the process counts as dead although it exists.
        """
        with RunFolder() as folder:
            receive = self._context.socket(zmq.PULL)
            receive.bind(output_address := f"ipc://{folder / 'out'}")
            plain: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self._context.underlying)
            self._send_socket = plain.socket(zmq.PUSH)
            self._send_socket.set_hwm(0)
            self._send_socket.bind(input_address := f"ipc://{folder / 'in'}")
            process = multiprocessing.get_context("spawn").Process(
                target=_child,
                args=(config, input_address, output_address, os.getpid(), self._log),
                name="gpt-oss-engine",
                daemon=False,  # daemons cannot start ranks; the engine ends by itself when this process does
            )
            try:
                ended = await self._run_started(process, receive, handle, silence)
            finally:
                if not self.is_stopping and process.pid is not None:
                    process.kill()
                    await asyncio.to_thread(process.join, 10)
                atexit.unregister(process.kill)
                receive.close(linger=0)
                if not self.is_stopping:
                    self._close_socket()
            return ended or f"exit code {process.exitcode}"

    async def _run_started(
        self,
        process: BaseProcess,
        receive: zmq.asyncio.Socket,
        handle: Callable[[FromEngine], None],
        silence: Callable[[], str | None],
    ) -> str | None:
        loop, gone = asyncio.get_running_loop(), asyncio.Event()
        await start_process(process)
        atexit.register(process.kill)  # otherwise Python waits for it when this process exits on an error
        self._process = process
        self._watch.work_begins()
        loop.add_reader(process.sentinel, gone.set)
        try:
            return await self.read(receive, gone, handle, silence)
        finally:
            loop.remove_reader(process.sentinel)

    async def read(
        self,
        receive: zmq.asyncio.Socket,
        gone: asyncio.Event,
        handle: Callable[[FromEngine], None],
        silence: Callable[[], str | None],
    ) -> str | None:
        """Handles messages until the process is gone, or silent for too long: returns the silence then."""
        self.has_ended = False
        gone_task = asyncio.create_task(gone.wait())
        suspicious = False
        try:
            while True:
                message_task = asyncio.ensure_future(receive.recv())
                await asyncio.wait(
                    {message_task, gone_task}, timeout=self._watch.interval_s, return_when=asyncio.FIRST_COMPLETED
                )
                if message_task.done():
                    handle(self._decoder.decode(message_task.result()))
                    if silence() is None:
                        suspicious = False
                        continue
                else:
                    message_task.cancel()
                    if gone_task.done():
                        return None
                problem = silence()
                if problem is not None and suspicious:
                    return problem
                suspicious = problem is not None  # this process itself may have been suspended: check twice
        finally:
            self.has_ended = True
            gone_task.cancel()

    async def stop(self) -> None:
        """Asks the process to end, kills it if it has not within 3 s, and closes the sockets."""
        process = self._process
        if process is not None and process.is_alive():
            with contextlib.suppress(zmq.ZMQError):
                self.send(Shutdown())
            await asyncio.to_thread(process.join, 3)
            if process.is_alive():
                process.kill()
                await asyncio.to_thread(process.join, 5)
        self._close_socket()
        self._context.destroy(linger=200)

    def close(self) -> None:
        """Closes the sockets of a client that was never started."""
        self._context.destroy(linger=0)

    def _close_socket(self) -> None:
        if self._send_socket is not None:
            self._send_socket.close(linger=200)
            self._send_socket = None


def _without_bias(request: AddRequest) -> AddRequest:
    params = msgspec.structs.replace(request.params, logit_bias=None)
    return msgspec.structs.replace(request, params=params)


def narrowed_devices(visible: str | None, gpus: Sequence[int]) -> str:
    """Returns CUDA_VISIBLE_DEVICES for a process that sees only `gpus` of those that this one sees.

    `visible`: this process's CUDA_VISIBLE_DEVICES; None: not set.
    """
    entries = None if visible is None else [part.strip() for part in visible.split(",")]
    return ",".join(str(gpu) if entries is None else entries[gpu] for gpu in gpus)


def _child(config: EngineConfig, input_address: str, output_address: str, parent_pid: int, log: dict[str, Any]) -> None:
    """Runs the engine; only this process loads torch."""
    if config.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = narrowed_devices(os.environ.get("CUDA_VISIBLE_DEVICES"), config.gpus)
    if config.backend == "native":
        # Otherwise torch's OpenMP threads spin for a millisecond after each parallel operation, on the cores that the
        # CPU kernels' threads need. Read when the library is loaded, in ranks too.
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    from gptoss.engine.core.process import run_engine

    run_engine(config, input_address, output_address, parent_pid, log)
