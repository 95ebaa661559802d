"""One step's input to the model, and the cache that it writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptoss.kernels.attention import AttentionPlan


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    plans: dict[str, AttentionPlan]  # layer type -> plan
    sample_rows: torch.Tensor  # int64 [R], rows whose logits are wanted
    num_tokens: torch.Tensor | None = None  # int32 [1], for the Triton kernels: rows after these are padding
    logits: torch.Tensor | None = None  # float32 [R, V], for the Triton kernels: where to write


@dataclass(frozen=True, slots=True)
class LayerCache:
    key: torch.Tensor  # [num_blocks, block_size, G, D]
    value: torch.Tensor
