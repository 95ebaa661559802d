"""One step's input to the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    token_ids: torch.Tensor  # int64 [T]
    sample_rows: torch.Tensor  # int64 [R], rows whose logits are needed
    step: Any  # what the kernel backend made of the step's layout
