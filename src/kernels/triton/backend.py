"""The Triton kernels, in bfloat16. Experts that are not in MXFP4 are computed by plain torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gptoss.kernels.fp8 import Fp8Matrix
from gptoss.kernels.layers import (
    DenseWeight,
    ExpertWeights,
    HeadDtype,
    HeadWeight,
    LayerCache,
    LayerShape,
    LayerWeights,
    PackedExperts,
    cache_group,
)
from gptoss.kernels.lora import StepLora
from gptoss.kernels.mxfp4 import Mxfp4Tensor
from gptoss.kernels.reference.backend import ReferenceBackend
from gptoss.kernels.reference.kv_cache import store_kv_ref
from gptoss.kernels.reference.rope import Rotation
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton import dense, fused_layers
from gptoss.kernels.triton.lora import LayerAdapters
from gptoss.kernels.triton.metadata import TritonStep, triton_step
from gptoss.kernels.triton.mxfp4_layout import gate_up_order, pack_experts


class TritonBackend:
    """The Triton kernels. `batch_invariant`: a token's bits do not depend on the rest of the batch."""

    name = "triton"
    reads_mxfp4 = True
    reads_stored_experts = False
    min_block_size = 16  # the narrowest tile of keys that the matrix instructions take

    def __init__(
        self,
        shape: LayerShape,
        dtype: torch.dtype,
        device: torch.device,
        *,
        batch_invariant: bool = False,
        lm_head_dtype: HeadDtype = "auto",
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self.is_batch_invariant = batch_invariant
        self._plain = ReferenceBackend(shape, dtype, device, lm_head_dtype=lm_head_dtype)
        tables = Rotation(shape.head_dim, shape.rope, device).tables(torch.arange(shape.max_positions, device=device))
        self._rope = torch.stack([t.squeeze(1) for t in tables], dim=1)  # [positions, 2, D / 2]

    def for_shape(self, shape: LayerShape) -> TritonBackend:
        return TritonBackend(shape, self.dtype, self.device, batch_invariant=self.is_batch_invariant)

    def prepare_layer(self, layer: LayerWeights) -> LayerWeights:
        """MXFP4 experts go into the order in which the kernels read them."""
        experts = layer.experts
        if not isinstance(experts, ExpertWeights):
            return layer
        w1, w2 = experts.w1, experts.w2
        if not isinstance(w1, Mxfp4Tensor) or not isinstance(w2, Mxfp4Tensor):
            return layer
        order = gate_up_order(w1.blocks.shape[1] // 2, w1.blocks.device)
        packed = PackedExperts(pack_experts(w1, order), experts.b1, pack_experts(w2), experts.b2)
        return replace(layer, experts=packed)

    def prepare_head(self, weight: torch.Tensor) -> HeadWeight:
        return self._plain.prepare_head(weight)

    def prepare_step(self, layout: StepLayout) -> TritonStep:
        return triton_step(layout, self.device)

    def layer_stack(self, layers: list[LayerWeights]) -> None:
        return None

    def norm_qkv(self, x: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: TritonStep) -> torch.Tensor:
        assert isinstance(layer.qkv, torch.Tensor)
        adapters = self._adapters(layer, step)
        slots = step.attention[cache_group(layer.group)].slot_mapping
        if adapters is not None and cache.is_fp8:
            return self._qkv_of_adapters_in_fp8(x, layer, cache, step, slots, adapters)
        query = self._qkv(x, layer, cache, step, slots)
        if adapters is not None:
            self._add_qkv(x, layer, cache, step, slots, adapters, query)
        return query

    def _qkv(
        self, x: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: TritonStep, slots: torch.Tensor
    ) -> torch.Tensor:
        assert isinstance(layer.qkv, torch.Tensor)
        return fused_layers.norm_qkv(
            x,
            layer.attention_norm,
            self.shape.rms_norm_eps,
            layer.qkv,
            layer.qkv_bias,
            step.positions,
            self._rope,
            slots,
            cache,
            self.shape.num_heads,
            invariant=self.is_batch_invariant,
        )

    def _add_qkv(
        self,
        x: torch.Tensor,
        layer: LayerWeights,
        cache: LayerCache,
        step: TritonStep,
        slots: torch.Tensor,
        adapters: LayerAdapters,
        query: torch.Tensor,
    ) -> None:
        scaled, r = dense.norm_tokens(x, layer.attention_norm, self.shape.rms_norm_eps)
        adapters.add_qkv(scaled, r, step.positions, self._rope, slots, query, cache.key, cache.value)

    def _qkv_of_adapters_in_fp8(
        self,
        x: torch.Tensor,
        layer: LayerWeights,
        cache: LayerCache,
        step: TritonStep,
        slots: torch.Tensor,
        adapters: LayerAdapters,
    ) -> torch.Tensor:
        """Adapters add to keys and values before these are rounded to FP8."""
        shape = (1, len(x), *cache.key.shape[2:])
        wide = LayerCache(*(torch.empty(shape, dtype=x.dtype, device=x.device) for _ in "kv"))
        rows = torch.arange(len(x), device=x.device)
        query = self._qkv(x, layer, wide, step, rows)
        self._add_qkv(x, layer, wide, step, rows, adapters, query)
        store_kv_ref(wide.key[0], wide.value[0], cache, slots)
        return query

    def _adapters(self, layer: LayerWeights, step: TritonStep) -> LayerAdapters | None:
        return None if layer.lora is None or step.lora is None else LayerAdapters(layer.lora, step.lora)

    def attention(self, query: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: TritonStep) -> torch.Tensor:
        s = self.shape
        return fused_layers.paged_attention(
            query,
            cache,
            layer.sinks,
            step.attention[cache_group(layer.group)],
            s.windows[layer.group],
            s.attention_scale,
            invariant=self.is_batch_invariant,
        )

    def linear(
        self, x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        assert isinstance(weight, torch.Tensor)
        return fused_layers.linear(x, weight, bias, residual, None, invariant=self.is_batch_invariant)

    def add_out_lora(self, out: torch.Tensor, x: torch.Tensor, layer: LayerWeights, step: TritonStep) -> None:
        adapters = self._adapters(layer, step)
        if adapters is not None:
            adapters.add("out", x, out)

    def norm_moe(self, x: torch.Tensor, layer: LayerWeights, residual: torch.Tensor, step: TritonStep) -> torch.Tensor:
        s = self.shape
        if not isinstance(layer.experts, PackedExperts):
            return self._plain.norm_moe(x, layer, residual, _PlainStep(_plain_lora(step)))
        return fused_layers.norm_moe(
            x,
            residual,
            layer.mlp_norm,
            s.rms_norm_eps,
            layer.router,
            layer.router_bias,
            layer.experts,
            s.experts_per_token,
            s.swiglu_limit,
            step.num_tokens,
            local=s.local_experts,
            invariant=self.is_batch_invariant,
            adapters=self._adapters(layer, step),
        )

    def norm_head(
        self, x: torch.Tensor, rows: torch.Tensor, norm: torch.Tensor, head: HeadWeight, step: TritonStep
    ) -> torch.Tensor:
        assert isinstance(head, (torch.Tensor, Fp8Matrix))
        eps = self.shape.rms_norm_eps
        return fused_layers.norm_head(x, rows, norm, eps, head, step.logits, invariant=self.is_batch_invariant)


@dataclass(frozen=True, slots=True)
class _PlainStep:
    """What plain torch needs of a step for the experts."""

    lora: StepLora | None


def _plain_lora(step: TritonStep) -> StepLora | None:
    """The step's adapters as the plain kernels take them."""
    if step.lora is None:
        return None
    groups = [(slot, torch.nonzero(step.lora.slots == slot).squeeze(1)) for slot in step.lora.slots_in_use]
    return StepLora(step.lora.slots, groups)
