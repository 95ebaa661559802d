"""Copies between host and device that do not wait for other work.

A copy from or to pageable memory can wait for all work queued on the device, and reading a tensor waits for everything
queued so far, which may be the whole next step (CUDA Runtime API, "API synchronization behavior"). So data for the
device lies in pinned memory, and results are copied to pinned memory in stream order and read once that copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_device(
    values: Sequence[Any] | np.ndarray | torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


class PendingReadback:
    """Tensors on their way to the host. Does not wait for work that is queued on the device later."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._host = list(tensors)
        self._done: torch.cuda.Event | None = None
        if any(t.is_cuda for t in tensors):
            self._host = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors
            ]
            self._done = torch.cuda.Event()
            self._done.record()

    def values(self) -> list[Any]:
        """The contents of each tensor, as lists and numbers."""
        if self._done is not None:
            self._done.synchronize()
        return [t.tolist() for t in self._host]
