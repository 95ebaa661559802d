"""Where graphs leave the hidden states that a draft head takes.

Shapes: T tokens, H hidden, R rows to sample, V vocabulary.
"""

from __future__ import annotations

import torch

from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.kernels.layers import LayerCache


class TapBuffers:
    """A buffer for each tap, which graphs of all sizes share."""

    def __init__(self, num_taps: int, max_tokens: int, model: GptOss, device: torch.device) -> None:
        """For graphs of up to `max_tokens` tokens."""
        self._model = model
        self._buffers: list[torch.Tensor] = []  # [max_tokens, H] each
        if num_taps:
            shape = num_taps, max_tokens, model.config.hidden_size
            self._buffers = list(torch.zeros(shape, dtype=model.residual_dtype, device=device))

    def forward(self, batch: ForwardBatch, cache: list[LayerCache], hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Runs the model, with the same arguments and result, and leaves the states in the buffers."""
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
