"""Rotary embedding, half-split ("neox") pairs, with YaRN scaling as gpt-oss uses it, or Llama 3's.

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
        if rope.low_freq_factor is not None:
            frequencies, concentration = llama3_inverse_frequencies(head_dim, rope, rope.low_freq_factor), 1.0
        else:
            frequencies, concentration = yarn_inverse_frequencies(
                head_dim,
                rope.theta,
                rope.factor,
                rope.beta_fast,
                rope.beta_slow,
                rope.original_max_position,
                truncate=rope.truncate,
            )
        self._concentration = concentration if rope.attention_factor is None else rope.attention_factor
        self._inverse_frequencies = frequencies.to(device)

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions int [T] -> cos, sin float32 [T, 1, D / 2]."""
        return rope_tables(positions, self._inverse_frequencies, self._concentration)


def yarn_inverse_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_position: int,
    *,
    truncate: bool = False,
) -> tuple[torch.Tensor, float]:
    """Returns the inverse frequencies, float32 [D / 2] in radians per token, and the concentration.

    `truncate` rounds the bounds of the ramp outwards, as transformers does by default.
    """
    base = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if factor <= 1.0:
        return 1.0 / base, 1.0
    half = head_dim / 2

    def rotations_to_index(rotations: float) -> float:
        return half * math.log(original_max_position / (rotations * 2 * math.pi)) / math.log(theta)

    low, high = rotations_to_index(beta_fast), rotations_to_index(beta_slow)
    if truncate:
        low, high = max(0, math.floor(low)), min(head_dim - 1, math.ceil(high))
    if low == high:  # as in transformers
        high += 0.001
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / (factor * base)) * ramp + (1.0 / base) * (1 - ramp), 0.1 * math.log(factor) + 1.0


def llama3_inverse_frequencies(head_dim: int, rope: RopeScaling, low_freq_factor: float) -> torch.Tensor:
    """Returns the inverse frequencies of Llama 3.1, float32 [D / 2] in radians per token.

    Wavelengths above original_max_position / low_freq_factor are stretched by `factor`, those below
    original_max_position / high_freq_factor stay, and those between are interpolated.
    """
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    turns = rope.original_max_position * plain / (2 * math.pi)
    kept = ((turns - low_freq_factor) / (rope.high_freq_factor - low_freq_factor)).clamp(0, 1)
    return plain * (kept + (1 - kept) / rope.factor)


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
