"""The layers of one rank through the compiled CPU kernels, a whole step in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gptoss.engine.model.model_config import FULL, SLIDING, ModelConfig
from gptoss.engine.model.weights import LayerWeights
from gptoss.kernels.attention import AttentionPlan
from gptoss.kernels.cpu import native
from gptoss.kernels.mxfp4 import Mxfp4Tensor
from gptoss.kernels.reference.moe import ExpertWeights

if TYPE_CHECKING:
    from gptoss.engine.model.forward_batch import LayerCache

PLANS = (FULL, SLIDING)  # their places in the call's table
NUM_POINTERS = 17


class NativeLayers:
    """Holds a table of the weights' addresses (kernels/cpu/decoder.h); the tensors must stay where they are."""

    def __init__(self, config: ModelConfig, kinds: list[str], layers: list[LayerWeights]) -> None:
        """`kinds`: each layer's type."""
        self._config = config
        self._kinds = kinds
        self._layers = layers
        self._cache: list[LayerCache] | None = None
        self._table = torch.empty(0)

    def __call__(
        self,
        x: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        plans: dict[str, AttentionPlan],
        cache: list[LayerCache],
    ) -> torch.Tensor:
        """x bfloat16 [T, H], changed in place; rope: cosines and sines float32 [T, 1, D / 2]. -> [T, H]."""
        if cache is not self._cache:
            self._table, self._cache = self._addresses(cache), cache
        found = [plans[kind] for kind in PLANS]
        rows = [[t.data_ptr() for t in (p.slot_mapping, *(p.spans or ()))] for p in found]
        c = self._config
        native.decoder(
            self._table,
            torch.tensor(rows),
            x,
            *rope,
            c.rms_norm_eps,
            c.head_dim**-0.5,
            c.swiglu_limit,
            c.num_attention_heads,
            c.num_key_value_heads,
            c.num_experts,
            c.experts_per_token,
            self._intermediate,
        )
        return x

    @property
    def _intermediate(self) -> int:
        experts = self._layers[0].experts
        assert isinstance(experts, ExpertWeights)
        return experts.b1.shape[1] // 2

    def _addresses(self, cache: list[LayerCache]) -> torch.Tensor:
        """int64 [L, NUM_POINTERS + 1]."""
        rows = []
        for kind, layer, pair in zip(self._kinds, self._layers, cache, strict=True):
            experts = layer.experts
            assert isinstance(experts, ExpertWeights)
            tensors = [
                layer.attention_norm,
                layer.qkv,
                layer.qkv_bias,
                layer.sinks,
                layer.out,
                layer.out_bias,
                layer.mlp_norm,
                layer.router,
                layer.router_bias,
                *_parts(experts.w1),
                experts.b1,
                *_parts(experts.w2),
                experts.b2,
                pair.key,
                pair.value,
            ]
            assert len(tensors) == NUM_POINTERS
            assert all(t is None or t.is_contiguous() for t in tensors)
            rows.append([*(0 if t is None else t.data_ptr() for t in tensors), PLANS.index(kind)])
        return torch.tensor(rows)


def _parts(w: torch.Tensor | Mxfp4Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    return (w.blocks, w.scales) if isinstance(w, Mxfp4Tensor) else (w, None)
