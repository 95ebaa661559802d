"""Plain torch on any device and in any type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gptoss.kernels.device_copy import to_device
from gptoss.kernels.fp8 import Fp8Matrix, linear_fp8_ref, quantize_rows
from gptoss.kernels.layers import (
    DenseWeight,
    ExpertWeights,
    HeadDtype,
    HeadWeight,
    LayerCache,
    LayerShape,
    LayerWeights,
    cache_group,
)
from gptoss.kernels.lora import Module, StepLora, step_lora
from gptoss.kernels.reference.attention import (
    ReferenceAttentionMetadata,
    attention_metadata,
    decode_attention_ref,
    prefill_attention_ref,
)
from gptoss.kernels.reference.kv_cache import store_kv_ref
from gptoss.kernels.reference.linear import linear_ref
from gptoss.kernels.reference.lora import LoraRows
from gptoss.kernels.reference.moe import moe_forward_ref, only_local_ref, route_ref
from gptoss.kernels.reference.rms_norm import rms_norm_ref
from gptoss.kernels.reference.rope import Rotation, apply_rope_ref
from gptoss.kernels.step_layout import StepLayout


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    rope: tuple[torch.Tensor, torch.Tensor]  # cosines and sines float32 [T, 1, D / 2]
    attention: tuple[ReferenceAttentionMetadata, ...]  # by group
    lora: StepLora | None = None


QKV: tuple[Module, Module, Module] = ("q", "k", "v")


class ReferenceBackend:
    """The residual stream may be wider than `dtype`, the type of the weights."""

    name = "torch"
    is_batch_invariant = False  # torch's matrix products round differently for other shapes
    reads_mxfp4 = False
    reads_stored_experts = False
    min_block_size = 1

    def __init__(
        self, shape: LayerShape, dtype: torch.dtype, device: torch.device, *, lm_head_dtype: HeadDtype = "auto"
    ) -> None:
        self._lm_head_dtype = lm_head_dtype
        self.shape = shape
        self.dtype = dtype
        self.device = device
        self._rotation = Rotation(shape.head_dim, shape.rope, device)

    def for_shape(self, shape: LayerShape) -> ReferenceBackend:
        return ReferenceBackend(shape, self.dtype, self.device)

    def prepare_layer(self, layer: LayerWeights) -> LayerWeights:
        return layer

    def prepare_head(self, weight: torch.Tensor) -> HeadWeight:
        return quantize_rows(weight) if self._lm_head_dtype == "fp8" else weight

    def prepare_step(self, layout: StepLayout) -> ReferenceStep:
        attention = tuple(
            attention_metadata(layout, cache_group(group), window, self.dtype, self.device)
            for group, window in enumerate(self.shape.windows)
        )
        rope = self._rotation.tables(to_device(layout.positions, torch.int64, self.device))
        return ReferenceStep(rope, attention, step_lora(layout.token_adapters, self.device))

    def layer_stack(self, layers: list[LayerWeights]) -> None:
        return None

    def norm_qkv(self, x: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: ReferenceStep) -> torch.Tensor:
        s = self.shape
        t = self._norm(x, layer.attention_norm)
        assert isinstance(layer.qkv, torch.Tensor)
        qkv = linear_ref(t, layer.qkv, layer.qkv_bias)
        lora = LoraRows.of(layer.lora, step.lora)
        if lora is not None:
            queries, keys = s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim
            parts = zip(QKV, qkv.split((queries, keys, keys), dim=1), strict=True)
            for module, part in parts:
                lora.add(module, t, part)
        qkv = qkv.view(x.shape[0], -1, s.head_dim)
        rotated = apply_rope_ref(qkv[:, : s.num_heads + s.num_kv_heads], *step.rope)
        value = qkv[:, s.num_heads + s.num_kv_heads :]
        slots = step.attention[layer.group].slot_mapping
        store_kv_ref(rotated[:, s.num_heads :], value, cache, slots)
        return rotated

    def attention(
        self, query: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: ReferenceStep
    ) -> torch.Tensor:
        metadata, scale = step.attention[layer.group], self.shape.attention_scale
        query = query[:, : self.shape.num_heads]
        parts = []
        if metadata.decode is not None:
            rows = query[: metadata.num_decodes]
            parts.append(decode_attention_ref(rows, cache, layer.sinks, metadata.decode, scale))
        for p in metadata.prefills:
            rows = query[p.first_token : p.first_token + p.num_tokens]
            parts.append(prefill_attention_ref(rows, cache, layer.sinks, p, metadata.window, scale))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def linear(
        self, x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        assert isinstance(weight, torch.Tensor)
        return linear_ref(x, weight, bias, residual)

    def add_out_lora(self, out: torch.Tensor, x: torch.Tensor, layer: LayerWeights, step: ReferenceStep) -> None:
        lora = LoraRows.of(layer.lora, step.lora)
        if lora is not None:
            lora.add("out", x, out)

    def norm_moe(self, x: torch.Tensor, layer: LayerWeights, residual: torch.Tensor, step: Any) -> torch.Tensor:
        s = self.shape
        assert isinstance(layer.experts, ExpertWeights), "packed experts are for the Triton kernels"
        t = self._norm(x, layer.mlp_norm)
        lora = LoraRows.of(layer.lora, step.lora)
        logits = linear_ref(t, layer.router, layer.router_bias)
        if lora is not None:
            lora.add("router", t, logits)
        experts, weights = route_ref(logits, s.experts_per_token)
        if s.local_experts is not None:
            experts, weights = only_local_ref(experts, weights, s.local_experts)
        return residual + moe_forward_ref(t, experts, weights, layer.experts, s.swiglu_limit, lora)

    def norm_head(
        self, x: torch.Tensor, rows: torch.Tensor, norm: torch.Tensor, head: HeadWeight, step: object
    ) -> torch.Tensor:
        t = self._norm(x[rows], norm)
        if isinstance(head, Fp8Matrix):
            return linear_fp8_ref(t, head)
        assert isinstance(head, torch.Tensor)
        return linear_ref(t, head, out_dtype=torch.float32)

    def _norm(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return rms_norm_ref(x, scale, self.shape.rms_norm_eps, out_dtype=self.dtype)
