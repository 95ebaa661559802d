"""A host that only computes: starts its ranks of a model for the engine on host 0, again and again."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import multiprocessing
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

import msgspec

from gptoss import __version__, logging_setup
from gptoss.engine.config import EngineConfig
from gptoss.engine.core.hosts import HostHello, RankDied, RankHello, Refused, StartRanks, ToHost, comparable
from gptoss.engine.parallel.device_placement import choose_devices
from gptoss.engine.parallel.hosts import MAX_GREETING_BYTES, StoreAddress, address_towards, connect

logger = logging.getLogger(__name__)
RETRY_S = 1.0
POLL_S = 0.5


class HostAgent:
    """Host `node_rank`, in a process without torch, which is connected to host 0."""

    def __init__(self, renewed: Callable[[], EngineConfig], log: dict[str, Any]) -> None:
        """
        Args:
            renewed: returns the configuration with intact cached files; called before each start of the ranks.

        Raises:
            ConfigError: this host's ranks do not fit.
        """
        self._renewed, self._log = renewed, log
        self._config = choose_devices(renewed())
        self._is_ending = False

    def run(self) -> int:
        """Returns the exit code: 0 after SIGTERM or SIGINT, 1 if host 0 refuses this host."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        is_waiting = False
        while not self._is_ending:
            try:
                connection, own = self._connect()
            except OSError as error:
                if not is_waiting:
                    logger.info("waiting for host 0 at %s: %s", self._master, error)
                is_waiting = True
                time.sleep(RETRY_S)
                continue
            is_waiting = False
            with connection:
                refused = self._serve(connection, own)
            if refused is not None:
                logger.critical("host 0 refuses this host: %s", refused)
                return 1
            time.sleep(0 if self._is_ending else RETRY_S)
        return 0

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._is_ending = True

    @property
    def _master(self) -> tuple[str, int]:
        assert self._config.master_addr is not None
        return self._config.master_addr, self._config.master_port

    def _connect(self) -> tuple[Connection, str]:
        """Returns a connection to host 0 that has greeted it, and this host's address. Raises OSError."""
        config = self._config
        own = config.node_addr or address_towards(*self._master)
        connection = connect(*self._master, own)
        hello = HostHello(config.node_rank, own, __version__, comparable(config))
        connection.send_bytes(msgspec.msgpack.encode(hello))
        logger.info("connected to host 0 at %s from %s", self._master, own)
        return connection, own

    def _serve(self, connection: Connection, own: str) -> str | None:
        """Runs the ranks of one start of the engine. Returns why host 0 refuses this host, else None."""
        try:
            while not connection.poll(POLL_S):
                if self._is_ending:
                    return None
            message = msgspec.msgpack.decode(connection.recv_bytes(MAX_GREETING_BYTES), type=ToHost)
        except (OSError, EOFError):
            return None
        if isinstance(message, Refused):
            return message.message
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        self._config = dataclasses.replace(self._renewed(), **{name: getattr(self._config, name) for name in sizes})
        ranks = self._start(message, own)
        try:
            self._watch(connection, ranks)
        finally:
            for process, _ in ranks.values():
                process.kill()
                process.join(10)
        return None

    def _start(self, start: StartRanks, own: str) -> dict[int, tuple[BaseProcess, Connection]]:
        """Starts this host's ranks; returns each one's process and the pipe of its last error."""
        config = self._config
        first = config.node_rank * config.ranks_per_node
        store = StoreAddress(self._master[0], start.store_port, own)
        logger.info("starting ranks %d to %d", first, first + config.ranks_per_node - 1)
        started: dict[int, tuple[BaseProcess, Connection]] = {}
        for rank in range(first, first + config.ranks_per_node):
            errors, their_errors = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.get_context("spawn").Process(
                target=_run,
                args=(config, rank, store, start.run_id, their_errors, self._log),
                name=f"gpt-oss-rank-{rank}",
                daemon=True,
            )
            process.start()
            their_errors.close()
            started[rank] = process, errors
        return started

    def _watch(self, connection: Connection, ranks: dict[int, tuple[BaseProcess, Connection]]) -> None:
        """Returns when host 0's engine or one of the ranks has ended, or this host is to end."""
        sentinels = {process.sentinel: rank for rank, (process, _) in ranks.items()}
        while not self._is_ending:
            for ready in wait([connection, *sentinels], POLL_S):
                if ready is connection:
                    logger.info("the engine on host 0 has ended")
                    return
                assert isinstance(ready, int)
                died = _last_words(sentinels[ready], *ranks[sentinels[ready]])
                logger.error("rank %d died: %s", died.rank, died.message)
                with contextlib.suppress(OSError):
                    connection.send_bytes(msgspec.msgpack.encode(died))
                return


def _last_words(rank: int, process: BaseProcess, errors: Connection) -> RankDied:
    process.join(1)
    died = RankDied(rank, f"exit code {process.exitcode}", False)
    if errors.poll(1):
        with contextlib.suppress(EOFError):
            died.message, died.fatal = errors.recv()
    return died


def _run(
    config: EngineConfig, rank: int, store: StoreAddress, run_id: str, errors: Connection, log: dict[str, Any]
) -> None:
    """The main function of a rank's process; only this process loads torch."""
    from gptoss.engine.worker.rank import run_rank

    logging_setup.configure(**log)
    assert config.master_addr is not None
    try:
        pipe = connect(config.master_addr, config.master_port, store.own)
        pipe.send_bytes(msgspec.msgpack.encode(RankHello(run_id, rank)))
    except OSError as error:
        errors.send((f"cannot reach host 0: {error}", False))
        return
    _, loaded = multiprocessing.Pipe(duplex=False)  # no adapters with several hosts
    run_rank(config, rank, store, pipe, errors, loaded, log)
