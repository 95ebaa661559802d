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
from src.kernels.attention import AttentionPlan, paged_attention
from src.kernels.kv_cache import rope_and_store
from src.kernels.linear import linear
from src.kernels.moe import moe_forward
from src.kernels.rms_norm import rms_norm
from src.kernels.rope import rope_tables, yarn_inverse_frequencies


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's input."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
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
        c = self.config
        x = F.embedding(batch.token_ids, self.weights.embedding)
        rope = rope_tables(batch.positions, self._inverse_frequencies, self._concentration)
        for index, layer in enumerate(self.weights.layers):
            layer_type = c.layer_types[index]
            x = self._attention(x, layer, layer_type, batch.plans[layer_type], cache[index], rope)
            x = self._mlp(x, layer)
        x = rms_norm(x[batch.sample_rows], self.weights.final_norm, c.rms_norm_eps)
        return linear(x, self.weights.lm_head, out_dtype=torch.float32)

    def _attention(
        self,
        x: torch.Tensor,
        layer: LayerWeights,
        layer_type: str,
        plan: AttentionPlan,
        cache: LayerCache,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        c = self.config
        t = rms_norm(x, layer.attention_norm, c.rms_norm_eps)
        qkv = linear(t, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, c.head_dim)
        qkv = rope_and_store(
            qkv, rope, cache.key, cache.value, plan.slot_mapping, c.num_attention_heads
        )
        window = c.sliding_window if layer_type == SLIDING else None
        t = paged_attention(qkv, cache.key, cache.value, layer.sinks, plan, window, self._scale)
        return linear(t, layer.out, layer.out_bias, residual=x)

    def _mlp(self, x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        c = self.config
        t = rms_norm(x, layer.mlp_norm, c.rms_norm_eps)
        logits = linear(t, layer.router, layer.router_bias)
        return moe_forward(
            t, logits, c.experts_per_token, layer.experts, c.swiglu_limit, residual=x
        )
