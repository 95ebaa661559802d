"""RMSNorm (Zhang and Sennrich 2019, eq. 4), computed in float32.

Shapes: T tokens, H hidden.
"""

from __future__ import annotations

import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.reference.rms_norm import rms_norm_ref


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return native.rms_norm(x, scale, eps) if native.supports(x) else rms_norm_ref(x, scale, eps, out_dtype)
