"""Rotary embedding, half-split ("neox") pairs, with YaRN scaling as gpt-oss uses it.

YaRN: Peng et al. 2023 (arXiv 2309.00071), sections 3.2 and 3.4. gpt-oss does not truncate the ramp bounds to
integers, and its concentration 0.1 ln(factor) + 1 scales cosine and sine alike.

Shapes: T tokens, N heads, D head_dim.
"""

from __future__ import annotations

import math

import torch

from gptoss.kernels.layers import RopeScaling


class Rotation:
    """Makes the cosines and sines of positions."""

    def __init__(self, head_dim: int, rope: RopeScaling, device: torch.device) -> None:
        frequencies, self._concentration = yarn_inverse_frequencies(
            head_dim, rope.theta, rope.factor, rope.beta_fast, rope.beta_slow, rope.original_max_position
        )
        self._inverse_frequencies = frequencies.to(device)

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions int [T] -> cos, sin float32 [T, 1, D / 2]."""
        return rope_tables(positions, self._inverse_frequencies, self._concentration)


def yarn_inverse_frequencies(
    head_dim: int, theta: float, factor: float, beta_fast: float, beta_slow: float, original_max_position: int
) -> tuple[torch.Tensor, float]:
    """Returns the inverse frequencies, float32 [D / 2] in radians per token, and the concentration."""
    base = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if factor <= 1.0:
        return 1.0 / base, 1.0
    half = head_dim / 2

    def rotations_to_index(rotations: float) -> float:
        return half * math.log(original_max_position / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = rotations_to_index(beta_fast), rotations_to_index(beta_slow)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / (factor * base)) * ramp + (1.0 / base) * (1 - ramp), 0.1 * math.log(factor) + 1.0


def rope_tables(
    positions: torch.Tensor, inverse_frequencies: torch.Tensor, concentration: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """positions int [T] -> cos, sin float32 [T, 1, D / 2]."""
    angles = (positions.float().unsqueeze(-1) * inverse_frequencies).unsqueeze(1)
    return angles.cos() * concentration, angles.sin() * concentration


def apply_rope_ref(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [T, N, D], cos and sin [T, 1, D / 2] -> [T, N, D] in the dtype of `x`, rotated in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
