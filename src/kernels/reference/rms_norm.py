"""RMSNorm (Zhang and Sennrich 2019, eq. 4) in plain torch, computed in float32.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import torch


def rms_norm_ref(
    x: torch.Tensor, scale: torch.Tensor, eps: float, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, H], scale [H] -> [T, H] in `out_dtype`, that of `x` unless given."""
    if x.device.type == "cpu" and x.dtype == scale.dtype and out_dtype in (None, x.dtype):
        return torch.rms_norm(x, (x.shape[-1],), scale, eps)
    t = x.float()
    t = t * torch.rsqrt(t.square().mean(dim=-1, keepdim=True) + eps)
    return (t * scale.float()).to(out_dtype or x.dtype)
