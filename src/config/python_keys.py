"""Keys of the Python tool."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gptoss.config.key import key


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonKeys:
    """Python tool"""

    enable_python_tool: bool = key(False, "let requests run Python in a sandbox; needs Linux and bubblewrap")
    python_tool_interpreter: Path | None = key(None, "Python of the sandbox; unset: the server's own")
    python_tool_timeout_s: float = key(120.0, "time of one call", gt=0)
    python_tool_memory_bytes: int = key(2**30, "memory of a container's processes together, and of each", ge=2**27)
    python_tool_disk_bytes: int = key(2**28, "size of a container's /mnt/data, and of its /tmp", ge=2**20)
    python_tool_max_processes: int = key(64, "processes and threads of a container", ge=1, le=200)
    python_tool_output_bytes: int = key(32_768, "text kept of what a call prints: its beginning and its end", ge=256)
