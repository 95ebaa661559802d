"""Where graphs leave the hidden states that a draft head takes.

Shapes: T tokens, H hidden, R rows to sample, V vocabulary.
"""

from __future__ import annotations

import torch

from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.kernels.layers import LayerCache


class TapBuffers:
    """A buffer for each tap, which graphs of all sizes share, as they share the logits'."""

    def __init__(self, num_taps: int, most: int, model: GptOss, device: torch.device) -> None:
        """For graphs of up to `most` tokens."""
        self._model = model
        self._buffers: list[torch.Tensor] = []  # [most, H] each
        if num_taps:
            shape = num_taps, most, model.config.hidden_size
            self._buffers = list(torch.zeros(shape, dtype=model.residual_dtype, device=device))

    def forward(self, batch: ForwardBatch, cache: list[LayerCache], hidden: torch.Tensor | None = None) -> torch.Tensor:
        """As the model's, which it runs; leaves the states in the buffers."""
        if not self._buffers:
            return self._model.forward(batch, cache, hidden)
        states: list[torch.Tensor] = []
        result = self._model.forward(batch, cache, hidden, states)
        for buffer, state in zip(self._buffers, states, strict=True):
            buffer[: len(state)].copy_(state)
        return result

    def first(self, count: int) -> list[torch.Tensor]:
        """Returns the states [T, H] of the last replay's first `count` tokens; no tensors without taps."""
        return [buffer[:count] for buffer in self._buffers]
