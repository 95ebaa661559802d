"""gpt-oss, top to bottom: gpt-oss model card, section 2, and OpenAI's reference implementation.

Shapes: T tokens of all sequences in the batch one after another, H hidden, N query heads, G key-value heads,
D head_dim, V vocabulary, R sequences to sample from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from src.engine.config import SLIDING, ModelConfig
from src.engine.model.weights import LayerWeights, ModelWeights
from src.kernels.attention import (
    DecodePlan,
    PrefillPlan,
    decode_attention_ref,
    prefill_attention_ref,
)
from src.kernels.kv_cache import store_kv_ref
from src.kernels.moe import moe_forward_ref, route_ref
from src.kernels.rms_norm import rms_norm_ref
from src.kernels.rope import apply_rope_ref, rope_tables, yarn_inverse_frequencies


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where this step reads and writes the cache, for all layers of one kind (full or sliding)."""

    slot_mapping: torch.Tensor  # int64 [T]
    decode: DecodePlan | None  # the first `num_decodes` rows of the batch
    prefills: list[PrefillPlan]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input. Sequences with one new token come first."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    num_decodes: int
    plans: dict[str, AttentionPlan]  # layer type -> plan
    sample_rows: torch.Tensor  # int64 [R], rows whose logits are wanted


@dataclass(frozen=True, slots=True)
class LayerCache:
    key: torch.Tensor  # [num_blocks, block_size, G, D]
    value: torch.Tensor


class GptOss:
    """The model over its weights. Holds no request state: the cache is the caller's."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self.weights = weights
        self._scale = config.head_dim**-0.5
        self._inverse_frequencies, self._concentration = yarn_inverse_frequencies(
            config.head_dim,
            config.rope_theta,
            config.rope_factor,
            config.rope_beta_fast,
            config.rope_beta_slow,
            config.rope_original_max_position,
        )
        self._inverse_frequencies = self._inverse_frequencies.to(weights.embedding.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: list[LayerCache]) -> torch.Tensor:
        """-> logits float32 [R, V] of `batch.sample_rows`; writes the new keys and values into `cache`."""
        x = F.embedding(batch.token_ids, self.weights.embedding)
        rope = rope_tables(batch.positions, self._inverse_frequencies, self._concentration)
        for index, layer in enumerate(self.weights.layers):
            x = x + self._attention(
                x, layer, self.config.layer_types[index], batch, cache[index], rope
            )
            x = x + self._mlp(x, layer)
        x = rms_norm_ref(x[batch.sample_rows], self.weights.final_norm, self.config.rms_norm_eps)
        return F.linear(x, self.weights.lm_head).float()

    def _attention(
        self,
        x: torch.Tensor,
        layer: LayerWeights,
        layer_type: str,
        batch: ForwardBatch,
        cache: LayerCache,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        c = self.config
        t = rms_norm_ref(x, layer.attention_norm, c.rms_norm_eps)
        qkv = F.linear(t, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, c.head_dim)
        query, key, value = qkv.split(
            [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads], dim=1
        )
        query, key = apply_rope_ref(query, *rope), apply_rope_ref(key, *rope)
        plan = batch.plans[layer_type]
        store_kv_ref(key, value, cache.key, cache.value, plan.slot_mapping)
        window = c.sliding_window if layer_type == SLIDING else None

        parts = []
        if plan.decode is not None:
            rows = query[: batch.num_decodes]
            parts.append(
                decode_attention_ref(
                    rows, cache.key, cache.value, layer.sinks, plan.decode, self._scale
                )
            )
        for p in plan.prefills:
            rows = query[p.first_token : p.first_token + p.num_tokens]
            parts.append(
                prefill_attention_ref(
                    rows, cache.key, cache.value, layer.sinks, p, window, self._scale
                )
            )
        attended = parts[0] if len(parts) == 1 else torch.cat(parts)
        return F.linear(attended.flatten(1), layer.out, layer.out_bias)

    def _mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        t = rms_norm_ref(x, layer.mlp_norm, self.config.rms_norm_eps)
        experts, weights = route_ref(
            F.linear(t, layer.router, layer.router_bias), self.config.experts_per_token
        )
        return moe_forward_ref(t, experts, weights, layer.experts, self.config.swiglu_limit)
