"""Which device and type a rank computes with, and its CPU threads."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch

from gptoss.config.errors import ConfigError
from gptoss.engine.parallel.device_placement import usable_cores
from gptoss.kernels.cpu import native


def choose_device(name: str, rank: int = 0, world: int = 1) -> torch.device:
    """The device of this machine's rank `rank` of `world`. Raises ConfigError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.startswith("cuda"):
        return torch.device(name)
    if not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch sees no CUDA device; use device 'cpu'")
    if world == 1:
        return torch.device(name)
    if name != "cuda":
        raise ConfigError(f"device {name!r} is one device; {world} ranks need device 'cuda' or 'auto'")
    if world > torch.cuda.device_count():
        raise ConfigError(f"{world} ranks need as many GPUs, torch sees {torch.cuda.device_count()}")
    return torch.device("cuda", rank)


def choose_dtype(name: str, device: torch.device, gpu_dtypes: Mapping[str, str]) -> torch.dtype:
    """The type of that name; for "auto" the table's entry for the GPU, if it has one.

    Otherwise bfloat16 if the hardware multiplies it, else float16 on a GPU and float32 on a CPU.
    """
    if name == "auto" and device.type == "cuda":
        name = listed_dtype(torch.cuda.get_device_name(device), gpu_dtypes) or name
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    fast = native.library() is not None or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def listed_dtype(gpu_name: str, gpu_dtypes: Mapping[str, str]) -> str | None:
    """The entry of the longest key that is part of the GPU's name, ignoring case."""
    found = [key for key in gpu_dtypes if key.lower() in gpu_name.lower()]
    return gpu_dtypes[max(found, key=len)] if found else None


def choose_cpu_isa(name: str) -> None:
    """Limits the native kernels to an instruction set. Raises ConfigError if the CPU does not have it."""
    try:
        native.choose_instruction_set(name)
    except ValueError as error:
        raise ConfigError(f"cpu_isa: {error}") from None


def set_threads(wanted: int, world: int = 1) -> None:
    """Sets this rank's number of compute threads; 0: its share of the physical cores available."""
    torch.set_num_threads(wanted or max(1, usable_cores() // world))
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory; does nothing with another C library.

    A step's temporaries are megabytes, and fresh pages for them in each step would cost more than the arithmetic.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, 512 * 2**20)
        mallopt(m_trim_threshold, 2**31 - 1)
