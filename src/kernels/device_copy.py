"""Copies between host and device that do not wait for other work.

A copy from or to pageable memory can wait for all work queued on the device, and reading a tensor waits for everything
queued so far, which may be the whole next step (CUDA Runtime API, "API synchronization behavior"). So data for the
device lies in pinned memory, and results are copied to pinned memory in stream order and read once that copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

ALIGNED_BYTES = 16
FOUR_BYTES = {np.dtype(np.int32): torch.int32, np.dtype(np.float32): torch.float32}


class Mark(Protocol):
    """A point in the work that is queued on a device."""

    def record(self) -> None: ...
    def synchronize(self) -> None:
        """Waits until the device has done what was queued before the mark was recorded."""
        ...


def new_mark(device: torch.device) -> Mark | None:
    """A mark for a device that works asynchronously; None for one that does not."""
    return torch.cuda.Event() if device.type == "cuda" else None


def to_device(
    values: Sequence[Any] | np.ndarray | torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def to_device_together(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copies arrays of FOUR_BYTES as one: a copy takes a GPU longer than the numbers of a step do.

    Each begins at a multiple of ALIGNED_BYTES, as tensors of their own do.
    """
    each = ALIGNED_BYTES // 4
    sizes = [-(-array.size // each) * each for array in arrays]
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    parts = host.numpy()
    start = 0
    for array, size in zip(arrays, sizes, strict=True):
        parts[start : start + array.size] = array.reshape(-1).view(np.int32)
        start += size
    made = host.to(device, non_blocking=True).split(sizes)
    return [
        part[: array.size].view(FOUR_BYTES[array.dtype]).view(array.shape)
        for part, array in zip(made, arrays, strict=True)
    ]


class PendingReadback:
    """Tensors on their way to the host. Does not wait for work that is queued on the device later."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._host = list(tensors)
        self._done = new_mark(tensors[0].device) if tensors else None
        if self._done is not None:
            self._host = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda).copy_(t, non_blocking=True) for t in tensors
            ]
            self._done.record()

    def values(self) -> list[Any]:
        """The contents of each tensor, as lists and numbers."""
        if self._done is not None:
            self._done.synchronize()
        return [t.tolist() for t in self._host]
