"""What the kernels are given: the sizes all layers of a rank share, a layer's weights, its cache.

Shapes, all of one rank: T tokens, H hidden, N query heads, G key-value heads, D head_dim, E experts, I intermediate, V
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from gptoss.kernels.fp8 import FP8, Fp8Matrix
from gptoss.kernels.int8 import Int8Matrix
from gptoss.kernels.lora import LayerLora
from gptoss.kernels.mxfp4 import AlternatingMxfp4, GgufGateUp, GgufMxfp4, Mxfp4Tensor

# layers that attend alike: indexes of block tables, windows and attention metadata
FULL_GROUP, SLIDING_GROUP, WIDE_GROUP = 0, 1, 2

DenseWeight = torch.Tensor | Int8Matrix  # [outputs, inputs]; int8 only where a backend's prepare_layer makes it


def cache_group(group: int) -> int:
    """The group whose block tables a layer uses.

    The keys of a wide window are kept like those of full attention.
    """
    return FULL_GROUP if group == WIDE_GROUP else group


@dataclass(frozen=True, slots=True)
class SharedRows:
    """A matrix [N, K] many of whose rows are equal: each distinct row once."""

    rows: DenseWeight  # [D, K]
    row_of: torch.Tensor  # int64 [N], index into `rows`


HeadWeight = DenseWeight | Fp8Matrix | SharedRows
HeadDtype = Literal["auto", "fp8"]  # auto: as the other weights


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN's parameters, or those of Llama 3 where `low_freq_factor` is set (reference/rope.py)."""

    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position: int
    truncate: bool = False  # round the bounds of YaRN's ramp outwards
    attention_factor: float | None = None  # of YaRN's cosines and sines; None: 0.1 ln(factor) + 1
    low_freq_factor: float | None = None
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """The sizes and constants of a rank's layers."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # by group: tokens that a token sees, itself included; None: all
    rope: RopeScaling
    max_positions: int
    rms_norm_eps: float
    num_experts: int  # of all ranks
    local_experts: range | None  # this rank's, where ranks share them out
    experts_per_token: int
    swiglu_limit: float

    @property
    def attention_scale(self) -> float:
        return float(self.head_dim**-0.5)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Matrices in MXFP4, or dense in the compute type.

    The rows of w1 are the I gate rows, then the I up rows.
    """

    w1: torch.Tensor | Mxfp4Tensor  # [E, 2 I, H]
    b1: torch.Tensor  # [E, 2 I]
    w2: torch.Tensor | Mxfp4Tensor  # [E, H, I]
    b2: torch.Tensor  # [E, H]


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """MXFP4 matrices in the order of the file. Shapes: as ExpertWeights.

    The rows of b1 are the gate half first.
    """

    w1: AlternatingMxfp4 | GgufGateUp
    b1: torch.Tensor
    w2: Mxfp4Tensor | GgufMxfp4
    b2: torch.Tensor


@dataclass(frozen=True, slots=True)
class PackedMxfp4:
    """Expert matrices [E, N, K] in the order of the Triton kernels (triton/mxfp4_layout.py)."""

    words: torch.Tensor
    scales: torch.Tensor
    num_columns: int

    @property
    def num_rows(self) -> int:
        return self.words.shape[1] * self.words.shape[3]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """Shapes: as ExpertWeights. The rows of w1 are in gate_up_order, those of b1 gate half first."""

    w1: PackedMxfp4
    b1: torch.Tensor
    w2: PackedMxfp4
    b2: torch.Tensor


@dataclass(frozen=True, slots=True)
class LayerWeights:
    group: int  # FULL_GROUP or SLIDING_GROUP
    attention_norm: torch.Tensor  # [H]
    qkv: DenseWeight  # [(N + 2 G) D, H]: rows of Q first, then K, then V
    qkv_bias: torch.Tensor
    sinks: torch.Tensor  # [N]
    out: DenseWeight  # [H, N D]
    out_bias: torch.Tensor
    mlp_norm: torch.Tensor  # [H]
    router: torch.Tensor  # [E, H]
    router_bias: torch.Tensor
    experts: ExpertWeights | StoredExperts | PackedExperts
    lora: LayerLora | None = None  # where adapters may be loaded


@dataclass(frozen=True, slots=True)
class LayerCache:
    """In FP8 (kernels/fp8.py) a key is its code times `key_scale`; else scales are not used."""

    key: torch.Tensor  # [num_blocks, block_size, G, D]
    value: torch.Tensor
    key_scale: float = field(default=1.0, kw_only=True)
    value_scale: float = field(default=1.0, kw_only=True)

    @property
    def is_fp8(self) -> bool:
        return self.key.dtype == FP8
