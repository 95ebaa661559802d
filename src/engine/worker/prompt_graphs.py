"""Graphs of short pieces of prompts, for steps in which requests decode while others begin.

A layer of such a step is eight or nine launches, and a launch takes the host some 30 us: for a few hundred tokens the
host would take longer than the device. Graphs exist for a few numbers of tokens; a step takes the next larger one,
whose further tokens are padding: dense matrices are multiplied with them too, experts and attention skip them. More
tokens keep the device busy for as long as the host takes.

Shapes: T tokens, R rows to sample, V vocabulary (this rank's part).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.parallel.shards import Shard
from gptoss.engine.worker.batch import ScoredTokens, StepRows, layout_of, rows_with_logits
from gptoss.engine.worker.graph_inputs import PromptInputs
from gptoss.engine.worker.tap_buffers import TapBuffers
from gptoss.kernels.layers import LayerCache

MAX_PIECES = 32


class PromptGraphs:
    def __init__(
        self,
        config: EngineConfig,
        model: GptOss,
        cache: list[LayerCache],
        device: torch.device,
        shard: Shard,
        num_taps: int = 0,
    ) -> None:
        """`num_taps`: the model's, whose states graphs then give too."""
        self._cache = cache
        self._block_size = config.block_size
        self.sizes = config.prompt_graph_sizes
        width = math.ceil(config.max_model_len / config.block_size)
        self._max_pieces = min(MAX_PIECES, config.max_num_seqs)
        rows = max(self._max_pieces, 1 + config.max_drafts)
        # not where decode graphs write theirs: a step may need both
        self._logits = torch.zeros(rows, len(shard.vocab), dtype=torch.float32, device=device)
        most = self.sizes[-1] if self.sizes else 0
        self._inputs = PromptInputs(most, self._max_pieces, width, config.block_size, device, self._logits)
        self._taps = TapBuffers(num_taps, most, model, device)
        self.replays: dict[int, Callable[[], torch.Tensor]] = {}

    def forward(self, size: int) -> Callable[[], torch.Tensor]:
        """The pass that a graph of that many tokens repeats."""
        batch = self._inputs.batch(size)
        return lambda: self._taps.forward(batch, self._cache)

    def holds(self, rows: StepRows) -> bool:
        """Whether there is a graph for these rows: not with adapters or scored tokens."""
        if sum(rows.counts) > max(self.replays, default=0) or len(rows.states) > self._max_pieces:
            return False
        return self._num_logits(rows) <= len(self._logits) and not any(
            state.adapter or ScoredTokens.among(state, count)
            for state, count in zip(rows.states, rows.counts, strict=True)
        )

    def _num_logits(self, rows: StepRows) -> int:
        return sum(
            1 + len(rows.drafts.get(state.request_id, ()))
            for state, count in zip(rows.states, rows.counts, strict=True)
            if state.num_computed_tokens + count == state.tokens.size
        )

    def compute(self, rows: StepRows) -> torch.Tensor:
        """Returns logits float32 [R, V], valid until the next call, and fills `rows.sampled`."""
        layout = layout_of(rows, self._block_size)
        sample_rows = rows_with_logits(rows, layout.ends)
        self._inputs.fill(rows, layout, sample_rows)
        size = min(s for s in self.replays if s >= len(layout.positions))
        return self.replays[size]()[: len(sample_rows)]

    def tapped(self, count: int) -> list[torch.Tensor]:
        """Returns the states [T, H] at each tap of the first `count` tokens; valid as their logits are."""
        return self._taps.first(count)
