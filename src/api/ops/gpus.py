"""A report of the GPUs."""

from __future__ import annotations

from typing import Any

from gptoss.engine.parallel.gpus import visible_gpus


def gpu_report() -> list[dict[str, Any]]:
    """The driver's figures for the GPUs that the server may use; empty without a driver."""
    return [
        {
            "index": gpu.index,
            "name": gpu.name,
            "total_bytes": gpu.total_bytes,
            "used_bytes": gpu.total_bytes - gpu.free_bytes,
            "utilization": gpu.utilization,
            "temperature_c": gpu.temperature_c,
        }
        for gpu in visible_gpus()
    ]
