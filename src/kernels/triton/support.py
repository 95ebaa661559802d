"""Where the Triton kernels run, and in which form.

Imports no triton: a server on a CPU never loads it. Kernels take three options as constexpr, so that the interpreter
runs the same logic as a GPU:
    COMPUTE  the type of matrix operands. The interpreter adds and multiplies bfloat16 as raw bits (triton 3.6, 3.7),
             so it computes in float32
    ASM      inline PTX, which the interpreter does not support; it runs an equivalent in plain tl
    PDL      programmatic dependent launch (CUDA programming guide, 7.x "Programmatic Dependent Launch"): from sm_90
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

OLDEST_CAPABILITY = (8, 0)  # the first with bfloat16 matrix instructions
PDL_CAPABILITY = (9, 0)
FP8_CAPABILITY = (8, 9)  # the first that converts to and from e4m3


def interpreted() -> bool:
    """Whether triton runs kernels in its interpreter, on the CPU.

    It decides that when a kernel is defined.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run there: bfloat16 on a GPU of sm_80 or later."""
    return device.type == "cuda" and dtype == torch.bfloat16 and _capability(device) >= OLDEST_CAPABILITY


def samples(device: torch.device) -> bool:
    """Whether the kernels that pick tokens run there."""
    return device.type == "cuda" and _capability(device) >= OLDEST_CAPABILITY


def has_fp8(device: torch.device) -> bool:
    """Whether numbers may be in FP8 there: on a CPU, in plain torch, and on a GPU of sm_89 or later."""
    return device.type != "cuda" or _capability(device) >= FP8_CAPABILITY


def launch_options(device: torch.device, *names: str) -> dict[str, Any]:
    """The named constexprs of COMPUTE and ASM, PDL, which every kernel takes, and its launch option."""
    import triton.language as tl

    compiled = not interpreted()
    values = {"COMPUTE": tl.bfloat16 if compiled else tl.float32, "ASM": compiled}
    pdl = compiled and _capability(device) >= PDL_CAPABILITY
    launch = {"launch_pdl": True} if pdl else {}
    return {name: values[name] for name in names} | {"PDL": pdl} | launch


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def architecture(device: torch.device) -> str:
    """The key of the launch configurations, such as "sm_90"."""
    if interpreted():
        return "interpreter"
    major, minor = _capability(device)
    return f"sm_{major}{minor}"


def counters(device: torch.device, count: int) -> torch.Tensor:
    """int32 zeros that kernels count in and leave as zeros.

    Allocated once and kept, since graphs hold their address: call this before a graph that uses them is captured.
    """
    size = max(1024, 1 << (count - 1).bit_length())
    if (device, size) not in _counters:
        _counters[device, size] = torch.zeros(size, dtype=torch.int32, device=device)
    return _counters[device, size]


_counters: dict[tuple[torch.device, int], torch.Tensor] = {}
