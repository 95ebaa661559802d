"""How hosts that share a model find each other. Whole hosts are in test_parallel.py and tests/e2e/test_hosts.py."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import psutil
import pytest

from gptoss import __version__
from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.core.hosts import HostHello, OtherHosts, RankDied, RankHello, StartRanks, ToHost, comparable
from gptoss.engine.parallel import hosts as addresses
from gptoss.engine.parallel.hosts import address_towards, connect, interface_of, listen
from tests.support.helpers import checkpoint, engine_config
from tests.support.server_process import free_port

TWO = {"nnodes": 2, "master_addr": "127.0.0.1", "tensor_parallel_size": 2}


def config(**changes: Any) -> EngineConfig:
    return engine_config(checkpoint(), **{**TWO, "master_port": free_port(), **changes})


def send(connection: Connection, message: msgspec.Struct) -> None:
    connection.send_bytes(msgspec.msgpack.encode(message))


def host(other: EngineConfig, version: str = __version__) -> Connection:
    """A connection as a HostAgent makes it."""
    connection = connect("127.0.0.1", other.master_port, "127.0.0.2")
    send(connection, HostHello(other.node_rank, "127.0.0.2", version, comparable(other)))
    return connection


def answer(connection: Connection) -> ToHost:
    assert connection.poll(5)
    found: ToHost = msgspec.msgpack.decode(connection.recv_bytes(), type=ToHost)  # type: ignore[arg-type]
    return found


@contextlib.contextmanager
def gathering(mine: EngineConfig) -> Iterator[OtherHosts]:
    """Host 0 while it waits for the others, which must all come before the end."""
    others = OtherHosts(mine)
    thread = threading.Thread(target=others.gather)
    thread.start()
    try:
        yield others
        thread.join(10)
        assert not thread.is_alive()
    finally:
        others.close()


def other_of(mine: EngineConfig, **changes: Any) -> EngineConfig:
    return config(master_port=mine.master_port, node_rank=1, **changes)


def test_host_0_listens_on_the_given_address_alone() -> None:
    others = OtherHosts(config(master_addr="127.0.0.3"))
    mine = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.ip == "127.0.0.3"]
    assert {others.store.port} < {address.port for address in mine} and len(mine) == 2
    others.close()
    with pytest.raises(ConfigError, match=r"cannot listen on master_addr 192\.0\.2\.1 port"):
        OtherHosts(config(master_addr="192.0.2.1"))


def test_hosts_start_their_ranks_when_all_are_there() -> None:
    mine = config()
    with gathering(mine) as others:
        other = host(other_of(mine, num_threads=7))
        start = answer(other)
        assert isinstance(start, StartRanks) and start.store_port == others.store.port
    others = OtherHosts(mine)
    waiting = threading.Thread(target=others.gather)
    waiting.start()
    gone, stays = host(other_of(mine)), host(other_of(mine))
    gone.close()
    start = answer(stays)
    waiting.join(10)
    assert isinstance(start, StartRanks)
    late = connect("127.0.0.1", mine.master_port, None)
    send(late, RankHello("of an engine that has died", 1))
    rank = connect("127.0.0.1", mine.master_port, None)
    send(rank, RankHello(start.run_id, 1))
    ranks = others.connect_ranks()
    send(rank, RankHello("", 5))
    assert list(ranks) == [1] and ranks[1].poll(5)
    with pytest.raises(EOFError):
        late.recv_bytes()
    send(stays, RankDied(1, "exit code -9", False))
    assert others.connections[0].poll(5)
    assert others.what_happened(others.connections[0]) == ("host 1 (127.0.0.2): rank 1 died: exit code -9", False)
    stays.close()
    assert others.what_happened(others.connections[0]) == ("host 1 (127.0.0.2) is gone", False)
    others.close()


@pytest.mark.parametrize(("fatal", "error"), [(True, ConfigError), (False, RuntimeError)])
def test_a_rank_that_cannot_start_is_an_error_at_once(fatal: bool, error: type[Exception]) -> None:
    mine = config()
    with gathering(mine) as others:
        other = host(other_of(mine))
        answer(other)
    others = OtherHosts(mine)
    waiting = threading.Thread(target=others.gather)
    waiting.start()
    other = host(other_of(mine))
    answer(other)
    waiting.join(10)
    started = time.monotonic()
    send(other, RankDied(1, "CheckpointError: no such file", fatal))
    with pytest.raises(error, match=r"host 1 \(127\.0\.0\.2\): rank 1 died: CheckpointError: no such file"):
        others.connect_ranks()
    assert time.monotonic() - started < 10
    others.close()


@pytest.mark.parametrize(
    ("changes", "version", "message"),
    [
        ({"max_num_seqs": 4}, __version__, "max_num_seqs is 4 there and 8 on host 0: start all hosts with the same"),
        ({"nnodes": 3, "tensor_parallel_size": 3, "node_rank": 2}, __version__, "is not below nnodes (2)"),
        ({}, "0.1", f"it runs version 0.1 and host 0 runs {__version__}"),
    ],
)
def test_a_host_that_does_not_fit_is_refused_with_the_reason(
    changes: dict[str, Any], version: str, message: str
) -> None:
    mine = config()
    with gathering(mine):
        refused = answer(host(config(**{"master_port": mine.master_port, "node_rank": 1, **changes}), version))
        assert not isinstance(refused, StartRanks) and message in refused.message
        assert isinstance(answer(host(other_of(mine))), StartRanks)


def test_strangers_are_turned_away(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss.engine.core.hosts.GREETING_TIMEOUT_S", 0.2)
    mine = config()
    with gathering(mine):
        for content in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x00\x00\x00\x04junk", b"\x00\x00\x00\x10"):
            stranger = socket.create_connection(("127.0.0.1", mine.master_port))
            stranger.sendall(content)
            stranger.settimeout(5)
            if content[:3] != b"\x00\x00\x00" or content.endswith(b"junk"):
                with contextlib.suppress(ConnectionResetError):
                    assert stranger.recv(10) == b""
            stranger.close()
        assert isinstance(answer(host(other_of(mine))), StartRanks)
    assert "a connection from 127.0.0.1 is not from one of our hosts" in {r.message for r in caplog.records}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nnodes": 1, "node_rank": 1}, "node_rank (1) must be below nnodes (1)"),
        ({"master_addr": None}, "nnodes (2) needs master_addr"),
        ({"tensor_parallel_size": 0}, "must be a multiple of nnodes (2)"),
        ({"data_parallel_size": 2}, "nnodes (2) does not go with data_parallel_size 2"),
        ({"device": "cuda:1"}, "nnodes (2) does not go with device 'cuda:1'"),
        ({"backend": "transformers"}, "nnodes (2) does not go with backend 'transformers'"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert message in str(caught.value)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_towards("127.0.0.1", 9) == "127.0.0.1"
    assert interface_of("127.0.0.1") == "lo" and interface_of("192.0.2.1") is None
    with listen("localhost", 0) as found:
        assert found.getsockname()[0] in ("127.0.0.1", "::1")
    assert addresses.MAX_GREETING_BYTES < 1 << 24
