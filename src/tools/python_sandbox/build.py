"""The Python tool that a configuration describes."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from gptoss.config.errors import ConfigError
from gptoss.tools.python_sandbox.errors import SandboxError
from gptoss.tools.python_sandbox.limits import SandboxLimits
from gptoss.tools.python_sandbox.probe import find_sandbox
from gptoss.tools.python_sandbox.runner import PythonRunner


class PythonSettings(Protocol):
    """The keys of the server's configuration that are read here."""

    @property
    def enable_python_tool(self) -> bool: ...
    @property
    def python_tool_interpreter(self) -> Path | None: ...
    @property
    def python_tool_timeout_s(self) -> float: ...
    @property
    def python_tool_memory_bytes(self) -> int: ...
    @property
    def python_tool_disk_bytes(self) -> int: ...
    @property
    def python_tool_max_processes(self) -> int: ...
    @property
    def python_tool_output_bytes(self) -> int: ...


def build_python(settings: PythonSettings) -> PythonRunner | None:
    """The Python tool; None where it is off. Raises ConfigError where there is no sandbox.

    Starts and ends a container to find out.
    """
    if not settings.enable_python_tool:
        return None
    limits = limits_of(settings)
    try:
        return PythonRunner(find_sandbox(settings.python_tool_interpreter, limits), limits)
    except SandboxError as error:
        remedy = f"; {error.remedy}" if error.remedy else ""
        raise ConfigError(f"enable_python_tool: {error.reason}{remedy}") from None


def limits_of(settings: PythonSettings) -> SandboxLimits:
    """The limits of a container."""
    return SandboxLimits(
        timeout_s=settings.python_tool_timeout_s,
        memory_bytes=settings.python_tool_memory_bytes,
        disk_bytes=settings.python_tool_disk_bytes,
        processes=settings.python_tool_max_processes,
        output_bytes=settings.python_tool_output_bytes,
    )
