"""Ports that several processes want, and processes that end with another."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptoss.port_manager import PortError, recorded, reserve, running_servers
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


def _serve_forever(port_file: str) -> None:
    """In a process of its own: one of our servers as the port manager sees it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    with reserve("127.0.0.1", 0) as held, recorded(held):
        Path(port_file).write_text(str(held.getsockname()[1]))
        signal.sigwait({signal.SIGTERM})
        Path(port_file).with_name("asked").touch()


@pytest.fixture
def other_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, multiprocessing.Process]]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_serve_forever, args=(str(tmp_path / "port"),))
    process.start()
    wait_until(lambda: (tmp_path / "port").is_file() and (tmp_path / "port").read_text(), 20)
    yield int((tmp_path / "port").read_text()), process  # type: ignore[misc]
    process.kill()
    process.join()


def test_force_takes_the_port_of_a_server_of_ours(
    other_server: tuple[int, multiprocessing.Process], tmp_path: Path
) -> None:
    port, process = other_server
    assert [(r.port, r.pid) for r in running_servers()] == [(port, process.pid)]
    with pytest.raises(PortError, match="--force-port"):
        reserve("127.0.0.1", port)
    with reserve("127.0.0.1", port, force=True) as mine:
        assert mine.getsockname()[1] == port
    assert (tmp_path / "asked").exists(), "it was asked to end, not killed"
    assert running_servers() == []


def test_force_never_ends_a_foreign_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    code = "import socket,time; s=socket.socket(); s.bind(('127.0.0.1',0)); s.listen(); print(s.getsockname()[1],flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as foreign:
        assert foreign.stdout is not None
        port = int(foreign.stdout.readline())
        with pytest.raises(PortError, match="not one of our servers"):
            reserve("127.0.0.1", port, force=True)
        # a record with its number, of a process that began at another time: the number was given again
        record = tmp_path / "gpt-oss-server" / f"{port}.json"
        record.parent.mkdir(exist_ok=True)
        record.write_text(json.dumps({"port": port, "host": "127.0.0.1", "pid": foreign.pid, "started": 1.0}))
        with pytest.raises(PortError, match="not one of our servers"):
            reserve("127.0.0.1", port, force=True)
        assert not record.exists() and foreign.poll() is None
        # one of our servers that is alive, but the port is the foreign one's
        started = psutil.Process().create_time()
        ours = {"port": port, "host": "127.0.0.1", "pid": os.getpid(), "started": started}
        record.write_text(json.dumps(ours))
        with pytest.raises(PortError, match="not one of our servers"):
            reserve("127.0.0.1", port, force=True)
        record.unlink()
        assert port_manager("--free", str(port)).returncode == 1
        assert foreign.poll() is None
        foreign.kill()


def port_manager(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "src/port_manager.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_command_line_has_honest_exit_codes(other_server: tuple[int, multiprocessing.Process]) -> None:
    port, process = other_server
    checked = port_manager("--check", str(port))
    assert (checked.returncode, f"pid {process.pid}" in checked.stdout) == (1, True)
    listed = port_manager("--list")
    assert (listed.returncode, listed.stdout) == (0, f"127.0.0.1:{port} pid {process.pid}\n")
    freed = port_manager("--free", str(port))
    assert (freed.returncode, freed.stdout) == (0, f"port {port} is free\n")
    assert port_manager("--check", str(port)).returncode == 0
    assert port_manager("--list").stdout == ""
    assert port_manager("--free", str(port)).returncode == 0
    assert port_manager("--check", "99999").returncode == 2
    assert port_manager("--check", str(port), "--host", "192.0.2.1").returncode == 1


def _reserve_from(port: int, barrier: Any, found: Any) -> None:
    barrier.wait()
    with reserve("127.0.0.1", port, auto=True) as held:
        found.put(held.getsockname()[1])
        barrier.wait()  # all hold theirs at the same time


def test_servers_started_at_once_never_share_a_port() -> None:
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(4), context.Queue()
    with reserve("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
        processes = [context.Process(target=_reserve_from, args=(port, barrier, found)) for _ in range(4)]
        for process in processes:
            process.start()
        taken = [found.get(timeout=30) for _ in processes]
        for process in processes:
            process.join(10)
    assert len(set(taken)) == 4 and port not in taken


WITH_PARENT = """
import os, subprocess, sys, time
code = "from gptoss.parent_process import end_with_parent as end; end(%d); print('up', flush=True); import time; time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code % os.getpid()], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


def test_unfolding_ends_with_a_server_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", WITH_PARENT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        parent.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        wait_until(lambda: child.status() == psutil.STATUS_ZOMBIE)
