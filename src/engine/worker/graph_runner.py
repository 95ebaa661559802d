"""Decode steps replayed from CUDA graphs: a step of hundreds of small kernels becomes one launch.

A graph is made for each of a few batch sizes; a step takes the next larger one. All that changes from step to step lies
in buffers whose addresses the graphs hold: token ids, positions, slots, lengths, block tables and the number of rows
that are tokens. Rows beyond those are padding: they write to the null block, and no kernel reads experts for them.

Shapes: B sequences of one new token each, L columns of a block table.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from src.engine.config import FULL, SLIDING, EngineConfig
from src.engine.model.gpt_oss import ForwardBatch, GptOss, LayerCache
from src.engine.worker.batch import RequestState
from src.kernels.attention import AttentionPlan, Ragged

logger = logging.getLogger(__name__)

Forward = Callable[[], torch.Tensor]
KINDS = (FULL, SLIDING)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, then steps of 16 to 128 and of 32 to max_num_seqs, which is always one."""
    sizes = [1, 2, 4, 8, 16, 24, 32, *range(48, 129, 16), *range(160, max_num_seqs, 32)]
    return sorted({s for s in sizes if s < max_num_seqs} | {max_num_seqs})


class GraphRunner:
    def __init__(
        self,
        config: EngineConfig,
        model: GptOss,
        cache: list[LayerCache],
        device: torch.device,
        capture: Callable[[Forward], Forward] | None = None,
    ) -> None:
        """`capture` makes of a forward pass what repeats it: a CUDA graph, unless given."""
        self._model = model
        self._cache = cache
        self._block_size = config.block_size
        self._sizes = graph_sizes(config.max_num_seqs)
        largest, width = self._sizes[-1], math.ceil(config.max_model_len / config.block_size)
        pinned = device.type == "cuda"
        # rows: token ids, positions, slots of full and of sliding layers
        self._host_long = torch.zeros(4, largest, dtype=torch.int64, pin_memory=pinned)
        self._long = torch.zeros(4, largest, dtype=torch.int64, device=device)
        # lengths, and the number of rows that are tokens in the last place
        self._host_lengths = torch.zeros(largest + 1, dtype=torch.int32, pin_memory=pinned)
        self._lengths = torch.zeros(largest + 1, dtype=torch.int32, device=device)
        self._query_start = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(largest, device=device)
        self._none = torch.empty(0, dtype=torch.int32, device=device)
        self._host_tables = torch.zeros(2, largest, width, dtype=torch.int32, pin_memory=pinned)
        self._tables = torch.zeros(2, largest, width, dtype=torch.int32, device=device)
        self._replays: dict[int, Forward] = {}
        self._capture = capture or CudaGraphs()

    def capture_all(self) -> None:
        """Largest first: the smaller ones then fit into its memory."""
        started = time.monotonic()
        self.capture_sizes(self._sizes)
        logger.info(
            "captured %d decode graphs in %.1f s", len(self._sizes), time.monotonic() - started
        )

    def capture_sizes(self, sizes: list[int]) -> None:
        for size in sorted(sizes, reverse=True):
            self._replays[size] = self._capture(self._forward(self._batch(size)))

    def run(self, states: list[RequestState]) -> torch.Tensor:
        """One token of each -> logits float32 [B, V], valid until the next call."""
        size = next(s for s in self._sizes if s >= len(states))
        self._fill(states, size)
        return self.replay(size)[: len(states)]

    def replay(self, size: int) -> torch.Tensor:
        """The graph of that size once more, on what its buffers hold."""
        return self._replays[size]()

    def _forward(self, batch: ForwardBatch) -> Forward:
        return lambda: self._model.forward(batch, self._cache)

    def _batch(self, size: int) -> ForwardBatch:
        plans = {
            kind: AttentionPlan(
                self._long[2 + group, :size],
                size,
                ragged=Ragged(
                    self._query_start[: size + 1], self._lengths[:size], self._tables[group, :size], size,
                    self._none, self._none
                ),
            )
            for group, kind in enumerate(KINDS)
        }  # fmt: skip
        return ForwardBatch(
            self._long[0, :size], self._long[1, :size], plans, self._rows[:size], self._lengths[-1:]
        )

    def _fill(self, states: list[RequestState], size: int) -> None:
        long, lengths = self._host_long.numpy(), self._host_lengths.numpy()
        tables = self._host_tables.numpy()
        long[:, len(states) : size] = 0
        lengths[len(states) : size] = 0
        lengths[-1] = len(states)
        widest = 1
        for row, state in enumerate(states):
            position = state.num_computed_tokens
            lengths[row] = position + 1
            block, offset = divmod(position, self._block_size)
            slots = []
            for group, table in enumerate(state.blocks):
                blocks = table.view[: block + 1]
                tables[group, row, : len(blocks)] = blocks
                slots.append(blocks[block] * self._block_size + offset)
            widest = max(widest, block + 1)
            long[:, row] = (state.tokens.view[position], position, *slots)
        self._long.copy_(self._host_long, non_blocking=True)
        self._lengths.copy_(self._host_lengths, non_blocking=True)
        used = (slice(None), slice(len(states)), slice(widest))
        self._tables[used].copy_(self._host_tables[used], non_blocking=True)


class CudaGraphs:
    """Captures forward passes into CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, forward: Forward) -> Forward:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # compiles kernels and makes what must outlive the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward()
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def all_decode(states: list[RequestState], counts: list[int]) -> bool:
    """Whether each has one new token, its last, so that all are sampled."""
    return all(
        n == 1 and s.num_computed_tokens + 1 == s.tokens.size
        for s, n in zip(states, counts, strict=True)
    )
