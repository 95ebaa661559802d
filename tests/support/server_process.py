"""A real server in a process of its own, for end-to-end tests and benchmarks."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "TEST_SERVER_PYTHON"  # environment: the interpreter that has the server's packages
PR_SET_PDEATHSIG = 1
LOG_FOLDER = "TEST_LOG_FOLDER"  # environment: servers' logs are kept there


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _end_with_tests() -> None:
    """In the child: a run that is interrupted leaves no server behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class ServerProcess:
    def __init__(
        self, *flags: str, env: dict[str, str] | None = None, command: list[str] | None = None, cwd: Path = ROOT
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        kept = os.environ.get(LOG_FOLDER)
        self._keeps_log = kept is not None
        self._log = tempfile.NamedTemporaryFile(  # noqa: SIM115
            "w+", prefix=f"server-{self.port}-", suffix=".log", delete=False, dir=kept
        )
        self.process = subprocess.Popen(
            [*(command or (os.environ.get(PYTHON, sys.executable), "src/server.py")), "--port", str(self.port), *flags],
            cwd=cwd,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            preexec_fn=_end_with_tests if sys.platform == "linux" else None,
        )

    @property
    def log(self) -> str:
        return Path(self._log.name).read_text()

    def wait_ready(self, timeout_s: float = 180.0) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError(f"not ready after {timeout_s} s:\n{self.log}")

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{self.url}/stats", timeout=10).json()
        return found

    def wait_idle(self, timeout_s: float = 10.0) -> dict[str, Any]:
        """-> /stats once nothing is running; fails if something still is after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            stats = self.stats()
            engine = stats["engine"]
            if stats["requests"]["active"] == engine["num_running"] == engine["num_waiting"] == 0:
                assert engine["kv_usage"] == 0
                return stats
            time.sleep(0.05)
        raise AssertionError(f"still busy: {stats['requests']} {stats['engine']}")

    def end(self) -> None:
        """Ends it without the time that an orderly end leaves to connections: the second signal does not wait."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        self.stop()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._log.close()
        return self.process.returncode


@contextlib.contextmanager
def running_server(
    *flags: str, env: dict[str, str] | None = None, ready_timeout_s: float = 180.0
) -> Iterator[ServerProcess]:
    server = ServerProcess(*flags, env=env)
    try:
        server.wait_ready(ready_timeout_s)
        yield server
    finally:
        server.end()
        if not server._keeps_log:
            Path(server._log.name).unlink(missing_ok=True)
