"""gpt-oss on the Triton kernels: the same model, each block a few fused kernels.

Shapes: see model/gpt_oss.py.
"""

from __future__ import annotations

import torch

from gptoss.engine.model.forward_batch import ForwardBatch, LayerCache
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.model.model_config import SLIDING, ModelConfig
from gptoss.engine.model.weights import LayerWeights, ModelWeights
from gptoss.engine.parallel.communicator import Communicator
from gptoss.kernels.reference.rope import rope_tables
from gptoss.kernels.triton import fused_layers
from gptoss.kernels.triton.mxfp4_layout import PackedExperts


class TritonGptOss(GptOss):
    """`invariant`: a token's bits do not depend on the rest of the batch. Experts that are not in MXFP4 are computed by
    plain torch."""

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, comm: Communicator, *, max_positions: int, invariant: bool
    ) -> None:
        super().__init__(config, weights, comm)
        self._invariant = invariant
        device = self._inverse_frequencies.device
        tables = rope_tables(torch.arange(max_positions, device=device), self._inverse_frequencies, self._concentration)
        cos, sin = (t.squeeze(1) for t in tables)
        self._rope_table = torch.stack((cos, sin), dim=1)  # [positions, 2, D / 2]
        self._rope = (cos, sin)

    def _rotation(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor]:
        return self._rope  # the kernels look positions up

    def _layer(
        self,
        x: torch.Tensor,
        index: int,
        batch: ForwardBatch,
        cache: LayerCache,
        rope: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        c, layer = self.config, self.weights.layers[index]
        layer_type = c.layer_types[self._shard.layers[index]]
        plan = batch.plans[layer_type]
        assert plan.ragged is not None, "build_batch makes it where the Triton kernels run"
        query = fused_layers.norm_qkv(
            x,
            layer.attention_norm,
            c.rms_norm_eps,
            layer.qkv,
            layer.qkv_bias,
            batch.positions,
            self._rope_table,
            plan.slot_mapping,
            cache.key,
            cache.value,
            len(self._shard.query_heads),
            invariant=self._invariant,
        )
        window = c.sliding_window if layer_type == SLIDING else None
        t = fused_layers.paged_attention(
            query, cache.key, cache.value, layer.sinks, plan.ragged, window, self._scale, invariant=self._invariant
        )
        x = self._comm.all_reduce(
            fused_layers.linear(t, layer.out, layer.out_bias, self._once(x), None, invariant=self._invariant)
        )
        return self._comm.all_reduce(self._experts(x, layer, batch))

    def _experts(self, x: torch.Tensor, layer: LayerWeights, batch: ForwardBatch) -> torch.Tensor:
        c, experts = self.config, layer.experts
        if not isinstance(experts, PackedExperts):
            return self._mlp(x, layer)
        assert batch.num_tokens is not None, "build_batch makes it where the Triton kernels run"
        return fused_layers.norm_moe(
            x,
            self._once(x),
            layer.mlp_norm,
            c.rms_norm_eps,
            layer.router,
            layer.router_bias,
            experts,
            c.experts_per_token,
            c.swiglu_limit,
            batch.num_tokens,
            local=self._local_experts,
            invariant=self._invariant,
        )

    def _head(self, x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        norm, head = self.weights.final_norm, self.weights.lm_head
        assert norm is not None and head is not None, "only the last stage has them"
        return fused_layers.norm_head(x, rows, norm, self.config.rms_norm_eps, head, out, invariant=self._invariant)
