"""Writing keys and values into the block-structured cache, and reading them, in plain torch.

Shapes: T tokens, NB blocks, BS tokens a block, G key-value heads, D head_dim.
    key_cache, value_cache  [NB, BS, G, D]
    slot_mapping            int64 [T], slot = block * BS + offset
"""

from __future__ import annotations

import torch

from gptoss.kernels.fp8 import FP8, dequantize_fp8, quantize_fp8
from gptoss.kernels.layers import LayerCache


def store_kv_ref(key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slot_mapping: torch.Tensor) -> None:
    """key, value [T, G, D] -> into the caches, at `slot_mapping`."""
    for new, stored, scale in ((key, cache.key, cache.key_scale), (value, cache.value, cache.value_scale)):
        rows = stored.flatten(0, 1)
        if stored.dtype == FP8:  # torch moves bytes, but not numbers of this type
            new, rows = quantize_fp8(new, scale).view(torch.uint8), rows.view(torch.uint8)
        rows.index_copy_(0, slot_mapping, new)


def load_kv_ref(cache: LayerCache, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """slots int64 [S] -> keys and values [S, G, D] in `dtype`, that of the cache unless it is FP8."""
    found = []
    for stored, scale in ((cache.key, cache.key_scale), (cache.value, cache.value_scale)):
        rows = stored.flatten(0, 1)
        if stored.dtype == FP8:
            codes = rows.view(torch.uint8).index_select(0, slots).view(FP8)
            found.append(dequantize_fp8(codes, scale, dtype))
        else:
            found.append(rows.index_select(0, slots))
    return found[0], found[1]
