"""Attention over the block-structured cache: where a step reads and writes it, and which kernel does so.

Shapes: T query tokens, S cached tokens, N query heads, G key-value heads, Q = N / G, D head_dim, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.reference.attention import DecodePlan, PrefillPlan, decode_attention_ref, prefill_attention_ref

TILE_TOKENS = 16  # of a sequence that a program of the Triton kernel takes


@dataclass(frozen=True, slots=True)
class Ragged:
    """The sequences of a step as the Triton kernel takes them. All int32, on the device."""

    query_start: torch.Tensor  # [B + 1], rows of the batch
    length: torch.Tensor  # [B], tokens in the cache, the new ones included; 0: padding
    block_table: torch.Tensor  # [B, L]
    num_decodes: int  # sequences of one new token, which come first
    tile_seq: torch.Tensor  # [P], the sequence of each tile of the others' tokens
    tile_first: torch.Tensor  # [P], the row of its first token


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where one step reads and writes the cache, for all layers of one kind (full or sliding)."""

    slot_mapping: torch.Tensor  # int64 [T], where the new keys and values go
    num_decodes: int  # sequences with one new token, which come first in the batch
    decode: DecodePlan | None = None
    prefills: tuple[PrefillPlan, ...] = ()
    spans: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # for native.attention
    ragged: Ragged | None = None  # for gpu.attention


def paged_attention(
    qkv: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sinks: torch.Tensor,
    plan: AttentionPlan,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """qkv [T, N + 2 G, D], rotated, its keys and values in the cache already -> [T, N D]."""
    if plan.spans is not None:
        return native.attention(qkv, key_cache, value_cache, sinks, plan.spans, scale)
    query = qkv[:, : sinks.shape[0]]
    parts = []
    if plan.decode is not None:
        rows = query[: plan.num_decodes]
        parts.append(decode_attention_ref(rows, key_cache, value_cache, sinks, plan.decode, scale))
    for p in plan.prefills:
        rows = query[p.first_token : p.first_token + p.num_tokens]
        parts.append(prefill_attention_ref(rows, key_cache, value_cache, sinks, p, window, scale))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
