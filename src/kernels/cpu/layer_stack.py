"""The layers of one rank through the compiled kernels, a whole step in one call (decoder.h)."""

from __future__ import annotations

import weakref

import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.cpu.metadata import CpuStep
from gptoss.kernels.layers import LayerCache, LayerShape, LayerWeights, PackedExperts

NUM_POINTERS = 20


class CpuLayerStack:
    """Holds a table of the weights' addresses; the tensors must stay where they are.

    A thread that another process keeps off its core may read them after the call, so they are freed when it has left.
    """

    def __init__(self, shape: LayerShape, layers: list[LayerWeights]) -> None:
        self._shape = shape
        self._layers = layers
        first = layers[0].lora
        self._adapters = None if first is None else first.addresses  # those of the other layers follow
        self._cache: list[LayerCache] | None = None
        self._table = torch.empty(0)
        weakref.finalize(self, native.settle)

    def __call__(self, x: torch.Tensor, cache: list[LayerCache], step: CpuStep) -> torch.Tensor:
        """x bfloat16 [T, H], changed in place -> [T, H]."""
        if cache is not self._cache:
            native.settle()
            self._table, self._cache = self._addresses(cache), cache
        rows = [[t.data_ptr() for t in (m.slot_mapping, m.slots, m.base, m.first, m.last)] for m in step.attention]
        s = self._shape
        lora = (None, None) if step.lora is None else (self._adapters, step.lora.slots)
        native.decoder(
            self._table,
            torch.tensor(rows),
            x,
            *step.rope,
            s.rms_norm_eps,
            s.attention_scale,
            s.swiglu_limit,
            s.num_heads,
            s.num_kv_heads,
            s.num_experts,
            s.experts_per_token,
            self._intermediate,
            *lora,
        )
        return x

    @property
    def _intermediate(self) -> int:
        return self._layers[0].experts.b1.shape[1] // 2

    def _addresses(self, cache: list[LayerCache]) -> torch.Tensor:
        """int64 [L, NUM_POINTERS + 2]: LayerPointers of decoder.h."""
        rows = []
        for layer, pair in zip(self._layers, cache, strict=True):
            experts = layer.experts
            assert not isinstance(experts, PackedExperts)
            ups, layout = native.layout_of(experts.w1)
            tensors = [
                layer.attention_norm,
                *native.matrix_parts(layer.qkv),
                layer.qkv_bias,
                layer.sinks,
                *native.matrix_parts(layer.out),
                layer.out_bias,
                layer.mlp_norm,
                layer.router,
                layer.router_bias,
                *native.matrix_parts(experts.w1),
                experts.b1,
                *native.matrix_parts(experts.w2),
                experts.b2,
                ups,
                pair.key,
                pair.value,
            ]
            assert len(tensors) == NUM_POINTERS
            assert all(t is None or t.is_contiguous() for t in tensors)
            rows.append([*(0 if t is None else t.data_ptr() for t in tensors), layer.group, layout])
        return torch.tensor(rows)
