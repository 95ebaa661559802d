"""The products of LoRA adapters in plain torch: y += (x A^T) B (Hu et al. 2021).

Shapes: T tokens, P pairs of a token and one of its experts, K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptoss.kernels.lora import LayerLora, LoraMatrices, Module, StepLora


@dataclass(frozen=True, slots=True)
class LoraRows:
    """A step's adapters in one layer."""

    layer: LayerLora
    step: StepLora

    @classmethod
    def of(cls, layer: LayerLora | None, step: StepLora | None) -> LoraRows | None:
        return None if layer is None or step is None else cls(layer, step)

    def add(self, module: Module, x: torch.Tensor, out: torch.Tensor) -> None:
        """x [T, K], out [T, N], which is changed in place: the rows with an adapter."""
        for slot, rows in self.step.groups:
            matrices = self._matrices(slot, module)
            if matrices is not None:
                out[rows] += delta_ref(x[rows], matrices.a, matrices.b).to(out.dtype)

    def add_experts(
        self, module: Module, x: torch.Tensor, tokens: torch.Tensor, experts: torch.Tensor, out: torch.Tensor
    ) -> None:
        """x [P, K], tokens and experts int64 [P], out [P, N], which is changed in place."""
        slot_of = self.step.slots[tokens]
        for slot, _ in self.step.groups:
            matrices = self._matrices(slot, module)
            if matrices is None:
                continue
            for expert in experts[slot_of == slot].unique().tolist():
                rows = torch.nonzero((slot_of == slot) & (experts == expert)).squeeze(1)
                out[rows] += delta_ref(x[rows], matrices.a[expert], matrices.b[expert]).to(out.dtype)

    def _matrices(self, slot: int, module: Module) -> LoraMatrices | None:
        adapter = self.layer.adapters[slot]
        return None if adapter is None else getattr(adapter, module)


def delta_ref(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """x [R, K], a [r, K], b [r, N] -> what the adapter adds, [R, N]."""
    return x.to(a.dtype) @ a.t() @ b
