"""MXFP4: 32 four-bit codes share one power-of-two scale (OCP Microscaling Formats v1.0, section 5).

Shapes: R rows, K columns (a multiple of 32), G = K // 32 groups.
    blocks  uint8 [..., R, G, 16]   two E2M1 codes a byte, the lower nibble is the even column
    scales  uint8 [..., R, G]       E8M0: the group is multiplied by 2 ** (scale - 127)
In GGUF files:
    blocks  uint8 [..., R, G, 17]   the scale, then byte k with columns k (the lower nibble) and k + 16
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP_SIZE = 32
SCALE_BIAS = 127
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_MAX_EXPONENT = 2


@dataclass(frozen=True, slots=True)
class Mxfp4Tensor:
    """A matrix, or a stack of matrices, in MXFP4."""

    blocks: torch.Tensor
    scales: torch.Tensor

    def __getitem__(self, index: int | slice) -> Mxfp4Tensor:
        return Mxfp4Tensor(self.blocks[index], self.scales[index])

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.scales.nbytes


@dataclass(frozen=True, slots=True)
class AlternatingMxfp4:
    """W1 as checkpoints have it: gate and up rows alternate. Shapes: [E, 2 I, ...]."""

    blocks: torch.Tensor
    scales: torch.Tensor


@dataclass(frozen=True, slots=True)
class GgufMxfp4:
    """A stack of matrices in the blocks of GGUF files."""

    blocks: torch.Tensor


@dataclass(frozen=True, slots=True)
class GgufGateUp:
    """W1 as GGUF files have it: gate and up rows apart. Shapes: [E, I, G, 17]."""

    gate: torch.Tensor
    up: torch.Tensor


def dequantize_mxfp4(w: Mxfp4Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor [..., R, K] in `dtype`.

    Exact in bfloat16 and float32 while the scaled value is a normal number.
    """
    table = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=w.blocks.device)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)  # [256, 2]: byte -> (even, odd)
    values = pairs[w.blocks.int()].flatten(-2)  # [..., R, G, 32]
    exponent = (w.scales.int() - SCALE_BIAS).unsqueeze(-1)
    return torch.ldexp(values, exponent).flatten(-2).to(dtype)


def quantize_mxfp4(w: torch.Tensor) -> Mxfp4Tensor:
    """[..., R, K] -> MXFP4, rounding to the nearest code and ties to the even code.

    The shared exponent is floor(log2(max |w|)) - 2 (OCP MX v1.0, section 6.3), so the largest value of a group
    saturates at 6 instead of overflowing.

    Raises:
        ValueError: K is not a multiple of 32, or `w` holds an infinity or a NaN.
    """
    groups = _groups(w)
    return _packed(groups, _shared_exponent(groups))


def quantize_mxfp4_closest(w: torch.Tensor) -> Mxfp4Tensor:
    """As quantize_mxfp4, but with the next larger scale in groups where that has a smaller error.

    Those are groups whose largest value would saturate. A value of 4 that becomes 3.9 would otherwise become 3.
    """
    groups = _groups(w)
    exponent = _shared_exponent(groups)
    first, second = _packed(groups, exponent), _packed(groups, (exponent + 1).clamp(max=254 - SCALE_BIAS))
    errors = [
        (dequantize_mxfp4(found, torch.float32).view_as(groups) - groups).square().sum(-1) for found in (first, second)
    ]
    is_second = errors[1] < errors[0]
    return Mxfp4Tensor(
        torch.where(is_second.unsqueeze(-1), second.blocks, first.blocks),
        torch.where(is_second, second.scales, first.scales),
    )


def _groups(w: torch.Tensor) -> torch.Tensor:
    """float32 [..., R, G, 32]"""
    if w.shape[-1] % GROUP_SIZE:
        raise ValueError(f"last dimension {w.shape[-1]} is not a multiple of {GROUP_SIZE}")
    if not torch.isfinite(w).all():
        raise ValueError("cannot quantise a tensor with infinities or NaNs")
    return w.float().unflatten(-1, (-1, GROUP_SIZE))


def _shared_exponent(groups: torch.Tensor) -> torch.Tensor:
    peak = groups.abs().amax(dim=-1)
    exponent = torch.frexp(peak).exponent - 1 - E2M1_MAX_EXPONENT
    return torch.where(peak > 0, exponent, 0).clamp(-SCALE_BIAS, 254 - SCALE_BIAS)


def _packed(groups: torch.Tensor, exponent: torch.Tensor) -> Mxfp4Tensor:
    codes = _nearest_code(torch.ldexp(groups, -exponent.unsqueeze(-1)))
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return Mxfp4Tensor(packed.contiguous(), (exponent + SCALE_BIAS).to(torch.uint8))


def _nearest_code(x: torch.Tensor) -> torch.Tensor:
    """uint8: steps of 0.5 up to 2, 1 up to 4, 2 up to 6; a tie goes to the even step, an even code."""
    magnitude = x.abs()
    code = magnitude.clamp(max=2).mul_(2).round_()
    code += magnitude.clamp(2, 4).round_().sub_(2)
    code += magnitude.clamp_(4, 6).div_(2).round_().sub_(2)
    return code.to(torch.uint8).bitwise_or_(torch.signbit(x).to(torch.uint8).bitwise_left_shift_(3))
