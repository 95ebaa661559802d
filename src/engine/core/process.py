"""The engine process: receives messages, runs steps, sends outputs."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
import traceback
from typing import Any

import msgspec
import zmq

from gptoss import logging_setup
from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.core.core import EngineCore, heartbeats
from gptoss.engine.core.executor import exit_on_rank_death
from gptoss.engine.messages import (
    AbortRequests,
    AddRequest,
    AddRequests,
    Failed,
    FromEngine,
    LoadAdapter,
    Outputs,
    Ready,
    Shutdown,
    ToEngine,
    TokenOutput,
    UnloadAdapter,
)
from gptoss.engine.model.tensor_source import CheckpointError
from gptoss.engine.parallel.device_placement import choose_devices

logger = logging.getLogger(__name__)
IDLE_POLL_MS = 500
RANK_DEATH_GRACE_S = 1.5


class EngineProcess:
    """EngineCore with two ZeroMQ sockets. Ends on Shutdown, or when its parent process ends."""

    def __init__(
        self,
        core: EngineCore,
        receive: zmq.Socket[bytes],
        send: zmq.Socket[bytes],
        parent_pid: int,
        keep_warm_s: float = 0.0,
    ) -> None:
        """`keep_warm_s`: time between the steps of an idle engine; 0: it runs none."""
        self._core = core
        self._keep_warm_s = keep_warm_s
        self._last_step = time.monotonic()
        self._receive_socket, self._send_socket = receive, send
        self._parent_pid = parent_pid
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._encoder = msgspec.msgpack.Encoder()
        self._stopping = False
        self._was_busy = False

    def run(self) -> None:
        while not self._stopping and os.getppid() == self._parent_pid:
            outputs = self._receive(idle=not self._core.has_work)
            if self._core.has_work:
                outputs += self._core.step()
                self._last_step = time.monotonic()
            elif outputs or self._was_busy:
                self._core.kv.check_integrity()
            for change in self._core.adapter_changes():
                self._send(change)
            self._was_busy = self._core.has_work
            if outputs or self._was_busy:
                self._send(Outputs(outputs, self._core.current_stats()))

    def _receive(self, *, idle: bool) -> list[TokenOutput]:
        """Handles all messages that have arrived, waiting for one if `idle`; returns terminal outputs."""
        outputs: list[TokenOutput] = []
        if idle and not self._receive_socket.poll(self._idle_poll_ms()):
            self._keep_warm()
            return outputs
        while self._receive_socket.poll(0):
            message = self._decoder.decode(self._receive_socket.recv())
            if isinstance(message, AddRequest):
                outputs += self._add(message)
            elif isinstance(message, AddRequests):
                for request in message.requests:
                    params = msgspec.structs.replace(request.params, logit_bias=message.logit_bias)
                    outputs += self._add(msgspec.structs.replace(request, params=params))
            elif isinstance(message, AbortRequests):
                outputs += self._core.abort(message.request_ids)
            elif isinstance(message, LoadAdapter):
                self._core.adapters.load(message.adapter)
            elif isinstance(message, UnloadAdapter):
                self._core.adapters.unload(message.adapter_id)
            elif isinstance(message, Shutdown):
                self._stopping = True
        return outputs

    def _idle_poll_ms(self) -> int:
        if not self._keep_warm_s:
            return IDLE_POLL_MS
        left = self._last_step + self._keep_warm_s - time.monotonic()
        return min(IDLE_POLL_MS, max(0, math.ceil(left * 1e3)))

    def _keep_warm(self) -> None:
        """Runs a step of one token if none has run for `keep_warm_s`. The statistics do not count it."""
        if self._keep_warm_s and time.monotonic() - self._last_step >= self._keep_warm_s:
            self._core.executor.keep_warm()
            self._last_step = time.monotonic()

    def _add(self, message: AddRequest) -> list[TokenOutput]:
        refused = self._core.add_request(message)
        return [] if refused is None else [refused]

    def _send(self, message: FromEngine) -> None:
        self._send_socket.send(self._encoder.encode(message))


def run_engine(config: EngineConfig, input_address: str, output_address: str, parent_pid: int, log: Any) -> None:
    """The engine process's main function. Never raises: it sends Failed and exits with code 1."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the API process decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging_setup.configure(**log)
    context = zmq.Context()
    send = context.socket(zmq.PUSH)
    send.connect(output_address)
    receive = context.socket(zmq.PULL)
    receive.connect(input_address)

    def report(message: str, fatal: bool) -> None:
        socket = context.socket(zmq.PUSH)  # a new one: sockets belong to one thread
        socket.connect(output_address)
        socket.send(msgspec.msgpack.encode(Failed(message, fatal)))
        socket.close(linger=1000)
        time.sleep(0.2)  # lets the message leave before the process exits

    try:
        core = EngineCore(choose_devices(config), exit_on_rank_death(report), log)
        process = EngineProcess(core, receive, send, parent_pid, config.idle_keep_warm_s)
        process._send(_ready(core))
        with heartbeats(context, output_address):
            process.run()
    except Exception as error:  # the last resort: any error must reach the API process
        if max(config.tensor_parallel_size, config.pipeline_parallel_size) > 1:
            time.sleep(RANK_DEATH_GRACE_S)  # if a rank's death caused this, its watcher reports it and exits
        fatal = isinstance(error, (ConfigError, CheckpointError))
        logger.critical("engine died: %s", error if fatal else traceback.format_exc())
        send.send(msgspec.msgpack.encode(Failed(f"{type(error).__name__}: {error}", fatal)))
        context.destroy(linger=1000)
        os._exit(1)
    core.executor.shutdown()
    context.destroy(linger=500)


def _ready(core: EngineCore) -> Ready:
    report = core.executor.report()
    return Ready(
        dtype=report.dtype,
        device=report.device,
        num_blocks=core.kv.num_blocks - 1,
        kv_cache_bytes=report.kv_cache_bytes,
        weight_bytes=report.weight_bytes,
        max_model_len=core.max_model_len,
        kernel_path=report.kernel_path,
        load_s=report.load_s,
        pid=os.getpid(),
        gpu_mode=core.gpu_mode,
        ranks=report.ranks,
    )
