"""Host 0's side of a model that several hosts share: accepts the other hosts and their ranks.

Each other host runs a HostAgent (host_agent.py), which keeps a connection to host 0 and starts its ranks when told to.
Each rank has a connection of its own, in place of the pipe that host 0's ranks have.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import fields
from multiprocessing.connection import Connection, wait

import msgspec

from gptoss import __version__
from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.parallel.hosts import (
    GREETING_TIMEOUT_S,
    MAX_GREETING_BYTES,
    StoreAddress,
    connection_of,
    listen,
)

logger = logging.getLogger(__name__)
RANKS_TIMEOUT_S = 300  # for the processes of all ranks to start and connect
REMIND_S = 30.0
# Keys that may differ between hosts
OWN_KEYS = {"model_path", "ranks_path", "node_rank", "node_addr", "num_threads", "cpu_isa", "gpus"}


class HostHello(msgspec.Struct, tag="host"):
    """A host is there."""

    node_rank: int
    address: str
    version: str
    keys: dict[str, str]  # of its configuration, which must be host 0's


class RankHello(msgspec.Struct, tag="rank"):
    """A rank's process has started."""

    run_id: str
    rank: int


Greeting = HostHello | RankHello


class StartRanks(msgspec.Struct, tag="start"):
    run_id: str
    store_port: int


class Refused(msgspec.Struct, tag="refused"):
    """The host cannot take part, and should not try again."""

    message: str


ToHost = StartRanks | Refused


class RankDied(msgspec.Struct):
    rank: int
    message: str
    fatal: bool  # a restart would fail the same way


def comparable(config: EngineConfig) -> dict[str, str]:
    """Returns the keys that must be equal on all hosts, as text."""
    return {f.name: repr(getattr(config, f.name)) for f in fields(config) if f.name not in OWN_KEYS}


class OtherHosts:
    """The other hosts, seen from host 0. Made by each start of the engine."""

    def __init__(self, config: EngineConfig) -> None:
        """Listens on `master_addr` alone. Raises ConfigError."""
        assert config.master_addr is not None
        self._config = config
        self._parent_pid = os.getppid()
        self._run_id = secrets.token_hex(8)
        self._listener = listen(config.master_addr, config.master_port)
        self._store = listen(config.master_addr, 0)
        self._hosts: dict[int, tuple[Connection, str]] = {}

    @property
    def store(self) -> StoreAddress:
        """Where host 0's ranks meet the others; rank 0 serves it."""
        host, port = self._store.getsockname()[:2]
        return StoreAddress(host, port, host)

    def served_store(self) -> StoreAddress:
        """Returns the same for rank 0, which owns the socket from then on."""
        host, port = self._store.getsockname()[:2]
        return StoreAddress(host, port, host, self._store.detach())

    @property
    def connections(self) -> list[Connection]:
        """One for each host: readable when something has happened there."""
        return [connection for connection, _ in self._hosts.values()]

    def gather(self) -> None:
        """Waits for every host, as long as it takes, and has them start their ranks."""
        reminded = time.monotonic() - REMIND_S
        while missing := set(range(1, self._config.nnodes)) - self._hosts.keys():
            if time.monotonic() - reminded >= REMIND_S:
                reminded = time.monotonic()
                names = ", ".join(map(str, sorted(missing)))
                logger.info("waiting for hosts %s (--node-rank) at %s", names, self._listener.getsockname()[:2])
            if os.getppid() != self._parent_pid:
                os._exit(1)
            for greeting, connection in self._accepted(1.0):
                if isinstance(greeting, HostHello):
                    self._welcome(greeting, connection)
                else:
                    connection.close()  # a rank of an engine that has died
            for host in wait(self.connections, 0):  # until they start their ranks, hosts have nothing to say
                self._forget(host)
        start = msgspec.msgpack.encode(StartRanks(self._run_id, self.store.port))
        for connection in self.connections:
            connection.send_bytes(start)

    def connect_ranks(self) -> dict[int, Connection]:
        """Returns a connection to each rank of the other hosts. Raises RuntimeError if one does not start."""
        ranks: dict[int, Connection] = {}
        deadline = time.monotonic() + RANKS_TIMEOUT_S
        wanted = self._config.num_ranks - self._config.ranks_per_node
        while len(ranks) < wanted:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{wanted - len(ranks)} ranks of other hosts did not start in {RANKS_TIMEOUT_S} s")
            for greeting, connection in self._accepted(1.0):
                if isinstance(greeting, RankHello) and greeting.run_id == self._run_id:
                    ranks[greeting.rank] = connection
                else:
                    connection.close()
            for host in wait(self.connections, 0):
                message, fatal = self.what_happened(host)
                raise ConfigError(message) if fatal else RuntimeError(message)
        return dict(sorted(ranks.items()))

    def what_happened(self, host: object) -> tuple[str, bool]:
        """Returns what a readable host reports, and whether a restart would fail the same way."""
        number, address = next((n, a) for n, (connection, a) in self._hosts.items() if connection is host)
        name = f"host {number} ({address})"
        try:
            died = msgspec.msgpack.decode(self._hosts[number][0].recv_bytes(MAX_GREETING_BYTES), type=RankDied)
        except (OSError, EOFError, msgspec.MsgspecError):
            return f"{name} is gone", False
        return f"{name}: rank {died.rank} died: {died.message}", died.fatal

    def close(self) -> None:
        """Ends the connections, at which the hosts end their ranks."""
        for connection in self.connections:
            connection.close()
        self._listener.close()
        self._store.close()

    def _accepted(self, timeout_s: float) -> Iterator[tuple[Greeting, Connection]]:
        """The next connection with its greeting, if one comes before the timeout."""
        if self._listener in wait([self._listener, *self.connections], timeout_s):
            greeted = _greeted(self._listener.accept()[0])
            if greeted is not None:
                yield greeted

    def _forget(self, host: object) -> None:
        number = next(n for n, (connection, _) in self._hosts.items() if connection is host)
        connection, address = self._hosts.pop(number)
        connection.close()
        logger.warning("host %d (%s) is gone", number, address)

    def _welcome(self, hello: HostHello, connection: Connection) -> None:
        problem = self._problem(hello)
        if problem is not None:
            logger.error("host %d (%s) refused: %s", hello.node_rank, hello.address, problem)
            connection.send_bytes(msgspec.msgpack.encode(Refused(problem)))
            connection.close()
            return
        if hello.node_rank in self._hosts:
            self._hosts.pop(hello.node_rank)[0].close()  # it has started again
        self._hosts[hello.node_rank] = (connection, hello.address)
        logger.info("host %d (%s) is there", hello.node_rank, hello.address)

    def _problem(self, hello: HostHello) -> str | None:
        """Why the host cannot take part."""
        if hello.version != __version__:
            return f"it runs version {hello.version} and host 0 runs {__version__}"
        if not 0 < hello.node_rank < self._config.nnodes:
            return f"node_rank ({hello.node_rank}) is not below nnodes ({self._config.nnodes})"
        mine = comparable(self._config)
        for key, value in mine.items():
            if hello.keys.get(key) != value:
                return f"{key} is {hello.keys.get(key)} there and {value} on host 0: start all hosts with the same keys"
        return None


def _greeted(connected: socket.socket) -> tuple[Greeting, Connection] | None:
    """Returns the first message of a connection; closes it and returns None if it is not ours."""
    address = connected.getpeername()[0]
    connection = connection_of(connected)
    try:
        if not connection.poll(GREETING_TIMEOUT_S):
            raise TimeoutError(f"no message within {GREETING_TIMEOUT_S:g} s")
        return msgspec.msgpack.decode(connection.recv_bytes(MAX_GREETING_BYTES), type=Greeting), connection
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        logger.warning("a connection from %s is not from one of our hosts", address)
        logger.debug("what %s sent: %r", address, error)
    connection.close()
    return None
