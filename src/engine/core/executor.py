"""Runs steps on all ranks: sends each step to every rank and returns one result.

Rank 0 runs in the engine process. The other ranks are processes with a pipe each; hidden states and partial sums are
exchanged by torch.distributed. When a rank dies the engine process exits, and the engine's client restarts all of them.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import msgspec

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.core.hosts import OtherHosts
from gptoss.engine.messages import (
    NULL_BLOCK,
    PROBE_ID,
    LoadAdapter,
    ModelRunnerOutput,
    NewRequest,
    RankReport,
    SchedulerOutput,
    Step,
    ToRank,
    UnloadAdapter,
)
from gptoss.engine.parallel.communicator import Rendezvous
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.rank import change_adapter, make_worker, report_of, run_rank
from gptoss.run_folder import RunFolder

OnDeath = Callable[[str, bool], None]  # (what happened, whether a restart would fail the same way)


class SelfTestError(RuntimeError):
    """The model runs but its results are wrong: it must not serve."""


@dataclass(frozen=True, slots=True)
class ExecutorReport:
    """The configuration of the loaded ranks. Bytes are totals of all ranks."""

    device: str
    dtype: str
    kernel_path: str
    prelaunches_steps: bool  # whether a request's next token is computed before it is scheduled
    load_s: float
    weight_bytes: int
    kv_cache_bytes: int
    ranks: list[RankReport]

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


class Executor:
    """Submits steps and collects their results, in order.

    With pipeline stages several steps are in flight.
    """

    def __init__(
        self, config: EngineConfig, on_death: OnDeath | None = None, log: dict[str, Any] | None = None
    ) -> None:
        """Loads and tests the model on all ranks. `on_death` is called in a thread when another rank dies.

        Raises:
            SelfTestError, ConfigError, CheckpointError.
        """
        self.config = config
        self.max_in_flight = max(1, config.pipeline_parallel_size)
        self._output_rank = (self.max_in_flight - 1) * max(1, config.tensor_parallel_size)
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput | None]] = deque()
        self._sampled: dict[str, list[int]] = {}
        self._pipes: dict[int, Connection] = {}
        self._loaded = LoadReports(config.num_ranks)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ModelRunnerOutput)
        self._folder: RunFolder | None = None
        self._hosts: OtherHosts | None = None
        if config.nnodes > 1:
            self._hosts = OtherHosts(config)
            self._hosts.gather()
        own, others = self._rendezvous(config)
        self._processes = [self._start(config, rank, others, log) for rank in range(1, config.ranks_per_node)]
        self._pipes |= {} if self._hosts is None else self._hosts.connect_ranks()
        if self._pipes and on_death is not None:
            threading.Thread(target=self._watch, args=(on_death,), daemon=True, name="watch-ranks").start()
        self.worker = make_worker(config, 0, own)
        self.worker.load()
        self.num_blocks = self.worker.init_cache()
        self.ranks = [report_of(self.worker, 0)]
        for pipe in self._pipes.values():
            self.ranks.append(msgspec.msgpack.decode(pipe.recv_bytes(), type=RankReport))
        self._self_test(config)

    def _rendezvous(self, config: EngineConfig) -> tuple[Rendezvous | None, Rendezvous | None]:
        """Returns where rank 0 and the other ranks meet; None with one rank."""
        if self._hosts is not None:
            others = self._hosts.store
            return self._hosts.served_store(), others
        if config.num_ranks == 1:
            return None, None
        self._folder = RunFolder()
        path = self._folder.path / "rendezvous"
        return path, path

    def report(self) -> ExecutorReport:
        worker = self.worker
        return ExecutorReport(
            device=str(worker.device),
            dtype=str(worker.dtype).removeprefix("torch."),
            kernel_path=worker.kernel_path,
            prelaunches_steps=worker.prelaunches_steps,
            load_s=worker.load_s,
            weight_bytes=sum(rank.weight_bytes for rank in self.ranks),
            kv_cache_bytes=sum(rank.kv_cache_bytes for rank in self.ranks),
            ranks=self.ranks,
        )

    @property
    def num_speculative_tokens(self) -> int:
        """Maximum drafts per request and step. Raises ConfigError if this engine does not support drafts."""
        config, kernels = self.config, self.worker.kernel_path
        wanted = config.num_speculative_tokens
        able = (kernels == "native" and config.num_ranks == 1) or (kernels == "triton" and self.max_in_flight == 1)
        if wanted > 0 and not able:
            raise ConfigError(
                f"num_speculative_tokens ({wanted}) works with the compiled CPU kernels on one rank, and with the GPU "
                f"kernels without pipeline stages; this engine runs {kernels} kernels on {config.num_ranks} in "
                f"{self.max_in_flight} stages: set 0 or -1"
            )
        return config.max_drafts if able else 0

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def submit(self, out: SchedulerOutput) -> None:
        """Starts a step on all ranks; rank 0's part is done when this returns."""
        step = Step(out, self._sampled)
        self._sampled = {}
        self._broadcast(step)
        self._in_flight.append((out, self.worker.execute_model(step.out, step.sampled)))

    def change_adapter(self, message: LoadAdapter | UnloadAdapter) -> None:
        """Begins to load an adapter on all ranks, or unloads it after the steps in flight."""
        self._broadcast(message)
        change_adapter(self.worker, message, self._loaded.put)

    def loaded_adapters(self) -> list[tuple[int, str | None]]:
        """The adapters that all ranks have read since the last call, and why one could not."""
        return self._loaded.take()

    def _broadcast(self, message: ToRank) -> None:
        """Sends a message to the other ranks."""
        if self._pipes:
            encoded = self._encoder.encode(message)
            for pipe in self._pipes.values():
                pipe.send_bytes(encoded)

    def collect(self) -> tuple[SchedulerOutput, ModelRunnerOutput]:
        """Waits for the oldest step in flight; returns it and its result."""
        out, result = self._in_flight.popleft()
        if self._output_rank != 0:
            result = self._decoder.decode(self._pipes[self._output_rank].recv_bytes())
        assert result is not None
        if self._pipes:
            self._sampled |= sampled_of(result)
        return out, result

    def execute_model(self, out: SchedulerOutput) -> ModelRunnerOutput:
        self.submit(out)
        return self.collect()[1]

    def keep_warm(self) -> None:
        """Runs a step of one token on all ranks, which writes to the null block only."""
        self._run_alone(warm_up_probe())

    def _run_alone(self, probe: NewRequest) -> ModelRunnerOutput:
        """Runs a request's only step and forgets the request."""
        result = self.execute_model(SchedulerOutput([probe], {}, {PROBE_ID: len(probe.token_ids)}, []))
        self.execute_model(SchedulerOutput([], {}, {}, [PROBE_ID]))
        self._sampled = {}
        return result

    def _self_test(self, config: EngineConfig) -> None:
        result = self._run_alone(self_test_probe(config))
        if result.failed:
            raise SelfTestError(
                f"self-test failed in {self.worker.dtype} on {self.worker.device}: {result.failed[PROBE_ID]}"
            )

    def _start(self, config: EngineConfig, rank: int, rendezvous: Rendezvous | None, log: dict[str, Any] | None) -> Any:
        ours, theirs = multiprocessing.Pipe()
        errors, their_errors = multiprocessing.Pipe(duplex=False)
        loaded, their_loaded = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("spawn").Process(
            target=run_rank,
            args=(config, rank, rendezvous, theirs, their_errors, their_loaded, log),
            name=f"gpt-oss-rank-{rank}",
            daemon=True,
        )
        process.start()
        theirs.close()
        their_errors.close()
        their_loaded.close()
        self._loaded.pipes.append(loaded)
        self._pipes[rank] = ours
        return process, errors

    def _watch(self, on_death: OnDeath) -> None:
        """Waits until a rank ends, in a thread."""
        hosts = self._hosts.connections if self._hosts is not None else []
        gone = wait([*(process.sentinel for process, _ in self._processes), *hosts])
        for rank, (process, errors) in enumerate(self._processes, 1):
            if process.sentinel not in gone:
                continue
            process.join(1)
            message, fatal = f"exit code {process.exitcode}", False
            if errors.poll(1):
                with contextlib.suppress(EOFError):
                    message, fatal = errors.recv()
            on_death(f"rank {rank} died: {message}", fatal)
            return
        assert self._hosts is not None
        on_death(*self._hosts.what_happened(gone[0]))

    def shutdown(self) -> None:
        for process, _ in self._processes:
            process.kill()
            process.join(5)
        self.worker.close()
        if self._folder is not None:
            self._folder.remove()
        if self._hosts is not None:
            self._hosts.close()


def sampled_of(result: ModelRunnerOutput) -> dict[str, list[int]]:
    """What a step sampled: each request's accepted drafts, and the token after them."""
    return {i: [*result.accepted.get(i, ()), token] for i, token in result.sampled.items()}


class LoadReports:
    """Reports of the ranks that they have read an adapter."""

    def __init__(self, num_ranks: int) -> None:
        self.pipes: list[Connection] = []  # of the other ranks
        self._num_ranks = num_ranks
        self._own: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        self._reports: dict[int, list[str | None]] = {}

    def put(self, adapter_id: int, error: str | None) -> None:
        """Adds the report of this process's rank. May be called in any thread."""
        self._own.put((adapter_id, error))

    def take(self) -> list[tuple[int, str | None]]:
        """Returns the adapters that all ranks have reported, and the first rank's error."""
        arrived = []
        while not self._own.empty():
            arrived.append(self._own.get())
        for pipe in self.pipes:
            while pipe.poll():
                arrived.append(pipe.recv())
        complete = []
        for adapter_id, error in arrived:
            reports = self._reports.setdefault(adapter_id, [])
            reports.append(error)
            if len(reports) == self._num_ranks:
                del self._reports[adapter_id]
                complete.append((adapter_id, next((e for e in reports if e is not None), None)))
        return complete


def self_test_probe(config: EngineConfig) -> NewRequest:
    """A prompt of at most one block, for one step through the whole model."""
    tokens = list(config.probe_token_ids[: config.block_size])
    params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    return NewRequest(PROBE_ID, tokens, len(tokens), params, ([1], [2]), 0)


def warm_up_probe() -> NewRequest:
    """A prompt of one token in the null block, whose keys and values no request reads."""
    params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
    return NewRequest(PROBE_ID, [0], 1, params, ([NULL_BLOCK], [NULL_BLOCK]), 0)


def exit_on_rank_death(report: Callable[[str, bool], None]) -> OnDeath:
    """Returns an OnDeath that reports and then exits this process immediately."""

    def ended(message: str, fatal: bool) -> None:
        report(message, fatal)
        os._exit(1)

    return ended
