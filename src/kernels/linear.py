"""Dense layers.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gptoss.kernels import native


def linear_ref(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [M, K], weight [N, K], bias [N], residual [M, N] -> [M, N]."""
    out = F.linear(x, weight, bias)
    if residual is not None:
        out = out + residual
    return out if out_dtype is None else out.to(out_dtype)


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
