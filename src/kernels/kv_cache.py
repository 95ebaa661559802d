"""Rotating queries and keys, and writing keys and values into the block-structured cache.

Shapes: T tokens, NB blocks, BS tokens a block, G key-value heads, D head_dim.
    key_cache, value_cache  [NB, BS, G, D]
    slot_mapping            int64 [T], slot = block * BS + offset
"""

from __future__ import annotations

import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.reference.kv_cache import store_kv_ref
from gptoss.kernels.reference.rope import apply_rope_ref


def rope_and_store(
    qkv: torch.Tensor,
    rope: tuple[torch.Tensor, torch.Tensor],
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    num_heads: int,
) -> torch.Tensor:
    """qkv [T, N + 2 G, D], queries first -> the same with queries and keys rotated; `qkv` itself may be changed."""
    if native.supports(qkv):
        native.rope_and_store(qkv, *rope, slot_mapping, key_cache, value_cache, num_heads)
        return qkv
    num_groups = key_cache.shape[2]
    rotated = apply_rope_ref(qkv[:, : num_heads + num_groups], *rope)
    value = qkv[:, num_heads + num_groups :]
    store_kv_ref(rotated[:, num_heads:], value, key_cache, value_cache, slot_mapping)
    return torch.cat((rotated, value), dim=1)
