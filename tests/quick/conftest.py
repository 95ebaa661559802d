"""What makes `make quick` quick: no process is started, no server, and torch is not loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

HERE = Path(__file__).parent
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
SLOW = ("torch", "triton", "transformers")
_running: str | None = None  # the test of this folder that is running
_alone = False  # nothing but this folder is tested, so that whatever is loaded was loaded by it
_found: set[str] = set()


def _refuse_processes(event: str, _: tuple[Any, ...]) -> None:
    if _running is not None and event in STARTS:
        raise AssertionError(f"{_running} starts a process ({event}): it belongs to tests/integration")


sys.addaudithook(_refuse_processes)


def pytest_collection_finish(session: pytest.Session) -> None:
    global _alone
    _alone = all(HERE in item.path.parents for item in session.items)


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    global _running

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a server belongs to tests/integration")

    monkeypatch.setattr(uvicorn.Server, "run", refuse)
    monkeypatch.setattr(uvicorn.Server, "serve", refuse)
    _running = request.node.nodeid
    yield
    _running = None
    loaded = {name for name in SLOW if name in sys.modules} - _found
    if _alone and loaded:
        _found.update(loaded)  # reported once
        pytest.fail(f"{', '.join(sorted(loaded))} is loaded: what needs it belongs to another folder of tests")
