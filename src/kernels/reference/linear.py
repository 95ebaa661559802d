"""Dense layers in plain torch.

Shapes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
