"""Dense layers.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.reference.linear import linear_ref


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    if native.supports(x):
        return native.linear(x, weight, bias, residual, out_dtype or x.dtype)
    return linear_ref(x, weight, bias, residual, out_dtype)
