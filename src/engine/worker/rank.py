"""A rank in its own process: runs the steps that rank 0's process sends, and ends with that process."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import msgspec
import torch

from gptoss import logging_setup
from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import (
    LoadAdapter,
    ModelRunnerOutput,
    RankReport,
    SchedulerOutput,
    Step,
    ToRank,
    UnloadAdapter,
)
from gptoss.engine.model.tensor_source import CheckpointError
from gptoss.engine.parallel.communicator import Rendezvous
from gptoss.engine.parallel.shards import Shard
from gptoss.engine.worker.adapters import OnLoaded, RankAdapters
from gptoss.engine.worker.worker import Worker

logger = logging.getLogger(__name__)


class RankWorker(Protocol):
    """The interface of a rank: Worker, or TransformersWorker."""

    device: torch.device
    dtype: torch.dtype
    shard: Shard
    weight_bytes: int
    kv_cache_bytes: int
    load_s: float
    adapters: RankAdapters | None  # where adapters may be loaded

    @property
    def kernel_path(self) -> str: ...
    @property
    def prelaunches_steps(self) -> bool: ...
    def load(self) -> None: ...
    def init_cache(self) -> int: ...
    def close(self) -> None: ...
    def execute_model(
        self, out: SchedulerOutput, sampled: dict[str, list[int]] | None = None
    ) -> ModelRunnerOutput | None: ...


def make_worker(config: EngineConfig, rank: int, rendezvous: Rendezvous | None) -> RankWorker:
    if config.backend == "transformers":
        from gptoss.engine.worker.transformers_worker import TransformersWorker

        return TransformersWorker(config)
    return Worker(config, rank, rendezvous)


def report_of(worker: RankWorker, rank: int) -> RankReport:
    s = worker.shard
    return RankReport(
        rank,
        str(worker.device),
        (s.layers.start, s.layers.stop - 1),
        len(s.query_heads),
        len(s.experts),
        worker.weight_bytes,
        worker.kv_cache_bytes,
        os.getpid(),
    )


def run_rank(
    config: EngineConfig,
    rank: int,
    rendezvous: Rendezvous | None,
    pipe: Connection,
    errors: Connection,
    loaded: Connection,
    log: dict[str, Any] | None,
) -> None:
    """The process's main function: reads Step messages and runs them.

    The rank that samples answers each with a ModelRunnerOutput. `loaded` reports adapters that were read, with what is
    wrong with them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if log is not None:
        logging_setup.configure(**log)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    try:
        worker = make_worker(config, rank, rendezvous)
        worker.load()
        worker.init_cache()
        pipe.send_bytes(msgspec.msgpack.encode(report_of(worker, rank)))
        decoder, encoder = msgspec.msgpack.Decoder(ToRank), msgspec.msgpack.Encoder()
        while True:
            message = decoder.decode(pipe.recv_bytes())
            if isinstance(message, Step):
                result = worker.execute_model(message.out, message.sampled)
                if result is not None:
                    pipe.send_bytes(encoder.encode(result))
            else:
                change_adapter(worker, message, lambda *report: loaded.send(report))
    except (EOFError, ConnectionResetError, BrokenPipeError):
        os._exit(0)  # the engine process closed the pipe, or is gone
    except Exception as error:
        logger.exception("rank %d", rank)
        errors.send((f"{type(error).__name__}: {error}", isinstance(error, (ConfigError, CheckpointError))))
        os._exit(1)


def change_adapter(worker: RankWorker, message: LoadAdapter | UnloadAdapter, loaded: OnLoaded) -> None:
    """Begins to load an adapter, or unloads it."""
    assert worker.adapters is not None, "the configuration has no adapters"
    if isinstance(message, LoadAdapter):
        worker.adapters.load(message.adapter, loaded)
    else:
        worker.adapters.unload(message.adapter_id)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
