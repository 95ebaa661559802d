"""LoRA adapters (Hu et al. 2021) as the kernels take them: by layer and slot.

Two thin matrices A and B for each adapted one: the product is x W^T + (x A^T) B. Each token of a step may have another
adapter, or none.

Shapes: T tokens, S slots, r rank, K inputs, N outputs, E experts of this rank, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

Module = Literal["q", "k", "v", "out", "router", "w1", "w2"]
MODULES: tuple[Module, ...] = get_args(Module)
NUM_MODULES = len(MODULES)


@dataclass(frozen=True, slots=True)
class LoraMatrices:
    """One adapted matrix. `b` is transposed and includes the adapter's scale."""

    a: torch.Tensor  # [r, K]; of experts [E, r, K]
    b: torch.Tensor  # [r, N]; of experts [E, r, N]

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(frozen=True, slots=True)
class LayerAdapter:
    """One adapter's part of a layer; None: that matrix is not adapted. The fields are those of `Module`."""

    q: LoraMatrices | None = None
    k: LoraMatrices | None = None
    v: LoraMatrices | None = None
    out: LoraMatrices | None = None
    router: LoraMatrices | None = None
    w1: LoraMatrices | None = None  # of experts: the I gate columns of b first, then the I up columns
    w2: LoraMatrices | None = None  # of experts

    def matrices(self) -> list[LoraMatrices | None]:
        return [getattr(self, module) for module in MODULES]


@dataclass(frozen=True, slots=True)
class LayerLora:
    """The adapters of one layer by slot. Changed by its LoraTable between steps."""

    adapters: list[LayerAdapter | None]
    addresses: torch.Tensor  # int64 [S, NUM_MODULES, 3]: of a and b, and the rank; zeros where there is none


class LoraTable:
    """The loaded adapters of one rank, by layer and slot."""

    def __init__(self, num_layers: int, num_slots: int, device: torch.device) -> None:
        self.num_slots = num_slots
        addresses = torch.zeros(num_layers, num_slots, NUM_MODULES, 3, dtype=torch.int64, device=device)
        self.layers = [LayerLora([None] * num_slots, addresses[n]) for n in range(num_layers)]

    def put(self, slot: int, parts: Sequence[LayerAdapter]) -> None:
        """Makes an adapter, of which `parts` are the layers, that of a slot."""
        for layer, part in zip(self.layers, parts, strict=True):
            layer.adapters[slot] = part
            rows = [_addresses(m) for m in part.matrices()]
            layer.addresses[slot] = torch.tensor(rows, dtype=torch.int64).to(layer.addresses.device)

    def clear(self, slot: int) -> None:
        for layer in self.layers:
            layer.adapters[slot] = None
            layer.addresses[slot] = 0


def _addresses(matrices: LoraMatrices | None) -> list[int]:
    if matrices is None:
        return [0, 0, 0]
    assert matrices.a.is_contiguous() and matrices.b.is_contiguous()
    return [matrices.a.data_ptr(), matrices.b.data_ptr(), matrices.rank]


@dataclass(frozen=True, slots=True)
class StepLora:
    """Which adapter each token of a step has."""

    slots: torch.Tensor  # int64 [T]; -1: none
    groups: list[tuple[int, torch.Tensor]]  # the slots in use, and the rows of each, int64


def step_lora(slots: np.ndarray | None, device: torch.device) -> StepLora | None:
    """`slots` int64 [T], -1: none -> what the kernels take; None where no token has an adapter."""
    if slots is None:
        return None
    groups = [
        (int(slot), torch.from_numpy(np.flatnonzero(slots == slot)).to(device))
        for slot in np.unique(slots)
        if slot >= 0
    ]
    return StepLora(torch.from_numpy(slots).to(device), groups)
