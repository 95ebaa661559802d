"""What the compiled kernels need of a step's layout.

Shapes: T tokens, S visible tokens of all sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gptoss.kernels.lora import StepLora
from gptoss.kernels.step_layout import StepLayout, first_key


@dataclass(frozen=True, slots=True)
class CpuAttentionMetadata:
    """Token t sees positions first[t] .. last[t]; position p lies in slots[base[t] + p]. All int64."""

    slot_mapping: torch.Tensor  # [T], where the new keys and values go
    slots: torch.Tensor  # [S]
    base: torch.Tensor  # [T]
    first: torch.Tensor  # [T]
    last: torch.Tensor  # [T]


@dataclass(frozen=True, slots=True)
class CpuStep:
    rope: tuple[torch.Tensor, torch.Tensor]  # cosines and sines float32 [T, 1, D / 2]
    attention: tuple[CpuAttentionMetadata, ...]  # by group
    lora: StepLora | None = None


def attention_metadata(layout: StepLayout, group: int, window: int | None) -> CpuAttentionMetadata:
    positions = layout.positions
    slots, bases, total = [], [], 0
    for start, count, table in zip(layout.starts, layout.counts, layout.block_tables[group], strict=True):
        first = first_key(start, window)
        seen = np.arange(first, start + count)
        slots.append(layout.slots(table, seen))
        bases.append(total - first)
        total += len(seen)
    base = np.repeat(np.array(bases, np.int64), layout.counts)
    firsts = np.zeros_like(positions) if window is None else np.maximum(0, positions - window + 1)
    arrays = (layout.slot_mapping(group), np.concatenate(slots), base, firsts, positions)
    return CpuAttentionMetadata(*(torch.from_numpy(np.ascontiguousarray(a, np.int64)) for a in arrays))
