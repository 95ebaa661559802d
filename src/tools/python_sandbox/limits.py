"""What a container may use."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """Limits of one container."""

    timeout_s: float = 120.0  # of a cell
    memory_bytes: int = 1024 * MIB  # of each process, and of all together
    disk_bytes: int = 256 * MIB  # of /mnt/data, of /tmp, and of each file
    processes: int = 64  # and threads
    output_bytes: int = 32_768  # of a cell's text
    image_bytes: int = 8 * MIB  # of a cell's images together
