"""Adds a LoRA adapter to the matrices of a model, and measures what rounding the sums loses.

Shapes: r rank, K inputs, N outputs, E experts, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from gptoss.engine.model.lora import load_layer
from gptoss.engine.model.lora_file import AdapterError, read_adapter
from gptoss.engine.model.model_config import ModelConfig
from gptoss.kernels.lora import LayerAdapter, LoraMatrices, Module

MODULES: dict[str, Module] = {  # the end of a canonical name -> what adapts it
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "out",
    "mlp.router.weight": "router",
    "mlp.experts.gate_proj": "w1",
    "mlp.experts.up_proj": "w1",
    "mlp.experts.down_proj": "w2",
}
KINDS: dict[Module, str] = {  # in the report
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "router": "mlp.router",
    "w1": "mlp.experts.gate_up_proj",
    "w2": "mlp.experts.down_proj",
}

EXPERT_PARAMETERS = (KINDS["w1"], KINDS["w2"])


@dataclass(slots=True)
class MergeError:
    """How far the stored matrices of one kind are from the exact sums."""

    stored_as: str  # "bfloat16" or "MXFP4"
    squares: float = 0.0  # of the exact sums
    change_squares: float = 0.0  # of what the adapter adds
    error_squares: float = 0.0
    largest: float = 0.0

    @property
    def relative_rms(self) -> float:
        """Of the exact sums."""
        return float((self.error_squares / self.squares) ** 0.5) if self.squares else 0.0

    @property
    def of_change(self) -> float:
        """The RMS error over the RMS of what the adapter adds: near 1, rounding takes away as much as it adds."""
        return float((self.error_squares / self.change_squares) ** 0.5) if self.change_squares else 0.0


class AdapterMerge:
    """An adapter that is added to a model, a matrix at a time; one layer of it is in memory.

    Raises:
        AdapterError: it is damaged, for another model, or of a kind that is not served.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.file = read_adapter(folder, config)
        self._config = config
        self._adapted = {(matrix.layer, matrix.module) for matrix in self.file.matrices}
        self._found: dict[Module, MergeError] = {}
        self._layer = lru_cache(maxsize=1)(self._load)

    @property
    def expert_parameters(self) -> list[str]:
        """The parameters of experts that it adapts."""
        kinds = {KINDS[module] for _, module in self._adapted}
        return [name for name in EXPERT_PARAMETERS if name in kinds]

    @property
    def errors(self) -> dict[str, MergeError]:
        """What was lost so far, by kind of matrix."""
        return {kind: self._found[module] for module, kind in KINDS.items() if module in self._found}

    def adapts(self, name: str) -> bool:
        """Whether it changes the canonical tensor of that name."""
        return _place(name) in self._adapted

    def change(self, name: str, expert: int | None = None) -> torch.Tensor:
        """What it adds to a tensor that it adapts: float32 [N, K], of one expert if the tensor has several.

        Raises AdapterError if that is not finite.
        """
        place = _place(name)
        assert place is not None
        layer, module = place
        found: LoraMatrices = getattr(self._layer(layer), module)
        a, b = (found.a, found.b) if expert is None else (found.a[expert], found.b[expert])
        if module == "w1":
            half = self._config.intermediate_size
            b = b[:, :half] if name.endswith("gate_proj") else b[:, half:]
        change = b.t() @ a
        if not torch.isfinite(change).all():
            raise AdapterError(f"{self.file.folder}: what the adapter adds to {name!r} is not finite")
        return change

    def count(self, name: str, exact: torch.Tensor, change: torch.Tensor, stored: torch.Tensor, stored_as: str) -> None:
        """Records what storing `exact`, of which `change` is the adapter's part, as `stored` has lost.

        Raises AdapterError if the stored type does not hold the sum.
        """
        place = _place(name)
        assert place is not None
        if not torch.isfinite(stored).all():
            raise AdapterError(f"{self.file.folder}: {name!r} with the adapter exceeds what {stored_as} holds")
        found = self._found.setdefault(place[1], MergeError(stored_as))
        difference = stored - exact
        found.squares += float(exact.square().sum())
        found.change_squares += float(change.square().sum())
        found.error_squares += float(difference.square().sum())
        found.largest = max(found.largest, float(difference.abs().max()))

    def check_unchanged(self) -> None:
        """Raises AdapterError if its files were changed since they were checked."""
        if read_adapter(self.file.folder, self._config).digest != self.file.digest:
            raise AdapterError(f"the files of {self.file.folder} have changed since they were checked")

    def _load(self, layer: int) -> LayerAdapter:
        return load_layer(self.file, self._config, layer)


def _place(name: str) -> tuple[int, Module] | None:
    """Layer and module of a canonical tensor; None if none adapts it."""
    parts = name.split(".", 3)
    module = MODULES.get(parts[-1])
    return (int(parts[2]), module) if module is not None else None
