"""FP8 in the form e4m3: a number is its code times a scale.

Source: OCP 8-bit Floating Point Specification, revision 1.0, 2023. Codes have 4 bits of exponent and 3 of mantissa,
values up to 448 in steps of at most 1/8, 2^-9 as the smallest, and no infinity. A scale of 1 keeps numbers from 2^-6 to
448 to 1/16 of themselves; larger ones are clamped to 448.

Shapes: N rows, K columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
ROWS_AT_ONCE = 8192  # bounds the copies in float32


def quantize_fp8(x: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Returns the codes of x / scale, rounded to nearest even, clamped to +-448. The scale is a float32.

    It is multiplied by the scale's reciprocal in float32, as the Triton kernels do.
    """
    reciprocal = 1.0 / torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    return (x.float() * reciprocal).clamp(-LARGEST, LARGEST).to(FP8)


def dequantize_fp8(codes: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns codes * scale in `dtype`, multiplied in float32."""
    return (codes.float() * scale).to(dtype)


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix in FP8, with a scale for each row: a row is its codes times its scale."""

    codes: torch.Tensor  # FP8 [N, K]
    scales: torch.Tensor  # float32 [N]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]


def linear_fp8_ref(x: torch.Tensor, weight: Fp8Matrix) -> torch.Tensor:
    """x [M, K], weight [N, K] -> float32 [M, N].

    Codes are multiplied as they are, and the sum by the row's scale.
    """
    parts = [F.linear(x, rows.to(x.dtype)).float() for rows in weight.codes.split(ROWS_AT_ONCE)]
    return torch.cat(parts, dim=1) * weight.scales


def quantize_rows(weight: torch.Tensor) -> Fp8Matrix:
    """weight [N, K]; a row's scale maps its largest number to 448. Rows of zeros have the scale 1."""
    codes = torch.empty(weight.shape, dtype=FP8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for start in range(0, len(weight), ROWS_AT_ONCE):
        rows = weight[start : start + ROWS_AT_ONCE].float()
        largest = rows.abs().amax(dim=1)
        scale = torch.where(largest > 0, largest / LARGEST, 1.0)
        codes[start : start + ROWS_AT_ONCE] = quantize_fp8(rows, scale.unsqueeze(1))
        scales[start : start + ROWS_AT_ONCE] = scale
    return Fp8Matrix(codes, scales)
