"""The compiled CPU kernels, in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.cpu.layer_stack import CpuLayerStack
from gptoss.kernels.cpu.metadata import CpuStep, attention_metadata
from gptoss.kernels.cpu.shared_rows import share_rows
from gptoss.kernels.fp8 import Fp8Matrix
from gptoss.kernels.layers import (
    DenseWeight,
    HeadWeight,
    LayerCache,
    LayerShape,
    LayerWeights,
    PackedExperts,
    SharedRows,
    cache_group,
)
from gptoss.kernels.lora import step_lora
from gptoss.kernels.reference.moe import only_local_ref
from gptoss.kernels.reference.rope import Rotation
from gptoss.kernels.step_layout import StepLayout

DenseDtype = Literal["auto", "int8"]


class CpuBackend:
    """The compiled CPU kernels.

    With `dense_dtype` int8 the matrices of QKV, O and the head are int8; the router and biases stay in bfloat16.
    """

    name = "native"
    is_batch_invariant = True
    reads_mxfp4 = True
    reads_stored_experts = True
    min_block_size = 1
    dtype = torch.bfloat16
    device = torch.device("cpu")

    def __init__(self, shape: LayerShape, dense_dtype: DenseDtype = "auto") -> None:
        self.shape = shape
        self._dense_dtype = dense_dtype
        self._rotation = Rotation(shape.head_dim, shape.rope, self.device)

    def for_shape(self, shape: LayerShape) -> CpuBackend:
        return CpuBackend(shape)

    def prepare_layer(self, layer: LayerWeights) -> LayerWeights:
        return replace(layer, qkv=self._stored(layer.qkv), out=self._stored(layer.out))

    def prepare_head(self, weight: torch.Tensor) -> HeadWeight:
        shared = share_rows(weight)
        if shared is None:
            return self._stored(weight)
        return replace(shared, rows=self._stored(shared.rows))

    def _stored(self, weight: DenseWeight) -> DenseWeight:
        """The matrix in the type that the kernels read."""
        if self._dense_dtype == "int8" and isinstance(weight, torch.Tensor):
            return native.quantize_int8(weight)
        return weight

    def prepare_step(self, layout: StepLayout) -> CpuStep:
        attention = tuple(
            attention_metadata(layout, cache_group(group), window) for group, window in enumerate(self.shape.windows)
        )
        lora = step_lora(layout.token_adapters, self.device)
        return CpuStep(self._rotation.tables(torch.from_numpy(layout.positions)), attention, lora)

    def layer_stack(self, layers: list[LayerWeights]) -> CpuLayerStack | None:
        """Returns None if layers differ in their number of experts, of which the call takes one."""
        if len({layer.router_bias.shape[0] for layer in layers}) > 1:
            return None
        return CpuLayerStack(self.shape, layers)

    def norm_qkv(self, x: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: CpuStep) -> torch.Tensor:
        """The queries come with the keys and values after them."""
        t = native.rms_norm(x, layer.attention_norm, self.shape.rms_norm_eps)
        qkv = native.linear(t, layer.qkv, layer.qkv_bias)
        if step.lora is not None and layer.lora is not None:
            queries, keys = self.shape.num_heads * self.shape.head_dim, self.shape.num_kv_heads * self.shape.head_dim
            native.lora_linear(layer.lora, step.lora.slots, t, qkv, "q", [queries, keys, keys])
        qkv = qkv.view(x.shape[0], -1, self.shape.head_dim)
        slots = step.attention[layer.group].slot_mapping
        native.rope_and_store(qkv, *step.rope, slots, cache.key, cache.value, self.shape.num_heads)
        return qkv

    def attention(self, query: torch.Tensor, layer: LayerWeights, cache: LayerCache, step: CpuStep) -> torch.Tensor:
        metadata = step.attention[layer.group]
        return native.attention(query, cache.key, cache.value, layer.sinks, metadata, self.shape.attention_scale)

    def linear(
        self, x: torch.Tensor, weight: DenseWeight, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        return native.linear(x, weight, bias, residual)

    def add_out_lora(self, out: torch.Tensor, x: torch.Tensor, layer: LayerWeights, step: CpuStep) -> None:
        if step.lora is not None and layer.lora is not None:
            native.lora_linear(layer.lora, step.lora.slots, x, out, "out", [out.shape[1]])

    def norm_moe(self, x: torch.Tensor, layer: LayerWeights, residual: torch.Tensor, step: CpuStep) -> torch.Tensor:
        s, experts = self.shape, layer.experts
        assert not isinstance(experts, PackedExperts), "packed experts are for the Triton kernels"
        t = native.rms_norm(x, layer.mlp_norm, s.rms_norm_eps)
        logits = native.linear(t, layer.router, layer.router_bias)
        lora = None
        if step.lora is not None and layer.lora is not None:
            lora = layer.lora, step.lora.slots
            native.lora_linear(*lora, t, logits, "router", [logits.shape[1]])
        chosen, weights = native.route(logits.float(), s.experts_per_token)
        if s.local_experts is not None:
            chosen, weights = only_local_ref(chosen, weights, s.local_experts)
        matrices = (experts.w1, experts.b1, experts.w2, experts.b2)
        return native.moe(t, chosen, weights, *matrices, residual, s.swiglu_limit, lora)

    def norm_head(
        self, x: torch.Tensor, rows: torch.Tensor, norm: torch.Tensor, head: HeadWeight, step: CpuStep
    ) -> torch.Tensor:
        assert not isinstance(head, Fp8Matrix), "check_fp8 refuses it"
        t = native.rms_norm(x[rows], norm, self.shape.rms_norm_eps)
        if not isinstance(head, SharedRows):
            return native.linear(t, head, out_dtype=torch.float32)
        logits = native.linear(t, head.rows, out_dtype=torch.float32)
        return logits.gather(1, head.row_of.expand(len(logits), -1))
