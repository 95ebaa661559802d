"""Dense matrices in int8: a row is its integers from -127 to 127 times one float32.

Shapes: N rows, K columns. A product with a row is the sum of x times its integers, multiplied by its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

COLUMN_GROUP = 32  # stored rows end with zeros up to a multiple of it


def padded_columns(num_columns: int) -> int:
    """The columns of a stored row."""
    return -(-num_columns // COLUMN_GROUP) * COLUMN_GROUP


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    values: torch.Tensor  # int8 [N, padded K]
    scales: torch.Tensor  # float32 [N]
    num_columns: int

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scales), self.num_columns


def dequantize_int8(w: Int8Matrix, dtype: torch.dtype) -> torch.Tensor:
    """Returns the matrix [N, K] in `dtype`."""
    return (w.values[:, : w.num_columns].to(dtype) * w.scales.to(dtype).unsqueeze(1)).contiguous()
