"""Lists the NVIDIA GPUs that this process may use, without creating a CUDA context."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Gpu:
    index: int  # CUDA's number in this process
    name: str
    total_bytes: int
    free_bytes: int
    utilization: float | None  # 0..1; None if the driver does not report it
    temperature_c: int | None
    capability: tuple[int, int] | None = None  # (8, 9) is sm_89; None if the driver does not report it


def visible_gpus() -> list[Gpu]:
    """The GPUs in CUDA's order with CUDA_DEVICE_ORDER=PCI_BUS_ID, which the server sets.

    Empty without a driver.
    """
    with _nvml() as nvml:
        return [] if nvml is None else [_gpu(nvml, i, handle) for i, handle in enumerate(_handles(nvml))]


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _handles(nvml: Any) -> list[Any]:
    count = nvml.nvmlDeviceGetCount()
    every = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return every
    uuids = [_text(nvml.nvmlDeviceGetUUID(handle)) for handle in every]
    return [every[i] for i in chosen_devices(wanted, uuids)]


def chosen_devices(wanted: str, uuids: list[str]) -> list[int]:
    """The indexes that CUDA_VISIBLE_DEVICES selects, by numbers or UUID prefixes.

    Like CUDA, stops at the first invalid entry.
    """
    chosen: list[int] = []
    for entry in (part.strip() for part in wanted.split(",")):
        found = [i for i, uuid in enumerate(uuids) if (entry == str(i)) or (len(entry) > 4 and uuid.startswith(entry))]
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen


def _gpu(nvml: Any, index: int, handle: Any) -> Gpu:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    utilization = _or_none(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
    temperature = _or_none(nvml, lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    capability = _or_none(nvml, lambda: tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)))
    name = _text(nvml.nvmlDeviceGetName(handle))
    return Gpu(index, name, int(memory.total), int(memory.free), utilization, temperature, capability)


def _or_none(nvml: Any, read: Any) -> Any:
    try:
        return read()
    except nvml.NVMLError:  # not every card has every sensor
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
