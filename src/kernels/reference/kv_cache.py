"""Writing keys and values into the block-structured cache, in plain torch.

Shapes: T tokens, NB blocks, BS tokens a block, G key-value heads, D head_dim.
    key_cache, value_cache  [NB, BS, G, D]
    slot_mapping            int64 [T], slot = block * BS + offset
"""

from __future__ import annotations

import torch


def store_kv_ref(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """key, value [T, G, D] -> into the caches, at `slot_mapping`."""
    key_cache.flatten(0, 1).index_copy_(0, slot_mapping, key)
    value_cache.flatten(0, 1).index_copy_(0, slot_mapping, value)
