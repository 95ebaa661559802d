"""Attention over the block-structured cache in plain torch, with sinks and an optional window.

A sink is one more softmax column per query head with a learned logit and no value (gpt-oss model card, section 2.2).
With lse = log sum exp of the real columns, adding the sink multiplies the output by sigmoid(lse - sink); so any
attention that also returns lse serves, and the sink costs one multiplication.

Shapes: T query tokens, S cached tokens, N query heads, G key-value heads, Q = N / G, D head_dim, B sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gptoss.kernels.device_copy import to_device
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.reference.kv_cache import load_kv_ref
from gptoss.kernels.step_layout import StepLayout, first_key

QUERY_TILE = 512


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Where the cached tokens of the one-token sequences lie. The same for every layer of a group."""

    slots: torch.Tensor  # int64 [B * S], slots of the cached tokens; padding points at slot 0
    bias: torch.Tensor  # [B, 1, 1, S], 0 where the token may be seen, -inf elsewhere


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """One sequence's new tokens and the cached tokens that they may see.

    It is the same for every layer of a group.
    """

    first_token: int  # row of the first new token in the batch
    num_tokens: int
    first_position: int  # position of the first new token in its sequence
    first_key: int  # position of the first cached token that any new token sees
    slots: torch.Tensor  # int64 [S], slots of positions first_key ...


@dataclass(frozen=True, slots=True)
class ReferenceAttentionMetadata:
    """Where one step reads and writes the cache, for the layers of one group."""

    slot_mapping: torch.Tensor  # int64 [T], where the new keys and values go
    window: int | None
    num_decodes: int  # sequences with one new token, which come first in the batch
    decode: DecodePlan | None
    prefills: tuple[PrefillPlan, ...]


def attention_metadata(
    layout: StepLayout, group: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> ReferenceAttentionMetadata:
    """The attention's metadata for one step and group. `dtype`: of the queries."""
    decodes = layout.num_decodes
    return ReferenceAttentionMetadata(
        to_device(layout.slot_mapping(group), torch.int64, device),
        window,
        decodes,
        _decode_plan(layout, group, window, dtype, device) if decodes else None,
        tuple(_prefill_plan(layout, group, window, i, device) for i in range(decodes, len(layout.counts))),
    )


def _decode_plan(
    layout: StepLayout, group: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> DecodePlan:
    starts = layout.starts[: layout.num_decodes]
    seen = [np.arange(first_key(start, window), start + 1) for start in starts]
    width = max(map(len, seen))
    slots = np.zeros((len(seen), width), np.int64)
    hidden = np.ones((len(seen), width), bool)
    for i, positions in enumerate(seen):
        slots[i, : len(positions)] = layout.slots(layout.block_tables[group][i], positions)
        hidden[i, : len(positions)] = False
    bias = torch.zeros(hidden.shape, dtype=dtype)
    bias.masked_fill_(torch.from_numpy(hidden), float("-inf"))
    return DecodePlan(torch.from_numpy(slots.ravel()).to(device), bias[:, None, None].to(device))


def _prefill_plan(layout: StepLayout, group: int, window: int | None, index: int, device: torch.device) -> PrefillPlan:
    start, count = layout.starts[index], layout.counts[index]
    first = first_key(start, window)
    slots = layout.slots(layout.block_tables[group][index], np.arange(first, start + count))
    return PrefillPlan(int(layout.ends[index]) - count, count, start, first, torch.from_numpy(slots).to(device))


def decode_attention_ref(
    query: torch.Tensor, cache: LayerCache, sinks: torch.Tensor, plan: DecodePlan, scale: float
) -> torch.Tensor:
    """query [B, N, D], one new token for each sequence -> [B, N, D]."""
    num_seqs, num_heads, head_dim = query.shape
    num_groups = cache.key.shape[2]
    rows = load_kv_ref(cache, plan.slots, query.dtype)
    key, value = (x.view(num_seqs, -1, num_groups, head_dim) for x in rows)
    grouped = query.view(num_seqs, num_groups, -1, head_dim)  # the Q heads of a group are Q query rows of one head
    out, lse = _attend(grouped, key.transpose(1, 2), value.transpose(1, 2), plan.bias, scale)
    gate = torch.sigmoid(lse.reshape(num_seqs, num_heads) - sinks.float())
    return (out.reshape(num_seqs, num_heads, head_dim) * gate.unsqueeze(-1)).to(query.dtype)


def prefill_attention_ref(
    query: torch.Tensor,
    cache: LayerCache,
    sinks: torch.Tensor,
    plan: PrefillPlan,
    window: int | None,
    scale: float,
) -> torch.Tensor:
    """query [T, N, D] of one sequence, whose keys are in the cache already -> [T, N, D].

    `window` counts the token itself: a query at position p sees p - window + 1 ... p.
    """
    num_tokens, num_heads, head_dim = query.shape
    repeat = num_heads // cache.key.shape[2]
    rows = load_kv_ref(cache, plan.slots, query.dtype)
    key, value = (x.transpose(0, 1).repeat_interleave(repeat, dim=0) for x in rows)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    for start in range(0, num_tokens, QUERY_TILE):
        end = min(start + QUERY_TILE, num_tokens)
        positions = torch.arange(plan.first_position + start, plan.first_position + end, device=query.device)
        first_key = 0 if window is None else max(0, int(positions[0]) - window + 1 - plan.first_key)
        last_key = int(positions[-1]) + 1 - plan.first_key
        keys = torch.arange(plan.first_key + first_key, plan.first_key + last_key, device=query.device)
        visible = keys <= positions.unsqueeze(1)
        if window is not None:
            visible &= keys > positions.unsqueeze(1) - window
        bias = torch.zeros(visible.shape, dtype=query.dtype, device=query.device).masked_fill_(~visible, float("-inf"))
        tile, lse = _attend(
            query[start:end].transpose(0, 1).unsqueeze(0),
            key[:, first_key:last_key].unsqueeze(0),
            value[:, first_key:last_key].unsqueeze(0),
            bias[None, None],
            scale,
        )
        gate = torch.sigmoid(lse[0].float() - sinks.float().unsqueeze(1))  # [N, T]
        out[start:end] = (tile[0] * gate.unsqueeze(-1)).transpose(0, 1).to(query.dtype)
    return out


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, heads, T, D] each -> (softmax(scale q k + bias) v, log sum exp float32 [B, heads, T])."""
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
        return out, lse.float()
    scores = torch.matmul(query.float(), key.float().transpose(-1, -2)) * scale + bias
    lse = torch.logsumexp(scores, dim=-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp(), value.float()), lse
