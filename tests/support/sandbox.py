"""A container for tests that are not coroutines."""

from __future__ import annotations

import asyncio
import functools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import pytest

from gptoss.tools.python_sandbox.bubblewrap import Sandbox
from gptoss.tools.python_sandbox.container import Container, Execution
from gptoss.tools.python_sandbox.errors import SandboxError
from gptoss.tools.python_sandbox.limits import MIB, SandboxLimits
from gptoss.tools.python_sandbox.probe import find_sandbox

LIMITS = SandboxLimits(timeout_s=20, memory_bytes=512 * MIB, disk_bytes=4 * MIB, processes=20, output_bytes=2000)


@functools.cache
def machine_sandbox() -> Sandbox:
    """The sandbox of this machine. Skips the test, with the remedy, where there is none."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    try:
        return find_sandbox()
    except SandboxError as error:
        pytest.skip(f"no sandbox: {error}")


class Box:
    """A container with a loop of its own."""

    def __init__(self, runner: asyncio.Runner, container: Container) -> None:
        self.runner, self.container = runner, container

    def run(self, code: str, timeout_s: float = 20) -> Execution:
        return self.runner.run(self.container.run(code, timeout_s))

    def text(self, code: str) -> str:
        """What the code prints, without the last line break."""
        return self.run(code).text.rstrip("\n")

    def processes(self) -> list[psutil.Process]:
        """Those of the container, bubblewrap's own first."""
        outside = psutil.Process(self.container._process.pid)
        return [outside, *outside.children(recursive=True)]


@contextmanager
def box(**limits: Any) -> Iterator[Box]:
    """A container with LIMITS and these; it is closed at the end."""
    sandbox = machine_sandbox()
    with asyncio.Runner() as runner:
        container = runner.run(Container.start(sandbox, replace(LIMITS, **limits)))
        try:
            yield Box(runner, container)
        finally:
            runner.run(container.close())
